"""Attention over sequences that lie on several ranks, a part on each.

Partial results of attention over parts of the keys are merged by their log-sum-exps: out = sum_i
w_i out_i with w_i = exp(lse_i - lse), where lse is the log of the sum of all exp(lse_i). So keys
and values can go round a ring (Liu et al., "Ring Attention with Blockwise Transformers for
Near-Infinite Context", 2023), each rank holding its own part and one that is passing through; and
where one side is short and on every rank, nothing has to move but that side's statistics.

Gradients: a tensor that is sharded has the gradient of its part; one that is on every rank has to
be given the same gradient on every rank, and gets the whole gradient on every rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from fastfusion.core.op import taken_by
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


def _merge(one: Pair | None, other: Pair) -> Pair:
    """Attention over the keys of both, as float32 or more."""
    out, lse = other
    out = out.to(lse.dtype)
    if one is None:
        return out, lse
    total = torch.logaddexp(one[1], lse)
    # Where neither has a key, both weigh nothing.
    first, second = ((each - total).exp().nan_to_num(0.0).unsqueeze(-1) for each in (one[1], lse))
    return first * one[0] + second * out, total


# ---- a ring


class _Ring:
    """Tensors that go from rank to rank, while this one computes on those that it has."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def _peer(self, step: int) -> int:
        number = (self.rank + step) % self.ranks
        return number if self.group is None else dist.get_global_rank(self.group, number)

    def pass_on(self, tensors: list[Tensor], length: int) -> Callable[[], list[Tensor]]:
        """Send tensors to the next rank; the result waits for those of the one before, which are so
        long: (batch, heads, length, dim), masks (batch, length)."""
        received, requests = [], []
        for tensor in tensors:
            shape = list(tensor.shape)
            shape[1 if tensor.dtype == torch.bool else 2] = length
            received.append(tensor.new_empty(shape))
            requests.append(dist.P2POp(dist.isend, tensor, self._peer(1), self.group))
            requests.append(dist.P2POp(dist.irecv, received[-1], self._peer(-1), self.group))
        works = dist.batch_isend_irecv(requests)

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return received

        return wait

    def gather_lengths(self, length: int) -> list[int]:
        """That of every rank's part."""
        lengths: list[Any] = [None] * self.ranks
        dist.all_gather_object(lengths, length, group=self.group)
        return [int(each) for each in lengths]


def _block(
    query: Tensor, keys: list[Tensor], rank: int, source: int, causal: bool, scale: float | None
) -> Pair:
    """Attention of this rank's queries over the keys of one: `keys` are key, value and, if there is
    one, the padding mask."""
    key, value, *hidden = keys

    def attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Pair:
        mask = hidden[0][..., : key.shape[2]] if hidden else None
        with taken_by(None):  # a backward may run inside `context_parallel`
            return scaled_dot_product_attention(
                query, key, value, is_causal=is_causal, scale=scale, key_padding_mask=mask,
                return_lse=True,
            )  # fmt: skip

    if not causal:
        return attend(query, key, value)
    if source == rank:  # both parts of it, in their order
        return attend(query, key, value, True)
    half = query.shape[2] // 2
    if source < rank:  # the first part is before both of ours, the second behind
        return attend(query, key[:, :, :half], value[:, :, :half])
    # Both parts are before the second of ours, and behind the first.
    out, lse = attend(query[:, :, half:], key, value)
    nothing = out.new_zeros(*out.shape[:2], half, out.shape[3])
    hidden_rows = lse.new_full((*lse.shape[:2], half), -torch.inf)
    return torch.cat([nothing, out], 2), torch.cat([hidden_rows, lse], 2)


