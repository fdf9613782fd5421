"""Attention over sequences in parts, of which keys and values go round a ring of ranks.

Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023: each rank
holds its own part and one that is passing through.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from fastfusion.core import arguments, philox
from fastfusion.core.op import intercepted_by
from fastfusion.distributed.sequences import Group, Pair, merge
from fastfusion.ops import scaled_dot_product_attention as _attention
from fastfusion.ops import varlen_attention as _varlen
from fastfusion.ops.scaled_dot_product_attention import scaled_dot_product_attention


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

    def gather_lengths(self, lengths: tuple[int, int]) -> list[tuple[int, int]]:
        """Those of every rank's part of queries and of keys."""
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, lengths, group=self.group)
        return found


Dropout = tuple[float, Tensor] | None  # probability and the seed, which all ranks have


def shared_seed(seed: Tensor, group: Group) -> Tensor:
    """That of the first rank, on every rank."""
    seed = seed.clone()
    dist.broadcast(seed, 0 if group is None else dist.get_global_rank(group, 0), group)
    return seed


def _shared_dropout(
    dropout_p: float, seed: Tensor | None, device: torch.device, group: Group
) -> Dropout:
    arguments.check_dropout(dropout_p)
    if dropout_p == 0.0:
        return None
    return dropout_p, shared_seed(philox.draw_seed(device) if seed is None else seed, group)


def pieces(rank: int, lengths: list[int], zigzag: bool) -> list[tuple[int, slice]]:
    """Where a rank's part comes from: the place in the whole of each of its pieces, and that in the
    part."""
    length = lengths[rank]
    if not zigzag:
        return [(sum(lengths[:rank]), slice(0, length))]
    half = length // 2
    behind = 2 * len(lengths) - 1 - rank
    return [(rank * half, slice(0, half)), (behind * half, slice(half, length))]


Attend = Callable[[Tensor, list[Tensor]], Pair]


class _Plan:
    """Which of this rank's queries attend to which keys of another's part, block by block."""

    def __init__(
        self, group: Group, q_len: int, k_len: int, causal: bool, zigzag: bool,
        scale: float | None, dropout: Dropout,
    ) -> None:  # fmt: skip
        self.ring = _Ring(group)
        lengths = self.ring.gather_lengths((q_len, k_len))
        self.queries, self.keys = ([pair[i] for pair in lengths] for i in (0, 1))
        self.causal, self.zigzag, self.scale, self.dropout = causal, zigzag, scale, dropout

    def blocks(self, source: int) -> Iterator[tuple[slice, slice, Attend]]:
        """Rows, keys, and what attention of the one to the other is."""
        rank = self.ring.rank
        rows, keys = slice(0, self.queries[rank]), slice(0, self.keys[source])
        half = rows.stop // 2
        if self.dropout is None and not self.causal:
            yield rows, keys, self._attend(False)
        elif self.dropout is None and source == rank:  # both pieces of it, in their order
            yield rows, keys, self._attend(True)
        elif self.dropout is None and source < rank:
            # The first piece of an earlier rank is before both of ours, its second behind.
            yield rows, slice(0, half), self._attend(False)
        elif self.dropout is None:
            # Both pieces of a later one are before our second, and behind our first.
            yield slice(half, rows.stop), keys, self._attend(False)
        else:  # random numbers depend on places, so each piece is by itself
            for query, some in pieces(rank, self.queries, self.zigzag):
                for key, others in pieces(source, self.keys, self.zigzag):
                    if not self.causal or key <= query:
                        yield some, others, self._attend(self.causal and key == query, query, key)

    def _attend(self, is_causal: bool, first_query: int = 0, first_key: int = 0) -> Attend:
        """Attention of a block, whose dropout knows the numbers of its first query and key."""

        def attend(query: Tensor, keys: list[Tensor]) -> Pair:
            key, value, *hidden = keys
            options: dict[str, Any] = {"is_causal": is_causal, "scale": self.scale}
            options["key_padding_mask"] = hidden[0] if hidden else None
            if self.dropout is None:
                return scaled_dot_product_attention(query, key, value, return_lse=True, **options)
            probability, seed = self.dropout
            call = _attention.OP.call(query, key, value, **options)
            seed = philox.placed(seed, first_query, first_key, 0, query.shape[1])
            call = call._replace(seed=seed, dropout_p=probability)
            result: Pair = _attention.OP.run(None, call, True)
            return result

        return attend


