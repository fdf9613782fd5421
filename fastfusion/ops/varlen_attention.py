"""Attention over packed sequences of different lengths, without padding.

Sequence b holds rows cu_seqlens_q[b] : cu_seqlens_q[b + 1] of the queries and
cu_seqlens_k[b] : cu_seqlens_k[b + 1] of the keys, and attends to itself alone, by the formulas of
`scaled_dot_product_attention`. Positions in causal masks and dropout count inside the sequence, so
packed and padded calls agree. Rows behind the last sequence, as buffers of a fixed size have them,
give out = 0, lse = -inf and no gradient. The layout is FlashAttention's (Dao et al., 2022, unpadded
calls).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import has_torch_function_variadic

from fastfusion.backends import cpu, triton
from fastfusion.core import arguments, philox, score_policy
from fastfusion.core import reference as formulas
from fastfusion.core.op import Implementation, Op, never_refuses
from fastfusion.core.score_policy import Window
from fastfusion.core.torch_op import Definition


class Arguments(NamedTuple):
    """Those of the public function, in its order."""

    query: Any
    key: Any
    value: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    max_seqlen_q: Any = None
    max_seqlen_k: Any = None
    # By name only:
    attn_mask: Any = None
    is_causal: Any = False
    causal_alignment: Any = "top_left"
    window: Any = None
    softcap: Any = None
    alibi_slopes: Any = None
    prefix_len: Any = None
    sinks: Any = None
    scale: Any = None
    dropout_p: Any = 0.0
    return_lse: Any = False
    backend: Any = None


_POSITIONAL = 7


class Call(NamedTuple):
    """What an implementation takes; csrc/torch has its twin."""

    query: Tensor  # (total_q, H, D)
    key: Tensor  # (total_k, Hkv, D), Hkv divides H
    value: Tensor  # (total_k, Hkv, Dv)
    attn_mask: Tensor | None  # broadcasts to (sequences, H, max_seqlen_q, max_seqlen_k)
    cu_seqlens_q: Tensor  # (sequences + 1,)
    cu_seqlens_k: Tensor
    alibi_slopes: Tensor | None  # (sequences, H)
    seed: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    dropout_p: float = 0.0
    is_causal: bool = False
    bottom_right: bool = False
    scale: float | None = None
    window_left: int | None = None  # no bound
    window_right: int | None = None
    softcap: float | None = None
    prefix_len: Tensor | None = None  # (sequences,), of a causal call
    sinks: Tensor | None = None  # (H,)

    def head_dims(self) -> tuple[int, ...]:
        return self.query.shape[-1], self.value.shape[-1]

    def conditions(self) -> Iterator[Any]:
        """What holds for every call; a mask that does not broadcast raises, and so do offsets."""
        query, key, value = self.query, self.key, self.value
        _, heads, dim = query.shape
        total, kv_heads, _ = value.shape
        yield arguments.are_alike(query, key, value)
        yield dim > 0
        for size, expected in zip(key.shape, (total, kv_heads, dim), strict=True):
            yield size == expected
        yield heads == kv_heads or (kv_heads > 0 and heads % kv_heads == 0)
        for offsets in (self.cu_seqlens_q, self.cu_seqlens_k):
            yield offsets.dim() == 1 and offsets.dtype in (torch.int32, torch.int64)
            yield offsets.device == query.device
        yield self.cu_seqlens_q.shape[0] == self.cu_seqlens_k.shape[0]
        if arguments.is_readable(self.cu_seqlens_q):
            _check_offsets("q", self.cu_seqlens_q, self.max_seqlen_q, query, query)
            _check_offsets("k", self.cu_seqlens_k, self.max_seqlen_k, key, query)
        lengths = self.max_seqlen_q, self.max_seqlen_k
        sequences = self.cu_seqlens_q.shape[0] - 1
        yield arguments.mask_fits(self.attn_mask, query, sequences, heads, *lengths)
        yield arguments.numbers_fit(self.seed, query, self.scale)
        yield from score_policy.kinds_fit(self, sequences, heads)
        yield from score_policy.ranges_fit(self, sequences)
        yield from score_policy.sinks_fit(self, heads)


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    prefix_len: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    prefix_len: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    prefix_len: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each packed sequence to its own keys.

    Args:
        query: (total_q, heads, head_dim), float32, bfloat16, float16 or float64.
        key: (total_k, kv_heads, head_dim); heads may be a multiple of kv_heads.
        value: (total_k, kv_heads, value_dim).
        cu_seqlens_q: int32 or int64 (sequences + 1,), where each sequence's queries begin:
            starts at 0, never falls, ends at total_q or before. Rows behind the end give 0.
        cu_seqlens_k: the same for keys and values.
        max_seqlen_q: at least the longest sequence of queries; found in `cu_seqlens_q` where it is
            left out, which on a GPU waits for the device.
        max_seqlen_k: at least the longest sequence of keys.
        attn_mask: broadcastable to (sequences, heads, max_seqlen_q, max_seqlen_k), positions
            counted inside each sequence: bool, True = attend, or a float bias that is added to
            the scores and may require a gradient.
        is_causal: query i of a sequence sees its keys 0..i.
        causal_alignment: "top_left", or "bottom_right", where the last query of a sequence sees
            its last key, as in FlashAttention.
        window: (left, right), how many keys a query sees before its own and behind it; None: no
            bound. A query's own key has its number in the sequence, or with "bottom_right" the
            same from the end. Combines with the masks; tiles outside of it cost nothing.
        softcap: scores become softcap * tanh(score / softcap) before masks (Gemma 2).
        alibi_slopes: broadcastable to (sequences, heads), float32 or of the query's dtype: a score
            falls by slope * the distance of the key from the query's own (ALiBi). Its gradient is
            the reference's.
        prefix_len: integers, broadcastable to (sequences,): the call is causal, but all queries of
            a sequence see its first so many keys, as of a picture before a text.
        sinks: broadcastable to (heads,), float32 or of the query's dtype, may require a gradient:
            one more score for each head, which takes weight and has no value, as in
            `scaled_dot_product_attention`; of rows behind the last sequence there is none.
        scale: factor of the scores, any finite number; 1 / sqrt(head_dim) by default.
        dropout_p: probability of dropping a score; applied whenever it is above 0.
        return_lse: also return the log-sum-exp of each row of scores.
        backend: as in `scaled_dot_product_attention`.

    Returns:
        out (total_q, heads, value_dim); with `return_lse`, the pair (out, lse), lse
        (total_q, heads) in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument is not of the type or dtype named above.
        ValueError: shapes, devices or numbers that do not fit; the message prints them. The
            values of `cu_seqlens` are checked on the CPU only: elsewhere that would wait for
            the device.
        BackendUnavailableError: `backend` cannot run this call; the message says why.
    """
    if not torch.compiler.is_compiling():
        tensors = (query, key, value, attn_mask, cu_seqlens_q, cu_seqlens_k, alibi_slopes)
        rare = (prefix_len, sinks)
        if has_torch_function_variadic(*tensors, *rare):
            answer = arguments.ask_torch_function(
                varlen_attention,
                Arguments(
                    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                    attn_mask, is_causal, causal_alignment, window, softcap, alibi_slopes, *rare,
                    scale, dropout_p, return_lse, backend,
                ),
                _POSITIONAL,
                (*tensors, *rare),
            )  # fmt: skip
            if answer is not NotImplemented:
                return answer
        kinds: Any = score_policy.NONE
        if window is not None or softcap is not None:
            kinds = score_policy.plain_kinds(window, softcap)
        if (
            type(is_causal) is type(return_lse) is bool
            and type(max_seqlen_q) is type(max_seqlen_k) is int
            and arguments.are_plain(attn_mask, dropout_p, scale, causal_alignment)
            and kinds is not None
        ):
            # 0.1 us less than by its own constructor.
            slopes = score_policy.slopes_of_each(alibi_slopes, cu_seqlens_q, 1)
            call = tuple.__new__(Call, (
                *tensors[:-1], slopes, None, max_seqlen_q, max_seqlen_k, 0.0,
                is_causal or prefix_len is not None, causal_alignment == "bottom_right", scale,
                *kinds, *rare,
            ))  # fmt: skip
            result = OP.attempt(backend, call, return_lse)
            if result is not None:
                return result
    call = normalize(
        Arguments(
            query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, attn_mask,
            is_causal, causal_alignment, window, softcap, alibi_slopes, prefix_len, sinks, scale,
            dropout_p, return_lse,
        )
    )  # fmt: skip
    return OP.run(backend, call, return_lse)


