"""Synthetic measurements for the tests of `make gpu`."""

from typing import Any

from fastfusion.benchmarks.common.timing import Measurement
from fastfusion.benchmarks.gpu import timing as cuda_timing
from fastfusion.benchmarks.gpu.results import Cell

PEAKS = {"bfloat16": 1e15, "float32": 5e13, "copy": 3e12}


def cell(
    name: str,
    ratios: dict[str, float],
    eager: dict[str, float] | None = None,
    suite: str = "attention",
    backward: bool = False,
    spread: float = 0.0,
    **shape: Any,
) -> Cell:
    """A cell of ours at 10 us under a graph and 20 us eagerly, with such ratios of the peers."""
    sizes = {"q_len": 20, "kv_len": 36, "value_dim": 64} | shape
    made = Cell(suite, {"name": name, **sizes}, "bfloat16", backward, "triton")
    for mode, ours, found in (("graph", 1e-5, ratios), ("eager", 2e-5, eager or ratios)):
        samples = {"fastfusion": [ours] * 3}
        for peer, ratio in found.items():
            samples[peer] = [ours * (ratio + step * spread) for step in (-1, 0, 1)]
        made.add(cuda_timing.Times({mode: Measurement(samples, dict.fromkeys(samples, 1))}, {}))
    made.flops, made.moved = 10**9, 10**7
    return made
