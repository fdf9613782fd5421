"""Scaled dot-product attention (Vaswani et al., "Attention Is All You Need", 2017, section 3.2.1).

For every batch entry and head, with S = scale * Q K^T + bias over the keys that no mask hides:

    out[i] = sum_j softmax_j(S[i, :])[j] * v[j]          lse[i] = log sum_j exp S[i, j]

and with P the softmax, c the dropout factor of a score (0, or 1 / (1 - p) where it is kept):

    dV = (P c)^T dO      dS = P * (c * (dO V^T) - rowsum(dO * out) + d lse)      d bias = dS
    dQ = scale * dS K    dK = scale * dS^T Q

A row with no key left gives out = 0, lse = -inf and no gradient. A causal mask hides key j from
query i where j > i + diagonal; the diagonal is 0, or kv_len - q_len if it ends bottom right.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastfusion.backends import cpu, cuda, triton
from fastfusion.core import arguments, philox
from fastfusion.core.op import Implementation, Op, never_refuses
from fastfusion.core.reference import attention_reference
from fastfusion.core.torch_op import PLAIN, Interface

_is_compiling = torch.compiler.is_compiling
_any_autocast = torch._C._is_any_autocast_enabled


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """softmax(scale * query @ key^T + bias) @ value, fused: the scores are never stored.

    A drop-in replacement of `torch.nn.functional.scaled_dot_product_attention`. Rows with no key
    left are 0 and never NaN, and masks and `is_causal` combine, which torch refuses from 2.14 on.

    Args:
        query: (batch, heads, q_len, head_dim), float32, bfloat16, float16 or float64. 2-D and 3-D
            inputs, more batch dimensions and size-1 batch and head dimensions are accepted as in
            torch.
        key: (batch, kv_heads, kv_len, head_dim).
        value: (batch, kv_heads, kv_len, value_dim).
        attn_mask: broadcastable to (batch, heads, q_len, kv_len): bool, True = attend, or a
            float bias (of the query's dtype or float32) that is added to the scores and may
            require a gradient; or a causal mask of `torch.nn.attention.bias`.
        dropout_p: probability of dropping a score; applied whenever it is above 0.
        is_causal: query i sees keys 0..i; combines with the masks.
        scale: factor of the scores, any finite number; 1 / sqrt(head_dim) by default.
        enable_gqa: heads may be a multiple of kv_heads; query head h reads
            key head h // (heads // kv_heads).
        key_padding_mask: bool, broadcastable to (batch, kv_len), True = ignore this key; what it
            hides is never read into a result and gets gradient 0.
        causal_alignment: "top_left", or "bottom_right", where the last query sees the last key:
            query i sees keys 0..i + kv_len - q_len, as in FlashAttention. Of `is_causal`.
        return_lse: also return the log-sum-exp of each row of scores.
        backend: "cpu", "triton", "cuda" or "reference" to insist on one; None chooses.

    Returns:
        out (batch, heads, q_len, value_dim) in the query's dtype, in memory
        (batch, q_len, heads, value_dim); with `return_lse`, the pair (out, lse), lse
        (batch, heads, q_len) in float32 (float64 for float64 inputs), natural logarithm.

    Raises:
        TypeError: an argument is not of the type or dtype named above.
        ValueError: shapes, devices or numbers that do not fit; the message prints them.
        BackendUnavailableError: `backend` cannot run this call; the message says why.
    """
    if _is_compiling():
        return _call(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            key_padding_mask, causal_alignment, return_lse, backend,
        )  # fmt: skip
    if has_torch_function_variadic(query, key, value, attn_mask, key_padding_mask):
        # A subclass or a mode decides, as with torch's function; torch's causal masks are ours.
        tensors = (query, key, value, attn_mask, key_padding_mask)
        asked = tuple(t for t in tensors if arguments.causal_bias(t) is None)
        if has_torch_function_variadic(*asked):
            return handle_torch_function(
                scaled_dot_product_attention, asked,
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                key_padding_mask=key_padding_mask, causal_alignment=causal_alignment,
                return_lse=return_lse, backend=backend,
            )  # fmt: skip
    try:
        bottom_right = arguments.BOTTOM_RIGHT.get(causal_alignment)
        # By type, since the dispatcher would take 1 for True and a tensor for a number.
        typed = (
            (is_causal is False or is_causal is True)
            and (enable_gqa is False or enable_gqa is True)
            and (return_lse is False or return_lse is True)
            and (scale is None or type(scale) is float)
            and type(dropout_p) is float
            and type(attn_mask) in PLAIN
            and bottom_right is not None
        )
        if typed and dropout_p == 0.0 and not _any_autocast() and query.dim() == 4:
            given = (
                query, key, value, attn_mask, key_padding_mask, None, 0.0, is_causal, bottom_right,
                scale, enable_gqa, return_lse,
            )  # fmt: skip
            chosen = OP.select(backend, given)
            if chosen.checks:
                return chosen.run(*given)
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
        # Kernels check everything and say little; check() has the words. What it accepts was
        # refused for what normalisation changes, or the error is not about arguments.
        check(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            key_padding_mask=key_padding_mask, causal_alignment=causal_alignment,
            return_lse=return_lse,
        )  # fmt: skip
        if _is_normal(query, key, value, key_padding_mask):
            raise
    return _call(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        key_padding_mask, causal_alignment, return_lse, backend,
    )  # fmt: skip


def _is_normal(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> bool:
    """Whether `normalize` would leave legal 4-D tensors as they are."""
    return (
        query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.shape[3] > 0
        and (padding is None or padding.shape == (key.shape[0], key.shape[2]))
    )


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    key_padding_mask: Tensor | None,
    causal_alignment: str,
    return_lse: bool,
    backend: str | None,
) -> Any:
    """The general road: any rank, broadcast dimensions, autocast, dropout, tracing."""
    given = normalize(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        key_padding_mask=key_padding_mask, causal_alignment=causal_alignment,
        return_lse=return_lse,
    )  # fmt: skip
    result = OP.run(backend, given)
    if query.dim() == 4:
        return result
    leading = torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value)))
    heads = given[0].shape[1:2] if query.dim() > 2 else ()
    if return_lse:
        return tuple(t.reshape(leading + heads + t.shape[2:]) for t in result)
    return result.reshape(leading + heads + result.shape[2:])


def check(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    scale: Any = None,
    enable_gqa: Any = False,
    *,
    key_padding_mask: Any = None,
    causal_alignment: Any = "top_left",
    return_lse: Any = False,
    backend: Any = None,
) -> None:
    """Raise TypeError or ValueError for arguments that are not legal."""
    arguments.check_tensors(query=query, key=key, value=value)
    given = arguments.shapes(query=query, key=key, value=value)
    if not query.dim() == key.dim() == value.dim() or query.dim() < 2:
        raise ValueError(f"query, key and value must have the same rank, at least 2, got {given}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key must have the head_dim of query, got {given}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"value must have the kv_len of key, got {given}")
    try:
        leading = tuple(torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value))))
    except RuntimeError:
        raise ValueError(f"query, key and value must have one batch size, got {given}") from None
    arguments.check_flag("enable_gqa", enable_gqa)
    heads: tuple[int, ...] = ()
    if query.dim() > 2:
        q_heads, k_heads, v_heads = (t.shape[-3] for t in (query, key, value))
        kv_heads = v_heads if k_heads == 1 else k_heads
        if v_heads not in (1, kv_heads):
            raise ValueError(f"value must have the heads of key, got {given}")
        if not enable_gqa and 1 not in (q_heads, kv_heads) and q_heads != kv_heads:
            raise ValueError(
                "key must have the heads of query (enable_gqa=True lets several query heads "
                f"share one key head), got {given}"
            )
        if enable_gqa and (q_heads % kv_heads if kv_heads else q_heads):
            raise ValueError(
                f"the heads of query must be a multiple of the heads of key, got {given}"
            )
        heads = (q_heads if enable_gqa or kv_heads == 1 else kv_heads,)
    q_len, kv_len = query.shape[-2], key.shape[-2]
    target = (*leading, *heads, q_len, kv_len)
    arguments.check_flag("is_causal", is_causal)
    arguments.check_alignment(causal_alignment)
    attn_mask, *_ = arguments.resolve_causal(attn_mask, is_causal, causal_alignment, q_len, kv_len)
    arguments.check_attn_mask(attn_mask, query, target, given)
    arguments.check_padding_mask(
        "key_padding_mask", key_padding_mask, query, (*leading, kv_len), given
    )
    arguments.check_dropout(dropout_p)
    arguments.check_scale(scale, query)
    arguments.check_flag("return_lse", return_lse)


def normalize(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """Public arguments, cast as autocast asks and checked, as every implementation takes them.

    query (B, H, Lq, D), key (B, Hkv, Lk, D) and value (B, Hkv, Lk, Dv) with Hkv dividing H,
    attn_mask of rank 4 or less, key_padding_mask (B, Lk), seed, dropout_p, is_causal, bottom_right,
    scale, enable_gqa, return_lse.
    """
    dtype = arguments.autocast_dtype(arguments.device_type_of(query))
    query, key, value = arguments.autocast_cast(dtype, query, key, value)
    attn_mask = arguments.autocast_mask(dtype, attn_mask)
    if not _is_compiling():
        check(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            key_padding_mask=key_padding_mask, causal_alignment=causal_alignment,
            return_lse=return_lse,
        )  # fmt: skip
    attn_mask, is_causal, causal_alignment = arguments.resolve_causal(
        attn_mask, is_causal, causal_alignment, query.shape[-2], key.shape[-2]
    )
    scale = arguments.number("scale", scale)
    rank = query.dim()
    query, key = arguments.with_a_head_dim(query, key)
    leading = torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value)))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.expand(*leading, key.shape[-2])
    if rank < 4:
        query, key, value = (t[(None,) * (4 - rank)] for t in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    kv_heads = value.shape[-3] if key.shape[-3] == 1 else key.shape[-3]
    heads = query.shape[-3] if enable_gqa or kv_heads == 1 else kv_heads
    outer = leading if rank > 3 else (1,)
    query = _widened(query, (*outer, heads))
    key, value = _widened(key, (*outer, kv_heads)), _widened(value, (*outer, kv_heads))
    if rank > 4:
        query, key, value = (t.flatten(0, rank - 4) for t in (query, key, value))
        if attn_mask is not None and attn_mask.dim() > 3:
            attn_mask = attn_mask.expand(*leading, *attn_mask.shape[-3:]).flatten(0, rank - 4)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.flatten(0, rank - 4)
    seed = philox.draw_seed(query.device) if dropout_p > 0.0 else None
    return (
        query, key, value, attn_mask, key_padding_mask, seed, dropout_p, is_causal,
        causal_alignment == "bottom_right", scale, enable_gqa or kv_heads != heads, return_lse,
    )  # fmt: skip


def _widened(tensor: Tensor, leading: tuple[int, ...]) -> Tensor:
    """With these leading dimensions; the tensor itself where it has them, so that an exported graph
    holds no operator that does nothing."""
    return tensor if tensor.shape[:-2] == leading else tensor.expand(*leading, -1, -1)


def _run_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    bottom_right: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
) -> Any:
    out, lse = attention_reference(
        query, key, value, attn_mask, key_padding_mask, seed, dropout_p, is_causal, bottom_right,
        scale,
    )  # fmt: skip
    return (out, lse()) if return_lse else out


def _full_reference(*given: Any) -> tuple[Tensor, Tensor]:
    out, lse = attention_reference(*given)
    return out, lse()


_INTERFACE = Interface(
    tensors=(
        "Tensor query", "Tensor key", "Tensor value", "Tensor? attn_mask",
        "Tensor? key_padding_mask", "Tensor? seed",
    ),
    options=("float dropout_p", "bool is_causal", "bool bottom_right", "float? scale"),
    outputs=2,
    gradients=4,
    masked=True,
    fake=cpu.fake_attention,
    fake_backward=cpu.fake_attention_backward,
    reference=_full_reference,
)  # fmt: skip
_TRITON = triton.kernel_op(
    "attention", _INTERFACE,
    forward="attention.forward:attention_forward",
    backward="attention.backward:attention_backward",
)  # fmt: skip


def _cuda_given(*given: Any) -> tuple[Any, ...]:
    """Normalised arguments without seed and dropout, and whether there is to be an lse."""
    query, key, value, attn_mask, padding, _, _, is_causal, bottom_right, scale, gqa, _ = given
    return query, key, value, attn_mask, padding, is_causal, bottom_right, scale, gqa


def _cuda_fake(*given: Any) -> tuple[Tensor, Tensor]:
    return cpu.fake_attention(*given[:5], None)


def _cuda_reference(*given: Any) -> tuple[Tensor, Tensor]:
    return _full_reference(*given[:5], None, 0.0, *given[5:8])


_CUDA = cuda.ForwardOp("attention", _cuda_fake, _cuda_reference, outputs=1)


def _run_cuda(*given: Any) -> Any:
    return _CUDA(given[-1], *_cuda_given(*given))


def _cuda_refuses(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *others: Any
) -> Sequence[str]:
    return cuda.refuses(others[2], attn_mask, query, key, value)


def _cuda_waits(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *others: Any
) -> bool:
    """Whether the CUDA kernels leave a call that they could run to Triton's.

    An eager call takes 33 to 99 us with Triton's kernels and 14 to 32 with these, most of it in
    Python and the driver, which is all that counts where lengths are short: the kernels themselves
    take 5.2 and 6.6 us for 197 tokens, 15.5 and 16.2 for 4,096 over 77, but 36 and 77 for 2,048
    over 2,048 (benchmarks/results/nvidia-h200/attention.json). Compiled code ignores lengths.
    """
    if cuda.emulates(query):
        return True
    if not _is_compiling() and query.itemsize == 2:
        q_len, kv_len = query.shape[2], key.shape[2]
        longest = 128 if q_len > 1024 else 256 if q_len > 64 else 512 if q_len > 16 else 2048
        if kv_len <= longest and (query.shape[3] | value.shape[3]) % 8 == 0:
            return False
    return not triton.refuses(query, key, value)


def _cuda_path(*given: Any) -> str:
    return _CUDA.path(*_cuda_given(*given))


def _cpu_path(query: Tensor, key: Tensor, *others: Any) -> str:
    dropout_p, is_causal = others[4:6]
    return cpu.path(query, query.shape[2], key.shape[2], is_causal, dropout_p > 0.0)


def _run_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    bottom_right: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
) -> Any:
    if not _is_compiling():
        _require_fit(query, key, value, attn_mask, key_padding_mask, scale, enable_gqa)
    out, lse = _TRITON(
        return_lse, query, key, value, attn_mask, key_padding_mask, seed, dropout_p,
        is_causal, bottom_right, scale,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _require_fit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
) -> None:
    """What keeps the kernels inside their tensors, asked before every call; `check` finds the
    words."""
    batch, heads, q_len, dim = query.shape
    kv_batch, kv_heads, kv_len, value_dim = value.shape
    fits = (
        dim > 0
        and kv_batch == batch
        and key.shape == (batch, kv_heads, kv_len, dim)
        and (heads == kv_heads or (enable_gqa and kv_heads > 0 and heads % kv_heads == 0))
        and key.dtype == value.dtype == query.dtype
        and key.device == value.device == query.device
        and (scale is None or abs(scale) <= arguments.MAX_SCALE)
    )
    if attn_mask is not None:
        whole = (batch, heads, q_len, kv_len)
        sizes = attn_mask.shape
        fits = (
            fits
            and attn_mask.dtype in (torch.bool, torch.float32, query.dtype)
            and attn_mask.device == query.device
            and len(sizes) <= 4
            and all(m in (1, n) for m, n in zip(sizes[::-1], whole[::-1], strict=False))
        )
    if key_padding_mask is not None:
        fits = (
            fits
            and key_padding_mask.dtype == torch.bool
            and key_padding_mask.device == query.device
            and key_padding_mask.shape == (batch, kv_len)
        )
    if not fits:
        raise ValueError("the arguments do not fit each other")


def inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: Any = None, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of a legal call, normally distributed.

    Args:
        shape: q_len, kv_len and head_dim; optionally batch, heads, kv_heads, value_dim, causal,
            and mask: "key_padding" (the last quarter of the keys of every second entry hidden),
            "bool", "bias" (a float per head and score) or None.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device() if device is None else device
    batch, heads = shape.get("batch", 1), shape.get("heads", 1)
    kv_heads, head_dim = shape.get("kv_heads", heads), shape["head_dim"]
    q_len, kv_len = shape["q_len"], shape["kv_len"]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu").to(device=device, dtype=dtype)

    call: dict[str, Any] = {
        "query": normal(batch, heads, q_len, head_dim),
        "key": normal(batch, kv_heads, kv_len, head_dim),
        "value": normal(batch, kv_heads, kv_len, shape.get("value_dim", head_dim)),
    }
    if shape.get("causal"):
        call["is_causal"] = True
    if kv_heads != heads:
        call["enable_gqa"] = True
    mask = shape.get("mask")
    if mask == "key_padding":
        hidden = torch.zeros(batch, kv_len, dtype=torch.bool, device="cpu")
        hidden[::2, kv_len - kv_len // 4 :] = True
        call["key_padding_mask"] = hidden.to(device)
    elif mask == "bool":
        call["attn_mask"] = (torch.rand(q_len, kv_len, generator=generator, device="cpu") > 0.2).to(
            device
        )
    elif mask == "bias":
        call["attn_mask"] = normal(1, heads, q_len, kv_len)
    elif mask is not None:
        raise ValueError(f"mask must be key_padding, bool, bias or None, got {mask!r}")
    return call


def cost(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Floating-point operations of the two products, and bytes read and written once.

    Scores that the diagonal or key padding (as `inputs` makes it) hides do not count.
    """
    batch, heads = shape.get("batch", 1), shape.get("heads", 1)
    kv_heads, dim = shape.get("kv_heads", heads), shape["head_dim"]
    value_dim, q_len, kv_len = shape.get("value_dim", dim), shape["q_len"], shape["kv_len"]

    def scores(keys: int) -> int:
        if shape.get("causal"):
            return sum(min(i + 1, keys) for i in range(q_len))
        return q_len * keys

    padded = (batch + 1) // 2 if shape.get("mask") == "key_padding" else 0
    seen = padded * scores(kv_len - kv_len // 4) + (batch - padded) * scores(kv_len)
    flops = 2 * heads * seen * (dim + value_dim)
    elements = heads * q_len * (dim + value_dim) + kv_heads * kv_len * (dim + value_dim)
    return flops, batch * elements * dtype.itemsize


def reference(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call with public arguments, by the definition in plain torch."""
    given = normalize(*args, **{**kwargs, "return_lse": True})
    return _run_reference(*given)


OP = Op(
    name="scaled_dot_product_attention",
    check=check,
    normalize=normalize,
    reference=reference,
    inputs=inputs,
    cost=cost,
    implementations=(
        Implementation("cpu", cpu.attention, cpu.refuses, path=_cpu_path),
        Implementation(
            "cuda", _run_cuda, _cuda_refuses, False, on_request=_cuda_waits, path=_cuda_path
        ),
        Implementation("triton", _run_triton, triton.refuses, on_request=triton.interprets),
        Implementation("reference", _run_reference, never_refuses, checks=False),
    ),
)
