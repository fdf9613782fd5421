"""xformers' `memory_efficient_attention` by fastfusion's ops, for code that calls it.

    from fastfusion.integrations.xformers import memory_efficient_attention

xformers itself has operators for GPUs alone; these run wherever fastfusion does, and need xformers
only for its classes of masks (`xformers.ops.fmha.attn_bias`, as of 0.0.35):

| class of `attn_bias` | becomes |
|---|---|
| none, a float tensor | `scaled_dot_product_attention`, `attn_mask` |
| LowerTriangular..., with a tensor, from the bottom right | `is_causal`, `causal_alignment` |
| BlockDiagonal..., causal or not | `varlen_attention` |
| ...PaddedKeys, ...GappyKeys, Paged... | `varlen_attention`, on a packed copy of the keys in use |
| Local... | a bool `attn_mask` for the window; of the longest block, where there are blocks |
| any other class | the tensor that its `materialize` makes, with a warning |

What differs from xformers: a query that sees no key gives 0, not NaN; a bias may have any strides,
and float32 beside 16-bit inputs; masks of any class may come with (batch, length, dim) inputs;
double backward works. Keys and values of 8-bit or 4-bit integers, and a choice of xformers' own
operators by `op`, are refused.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfusion.core import arguments
from fastfusion.core.on_import import on_import
from fastfusion.ops.scaled_dot_product_attention import scaled_dot_product_attention
from fastfusion.ops.varlen_attention import varlen_attention


class _Window(NamedTuple):
    """The keys i - left to i + right that query i sees, or without a bound; counted from the first
    query and key, or from the last."""

    left: int | None = None
    right: int | None = None
    bottom_right: bool = False

    @property
    def is_causal(self) -> bool:
        return self.left is None and self.right == 0

    @property
    def alignment(self) -> str:
        return "bottom_right" if self.bottom_right else "top_left"

    def mask(self, q_len: int, kv_len: int, shifts: Tensor | int, device: Any) -> Tensor | None:
        """bool (..., q_len, kv_len), True = attend, where neither all keys are seen nor the
        causal ones; key j of shifts[s] + j stands at the place of query j."""
        if self.is_causal or self.left is self.right is None:
            return None
        distance = torch.arange(kv_len, device=device) - torch.arange(q_len, device=device)[:, None]
        if self.bottom_right:
            distance = distance - shifts
        seen = distance <= (kv_len + q_len if self.right is None else self.right)
        return seen if self.left is None else seen & (distance >= -self.left)


class _Blocks(NamedTuple):
    """Where sequences lie in a batch of 1, as `varlen_attention` takes it, of keys at `places`."""

    offsets_q: Tensor
    longest_q: int
    offsets_k: Tensor
    longest_k: int
    places: Tensor | None


_ALL = _Window()
_CAUSAL = _Window(right=0)
_CAUSAL_AT_THE_END = _Window(right=0, bottom_right=True)


def _local(bias: Any) -> _Window:
    return _Window(bias.window_left, bias.window_right, bottom_right=True)


def _causal_local(bias: Any) -> _Window:
    return _Window(bias._window_size - 1, 0)


def _causal_local_at_the_end(bias: Any) -> _Window:
    return _Window(bias._window_size - 1, 0, bottom_right=True)


# By the name of the class: the window of the whole, and that of each block.
_WHOLE: dict[str, Callable[[Any], _Window]] = {
    "LowerTriangularMask": lambda bias: _CAUSAL,
    "LowerTriangularFromBottomRightMask": lambda bias: _CAUSAL_AT_THE_END,
    "LowerTriangularFromBottomRightLocalAttentionMask": _causal_local_at_the_end,
    "LocalAttentionFromBottomRightMask": _local,
}
_BLOCKS: dict[str, Callable[[Any], _Window]] = {
    "BlockDiagonalMask": lambda bias: _ALL,
    "BlockDiagonalCausalMask": lambda bias: _CAUSAL,
    "BlockDiagonalCausalFromBottomRightMask": lambda bias: _CAUSAL_AT_THE_END,
    "BlockDiagonalCausalLocalAttentionMask": _causal_local,
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": _causal_local_at_the_end,
    "BlockDiagonalPaddedKeysMask": lambda bias: _ALL,
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": lambda bias: _CAUSAL_AT_THE_END,
    "BlockDiagonalLocalAttentionPaddedKeysMask": _local,
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": _causal_local_at_the_end,
    "PagedBlockDiagonalPaddedKeysMask": lambda bias: _ALL,
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": lambda bias: _CAUSAL_AT_THE_END,
    "BlockDiagonalGappyKeysMask": lambda bias: _ALL,
    "BlockDiagonalCausalWithOffsetGappyKeysMask": lambda bias: _CAUSAL_AT_THE_END,
    "PagedBlockDiagonalGappyKeysMask": lambda bias: _ALL,
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask": lambda bias: _CAUSAL_AT_THE_END,
}
_names: dict[type, str] = {}  # of the classes, since compiled code cannot ask one for its name


def _learn_classes(module: Any) -> None:
    for name in ("LowerTriangularMaskWithTensorBias", *_WHOLE, *_BLOCKS):
        if isinstance(getattr(module, name, None), type):
            _names[getattr(module, name)] = name


# The attention of xformers after 0.0.35 lives in mslk.
for _module in ("xformers.ops.fmha.attn_bias", "mslk.attention.fmha.attn_bias"):
    on_import(_module, _learn_classes)


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """softmax(scale * query key^T + attn_bias) value, differentiable in all four.

    Args:
        query: (batch, q_len, heads, head_dim), (batch, q_len, head_dim), or with heads in groups
            (batch, q_len, groups, heads, head_dim); float32, bfloat16, float16 or float64, any
            strides.
        key: the same with kv_len; heads that share a key are expanded, and read once.
        value: the same with kv_len and value_dim.
        attn_bias: None; a float tensor (batch, heads, q_len, kv_len), (batch, q_len, kv_len) or
            (batch, groups, heads, q_len, kv_len) that is added to the scores; or an
            `xformers.ops.AttentionBias`. Those with blocks take a batch of 1.
        p: probability of dropping a score; applied whenever it is above 0.
        scale: 1 / sqrt(head_dim) by default.
        op: None: fastfusion chooses, see `fastfusion.use_backend`.
        output_dtype: of the result; that of the query by default.

    Returns:
        The shape of query with value_dim as its last, contiguous.

    Raises:
        TypeError: an argument is not of the type or dtype named above.
        ValueError: shapes, devices or numbers that do not fit, or an `op`; the message says which.
    """
    out, _ = _attend(query, key, value, attn_bias, p, scale, op, output_dtype, False)
    return out


memory_efficient_attention_forward = torch.no_grad()(memory_efficient_attention)


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`memory_efficient_attention` and the log-sum-exp of the scores, without gradients.

    Returns:
        out, and lse (batch, heads, q_len) or (batch, groups, heads, q_len), natural logarithm, in
        float32 (float64 for float64 inputs); heads is 1 for inputs without them. A query that
        sees no key has -inf.

    Raises:
        NotImplementedError: p is not 0, as in xformers.
        TypeError, ValueError: as of :func:`memory_efficient_attention`.
    """
    if p != 0.0:
        raise NotImplementedError("p must be 0 here, as in xformers: the mask would be lost")
    with torch.no_grad():
        return _attend(query, key, value, attn_bias, p, scale, op, output_dtype, True)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Any,
    p: float,
    scale: float | None,
    op: Any,
    output_dtype: torch.dtype | None,
    return_lse: bool,
) -> tuple[Tensor, Any]:
    """out and, where it is asked for, lse."""
    _check(query, key, value, op)
    queries, keys, values = _with_heads(query, key, value)
    tensor, window, blocks = _read(bias, query, key)
    options: dict[str, Any] = {"scale": scale, "dropout_p": p, "return_lse": return_lse}
    if blocks is None:
        result = _attend_to_all(queries, keys, values, tensor, window, options)
    else:
        result = _attend_in_blocks(queries, keys, values, blocks, window, options)
    out, lse = result if return_lse else (result, None)
    out = out.reshape(*query.shape[:-1], value.shape[-1])
    if lse is not None and query.dim() == 5:
        lse = lse.unflatten(1, query.shape[2:4])
    return out if output_dtype is None else out.to(output_dtype), lse


