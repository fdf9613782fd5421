"""Device functions of attention forward: a tile of queries over a range of keys."""

import triton
import triton.language as tl

from fastfusion.kernels.device.dropout import kept
from fastfusion.kernels.device.rows import load_tile, store_rows
from fastfusion.kernels.device.score_policy import (
    DROPOUT,
    MIXED,
    PADDING,
    first_edge,
    seen_range,
    signed,
    visible_keys,
)
from fastfusion.kernels.device.scores import scores
from fastfusion.kernels.device.softmax import (
    first_sums,
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
    state, first, last, q, q_start, k_base, k_row, v_base, v_row, policy, kv_len,
    KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, LOOP: tl.constexpr, EDGE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The state of a tile of queries, continued over the keys [first, last); EDGE: some may be
    absent or hidden.

    State: running maximum, sum and what its rounding lost, weighted values and what theirs lost.
    """
    maximum, total, total_lost, acc, acc_lost = state
    for start in range(first, last, LOOP):
        visible = visible_keys(policy.padding, start, kv_len, LOOP, EDGE and PADDING & KINDS)
        k = load_tile(k_base, k_row, start, visible, DIM, WIDTH, EDGE, DOT, TMA)
        x, _ = scores(q, k, policy, q_start, start, visible, KINDS, EDGE, EDGE, False, PRECISION)
        grown = tl.maximum(maximum, scaled_maximum(tl.max(x, 1), policy, KINDS))
        shift = shift_of(grown)
        p = weights(x, shift[:, None], policy, KINDS)
        alpha = rescale(maximum, shift, KINDS)
        total, total_lost = add(total * alpha, total_lost * alpha, tl.sum(p, 1))
        maximum = grown
        if DROPOUT & KINDS:
            keep = kept(policy, q_start, start, KINDS, q.shape[0], LOOP, False)
            p = tl.where(keep, p * policy.keep_scale, 0.0)
        v = load_tile(v_base, v_row, start, visible, VALUE_DIM, VALUE_WIDTH, EDGE, DOT, TMA)
        p = p.to(v_base.dtype if TMA else v_base.dtype.element_ty).to(DOT)
        if tl.float32 == DOT:
            acc_lost = acc_lost * alpha[:, None]
        acc, acc_lost = multiply_add(acc * alpha[:, None], acc_lost, p, v, PRECISION)
    return maximum, total, total_lost, acc, acc_lost


@triton.jit
def attend(
    q_base, q_row, q_start, k_base, k_row, v_base, v_row, policy, first, last, q_len, kv_len,
    has_sink, KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr = False,
):  # fmt: skip
    """(maximum, total, acc) of OWN queries of one head over the keys [first, last), and their sinks
    if this program `has_sink` of a call with sinks.

    Tiles of keys that all queries see whole come first, without a comparison per score; the last
    tile, the diagonal and whatever padding may hide follow. Where a window begins they are mixed.
    """
    present = q_start + tl.arange(0, OWN) < q_len
    q = load_tile(q_base, q_row, q_start, present, DIM, WIDTH, True, DOT, TMA)
    q = signed(q, KINDS)
    first, last = seen_range(policy, first, last, q_start, KINDS, OWN, LOOP)
    acc = tl.zeros([OWN, VALUE_WIDTH], tl.float32)
    maximum, total = first_sums(policy, has_sink, KINDS, OWN, True)
    state = (maximum, total, tl.zeros([OWN], tl.float32), acc, nothing_lost(acc, DOT))
    edge = first_edge(policy, first, last, q_start, KINDS, LOOP)
    if not MIXED & KINDS:
        state = attend_range(
            state, first, edge, q, q_start, k_base, k_row, v_base, v_row, policy, kv_len, KINDS,
            DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, LOOP, False, DOT, PRECISION, TMA,
        )  # fmt: skip
    maximum, total, _, acc, _ = attend_range(
        state, edge, last, q, q_start, k_base, k_row, v_base, v_row, policy, kv_len, KINDS, DIM,
        WIDTH, VALUE_DIM, VALUE_WIDTH, LOOP, True, DOT, PRECISION, TMA,
    )  # fmt: skip
    return maximum, total, acc


@triton.jit
def store_results(
    out, out_row, lse_ptr, slice_index, maximum, total, acc, start, length,
    VALUE_DIM: tl.constexpr, KINDS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """The outputs of a tile of queries from `start` on, of `length`, and their log-sum-exps."""
    rows = start + tl.arange(0, acc.shape[0])
    present = rows < length
    store_rows(out, acc * inverse(total)[:, None], start, present, out_row, VALUE_DIM)
    if LSE:
        at = lse_ptr + tl.cast(slice_index, tl.int64) * length + rows
        tl.store(at, log_sum(maximum, total, KINDS), mask=present)
