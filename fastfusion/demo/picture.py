"""The picture of the demo: where in the image each word of a question looks."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastfusion.demo.extras import require
from fastfusion.demo.model import GRID


@dataclass(frozen=True)
class Panel:
    """One question: an image (size, size, 3) from 0 to 1, its words, and their attention (words, GRID * GRID)."""

    image: Tensor
    question: str
    words: list[str]
    attention: Tensor
    predicted: str
    true: str


def draw(panels: list[Panel], path: Path) -> None:
    """Write one row per panel: the image, then one heat map per word, laid over the image in grey."""
    matplotlib = require("matplotlib")
    figure_class = require("matplotlib.figure").Figure
    canvas = require("matplotlib.backends.backend_agg").FigureCanvasAgg

    columns = 1 + max(len(panel.words) for panel in panels)
    figure = figure_class(figsize=(1.45 * columns + 0.3, 2.05 * len(panels) + 0.55), dpi=150)
    canvas(figure)
    grid = figure.add_gridspec(len(panels), columns, left=0.01, right=0.99, bottom=0.01, top=0.9, wspace=0.06, hspace=0.5)
    figure.suptitle("Attention of a question's words over the image (mean over heads, one colour scale per row)", fontsize=11)
    del matplotlib
    for row, panel in enumerate(panels):
        size = panel.image.shape[0]
        extent = (0, size, size, 0)
        first = figure.add_subplot(grid[row, 0])
        first.imshow(panel.image.numpy(), extent=extent)
        first.set_title(f"{panel.question}\n", fontsize=10, loc="left")
        verdict = panel.predicted if panel.predicted == panel.true else f"{panel.predicted} (true: {panel.true})"
        first.set_xlabel(verdict)
        grey = panel.image.mean(dim=2).numpy()
        top = float(panel.attention.max())
        for column, word in enumerate(panel.words, start=1):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(grey, cmap="gray", vmin=-0.6, vmax=1.0, extent=extent)
            heat = panel.attention[column - 1].view(GRID, GRID).numpy()
            axes.imshow(heat, cmap="inferno", vmin=0, vmax=top, alpha=0.6, interpolation="bilinear", extent=extent)
            axes.set_title(word, fontsize=9, pad=3)
        for axes in figure.axes:
            axes.set_xticks([])
            axes.set_yticks([])
    figure.savefig(path)
