"""Device functions for one tile of scores.

It holds Q queries by K keys, or K by Q where a kernel wants the keys first (so that its second
product takes the tile as it lies in registers).
"""

import triton
import triton.language as tl

from fastfusion.kernels.device.masks import EXTREME, EXTREME_FLOAT, FLOAT_MASK


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a times the transpose of b, over up to 256 columns.

    Exact float32 products of more than 128 are summed in parts of 64: one chain of 256 terms errs
    by 4.9e-7 on an H200, where cuBLAS errs by 1.4e-7.
    """
    COLUMNS: tl.constexpr = a.shape[1]
    if a.dtype == tl.float32 and COLUMNS > 128 and PRECISION == "ieee":
        PARTS: tl.constexpr = COLUMNS // 64
        left = tl.permute(tl.reshape(a, [a.shape[0], PARTS, 64]), [1, 0, 2])
        right = tl.permute(tl.reshape(b, [b.shape[0], PARTS, 64]), [1, 2, 0])
        return tl.sum(tl.dot(left, right, input_precision=PRECISION), 0)
    else:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def scores(
    q, k, q_start, k_start, visible, mask, scale, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of scores, -inf where hidden: raw products, or in natural units.

    EDGE says that the tile may hold keys that are absent or hidden, CAUSAL that it may hold some
    behind the diagonal.
    """
    mask_ptr, mask_row, mask_column, mask_rows, mask_columns, diagonal = mask
    rows, keys = tl.arange(0, q.shape[0]), tl.arange(0, k.shape[0])
    if KEYS_FIRST:
        x = product(k, q, PRECISION)
        rows, keys, shown = rows[None, :], keys[:, None], visible[:, None]
    else:
        x = product(q, k, PRECISION)
        rows, keys, shown = rows[:, None], keys[None, :], visible[None, :]
    if MASK >= EXTREME:  # no plain product: with the maximum taken off it would become one fma
        x = tl.fma(x, tl.zeros_like(x) + scale, tl.zeros_like(x))
    if MASK != 0 and MASK != EXTREME:
        base = mask_ptr + tl.cast(q_start, tl.int64) * mask_row
        base += tl.cast(k_start, tl.int64) * mask_column
        inside = (rows < mask_rows - q_start) & (keys < mask_columns - k_start)
        value = tl.load(base + (rows * mask_row + keys * mask_column), mask=inside, other=0)
        if MASK >= FLOAT_MASK and MASK <= EXTREME_FLOAT:
            x = tl.fma(x, tl.zeros_like(x) + scale, value.to(tl.float32))
        else:
            x = tl.where(value != 0, x, -float("inf"))
    if CAUSAL != 0:
        if CAUSAL == 1:
            before = rows - keys >= k_start - q_start - diagonal
        else:
            before = keys - rows >= q_start - k_start - diagonal
        if EDGE:
            before = shown & before
        x = tl.where(before, x, -float("inf"))
    elif EDGE:
        x = tl.where(shown, x, -float("inf"))
    return x
