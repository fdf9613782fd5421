"""ff.nn under DistributedDataParallel and FSDP2: two gloo processes, gradients as in one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastfusion as ff

WIDTH, HEADS, WORLD = 8, 2, 2
# gloo and sockets only; without torch.distributed there is nothing to test.
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


class Model(torch.nn.Module):
    """Every module of ff.nn that has parameters of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"dim_feedforward": 12, "dropout": 0.0, "batch_first": True}
        self.transformer = ff.nn.Transformer(
            WIDTH, HEADS, num_encoder_layers=1, num_decoder_layers=1, **options
        )
        self.fusion = ff.nn.CrossModalAttention(
            WIDTH, WIDTH, HEADS, dim_feedforward=12, dropout=0.0
        )
        self.cross = ff.nn.CrossAttention(WIDTH, WIDTH, HEADS)
        self.pool = ff.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, kdim=WIDTH // 2)

    def forward(self, image: torch.Tensor, text: torch.Tensor, padding: torch.Tensor) -> Any:
        text = self.transformer(image, text, memory_key_padding_mask=padding)
        image, text = self.fusion(image, text, padding)
        image = self.cross(image, text)
        pooled, weights = self.pool(text, image[..., : WIDTH // 2], image)
        return pooled.square().mean() + weights.square().mean()


def batch() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2 * WORLD, 5, WIDTH, generator=generator)
    text = torch.randn(2 * WORLD, 3, WIDTH, generator=generator)
    return image, text, torch.arange(5).expand(2 * WORLD, 5) >= 4


def gradients(rank: int, world: int, how: str, store: str) -> None:
    """One process: the gradients of its half, averaged by torch.distributed, for `store`."""
    model: Any = Model()
    if how == "ddp":
        model = DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (WORLD,))
        for module in (model.transformer, model.fusion, model.pool):
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model.pool, ff.nn.MultiheadAttention)
    half = slice(2 * rank, 2 * rank + 2)
    model(*(t[half] for t in batch())).backward()
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        full = grad.full_tensor() if how == "fsdp2" else grad
        grads[name.removeprefix("module.")] = full
    if rank == 0:
        torch.save(grads, store)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_gradients(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model()
    single = copy.deepcopy(model)
    halves = [slice(0, 2), slice(2, 4)]
    sum(single(*(t[half] for t in batch())) / WORLD for half in halves).backward()  # type: ignore[union-attr]
    store = str(tmp_path / "gradients.pt")
    ranks.run(WORLD, [gradients], tmp_path, how, store)
    actual = torch.load(store)
    expected = {name: p.grad for name, p in single.named_parameters()}
    torch.testing.assert_close(actual, expected)
