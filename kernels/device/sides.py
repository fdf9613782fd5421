"""Device functions of the bidirectional backward: side a owns a tile and loops over side b.

Side a is the queries or the keys, av and bv are the values that the sides offer each other, and
grad_a is the gradient of what a gathered (so it has the dim of bv).
"""

import triton
import triton.language as tl

from fastfusion.kernels.device.dropout import kept_pair
from fastfusion.kernels.device.gradients import partly_scaled, softmax_gradient
from fastfusion.kernels.device.masks import seen_range, visible_keys
from fastfusion.kernels.device.rows import load_rows, slice_base, store_rows
from fastfusion.kernels.device.scores import scores
from fastfusion.kernels.device.statistics import load_statistics, row_statistics, store_statistics
from fastfusion.kernels.device.sums import multiply_add, nothing_lost


@triton.jit
def side_statistics(
    index, a_ptr, b_ptr, bv_ptr, grad_ptr, statistics_ptr, mask_ptr, padding_ptr, seed_ptr,
    a_batch, a_head, a_row, b_batch, b_head, b_row, bv_batch, bv_head, bv_row, grad_batch,
    grad_head, grad_row, mask_batch, mask_head, mask_row, mask_column, padding_batch, diagonal,
    heads, a_len, b_len, scale, factor, threshold, keep_scale, SIGN: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    OWN: tl.constexpr, LOOP: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    PADDING: tl.constexpr, DROPOUT: tl.constexpr, STREAM: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(shift, 1 / sum, delta) of a tile of side a, whose softmax goes over side b."""
    tiles = tl.cdiv(a_len, OWN)
    start, slice_index = index % tiles * OWN, index // tiles
    batch, head = slice_index // heads, slice_index % heads
    rows = start + tl.arange(0, OWN)
    present = rows < a_len
    a = load_rows(
        slice_base(a_ptr, batch, head, a_batch, a_head), start, present, a_row, DIM, WIDTH, DOT
    )
    if SIGN != 1:
        a = a * SIGN
    grad_base = slice_base(grad_ptr, batch, head, grad_batch, grad_head)
    grad = load_rows(grad_base, start, present, grad_row, VALUE_DIM, VALUE_WIDTH, DOT)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    first, last = seen_range(0, b_len, start, diagonal, OWN, LOOP, CAUSAL)
    shift, share, delta = row_statistics(
        a, grad, start, slice_base(b_ptr, batch, head, b_batch, b_head), b_row,
        slice_base(bv_ptr, batch, head, bv_batch, bv_head), bv_row,
        (
            slice_base(mask_ptr, batch, head, mask_batch, mask_head), mask_row, mask_column, a_len,
            b_len, diagonal,
        ),
        padding_ptr + tl.cast(batch, tl.int64) * padding_batch, seed, slice_index, first, last,
        b_len, scale, factor, threshold, keep_scale, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, LOOP,
        CAUSAL, MASK, PADDING, DROPOUT, STREAM, DOT, PRECISION,
    )  # fmt: skip
    at = tl.cast(slice_index, tl.int64) * a_len + rows
    store_statistics(statistics_ptr, at, present, shift, share, delta)


@triton.jit
def both_gradients(
    a, b, av, bv, grad_a, grad_b, a_start, b_start, a_visible, b_visible, a_statistics,
    b_statistics, mask, seed, slice_index, scale, factor, threshold, keep_scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, EXCHANGED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(dS of both softmaxes, the softmax over a with dropout) of a tile of scores of a and b."""
    x = scores(
        a, b, a_start, b_start, b_visible, mask, scale, False, CAUSAL, MASK, False, PRECISION
    )
    over_b = tl.dot(grad_a, tl.trans(bv), input_precision=PRECISION)
    over_a = tl.dot(av, tl.trans(grad_b), input_precision=PRECISION)
    keep_b, keep_a = over_b == over_b, over_a == over_a
    A: tl.constexpr = a.shape[0]
    B: tl.constexpr = b.shape[0]
    if DROPOUT:
        keep_b = kept_pair(
            seed, slice_index, a_start, b_start, threshold, A, B, EXCHANGED, EXCHANGED
        )
        keep_a = kept_pair(
            seed, slice_index, a_start, b_start, threshold, A, B, not EXCHANGED, EXCHANGED
        )
        over_b = tl.where(keep_b, over_b * keep_scale, 0.0)
        over_a = tl.where(keep_a, over_a * keep_scale, 0.0)
    shift, share, delta, grad_lse = a_statistics
    _, ds_b = softmax_gradient(
        tl.where(b_visible[None, :], x, -float("inf")), over_b, keep_b, shift[:, None],
        share[:, None], delta[:, None], grad_lse[:, None], factor, keep_scale, MASK, DROPOUT,
    )  # fmt: skip
    shift, share, delta, grad_lse = b_statistics
    p, ds_a = softmax_gradient(
        tl.where(a_visible[:, None], x, -float("inf")), over_a, keep_a, shift[None, :],
        share[None, :], delta[None, :], grad_lse[None, :], factor, keep_scale, MASK, DROPOUT,
    )  # fmt: skip
    return ds_a + ds_b, p


@triton.jit
def side_gradients(
    index, a_ptr, b_ptr, av_ptr, bv_ptr, grad_a_ptr, grad_b_ptr, a_statistics_ptr,
    b_statistics_ptr, a_grad_lse_ptr, b_grad_lse_ptr, da_ptr, dav_ptr, partial_ptr, mask_ptr,
    a_padding_ptr, b_padding_ptr, seed_ptr, a_batch, a_head, a_row, b_batch, b_head, b_row,
    av_batch, av_head, av_row, bv_batch, bv_head, bv_row, grad_a_batch, grad_a_head, grad_a_row,
    grad_b_batch, grad_b_head, grad_b_row, da_batch, da_head, da_row, dav_batch, dav_head, dav_row,
    mask_batch, mask_head, mask_row, mask_column, a_padding_batch, b_padding_batch, diagonal, heads,
    a_len, b_len, splits, scale, factor, threshold, keep_scale, gradient_scale, SIGN: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, AV_DIM: tl.constexpr, AV_WIDTH: tl.constexpr,
    BV_DIM: tl.constexpr, BV_WIDTH: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr,
    SPLIT: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, A_PADDING: tl.constexpr,
    B_PADDING: tl.constexpr, DROPOUT: tl.constexpr, EXCHANGED: tl.constexpr, LSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of side a and of its values: (batch * heads, splits of b, tiles of a)."""
    tiles = tl.cdiv(a_len, OWN)
    a_start = index % tiles * OWN
    slice_index = index // tiles // splits
    batch, head = slice_index // heads, slice_index % heads
    present = a_start + tl.arange(0, OWN) < a_len
    a_padding = a_padding_ptr + tl.cast(batch, tl.int64) * a_padding_batch
    b_padding = b_padding_ptr + tl.cast(batch, tl.int64) * b_padding_batch
    a_visible = visible_keys(a_padding, a_start, a_len, OWN, A_PADDING)
    base = slice_base(a_ptr, batch, head, a_batch, a_head)
    a = load_rows(base, a_start, present, a_row, DIM, WIDTH, DOT)
    base = slice_base(av_ptr, batch, head, av_batch, av_head)
    av = load_rows(base, a_start, a_visible, av_row, AV_DIM, AV_WIDTH, DOT)
    base = slice_base(grad_a_ptr, batch, head, grad_a_batch, grad_a_head)
    grad_a = load_rows(base, a_start, present, grad_a_row, BV_DIM, BV_WIDTH, DOT)
    at = tl.cast(slice_index, tl.int64) * a_len + a_start + tl.arange(0, OWN)
    a_statistics = load_statistics(a_statistics_ptr, a_grad_lse_ptr, at, present, LSE)
    b_base = slice_base(b_ptr, batch, head, b_batch, b_head)
    bv_base = slice_base(bv_ptr, batch, head, bv_batch, bv_head)
    grad_b_base = slice_base(grad_b_ptr, batch, head, grad_b_batch, grad_b_head)
    mask_base = slice_base(mask_ptr, batch, head, mask_batch, mask_head)
    mask = (mask_base, mask_row, mask_column, a_len, b_len, diagonal)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    da = tl.zeros([OWN, WIDTH], tl.float32)
    dav = tl.zeros([OWN, AV_WIDTH], tl.float32)
    da_lost, dav_lost = nothing_lost(da, DOT), nothing_lost(dav, DOT)
    first, last = 0, b_len
    if SPLIT > 0:
        first = index // tiles % splits * SPLIT
        last = tl.minimum(first + SPLIT, b_len)
    first, last = seen_range(first, last, a_start, diagonal, OWN, LOOP, CAUSAL)
    for b_start in range(first, last, LOOP):
        existing = tl.arange(0, LOOP) < b_len - b_start
        b_visible = visible_keys(b_padding, b_start, b_len, LOOP, B_PADDING)
        b = load_rows(b_base, b_start, existing, b_row, DIM, WIDTH, DOT)
        bv = load_rows(bv_base, b_start, b_visible, bv_row, BV_DIM, BV_WIDTH, DOT)
        grad_b = load_rows(grad_b_base, b_start, existing, grad_b_row, AV_DIM, AV_WIDTH, DOT)
        b_at = tl.cast(slice_index, tl.int64) * b_len + b_start + tl.arange(0, LOOP)
        b_statistics = load_statistics(b_statistics_ptr, b_grad_lse_ptr, b_at, existing, LSE)
        signed = b
        if SIGN != 1:
            signed = b * SIGN
        ds, p = both_gradients(
            a, signed, av, bv, grad_a, grad_b, a_start, b_start, a_visible, b_visible,
            a_statistics, b_statistics, mask, seed, slice_index, scale, factor, threshold,
            keep_scale, CAUSAL, MASK, DROPOUT, EXCHANGED, PRECISION,
        )  # fmt: skip
        ds = partly_scaled(ds, factor, MASK)
        ds, p = ds.to(a_ptr.dtype.element_ty).to(DOT), p.to(a_ptr.dtype.element_ty).to(DOT)
        da, da_lost = multiply_add(da, da_lost, ds, b, PRECISION)
        dav, dav_lost = multiply_add(dav, dav_lost, p, grad_b, PRECISION)
    if SPLIT > 0:
        row: tl.constexpr = DIM + AV_DIM
        base = partial_ptr + tl.cast(index // tiles, tl.int64) * a_len * row
        store_rows(base, da * gradient_scale, a_start, present, row, DIM)
        store_rows(base + DIM, dav, a_start, present, row, AV_DIM)
    else:
        base = slice_base(da_ptr, batch, head, da_batch, da_head)
        store_rows(base, da * gradient_scale, a_start, present, da_row, DIM)
        base = slice_base(dav_ptr, batch, head, dav_batch, dav_head)
        store_rows(base, dav, a_start, present, dav_row, AV_DIM)
