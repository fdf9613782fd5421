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

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fastfusion.backends import cpu, cuda, triton
from fastfusion.core import arguments, philox, score_policy
from fastfusion.core import reference as formulas
from fastfusion.core.op import Implementation, Op, never_refuses
from fastfusion.core.score_policy import Window
from fastfusion.core.torch_op import Definition

_Pair = tuple[Tensor, Tensor]


class Arguments(NamedTuple):
    """Those of the public function, in its order."""

    query: Any
    key: Any
    value: Any
    query_value: Any
    # By name only:
    attn_mask: Any = None
    query_padding_mask: Any = None
    key_padding_mask: Any = None
    is_causal: Any = False
    causal_alignment: Any = "top_left"
    window: Any = None
    softcap: Any = None
    alibi_slopes: Any = None
    segment_ids_q: Any = None
    segment_ids_k: Any = None
    prefix_len: Any = None
    scale: Any = None
    dropout_p: Any = 0.0
    return_lse: Any = False
    backend: Any = None


_POSITIONAL = 4


class Call(NamedTuple):
    """What an implementation takes; csrc/torch has its twin."""

    query: Tensor  # (B, H, Lq, D)
    key: Tensor  # (B, H, Lk, D)
    value: Tensor  # (B, H, Lk, Dv)
    query_value: Tensor  # (B, H, Lq, Dw)
    attn_mask: Tensor | None = None  # broadcasts to (B, H, Lq, Lk)
    query_padding_mask: Tensor | None = None  # (B, Lq)
    key_padding_mask: Tensor | None = None  # (B, Lk)
    alibi_slopes: Tensor | None = None  # (B, H)
    seed: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    bottom_right: bool = False
    scale: float | None = None
    window_left: int | None = None  # no bound
    window_right: int | None = None
    softcap: float | None = None
    segment_ids_q: Tensor | None = None  # (B, Lq)
    segment_ids_k: Tensor | None = None  # (B, Lk)
    prefix_len: Tensor | None = None  # (B,), of a causal call

    def head_dims(self) -> tuple[int, ...]:
        return self.query.shape[-1], self.value.shape[-1], self.query_value.shape[-1]

    def conditions(self) -> Iterator[Any]:
        """What holds for every call; a mask that does not broadcast raises."""
        query, key, value, query_value = self[:4]
        batch, heads, q_len, dim = query.shape
        kv_len, value_dim, other_dim = key.shape[2], value.shape[3], query_value.shape[3]
        yield arguments.are_alike(query, key, value, query_value)
        yield dim > 0
        for tensor, length, width in (
            (key, kv_len, dim),
            (value, kv_len, value_dim),
            (query_value, q_len, other_dim),
        ):
            for size, expected in zip(tensor.shape, (batch, heads, length, width), strict=True):
                yield size == expected
        yield arguments.mask_fits(self.attn_mask, query, batch, heads, q_len, kv_len)
        yield from arguments.padding_fits(self.query_padding_mask, query, batch, q_len)
        yield from arguments.padding_fits(self.key_padding_mask, query, batch, kv_len)
        yield arguments.numbers_fit(self.seed, query, self.scale)
        yield from score_policy.kinds_fit(self, batch, heads)
        yield from score_policy.ranges_fit(self, batch)


@overload
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
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    segment_ids_q: Tensor | None = None,
    segment_ids_k: Tensor | None = None,
    prefix_len: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> _Pair: ...
@overload
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
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    segment_ids_q: Tensor | None = None,
    segment_ids_k: Tensor | None = None,
    prefix_len: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
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
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    segment_ids_q: Tensor | None = None,
    segment_ids_k: Tensor | None = None,
    prefix_len: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> _Pair | tuple[Tensor, Tensor, Tensor, Tensor]:
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
        window: (left, right), how many keys a query sees before its own and behind it; None: no
            bound. Query i's own key is i, or i + kv_len - q_len where `causal_alignment` is
            "bottom_right". Acts in both softmaxes, as everything that makes scores.
        softcap: scores become softcap * tanh(score / softcap) before masks (Gemma 2).
        alibi_slopes: broadcastable to (batch, heads), float32 or of the query's dtype: a score
            falls by slope * the distance of the key from the query's own (ALiBi). Its gradient is
            the reference's.
        segment_ids_q: integers, broadcastable to (batch, q_len): a query sees the keys of its own
            segment alone, as of sequences that are packed into one. Comes with `segment_ids_k`.
        segment_ids_k: likewise (batch, kv_len).
        prefix_len: integers, broadcastable to (batch,): the call is causal, but all queries see the
            first so many keys, as of a picture before a text.
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
    if not torch.compiler.is_compiling():
        tensors = (
            query, key, value, query_value, attn_mask, query_padding_mask, key_padding_mask,
            alibi_slopes,
        )  # fmt: skip
        ranges = (segment_ids_q, segment_ids_k, prefix_len)
        if has_torch_function_variadic(*tensors, *ranges):
            answer = arguments.ask_torch_function(
                bidirectional_attention,
                Arguments(
                    *tensors[:-1], is_causal, causal_alignment, window, softcap, alibi_slopes,
                    *ranges, scale, dropout_p, return_lse, backend,
                ),
                _POSITIONAL,
                (*tensors, *ranges),
            )  # fmt: skip
            if answer is not NotImplemented:
                return answer
        kinds: Any = score_policy.NONE
        if window is not None or softcap is not None:
            kinds = score_policy.plain_kinds(window, softcap)
        if (
            type(is_causal) is type(return_lse) is bool
            and arguments.are_plain(attn_mask, dropout_p, scale, causal_alignment)
            and kinds is not None
        ):
            # 0.1 us less than by its own constructor.
            slopes = score_policy.slopes_of_each(alibi_slopes, query)
            call = tuple.__new__(Call, (
                *tensors[:-1], slopes, None, 0.0, is_causal or prefix_len is not None,
                causal_alignment == "bottom_right", scale, *kinds, *ranges,
            ))  # fmt: skip
            results = OP.attempt(backend, call, return_lse)
            if results is not None:
                return results
    call = normalize(
        Arguments(
            query, key, value, query_value, attn_mask, query_padding_mask, key_padding_mask,
            is_causal, causal_alignment, window, softcap, alibi_slopes, segment_ids_q,
            segment_ids_k, prefix_len, scale, dropout_p, return_lse,
        )
    )  # fmt: skip
    results = OP.run(backend, call, return_lse)
    return tuple(r.squeeze(0) for r in results) if query.dim() == 3 else results


