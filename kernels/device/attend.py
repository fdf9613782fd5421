"""Device functions of attention forward: a tile of queries over a range of keys."""

import triton
import triton.language as tl

from fastfusion.kernels.device.dropout import kept
from fastfusion.kernels.device.masks import seen_range, visible_keys
from fastfusion.kernels.device.rows import load_tile, store_rows
from fastfusion.kernels.device.scores import scores
from fastfusion.kernels.device.softmax import (
    inverse,
    log_sum,
    rescale,
    scaled_maximum,
    shift_of,
    weights,
)
from fastfusion.kernels.device.sums import add, multiply_add, nothing_lost


@triton.jit
def attend_range(
    state, first, last, q, q_start, k_base, k_row, v_base, v_row, mask, padding, seed, slice_index,
    kv_len, scale, factor, threshold, keep_scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    LOOP: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    PADDING: tl.constexpr, DROPOUT: tl.constexpr, STREAM: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The state of a tile of queries, continued over the keys [first, last).

    State: running maximum, sum and what its rounding lost, weighted values and what theirs lost.
    """
    maximum, total, total_lost, acc, acc_lost = state
    for start in range(first, last, LOOP):
        visible = visible_keys(padding, start, kv_len, LOOP, PADDING)
        k = load_tile(k_base, k_row, start, visible, DIM, WIDTH, EDGE, DOT, TMA)
        x = scores(
            q, k, q_start, start, visible, mask, scale, EDGE, CAUSAL, MASK, False, PRECISION
        )  # fmt: skip
        grown = tl.maximum(maximum, scaled_maximum(tl.max(x, 1), factor, MASK))
        shift = shift_of(grown)
        p = weights(x, shift[:, None], factor, MASK)
        alpha = rescale(maximum, shift, MASK)
        total, total_lost = add(total * alpha, total_lost * alpha, tl.sum(p, 1))
        maximum = grown
        if DROPOUT:
            keep = kept(
                seed, slice_index, q_start, start, threshold, q.shape[0], LOOP, STREAM, False
            )
            p = tl.where(keep, p * keep_scale, 0.0)
        v = load_tile(v_base, v_row, start, visible, VALUE_DIM, VALUE_WIDTH, EDGE, DOT, TMA)
        p = p.to(v_base.dtype if TMA else v_base.dtype.element_ty).to(DOT)
        if tl.float32 == DOT:
            acc_lost = acc_lost * alpha[:, None]
        acc, acc_lost = multiply_add(acc * alpha[:, None], acc_lost, p, v, PRECISION)
    return maximum, total, total_lost, acc, acc_lost


@triton.jit
def attend(
    q_base, q_row, q_start, k_base, k_row, v_base, v_row, mask, padding, seed, slice_index,
    first, last, q_len, kv_len, scale, factor, threshold, keep_scale,
    SIGN: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, PADDING: tl.constexpr, DROPOUT: tl.constexpr, STREAM: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr = False,
):  # fmt: skip
    """(maximum, total, acc) of OWN queries of one head over the keys [first, last).

    Tiles of keys that all queries see whole come first, without a comparison per score; the last
    tile, the diagonal and whatever padding may hide follow.
    """
    present = q_start + tl.arange(0, OWN) < q_len
    q = load_tile(q_base, q_row, q_start, present, DIM, WIDTH, True, DOT, TMA)
    if SIGN != 1:
        q = q * SIGN
    diagonal = mask[5]
    first, last = seen_range(first, last, q_start, diagonal, OWN, LOOP, CAUSAL)
    acc = tl.zeros([OWN, VALUE_WIDTH], tl.float32)
    total = tl.zeros([OWN], tl.float32)
    maximum = tl.full([OWN], -float("inf"), tl.float32)
    state = (maximum, total, total, acc, nothing_lost(acc, DOT))
    edge = first
    if not PADDING and CAUSAL != -1:
        edge = last // LOOP * LOOP
        if CAUSAL == 1:
            edge = tl.minimum(edge, tl.maximum(q_start + diagonal + 1, 0) // LOOP * LOOP)
        state = attend_range(
            state, first, edge, q, q_start, k_base, k_row, v_base, v_row, mask, padding, seed,
            slice_index, kv_len, scale, factor, threshold, keep_scale, DIM, WIDTH, VALUE_DIM,
            VALUE_WIDTH, LOOP, False, 0, MASK, False, DROPOUT, STREAM, DOT, PRECISION, TMA,
        )  # fmt: skip
    maximum, total, _, acc, _ = attend_range(
        state, edge, last, q, q_start, k_base, k_row, v_base, v_row, mask, padding, seed,
        slice_index, kv_len, scale, factor, threshold, keep_scale, DIM, WIDTH, VALUE_DIM,
        VALUE_WIDTH, LOOP, True, CAUSAL, MASK, PADDING, DROPOUT, STREAM, DOT, PRECISION, TMA,
    )  # fmt: skip
    return maximum, total, acc


@triton.jit
def store_results(
    out, out_row, lse_ptr, slice_index, maximum, total, acc, start, length,
    VALUE_DIM: tl.constexpr, MASK: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """The outputs of a tile of queries from `start` on, of `length`, and their log-sum-exps."""
    rows = start + tl.arange(0, acc.shape[0])
    present = rows < length
    store_rows(out, acc * inverse(total)[:, None], start, present, out_row, VALUE_DIM)
    if LSE:
        at = lse_ptr + tl.cast(slice_index, tl.int64) * length + rows
        tl.store(at, log_sum(maximum, total, MASK), mask=present)
