"""Scaled dot-product attention (Vaswani et al., "Attention Is All You Need", 2017, section 3.2.1).

For every batch entry and head, with S = scale * Q K^T + bias over the keys that no mask hides:

    out[i] = sum_j softmax_j(S[i, :])[j] * v[j]          lse[i] = log sum_j exp S[i, j]

and with P the softmax, c the dropout factor of a score (0, or 1 / (1 - p) where it is kept):

    dV = (P c)^T dO      dS = P * (c * (dO V^T) - rowsum(dO * out) + d lse)      d bias = dS
    dQ = scale * dS K    dK = scale * dS^T Q

A row with no key left gives out = 0, lse = -inf and no gradient. A causal mask hides key j from
query i where j > i + diagonal; the diagonal is 0, or kv_len - q_len if it ends bottom right.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fastfusion.backends import cpu, cuda, triton
from fastfusion.core import arguments, float8, philox, score_policy
from fastfusion.core import reference as formulas
from fastfusion.core.op import Implementation, Op, never_refuses
from fastfusion.core.score_policy import Window, slopes_of_each
from fastfusion.core.torch_op import Definition

_is_compiling = torch.compiler.is_compiling


class Arguments(NamedTuple):
    """Those of the public function, in its order."""

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False
    # By name only:
    key_padding_mask: Any = None
    causal_alignment: Any = "top_left"
    window: Any = None
    softcap: Any = None
    alibi_slopes: Any = None
    segment_ids_q: Any = None
    segment_ids_k: Any = None
    prefix_len: Any = None
    sinks: Any = None
    position_table: Any = None
    position_index: Any = None
    key_scale: Any = None
    value_scale: Any = None
    return_lse: Any = False
    backend: Any = None


_POSITIONAL = 8


class Call(NamedTuple):
    """What an implementation takes; csrc/torch has its twin."""

    query: Tensor  # (B, H, Lq, D)
    key: Tensor  # (B, Hkv, Lk, D), Hkv divides H
    value: Tensor  # (B, Hkv, Lk, Dv)
    attn_mask: Tensor | None = None  # broadcasts to (B, H, Lq, Lk)
    key_padding_mask: Tensor | None = None  # (B, Lk)
    alibi_slopes: Tensor | None = None  # (B, H)
    seed: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    bottom_right: bool = False
    scale: float | None = None
    enable_gqa: bool = False  # where H is not Hkv
    window_left: int | None = None  # no bound
    window_right: int | None = None
    softcap: float | None = None
    segment_ids_q: Tensor | None = None  # (B, Lq)
    segment_ids_k: Tensor | None = None  # (B, Lk)
    prefix_len: Tensor | None = None  # (B,), of a causal call
    key_scale: Tensor | None = None  # (B, Hkv), of 8-bit keys
    value_scale: Tensor | None = None  # (B, Hkv)
    position_index: Tensor | None = None  # (Lq, Lk), or by offset (Lq + Lk - 1,)
    position_table: Tensor | None = None  # (H, entries)
    sinks: Tensor | None = None  # (H,)

    def head_dims(self) -> tuple[int, ...]:
        return self.query.shape[-1], self.value.shape[-1]

    def conditions(self) -> Iterator[Any]:
        """What holds for every call; a mask that does not broadcast raises."""
        query, key, value = self.query, self.key, self.value
        batch, heads, q_len, dim = query.shape
        kv_batch, kv_heads, kv_len, _ = value.shape
        yield from float8.conditions(self, batch, kv_heads)
        yield dim > 0
        yield kv_batch == batch
        for size, expected in zip(key.shape, (batch, kv_heads, kv_len, dim), strict=True):
            yield size == expected
        yield heads == kv_heads or (self.enable_gqa and kv_heads > 0 and heads % kv_heads == 0)
        yield arguments.mask_fits(self.attn_mask, query, batch, heads, q_len, kv_len)
        yield from arguments.padding_fits(self.key_padding_mask, query, batch, kv_len)
        yield arguments.numbers_fit(self.seed, query, self.scale)
        yield from score_policy.kinds_fit(self, batch, heads)
        yield from score_policy.ranges_fit(self, batch)
        yield from score_policy.sinks_fit(self, heads)
        yield from score_policy.positions_fit(self, heads)


@overload
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
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    segment_ids_q: Tensor | None = None,
    segment_ids_k: Tensor | None = None,
    prefix_len: Tensor | None = None,
    sinks: Tensor | None = None,
    position_table: Tensor | None = None,
    position_index: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
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
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    segment_ids_q: Tensor | None = None,
    segment_ids_k: Tensor | None = None,
    prefix_len: Tensor | None = None,
    sinks: Tensor | None = None,
    position_table: Tensor | None = None,
    position_index: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
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
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    segment_ids_q: Tensor | None = None,
    segment_ids_k: Tensor | None = None,
    prefix_len: Tensor | None = None,
    sinks: Tensor | None = None,
    position_table: Tensor | None = None,
    position_index: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T + bias) @ value, fused: the scores are never stored.

    A drop-in replacement of `torch.nn.functional.scaled_dot_product_attention`. Rows with no key
    left are 0 and never NaN, and masks and `is_causal` combine, which torch refuses from 2.14 on.

    Args:
        query: (batch, heads, q_len, head_dim), float32, bfloat16, float16 or float64. 2-D and 3-D
            inputs, more batch dimensions, and batch and heads of size 1 are taken as in torch.
        key: (batch, kv_heads, kv_len, head_dim). For inference key and value may be float8_e4m3fn,
            in the kernels of CUDA beside queries of 16 bits, from compute capability 8.9 on.
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
            query i sees keys 0..i + kv_len - q_len, as in FlashAttention. Of `is_causal`, `window`
            and `alibi_slopes`.
        window: (left, right), how many keys a query sees before its own and behind it; None: no
            bound. Query i's own key is i, or i + kv_len - q_len where `causal_alignment` is
            "bottom_right", as in FlashAttention. Combines with the masks; tiles outside of it cost
            nothing.
        softcap: scores become softcap * tanh(score / softcap) before masks (Gemma 2).
        alibi_slopes: broadcastable to (batch, heads), float32 or of the query's dtype: a score
            falls by slope * the distance of the key from the query's own (ALiBi). Its gradient is
            the reference's.
        segment_ids_q: integers, broadcastable to (batch, q_len): a query sees the keys of its own
            segment alone, as of sequences that are packed into one. Comes with `segment_ids_k`.
        segment_ids_k: likewise (batch, kv_len). Where the tokens of a segment lie together, tiles
            of others cost nothing.
        prefix_len: integers, broadcastable to (batch,): the call is causal, but all queries see the
            first so many keys, as of a picture before a text.
        sinks: broadcastable to (heads,), float32 or of the query's dtype, may require a gradient:
            one more score for each head, which takes weight from a row's and has no value (of
            gpt-oss; attention sinks of Xiao et al., 2024, without a token). A part of the
            log-sum-exp; a row without a key has this score alone.
        position_table: (heads, entries), or of one for all heads, float32 or of the query's dtype,
            may require a gradient: position_table[:, position_index] is added to the scores, after
            `scale` and `softcap`, as ALiBi and a float `attn_mask` are (T5's buckets, Swin's and
            BEiT's windows). Comes with `position_index`.
        position_index: integers, which entry a score has: (q_len, kv_len), or for each offset of
            key to query (q_len + kv_len - 1,), from 1 - q_len to kv_len - 1, whose memory is linear
            in the length. `ff.positions` makes those of T5, Swin and BEiT. What is not an entry
            raises; kernels on a GPU make NaN of it.
        key_scale, value_scale: float32, broadcastable to (batch, kv_heads): what keys and values
            of float8_e4m3fn count times; 1 by default.
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
    if not _is_compiling():
        # Each argument by its name: 0.1 us less than tuples that are put together.
        if has_torch_function_variadic(
            query, key, value, attn_mask, key_padding_mask, alibi_slopes, segment_ids_q, key_scale,
            segment_ids_k, prefix_len, sinks, position_table, position_index, value_scale,
        ):  # fmt: skip
            given = Arguments(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                key_padding_mask, causal_alignment, window, softcap, alibi_slopes, segment_ids_q,
                segment_ids_k, prefix_len, sinks, position_table, position_index, key_scale,
                value_scale, return_lse, backend,
            )  # fmt: skip
            answer = arguments.ask_torch_function(
                scaled_dot_product_attention, given, _POSITIONAL, (*given[:4], *given[8:-2])
            )
            if answer is not NotImplemented:
                return answer
        kinds: Any = score_policy.NONE
        if window is not None or softcap is not None:
            kinds = score_policy.plain_kinds(window, softcap)
        if (
            type(is_causal) is type(enable_gqa) is type(return_lse) is bool
            and arguments.are_plain(attn_mask, dropout_p, scale, causal_alignment)
            and kinds is not None
        ):
            left, right, cap = kinds
            # 0.1 us less than by its own constructor.
            slopes = None if alibi_slopes is None else slopes_of_each(alibi_slopes, query)
            call = tuple.__new__(Call, (
                query, key, value, attn_mask, key_padding_mask, slopes, None, 0.0,
                is_causal or prefix_len is not None, causal_alignment == "bottom_right", scale,
                enable_gqa, left, right, cap, segment_ids_q, segment_ids_k, prefix_len, key_scale,
                value_scale, position_index, position_table, sinks,
            ))  # fmt: skip
            result = OP.attempt(backend, call, return_lse)
            if result is not None:
                return result
    call = normalize(
        Arguments(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            key_padding_mask, causal_alignment, window, softcap, alibi_slopes, segment_ids_q,
            segment_ids_k, prefix_len, sinks, position_table, position_index, key_scale,
            value_scale, return_lse,
        )
    )  # fmt: skip
    result = OP.run(backend, call, return_lse)
    if query.dim() == 4:
        return result
    leading = arguments.broadcast(*(t.shape[:-3] for t in (query, key, value)))
    heads = call.query.shape[1:2] if query.dim() > 2 else ()
    if return_lse:
        return tuple(t.reshape(leading + heads + t.shape[2:]) for t in result)
    return result.reshape(leading + heads + result.shape[2:])


def check(given: Arguments) -> None:
    """Raise TypeError or ValueError for arguments that are not legal."""
    query, key, value = given.query, given.key, given.value
    float8.check_tensors(query, key, value)
    sizes = arguments.shapes(query=query, key=key, value=value)
    if not query.dim() == key.dim() == value.dim() or query.dim() < 2:
        raise ValueError(f"query, key and value must have the same rank, at least 2, got {sizes}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key must have the head_dim of query, got {sizes}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"value must have the kv_len of key, got {sizes}")
    try:
        leading = tuple(arguments.broadcast(*(t.shape[:-3] for t in (query, key, value))))
    except RuntimeError:
        raise ValueError(f"query, key and value must have one batch size, got {sizes}") from None
    arguments.check_flag("enable_gqa", given.enable_gqa)
    heads: tuple[int, ...] = ()
    key_heads = heads
    if query.dim() > 2:
        q_heads, k_heads, v_heads = (t.shape[-3] for t in (query, key, value))
        kv_heads = v_heads if k_heads == 1 else k_heads
        if v_heads not in (1, kv_heads):
            raise ValueError(f"value must have the heads of key, got {sizes}")
        if not given.enable_gqa and 1 not in (q_heads, kv_heads) and q_heads != kv_heads:
            raise ValueError(
                "key must have the heads of query (enable_gqa=True lets several query heads "
                f"share one key head), got {sizes}"
            )
        if given.enable_gqa and (q_heads % kv_heads if kv_heads else q_heads):
            raise ValueError(
                f"the heads of query must be a multiple of the heads of key, got {sizes}"
            )
        heads = (q_heads if given.enable_gqa or kv_heads == 1 else kv_heads,)
        key_heads = (kv_heads,)
    float8.check_scales(given, (*leading, *key_heads), sizes)
    q_len, kv_len = query.shape[-2], key.shape[-2]
    target = (*leading, *heads, q_len, kv_len)
    arguments.check_flag("is_causal", given.is_causal)
    arguments.check_alignment(given.causal_alignment)
    attn_mask, *_ = arguments.resolve_causal(
        given.attn_mask, given.is_causal, given.causal_alignment, q_len, kv_len
    )
    arguments.check_attn_mask(attn_mask, query, target, sizes)
    arguments.check_padding_mask(
        "key_padding_mask", given.key_padding_mask, query, (*leading, kv_len), sizes
    )
    score_policy.check_kinds(given, query, (*leading, *heads), sizes)
    score_policy.check_ranges(given, query, key, leading, sizes)
    score_policy.check_sinks(given.sinks, query, heads, sizes)
    score_policy.check_positions(given, query, key, heads, sizes)
    arguments.check_dropout(given.dropout_p)
    arguments.check_scale(given.scale, query)
    arguments.check_flag("return_lse", given.return_lse)


def normalize(given: Arguments) -> Call:
    """Public arguments, cast as autocast asks and checked, as every implementation takes them."""
    query, key, value, attn_mask = given[:4]
    key_padding_mask, enable_gqa = given.key_padding_mask, given.enable_gqa
    dtype = arguments.autocast_dtype(arguments.device_type_of(query))
    query, key, value = float8.autocast(dtype, query, key, value)
    attn_mask = arguments.autocast_mask(dtype, attn_mask)
    if not _is_compiling():
        check(given._replace(query=query, key=key, value=value, attn_mask=attn_mask))
    attn_mask, is_causal, causal_alignment = arguments.resolve_causal(
        attn_mask, given.is_causal, given.causal_alignment, query.shape[-2], key.shape[-2]
    )
    scale = arguments.number("scale", given.scale)
    rank = query.dim()
    query, key = arguments.with_a_head_dim(query, key)
    leading = arguments.broadcast(*(t.shape[:-3] for t in (query, key, value)))
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
    slopes = score_policy.slopes_of(given.alibi_slopes, query, *outer, heads)
    key_scale, value_scale = float8.scales_of(given, *outer, kv_heads)
    ranges = score_policy.ranges_of(given, outer, query.shape[-2], key.shape[-2])
    if rank > 4:
        slopes, key_scale, value_scale = (
            t if t is None else t.flatten(0, rank - 4) for t in (slopes, key_scale, value_scale)
        )
        query, key, value = (t.flatten(0, rank - 4) for t in (query, key, value))
        if attn_mask is not None and attn_mask.dim() > 3:
            attn_mask = attn_mask.expand(*leading, *attn_mask.shape[-3:]).flatten(0, rank - 4)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.flatten(0, rank - 4)
    seed = philox.draw_seed(query.device) if given.dropout_p > 0.0 else None
    return Call(
        query, key, value, attn_mask, key_padding_mask, slopes, seed, given.dropout_p,
        is_causal or given.prefix_len is not None, causal_alignment == "bottom_right", scale,
        bool(enable_gqa or kv_heads != heads), *score_policy.kinds_of(given), *ranges,
        key_scale, value_scale, *score_policy.positions_of(given, query, heads),
        score_policy.sinks_of(given.sinks, query, heads),
    )  # fmt: skip


def _widened(tensor: Tensor, leading: tuple[int, ...]) -> Tensor:
    """With these leading dimensions; the tensor itself where it has them, so that an exported graph
    holds no operator that does nothing."""
    return tensor if tensor.shape[:-2] == leading else tensor.expand(*leading, -1, -1)


def run_reference(call: Call, lse: bool) -> Any:
    """The definition."""
    if float8.has(call.key):
        dtype = formulas.accumulation_dtype(call.query.dtype)
        out, log_sum_exp = run_reference(float8.widened(call, dtype), True)
        return (out.to(call.query.dtype), log_sum_exp) if lse else out.to(call.query.dtype)
    diagonal = call.key.shape[2] - call.query.shape[2] if call.bottom_right else 0
    out, log_sum_exp = formulas.attention(
        score_policy.policy_of(call, diagonal), call.query, call.key, call.value, call.attn_mask,
        call.key_padding_mask, call.seed, call.dropout_p, call.scale,
    )  # fmt: skip
    return (out, log_sum_exp()) if lse else out


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    query = call.query
    batch, heads, q_len, _ = query.shape
    out = query.new_empty(batch, q_len, heads, call.value.shape[3]).transpose(1, 2)
    return out, query.new_empty(batch, heads, q_len, dtype=torch.float32)


def _flops(call: Call, backward: bool) -> int:
    # In the backward scores again, dP, dV, dQ and dK: five products against the forward's two.
    (batch, heads, q_len, dim), kv_len = call.query.shape, call.key.shape[2]
    value_dim = call.value.shape[3]
    width = 3 * dim + 2 * value_dim if backward else dim + value_dim
    return 2 * batch * heads * score_policy.scores_seen(call, q_len, kv_len) * width


DEFINITION = Definition(
    "attention", Call, gradients=4, results=1, outputs=2, fake=_fake,
    reference=lambda call: run_reference(call, True), flops=_flops, last_gradients=2,
)  # fmt: skip
_CPU = cpu.torch_op(DEFINITION)
_CUDA = cuda.CudaOp(DEFINITION)
_TRITON = triton.torch_op(
    DEFINITION,
    forward="attention.forward:attention_forward",
    backward="attention.backward:attention_backward",
)


def _cpu_path(call: Call) -> str:
    lengths = call.query.shape[2], call.key.shape[2]
    return cpu.path(call.query, *lengths, score_policy.hides(call), call.dropout_p > 0.0)


def _cpu_refuses(call: Call) -> Sequence[str]:
    if call.alibi_slopes is None and call.key.dtype is not float8.DTYPE:
        return cpu.refuses(call)
    return [*cpu.refuses(call), *float8.refuses(call), *score_policy.refuses_gradient(call)]


def _triton_refuses(call: Call) -> Sequence[str]:
    return [*triton.refuses(call), *score_policy.refuses_gradient(call), *float8.refuses(call)]


def _cuda_refuses(call: Call) -> Sequence[str]:
    narrow = cuda.refuses_float8(call.query) if float8.has(call.key) else ()
    reasons = [*cuda.refuses(call, DEFINITION), *score_policy.refuses_gradient(call), *narrow]
    return [*reasons, *score_policy.refuses_entries(call)]


def _cuda_waits(call: Call) -> bool:
    """Whether the CUDA kernels leave a call that they could run to Triton's.

    An eager call takes 33 to 99 us with Triton's kernels and 14 to 32 with these, most of it in
    Python and the driver, which is all that counts where lengths are short: the kernels themselves
    take 5.2 and 6.6 us for 197 tokens, 15.5 and 16.2 for 4,096 over 77, but 36 and 77 for 2,048
    over 2,048 (benchmarks/results/nvidia-h200/attention.json). Compiled code ignores lengths.
    """
    if cuda.emulates(call):
        return True
    if not _is_compiling() and call.query.itemsize == 2:
        q_len, kv_len = call.query.shape[2], call.key.shape[2]
        longest = 128 if q_len > 1024 else 256 if q_len > 64 else 512 if q_len > 16 else 2048
        if kv_len <= longest and all(dim % 8 == 0 for dim in call.head_dims()):
            return False
    return not _triton_refuses(call)


def inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: Any = None, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of a legal call, normally distributed.

    Args:
        shape: q_len, kv_len and head_dim; optionally batch, heads, kv_heads, value_dim, causal,
            window, softcap, alibi (slopes of the paper), segments (into how many even ones queries
            and keys are cut), prefix (its length), sinks (whether there are any), and mask:
            "key_padding" (the last quarter of the keys of every second entry hidden), "bool",
            "bias" (a float per head and score) or None.
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
    call |= score_policy.kind_inputs(shape, normal, generator, device)
    mask = shape.get("mask")
    if mask == "key_padding":
        hidden = torch.zeros(batch, kv_len, dtype=torch.bool, device="cpu")
        hidden[::2, kv_len - kv_len // 4 :] = True
        call["key_padding_mask"] = hidden.to(device)
    elif mask == "bool":
        numbers = torch.rand(q_len, kv_len, generator=generator, device="cpu")
        call["attn_mask"] = (numbers > 0.2).to(device)
    elif mask == "bias":
        call["attn_mask"] = normal(1, heads, q_len, kv_len)
    elif mask is not None:
        raise ValueError(f"mask must be key_padding, bool, bias or None, got {mask!r}")
    return call


def cost(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Floating-point operations of the two products, and bytes read and written once.

    Scores that the diagonal, a window, segments or key padding (as `inputs` makes them) hide do not
    count.
    """
    batch, heads = shape.get("batch", 1), shape.get("heads", 1)
    kv_heads, dim = shape.get("kv_heads", heads), shape["head_dim"]
    value_dim, q_len, kv_len = shape.get("value_dim", dim), shape["q_len"], shape["kv_len"]

    left, right = shape.get("window") or (None, None)
    prefix, segments = shape.get("prefix") or 0, shape.get("segments") or 1

    def scores(keys: int) -> int:
        far = 0 if shape.get("causal") or prefix else keys if right is None else right
        near = q_len if left is None else left

        def seen(i: int) -> int:
            own = i * segments // q_len
            first, end = -(-own * kv_len // segments), -(-(own + 1) * kv_len // segments)
            return min(max(i + far + 1, prefix), end, keys) - max(i - near, first, 0)

        return sum(max(0, seen(i)) for i in range(q_len))

    padded = (batch + 1) // 2 if shape.get("mask") == "key_padding" else 0
    seen = padded * scores(kv_len - kv_len // 4) + (batch - padded) * scores(kv_len)
    flops = 2 * heads * seen * (dim + value_dim)
    elements = heads * q_len * (dim + value_dim) + kv_heads * kv_len * (dim + value_dim)
    return flops, batch * elements * dtype.itemsize


OP = Op(
    name="scaled_dot_product_attention",
    arguments=Arguments,
    check=check,
    normalize=normalize,
    definition=DEFINITION,
    inputs=inputs,
    cost=cost,
    ranks=(4,),
    implementations=(
        Implementation("cpu", _CPU, _cpu_refuses, checks=True, path=_cpu_path),
        Implementation(
            "cuda", _CUDA, _cuda_refuses, differentiable=False, checks=True,
            on_request=_cuda_waits, path=_CUDA.path,
        ),
        Implementation("triton", _TRITON, _triton_refuses, on_request=triton.interprets),
        Implementation("reference", run_reference, never_refuses),
    ),
)  # fmt: skip
