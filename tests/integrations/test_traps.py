"""What goes wrong elsewhere without a word, where no other test of the integrations shows it."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from suite import DEVICE, needs_native
from torch import Tensor, nn

import fastfusion as ff
from fastfusion import ops

LAYERS = {
    "linear": {"length": 5, "width": 16, "features": 12},
    "norm": {"length": 5, "width": 16},
    "encoder_layer": {"length": 5, "dim": 16, "heads": 2, "ffn": 24},
    "decoder_layer": {"length": 5, "dim": 16, "heads": 2, "ffn": 24, "memory": 7},
}


def tensors_of(call: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in call.values():
        if isinstance(value, tuple):
            found += tensors_of(dict(enumerate(value)))  # type: ignore[arg-type]
        elif isinstance(value, Tensor) and value.is_floating_point():
            found.append(value)
    return found


@needs_native
@pytest.mark.parametrize("name", LAYERS)
def test_a_kernel_without_a_derivative_is_not_taken(name: str) -> None:
    """An op in C++ that autograd does not know returns what requires a gradient and never gets one.
    Where one is wanted the formula runs, and who insists on the kernel is refused."""
    (op,) = (op for op in ops.ALL if op.name == name)
    call = op.inputs(LAYERS[name], torch.float32, "cpu", 0)
    for tensor in tensors_of(call):
        tensor.requires_grad_()
    (public,) = (function for function, spec in ops.FUNCTIONS.items() if spec is op)
    with pytest.raises(ff.BackendUnavailableError, match="gradient"):
        public(**call, backend="cpu")
    public(**call).sum().backward()
    assert all(tensor.grad is not None for tensor in tensors_of(call))
    with torch.no_grad():
        assert not public(**call, backend="cpu").requires_grad


@pytest.mark.parametrize("name", LAYERS)
def test_transforms_of_torch_func(name: str) -> None:
    """Under which an op with `register_autograd` raises."""
    (op,) = (op for op in ops.ALL if op.name == name)
    (public,) = (function for function, spec in ops.FUNCTIONS.items() if spec is op)
    call = op.inputs(LAYERS[name], torch.float32, DEVICE, 0)

    def loss(x: Tensor) -> Tensor:
        result: Tensor = public(**{**call, "input": x}).square().sum()
        return result

    x = call["input"].clone().requires_grad_()
    loss(x).backward()
    torch.testing.assert_close(torch.func.grad(loss)(call["input"]), x.grad)


@torch.no_grad()
def test_rows_without_a_key() -> None:
    """torch's attention with weights gives NaN there, ours what the output's bias is."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x, hidden = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [True] * 5])
    stock, _ = model(x, x, x, key_padding_mask=hidden)
    assert stock[1].isnan().all()
    model = ff.accelerate(model)
    for need_weights in (True, False):
        out, _ = model(x, x, x, key_padding_mask=hidden, need_weights=need_weights)
        torch.testing.assert_close(out[0], stock[0])
        torch.testing.assert_close(out[1], model.out_proj.bias.expand(5, 16))


def test_nothing_installs_torchvision() -> None:
    """PyPI's dies on import beside torch for CPUs, and with it timm and what transformers finds."""
    groups = tomllib.loads(Path(ROOT, "pyproject.toml").read_text())["dependency-groups"]
    names = {
        group: {str(entry).partition("==")[0].lower() for entry in entries}
        for group, entries in groups.items()
    }
    asking = {"timm", "xformers", "open-clip-torch", "torchvision", "ultralytics"}
    alone = "integrations-without-dependencies"
    assert {"timm", "xformers"} <= names[alone]
    for group, found in names.items():
        assert group == alone or not found & asking, group
