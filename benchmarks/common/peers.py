"""What a user would call instead of an op of ours, each as an adapter of a few lines.

An adapter takes the keyword arguments of our public op and returns a call without arguments.
What a user would prepare once per model, such as the mask in the peer's form, is prepared outside
that call. Tensors: query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfusion.ops.linear import ACTIVATIONS

Arguments = dict[str, Any]
Adapter = Callable[[Arguments], Callable[[], Any]]


class Skipped(Exception):
    """A peer cannot take part in a call; the message says why."""


def both_masks(mask: Tensor | None, visible: Tensor) -> Tensor:
    """A mask, bool True = attend or float, with what is not visible hidden besides."""
    if mask is None:
        return visible
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, float("-inf"))


def attend_mask(call: Arguments) -> Tensor | None:
    """attn_mask with the key padding worked in, as SDPA takes it: bool True = attend, or float."""
    mask, padding = call.get("attn_mask"), call.get("key_padding_mask")
    return mask if padding is None else both_masks(mask, ~padding[:, None, None, :])


def whole_mask(call: Arguments) -> Tensor | None:
    """`attend_mask` with the causal mask, the window, segments and prefix worked in too."""
    mask = attend_mask(call)
    prefix, q_ids, k_ids = (
        call.get(name) for name in ("prefix_len", "segment_ids_q", "segment_ids_k")
    )
    if prefix is not None:
        keys = torch.arange(call["key"].shape[-2], device=call["key"].device)
        seen = lower_triangle(call["query"], call["key"]) | (keys < prefix[:, None, None, None])
        mask = both_masks(mask, seen)
    elif call.get("is_causal"):
        mask = both_masks(mask, lower_triangle(call["query"], call["key"]))
    if q_ids is not None and k_ids is not None:
        mask = both_masks(mask, q_ids[:, None, :, None] == k_ids[:, None, None, :])
    if call.get("window"):
        left, right = (torch.inf if side is None else side for side in call["window"])
        distance = distances(call["query"], call["key"])
        mask = both_masks(mask, (distance <= left) & (distance >= -right))
    return mask


def distances(query: Tensor, key: Tensor) -> Tensor:
    """(q_len, kv_len): by how much a query's number is above a key's."""
    rows, columns = (torch.arange(t.shape[-2], device=query.device) for t in (query, key))
    return rows[:, None] - columns


def slopes_bias(call: Arguments) -> Tensor | None:
    """ALiBi as a mask that is added, per head."""
    slopes = call.get("alibi_slopes")
    if slopes is None:
        return None
    bias = -slopes[..., None, None] * distances(call["query"], call["key"]).abs()
    return bias.to(call["query"].dtype)


def positions_bias(call: Arguments) -> Tensor | None:
    """A position table as a mask that is added, per head."""
    table, index, query = call.get("position_table"), call.get("position_index"), call["query"]
    if table is None or index is None:
        return None
    if index.dim() == 1:
        index = index[query.shape[-2] - 1 - distances(query, call["key"])]
    return table[:, index].to(query.dtype)


def mask_or_causal(call: Arguments) -> tuple[Tensor | None, bool]:
    """The mask and is_causal for whoever takes but one of them, as SDPA from torch 2.14 on."""
    causal = bool(call.get("is_causal")) and attend_mask(call) is None
    return (None if causal else whole_mask(call)), causal


def linear(call: Arguments) -> Callable[[], Tensor]:
    """torch's linear layer, activation and residual, one after the other."""
    input, weight, bias = call["input"], call["weight"], call["bias"]
    residual, activate = call.get("residual"), ACTIVATIONS[call["activation"]]

    def run() -> Tensor:
        result = activate(F.linear(input, weight, bias))
        return result if residual is None else result + residual

    return run


def sdpa(call: Arguments) -> Callable[[], Tensor]:
    """torch's scaled_dot_product_attention, on the backend that torch picks."""
    mask, causal = mask_or_causal(call)
    return partial(
        F.scaled_dot_product_attention,
        call["query"],
        call["key"],
        call["value"],
        attn_mask=mask,
        is_causal=causal,
        **{k: call[k] for k in ("scale", "enable_gqa") if k in call},
    )


def sdpa_math(call: Arguments) -> Callable[[], Tensor]:
    """SDPA's own unfused backend."""
    mask, causal = mask_or_causal(call)
    run = partial(
        torch.ops.aten._scaled_dot_product_attention_math.default,
        call["query"], call["key"], call["value"],
        additive(mask, call["query"].dtype), 0.0, causal,
        **{k: call[k] for k in ("scale", "enable_gqa") if k in call},
    )  # fmt: skip
    return lambda: run()[0]


