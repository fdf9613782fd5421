"""More than one device, on torch.distributed: attention over sequences in parts, modules split over
ranks.

Our ops also run on DTensors, sharded along batch, heads, or queries
(:mod:`fastfusion.distributed.sharding`), which `import torch.distributed.tensor` alone makes known.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastfusion.distributed.context import context_parallel
from fastfusion.distributed.ring import ring_attention, ring_varlen_attention
from fastfusion.distributed.sequences import (
    gather_sequence,
    shard_sequence,
    sharded_bidirectional_attention,
    sharded_keys_attention,
)

if TYPE_CHECKING:
    from fastfusion.distributed.checkpoints import checkpointable
    from fastfusion.distributed.tensor_parallel import tensor_parallel_plan

__all__ = [
    "checkpointable",
    "context_parallel",
    "gather_sequence",
    "ring_attention",
    "ring_varlen_attention",
    "shard_sequence",
    "sharded_bidirectional_attention",
    "sharded_keys_attention",
    "tensor_parallel_plan",
]

# Behind the rest of torch.distributed.tensor, whose import makes the sharding rules known: these
# import parts of torch that may be in the middle of importing that.
_LATER = {"checkpointable": "checkpoints", "tensor_parallel_plan": "tensor_parallel"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    return globals()[name]
