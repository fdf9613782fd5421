"""Bidirectional cross-modal attention: two softmax directions from one score matrix.

The fusion of GLIP (Li et al., 2022, section 3.2), Grounding DINO (Liu et al., 2023, section 3.1)
and BiXT (Hiller et al., 2024, section 3.2). For every batch entry and head, with
S = scale * Q K^T + bias computed once:

    out_q[i] = sum_j softmax_j(S[i, :])[j] * value[j]          over keys that no mask hides
    out_k[j] = sum_i softmax_i(S[:, j])[i] * query_value[i]    over queries that no mask hides

Masks: `key_padding_mask` removes keys from the first sum, `query_padding_mask` queries from the
second; `attn_mask` is a bias on S and so acts in both. A padded position still gets an output of
its own, from the other side: a NaN there reaches that output alone, and the gradients of the other
side only through it. With P and R the two softmaxes (dropout factors c and d):

    d value = (P c)^T dO_q     d query_value = (R d) dO_k
    dS = P * (c * (dO_q value^T) - rowsum(dO_q * out_q) + d lse_q)
       + R * (d * (query_value dO_k^T) - rowsum(dO_k * out_k) + d lse_k)       d bias = dS
    d query = scale * dS key   d key = scale * dS^T query
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastfusion.backends import cpu, cuda, triton
from fastfusion.core import arguments, philox
from fastfusion.core.op import Implementation, Op, never_refuses
from fastfusion.core.reference import (
    accumulation_dtype,
    diagonal_of,
    dropout_factor,
    hide,
    log_sum_exp,
    masked_scores,
    rows_outside,
    safe_softmax,
)
from fastfusion.core.torch_op import Interface


def bidirectional_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention from queries to keys and from keys to queries, sharing their scores.

    Args:
        query: (batch, heads, q_len, head_dim), float32, bfloat16, float16 or float64; 3-D inputs
            (heads, length, dim) are accepted.
        key: (batch, heads, kv_len, head_dim).
        value: (batch, heads, kv_len, value_dim), what queries gather from keys.
        query_value: (batch, heads, q_len, query_value_dim), what keys gather from queries.
        attn_mask: broadcastable to (batch, heads, q_len, kv_len): bool, True = attend, or a
            float bias that is added to the scores and may require a gradient; or a causal mask
            of `torch.nn.attention.bias`.
        query_padding_mask: bool, broadcastable to (batch, q_len), True = keys ignore this query.
        key_padding_mask: bool, broadcastable to (batch, kv_len), True = queries ignore this key.
        is_causal: query i and key j see each other where j <= i; combines with the masks.
        causal_alignment: "top_left", or "bottom_right": j <= i + kv_len - q_len.
        scale: factor of the scores, any finite number; 1 / sqrt(head_dim) by default.
        dropout_p: probability of dropping a weight, drawn anew for each direction.
        return_lse: also return the log-sum-exp of each row and of each column of the scores.
        backend: as in `scaled_dot_product_attention`.

    Returns:
        out_q (batch, heads, q_len, value_dim) and out_k (batch, heads, kv_len, query_value_dim);
        with `return_lse` also lse_q (batch, heads, q_len) and lse_k (batch, heads, kv_len).

    Raises:
        TypeError: an argument is not of the type or dtype named above.
        ValueError: shapes, devices or numbers that do not fit; the message prints them.
        BackendUnavailableError: `backend` cannot run this call; the message says why.
    """
    tensors = (query, key, value, query_value, attn_mask, query_padding_mask, key_padding_mask)
    if not torch.compiler.is_compiling() and has_torch_function_variadic(*tensors):
        asked = tuple(t for t in tensors if arguments.causal_bias(t) is None)
        if has_torch_function_variadic(*asked):
            return handle_torch_function(
                bidirectional_attention, asked,
                query, key, value, query_value, attn_mask=attn_mask,
                query_padding_mask=query_padding_mask, key_padding_mask=key_padding_mask,
                is_causal=is_causal, causal_alignment=causal_alignment, scale=scale,
                dropout_p=dropout_p, return_lse=return_lse, backend=backend,
            )  # fmt: skip
    result = cpu.run_checked(
        _CPU, OP, backend, attn_mask, scale, dropout_p, causal_alignment, (is_causal, return_lse),
        (
            query, key, value, query_value, attn_mask, query_padding_mask, key_padding_mask, None,
            0.0, is_causal, causal_alignment == "bottom_right", scale, return_lse,
        ),
        _fits,
    )  # fmt: skip
    if result is not None:
        return result
    given = normalize(
        query, key, value, query_value, attn_mask=attn_mask,
        query_padding_mask=query_padding_mask, key_padding_mask=key_padding_mask,
        is_causal=is_causal, causal_alignment=causal_alignment, scale=scale, dropout_p=dropout_p,
        return_lse=return_lse,
    )  # fmt: skip
    results = OP.run(backend, given)
    return tuple(r.squeeze(0) for r in results) if query.dim() == 3 else results