def unfused_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale * query @ key^T + bias) @ value, every step in the dtype of the inputs."""
    if query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if sinks is None:
        return torch.softmax(scores, -1) @ value
    column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1] @ value


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask in the form that is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def lower_triangle(query: Tensor, key: Tensor) -> Tensor:
    """The causal mask, True = attend, aligned top left."""
    size = (query.shape[-2], key.shape[-2])
    return torch.ones(size, dtype=torch.bool, device=query.device).tril()


def unfused(call: Arguments) -> Callable[[], Tensor]:
    """The formula as textbooks write it."""
    query = call["query"]
    bias, slopes = additive(whole_mask(call), query.dtype), slopes_bias(call)
    if slopes is not None:
        bias = slopes if bias is None else bias + slopes
    scale = call.get("scale", query.shape[-1] ** -0.5)
    table = positions_bias(call)
    if table is not None:
        bias = table if bias is None else bias + table
    kinds = call.get("softcap"), call.get("sinks")
    return partial(unfused_formula, query, call["key"], call["value"], bias, scale, *kinds)


def compiled_formula(call: Arguments) -> Callable[[], Tensor]:
    """The unfused formula under torch.compile."""
    plain = unfused(call)
    assert isinstance(plain, partial)
    return partial(torch.compile(plain.func, dynamic=False), *plain.args, **plain.keywords)


def _padding_pair(call: Arguments) -> tuple[Tensor | None, Tensor | None]:
    """The masks of the row softmax (over keys) and of the column softmax (over queries)."""
    rows, columns = call.get("key_padding_mask"), call.get("query_padding_mask")
    return (
        None if rows is None else ~rows[:, None, None, :],
        None if columns is None else ~columns[:, None, None, :],
    )


def two_sdpa(call: Arguments) -> Callable[[], tuple[Tensor, Tensor]]:
    """Both directions by two calls of torch's scaled_dot_product_attention."""
    query, key = call["query"], call["key"]
    value, query_value = call["value"], call["query_value"]
    rows, columns = _padding_pair(call)

    def run() -> tuple[Tensor, Tensor]:
        out_q = F.scaled_dot_product_attention(query, key, value, attn_mask=rows)
        out_k = F.scaled_dot_product_attention(key, query, query_value, attn_mask=columns)
        return out_q, out_k

    return run


def two_unfused(call: Arguments) -> Callable[[], tuple[Tensor, Tensor]]:
    """Both directions by the formula: one score matrix, two softmaxes, two products."""
    query, key = call["query"], call["key"]
    value, query_value = call["value"], call["query_value"]
    scale = query.shape[-1] ** -0.5
    rows, columns = (additive(mask, query.dtype) for mask in _padding_pair(call))

    def run() -> tuple[Tensor, Tensor]:
        scores = query @ key.transpose(-2, -1) * scale
        by_rows = scores if rows is None else scores + rows
        by_columns = scores.transpose(-2, -1)
        by_columns = by_columns if columns is None else by_columns + columns
        return torch.softmax(by_rows, -1) @ value, torch.softmax(by_columns, -1) @ query_value

    return run


def _heads(projected: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(batch, heads, length, head_dim) of each part of a projection."""
    return projected.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _rows(attended: Tensor) -> Tensor:
    return attended.transpose(1, 2).flatten(2)


def _cross_attention(call: Arguments, attend: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """Linear layers of torch around `attend(query, key, value)`; norms and residual are not in the
    shapes that are measured."""
    heads, query, context = call["num_heads"], call["query"], call["context"]
    q, kv, out = ((call[f"{n}_weight"], call[f"{n}_bias"]) for n in ("q", "kv", "out"))

    def run() -> Tensor:
        (rows,) = _heads(F.linear(query, *q), 1, heads)
        key, value = _heads(F.linear(context, *kv), 2, heads)
        return F.linear(_rows(attend(rows, key, value)), *out)

    return run


def linear_sdpa(call: Arguments) -> Callable[[], Tensor]:
    """The cross-attention layer as linear layers around torch's SDPA."""
    return _cross_attention(
        call, partial(F.scaled_dot_product_attention, attn_mask=attend_mask(call))
    )


def linear_unfused(call: Arguments) -> Callable[[], Tensor]:
    """The same around the unfused formula."""
    bias = additive(attend_mask(call), call["query"].dtype)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return unfused_formula(query, key, value, bias, query.shape[-1] ** -0.5)

    return _cross_attention(call, attend)


def _cross_modal(call: Arguments, both: Adapter) -> Callable[[], tuple[Tensor, ...]]:
    """Linear layers and norms of torch around both directions by another peer."""
    names = ("visual", "text")
    tokens, weights = [call[n] for n in names], [call[f"{n}_weights"] for n in names]
    heads, activate, first = call["num_heads"], ACTIVATIONS[call["activation"]], call["norm_first"]
    paddings = {
        "query_padding_mask": call.get("visual_padding_mask"),
        "key_padding_mask": call.get("text_padding_mask"),
    }

    def norm(x: Tensor, norm: Any, wanted: bool) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *norm) if wanted else x

    def run() -> tuple[Tensor, ...]:
        (query, query_value), (key, value) = (
            _heads(F.linear(norm(x, w.norm1, first), w.in_weight, w.in_bias), 2, heads)
            for x, w in zip(tokens, weights, strict=True)
        )
        given = {"query": query, "key": key, "value": value, "query_value": query_value}
        results = []
        for x, w, found in zip(tokens, weights, both(given | paddings)(), strict=True):
            x = norm(x + F.linear(_rows(found), w.out_weight, w.out_bias), w.norm1, not first)
            hidden = activate(F.linear(norm(x, w.norm2, first), w.linear1_weight, w.linear1_bias))
            x = x + F.linear(hidden, w.linear2_weight, w.linear2_bias)
            results.append(norm(x, w.norm2, not first))
        return tuple(results)

    return run


def layer_two_sdpa(call: Arguments) -> Callable[[], tuple[Tensor, ...]]:
    """The fusion layer as linear layers and norms around two calls of SDPA."""
    return _cross_modal(call, two_sdpa)


def layer_two_unfused(call: Arguments) -> Callable[[], tuple[Tensor, ...]]:
    """The same around the unfused formula."""
    return _cross_modal(call, two_unfused)
