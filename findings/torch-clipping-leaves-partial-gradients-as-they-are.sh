#!/usr/bin/env bash
# torch 2.11.0: torch.nn.utils.clip_grad_norm_ does not clip gradients that are DTensors with the placement Partial, as
# those of a norm are under torch's own SequenceParallel, where each rank has seen a part of the tokens. It returns the
# right norm, multiplies nothing, and says nothing: such parameters take steps as large as before, beside others that
# are clipped. torch 2.13.0 and 2.14.1 clip them.
# Seen: a LayerNorm on two ranks, whose gradients have the norm of the same LayerNorm's on one, before and after.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.11.0 numpy==2.3.5
cat >"$folder/ranks.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module


def norm_of(parameters):
    whole = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in parameters]
    return round(torch.cat(whole).norm().item(), 3)


def work(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    tokens = torch.arange(24.0).sin().reshape(1, 6, 4)
    lines = []
    for ranks in (1, 2):
        norm = torch.nn.LayerNorm(4)
        own = tokens
        if ranks == 2:
            mesh = init_device_mesh("cpu", (2,))
            norm = parallelize_module(norm, mesh, SequenceParallel())
            own = tokens.chunk(2, dim=1)[rank]
        out = norm(own)
        (getattr(out, "to_local", lambda: out)() * own).sum().backward()
        parameters = list(norm.parameters())
        before = norm_of(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        lines.append(f"{ranks} rank(s): {before} before, {norm_of(parameters)} after")
    if rank == 0:
        print(*lines, sep="\n", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), 2)
PYTHON
seen=$("$folder/env/bin/python" "$folder/ranks.py" "$folder/store" 2>/dev/null)
echo "$seen"
norm=$(sed -n 's/^1 rank(s): \([0-9.]*\) before, 1.0 after$/\1/p' <<<"$seen")
test -n "$norm"
test "$(tail -n 1 <<<"$seen")" = "2 rank(s): $norm before, $norm after"