def check(
    query: Any,
    key: Any,
    value: Any,
    query_value: Any,
    *,
    attn_mask: Any = None,
    query_padding_mask: Any = None,
    key_padding_mask: Any = None,
    is_causal: Any = False,
    causal_alignment: Any = "top_left",
    scale: Any = None,
    dropout_p: Any = 0.0,
    return_lse: Any = False,
    backend: Any = None,
) -> None:
    """Raise TypeError or ValueError for arguments that are not legal."""
    tensors = {"query": query, "key": key, "value": value, "query_value": query_value}
    arguments.check_tensors(**tensors)
    given = arguments.shapes(**tensors)
    ranks = {t.dim() for t in tensors.values()}
    if ranks not in ({3}, {4}):
        raise ValueError(f"query, key, value and query_value must be 4-D or 3-D, got {given}")
    leading = tuple(query.shape[:-2])
    for name, tensor in tensors.items():
        if tuple(tensor.shape[:-2]) != leading:
            raise ValueError(f"{name} must have the batch and heads of query, got {given}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key must have the head_dim of query, got {given}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must have the kv_len of key, got {given}")
    if query_value.shape[-2] != query.shape[-2]:
        raise ValueError(f"query_value must have the q_len of query, got {given}")
    q_len, kv_len, batch = query.shape[-2], key.shape[-2], leading[:-1]
    arguments.check_flag("is_causal", is_causal)
    arguments.check_alignment(causal_alignment)
    attn_mask, *_ = arguments.resolve_causal(attn_mask, is_causal, causal_alignment, q_len, kv_len)
    arguments.check_attn_mask(attn_mask, query, (*leading, q_len, kv_len), given)
    arguments.check_padding_mask(
        "query_padding_mask", query_padding_mask, query, (*batch, q_len), given
    )
    arguments.check_padding_mask(
        "key_padding_mask", key_padding_mask, query, (*batch, kv_len), given
    )
    arguments.check_scale(scale, query)
    arguments.check_dropout(dropout_p)
    arguments.check_flag("return_lse", return_lse)


def _fits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_value: Tensor,
    attn_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    *others: Any,
) -> bool:
    """Whether plain arguments are as `normalize` would make them, sooner than `check` says so."""
    batch, heads, q_len, dim = query.shape
    kv_len = key.shape[2]
    tensors = (key, value, query_value)
    masks = ((query_padding_mask, q_len), (key_padding_mask, kv_len))
    scale = others[4]
    return (
        dim > 0
        and key.shape == (batch, heads, kv_len, dim)
        and value.shape[:3] == (batch, heads, kv_len)
        and query_value.shape[:3] == (batch, heads, q_len)
        and value.dim() == query_value.dim() == 4
        and all(t.dtype == query.dtype and t.device == query.device for t in tensors)
        and (scale is None or abs(scale) <= arguments.MAX_SCALE)
        and (
            attn_mask is None
            or attn_mask.dtype in (torch.bool, torch.float32, query.dtype)
            and attn_mask.device == query.device
            and arguments.broadcasts(attn_mask, (batch, heads, q_len, kv_len))
        )
        and all(
            mask is None
            or mask.dtype == torch.bool
            and mask.device == query.device
            and mask.shape == (batch, length)
            for mask, length in masks
        )
    )


