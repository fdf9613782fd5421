"""Device functions of the bidirectional backward: side a owns a tile and loops over side b.

Side a is the queries or the keys, av and bv are the values that the sides offer each other, and
grad_a is the gradient of what a gathered (so it has the dim of bv).
"""

import triton
import triton.language as tl

from fastfusion.kernels.device.dropout import kept_pair
from fastfusion.kernels.device.gradients import product_gradient, softmax_gradient
from fastfusion.kernels.device.rows import load_rows, rows_of, store_pair
from fastfusion.kernels.device.score_policy import (
    DROPOUT,
    EXCHANGED,
    PADDING,
    ROW_PADDING,
    policy_of,
    seen_range,
    signed,
    visible_keys,
)
from fastfusion.kernels.device.scores import scores
from fastfusion.kernels.device.statistics import load_statistics, row_statistics, store_statistics
from fastfusion.kernels.device.sums import multiply_add, nothing_lost


@triton.jit
def side_statistics(
    index, a, b, bv, grad, statistics_ptr, masks, numbers, heads, a_len, b_len, KINDS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    OWN: tl.constexpr, LOOP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(shift, 1 / sum, delta) of a tile of side a, whose softmax goes over side b."""
    tiles = tl.cdiv(a_len, OWN)
    start, slice_index = index % tiles * OWN, index // tiles
    batch, head = slice_index // heads, slice_index % heads
    policy = policy_of(masks, numbers, batch, head, slice_index, a_len, b_len, KINDS)
    rows = start + tl.arange(0, OWN)
    present = rows < a_len
    base, row = rows_of(a, batch, head)
    own = signed(load_rows(base, start, present, row, DIM, WIDTH, DOT), KINDS)
    base, row = rows_of(grad, batch, head)
    own_grad = load_rows(base, start, present, row, VALUE_DIM, VALUE_WIDTH, DOT)
    first, last = seen_range(policy, 0, b_len, start, KINDS, OWN, LOOP)
    b_base, b_row = rows_of(b, batch, head)
    bv_base, bv_row = rows_of(bv, batch, head)
    shift, share, delta = row_statistics(
        own, own_grad, start, b_base, b_row, bv_base, bv_row, policy, first, last, b_len, KINDS,
        DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, LOOP, DOT, PRECISION,
    )  # fmt: skip
    at = tl.cast(slice_index, tl.int64) * a_len + rows
    store_statistics(statistics_ptr, at, present, shift, share, delta)


@triton.jit
def both_gradients(
    a, b, av, bv, grad_a, grad_b, a_start, b_start, a_visible, b_visible, a_statistics,
    b_statistics, policy, KINDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(dS of both softmaxes, the softmax over a with dropout, the cap's derivative) of a tile of
    scores of a and b."""
    x, derivative = scores(
        a, b, policy, a_start, b_start, b_visible, KINDS, False, True, False, PRECISION
    )
    over_b = tl.dot(grad_a, tl.trans(bv), input_precision=PRECISION)
    over_a = tl.dot(av, tl.trans(grad_b), input_precision=PRECISION)
    keep_b, keep_a = over_b == over_b, over_a == over_a
    if DROPOUT & KINDS:
        A: tl.constexpr = a.shape[0]
        B: tl.constexpr = b.shape[0]
        if EXCHANGED & KINDS:
            keep_b = kept_pair(policy, a_start, b_start, A, B, 1, True)
            keep_a = kept_pair(policy, a_start, b_start, A, B, 0, True)
        else:
            keep_b = kept_pair(policy, a_start, b_start, A, B, 0, False)
            keep_a = kept_pair(policy, a_start, b_start, A, B, 1, False)
        over_b = tl.where(keep_b, over_b * policy.keep_scale, 0.0)
        over_a = tl.where(keep_a, over_a * policy.keep_scale, 0.0)
    shift, share, delta, grad_lse = a_statistics
    _, ds_b = softmax_gradient(
        tl.where(b_visible[None, :], x, -float("inf")), over_b, keep_b, shift[:, None],
        share[:, None], delta[:, None], grad_lse[:, None], policy, KINDS,
    )  # fmt: skip
    shift, share, delta, grad_lse = b_statistics
    p, ds_a = softmax_gradient(
        tl.where(a_visible[:, None], x, -float("inf")), over_a, keep_a, shift[None, :],
        share[None, :], delta[None, :], grad_lse[None, :], policy, KINDS,
    )  # fmt: skip
    return ds_a + ds_b, p, derivative


@triton.jit
def side_gradients(
    index, a, b, av, bv, grad_a, grad_b, a_statistics_ptr, b_statistics_ptr, a_grad_lse_ptr,
    b_grad_lse_ptr, da, dav, partial_ptr, masks, numbers, heads, a_len, b_len, splits,
    gradient_scale, KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    AV_DIM: tl.constexpr, AV_WIDTH: tl.constexpr, BV_DIM: tl.constexpr, BV_WIDTH: tl.constexpr,
    OWN: tl.constexpr, LOOP: tl.constexpr, SPLIT: tl.constexpr,
    LSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of side a and of its values: (batch * heads, splits of b, tiles of a)."""
    tiles = tl.cdiv(a_len, OWN)
    a_start = index % tiles * OWN
    slice_index = index // tiles // splits
    batch, head = slice_index // heads, slice_index % heads
    policy = policy_of(masks, numbers, batch, head, slice_index, a_len, b_len, KINDS)
    present = a_start + tl.arange(0, OWN) < a_len
    a_visible = visible_keys(policy.row_padding, a_start, a_len, OWN, ROW_PADDING & KINDS)
    base, row = rows_of(a, batch, head)
    own = load_rows(base, a_start, present, row, DIM, WIDTH, DOT)
    base, row = rows_of(av, batch, head)
    own_value = load_rows(base, a_start, a_visible, row, AV_DIM, AV_WIDTH, DOT)
    base, row = rows_of(grad_a, batch, head)
    own_grad = load_rows(base, a_start, present, row, BV_DIM, BV_WIDTH, DOT)
    at = tl.cast(slice_index, tl.int64) * a_len + a_start + tl.arange(0, OWN)
    a_statistics = load_statistics(a_statistics_ptr, a_grad_lse_ptr, at, present, LSE)
    b_base, b_row = rows_of(b, batch, head)
    bv_base, bv_row = rows_of(bv, batch, head)
    grad_b_base, grad_b_row = rows_of(grad_b, batch, head)
    ELEMENT: tl.constexpr = b_base.dtype.element_ty
    of_side = tl.zeros([OWN, WIDTH], tl.float32)
    of_value = tl.zeros([OWN, AV_WIDTH], tl.float32)
    side_lost, value_lost = nothing_lost(of_side, DOT), nothing_lost(of_value, DOT)
    first, last = 0, b_len
    if SPLIT > 0:
        first = index // tiles % splits * SPLIT
        last = tl.minimum(first + SPLIT, b_len)
    first, last = seen_range(policy, first, last, a_start, KINDS, OWN, LOOP)
    for b_start in range(first, last, LOOP):
        existing = tl.arange(0, LOOP) < b_len - b_start
        b_visible = visible_keys(policy.padding, b_start, b_len, LOOP, PADDING & KINDS)
        other = load_rows(b_base, b_start, existing, b_row, DIM, WIDTH, DOT)
        other_value = load_rows(bv_base, b_start, b_visible, bv_row, BV_DIM, BV_WIDTH, DOT)
        other_grad = load_rows(grad_b_base, b_start, existing, grad_b_row, AV_DIM, AV_WIDTH, DOT)
        b_at = tl.cast(slice_index, tl.int64) * b_len + b_start + tl.arange(0, LOOP)
        b_statistics = load_statistics(b_statistics_ptr, b_grad_lse_ptr, b_at, existing, LSE)
        ds, p, derivative = both_gradients(
            own, signed(other, KINDS), own_value, other_value, own_grad, other_grad, a_start,
            b_start, a_visible, b_visible, a_statistics, b_statistics, policy, KINDS, PRECISION,
        )  # fmt: skip
        ds = product_gradient(ds, derivative, policy, KINDS)
        ds, p = ds.to(ELEMENT).to(DOT), p.to(ELEMENT).to(DOT)
        of_side, side_lost = multiply_add(of_side, side_lost, ds, other, PRECISION)
        of_value, value_lost = multiply_add(of_value, value_lost, p, other_grad, PRECISION)
    partial = partial_ptr
    if SPLIT > 0:
        partial += tl.cast(index // tiles, tl.int64) * a_len * (DIM + AV_DIM)
    store_pair(
        of_side, of_value, gradient_scale, a_start, present, partial, da, dav, batch, head,
        SPLIT > 0, DIM, AV_DIM,
    )  # fmt: skip
