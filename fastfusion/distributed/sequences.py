"""Attention over sequences that lie on several ranks, a part on each.

Partial results of attention over parts of the keys are merged by their log-sum-exps: out = sum_i
w_i out_i with w_i = exp(lse_i - lse), where lse is the log of the sum of all exp(lse_i). So keys
and values can go round a ring (Liu et al., "Ring Attention with Blockwise Transformers for
Near-Infinite Context", 2023), each rank holding its own part and one that is passing through; and
where one side is short and on every rank, nothing has to move but that side's statistics.

Gradients: a tensor that is sharded has the gradient of its part; one that is on every rank has to
be given the same gradient on every rank, and gets the whole gradient on every rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from fastfusion.ops.bidirectional_attention import bidirectional_attention
from fastfusion.ops.scaled_dot_product_attention import scaled_dot_product_attention

Group = Any  # dist.ProcessGroup | None, whose type is another one where torch has no distributed
Pair = tuple[Tensor, Tensor]


# ---- sequences and their parts


def shard_sequence(tensor: Tensor, dim: int, group: Group = None, zigzag: bool = False) -> Tensor:
    """This rank's part of a sequence that is on every rank.

    Args:
        tensor: of any shape.
        dim: that of the sequence.
        group: of ranks, all of them by default.
        zigzag: two parts of 2n, number r and number 2n - 1 - r, so that causal attention gives each
            rank as much to do. `ring_attention` asks for it where it is causal.

    Raises:
        ValueError: a length that ranks (twice as many, for `zigzag`) do not divide.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    parts = 2 * ranks if zigzag else ranks
    if tensor.shape[dim] % parts:
        raise ValueError(
            f"dimension {dim} of {tuple(tensor.shape)} must be a multiple of {parts}: {ranks} ranks"
            f"{' with two parts each' if zigzag else ''}"
        )
    each = tensor.chunk(parts, dim)
    if not zigzag:
        return each[rank].contiguous()
    return torch.cat([each[rank], each[parts - 1 - rank]], dim)


def gather_sequence(tensor: Tensor, dim: int, group: Group = None, zigzag: bool = False) -> Tensor:
    """The sequence of which each rank has what :func:`shard_sequence` gave; without a gradient."""
    ranks = dist.get_world_size(group)
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(ranks)]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    if not zigzag:
        return torch.cat(parts, dim)
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([*(h[0] for h in halves), *(h[1] for h in reversed(halves))], dim)


# ---- merging


def merge(one: Pair | None, other: Pair) -> Pair:
    """Attention over the keys of both, as float32 or more."""
    out, lse = other
    out = out.to(lse.dtype)
    if one is None:
        return out, lse
    total = torch.logaddexp(one[1], lse)
    # Where neither has a key, both weigh nothing.
    first, second = ((each - total).exp().nan_to_num(0.0).unsqueeze(-1) for each in (one[1], lse))
    return first * one[0] + second * out, total


# ---- one short side, on every rank


class _Copy(Function):
    """A tensor that every rank has: its gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _summed(grads[0], ctx.group), None


class _Sum(Function):
    """The sum over the ranks, on every rank.

    `own_losses`: ranks have losses of their own, so its gradient is the sum of what they give;
    else all give the same.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, own_losses: bool) -> Tensor:
        ctx.group, ctx.own_losses = group, own_losses
        return _summed(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = _summed(grads[0], ctx.group) if ctx.own_losses else grads[0]
        return grad, None, None


def _summed(tensor: Tensor, group: Group) -> Tensor:
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def merge_ranks(parts: Sequence[Pair], group: Group, own_losses: bool = False) -> Pair:
    """Attention over the keys of all ranks, from that over each rank's, which may be in several
    parts: one sum, of (value_dim + 1) numbers a row, and one maximum."""
    most = torch.stack([lse.detach() for _, lse in parts]).amax(0)
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    most = torch.where(most == -torch.inf, 0.0, most)  # a row without keys anywhere
    weighted = []
    for out, lse in parts:
        weight = (lse - most).exp().unsqueeze(-1)
        weighted.append(torch.cat([weight * out.to(lse.dtype), weight], -1))
    total = _Sum.apply(sum(weighted[1:], weighted[0]), group, own_losses)
    above, below = total[..., :-1], total[..., -1:]
    merged = above / torch.where(below == 0, 1.0, below)
    return merged.to(parts[0][0].dtype), below.squeeze(-1).log() + most


def sharded_keys_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Group = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of a few queries, which every rank has, over keys of which each rank holds a part.

    No key moves: every rank attends to its own, and one sum over the ranks merges the results.

    Args:
        query: (batch, heads, q_len, head_dim), the same on every rank.
        key, value: (batch, heads, this rank's keys, head_dim).
        group: of ranks, all of them by default.
        scale, key_padding_mask: as of the op, of this rank's keys.
        return_lse: also return the log-sum-exps over all keys.

    Returns:
        (batch, heads, q_len, value_dim), the same on every rank; with ``return_lse`` and (batch,
        heads, q_len).

    Raises:
        TypeError, ValueError: as of the op.
    """
    out, lse = scaled_dot_product_attention(
        _Copy.apply(query, group), key, value, scale=scale, key_padding_mask=key_padding_mask,
        return_lse=True,
    )  # fmt: skip
    merged = merge_ranks([(out, lse)], group)
    return merged if return_lse else merged[0]


def sharded_bidirectional_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_value: Tensor,
    *,
    group: Group = None,
    scale: float | None = None,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Pair:
    """`bidirectional_attention` of a long side, of which each rank holds a part (the tokens of an
    image), and a short one that every rank has (the words of a text).

    No key moves: the long side's results are this rank's own, and one sum over the ranks merges
    those of the short side.

    Args:
        query, query_value: (batch, heads, this rank's tokens, head_dim) of the long side.
        key, value: (batch, heads, k_len, head_dim) of the short one, the same on every rank.
        group: of ranks, all of them by default.
        scale, query_padding_mask, key_padding_mask: as of the op, of this rank's tokens.

    Returns:
        The long side's results (batch, heads, this rank's tokens, value_dim), and the short side's
        (batch, heads, k_len, value_dim), the same on every rank.

    Raises:
        TypeError, ValueError: as of the op.
    """
    key, value = (_Copy.apply(tensor, group) for tensor in (key, value))
    out_q, out_k, _, lse_k = bidirectional_attention(
        query, key, value, query_value, scale=scale, query_padding_mask=query_padding_mask,
        key_padding_mask=key_padding_mask, return_lse=True,
    )  # fmt: skip
    return out_q, merge_ranks([(out_k, lse_k)], group)[0]