def check(given: Arguments) -> None:
    """Raise TypeError or ValueError for arguments that are not legal."""
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, attn_mask = given[:8]
    arguments.check_tensors(query=query, key=key, value=value)
    sizes = arguments.shapes(query=query, key=key, value=value)
    if not query.dim() == key.dim() == value.dim() == 3:
        raise ValueError(f"query, key and value must be (total, heads, dim), got {sizes}")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"key must have the head_dim of query, got {sizes}")
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(f"value must have the total and the heads of key, got {sizes}")
    if query.shape[1] % key.shape[1] if key.shape[1] else query.shape[1]:
        raise ValueError(f"the heads of query must be a multiple of the heads of key, got {sizes}")
    for side, offsets, longest, tensor in (
        ("q", cu_seqlens_q, max_seqlen_q, query),
        ("k", cu_seqlens_k, max_seqlen_k, key),
    ):
        _check_offsets(side, offsets, longest, tensor, query)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "cu_seqlens_k must have the length of cu_seqlens_q, got "
            + arguments.shapes(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        )
    arguments.check_flag("is_causal", given.is_causal)
    arguments.check_alignment(given.causal_alignment)
    if arguments.causal_bias(attn_mask) is not None:
        raise TypeError(
            "attn_mask must be a plain tensor: is_causal and causal_alignment stand for a "
            f"{type(attn_mask).__name__} here"
        )
    if attn_mask is not None:
        longest = (
            _longest(cu_seqlens_q, max_seqlen_q, query, attn_mask, -2),
            _longest(cu_seqlens_k, max_seqlen_k, key, attn_mask, -1),
        )
        target = (cu_seqlens_q.shape[0] - 1, query.shape[1], *longest)
        arguments.check_attn_mask(attn_mask, query, target, sizes)
    leading = (cu_seqlens_q.shape[0] - 1, query.shape[1])
    score_policy.check_kinds(given, query, leading, sizes)
    score_policy.check_ranges(given, query, key, leading[:1], sizes)
    score_policy.check_sinks(given.sinks, query, leading[1:], sizes)
    arguments.check_scale(given.scale, query)
    arguments.check_dropout(given.dropout_p)
    arguments.check_flag("return_lse", given.return_lse)