def normalize(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """Public arguments, cast as autocast asks and checked, as every implementation takes them:
    4-D, with a seed."""
    dtype = arguments.autocast_dtype(arguments.device_type_of(query))
    query, key, value, query_value = arguments.autocast_cast(dtype, query, key, value, query_value)
    attn_mask = arguments.autocast_mask(dtype, attn_mask)
    if not torch.compiler.is_compiling():
        check(
            query, key, value, query_value, attn_mask=attn_mask,
            query_padding_mask=query_padding_mask, key_padding_mask=key_padding_mask,
            is_causal=is_causal, causal_alignment=causal_alignment, scale=scale,
            dropout_p=dropout_p, return_lse=return_lse,
        )  # fmt: skip
    attn_mask, is_causal, causal_alignment = arguments.resolve_causal(
        attn_mask, is_causal, causal_alignment, query.shape[-2], key.shape[-2]
    )
    scale = arguments.number("scale", scale)
    query, key = arguments.with_a_head_dim(query, key)
    if query.dim() == 3:
        query, key, value, query_value = (t[None] for t in (query, key, value, query_value))
    batch = query.shape[0]
    query_padding_mask, key_padding_mask = (
        None if mask is None else mask.expand(batch, length)
        for mask, length in ((query_padding_mask, query.shape[2]), (key_padding_mask, key.shape[2]))
    )
    seed = philox.draw_seed(query.device) if dropout_p > 0.0 else None
    return (
        query, key, value, query_value, attn_mask, query_padding_mask, key_padding_mask, seed,
        dropout_p, is_causal, causal_alignment == "bottom_right", scale, return_lse,
    )  # fmt: skip


def _run_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_value: Tensor,
    attn_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    bottom_right: bool,
    scale: float | None,
    return_lse: bool,
) -> tuple[Tensor, ...]:
    acc = accumulation_dtype(query.dtype)
    scale = arguments.softmax_scale(scale, query.shape[-1])
    diagonal = diagonal_of(is_causal, bottom_right, query.shape[2], key.shape[2])
    scores = masked_scores(query, key, attn_mask, None, diagonal, scale)
    rows = columns = scores
    if key_padding_mask is not None:
        rows = scores.masked_fill(key_padding_mask[:, None, None, :], -torch.inf)
    if query_padding_mask is not None:
        columns = scores.masked_fill(query_padding_mask[:, None, :, None], -torch.inf)
    to_keys, to_queries = safe_softmax(rows, -1), safe_softmax(columns, -2)
    row_factor = dropout_factor(to_keys, seed, dropout_p, philox.ROW_STREAM)
    column_factor = dropout_factor(to_queries, seed, dropout_p, philox.COLUMN_STREAM)
    if row_factor is not None and column_factor is not None:
        to_keys, to_queries = to_keys * row_factor, to_queries * column_factor
    value = hide(value, key_padding_mask).to(acc)
    query_value = hide(query_value, query_padding_mask).to(acc)
    out_q = rows_outside((to_keys @ value).to(query.dtype))
    out_k = rows_outside((to_queries.transpose(-1, -2) @ query_value).to(query.dtype))
    if return_lse:
        return out_q, out_k, log_sum_exp(rows, -1), log_sum_exp(columns, -2)
    return out_q, out_k


def _fake(
    query: Tensor, key: Tensor, value: Tensor, query_value: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    arguments.check_one_device(query, key, value, query_value, *others[:4])
    batch, heads, q_len, _ = query.shape
    kv_len = key.shape[2]
    out_q = query.new_empty(batch, q_len, heads, value.shape[3]).transpose(1, 2)
    out_k = query.new_empty(batch, kv_len, heads, query_value.shape[3]).transpose(1, 2)
    lse = (query.new_empty(batch, heads, n, dtype=torch.float32) for n in (q_len, kv_len))
    return out_q, out_k, *lse


def _fake_backward(*given: Any) -> tuple[Tensor, ...]:
    query, attn_mask = given[4], given[8]
    gradients = [
        t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2)
        for t in given[4:8]
    ]
    wanted = given[-1] and attn_mask is not None and attn_mask.is_floating_point()
    return *gradients, attn_mask.new_empty(attn_mask.shape) if wanted else query.new_empty(0)


def _full_reference(*given: Any) -> tuple[Tensor, ...]:
    run: Any = _run_reference
    return run(*given, True)  # return_lse


_INTERFACE = Interface(
    tensors=(
        "Tensor query", "Tensor key", "Tensor value", "Tensor query_value", "Tensor? attn_mask",
        "Tensor? query_padding_mask", "Tensor? key_padding_mask", "Tensor? seed",
    ),
    options=("float dropout_p", "bool is_causal", "bool bottom_right", "float? scale"),
    outputs=4,
    gradients=5,
    masked=True,
    fake=_fake,
    fake_backward=_fake_backward,
    reference=_full_reference,
)  # fmt: skip
_TRITON = triton.kernel_op(
    "bidirectional", _INTERFACE,
    forward="bidirectional.forward:bidirectional_forward",
    backward="bidirectional.backward:bidirectional_backward",
)  # fmt: skip


_CPU: Any = cpu.kernel_op("bidirectional", _INTERFACE)


def _run_cpu(*given: Any) -> tuple[Tensor, ...]:
    results = _CPU(given[-1], *given[:-1])
    return results if given[-1] else results[:2]


def _cpu_path(query: Tensor, *others: Any) -> str:
    return f"scores once for both directions, {cpu.path(query, 48)}"


