"""Device functions of the backward kernels: the softmax statistics of rows, from their scores."""

import triton
import triton.language as tl

from fastfusion.kernels.device.gradients import weight_gradient
from fastfusion.kernels.device.rows import load_tile
from fastfusion.kernels.device.score_policy import PADDING, visible_keys
from fastfusion.kernels.device.scores import scores
from fastfusion.kernels.device.softmax import exponentials, first_sums, inverse, shift_of
from fastfusion.kernels.device.sums import add


@triton.jit
def load_statistics(statistics_ptr, grad_lse_ptr, at, present, LSE: tl.constexpr):
    """(shift, 1 / sum, delta, d lse) of rows; 0 for those absent, which makes their P and dS 0."""
    shift = tl.load(statistics_ptr + 3 * at, mask=present, other=0.0)
    share = tl.load(statistics_ptr + 3 * at + 1, mask=present, other=0.0)
    delta = tl.load(statistics_ptr + 3 * at + 2, mask=present, other=0.0)
    return shift, share, delta, load_grad_lse(grad_lse_ptr, at, present, LSE)


@triton.jit
def load_grad_lse(grad_lse_ptr, at, present, LSE: tl.constexpr):
    """d lse of rows; 0 where nobody asked for a gradient through lse."""
    grad_lse = tl.zeros(present.shape, tl.float32)
    if LSE:
        grad_lse = tl.load(grad_lse_ptr + at, mask=present, other=0.0)
    return grad_lse


@triton.jit
def store_statistics(statistics_ptr, at, present, shift, share, delta):
    tl.store(statistics_ptr + 3 * at, shift, mask=present)
    tl.store(statistics_ptr + 3 * at + 1, share, mask=present)
    tl.store(statistics_ptr + 3 * at + 2, delta, mask=present)


@triton.jit
def row_sums(
    q, grad, q_start, k_base, k_row, v_base, v_row, policy, first, last, kv_len,
    KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, LOOP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr = False,
):  # fmt: skip
    """(maximum, sum of e, sum of e * dP) of a tile of queries over the keys [first, last) and their
    sinks, where e = exp(score - maximum)."""
    maximum, total = first_sums(policy, True, KINDS, q.shape[0], False)
    nothing = tl.zeros([q.shape[0]], tl.float32)
    total_lost, weighted, weighted_lost = nothing, nothing, nothing
    for start in range(first, last, LOOP):
        visible = visible_keys(policy.padding, start, kv_len, LOOP, PADDING & KINDS)
        k = load_tile(k_base, k_row, start, visible, DIM, WIDTH, True, DOT, TMA)
        v = load_tile(v_base, v_row, start, visible, VALUE_DIM, VALUE_WIDTH, True, DOT, TMA)
        x, _ = scores(q, k, policy, q_start, start, visible, KINDS, True, True, False, PRECISION)
        dp, _ = weight_gradient(grad, v, policy, q_start, start, KINDS, False, PRECISION)
        grown = tl.maximum(maximum, tl.max(x, 1))
        shift = shift_of(grown)
        p = exponentials(x, shift[:, None], policy, KINDS)
        alpha = exponentials(maximum, shift, policy, KINDS)
        total, total_lost = add(total * alpha, total_lost * alpha, tl.sum(p, 1))
        weighted, weighted_lost = add(weighted * alpha, weighted_lost * alpha, tl.sum(p * dp, 1))
        maximum = grown
    return maximum, total, weighted


@triton.jit
def row_statistics(
    q, grad, q_start, k_base, k_row, v_base, v_row, policy, first, last, kv_len,
    KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, LOOP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr = False,
):  # fmt: skip
    """(shift, 1 / sum, delta) of a tile of queries, in one pass over the keys [first, last)."""
    maximum, total, weighted = row_sums(
        q, grad, q_start, k_base, k_row, v_base, v_row, policy, first, last, kv_len, KINDS, DIM,
        WIDTH, VALUE_DIM, VALUE_WIDTH, LOOP, DOT, PRECISION, TMA,
    )  # fmt: skip
    share = inverse(total)
    return shift_of(maximum), share, weighted * share