def _check(query: Any, key: Any, value: Any, op: Any) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} must be a floating Tensor, got {tensor.dtype}: fastfusion has no "
                "attention to quantised keys"
            )
    sizes = arguments.shapes(query=query, key=key, value=value)
    if op is not None:
        raise ValueError(
            "op must be None: it names operators of xformers, which are not run here "
            "(fastfusion.use_backend chooses among ours)"
        )
    if query.dim() not in (3, 4, 5) or not query.dim() == key.dim() == value.dim():
        raise ValueError(
            "query, key and value must all be (batch, length, heads, dim), (batch, length, dim) or "
            f"(batch, length, groups, heads, dim), got {sizes}"
        )
    batch, _, *heads, dim = query.shape
    if key.shape != (batch, key.shape[1], *heads, dim):
        raise ValueError(
            "key must have the batch, heads and head_dim of query; expand those that are shared: "
            f"{sizes}"
        )
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"value must have the batch, kv_len and heads of key, got {sizes}")


def _with_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, length, heads, dim) of each. Of a group that shares a key it is taken once, where
    no gradient would have to go to each of the expanded ones."""
    if query.dim() == 3:
        return query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
    if query.dim() == 4:
        return query, key, value
    tracked = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    if not tracked and all(t.shape[3] == 1 or t.stride(3) == 0 for t in (key, value)):
        return query.flatten(2, 3), key[:, :, :, 0], value[:, :, :, 0]
    return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)


def _read(bias: Any, query: Tensor, key: Tensor) -> tuple[Tensor | None, _Window, _Blocks | None]:
    """A tensor (batch, heads, q_len, kv_len) to add, the window, and the blocks that have it."""
    if bias is None:
        return None, _ALL, None
    if isinstance(bias, Tensor):
        return _checked_bias(bias, query, key.shape[1]), _ALL, None
    kind = type(bias)
    if not hasattr(bias, "materialize"):
        raise TypeError(
            f"attn_bias must be None, a Tensor or an AttentionBias of xformers, got {kind.__name__}"
        )
    name = _names.get(kind)
    try:
        if name == "LowerTriangularMaskWithTensorBias":
            return _checked_bias(bias._bias, query, key.shape[1]), _CAUSAL, None
        if name in _WHOLE:
            return None, _WHOLE[name](bias), None
        if name in _BLOCKS:
            return None, _BLOCKS[name](bias), _blocks_of(bias, query, key)
    except AttributeError:  # a version with other attributes
        pass
    _warn_of(f"{kind.__module__}.{kind.__qualname__}")
    batch, q_len, *heads, _ = query.shape
    shape = (batch, math.prod(heads), q_len, key.shape[1])
    return bias.materialize(shape, dtype=query.dtype, device=query.device), _ALL, None


@cache
def _warn_of(name: str) -> None:
    warnings.warn(
        f"fastfusion does not know {name}: its materialize() makes a bias as large as the scores",
        RuntimeWarning,
        stacklevel=5,
    )


def _checked_bias(bias: Tensor, query: Tensor, kv_len: int) -> Tensor:
    """(batch, heads, q_len, kv_len) of a bias that fits the query."""
    if not bias.is_floating_point():
        raise TypeError(
            f"attn_bias must be float, which is added to the scores, got {bias.dtype}; of a bool "
            "mask -inf where keys are hidden"
        )
    batch, q_len, *heads, _ = query.shape
    expected = (batch, *heads, q_len, kv_len)
    if tuple(bias.shape) != expected:
        raise ValueError(f"attn_bias must be {expected}, got {tuple(bias.shape)}")
    if query.dim() == 3:
        return bias.unsqueeze(1)
    return bias.flatten(1, 2) if query.dim() == 5 else bias


def _blocks_of(bias: Any, query: Tensor, key: Tensor) -> _Blocks:
    if query.shape[0] != 1:
        raise ValueError(
            f"query, key and value must have batch 1 beside {type(bias).__name__}, whose blocks "
            f"follow each other, got {query.shape[0]}"
        )
    q_info, k_info, device = bias.q_seqinfo, bias.k_seqinfo, query.device
    packed = not hasattr(k_info, "seqlen_py")
    for name, info, tensor in (("query", q_info, query), ("key", k_info, key)):
        if (info is q_info or packed) and info.seqstart_py[-1] != tensor.shape[1]:
            raise ValueError(
                f"{name} must have the {info.seqstart_py[-1]} rows of attn_bias, "
                f"got {tensor.shape[1]}"
            )
    longest_q = max((end - start for start, end in q_info.intervals()), default=0)
    if packed:
        longest_k = max((end - start for start, end in k_info.intervals()), default=0)
        return _Blocks(q_info.seqstart, longest_q, k_info.seqstart, longest_k, None)
    places = _places_of_keys(bias)
    rows = [row for block in places for row in block]
    if max(rows, default=-1) >= key.shape[1]:
        raise ValueError(
            f"key must have the rows that attn_bias names, {max(rows) + 1}, got {key.shape[1]}"
        )
    lengths = torch.tensor([0, *map(len, places)], device=device)
    offsets = lengths.cumsum(0, dtype=q_info.seqstart.dtype)
    chosen = torch.tensor(rows, dtype=torch.int64, device=device)
    return _Blocks(q_info.seqstart, longest_q, offsets, max(map(len, places), default=0), chosen)


def _places_of_keys(bias: Any) -> list[Sequence[int]]:
    """The rows of the keys of each block."""
    info = bias.k_seqinfo
    if not hasattr(bias, "block_tables"):
        return [range(start, end) for start, end in info.intervals()]
    size = bias.page_size
    # Padded blocks begin at 0 and have a length, gappy ones a first key and an end.
    starts = [0] * len(info.seqlen_py) if hasattr(info, "padding") else info.seqstart_py[:-1]
    tables = bias.block_tables.tolist()
    return [
        [pages[at // size] * size + at % size for at in range(start, end)]
        for pages, start, end in zip(tables, starts, info.seqlen_py, strict=True)
    ]


def _attend_to_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    window: _Window,
    options: dict[str, Any],
) -> Any:
    """(batch, length, heads, dim), and lse (batch, heads, length) where options ask for it."""
    q_len, kv_len = query.shape[1], key.shape[1]
    mask = window.mask(q_len, kv_len, kv_len - q_len, query.device)
    result = scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        bias if mask is None else mask,
        is_causal=window.is_causal, causal_alignment=window.alignment,
        enable_gqa=key.shape[2] != query.shape[2], **options,
    )  # fmt: skip
    if options["return_lse"]:
        return result[0].transpose(1, 2), result[1]
    return result.transpose(1, 2)


def _attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: _Blocks,
    window: _Window,
    options: dict[str, Any],
) -> Any:
    """The same, each block alone."""
    key, value = key[0], value[0]
    if blocks.places is not None:
        key, value = key[blocks.places], value[blocks.places]
    longest = blocks.longest_q, blocks.longest_k
    shifts = (blocks.offsets_k.diff() - blocks.offsets_q.diff())[:, None, None, None]
    result = varlen_attention(
        query[0], key, value, blocks.offsets_q, blocks.offsets_k, *longest,
        attn_mask=window.mask(*longest, shifts, query.device),
        is_causal=window.is_causal, causal_alignment=window.alignment, **options,
    )  # fmt: skip
    if options["return_lse"]:
        return result[0][None], result[1].transpose(0, 1)[None]
    return result[None]
