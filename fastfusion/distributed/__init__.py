"""More than one device: attention over sequences that lie on several ranks of torch.distributed.

Our ops also run on DTensors, sharded along batch, heads, or queries
(:mod:`fastfusion.distributed.sharding`), which `import torch.distributed.tensor` alone makes known.
"""

from fastfusion.distributed.checkpoints import checkpointable
from fastfusion.distributed.context_parallel import (
    gather_sequence,
    ring_attention,
    shard_sequence,
    sharded_bidirectional_attention,
    sharded_keys_attention,
)
from fastfusion.distributed.tensor_parallel import tensor_parallel_plan

__all__ = [
    "checkpointable",
    "gather_sequence",
    "ring_attention",
    "shard_sequence",
    "sharded_bidirectional_attention",
    "sharded_keys_attention",
    "tensor_parallel_plan",
]
