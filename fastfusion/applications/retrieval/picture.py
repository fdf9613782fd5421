"""The picture of the demo: what is found for each search."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastfusion.plotting import new_figure


@dataclass(frozen=True)
class Panel:
    """One search: uint8 pictures (found, 3, size, size), the best first, and their names."""

    query: str
    pictures: Tensor
    names: list[str]


def draw(panels: list[Panel], path: Path) -> None:
    """Write a picture with a row per search."""
    columns = len(panels[0].names)
    figure = new_figure(1.25 * (columns + 1), 1.25 * len(panels) + 0.6)
    figure.suptitle(
        "Pictures found for a few words, the best first, in a style that no training has seen",
        fontsize=12,
    )
    grid = figure.subplots(len(panels), columns + 1, squeeze=False)
    for row, panel in zip(grid, panels, strict=True):
        row[0].text(0.5, 0.5, panel.query, ha="center", va="center", fontsize=11)
        for axes, picture, name in zip(row[1:], panel.pictures, panel.names, strict=True):
            axes.imshow(picture.permute(1, 2, 0).numpy())
            axes.set_title(name if len(name) < 19 else name[:17] + "…", fontsize=6)
        for axes in row:
            axes.set_axis_off()
    figure.savefig(path)
