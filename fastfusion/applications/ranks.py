"""Several processes at one training: each computes some of the parts of every batch."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Ranks:
    """This process among those of a training.

    A batch consists of parts with random numbers of their own, of which a rank computes every n-th.
    So the steps of a training do not depend on how many ranks there are, but for the order in which
    the gradients of parts are added.

    Attributes:
        rank, count: number of this process, and how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def own(self, parts: int) -> range:
        """Which parts of a batch are this rank's."""
        return range(self.rank, parts, self.count)

    def together(self, module: nn.Module) -> Any:
        """A module whose backward averages gradients over the ranks."""
        if self.count == 1:
            return module
        # A stage may train some of a model's parameters: a batch shows which.
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)

    def alone(self, module: Any) -> AbstractContextManager[None]:
        """Gradients of `together` stay on their rank meanwhile, and are averaged later."""
        found: AbstractContextManager[None]
        found = nullcontext() if self.count == 1 else module.no_sync()
        return found

    def sum(self, *values: float) -> list[float]:
        """Of every rank's numbers."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.count > 1:
            dist.all_reduce(total)
        found: list[float] = total.tolist()
        return found


ONE = Ranks()


@contextmanager
def joined(timeout: float) -> Iterator[Ranks]:
    """The processes that torchrun has started together.

    Args:
        timeout: seconds in which every rank has to reach what all do together.

    Raises:
        ValueError: torchrun has not started this one.
        ConnectionError: another one is gone, or has not come in time.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ValueError(
            "--distributed is for processes that torchrun starts: torchrun --nproc-per-node 2 -m "
            "fastfusion train ..."
        )
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    try:
        yield ranks
        dist.barrier()
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        raise ConnectionError(
            f"process {ranks.rank} of {ranks.count} waits in vain: another one is gone, or did not "
            f"come within {timeout:g} s; --resume goes on from the last epoch ({error})"
        ) from error
    finally:
        dist.destroy_process_group()