def check(given: Arguments) -> None:
    """Raise TypeError or ValueError for arguments that are not legal."""
    query, key, value, query_value = given[:4]
    tensors = {"query": query, "key": key, "value": value, "query_value": query_value}
    arguments.check_tensors(**tensors)
    sizes = arguments.shapes(**tensors)
    ranks = {t.dim() for t in tensors.values()}
    if ranks not in ({3}, {4}):
        raise ValueError(f"query, key, value and query_value must be 4-D or 3-D, got {sizes}")
    leading = tuple(query.shape[:-2])
    for name, tensor in tensors.items():
        if tuple(tensor.shape[:-2]) != leading:
            raise ValueError(f"{name} must have the batch and heads of query, got {sizes}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key must have the head_dim of query, got {sizes}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must have the kv_len of key, got {sizes}")
    if query_value.shape[-2] != query.shape[-2]:
        raise ValueError(f"query_value must have the q_len of query, got {sizes}")
    q_len, kv_len, batch = query.shape[-2], key.shape[-2], leading[:-1]
    arguments.check_flag("is_causal", given.is_causal)
    arguments.check_alignment(given.causal_alignment)
    attn_mask, *_ = arguments.resolve_causal(
        given.attn_mask, given.is_causal, given.causal_alignment, q_len, kv_len
    )
    arguments.check_attn_mask(attn_mask, query, (*leading, q_len, kv_len), sizes)
    arguments.check_padding_mask(
        "query_padding_mask", given.query_padding_mask, query, (*batch, q_len), sizes
    )
    arguments.check_padding_mask(
        "key_padding_mask", given.key_padding_mask, query, (*batch, kv_len), sizes
    )
    score_policy.check_kinds(given, query, leading, sizes)
    score_policy.check_ranges(given, query, key, batch, sizes)
    arguments.check_scale(given.scale, query)
    arguments.check_dropout(given.dropout_p)
    arguments.check_flag("return_lse", given.return_lse)


def normalize(given: Arguments) -> Call:
    """Public arguments, cast as autocast asks and checked, as every implementation takes them."""
    query, key, value, query_value, attn_mask = given[:5]
    dtype = arguments.autocast_dtype(arguments.device_type_of(query))
    query, key, value, query_value = arguments.autocast_cast(dtype, query, key, value, query_value)
    attn_mask = arguments.autocast_mask(dtype, attn_mask)
    if not torch.compiler.is_compiling():
        check(
            given._replace(
                query=query, key=key, value=value, query_value=query_value, attn_mask=attn_mask
            )
        )
    attn_mask, is_causal, causal_alignment = arguments.resolve_causal(
        attn_mask, given.is_causal, given.causal_alignment, query.shape[-2], key.shape[-2]
    )
    scale = arguments.number("scale", given.scale)
    query, key = arguments.with_a_head_dim(query, key)
    if query.dim() == 3:
        query, key, value, query_value = (t[None] for t in (query, key, value, query_value))
    query_padding, key_padding = (
        None if mask is None else mask.expand(query.shape[0], length)
        for mask, length in (
            (given.query_padding_mask, query.shape[2]),
            (given.key_padding_mask, key.shape[2]),
        )
    )
    seed = philox.draw_seed(query.device) if given.dropout_p > 0.0 else None
    slopes = score_policy.slopes_of(given.alibi_slopes, query, *query.shape[:2])
    ranges = score_policy.ranges_of(given, query.shape[:1], query.shape[2], key.shape[2])
    return Call(
        query, key, value, query_value, attn_mask, query_padding, key_padding, slopes, seed,
        given.dropout_p, is_causal or given.prefix_len is not None,
        causal_alignment == "bottom_right", scale, *score_policy.kinds_of(given), *ranges,
    )  # fmt: skip


