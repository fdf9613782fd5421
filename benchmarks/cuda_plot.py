"""Plots of a device's results, from their JSON only: ``python -m fastfusion.benchmarks.cuda_plot``.

One picture per file: for every shape a bar, how many times as long the fastest peer takes, under a
graph and eagerly; below the line at 1 we lose.
"""

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

from . import cuda_results
from .cuda_results import Cell

COLORS = {"graph": "#2a6f97", "eager": "#a9d6e5"}


def missing() -> str | None:
    """Why nothing can be drawn, None where it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed"
    return None


def title(machine: dict[str, Any], cell: Cell) -> str:
    """What a picture shows, and of which machine."""
    direction = "forward and backward" if cell.backward else "forward"
    return (
        f"{cell.suite}, {cell.dtype}, {direction}: time of the fastest peer / ours\n"
        f"{machine.get('gpu', 'unknown device')}, torch {machine.get('torch')}, "
        f"triton {machine.get('triton')}, commit {machine.get('commit')}"
    )


def draw(source: Path) -> Path | None:
    """The picture of one file, beside it; None where it holds no times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    machine, cells = cuda_results.read(source)
    cells = [cell for cell in cuda_results.order(cells) if cell.best() is not None]
    if not cells:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.34 * len(cells)), layout="constrained")
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
    axes.set_xlabel("above 1 fastfusion is faster")
    axes.set_title(title(machine, cells[0]), size=9)
    axes.legend(loc="lower right", fontsize=8)
    target = source.with_suffix(".png")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def draw_all(folder: Path) -> list[Path]:
    """The pictures of every file of a folder."""
    found = (draw(source) for source in sorted(folder.glob("*.json")) if is_result(source))
    return [picture for picture in found if picture is not None]


def is_result(source: Path) -> bool:
    """Whether a file of the results folder holds cells; summaries lie beside them."""
    return source.stem.split("-")[0] in ("attention", "bidirectional")


def main(argv: list[str] | None = None) -> int:
    """Draws the files, or those in the folders, that are named."""
    names = sys.argv[1:] if argv is None else argv
    why = missing()
    if why is not None or not names:
        print(f"cuda_plot: {why or 'name files or folders'}", file=sys.stderr)
        return 2
    for path in map(Path, names):
        for picture in draw_all(path) if path.is_dir() else [draw(path)]:
            print(picture or f"{path}: no times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
