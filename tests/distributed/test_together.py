"""FSDP2 with replicas, activation checkpointing and torch.compile at once, against one process."""

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from accuracy import assert_accurate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastfusion as ff

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
WIDTH, VISUAL, WORDS, CLASSES, STEPS = 16, 6, 4, 5, 20


class Model(ff.models.VQATransformer):
    """With a bias of words and regions that is learnt."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, 2, 24, 1, CLASSES, dropout=0.1)
        self.bias = nn.Parameter(0.1 * torch.randn(1, 2, VISUAL, WORDS))

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        encoded = [
            checkpoint(encode, x, use_reentrant=False)
            for encode, x in ((self.visual_encoder, visual), (self.text_encoder, text))
        ]
        visual, text = checkpoint(self.fusion, *encoded, attn_mask=self.bias, use_reentrant=False)
        return self.output(torch.cat([visual.mean(1), text.mean(1)], -1))


def parts(dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Those of a batch, one for each rank."""
    draw = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(2, VISUAL, WIDTH, generator=draw).to(dtype),
            torch.randn(2, WORDS, WIDTH, generator=draw).to(dtype),
            torch.randint(CLASSES, (2,), generator=draw),
        )
        for _ in range(4)
    ]


def loss_of(model: Any, number: int, part: int, batch: tuple[Tensor, ...]) -> Tensor:
    torch.manual_seed(100 * number + part)  # dropout is the part's own
    return nn.functional.cross_entropy(model(*batch[:2]), batch[2])


def alone(dtype: torch.dtype) -> Tensor:
    """The losses of one process, which computes the parts in turn."""
    torch.manual_seed(0)
    model = Model().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    batch = parts(dtype)
    for number in range(STEPS):
        optimizer.zero_grad()
        loss = torch.stack([loss_of(model, number, i, p) for i, p in enumerate(batch)]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def share(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model: Any = Model()
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    model.fusion.compile(backend="aot_eager")
    for part in (model.visual_encoder, model.text_encoder, model.fusion):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    batch = parts(torch.float32)
    for number in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, number, rank, batch[rank])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    total = torch.stack(losses)
    dist.all_reduce(total)
    if rank == 0:
        torch.save(total / world, folder / "losses.pt")


def test_losses_are_those_of_one_process(tmp_path: Path) -> None:
    ranks.run(4, [share], tmp_path, tmp_path)
    found = torch.load(tmp_path / "losses.pt")
    exact = alone(torch.float64)
    with ff.use_backend("reference"):
        plain = alone(torch.float32)
    assert_accurate(found[None], exact[None], plain[None])
    torch.testing.assert_close(plain, exact.float())  # the same numbers are dropped
    assert exact[-1] < 0.5 * exact[0], "it learns"
