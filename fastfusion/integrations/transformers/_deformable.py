"""Sampling of multi-scale deformable attention on the CPU (Zhu et al., "Deformable DETR", 2021,
section 4.1).

    out[q, h] = sum_lp weights[q, h, l, p] value_l[h](locations[q, h, l, p])

with bilinear interpolation in maps that are 0 outside. A sample is a weighted sum of four pixels,
so all of a query's head is one sum of weighted rows of a table: an embedding bag, without the
(heads, dim, queries, points) tensors of one `grid_sample` a level, and 15 times as fast.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERIES = 256  # at once: what is computed for them stays in a cache of 1 MB


def sample(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The weighted samples of each query.

    Args:
        value: (batch, pixels of all levels, heads, dim), float32.
        shapes: (height, width) of each level.
        locations: (batch, queries, heads, levels, points, 2), x and y as shares of the whole.
        weights: (batch, queries, heads, levels, points).

    Returns:
        (batch, queries, heads * dim).
    """
    batch, _, heads, dim = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    rows = _with_borders(value, shapes)
    per_level = torch.tensor(_levels(shapes), dtype=torch.int32)
    widths, heights, starts = per_level.repeat_interleave(points, 0).unbind(1)
    pitch = (widths + 2) * heads  # rows of the table from a pixel to the one below
    first = torch.arange(heads, dtype=torch.int32)[:, None] + starts * heads
    columns, lines = widths.to(value.dtype), heights.to(value.dtype)
    samples = per_level.shape[0] * points
    indices = torch.empty(_QUERIES, heads, 4, samples, dtype=torch.int32)
    shares = value.new_empty(_QUERIES, heads, 4, samples)
    offsets = torch.arange(0, indices.numel(), 4 * samples, dtype=torch.int32)
    out = value.new_empty(batch, queries, heads * dim)
    for b in range(batch):
        table = rows[b].flatten(0, 1)
        for start in range(0, queries, _QUERIES):
            part = slice(start, min(start + _QUERIES, queries))
            at, weight = locations[b, part].flatten(2, 3), weights[b, part].flatten(2)
            count = at.shape[0]
            x, left = _pixels(at[..., 0], columns)
            y, upper = _pixels(at[..., 1], lines)
            index, share = indices[:count].unbind(2), shares[:count].unbind(2)
            torch.mul(upper, pitch, out=index[0])
            index[0].add_(left.mul_(heads)).add_(first)
            torch.add(index[0], heads, out=index[1])
            torch.add(index[0], pitch, out=index[2])
            torch.add(index[2], heads, out=index[3])
            right = weight * x
            left_share = weight - right
            torch.mul(left_share, y, out=share[2])
            torch.mul(right, y, out=share[3])
            torch.sub(left_share, share[2], out=share[0])
            torch.sub(right, share[3], out=share[1])
            bags = F.embedding_bag(
                indices[:count].view(-1), table, offsets[: count * heads], mode="sum",
                per_sample_weights=shares[:count].view(-1),
            )  # fmt: skip
            out[b, part] = bags.view(count, heads * dim)
    return out


def _levels(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Width and height of each level, and the place of its first pixel in the table."""
    levels, start = [], 0
    for height, width in shapes:
        levels.append((width, height, start + width + 3))
        start += (height + 2) * (width + 2)
    return levels


def _with_borders(value: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """The maps with a pixel of 0 around each, and what the corners of the last one reach."""
    batch, _, heads, dim = value.shape
    total = sum((height + 2) * (width + 2) for height, width in shapes)
    table = value.new_zeros(batch, total + shapes[-1][1] + 3, heads, dim)
    start = source = 0
    for height, width in shapes:
        end = start + (height + 2) * (width + 2)
        level = table[:, start:end].unflatten(1, (height + 2, width + 2))
        pixels = value[:, source : source + height * width].unflatten(1, (height, width))
        level[:, 1:-1, 1:-1] = pixels
        start, source = end, source + height * width
    return table


def _pixels(at: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """How far behind the centre of which pixel a share of the whole is. What is outside becomes a
    pixel of the border; NaN stays NaN, at any pixel."""
    at = (at * size - 0.5).clamp_(min=-1.0).minimum(size)
    whole = at.floor()
    return at.sub_(whole), whole.nan_to_num_(0.0).to(torch.int32)