def _check_offsets(side: str, offsets: Any, longest: Any, tensor: Tensor, query: Tensor) -> None:
    name, total = f"cu_seqlens_{side}", tensor.shape[0]
    whose = "query" if side == "q" else "key"
    values = arguments.check_offsets(name, offsets, total, query, "query", f"the rows of {whose}")
    longest = arguments.number(f"max_seqlen_{side}", longest)
    if longest is not None:
        if isinstance(longest, bool) or not isinstance(longest, int | torch.SymInt):
            raise TypeError(
                f"max_seqlen_{side} must be an int or None, got {type(longest).__name__}"
            )
        if longest < 0:
            raise ValueError(f"max_seqlen_{side} must not be negative, got {longest}")
    if values is None or longest is None:
        return
    longest_given = max((b - a for a, b in zip(values, values[1:], strict=False)), default=0)
    if longest_given > longest:
        raise ValueError(
            f"max_seqlen_{side} must be at least the longest sequence, {longest_given}, "
            f"got {longest}"
        )


def _longest(offsets: Tensor, longest: Any, rows: Tensor, mask: Any, dim: int) -> Any:
    """`longest`, or if it is left out that of `offsets`. Under tracing a bound that has no need of
    values: the size of the mask along this dimension, or else the number of rows."""
    if longest is not None:
        return arguments.number("max_seqlen", longest)
    if offsets.shape[0] == 1:
        return 0
    if offsets.is_cuda and not torch.compiler.is_compiling() or arguments.is_readable(offsets):
        return int(offsets.diff().max())
    named = isinstance(mask, Tensor) and mask.dim() >= -dim and mask.shape[dim] != 1
    return mask.shape[dim] if named else rows.shape[0]


