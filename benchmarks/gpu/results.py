"""What was measured on a CUDA device: cells, their table, their JSON."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..common.results import OURS, REFERENCE, in_words, slower
from ..common.timing import Spread, geometric_mean
from .timing import Times

# Timed beside us, but nobody's alternative: our own definition and our other backends.
OWN = (OURS, REFERENCE)
OWN_PREFIX = "ff "


def is_peer(name: str) -> bool:
    """Whether an implementation is not ours."""
    return name not in OWN and not name.startswith(OWN_PREFIX)


@dataclass
class Cell:
    """One shape in one dtype and direction.

    Attributes:
        suite: "attention", "bidirectional" or "block".
        shape: its entry in shapes.json.
        path: the backend that ran.
        times: seconds per call, by mode ("graph", "eager", "cold") and implementation.
        ratios: its time over ours, likewise; above 1 we are faster.
        samples: every single time behind them.
        loops: how many calls one time was averaged over.
        problems: why an implementation has no time: wrong, or crashed.
        refused: which peers do not take the call, and why.
        no_graph: which calls could not be captured, and why.
        flops: floating-point operations of a forward; None with a backward.
        moved: bytes that a forward must move; None with a backward.
    """

    suite: str
    shape: dict[str, Any]
    dtype: str
    backward: bool
    path: str | None = None
    times: dict[str, dict[str, Spread]] = field(default_factory=dict)
    ratios: dict[str, dict[str, Spread]] = field(default_factory=dict)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    loops: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    no_graph: dict[str, str] = field(default_factory=dict)
    flops: int | None = None
    moved: int | None = None

    @property
    def name(self) -> str:
        """The name of its shape."""
        return self.shape["name"]

    @property
    def length(self) -> int:
        """The longer of its two sequences."""
        return max(self.shape["q_len"], self.shape["kv_len"])

    def add(self, measured: Times) -> None:
        """Takes over the times of this cell."""
        self.no_graph |= measured.no_graph
        for mode, measurement in measured.modes.items():
            names = list(measurement.samples)
            self.samples[mode], self.loops[mode] = measurement.samples, measurement.loops
            self.times[mode] = {name: measurement.time(name) for name in names}
            if OURS in names:
                self.ratios[mode] = {
                    name: measurement.ratio(name, OURS) for name in names if name != OURS
                }

    def best(self, mode: str = "graph") -> tuple[str, Spread] | None:
        """The fastest peer and its time over ours; None without any."""
        return self.fastest(filter(is_peer, self.ratios.get(mode, {})), mode)

    def fastest(self, names: Iterable[str], mode: str = "graph") -> tuple[str, Spread] | None:
        """The fastest of some implementations and its time over ours; None without any."""
        found = self.ratios.get(mode, {})
        ratios = {name: found[name] for name in names if name in found}
        if not ratios:
            return None
        name = min(ratios, key=lambda name: ratios[name].median)
        return name, ratios[name]

    def ratio(self, mode: str = "graph") -> float:
        """How many times as long the fastest peer takes; infinite without any."""
        found = self.best(mode)
        return math.inf if found is None else found[1].median

    def seconds(self, mode: str = "graph") -> float | None:
        """Our time."""
        spread = self.times.get(mode, {}).get(OURS)
        return None if spread is None else spread.median

    def share(self, peaks: dict[str, float]) -> tuple[float, str] | None:
        """The share of what the device can do at best, and of what: "flops" or "bytes".

        The larger of the two shares, which is the one that limits.
        """
        seconds = self.seconds()
        if seconds is None or self.flops is None or self.moved is None:
            return None
        if self.dtype not in peaks or "copy" not in peaks:
            return None
        shares = {
            "flops": self.flops / seconds / peaks[self.dtype],
            "bytes": self.moved / seconds / peaks["copy"],
        }
        limit = max(shares, key=lambda kind: shares[kind])
        return shares[limit], limit


def order(cells: list[Cell]) -> list[Cell]:
    """Those with problems of ours, then by the hardest peer, lost ones first."""
    return sorted(cells, key=lambda cell: (OURS not in cell.problems, cell.ratio()))


def _us(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1e6 * seconds:.{1 if seconds < 1e-3 else 0}f}"


def _spread(spread: Spread | None, factor: float, digits: int) -> str:
    return "-" if spread is None else in_words(spread, factor, digits)


def _label(cell: Cell) -> str:
    best = cell.best()
    return "LOST" if best is not None and slower(best[1]) else ""


def _line(cell: Cell, names: list[str], width: int, peaks: dict[str, float]) -> str:
    graph, eager = cell.times.get("graph", {}), cell.times.get("eager", {})
    best, best_eager = cell.best(), cell.best("eager")
    share = cell.share(peaks)
    seconds = cell.seconds()
    rate = "-" if seconds is None or cell.flops is None else f"{cell.flops / seconds / 1e12:.1f}"
    columns = [
        f"{_label(cell):5}{cell.name:<{width}}",
        f"{_spread(graph.get(OURS), 1e6, 1):>22}",
        f"{_us(cell.seconds('eager')):>8}",
        f"{cell.path or '':<9}",
        f"{'-' if best is None else best[0]:<14}",
        f"{_spread(None if best is None else best[1], 1, 2):>17}",
        f"{'-' if best_eager is None else f'{best_eager[1].median:.2f}':>6}",
        f"{rate:>7}",
        f"{'-' if share is None else f'{100 * share[0]:.0f}% {share[1]}':>10}",
    ]
    for name in names:
        times = (
            (graph[name].median if name in graph else None),
            (eager[name].median if name in eager else None),
        )
        both = "-" if times == (None, None) else "/".join(map(_us, times))
        columns.append(f"{both:>{max(15, len(name))}}")
    return "  ".join(columns)


def table(cells: list[Cell], peaks: dict[str, float]) -> str:
    """The cells of one suite, dtype and direction as text, lost ones first."""
    cells = order(cells)
    names = list(
        dict.fromkeys(
            name
            for cell in cells
            for times in cell.times.values()
            for name in times
            if name != OURS
        )
    )
    width = max([len(cell.name) for cell in cells], default=5)
    head = [
        f"{'':5}{'shape':<{width}}",
        f"{'graph us':>22}",
        f"{'eager us':>8}",
        f"{'path':<9}",
        f"{'best peer':<14}",
        f"{'its graph / ours':>17}",
        f"{'eager':>6}",
        f"{'TFLOP/s':>7}",
        f"{'of peak':>10}",
        *(f"{name:>{max(15, len(name))}}" for name in names),
    ]
    lines = ["  ".join(head)]
    for cell in cells:
        lines.append(_line(cell, names, width, peaks))
        lines += [f"{'':5}  {name}: {why}" for name, why in cell.problems.items()]
        lines += [f"{'':5}  {name} under a graph: {why}" for name, why in cell.no_graph.items()]
    return "\n".join([*lines, *footer(cells, names)])


def footer(cells: list[Cell], names: list[str]) -> list[str]:
    """Geometric means, and what the peers refused."""
    lines = []
    for mode in ("graph", "eager"):
        ratios = [cell.ratio(mode) for cell in cells if math.isfinite(cell.ratio(mode))]
        if ratios:
            lines.append(
                f"     best peer, {mode}: geometric mean {geometric_mean(ratios):.2f}, "
                f"median {statistics.median(ratios):.2f}, worst {min(ratios):.2f} "
                f"over {len(ratios)} shape(s)"
            )
    for name in names:
        found = [c.ratios["graph"][name].median for c in cells if name in c.ratios.get("graph", {})]
        if found:
            lines.append(
                f"     {name}, graph: geometric mean {geometric_mean(found):.2f} "
                f"over {len(found)} shape(s), lost {sum(ratio < 1 for ratio in found)}"
            )
    refusals = Counter(pair for cell in cells for pair in cell.refused.items())
    for (name, why), count in sorted(refusals.items()):
        lines.append(f"     {name}: not for {count} shape(s): {why}")
    return lines


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, whenever this process is ended."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text + "\n")
    part.replace(path)


def write(path: Path, machine: dict[str, Any], settings: dict[str, Any], cells: list[Cell]) -> None:
    """Writes everything that was measured; tables and plots can be made from it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine, "settings": settings, "cells": list(map(asdict, cells))}
    replace_text(path, json.dumps(document, indent=1))


def read(path: Path) -> tuple[dict[str, Any], list[Cell]]:
    """The machine and the cells of a file."""
    document = json.loads(path.read_text())
    known = {item.name for item in fields(Cell)}
    cells = []
    for entry in document["cells"]:
        for kind in ("times", "ratios"):
            entry[kind] = {
                mode: {name: Spread(**spread) for name, spread in found.items()}
                for mode, found in entry[kind].items()
            }
        cells.append(Cell(**{name: value for name, value in entry.items() if name in known}))
    return document["machine"], cells