def run_reference(call: Call, lse: bool) -> tuple[Tensor, ...]:
    """The definition."""
    query, key = call.query, call.key
    acc = formulas.accumulation_dtype(query.dtype)
    scale = arguments.softmax_scale(call.scale, query.shape[-1])
    diagonal = key.shape[2] - query.shape[2] if call.bottom_right else 0
    policy = score_policy.policy_of(call, diagonal)
    scores = formulas.masked_scores(query, key, call.attn_mask, None, policy, scale)
    rows = columns = scores
    if call.key_padding_mask is not None:
        rows = scores.masked_fill(call.key_padding_mask[:, None, None, :], -torch.inf)
    if call.query_padding_mask is not None:
        columns = scores.masked_fill(call.query_padding_mask[:, None, :, None], -torch.inf)
    is_masked = call.attn_mask is not None or policy.hides
    to_keys = formulas.safe_softmax(rows, -1, is_masked or call.key_padding_mask is not None)
    to_queries = formulas.safe_softmax(
        columns, -2, is_masked or call.query_padding_mask is not None
    )
    row_factor = formulas.dropout_factor(to_keys, call.seed, call.dropout_p, philox.ROW_STREAM)
    column_factor = formulas.dropout_factor(
        to_queries, call.seed, call.dropout_p, philox.COLUMN_STREAM
    )
    if row_factor is not None and column_factor is not None:
        to_keys, to_queries = to_keys * row_factor, to_queries * column_factor
    value = formulas.cast(formulas.hide(call.value, call.key_padding_mask), acc)
    query_value = formulas.cast(formulas.hide(call.query_value, call.query_padding_mask), acc)
    out_q = formulas.rows_outside(formulas.cast(to_keys @ value, query.dtype))
    to_queries = to_queries.transpose(-1, -2)
    out_k = formulas.rows_outside(formulas.cast(to_queries @ query_value, query.dtype))
    if lse:
        return out_q, out_k, formulas.log_sum_exp(rows, -1), formulas.log_sum_exp(columns, -2)
    return out_q, out_k


def _fake(call: Call) -> tuple[Tensor, ...]:
    query, key = call.query, call.key
    batch, heads, q_len, _ = query.shape
    kv_len = key.shape[2]
    out_q = query.new_empty(batch, q_len, heads, call.value.shape[3]).transpose(1, 2)
    out_k = query.new_empty(batch, kv_len, heads, call.query_value.shape[3]).transpose(1, 2)
    lse = (query.new_empty(batch, heads, n, dtype=torch.float32) for n in (q_len, kv_len))
    return out_q, out_k, *lse


def _flops(call: Call, backward: bool) -> int:
    # In the backward scores again, dP and the gradient of the values for each direction, dQ and
    # dK: seven products against the forward's three.
    (batch, heads, q_len, dim), kv_len = call.query.shape, call.key.shape[2]
    values = call.value.shape[3] + call.query_value.shape[3]
    scores = score_policy.scores_seen(call, q_len, kv_len)
    return 2 * batch * heads * scores * (3 * dim + 2 * values if backward else dim + values)


DEFINITION = Definition(
    "bidirectional", Call, gradients=5, results=2, outputs=4, fake=_fake,
    reference=lambda call: run_reference(call, True), flops=_flops,
)  # fmt: skip
_CPU = cpu.torch_op(DEFINITION)
_TRITON = triton.torch_op(
    DEFINITION,
    forward="bidirectional.forward:bidirectional_forward",
    backward="bidirectional.backward:bidirectional_backward",
)
_CUDA = cuda.CudaOp(DEFINITION)


def _cpu_path(call: Call) -> str:
    return f"scores once for both directions, {cpu.path(call.query, 48)}"


def _cpu_refuses(call: Call) -> Sequence[str]:
    reasons = cpu.refuses(call)
    if call.alibi_slopes is None:
        return reasons
    return [*reasons, *score_policy.refuses_gradient(call)]


def _triton_refuses(call: Call) -> Sequence[str]:
    return [*triton.refuses(call), *score_policy.refuses_gradient(call)]


def _cuda_refuses(call: Call) -> Sequence[str]:
    return [*cuda.refuses(call, DEFINITION), *score_policy.refuses_gradient(call)]


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
    arguments=Arguments,
    check=check,
    normalize=normalize,
    definition=DEFINITION,
    inputs=inputs,
    cost=cost,
    ranks=(4,),
    implementations=(
        Implementation("cpu", _CPU, _cpu_refuses, checks=True, path=_cpu_path),
        Implementation("triton", _TRITON, _triton_refuses, on_request=triton.interprets),
        # Behind Triton until both have been timed on hardware: for where Triton cannot go.
        Implementation(
            "cuda", _CUDA, _cuda_refuses, differentiable=False, checks=True,
            on_request=cuda.emulates, path=_CUDA.path,
        ),
        Implementation("reference", run_reference, never_refuses),
    ),
)  # fmt: skip