class _RingAttention(Function):
    """One pass of keys and values around the ring forward, and one with their gradients backward.

    Nothing of a pass is kept but this rank's own part and the results, so a block's results are
    computed once more in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, group: Group,
        causal: bool, scale: float | None,
    ) -> Pair:  # fmt: skip
        ring = _Ring(group)
        ctx.ring, ctx.causal, ctx.scale = ring, causal, scale
        ctx.lengths = ring.gather_lengths(key.shape[2])
        keys = [key.contiguous(), value.contiguous()]
        keys += [] if hidden is None else [hidden.contiguous()]
        merged: Pair | None = None
        for step in range(ring.ranks):
            source = (ring.rank - step) % ring.ranks
            coming = ctx.lengths[(source - 1) % ring.ranks]
            wait = ring.pass_on(keys, coming) if step + 1 < ring.ranks else None
            if merged is None or ctx.lengths[source]:
                merged = _merge(merged, _block(query, keys, ring.rank, source, causal, scale))
            if wait is not None:
                keys = wait()
        assert merged is not None
        out, lse = merged[0].to(query.dtype), merged[1]
        ctx.save_for_backward(query, key, value, hidden, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, hidden, out, lse = ctx.saved_tensors
        ring: _Ring = ctx.ring
        grad, grad_lse = grads[0].to(lse.dtype), grads[1]
        keys = [key.contiguous(), value.contiguous()]
        keys += [] if hidden is None else [hidden.contiguous()]
        # What the loss loses with each row's log-sum-exp, but for what a block itself gives.
        rest = grad_lse - (grad * out.to(lse.dtype)).sum(-1)
        grad_query = torch.zeros_like(query, dtype=lse.dtype)
        sums = [torch.zeros_like(t, dtype=lse.dtype) for t in keys[:2]]
        for step in range(ring.ranks):
            source = (ring.rank - step) % ring.ranks
            coming = ctx.lengths[(source - 1) % ring.ranks]
            wait = ring.pass_on(keys, coming) if step + 1 < ring.ranks else None
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (query, *keys[:2])]
                part = [*leaves[1:], *keys[2:]]
                block_out, block_lse = _block(
                    leaves[0], part, ring.rank, source, ctx.causal, ctx.scale
                )
            weight = (block_lse.detach() - lse).exp().nan_to_num(0.0)
            own = (grad * block_out.detach().to(lse.dtype)).sum(-1)
            given = (weight.unsqueeze(-1) * grad).to(query.dtype), weight * (own + rest)
            found = torch.autograd.grad((block_out, block_lse), leaves, given)
            grad_query += found[0]
            for total, each in zip(sums, found[1:], strict=True):
                total += each
            # The gradients travel behind their keys, and once more to come home.
            back = ring.pass_on(sums, coming)
            if wait is not None:
                keys = wait()
            sums = back()
        return (
            grad_query.to(query.dtype), sums[0].to(key.dtype), sums[1].to(value.dtype), None, None,
            None, None,
        )  # fmt: skip


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Group = None,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """`scaled_dot_product_attention` of sequences of which every rank holds a part.

    Keys and values go once around the ranks while each computes, in parts: a rank holds its own
    and two that are on their way. Forward and backward exchange (n - 1) / n of all keys and values
    per rank, and the backward their gradients in float32, too.

    Args:
        query: (batch, heads, this rank's queries, head_dim).
        key, value: (batch, heads, this rank's keys, head_dim); ranks may have more or fewer of them
            unless attention is causal.
        group: of ranks, all of them by default.
        is_causal: each token sees those before it in the whole sequence. Parts are then those of
            ``shard_sequence(..., zigzag=True)``, of queries and keys alike.
        scale: as of the op.
        key_padding_mask: bool (batch, this rank's keys), True = ignore; on every rank or on none.
        return_lse: also return the log-sum-exps over all keys.

    Returns:
        (batch, heads, this rank's queries, value_dim); with ``return_lse`` and (batch, heads, this
        rank's queries). Both are differentiable once.

    Raises:
        ValueError: tensors that are not as above.
        TypeError: a mask that is not bool.
    """
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must be (batch, heads, length, head_dim), got {tuple(tensor.shape)}"
            )
    if is_causal and (query.shape[2] != key.shape[2] or query.shape[2] % 2):
        raise ValueError(
            "causal parts are those of shard_sequence(..., zigzag=True), as long for queries as "
            f"for keys, got {query.shape[2]} and {key.shape[2]}"
        )
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be bool, got {key_padding_mask.dtype}")
        if key_padding_mask.shape != (key.shape[0], key.shape[2]):
            raise ValueError(
                f"key_padding_mask must be {(key.shape[0], key.shape[2])}, got "
                f"{tuple(key_padding_mask.shape)}"
            )
    results = _RingAttention.apply(query, key, value, key_padding_mask, group, is_causal, scale)
    return results if return_lse else results[0]


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


def merge_ranks(out: Tensor, lse: Tensor, group: Group, own_losses: bool = False) -> Pair:
    """Attention over the keys of all ranks, from that over each rank's: one sum, of (value_dim + 1)
    numbers a row, and one maximum."""
    most = lse.detach().clone()
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    most = torch.where(most == -torch.inf, 0.0, most)  # a row without keys anywhere
    weight = (lse - most).exp().unsqueeze(-1)
    numbers = torch.cat([weight * out.to(lse.dtype), weight], -1)
    total = _Sum.apply(numbers, group, own_losses)
    above, below = total[..., :-1], total[..., -1:]
    merged = above / torch.where(below == 0, 1.0, below)
    return merged.to(out.dtype), below.squeeze(-1).log() + most


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
    merged = merge_ranks(out, lse, group)
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
    return out_q, merge_ranks(out_k, lse_k, group)[0]
