"""A model on example inputs: its outputs, its time, and how far two outputs are apart."""

import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion.quantization import arguments_of

# Of the largest output. Layers in one dtype differ in the order of their sums, many roundings of it
# at worst, by which a wrong formula is not hidden; narrower weights by what they are rounded to.
_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_BOUNDS_OF_WEIGHTS = {"bf16": 5e-2, "int8": 2e-1}
_CALLS, _SECONDS = 7, 0.6  # of a timing, whichever ends first, but three calls


class Example:
    """A model and the inputs that it is compared on: in eval mode, without gradients, from the same
    random state every time."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model = model
        self.args, self.kwargs = arguments_of(example_inputs)
        self.devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """For one call, which may write into them."""
        try:
            return copy.deepcopy((self.args, self.kwargs))
        except RuntimeError:  # tensors inside a graph
            return self.args, self.kwargs

    def outputs(self) -> list[Tensor]:
        """All tensors that the model returns.

        Raises:
            TypeError: it returns none.
        """
        found = [*tensors_of(self._call()[0])]
        if not found:
            raise TypeError("example_inputs: the model returns no tensors that could be compared")
        padding = self._padding()
        return found if padding is None else [_without(padding, tensor) for tensor in found]

    def _padding(self) -> Tensor | None:
        """Positions (batch, length) of padding, True = hidden, as transformers' models are told.

        What they return there is whatever comes, and with narrower weights further off than any
        token. Decoders have a length of their own.
        """
        mask = self.kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point():
            return None
        return None if any(name.startswith("decoder_") for name in self.kwargs) else mask == 0

    def milliseconds(self) -> float:
        """The median of some calls."""
        times = [self._call()[1]]
        while len(times) < 3 or (len(times) < _CALLS and sum(times) < _SECONDS):
            times.append(self._call()[1])
        return 1e3 * median(times)

    def _call(self) -> tuple[Any, float]:
        args, kwargs = self.arguments()
        with self.quietly():
            start = time.perf_counter()
            result = self.model(*args, **kwargs)
            for device in self.devices:
                torch.cuda.synchronize(device)
            return result, time.perf_counter() - start

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Leave no trace: modes, buffers and the random state are as before."""
        modes = {module: module.training for module in self.model.modules()}
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with torch.random.fork_rng(self.devices), torch.no_grad():
            torch.manual_seed(0)
            try:
                self.model.eval()
                yield
            finally:
                for module, mode in modes.items():
                    module.training = mode
                for buffer, before in buffers:
                    buffer.copy_(before)


def _without(padding: Tensor, tensor: Tensor) -> Tensor:
    if tensor.dim() < 3 or tensor.shape[:2] != padding.shape:
        return tensor
    return tensor[~padding.to(tensor.device)]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in what a model returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_of(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from tensors_of(getattr(value, entry.name))


def deviation(before: list[Tensor], now: list[Tensor]) -> float:
    """The largest difference; infinite where the outputs are of another form, or where only those
    now are NaN. Where only those before are (softmax over no key), there is none."""
    if len(before) != len(now):
        return math.inf
    largest = 0.0
    for a, b in zip(before, now, strict=True):
        if a.shape != b.shape or a.is_nested != b.is_nested:
            return math.inf
        if a.is_nested:
            a, b = a.values(), b.values()
        if not (a.is_floating_point() or a.is_complex()):
            if not torch.equal(a, b):
                return math.inf
            continue
        a, b = a.double(), b.double()
        difference = torch.where(a.isnan() | (a == b), 0.0, (a - b).abs())
        if difference.numel():
            worst = float(difference.max())
            largest = math.inf if math.isnan(worst) else max(largest, worst)
    return largest


def largest_of(outputs: list[Tensor]) -> float:
    """The largest finite number in them."""
    values = [t.values() if t.is_nested else t for t in outputs if t.is_floating_point()]
    sizes = [v.double().abs() for v in values]
    return max(
        (float(s[s.isfinite()].max()) for s in sizes if bool(s.isfinite().any())), default=0.0
    )


def bound_for(outputs: list[Tensor], weights: str | None) -> float:
    """What outputs may differ by where nobody says."""
    shares = [_BOUNDS.get(t.dtype, 0.0) for t in outputs]
    share = max((*shares, 0.0 if weights is None else _BOUNDS_OF_WEIGHTS[weights]))
    return share * largest_of(outputs)