class _PackedPlan(_Plan):
    """The same of packed sequences, which may begin on one rank and end on another."""

    def __init__(
        self, group: Group, tokens: tuple[int, int], starts: tuple[Tensor, Tensor],
        longest: tuple[int | None, int | None], causal: bool, scale: float | None,
        dropout: Dropout,
    ) -> None:  # fmt: skip
        super().__init__(group, *tokens, causal, False, scale, dropout)
        self.starts, self.longest = starts, longest

    def blocks(self, source: int) -> Iterator[tuple[slice, slice, Attend]]:
        rank = self.ring.rank
        if self.causal and source > rank:
            return
        # Of each sequence, what this rank has of its queries and the other of its keys. Where
        # both are the same rank's, they begin at the same token, as a causal mask has to know.
        sides = (self.queries, rank), (self.keys, source)
        first = [sum(lengths[:number]) for lengths, number in sides]
        own = [
            starts.clamp(begin, begin + lengths[number]) - begin
            for starts, begin, (lengths, number) in zip(self.starts, first, sides, strict=True)
        ]
        ends = [0, 0]
        if self.dropout is not None:
            # Random numbers depend on places: a sequence that began on an earlier rank, one at most
            # on either side, is by itself.
            began = [_running(s, begin) for s, begin in zip(self.starts, first, strict=True)]
            for number in sorted({n for n in began if n is not None}):
                places = [
                    max(0, begin - int(starts[number]))
                    for starts, begin in zip(self.starts, first, strict=True)
                ]
                parts = [slice(int(o[number]), int(o[number + 1])) for o in own]
                if all(part.start < part.stop for part in parts):
                    alone = [
                        (o - part.start).clamp(0, part.stop - part.start)
                        for o, part in zip(own, parts, strict=True)
                    ]
                    yield parts[0], parts[1], self._packed(source, alone, *places)
            ends = [0 if n is None else int(o[n + 1]) for n, o in zip(began, own, strict=True)]
        rows, keys = (
            slice(end, lengths[number]) for end, (lengths, number) in zip(ends, sides, strict=True)
        )
        others = [(o - end).clamp(min=0) for o, end in zip(own, ends, strict=True)]
        yield rows, keys, self._packed(source, others)

    def _packed(
        self, source: int, starts: list[Tensor], first_query: int = 0, first_key: int = 0
    ) -> Attend:
        """Attention of packed rows, whose dropout knows the place in its sequence of what begins
        in the middle of one."""

        def attend(query: Tensor, keys: list[Tensor]) -> Pair:
            q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, *keys))
            causal = self.causal and source == self.ring.rank
            call = _varlen.OP.call(
                q, k, v, *starts, *self.longest, is_causal=causal, scale=self.scale
            )
            if self.dropout is not None:
                probability, seed = self.dropout
                seed = philox.placed(seed, first_query, first_key, 0, q.shape[1])
                call = call._replace(seed=seed, dropout_p=probability)
            out, lse = _varlen.OP.run(None, call, True)
            return out.transpose(0, 1)[None], lse.transpose(0, 1)[None]

        return attend


def _running(starts: Tensor, token: int) -> int | None:
    """The number of the packed sequence that has begun before a token and goes on with it."""
    number = int(torch.searchsorted(starts, token, right=True)) - 1
    inside = 0 <= number < len(starts) - 1 and int(starts[number]) < token
    return number if inside else None


def _columns(keys: list[Tensor], columns: slice) -> list[Tensor]:
    key, value, *hidden = keys
    return [key[:, :, columns], value[:, :, columns], *(mask[:, columns] for mask in hidden)]


def _merge_rows(merged: Pair | None, block: Pair, rows: slice, length: int) -> Pair:
    """What is known of all rows, with a block of some."""
    if rows == slice(0, length):
        return merge(merged, block)
    if merged is None:
        out, lse = block
        merged = (
            out.new_zeros(*out.shape[:2], length, out.shape[3], dtype=lse.dtype),
            lse.new_full((*lse.shape[:2], length), -torch.inf),
        )
    new = merge((merged[0][:, :, rows], merged[1][:, :, rows]), block)
    for whole, some in zip(merged, new, strict=True):
        whole[:, :, rows] = some
    return merged