def _run_triton(*given: Any) -> tuple[Tensor, ...]:
    results = _TRITON(given[-1], *given[:-1])
    return results if given[-1] else results[:2]


def _triton_refuses(
    query: Tensor, key: Tensor, value: Tensor, query_value: Tensor, *others: Any
) -> Sequence[str]:
    reasons = triton.refuses(query, key, value)
    return reasons or triton.refuses(query, key, query_value)


def _cuda_given(*given: Any) -> tuple[Any, ...]:
    """Normalised arguments without seed, dropout, and whether there are to be lse."""
    return *given[:7], *given[9:12]


def _cuda_fake(*given: Any) -> tuple[Tensor, ...]:
    return _fake(*given[:7], None)


def _cuda_reference(*given: Any) -> tuple[Tensor, ...]:
    return _full_reference(*given[:7], None, 0.0, *given[7:])


_CUDA = cuda.ForwardOp("bidirectional", _cuda_fake, _cuda_reference, outputs=2)


def _run_cuda(*given: Any) -> tuple[Tensor, ...]:
    return _CUDA(given[-1], *_cuda_given(*given))


def _cuda_refuses(*given: Any) -> Sequence[str]:
    return cuda.refuses(given[8], given[4], *given[:4])


def _cuda_path(*given: Any) -> str:
    return _CUDA.path(*_cuda_given(*given))


def reference(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """(out_q, out_k, lse_q, lse_k) of a call with public arguments, in plain torch."""
    given = normalize(*args, **{**kwargs, "return_lse": True})
    return _run_reference(*given)


def inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: Any = None, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of a legal call, normally distributed.

    Args:
        shape: q_len, kv_len, head_dim; optionally batch, heads, value_dim, query_value_dim, and
            mask: "both_padding" (the last quarter of each side of every second entry hidden),
            "bool", "bias" or None.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device() if device is None else device
    batch, heads, head_dim = shape.get("batch", 1), shape.get("heads", 1), shape["head_dim"]
    q_len, kv_len = shape["q_len"], shape["kv_len"]
    value_dim = shape.get("value_dim", head_dim)

    def normal(length: int, dim: int) -> Tensor:
        size = (batch, heads, length, dim)
        return torch.randn(size, generator=generator, device="cpu").to(device=device, dtype=dtype)

    call: dict[str, Any] = {
        "query": normal(q_len, head_dim),
        "key": normal(kv_len, head_dim),
        "value": normal(kv_len, value_dim),
        "query_value": normal(q_len, shape.get("query_value_dim", value_dim)),
    }
    mask = shape.get("mask")
    if mask == "both_padding":
        for name, length in (("query_padding_mask", q_len), ("key_padding_mask", kv_len)):
            hidden = torch.zeros(batch, length, dtype=torch.bool, device="cpu")
            hidden[::2, length - length // 4 :] = True
            call[name] = hidden.to(device)
    elif mask == "bool":
        call["attn_mask"] = (torch.rand(q_len, kv_len, generator=generator, device="cpu") > 0.2).to(
            device
        )
    elif mask == "bias":
        size = (1, heads, q_len, kv_len)
        call["attn_mask"] = torch.randn(size, generator=generator, device="cpu").to(
            device=device, dtype=dtype
        )
    elif mask is not None:
        raise ValueError(f"mask must be both_padding, bool, bias or None, got {mask!r}")
    return call


def cost(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Floating-point operations of the three products, and bytes read and written once."""
    batch, heads, dim = shape.get("batch", 1), shape.get("heads", 1), shape["head_dim"]
    q_len, kv_len = shape["q_len"], shape["kv_len"]
    value_dim = shape.get("value_dim", dim)
    query_value_dim = shape.get("query_value_dim", value_dim)
    flops = 2 * batch * heads * q_len * kv_len * (dim + value_dim + query_value_dim)
    per_position = dim + value_dim + query_value_dim
    return flops, batch * heads * (q_len + kv_len) * per_position * dtype.itemsize


OP = Op(
    name="bidirectional_attention",
    check=check,
    normalize=normalize,
    reference=reference,
    inputs=inputs,
    cost=cost,
    implementations=(
        Implementation("cpu", _run_cpu, cpu.refuses, path=_cpu_path),
        Implementation("triton", _run_triton, _triton_refuses, on_request=triton.interprets),
        # Behind Triton until both have been timed on hardware: for where Triton cannot go.
        Implementation(
            "cuda", _run_cuda, _cuda_refuses, False, on_request=cuda.emulates, path=_cuda_path
        ),
        Implementation("reference", _run_reference, never_refuses, checks=False),
    ),
)
