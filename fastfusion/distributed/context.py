"""Modules that run unchanged while their sequences lie on several ranks in parts."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from fastfusion import ops
from fastfusion.core.op import Op, taken_by
from fastfusion.distributed.sequences import Group, merge_ranks, ring_attention


@contextmanager
def context_parallel(mesh: Any = None, *, lengths: Iterable[int] | None = None) -> Iterator[None]:
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
    long as a part is. Parts are as long on every rank. In causal attention they are those of
    ``shard_sequence(..., zigzag=True)``, which is how
    `torch.distributed.tensor.experimental.context_parallel` shards its buffers, too: that may be
    entered around this for them, its own attention is left to it.

    Args:
        mesh: a DeviceMesh of one dimension, or a process group; by default all ranks.
        lengths: of whole sequences that are in parts; None: all are.

    Raises:
        ValueError: a length that the ranks do not divide, a mesh of several dimensions; from the
            call of an attention: attention weights (``need_weights``, `attention_maps`), dropout of
            weights, windows, ALiBi, packed sequences and, where both sides are in parts or it is
            causal in another way, masks.
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
    with taken_by(_Parts(group, ranks, parts)):
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

    def __init__(self, group: Group, ranks: int, parts: frozenset[int] | None) -> None:
        self.group, self.ranks, self.parts = group, ranks, parts

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
            with taken_by(None):
                return op.run(None, call, lse)
        both = op is ops.ATTENTION[1]
        self._check(call, way, both)
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
            "dropout_p": call.dropout_p > 0.0,
            "window and alibi_slopes": any(value is not None for value in of_places),
            "softcap": call.softcap is not None and way == RING,
            "attn_mask": call.attn_mask is not None and way not in (NOTHING, SUM),
            "is_causal": call.is_causal and (both or way != RING or call.bottom_right),
            "fewer heads of keys": call.query.shape[1] != call.key.shape[1],
        }
        found = ", ".join(name for name, is_so in refused.items() if is_so)
        if found:
            raise ValueError(
                f"{found}: not for sequences in parts; queries {tuple(call.query.shape)}, keys "
                f"{tuple(call.key.shape)} ({way.format(n=self.ranks)})"
            )

    def _one(self, op: Op, call: Any, way: str) -> tuple[Tensor, Tensor]:
        query, key, value, hidden = call.query, call.key, call.value, call.key_padding_mask
        if way == RING:
            out, lse = ring_attention(
                query, key, value, group=self.group, is_causal=call.is_causal, scale=call.scale,
                key_padding_mask=hidden, return_lse=True,
            )  # fmt: skip
            return out, lse
        if way == GATHER_KEYS:
            key, value = self._whole(key), self._whole(value)
            hidden = None if hidden is None else self._whole(hidden, 1)
        elif way == GATHER_QUERIES:
            query = self._whole(query)
        with taken_by(None):
            out, lse = op.run(
                None,
                call._replace(query=query, key=key, value=value, key_padding_mask=hidden),
                True,
            )
        if way in (SUM, GATHER_QUERIES):
            out, lse = merge_ranks(out, lse, self.group, own_losses=True)
        if way == GATHER_QUERIES:
            out, lse = self._own(out), self._own(lse)
        return out, lse

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
        with taken_by(None):
            out_q, out_k, lse_q, lse_k = op.run(None, call._replace(**whole), True)
        own: Callable[[Tensor], Tensor] = self._own if whole else lambda tensor: tensor
        # The side that every rank has attends to one that is in parts.
        if way in (SUM, GATHER_QUERIES):
            out_q, lse_q = map(own, merge_ranks(out_q, lse_q, self.group, own_losses=True))
        else:
            out_k, lse_k = map(own, merge_ranks(out_k, lse_k, self.group, own_losses=True))
        return out_q, out_k, lse_q, lse_k

    def _whole(self, tensor: Tensor, dim: int = 2) -> Tensor:
        found: Tensor = _Gather.apply(tensor, dim, self.group)
        return found

    def _own(self, tensor: Tensor) -> Tensor:
        """This rank's rows of (batch, heads, length, ...)."""
        return tensor.chunk(self.ranks, 2)[dist.get_rank(self.group)]


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
