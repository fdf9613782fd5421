"""Device functions of the backward kernels: what the owner of a tile sums of dS."""

import triton
import triton.language as tl

from fastfusion.kernels.device.gradients import gradients, product_gradient, weight_gradient
from fastfusion.kernels.device.rows import load_rows, load_tile
from fastfusion.kernels.device.score_policy import (
    PADDING,
    SINKS,
    seen_range,
    signed,
    visible_keys,
)
from fastfusion.kernels.device.scores import scores
from fastfusion.kernels.device.softmax import (
    exponentials,
    first_sums,
    inverse,
    shift_of,
    sink_weight,
)
from fastfusion.kernels.device.statistics import load_statistics, row_statistics
from fastfusion.kernels.device.sums import add, multiply_add, nothing_lost


@triton.jit
def row_gradients(
    q_base, q_row, q_start, k_base, k_row, v_base, v_row, grad_base, grad_row, grad_lse, policy,
    first, last, q_len, kv_len, KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr,
    SINGLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr = False,
):  # fmt: skip
    """(dq before its gradient_scale, shift, 1 / sum, delta) of OWN queries; SINGLE: their keys fit
    one tile."""
    present = q_start + tl.arange(0, OWN) < q_len
    q = load_tile(q_base, q_row, q_start, present, DIM, WIDTH, True, DOT, TMA)
    q = signed(q, KINDS)
    grad = load_tile(grad_base, grad_row, q_start, present, VALUE_DIM, VALUE_WIDTH, True, DOT, TMA)
    ELEMENT: tl.constexpr = k_base.dtype if TMA else k_base.dtype.element_ty
    first, last = seen_range(policy, first, last, q_start, KINDS, OWN, LOOP)
    dq = tl.zeros([OWN, WIDTH], tl.float32)
    dq_lost = nothing_lost(dq, DOT)
    if SINGLE:
        visible = visible_keys(policy.padding, 0, kv_len, LOOP, PADDING & KINDS)
        k = load_tile(k_base, k_row, 0, visible, DIM, WIDTH, True, DOT, TMA)
        v = load_tile(v_base, v_row, 0, visible, VALUE_DIM, VALUE_WIDTH, True, DOT, TMA)
        x, derivative = scores(
            q, k, policy, q_start, 0, visible, KINDS, True, True, False, PRECISION
        )
        dp, _ = weight_gradient(grad, v, policy, q_start, 0, KINDS, False, PRECISION)
        maximum = tl.max(x, 1)
        if SINKS & KINDS:
            sink, _ = first_sums(policy, True, KINDS, OWN, False)
            maximum = tl.maximum(maximum, sink)
        shift = shift_of(maximum)
        p = exponentials(x, shift[:, None], policy, KINDS)
        total = tl.sum(p, 1)
        if SINKS & KINDS:
            total += sink_weight(policy, shift, KINDS, False)
        share = inverse(total)
        p = p * share[:, None]
        delta = tl.sum(p * dp, 1)
        ds = p * ((dp - delta[:, None]) + grad_lse[:, None])
        ds = product_gradient(ds, derivative, policy, KINDS)
        ds = ds.to(ELEMENT).to(DOT)
        dq, dq_lost = multiply_add(dq, dq_lost, ds, k, PRECISION)
    else:
        shift, share, delta = row_statistics(
            q, grad, q_start, k_base, k_row, v_base, v_row, policy, first, last, kv_len, KINDS, DIM,
            WIDTH, VALUE_DIM, VALUE_WIDTH, LOOP, DOT, PRECISION, TMA,
        )  # fmt: skip
        for start in range(first, last, LOOP):
            visible = visible_keys(policy.padding, start, kv_len, LOOP, PADDING & KINDS)
            k = load_tile(k_base, k_row, start, visible, DIM, WIDTH, True, DOT, TMA)
            v = load_tile(v_base, v_row, start, visible, VALUE_DIM, VALUE_WIDTH, True, DOT, TMA)
            _, ds, derivative = gradients(
                q, k, v, grad, q_start, start, visible, shift[:, None], share[:, None],
                delta[:, None], grad_lse[:, None], policy, KINDS, False, PRECISION,
            )  # fmt: skip
            ds = product_gradient(ds, derivative, policy, KINDS)
            ds = ds.to(ELEMENT).to(DOT)
            dq, dq_lost = multiply_add(dq, dq_lost, ds, k, PRECISION)
    return dq, shift, share, delta


