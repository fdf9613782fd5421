"""Modules that run unchanged while their sequences lie on several ranks in parts."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from fastfusion import ops
from fastfusion.core import float8, philox
from fastfusion.core.op import Op, intercepted_by
from fastfusion.core.score_policy import has_rare_kinds
from fastfusion.distributed.ring import pieces, ring_attention, shared_seed
from fastfusion.distributed.sequences import Group, Pair, merge_ranks, shard_sequence


@contextmanager
def context_parallel(
    mesh: Any = None, *, lengths: Iterable[int] | None = None, zigzag: bool = False
) -> Iterator[None]:
    """Run modules and ops on sequences of which every rank holds a part::

        own = ff.distributed.shard_sequence(image, 1)  # (batch, tokens / n, width)
        with ff.distributed.context_parallel(mesh, lengths=[image.shape[1]]):
            out = model(own, words)  # of this rank's tokens; words are on every rank

    Layers that work on each token alone do so on a rank's own. A call of attention is made together
    with the other ranks, in the way that its shape asks for, which `explain` tells:

    - queries and keys in parts: keys and values go round a ring (:func:`ring_attention`); but if
      all queries are no more than a rank's keys, they are gathered, each rank attends to its own
      keys, and one sum merges the results; if all keys are no more than a rank's queries, the keys
      are gathered;
    - keys in parts and queries on every rank: one sum, and no key moves;
    - queries in parts and keys on every rank: nothing is exchanged.

    Attention in both directions likewise, with two rings where both sides are in parts and long.

    Gradients are those of the sum of the losses of all ranks, each rank's of what it has: a
    parameter's is to be summed over them, or averaged, as DistributedDataParallel does, where the
    loss is the mean of the ranks'. So a loss of tokens is a rank's own, and one of a sequence that
    is on every rank is the same on each.

    `lengths` tells parts from sequences that are on every rank, so that one of these may not be as
    long as a part is. Parts are as long on every rank.

    Dropout of weights drops the scores that it drops on one rank whose generator is the first's;
    other dropout draws from a rank's own generator, so seed them differently.

    `torch.distributed.tensor.experimental.context_parallel` shards its buffers as zigzag parts. It
    may be entered around this for them; its own attention is left to it.

    Args:
        mesh: a DeviceMesh of one dimension, or a process group; by default all ranks.
        lengths: of whole sequences that are in parts; None: all are.
        zigzag: parts are those of ``shard_sequence(..., zigzag=True)``, which causal attention asks
            for.

    Raises:
        ValueError: a length that the ranks do not divide, a mesh of several dimensions; from the
            call of an attention: attention weights (``need_weights``, `attention_maps`), windows,
            ALiBi, segments, prefixes, sinks, position tables, packed sequences; a causal one on
            parts that are not zigzag; masks where both sides are in parts; dropout in both
            directions where both sides are in parts and long, or parts are zigzag.
    """
    group: Group = mesh
    if hasattr(mesh, "get_group"):
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, got the shape {tuple(mesh.shape)}")
        group = mesh.get_group()
    ranks = dist.get_world_size(group)
    parts = None
    if lengths is not None:
        given = tuple(lengths)
        if any(length % ranks for length in given):
            raise ValueError(f"lengths must be multiples of the {ranks} ranks, got {given}")
        parts = frozenset(length // ranks for length in given)
    with intercepted_by(_Parts(group, ranks, parts, zigzag)):
        yield


LOCAL, NOTHING, SUM, GATHER_QUERIES, GATHER_KEYS, RING = (
    "every rank has all of it, and computes it",
    "queries in parts, keys on every rank: nothing is exchanged",
    "keys in parts, queries on every rank: one sum over {n} ranks",
    "both in parts, few queries: gathered, and one sum over {n} ranks",
    "both in parts, few keys: gathered from {n} ranks",
    "both in parts: a ring of {n} ranks",
)
BOTH_WAYS = {
    NOTHING: "one side in parts, the other on every rank: one sum over {n} ranks",
    SUM: "one side in parts, the other on every rank: one sum over {n} ranks",
    GATHER_KEYS: "both in parts, few keys: gathered, and one sum over {n} ranks",
    RING: "both in parts: two rings of {n} ranks",
}


class _Parts:
    """Runs attention together with other ranks."""

    ops = frozenset(op.name for op in ops.ALL) - {"linear", "norm"}

    def __init__(
        self, group: Group, ranks: int, parts: frozenset[int] | None, zigzag: bool
    ) -> None:
        self.group, self.ranks, self.parts, self.zigzag = group, ranks, parts, zigzag
        self.rank = dist.get_rank(group)

    def describe(self, call: Any) -> str:
        if not hasattr(call, "alibi_slopes") or call.query.dim() != 4:
            return "not for sequences in parts"
        way = self._way(call.query.shape[2], call.key.shape[2])
        if hasattr(call, "query_value"):
            way = BOTH_WAYS.get(way, way)
        return way.format(n=self.ranks)

    def run(self, op: Op, call: Any, lse: bool) -> Any:
        if op is not ops.ATTENTION[0] and op is not ops.ATTENTION[1]:
            raise ValueError(f"{op.name} does not go with sequences in parts")
        way = self._way(call.query.shape[2], call.key.shape[2])
        if way == LOCAL:
            with intercepted_by(None):
                return op.run(None, call, lse)
        both = op is ops.ATTENTION[1]
        self._check(call, way, both)
        if call.seed is not None:
            call = call._replace(seed=shared_seed(call.seed, self.group))
        results = self._both(op, call, way) if both else self._one(op, call, way)
        count = len(results) // 2
        if lse:
            return results
        return results[:count] if both else results[0]

    def _way(self, q_len: int, k_len: int) -> str:
        queries, keys = (self.parts is None or n in self.parts for n in (q_len, k_len))
        if not keys:
            return NOTHING if queries else LOCAL
        if not queries:
            return SUM
        if self.ranks * q_len <= k_len:
            return GATHER_QUERIES
        return GATHER_KEYS if self.ranks * k_len <= q_len else RING

    def _check(self, call: Any, way: str, both: bool) -> None:
        """Arguments that mean something else on a part."""
        of_places = (call.window_left, call.window_right, call.alibi_slopes)
        refused = {
            "dropout_p": call.dropout_p > 0.0 and both and (way == RING or self.zigzag),
            "window and alibi_slopes": any(value is not None for value in of_places),
            "segment ids, prefix_len, sinks and position tables": has_rare_kinds(call),
            "softcap": call.softcap is not None and way == RING,
            "keys of 8 bits": float8.has(call.key),
            "attn_mask": call.attn_mask is not None
            and (way not in (NOTHING, SUM) or (call.seed is not None and self.zigzag)),
            "is_causal": call.is_causal
            and (both or way != RING or call.bottom_right or not self.zigzag),
            "fewer heads of keys": call.query.shape[1] != call.key.shape[1],
        }
        found = ", ".join(name for name, is_so in refused.items() if is_so)
        if found:
            raise ValueError(
                f"{found}: not for sequences in parts; queries {tuple(call.query.shape)}, keys "
                f"{tuple(call.key.shape)} ({way.format(n=self.ranks)})"
            )

    def _one(self, op: Op, call: Any, way: str) -> Pair:
        query, key, value, hidden = call.query, call.key, call.value, call.key_padding_mask
        if way == RING:
            found: Pair = ring_attention(
                query, key, value, group=self.group, dropout_p=call.dropout_p,
                is_causal=call.is_causal, zigzag=self.zigzag, scale=call.scale,
                key_padding_mask=hidden, return_lse=True, seed=call.seed,
            )  # fmt: skip
            return found
        if way == GATHER_KEYS:
            key, value = self._whole(key), self._whole(value)
            hidden = None if hidden is None else self._whole(hidden, 1)
        elif way == GATHER_QUERIES:
            query = self._whole(query)
        summed = way in (SUM, GATHER_QUERIES)
        blocks = []
        for first_query, rows in self._pieces(query, call, not summed):
            for first_key, columns in self._pieces(key, call, summed):
                block = call._replace(
                    query=query[:, :, rows], key=key[:, :, columns], value=value[:, :, columns],
                    key_padding_mask=None if hidden is None else hidden[:, columns],
                    seed=self._placed(call, first_query, first_key),
                )  # fmt: skip
                with intercepted_by(None):
                    blocks.append(op.run(None, block, True))
        if summed:
            out, lse = merge_ranks(blocks, self.group, own_losses=True)
        else:
            out, lse = (torch.cat(each, 2) for each in zip(*blocks, strict=True))
        if way == GATHER_QUERIES:
            out, lse = self._own(out), self._own(lse)
        return out, lse

    def _pieces(self, tensor: Tensor, call: Any, is_part: bool) -> list[tuple[int, slice]]:
        """Where rows are in the whole, as far as dropout has to know it."""
        length = tensor.shape[2]
        if call.seed is None or not is_part:
            return [(0, slice(0, length))]
        return pieces(self.rank, [length] * self.ranks, self.zigzag)

    def _placed(self, call: Any, first_query: int, first_key: int) -> Tensor | None:
        if call.seed is None:
            return None
        return philox.placed(call.seed, first_query, first_key, 0, call.query.shape[1])

    def _both(self, op: Op, call: Any, way: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if way == RING:
            shared: dict[str, Any] = {
                "group": self.group, "scale": call.scale, "return_lse": True
            }  # fmt: skip
            out_q, lse_q = ring_attention(
                call.query, call.key, call.value, key_padding_mask=call.key_padding_mask, **shared
            )
            out_k, lse_k = ring_attention(
                call.key, call.query, call.query_value,
                key_padding_mask=call.query_padding_mask, **shared,
            )  # fmt: skip
            return out_q, out_k, lse_q, lse_k
        gathered: dict[str, tuple[str, ...]] = {
            GATHER_QUERIES: ("query", "query_value", "query_padding_mask"),
            GATHER_KEYS: ("key", "value", "key_padding_mask"),
        }
        whole = {
            name: self._whole(tensor, 1 if tensor.dtype == torch.bool else 2)
            for name in gathered.get(way, ())
            if (tensor := getattr(call, name)) is not None
        }
        summed = way in (SUM, GATHER_QUERIES)  # the queries' side, which every rank has
        parts = call.key.shape[2] if summed else call.query.shape[2]
        first = self.rank * parts
        seed = self._placed(call, 0, first) if summed else self._placed(call, first, 0)
        with intercepted_by(None):
            out_q, out_k, lse_q, lse_k = op.run(None, call._replace(**whole, seed=seed), True)
        merged = (out_q, lse_q) if summed else (out_k, lse_k)
        merged = merge_ranks([merged], self.group, own_losses=True)
        out, lse = map(self._own, merged) if whole else merged
        return (out, out_k, lse, lse_k) if summed else (out_q, out, lse_q, lse)

    def _whole(self, tensor: Tensor, dim: int = 2) -> Tensor:
        """All parts, in the order of the sequence."""
        found: Tensor = _Gather.apply(tensor, dim, self.group)
        if not self.zigzag:
            return found
        halves = found.chunk(2 * self.ranks, dim)
        return torch.cat([*halves[::2], *halves[::-2]], dim)

    def _own(self, tensor: Tensor) -> Tensor:
        """This rank's rows of (batch, heads, length, ...)."""
        return shard_sequence(tensor, 2, self.group, self.zigzag)


class _Gather(Function):
    """Parts behind one another, on every rank, each of which may have a loss of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format)
                 for _ in range(dist.get_world_size(group))]  # fmt: skip
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        ranks, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        return total.chunk(ranks, ctx.dim)[rank], None, None
