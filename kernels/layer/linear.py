"""Matrix products of a fusion layer's projections: out = activation(x W^T + b) + residual.

A program owns a tile of the output, loops over the inner dimension and does the rest in registers.
One launch may hold two products of any two shapes, so that both streams of a layer run side by
side. A tile of few rows is multiplied as (W x^T)^T: W then is the operand of 64 rows that tensor
cores ask for. The inner dimension is never split, and the order of its sum depends on the dtype
alone, so that a row has the same bits in any company.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.kernels.device.sums import add
from fastfusion.kernels.host.arguments import numbers, rows_readable
from fastfusion.kernels.host.plan import FUSION, on
from fastfusion.kernels.host.tiles import cdiv

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "relu", "gelu")


class Product(NamedTuple):
    """activation(x @ weight.T + bias) + residual.

    x: (..., in_features); weight: (out_features, in_features); bias: (out_features,);
    residual: (..., out_features). All of one dtype, float32, bfloat16 or float16.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None


class LinearTile(NamedTuple):
    """A tile of the output, the step along the inner dimension, warps, stages, and whether the
    product is that of the transposes. In float32 `inner` decides bits, so it is the same for all.
    """

    rows: int
    features: int
    inner: int
    warps: int
    stages: int
    swapped: bool


# By element size: for at most 16 rows, at most 64, more, and for so many that tiles of 128 x 128
# keep a GPU busy; "unaligned" for rows that do not start at multiples of 16 elements, which are
# loaded one element at a time. Those of 16 bits compile without spills from sm_80 to sm_100, within
# the 99 KB of shared memory of sm_86 and sm_89.
TILES = {
    2: {
        "single": LinearTile(16, 64, 128, 4, 4, True),
        "few": LinearTile(32, 64, 64, 4, 4, True),
        "some": LinearTile(64, 64, 64, 4, 4, False),
        "many": LinearTile(128, 128, 64, 8, 3, False),
        "unaligned": LinearTile(64, 64, 32, 4, 2, False),
    },
    4: {
        "single": LinearTile(16, 64, 32, 4, 3, True),
        "few": LinearTile(32, 64, 32, 4, 3, True),
        "some": LinearTile(64, 64, 32, 4, 3, False),
        "many": LinearTile(64, 64, 32, 4, 3, False),
        "unaligned": LinearTile(32, 64, 32, 4, 3, True),
    },
}
# Row tiles that share a pass over the features, while W is in the L2 cache.
_GROUP = 8
# Tiles of 128 x 128 that keep the largest GPU busy.
_BUSY = 128


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # and not maximum, which would hide a NaN
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def _product_tile(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, rows, features, inner, x_stride,
    residual_stride, program, ACTIVATION: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    FEATURES: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, SWAPPED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One (ROWS, FEATURES) tile; weight and out are contiguous."""
    # Down GROUP row tiles before the next features, so that the tiles in flight share operands.
    column_tiles = tl.cdiv(features, FEATURES)
    first_row_tile = program // (GROUP * column_tiles) * GROUP
    group = tl.minimum(tl.cdiv(rows, ROWS) - first_row_tile, GROUP)
    place = program % (GROUP * column_tiles)
    row_start = (first_row_tile + place % group) * ROWS
    column_start = place // group * FEATURES

    # Past the end the last row is read again instead of a mask, and not stored.
    row = tl.minimum(tl.arange(0, ROWS), rows - 1 - row_start)
    column = tl.minimum(tl.arange(0, FEATURES), features - 1 - column_start)
    k = tl.arange(0, INNER)
    x_at = x_ptr + tl.cast(row_start, tl.int64) * x_stride
    x_at = x_at + (row[:, None] * x_stride + k[None, :])
    weight_at = weight_ptr + tl.cast(column_start, tl.int64) * inner
    weight_at = weight_at + (column[:, None] * inner + k[None, :])

    if SWAPPED:
        total = tl.zeros([FEATURES, ROWS], tl.float32)
    else:
        total = tl.zeros([ROWS, FEATURES], tl.float32)
    lost = tl.zeros_like(total)
    for start in range(0, inner, INNER):
        if EVEN:
            x = tl.load(x_at)
            weight = tl.load(weight_at)
        else:
            present = (k < inner - start)[None, :]
            x = tl.load(x_at, mask=present, other=0.0)
            weight = tl.load(weight_at, mask=present, other=0.0)
        x_at += INNER
        weight_at += INNER
        left = weight.to(DOT) if SWAPPED else x.to(DOT)
        right = tl.trans(x.to(DOT)) if SWAPPED else tl.trans(weight.to(DOT))
        if CHAINED:
            total = tl.dot(left, right, total, input_precision=PRECISION)
        else:
            # As a plain sum it would become the product's accumulator: one chain of `inner` terms.
            value = tl.dot(left, right, input_precision=PRECISION)
            total, lost = add(total, lost, value)
    if SWAPPED:
        total = tl.trans(total)

    row = tl.arange(0, ROWS)[:, None]
    column = column_start + tl.arange(0, FEATURES)[None, :]
    inside = (row < rows - row_start) & (column < features)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < features, other=0.0).to(tl.float32)
    total = _activated(total, ACTIVATION)
    if residual_ptr is not None:
        residual_ptr += tl.cast(row_start, tl.int64) * residual_stride
        residual = tl.load(residual_ptr + (row * residual_stride + column), mask=inside, other=0.0)
        total += residual.to(tl.float32)
    out_ptr += tl.cast(row_start, tl.int64) * features
    tl.store(out_ptr + (row * features + column), total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_2"])
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, rows, features, inner, x_stride,
    residual_stride,
    x_2_ptr, weight_2_ptr, bias_2_ptr, residual_2_ptr, out_2_ptr, rows_2, features_2, inner_2,
    x_2_stride, residual_2_stride,
    TWO: tl.constexpr, ACTIVATION: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    FEATURES: tl.constexpr, INNER: tl.constexpr, SWAPPED: tl.constexpr, GROUP: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of the first product, then those of the second where there are TWO.

    Their arguments are picked one by one: a branch would hold shared memory for both its sides.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, ROWS) * tl.cdiv(features, FEATURES)
    if TWO:
        second = program >= tiles
        program = tl.where(second, program - tiles, program)
        x_ptr = tl.where(second, x_2_ptr, x_ptr)
        weight_ptr = tl.where(second, weight_2_ptr, weight_ptr)
        if bias_ptr is not None:
            bias_ptr = tl.where(second, bias_2_ptr, bias_ptr)
        if residual_ptr is not None:
            residual_ptr = tl.where(second, residual_2_ptr, residual_ptr)
        out_ptr = tl.where(second, out_2_ptr, out_ptr)
        rows = tl.where(second, rows_2, rows)
        features = tl.where(second, features_2, features)
        inner = tl.where(second, inner_2, inner)
        x_stride = tl.where(second, x_2_stride, x_stride)
        residual_stride = tl.where(second, residual_2_stride, residual_stride)
    _product_tile(
        x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, rows, features, inner, x_stride,
        residual_stride, program, ACTIVATION, EVEN, ROWS, FEATURES, INNER, GROUP, SWAPPED, DOT,
        PRECISION, CHAINED,
    )  # fmt: skip


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias) + residual, rounded once; no gradients.

    Args:
        x: (..., in_features), float32, bfloat16 or float16.
        weight: (out_features, in_features), as in torch.nn.Linear.
        bias: (out_features,).
        activation: "relu", "gelu" (by erf, as torch's default) or None.
        residual: (..., out_features).

    Returns:
        (..., out_features), contiguous.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit.
    """
    return linears((Product(x, weight, bias, residual),), activation)[0]


def linears(products: tuple[Product, ...], activation: str | None = None) -> list[Tensor]:
    """One or two products in one launch; see `linear`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    given = [[t is None for t in product] for product in products]
    if given[0] != given[-1]:  # one kernel adds a bias and a residual to both or to none
        return [out for product in products for out in linears((product,), activation)]
    dtype = products[0].x.dtype
    outs: list[Tensor] = []
    arguments: list[Any] = []
    sizes, aligned = [], True
    for product in products:
        _check(product, dtype)
        x, weight, bias, residual = product
        features, inner = weight.shape
        out = torch.empty((*x.shape[:-1], features), dtype=dtype, device=x.device)
        outs.append(out)
        x = _rows(x, inner)
        rows, stride = x.shape[0], x.stride(0)
        residual = None if residual is None else _rows(residual, features)
        sizes.append((rows, features, inner))
        aligned = aligned and inner % 16 == 0 and stride % 16 == 0
        arguments += [
            x, weight.contiguous(), None if bias is None else bias.contiguous(), residual, out,
            rows, features, inner, stride, 0 if residual is None else residual.stride(0),
        ]  # fmt: skip
    tile = _tile(dtype.itemsize, sizes, aligned)
    programs = sum(_tiles(tile, rows, features) for rows, features, _ in sizes)
    if programs:
        two = len(products) == 2
        if not two:
            arguments += [None] * 5 + [0] * 5
        even = all(inner % tile.inner == 0 for *_, inner in sizes)
        with on(outs[0]):
            linear_kernel[(programs,)](
                *arguments, two, activation, even, tile.rows, tile.features, tile.inner,
                tile.swapped, _GROUP, **numbers(dtype), CHAINED=dtype != torch.float32,
                num_warps=tile.warps, num_stages=tile.stages, **FUSION,
            )  # fmt: skip
    return outs


def project_heads(
    products: tuple[Product, ...], parts: tuple[int, ...], heads: int
) -> list[tuple[Tensor, ...]]:
    """One or two projections, each seen as `parts` tensors (batch, heads, length, head_dim).

    A view of the product's own memory, (batch, length, parts, heads, head_dim).
    """
    views = []
    for out, count in zip(linears(products), parts, strict=True):
        batch, length, features = out.shape
        out = out.view(batch, length, count, heads, features // (count * heads))
        views.append(out.permute(2, 0, 3, 1, 4).unbind(0))
    return views


def _tiles(tile: LinearTile, rows: int, features: int) -> int:
    return cdiv(rows, tile.rows) * cdiv(features, tile.features)


def _tile(itemsize: int, sizes: list[tuple[int, int, int]], aligned: bool) -> LinearTile:
    """By the rows that there are in all, which changes no bit of a row's result."""
    tiles = TILES[itemsize]
    if not aligned:
        return tiles["unaligned"]
    most = max(rows for rows, *_ in sizes)
    if most <= 16:
        return tiles["single"]
    if most <= 64:
        return tiles["few"]
    busy = sum(_tiles(tiles["many"], rows, features) for rows, features, _ in sizes) >= _BUSY
    return tiles["many" if busy else "some"]


def _rows(tensor: Tensor, columns: int) -> Tensor:
    """(rows, columns), a view if it can be one whose tiles have 32-bit offsets."""
    tensor = rows_readable(tensor)
    tensor = tensor if tensor.dim() == 2 else tensor.reshape(-1, columns)
    return tensor if tensor.stride(0) < 1 << 24 else tensor.contiguous()


def _check(product: Product, dtype: torch.dtype) -> None:
    x, weight, bias, residual = product
    if dtype not in DTYPES or any(t is not None and t.dtype != dtype for t in product):
        dtypes = [t.dtype for t in product if t is not None]
        raise TypeError(f"all must be float32, all bfloat16 or all float16, got {dtypes}")
    if (
        weight.dim() != 2
        or x.shape[-1] != weight.shape[1]
        or (bias is not None and bias.shape != weight.shape[:1])
        or (residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]))
    ):
        shapes = [None if t is None else tuple(t.shape) for t in product]
        raise ValueError(f"x, weight, bias and residual do not fit: {shapes}")
