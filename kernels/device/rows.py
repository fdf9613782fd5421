"""Device functions for rows in memory: where those of a head begin, and tiles of them.

Offsets within a tile are 32-bit, the tile's own base is 64-bit: 32-bit offsets from the start of a
head overflow at 2^31 elements, 64-bit ones per element cost registers (8-72 bytes of spills).
"""

import triton
import triton.language as tl


@triton.jit
def slice_base(ptr, batch, head, batch_stride, head_stride):
    """Where the rows of one head of one batch entry begin."""
    return ptr + tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride


@triton.jit
def load_rows(
    base, start, present, stride, DIM: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr
):
    """Rows start, start + 1, ...: (rows, WIDTH); those not `present` and columns past DIM are 0."""
    rows = tl.arange(0, present.shape[0])
    columns = tl.arange(0, WIDTH)
    at = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if DIM == WIDTH:
        tile = tl.load(at, mask=present[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=present[:, None] & (columns[None, :] < DIM), other=0.0)
    return tile.to(DOT)


@triton.jit
def load_tile(
    base, row, start, visible, DIM: tl.constexpr, WIDTH: tl.constexpr, EDGE: tl.constexpr,
    DOT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The rows of `visible`: by TMA from a descriptor, whose `row` is (batch entry, head), with
    zeros behind the last; or from pointers, whose `row` is a stride, those that EDGE lets be absent
    or hidden as zeros."""
    ROWS: tl.constexpr = visible.shape[0]
    if TMA:
        tile = tl.reshape(base.load([row[0], row[1], start, 0]), [ROWS, WIDTH])
        return tile.to(DOT)
    elif EDGE:
        return load_rows(base, start, visible, row, DIM, WIDTH, DOT)
    else:
        rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        at = base + tl.cast(start, tl.int64) * row + (rows[:, None] * row + columns[None, :])
        inside = columns[None, :] < DIM
        return (tl.load(at) if DIM == WIDTH else tl.load(at, mask=inside, other=0.0)).to(DOT)


@triton.jit
def rows_of(operand, batch, head, TMA: tl.constexpr = False):
    """Where the rows of a head are, as `load_tile` takes it; an operand is (pointer, strides of
    batch, head and row), or a descriptor."""
    if TMA:
        return operand, (batch, head)
    else:
        ptr, batch_stride, head_stride, row_stride = operand
        return slice_base(ptr, batch, head, batch_stride, head_stride), row_stride


@triton.jit
def tokens_of(operand, first, head):
    """The same of packed sequences: where the rows of a head of the tokens from `first` on are; an
    operand is (pointer, strides of token and head)."""
    ptr, row_stride, head_stride = operand
    return ptr + first * row_stride + head * head_stride, row_stride


@triton.jit
def store_rows(base, tile, start, present, stride, DIM: tl.constexpr):
    rows = tl.arange(0, tile.shape[0])
    columns = tl.arange(0, tile.shape[1])
    at = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    inside = present[:, None] & (columns[None, :] < DIM)
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def store_pair(
    of_side, of_value, gradient_scale, start, present, partial, side, value, batch, head,
    SPLIT: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of keys, say, and of their values: those of one split side by side from `partial`
    on, or into their places."""
    if SPLIT:
        row: tl.constexpr = DIM + VALUE_DIM
        store_rows(partial, of_side * gradient_scale, start, present, row, DIM)
        store_rows(partial + DIM, of_value, start, present, row, VALUE_DIM)
    else:
        base, row_stride = rows_of(side, batch, head)
        store_rows(base, of_side * gradient_scale, start, present, row_stride, DIM)
        base, row_stride = rows_of(value, batch, head)
        store_rows(base, of_value, start, present, row_stride, VALUE_DIM)
