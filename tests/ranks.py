"""Functions that run on several gloo ranks, each a process of its own."""

import os
from collections.abc import Callable, Sequence
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Check = Callable[..., None]

# Ranks are forks of one process that has imported these and started no thread: 4 s less for each.
set_forkserver_preload(["fastfusion.distributed.tensor_parallel", "fastfusion.models"])


def run(world: int, checks: Sequence[Check], folder: Path, *arguments: Any) -> None:
    """Run functions of a test's module on so many ranks, one after the other, with the rank, the
    number of ranks and more arguments; a failure of one is the caller's."""
    given = (world, checks, str(folder / f"store{world}"), arguments)
    mp.start_processes(_begin, given, nprocs=world, start_method="forkserver")


def _begin(
    rank: int, world: int, checks: Sequence[Check], store: str, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        for check in checks:
            torch.manual_seed(0)  # the same tensors everywhere
            check(rank, world, *arguments)
            dist.barrier()
    finally:
        dist.destroy_process_group()
    # Not by way of Python's shutdown: a process was seen to abort there, once in some 100 runs
    # ("terminate called without an active exception", as when a thread is ended inside C++).
    os._exit(0)
