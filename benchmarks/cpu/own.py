"""A user's own modules against each other: ``bench --model MODULE:FACTORY --against ...``.

A factory takes nothing and returns an `nn.Module`. Both are made from the same seed; where their
parameters have the same names, the second gets the weights of the first.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.ops import Call
from .layers import compare_modules
from .results import Row
from .settings import Settings


def parts(name: str) -> tuple[str, str]:
    """The module and the function of MODULE:FACTORY.

    Raises:
        ValueError: it is not written like that.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"{name!r} is not MODULE:FACTORY")
    return module, function


def factory(name: str) -> Any:
    """The function that MODULE:FACTORY names; the current folder is searched first.

    Raises:
        ValueError: there is no such module or function.
    """
    module, function = parts(name)
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: {error}") from None


def sizes(text: str) -> list[tuple[int, ...]]:
    """The sizes of each input: "2x20x768,2x36x768".

    Raises:
        ValueError: it is not written like that.
    """
    try:
        found = [tuple(int(n) for n in part.split("x")) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or any(n < 1 for size in found for n in size):
        raise ValueError(f"--inputs must look like 2x20x768,2x36x768, got {text!r}")
    return found


def build(name: str) -> nn.Module:
    """What a factory makes, in eval mode.

    Raises:
        ValueError: it makes something else.
    """
    torch.manual_seed(0)
    module = factory(name)()
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} returned {type(module).__name__}, not a module")
    return module.eval()


def forward(module: nn.Module, inputs: list[Tensor]) -> Call:
    """The module's results as a call without arguments."""
    return lambda: module(*inputs)


def run(ours: str, other: str, inputs: str, settings: Settings) -> Row:
    """Checks that two modules agree, and times them.

    Raises:
        ValueError: a name, the sizes or a factory make no sense.
    """
    first, second = build(ours), build(other)
    if first.state_dict().keys() == second.state_dict().keys():
        second.load_state_dict(first.state_dict())
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in sizes(inputs)]
    row = Row("own", {"name": ours, "against": other, "inputs": inputs}, settings.dtype_name,
              settings.backward, cold=settings.cold)  # fmt: skip
    tensors = [t.to(settings.dtype) for t in tensors]
    if settings.weights is not None and isinstance(first, nn.Linear):
        raise ValueError(f"{ours} returned a torch.nn.Linear, which is not quantised in place")
    compare_modules(row, second.to(settings.dtype), first.to(settings.dtype), tensors, forward,
                    settings, name=other)  # fmt: skip
    return row
