"""What attention looks at, without its weights: sums over the softmax that need no L x L tensor.

With P = softmax(S) and lse the log-sum-exp of a row of scores S, as attention computes them:

    mass[j]    = sum_i P[i, j] = exp(log-sum-exp over i of (S[i, j] - lse[i]))
    entropy[i] = -sum_j P[i, j] log P[i, j] = lse[i] - sum_j P[i, j] S[i, j]

The first is the log-sum-exp of attention from keys to queries with -lse as bias; of the second the
sum is scale * query[i] . out[i], out being attention with the keys as values. So both are calls of
the fused attention of whatever backend runs, differentiable as it is, in memory linear in length.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastfusion.core import arguments
from fastfusion.core.reference import hide, log_sum_exp, masked_scores, safe_softmax
from fastfusion.core.score_policy import causal
from fastfusion.ops.scaled_dot_product_attention import (
    Arguments,
    Call,
    normalize,
    scaled_dot_product_attention,
)

WHAT = ("mass", "entropy", "topk")
# Scores at a time where they are needed themselves: a megabyte of float32 stays in the caches.
_AT_A_TIME = 1 << 18


class AttentionStatistics(NamedTuple):
    """Of every head; None what was not asked for. float32, float64 for float64 inputs.

    Attributes:
        mass: (batch, heads, kv_len), the weight that each key receives from all queries; its sum is
            the number of queries that see a key.
        entropy: (batch, heads, q_len), of each query's weights, in nats: 0 where all weight is on
            one key, log(kv_len) where it is spread evenly.
        weights: (batch, heads, q_len, k), the largest weights of each query, in descending order.
        keys: int64 of the same shape, the keys that have them.
    """

    mass: Tensor | None
    entropy: Tensor | None
    weights: Tensor | None
    keys: Tensor | None


def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    what: Iterable[str] = ("mass", "entropy"),
    k: int = 5,
    attn_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_alignment: str = "top_left",
    backend: str | None = None,
) -> AttentionStatistics:
    """What the weights of `scaled_dot_product_attention(query, key, ...)` amount to.

    Mass and entropy are differentiable, so that they can be losses. With a float `attn_mask` the
    entropy is taken from scores, some rows at a time; so are the largest weights always, which
    carry no gradient. Inputs of 16 bits are computed with in float32.

    Args:
        query: (batch, heads, q_len, head_dim), or another rank, as the op takes it.
        key: (batch, kv_heads, kv_len, head_dim).
        what: some of "mass", "entropy" and "topk".
        k: how many keys of each query "topk" gives.
        attn_mask, key_padding_mask, is_causal, scale, enable_gqa, causal_alignment, backend: as of
            :func:`fastfusion.scaled_dot_product_attention`.
        query_padding_mask: bool, broadcastable to (batch, q_len), True = this query does not count:
            its entropy and weights are 0, and it gives no mass.

    Returns:
        Mass, entropy, weights and keys, with the leading dimensions of the op's output.

    Raises:
        TypeError, ValueError: as of the op; an unknown name in `what`, or `k` that is no number
            from 1 to kv_len.
    """
    asked = _asked(what)
    call = normalize(
        Arguments(
            query, key, key, attn_mask, 0.0, is_causal, scale, enable_gqa, key_padding_mask,
            causal_alignment,
        )
    )  # fmt: skip
    heads, kv_len = call.query.shape[1], call.key.shape[2]
    if "topk" in asked:
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k must be an int, got {type(k).__name__}")
        if not 1 <= k <= kv_len:
            raise ValueError(f"k must be from 1 to the number of keys, {kv_len}, got {k}")
    ignored = _query_padding(query_padding_mask, query, call)
    call = call._replace(
        query=_widened(call.query),
        key=_widened(call.key),
    )
    mass = entropy = weights = keys = None
    with _without_autocast(call.query):
        has_bias = call.attn_mask is not None and call.attn_mask.is_floating_point()
        if "mass" in asked or ("entropy" in asked and not has_bias):
            lse, entropy = _row_sums(call, "entropy" in asked and not has_bias, backend)
            if "mass" in asked:
                mass = _mass(call, lse, ignored, backend)
        if "entropy" in asked and has_bias:
            entropy = torch.cat([*_by_rows(call, _entropy_of)], 2)
        if "topk" in asked:
            weights, keys = _strongest(call, k)
            if ignored is not None:
                weights = weights.masked_fill(ignored[..., None], 0.0)
        if entropy is not None and ignored is not None:
            entropy = entropy.masked_fill(ignored, 0.0)
    leading = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])
    inner = (heads,) if query.dim() > 2 else ()

    def shaped(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.reshape(*leading, *inner, *tensor.shape[2:])

    return AttentionStatistics(*map(shaped, (mass, entropy, weights, keys)))


def _asked(what: Any) -> frozenset[str]:
    names = frozenset((what,) if isinstance(what, str) else what)
    if not names or not names <= set(WHAT):
        known = ", ".join(map(repr, WHAT))
        raise ValueError(f"what must be some of {known}, got {what!r}")
    return names


def _query_padding(mask: Any, query: Tensor, call: Call) -> Tensor | None:
    """bool (batch, 1, q_len) of queries that do not count."""
    if mask is None:
        return None
    leading = query.shape[:-3] if query.dim() > 3 else ()
    target = (*leading, query.shape[-2])
    sizes = arguments.shapes(query=query)
    arguments.check_padding_mask("query_padding_mask", mask, query, target, sizes)
    return mask.expand(target).reshape(-1, 1, query.shape[-2]).expand(call.query.shape[0], -1, -1)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _without_autocast(tensor: Tensor) -> Any:
    return torch.autocast(tensor.device.type, enabled=False)


def _scale(call: Call) -> float:
    return arguments.softmax_scale(call.scale, call.query.shape[-1])


def _row_sums(call: Call, entropy: bool, backend: str | None) -> tuple[Tensor, Tensor | None]:
    """lse (batch, heads, q_len), and the entropy of the rows."""
    value = call.key if entropy else call.key.new_ones(()).expand(*call.key.shape[:-1], 1)
    out, lse = scaled_dot_product_attention(
        call.query, call.key, value, call.attn_mask, 0.0, call.is_causal, call.scale,
        call.enable_gqa, key_padding_mask=call.key_padding_mask,
        causal_alignment=_alignment(call.bottom_right), return_lse=True, backend=backend,
    )  # fmt: skip
    if not entropy:
        return lse, None
    dead = lse == -math.inf
    # In place, where nothing asks for it again: half of the memory of all this.
    products = call.query * out if out.requires_grad else out.mul_(call.query)
    expected = products.sum(-1) * _scale(call)
    return lse, (lse.masked_fill(dead, 0.0) - expected).masked_fill(dead, 0.0).clamp_min(0.0)


def _mass(call: Call, lse: Tensor, ignored: Tensor | None, backend: str | None) -> Tensor:
    """(batch, heads, kv_len): attention from keys to queries, as it were."""
    heads, q_len = call.query.shape[1:3]
    key = hide(call.key, call.key_padding_mask)  # as queries these are read
    kv_heads, kv_len = key.shape[1:3]
    if kv_heads != heads:
        key = key.repeat_interleave(heads // kv_heads, 1)
    query, mask = call.query, call.attn_mask
    dead = lse == -math.inf
    if ignored is not None:
        dead = dead | ignored
    if call.is_causal:
        # Key j is seen by the queries from j - diagonal on: in reverse order, up to there.
        query, key, lse, dead = query.flip(2), key.flip(2), lse.flip(2), dead.flip(2)
    scale = _scale(call)
    if mask is None:
        bias = torch.where(dead, -math.inf, -lse.masked_fill(dead, 0.0))[:, :, None]
    else:
        # The bias as one more number of each query, which every key multiplies by 1: together with
        # the mask it would be as large as the scores. Rows that do not count are hidden by a score.
        mask = mask if mask.dim() > 1 else mask[None]
        if call.is_causal:
            mask = mask.flip(-2, -1)
        shift = torch.where(dead, _LOWEST, -lse.masked_fill(dead, 0.0))
        query = torch.cat([query * scale, shift[..., None]], -1)
        key = torch.cat([key, torch.ones_like(key[..., :1])], -1)
        bias, scale = mask.transpose(-1, -2), 1.0
    _, received = scaled_dot_product_attention(
        key, query, query.new_ones(()).expand(*query.shape[:-1], 1), bias, 0.0, call.is_causal,
        scale, causal_alignment=_alignment(not call.bottom_right), return_lse=True,
        backend=backend,
    )  # fmt: skip
    mass = received.exp()
    if call.is_causal:
        mass = mass.flip(2)
    padding = call.key_padding_mask
    return mass if padding is None else mass.masked_fill(padding[:, None], 0.0)


_LOWEST = -1e30  # of a score: its exponential is 0


def _alignment(bottom_right: bool) -> str:
    return "bottom_right" if bottom_right else "top_left"


def _strongest(call: Call, k: int) -> tuple[Tensor, Tensor]:
    """Weights and keys (batch, heads, q_len, k).

    They are written to one place as they come: small results that are kept one by one leave holes
    in the heap that the next scores do not fit into, as large as all weights in the end
    (findings/torch-top-weights-keep-the-memory-of-all.sh).
    """
    query = call.query
    weights = query.new_empty((*query.shape[:3], k))
    keys = torch.empty_like(weights, dtype=torch.int64)
    with torch.no_grad():
        first = 0
        for some, places in _by_rows(call, lambda scores: safe_softmax(scores, -1).topk(k, -1)):
            rows = slice(first, first + some.shape[2])
            weights[:, :, rows], keys[:, :, rows] = some, places
            first = rows.stop
            del some, places
    return weights, keys


def _entropy_of(scores: Tensor) -> Tensor:
    dead = (scores == -math.inf).all(-1)
    lse = log_sum_exp(scores, -1)
    hidden = scores == -math.inf
    logarithms = (scores - lse.masked_fill(dead, 0.0)[..., None]).masked_fill(hidden, 0.0)
    return -(logarithms.exp().masked_fill(hidden, 0.0) * logarithms).sum(-1)


def _by_rows(call: Call, of_scores: Callable[[Tensor], Any]) -> Iterator[Any]:
    """`of_scores` of some rows of scores after the other."""
    batch, heads, q_len, _ = call.query.shape
    kv_len = call.key.shape[2]
    key = hide(call.key, call.key_padding_mask)
    if key.shape[1] != heads:
        key = key.repeat_interleave(heads // key.shape[1], 1)
    diagonal = kv_len - q_len if call.bottom_right else 0
    rows = max(1, _AT_A_TIME // max(1, batch * heads * kv_len))
    mask = call.attn_mask

    def run(query: Tensor, key: Tensor, mask: Tensor | None, first: int) -> Any:
        policy = causal(diagonal + first if call.is_causal else None)
        scores = masked_scores(query, key, mask, call.key_padding_mask, policy, _scale(call))
        return of_scores(scores)

    for first in range(0, max(q_len, 1), rows):
        query = call.query[:, :, first : first + rows]
        some = mask
        if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            some = mask[..., first : first + rows, :]
        if torch.is_grad_enabled():
            yield checkpoint(run, query, key, some, first, use_reentrant=False)
        else:
            yield run(query, key, some, first)
