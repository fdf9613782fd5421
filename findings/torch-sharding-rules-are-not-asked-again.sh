#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.tensor.experimental.register_sharding hands every argument of the op to the sharding
# rule, flags and floating-point numbers included, and keeps the rule's answer under a key that has the tensors and the
# integers alone. The first call decides for all: a rule that shards the queries of attention unless it is causal is not
# asked about the causal call that follows, whose queries are then sharded as well, and every rank but the first counts
# their places from zero. The results are wrong, and nothing says so.
# Seen: a running sum over the rows of a matrix, which may be sharded by rows where the flag turns it into the identity.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/ranks.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.experimental import register_sharding


@torch.library.custom_op("demo::sums", mutates_args=())
def sums(x: torch.Tensor, along_rows: bool) -> torch.Tensor:
    return x.cumsum(0) if along_rows else x.clone()


@sums.register_fake
def _(x, along_rows):
    return torch.empty_like(x)


asked = []


@register_sharding(torch.ops.demo.sums.default)
def rule(x, along_rows):
    asked.append(along_rows)
    rows = [([Shard(0)], [Shard(0), None])]
    return [([Replicate()], [Replicate(), None])] + ([] if along_rows else rows)


def work(rank, store, order):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x = torch.ones(4, 1)
    shared = distribute_tensor(x, init_device_mesh("cpu", (2,)), [Shard(0)])
    found = []
    for flag in order:
        result = torch.ops.demo.sums(shared, flag).full_tensor().flatten().int().tolist()
        found.append(result)
    if rank == 0:
        print(f"asked {asked}: {found}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    order = [flag == "sum" for flag in sys.argv[2:]]
    mp.spawn(work, (sys.argv[1], order), 2)
PYTHON
run() { "$folder/env/bin/python" "$folder/ranks.py" "$folder/store.$#" "$@" 2>/dev/null; }
alone=$(run sum)
behind=$(run identity sum)
echo "the sum alone: $alone"
echo "behind the identity: $behind"
test "$alone" = "asked [True]: [[1, 2, 3, 4]]"
test "$behind" = "asked [False]: [[1, 1, 1, 1], [1, 2, 1, 2]]"