def normalize(given: Arguments) -> Call:
    """Public arguments, cast as autocast asks and checked, as every implementation takes them."""
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, attn_mask = given[:8]
    dtype = arguments.autocast_dtype(arguments.device_type_of(query))
    query, key, value = arguments.autocast_cast(dtype, query, key, value)
    attn_mask = arguments.autocast_mask(dtype, attn_mask)
    if not torch.compiler.is_compiling():
        check(given._replace(query=query, key=key, value=value, attn_mask=attn_mask))
    max_seqlen_q = _longest(cu_seqlens_q, max_seqlen_q, query, attn_mask, -2)
    max_seqlen_k = _longest(cu_seqlens_k, max_seqlen_k, key, attn_mask, -1)
    scale = arguments.number("scale", given.scale)
    query, key = arguments.with_a_head_dim(query, key)
    seed = philox.draw_seed(query.device) if given.dropout_p > 0.0 else None
    leading = (cu_seqlens_q.shape[0] - 1, query.shape[1])
    slopes = score_policy.slopes_of(given.alibi_slopes, query, *leading)
    *_, prefix = score_policy.ranges_of(given, leading[:1], None, None)
    return Call(
        query, key, value, attn_mask, cu_seqlens_q, cu_seqlens_k, slopes, seed, max_seqlen_q,
        max_seqlen_k, given.dropout_p, given.is_causal or prefix is not None,
        given.causal_alignment == "bottom_right", scale, *score_policy.kinds_of(given), prefix,
        score_policy.sinks_of(given.sinks, query, leading[1]),
    )  # fmt: skip