@triton.jit
def key_gradients(
    state, k, v, visible, k_start, first, last, q_base, q_row, grad_base, grad_row, statistics_ptr,
    grad_lse_ptr, at, policy, q_len, KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, LOOP: tl.constexpr, LSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr = False,
):  # fmt: skip
    """(dk before its gradient_scale, dv) of a tile of keys, continued over queries [first, last)
    of a head.

    `at` is where the statistics of the head begin. The queries carry the sign of the scale. State:
    dk and what its rounding lost, dv and what its rounding lost.
    """
    dk, dk_lost, dv, dv_lost = state
    ELEMENT: tl.constexpr = q_base.dtype if TMA else q_base.dtype.element_ty
    for start in range(first, last, LOOP):
        rows = start + tl.arange(0, LOOP)
        present = tl.arange(0, LOOP) < q_len - start
        q = load_tile(q_base, q_row, start, present, DIM, WIDTH, True, DOT, TMA)
        q = signed(q, KINDS)
        grad = load_tile(
            grad_base, grad_row, start, present, VALUE_DIM, VALUE_WIDTH, True, DOT, TMA
        )
        shift, share, delta, grad_lse = load_statistics(
            statistics_ptr, grad_lse_ptr, at + rows, present, LSE
        )
        p, ds, derivative = gradients(
            q, k, v, grad, start, k_start, visible, shift[None, :], share[None, :],
            delta[None, :], grad_lse[None, :], policy, KINDS, True, PRECISION,
        )  # fmt: skip
        p = p.to(ELEMENT).to(DOT)
        ds = product_gradient(ds, derivative, policy, KINDS)
        ds = ds.to(ELEMENT).to(DOT)
        dv, dv_lost = multiply_add(dv, dv_lost, p, grad, PRECISION)
        dk, dk_lost = multiply_add(dk, dk_lost, ds, q, PRECISION)
    return dk, dk_lost, dv, dv_lost


@triton.jit
def mask_gradients(
    total, lost, row, column, q_base, q_row, k_base, k_row, v_base, v_row, grad_base, grad_row,
    statistics_ptr, grad_lse_ptr, at, policy, q_len, kv_len, KINDS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    SHARED_ROWS: tl.constexpr, SHARED_COLUMNS: tl.constexpr, LSE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(sums of dS in a tile of the mask, what their rounding lost), continued over a head.

    `at` is where the statistics of the head begin. SHARED_ROWS: one row of the mask is for all
    queries. One number may take every score of the call, hence Kahan's sum.
    """
    OWN: tl.constexpr = total.shape[0]
    LOOP: tl.constexpr = total.shape[1]
    for q_start in range(row, q_len if SHARED_ROWS else tl.minimum(row + 1, q_len), OWN):
        present = tl.arange(0, OWN) < q_len - q_start
        q = load_rows(q_base, q_start, present, q_row, DIM, WIDTH, DOT)
        q = signed(q, KINDS)
        grad = load_rows(grad_base, q_start, present, grad_row, VALUE_DIM, VALUE_WIDTH, DOT)
        shift, share, delta, grad_lse = load_statistics(
            statistics_ptr, grad_lse_ptr, at + q_start + tl.arange(0, OWN), present, LSE
        )
        last = kv_len if SHARED_COLUMNS else tl.minimum(column + 1, kv_len)
        for k_start in range(column, last, LOOP):
            visible = visible_keys(policy.padding, k_start, kv_len, LOOP, PADDING & KINDS)
            k = load_rows(k_base, k_start, visible, k_row, DIM, WIDTH, DOT)
            v = load_rows(v_base, k_start, visible, v_row, VALUE_DIM, VALUE_WIDTH, DOT)
            _, ds, _ = gradients(
                q, k, v, grad, q_start, k_start, visible, shift[:, None], share[:, None],
                delta[:, None], grad_lse[:, None], policy, KINDS, False, PRECISION,
            )  # fmt: skip
            total, lost = add(total, lost, ds)
    return total, lost


@triton.jit
def store_mask_gradient(
    dmask_ptr, tile, owner, row, column, rows_end, columns_end, SHARED_ROWS: tl.constexpr,
    SHARED_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of slice `owner` of a contiguous mask."""
    if SHARED_ROWS:
        tile = tl.sum(tile, 0, keep_dims=True)
    if SHARED_COLUMNS:
        tile = tl.sum(tile, 1, keep_dims=True)
    rows, columns = row + tl.arange(0, tile.shape[0]), column + tl.arange(0, tile.shape[1])
    at = dmask_ptr + tl.cast(owner, tl.int64) * rows_end * columns_end
    at += rows.to(tl.int64)[:, None] * columns_end + columns[None, :]
    inside = (rows < rows_end)[:, None] & (columns < columns_end)[None, :]
    tl.store(at, tile.to(dmask_ptr.dtype.element_ty), mask=inside)
