"""Plots of a device's results, from their JSON only: ``python -m fastfusion.benchmarks.gpu.plots``.

A panel for each suite, dtype and direction: for every shape a bar, how many times as long the
fastest peer takes, under a graph and eagerly; below the line at 1 we lose.
"""

import importlib.util
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..common.plots import pyplot
from . import results
from .results import Cell

COLORS = {"graph": "#2a6f97", "eager": "#a9d6e5"}


def missing() -> str | None:
    """Why nothing can be drawn, None where it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed"
    return None


def title(machine: dict[str, Any]) -> str:
    """What a picture shows, and of which machine."""
    return (
        "time of the fastest peer / ours\n"
        f"{machine.get('gpu', 'unknown device')}, torch {machine.get('torch')}, "
        f"triton {machine.get('triton')}, commit {machine.get('commit')}"
    )


def panels(cells: Iterable[Cell]) -> dict[tuple[str, str], dict[bool, list[Cell]]]:
    """The cells that have times: by suite and dtype a row, by direction a column of it."""
    rows: dict[tuple[str, str], dict[bool, list[Cell]]] = {}
    for cell in cells:
        if cell.best() is not None:
            row = rows.setdefault((cell.suite, cell.dtype), {})
            row.setdefault(cell.backward, []).append(cell)
    return rows


def draw(sources: Sequence[Path], target: Path) -> Path | None:
    """One picture of some files; None where they hold no times."""
    machine: dict[str, Any] = {}
    cells: list[Cell] = []
    for source in sources:
        machine, found = results.read(source)
        cells += found
    rows = panels(cells)
    if not rows:
        return None
    directions = sorted({backward for row in rows.values() for backward in row})
    heights = [1.2 + 0.34 * max(map(len, row.values())) for row in rows.values()]
    drawing = pyplot()
    figure, grid = drawing.subplots(
        len(rows),
        len(directions),
        figsize=(9 * len(directions), 0.6 + sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for row, places in zip(rows.values(), grid, strict=True):
        for backward, axes in zip(directions, places, strict=True):
            if backward in row:
                _panel(axes, results.order(row[backward]))
            else:
                axes.set_axis_off()
    figure.suptitle(title(machine), size=9)
    figure.savefig(target, dpi=120)
    drawing.close(figure)
    return target


def _panel(axes: Any, cells: list[Cell]) -> None:
    """The bars of one suite, dtype and direction."""
    places = range(len(cells))
    for offset, mode in ((0.2, "graph"), (-0.2, "eager")):
        ratios = [cell.ratio(mode) for cell in cells]
        widths = [ratio if math.isfinite(ratio) else 0.0 for ratio in ratios]
        rows = [place - offset for place in places]
        axes.barh(rows, widths, 0.38, label=mode, color=COLORS[mode])
    for place, cell in zip(places, cells, strict=True):
        best = cell.best()
        if best is not None:
            axes.annotate(
                f" {best[1].median:.2f} {best[0]}", (cell.ratio(), place - 0.2), va="center", size=7
            )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(list(places), [cell.name for cell in cells], size=8)
    axes.invert_yaxis()
    axes.set_xlabel("above 1 fastfusion is faster", size=8)
    direction = "forward and backward" if cells[0].backward else "forward"
    axes.set_title(f"{cells[0].suite}, {cells[0].dtype}, {direction}", size=9)
    axes.margins(x=0.12)  # for the peer's name behind the longest bar
    axes.legend(loc="upper right", fontsize=8)


def draw_folder(folder: Path) -> Path | None:
    """All files of a folder in its times.png; None where they hold no times."""
    sources = [source for source in sorted(folder.glob("*.json")) if is_result(source)]
    return draw(sources, folder / "times.png")


def is_result(source: Path) -> bool:
    """Whether a file of the results folder holds cells; summaries lie beside them."""
    return source.stem.split("-")[0] in ("attention", "bidirectional", "block")


def main(argv: list[str] | None = None) -> int:
    """Draws each file that is named, and each folder in one picture."""
    names = sys.argv[1:] if argv is None else argv
    why = missing()
    if why is not None or not names:
        print(f"plots: {why or 'name files or folders'}", file=sys.stderr)
        return 2
    for path in map(Path, names):
        picture = draw_folder(path) if path.is_dir() else draw([path], path.with_suffix(".png"))
        print(picture or f"{path}: no times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
