"""Attention in plain torch: the definition, the oracle of the tests and the fallback.

Sums are taken in promote_types(dtype, float32), so that float64 stays float64. Nothing here reads
a tensor's data, so it traces, exports, vmaps and differentiates to any order.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastfusion.core import philox
from fastfusion.core.arguments import softmax_scale
from fastfusion.core.export_mode import is_plain
from fastfusion.core.score_policy import Policy


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """torch.promote_types(dtype, torch.float32), which a program would hold as an operator."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which a program would hold where it does nothing, and an assertion."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def hide(tensor: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Rows that `padding_mask` hides become 0: masked scores alone would leave 0 * NaN = NaN."""
    if padding_mask is None:
        return tensor
    return tensor.masked_fill(padding_mask[:, None, :, None], 0.0)


def masked_scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    policy: Policy,
    scale: float,
) -> Tensor:
    """S in the accumulation dtype, -inf where a score is hidden; key has the query's heads."""
    acc = accumulation_dtype(query.dtype)
    scores = policy.shape((cast(query, acc) @ cast(key, acc).transpose(-1, -2)) * scale)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask.expand(scores.shape), -math.inf)
        else:
            # Cast first: the gradient is then reduced before it is rounded to 16 bits.
            scores = scores + cast(attn_mask, acc).expand(scores.shape)
    scores = policy.hide(scores)
    if key_padding_mask is not None:
        scores = scores.masked_fill(key_padding_mask[:, None, None, :], -math.inf)
    return scores


def safe_softmax(scores: Tensor, dim: int, is_masked: bool = True) -> Tensor:
    """Softmax along `dim`; a slice of -inf alone gives 0.

    Without a mask no finite numbers make one: programs for others are spared the four operators,
    which few of their backends run where they run the softmax.
    """
    if not is_masked and is_plain():
        return torch.softmax(scores, dim)
    dead = (scores == -math.inf).all(dim, keepdim=True)
    return torch.softmax(scores.masked_fill(dead, 0.0), dim).masked_fill(dead, 0.0)


def log_sum_exp(scores: Tensor, dim: int) -> Tensor:
    """Log-sum-exp along `dim`; a slice of -inf alone gives -inf and no gradient.

    torch.logsumexp serves as the shift alone: its derivative, exp(S - lse), is wrong where lse is
    too large to hold log(count), as in a row of finfo.min.
    """
    dead = (scores == -math.inf).all(dim, keepdim=True)
    scores = scores.masked_fill(dead, 0.0)
    shift = torch.logsumexp(scores.detach(), dim, keepdim=True).masked_fill(dead, 0.0)
    total = torch.exp(scores - shift).sum(dim, keepdim=True).masked_fill(dead, 1.0)
    return (shift + torch.log(total)).masked_fill(dead, -math.inf).squeeze(dim)


def dropout_factor(
    probabilities: Tensor, seed: Tensor | None, dropout_p: float, stream: int
) -> Tensor | None:
    """c of the formulas: 1 / (1 - p) where a score is kept and 0 elsewhere; None without."""
    if seed is None:
        return None
    batch, heads, q_len, kv_len = probabilities.shape
    keep = philox.keep_mask(seed, dropout_p, batch, heads, q_len, kv_len, stream)
    return keep.to(probabilities.dtype) * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)


def _grouped(tensor: Tensor, heads: int) -> Tensor:
    kv_heads = tensor.shape[1]
    return tensor if kv_heads == heads else tensor.repeat_interleave(heads // kv_heads, dim=1)


def rows_outside(tensor: Tensor) -> Tensor:
    """The same values in memory (batch, length, heads, dim)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def attention(
    policy: Policy,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> tuple[Tensor, Callable[[], Tensor]]:
    """out, and lse on demand."""
    heads, acc = query.shape[1], accumulation_dtype(query.dtype)
    scale = softmax_scale(scale, query.shape[-1])
    key = _grouped(hide(key, key_padding_mask), heads)
    value = _grouped(hide(value, key_padding_mask), heads)
    scores = masked_scores(query, key, attn_mask, key_padding_mask, policy, scale)
    scores = policy.with_sinks(scores)
    is_masked = policy.hides or attn_mask is not None or key_padding_mask is not None
    probabilities = policy.without_sinks(safe_softmax(scores, -1, is_masked))
    factor = dropout_factor(probabilities, seed, dropout_p, philox.ROW_STREAM)
    if factor is not None:
        probabilities = probabilities * factor
    out = rows_outside(cast(probabilities @ cast(value, acc), query.dtype))
    return out, lambda: log_sum_exp(scores, -1)
