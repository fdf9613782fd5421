"""Pictures and pages of where the words of a text look in an image."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion.core.extras import require
from fastfusion.nn._attention_maps import attention_maps

_PAGE = Path(__file__).with_name("attention_page.html")


def plot_attention(
    image: Tensor,
    words: Sequence[str],
    weights: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    columns: int = 8,
) -> Any:
    """Draw an image, and a heat map over it for each word, each on its own scale.

    Args:
        image: (H, W, channels) or (channels, H, W) with 1 or 3 channels, or (H, W); floats from 0
        to
            1 or uint8.
        words: one for each row of `weights`. weights: (words, visual tokens), as
        `fastfusion.attention_maps` and ``need_weights=True`` give
            them for one text: tokens are the cells of a grid over the image, row by row.
        grid: rows and columns of that grid; by default it is square.
        columns: of pictures side by side.

    Returns:
        A ``matplotlib.figure.Figure``; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: shapes that do not fit.
        MissingExtra: matplotlib is not installed.
    """
    pixels, cells = _pixels(image), _cells(weights, words, grid)
    rows = -(-(1 + len(words)) // columns)
    figure = new_figure(1.65 * min(columns, 1 + len(words)), 1.9 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)[: rows * columns]
    axes[0].imshow(pixels.numpy(), extent=_extent(pixels), cmap="gray")
    axes[0].set_title("image", fontsize=9)
    for axis, word, heat in zip(axes[1:], words, cells, strict=False):
        overlay(axis, pixels, heat)
        axis.set_title(f'"{word}"', fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    return figure


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches, which needs no display and leaves the caller's backend alone."""
    require("matplotlib")
    figure = require("matplotlib.figure").Figure((width, height), dpi=110, layout="constrained")
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def overlay(axis: Any, image: Tensor, heat: Tensor) -> None:
    """Draw a heat map (rows, columns), on its own scale, over an image (H, W[, 3]) in grey: opaque
    where a word looks, so that the image shows through everywhere else."""
    grey = image if image.dim() == 2 else image.mean(dim=2)
    extent = _extent(image)
    axis.imshow(grey.numpy(), cmap="gray", vmin=-0.5, vmax=1.0, extent=extent)
    strong = (heat / heat.max().clamp(min=1e-12)).numpy()
    axis.imshow(
        strong, cmap="autumn_r", vmin=0, vmax=1, alpha=0.8 * strong, extent=extent,
        interpolation="bilinear",
    )  # fmt: skip


def attention_page(
    path: Path | str,
    model: nn.Module,
    inputs: Sequence[Any],
    image: Tensor,
    words: Sequence[str],
    *,
    grid: tuple[int, int] | None = None,
    title: str = "Where the words look",
) -> list[str]:
    """Write a page that shows the attention of a model's layers and heads, with sliders.

    The page is one file that loads nothing. It holds every map of :func:`fastfusion.attention_maps`
    that has a row for each word and a column for each visual token.

    Args:
        path: of the file to write.
        model: called once, without gradients, with `inputs`, a batch of one.
        image, grid: as of :func:`plot_attention`.
        words: one for each row of the maps.
        title: over the page.

    Returns:
        The names of the layers that the page shows.

    Raises:
        ValueError: no layer attends from so many words to so many visual tokens.
        MissingExtra: Pillow is not installed.
    """
    pixels = _pixels(image)
    with torch.no_grad(), attention_maps(model, average=False) as maps:
        model(*inputs)
    found = {
        name: heads
        for name, each in maps.items()
        if (heads := _from_words(each, len(words), grid)) is not None
    }
    if not found:
        raise ValueError(
            f"no layer attends from {len(words)} words to the cells of a grid; there are maps of "
            f"{ {name: _shapes(each) for name, each in maps.items()} }"
        )
    tokens = next(iter(found.values())).shape[-1]
    rows, columns = _grid(tokens, grid)
    content = {
        "title": title,
        "image": _png(pixels),
        "words": list(words),
        "rows": rows,
        "columns": columns,
        "layers": {name: _numbers(heads) for name, heads in found.items()},
    }
    # Nothing in a text may end the element that holds it.
    text = json.dumps(content).replace("<", "\\u003c")
    Path(path).write_text(_PAGE.read_text().replace("/*CONTENT*/null", text))
    return list(found)


def _from_words(maps: Any, words: int, grid: tuple[int, int] | None) -> Tensor | None:
    """The map (heads, words, tokens) of a layer, of those it has, from words to tokens."""
    for each in maps if isinstance(maps, tuple) else (maps,):
        heads = each[0] if each.dim() == 4 else each
        tokens = heads.shape[-1]
        fits = tokens == grid[0] * grid[1] if grid else round(tokens**0.5) ** 2 == tokens > 1
        if heads.dim() == 3 and heads.shape[1] == words and fits and tokens != words:
            return heads
    return None


def _shapes(maps: Any) -> list[tuple[int, ...]]:
    return [tuple(each.shape) for each in (maps if isinstance(maps, tuple) else (maps,))]


def _numbers(heads: Tensor) -> list[list[list[float]]]:
    """Three digits of each weight: a page of a megabyte in place of several."""
    rounded: list[list[list[float]]] = [
        [[float(f"{w:.3g}") for w in row] for row in head] for head in heads.tolist()
    ]
    return rounded


def _pixels(image: Tensor) -> Tensor:
    """Floats from 0 to 1, (H, W) or (H, W, 3)."""
    given = tuple(image.shape)
    if image.dim() == 3 and image.shape[0] in (1, 3) and image.shape[2] not in (1, 3):
        image = image.permute(1, 2, 0)
    if image.dim() == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.dim() not in (2, 3) or (image.dim() == 3 and image.shape[2] != 3):
        raise ValueError(f"image must be (H, W), (H, W, 3) or (3, H, W), got {given}")
    floats = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    return floats.clamp(0, 1)


def _cells(weights: Tensor, words: Sequence[str], grid: tuple[int, int] | None) -> Tensor:
    if weights.dim() != 2 or weights.shape[0] != len(words):
        raise ValueError(
            f"weights must have shape ({len(words)} words, tokens), got {tuple(weights.shape)}"
        )
    return weights.detach().float().unflatten(1, _grid(weights.shape[1], grid))


def _grid(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    side = round(tokens**0.5)
    rows, columns = grid or (side, side)
    if rows * columns != tokens:
        raise ValueError(f"grid must have as many cells as there are tokens, {tokens}, got {grid}")
    return rows, columns


def _extent(image: Tensor) -> tuple[int, int, int, int]:
    return 0, image.shape[1], image.shape[0], 0


def _png(pixels: Tensor) -> str:
    """The image as a data URL."""
    picture = require("PIL.Image").fromarray((pixels * 255).round().to(torch.uint8).numpy())
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
