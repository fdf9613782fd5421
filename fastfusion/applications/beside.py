"""Models side by side: one of another library as it comes and accelerated, one of an application
beside its twin of stock torch.nn and its copies with narrower weights."""

import copy
import math
import platform
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from fastfusion.acceleration import accelerate
from fastfusion.applications.stock import stock_twin
from fastfusion.quantization import QuantizationReport, quantize

STOCK = "transformers (sdpa)"
WEIGHTS = {"accelerate": None, "accelerate bf16": "bf16", "accelerate int8": "int8"}


def variants(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """The model itself, and accelerated copies with its own weights and with narrower ones, which
    agree with it on the example inputs."""
    return {STOCK: model} | {
        name: accelerate(model, weights=weights, example_inputs=example_inputs, inplace=False)
        for name, weights in WEIGHTS.items()
    }


def medians(
    calls: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1
) -> dict[str, float]:
    """The median time of every call in seconds, but the first ones; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warm_up + rounds):
        for name, call in calls.items():
            start = perf_counter()
            call()
            times[name].append(perf_counter() - start)
    return {name: median(several[warm_up:]) for name, several in times.items()}


def quantized(
    model: nn.Module, weights: str, example_inputs: tuple[Any, ...]
) -> tuple[Any, QuantizationReport]:
    """A copy of a model with narrower weights, and how its layers did on a sample of its inputs."""
    narrow = copy.deepcopy(model)
    return narrow, quantize(narrow, weights, example_inputs=example_inputs)


def compare(
    model: nn.Module,
    inputs: Mapping[str, tuple[Any, ...]],
    sample: tuple[Any, ...],
    quality: Callable[[Any], float],
    *,
    title: str = "accuracy",
    rounds: int = 30,
) -> dict[str, dict[str, float]]:
    """Print a table of a model of float32 and bfloat16 and 8-bit weights beside its stock twin;
    returns the times in seconds, by the name of the inputs and then of the row.

    Args:
        inputs: to time, by a name for each: "batch 1".
        sample: inputs for the differences of outputs and the cosines of layers.
        quality: a model to a share from 0 to 1.
        title: of `quality`.
        rounds: in which the models take turns.
    """
    models: dict[str, Any] = {"stock torch.nn": stock_twin(model), "fastfusion": model}
    cosines: dict[str, float] = {}
    for weights in ("bf16", "int8"):
        name = f"fastfusion {weights}"
        models[name], report = quantized(model, weights, sample)
        cosines[name] = min(layer.cosine or 0.0 for layer in report.quantized)
    outputs = {name: each(*sample) for name, each in models.items()}
    plain = outputs["stock torch.nn"]
    times = {
        name: medians({key: partial(each, *given) for key, each in models.items()}, rounds, 5)
        for name, given in inputs.items()
    }
    print(
        f"\nthe same weights in stock torch.nn, in float32, and as bfloat16 and 8-bit integers "
        f"(ff.quantize), {torch.get_num_threads()} thread(s)"
    )
    rows = []
    for name, each in models.items():
        cells = [
            f"{1e3 * some[name]:.2f} ms {some['stock torch.nn'] / some[name]:5.2f}x"
            for some in times.values()
        ]
        difference = (outputs[name] - plain).abs().max().item()
        cells += [f"{quality(each):.2%}", f"{difference:.1e}", f"{megabytes(each):.2f}"]
        least = f">= {math.floor(1e5 * cosines[name]) / 1e5:.5f}" if name in cosines else ""
        rows.append([name, *cells, least])
    print_table(["", *inputs, title, "difference", "MB", "layers' cosine"], rows)
    print(
        "  times: medians of interleaved rounds; difference: the largest of the outputs, which "
        f"reach {plain.abs().max().item():.0f}"
    )
    return times


def megabytes(model: nn.Module) -> float:
    """What parameters and buffers take, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6


def machine() -> str:
    """Threads, processor and torch, for the head of a table."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return f"{torch.get_num_threads()} thread(s) of {processor}, torch {torch.__version__}"


def print_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Columns as wide as their widest cell, names to the left and numbers to the right."""
    table = [[*head], *([*row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for first, *others in table:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join(("", first.ljust(widths[0]), *cells)).rstrip())
