"""A model of another library as it comes and accelerated, side by side."""

import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from fastfusion.acceleration import accelerate

STOCK = "transformers (sdpa)"
WEIGHTS = {"accelerate": None, "accelerate bf16": "bf16", "accelerate int8": "int8"}


def variants(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """The model itself, and accelerated copies with its own weights and with narrower ones, which
    agree with it on the example inputs."""
    return {STOCK: model} | {
        name: accelerate(model, weights=weights, example_inputs=example_inputs, inplace=False)
        for name, weights in WEIGHTS.items()
    }


def medians(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median time of every call in seconds, but the first; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            start = perf_counter()
            call()
            times[name].append(perf_counter() - start)
    return {name: median(several[1:]) for name, several in times.items()}


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
