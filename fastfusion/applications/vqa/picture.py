"""The picture of the demo: where in the image the words of a question look."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastfusion.applications.vqa.model import GRID
from fastfusion.plotting import new_figure, overlay

BLOCKS = 2  # questions side by side


@dataclass(frozen=True)
class Panel:
    """One question about one image.

    ``image`` is (size, size, 3) from 0 to 1, ``attention`` has a word's weights (GRID * GRID,), and
    ``shape`` (GRID * GRID,) marks the tokens that see a part of the shape.
    """

    image: Tensor
    question: str
    attention: dict[str, Tensor]
    shape: Tensor
    predicted: str
    true: str


def draw(panels: list[Panel], path: Path) -> None:
    """Write a picture with a block per question: the image, then a heat map for each word."""
    rows = -(-len(panels) // BLOCKS)
    figure = new_figure(6.4 * BLOCKS, 2.75 * rows + 0.5)
    figure.suptitle(
        "Cross-modal attention: where the words of a question look "
        "(mean of the heads, each map on its own scale)",
        fontsize=12,
    )
    blocks = figure.subfigures(rows, BLOCKS, squeeze=False).flatten()
    for block, panel in zip(blocks, panels, strict=False):
        _draw_block(block, panel)
    figure.savefig(path)


def _draw_block(block: Any, panel: Panel) -> None:
    right = panel.predicted == panel.true
    block.suptitle(
        f"{panel.question}  answer: {panel.predicted}, true: {panel.true}",
        color="black" if right else "firebrick",
        fontsize=12,
    )
    first, *others = block.subplots(1, 1 + len(panel.attention))
    size = panel.image.shape[0]
    extent = (0, size, size, 0)
    first.imshow(panel.image.numpy(), extent=extent)
    first.set_title("image", fontsize=10)

    for axes, (word, attention) in zip(others, panel.attention.items(), strict=True):
        overlay(axes, panel.image, attention.view(GRID, GRID))
        axes.set_title(f'"{word}"', fontsize=10)
        share = (attention * panel.shape).sum().item()
        axes.set_xlabel(f"{share:.0%} on the shape", fontsize=9)
    for axes in (first, *others):
        axes.set_xticks([])
        axes.set_yticks([])