class _RingAttention(Function):
    """One pass of keys and values around the ring forward, and one with their gradients backward.

    Nothing of a pass is kept but this rank's own part and the results, so a block's results are
    computed once more in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, plan: _Plan
    ) -> Pair:
        ring, ctx.plan = plan.ring, plan
        keys = [key.contiguous(), value.contiguous()]
        keys += [] if hidden is None else [hidden.contiguous()]
        merged: Pair | None = None
        for step in range(ring.ranks):
            source = (ring.rank - step) % ring.ranks
            coming = plan.keys[(source - 1) % ring.ranks]
            wait = ring.pass_on(keys, coming) if step + 1 < ring.ranks else None
            for rows, columns, attend in plan.blocks(source):
                if merged is not None and columns.start == columns.stop:
                    continue
                with intercepted_by(None):
                    block = attend(query[:, :, rows], _columns(keys, columns))
                merged = _merge_rows(merged, block, rows, query.shape[2])
            if wait is not None:
                keys = wait()
        assert merged is not None
        out, lse = merged[0].to(query.dtype), merged[1]
        ctx.save_for_backward(query, key, value, hidden, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, hidden, out, lse = ctx.saved_tensors
        plan: _Plan = ctx.plan
        ring = plan.ring
        grad, grad_lse = grads[0].to(lse.dtype), grads[1]
        keys = [key.contiguous(), value.contiguous()]
        keys += [] if hidden is None else [hidden.contiguous()]
        # What the loss loses with each row's log-sum-exp, but for what a block itself gives.
        rest = grad_lse - (grad * out.to(lse.dtype)).sum(-1)
        grad_query = torch.zeros_like(query, dtype=lse.dtype)
        sums = [torch.zeros_like(t, dtype=lse.dtype) for t in keys[:2]]
        for step in range(ring.ranks):
            source = (ring.rank - step) % ring.ranks
            coming = plan.keys[(source - 1) % ring.ranks]
            wait = ring.pass_on(keys, coming) if step + 1 < ring.ranks else None
            for rows, columns, attend in plan.blocks(source):
                part = _columns(keys, columns)
                with torch.enable_grad(), intercepted_by(None):  # perhaps inside `context_parallel`
                    leaves = [t.detach().requires_grad_() for t in (query[:, :, rows], *part[:2])]
                    block_out, block_lse = attend(leaves[0], [*leaves[1:], *part[2:]])
                some = grad[:, :, rows]
                weight = (block_lse.detach() - lse[:, :, rows]).exp().nan_to_num(0.0)
                own = (some * block_out.detach().to(lse.dtype)).sum(-1)
                given = (
                    (weight.unsqueeze(-1) * some).to(query.dtype),
                    weight * (own + rest[:, :, rows]),
                )
                found = torch.autograd.grad((block_out, block_lse), leaves, given)
                grad_query[:, :, rows] += found[0]
                for total, each in zip(sums, found[1:], strict=True):
                    total[:, :, columns] += each
            # The gradients travel behind their keys, and once more to come home.
            back = ring.pass_on(sums, coming)
            if wait is not None:
                keys = wait()
            sums = back()
        return (
            grad_query.to(query.dtype), sums[0].to(key.dtype), sums[1].to(value.dtype), None, None
        )  # fmt: skip


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Group = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    zigzag: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
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
        dropout_p: as of the op; which scores are dropped is as in the call on one rank.
        is_causal: each token sees those before it in the whole sequence. Parts are then those of
            ``shard_sequence(..., zigzag=True)``, of queries and keys alike.
        zigzag: whether parts are such without that, too; for dropout, which knows places.
        scale: as of the op.
        key_padding_mask: bool (batch, this rank's keys), True = ignore; on every rank or on none.
        return_lse: also return the log-sum-exps over all keys.
        seed: int64 (1,), of dropout; by default the first rank's generator draws it. That of the
            first rank counts.

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
    lengths = query.shape[2], key.shape[2]
    if is_causal and (lengths[0] != lengths[1] or lengths[0] % 2):
        raise ValueError(
            "causal parts are those of shard_sequence(..., zigzag=True), as long for queries as "
            f"for keys, got {lengths[0]} and {lengths[1]}"
        )
    if zigzag and any(length % 2 for length in lengths):
        raise ValueError(f"zigzag parts have even lengths, got {lengths[0]} and {lengths[1]}")
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be bool, got {key_padding_mask.dtype}")
        if key_padding_mask.shape != (key.shape[0], key.shape[2]):
            raise ValueError(
                f"key_padding_mask must be {(key.shape[0], key.shape[2])}, got "
                f"{tuple(key_padding_mask.shape)}"
            )
    dropout = _shared_dropout(dropout_p, seed, query.device, group)
    plan = _Plan(group, *lengths, is_causal, is_causal or zigzag, scale, dropout)
    results = _RingAttention.apply(query, key, value, key_padding_mask, plan)
    return results if return_lse else results[0]


def ring_varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    group: Group = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Any:
    """`varlen_attention` of packed sequences of which every rank holds a part.

    Parts are tokens in a row, in the order of the ranks; a sequence may begin on one rank and end
    on another. Keys and values go round the ring as in :func:`ring_attention`, with no regard to
    which sequences they are of.

    Args:
        query: (this rank's queries, heads, head_dim).
        key, value: (this rank's keys, heads, head_dim); ranks may have more or fewer of either.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as of the op, of the whole, the same
            on every rank.
        group: of ranks, all of them by default.
        dropout_p, seed: as in :func:`ring_attention`.
        is_causal: query i of a sequence sees its keys 0..i. Parts of queries and keys are then of
            the same tokens; later ranks have more to do.
        scale: as of the op.
        return_lse: also return the log-sum-exps over all keys.

    Returns:
        (this rank's queries, heads, value_dim); with ``return_lse`` and (this rank's queries,
        heads). Both are differentiable once.

    Raises:
        TypeError, ValueError: as of the op, and tensors that are not as above.
    """
    given = {"query": query, "key": key, "value": value}
    for name, tensor in given.items():
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be (tokens, heads, head_dim), got {tuple(tensor.shape)}")
    tokens = query.shape[0], key.shape[0]
    if is_causal and tokens[0] != tokens[1]:
        raise ValueError(f"causal parts are of the same tokens, got {tokens[0]} and {tokens[1]}")
    starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    dropout = _shared_dropout(dropout_p, seed, query.device, group)
    plan = _PackedPlan(group, tokens, starts, longest, is_causal, scale, dropout)
    heads_first = (tensor.transpose(0, 1)[None] for tensor in given.values())
    out, lse = _RingAttention.apply(*heads_first, None, plan)
    out, lse = out[0].transpose(0, 1), lse[0].transpose(0, 1)
    return (out, lse) if return_lse else out