def _places(offsets: Tensor, total: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of the packed tensor its place in the padded one, or one behind all of it; the
    lengths; and the padding mask."""
    offsets = offsets.long()
    lengths = offsets[1:] - offsets[:-1]
    hidden = torch.arange(longest, device=offsets.device) >= lengths[:, None]
    rows = torch.arange(total, device=offsets.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
    places = sequence * longest + rows - offsets[sequence]
    end = lengths.shape[0] * longest
    return torch.where(rows < offsets[-1], places, end), lengths, hidden


def _pad(packed: Tensor, places: Tensor, sequences: int, longest: int) -> Tensor:
    """(total, heads, dim) as (sequences, heads, longest, dim)."""
    empty = packed.new_zeros(sequences * longest + 1, *packed.shape[1:])
    filled = empty.index_copy(0, places, packed)[:-1]
    return filled.unflatten(0, (sequences, longest)).transpose(1, 2)


def _packed(padded: Tensor, rows: Tensor, fill: float) -> Tensor:
    """(sequences, heads, longest, ...) back to (total, heads, ...); `fill` behind the end."""
    flat = padded.transpose(1, 2).flatten(0, 1)
    behind = flat.new_full((1, *flat.shape[1:]), fill)
    return torch.cat((flat, behind)).index_select(0, rows)


def run_reference(call: Call, lse: bool) -> Any:
    """The definition."""
    query, key, value = call.query, call.key, call.value
    longest_q, longest_k = call.max_seqlen_q, call.max_seqlen_k
    sequences = call.cu_seqlens_q.shape[0] - 1
    rows, q_lengths, _ = _places(call.cu_seqlens_q, query.shape[0], longest_q)
    columns, kv_lengths, hidden = _places(call.cu_seqlens_k, key.shape[0], longest_k)
    diagonal = kv_lengths - q_lengths if call.bottom_right else 0
    out, log_sum_exp = formulas.attention(
        score_policy.policy_of(call, diagonal), _pad(query, rows, sequences, longest_q),
        _pad(key, columns, sequences, longest_k), _pad(value, columns, sequences, longest_k),
        call.attn_mask, hidden, call.seed, call.dropout_p, call.scale,
    )  # fmt: skip
    out = _packed(out, rows, 0.0)
    return (out, _packed(log_sum_exp(), rows, -math.inf)) if lse else out


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    total, heads, _ = call.query.shape
    out = call.query.new_empty(total, heads, call.value.shape[2])
    return out, call.query.new_empty(total, heads, dtype=torch.float32)


def _flops(call: Call, backward: bool) -> int:
    """What the values of the offsets say; of fake tensors, which have none, as if all sequences
    were longest."""
    q, k = call.cu_seqlens_q, call.cu_seqlens_k
    if isinstance(q, FakeTensor) or q.is_meta:
        each = score_policy.scores_seen(call, call.max_seqlen_q, call.max_seqlen_k)
        scores = (q.shape[0] - 1) * each
    else:
        lengths = zip(q.diff().tolist(), k.diff().tolist(), strict=True)
        scores = sum(score_policy.scores_seen(call, *pair) for pair in lengths)
    _, heads, dim = call.query.shape
    value_dim = call.value.shape[2]
    return 2 * heads * scores * (3 * dim + 2 * value_dim if backward else dim + value_dim)


DEFINITION = Definition(
    "varlen", Call, gradients=4, results=1, outputs=2, fake=_fake,
    reference=lambda call: run_reference(call, True), flops=_flops, folds=False,
    last_gradients=1,
)  # fmt: skip
_CPU = cpu.torch_op(DEFINITION)
_TRITON = triton.torch_op(
    DEFINITION, forward="varlen.forward:varlen_forward", backward="varlen.backward:varlen_backward"
)


def _cpu_path(call: Call) -> str:
    return cpu.path(call.query, call.max_seqlen_q)


def _cpu_refuses(call: Call) -> Sequence[str]:
    reasons = cpu.refuses(call)
    if call.alibi_slopes is None:
        return reasons
    return [*reasons, *score_policy.refuses_gradient(call)]


def _triton_refuses(call: Call) -> Sequence[str]:
    return [*triton.refuses(call), *score_policy.refuses_gradient(call)]


def _lengths(shape: Mapping[str, Any], side: str) -> list[int]:
    if f"{side}_lens" in shape:
        return list(shape[f"{side}_lens"])
    longest, sequences = shape[f"{side}_len"], shape.get("batch", 1)
    return [longest - b * (longest // 2) // max(sequences - 1, 1) for b in range(sequences)]


def inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: Any = None, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of a legal call: lengths spread over half to all of q_len and kv_len.

    Args:
        shape: q_len, kv_len (the longest sequences) and head_dim; optionally batch (the number of
            sequences), heads, kv_heads, value_dim, causal, or q_lens and kv_lens (the lengths).
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device() if device is None else device
    heads, head_dim = shape.get("heads", 1), shape["head_dim"]
    kv_heads = shape.get("kv_heads", heads)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu").to(device=device, dtype=dtype)

    q_lens, kv_lens = _lengths(shape, "q"), _lengths(shape, "kv")
    call: dict[str, Any] = {
        "query": normal(sum(q_lens), heads, head_dim),
        "key": normal(sum(kv_lens), kv_heads, head_dim),
        "value": normal(sum(kv_lens), kv_heads, shape.get("value_dim", head_dim)),
        "max_seqlen_q": max(q_lens, default=0),
        "max_seqlen_k": max(kv_lens, default=0),
    }
    for name, sizes in (("cu_seqlens_q", q_lens), ("cu_seqlens_k", kv_lens)):
        offsets = torch.tensor([0, *sizes], dtype=torch.int32, device="cpu").cumsum(
            0, dtype=torch.int32
        )
        call[name] = offsets.to(device)
    if shape.get("causal"):
        call["is_causal"] = True
    return call


def cost(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Floating-point operations of the two products, and bytes read and written once."""
    heads, dim = shape.get("heads", 1), shape["head_dim"]
    kv_heads, value_dim = shape.get("kv_heads", heads), shape.get("value_dim", dim)
    q_lens, kv_lens = _lengths(shape, "q"), _lengths(shape, "kv")
    pairs = list(zip(q_lens, kv_lens, strict=True))
    if shape.get("causal"):
        scores = sum(min(i + 1, k) for q, k in pairs for i in range(q))
    else:
        scores = sum(q * k for q, k in pairs)
    moved = (heads * sum(q_lens) + kv_heads * sum(kv_lens)) * (dim + value_dim)
    return 2 * heads * scores * (dim + value_dim), moved * dtype.itemsize


OP = Op(
    name="varlen_attention",
    arguments=Arguments,
    check=check,
    normalize=normalize,
    definition=DEFINITION,
    inputs=inputs,
    cost=cost,
    ranks=(3,),
    implementations=(
        Implementation("cpu", _CPU, _cpu_refuses, checks=True, path=_cpu_path),
        Implementation("triton", _TRITON, _triton_refuses, on_request=triton.interprets),
        Implementation("reference", run_reference, never_refuses),
    ),
)
