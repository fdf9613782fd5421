"""Device functions for one tile of scores.

It holds Q queries by K keys, or K by Q where a kernel wants the keys first (so that its second
product takes the tile as it lies in registers).
"""

import triton
import triton.language as tl

from fastfusion.kernels.device.score_policy import (
    BIASED,
    BOOL_MASK,
    BY_OFFSET,
    CAPPED,
    FLOAT_MASK,
    LOWER,
    NATURAL,
    POSITIONS,
    PREFIX,
    ROW_PREFIX,
    SEGMENTS,
    SHAPED,
    UPPER,
)

LOG2E = tl.constexpr(1.4426950408889634)
# tanh is 1 in float32 from here on.
SATURATED = tl.constexpr(9.02)


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
def times(x, factor):
    """x * factor, rounded: as a plain product it would become one fma with what follows, and the
    largest score less the maximum not 0."""
    return tl.fma(x, tl.zeros_like(x) + factor, tl.zeros_like(x))


@triton.jit
def polynomial(x, a, b, c, d):
    """a x^4 + b x^3 + c x^2 + d x + 1."""
    zero = tl.zeros_like(x)
    value = tl.fma(zero + a, x, zero + b)
    value = tl.fma(value, x, zero + c)
    value = tl.fma(value, x, zero + d)
    return tl.fma(value, x, zero + 1.0)


@triton.jit
def capped(x, policy):
    """cap * tanh(x / cap), of a cap; tanh(y) / y is a rational function of y^2 that errs by 2e-8
    and is 1 at 0, so that small scores stay what they are."""
    bound = SATURATED * policy.cap  # unlike a minimum, `where` keeps NaN
    x = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
    y = x * policy.inverse_cap
    square = y * y
    top = polynomial(square, 1.338442235e-8, 2.063592829e-5, 3.497464604e-3, 1.338269328e-1)
    bottom = polynomial(square, 7.790306204e-7, 3.288528326e-4, 2.588438783e-2, 4.671601454e-1)
    return times(x, top / bottom)


@triton.jit
def cap_derivative(x, policy):
    """1 - tanh^2 of x / cap, but for the differences, in which nothing is left of a score that is
    far beyond the cap."""
    power = tl.exp2(tl.abs(x * policy.inverse_cap) * (-2.0 * LOG2E))
    return 4.0 * power / ((1.0 + power) * (1.0 + power))


@triton.jit
def seen(policy, rows, keys, q_start, k_start, KINDS: tl.constexpr):
    """Which scores bounds and segments leave of the tile of rows and keys from these starts on."""
    offset = k_start - q_start
    if UPPER & KINDS:
        inside = rows - keys >= offset - policy.upper
        if PREFIX & KINDS:
            inside = inside | (keys < policy.prefix - k_start)
    if LOWER & KINDS:
        near = rows - keys <= offset - policy.lower
        if ROW_PREFIX & KINDS:
            near = near | (rows < policy.prefix - q_start)
        inside = inside & near if UPPER & KINDS else near
    if SEGMENTS & KINDS:
        of_row = tl.load(
            policy.row_segments + q_start + rows, mask=rows < policy.row_len - q_start, other=0
        )
        of_key = tl.load(
            policy.segments + k_start + keys, mask=keys < policy.column_len - k_start, other=0
        )
        inside = inside & (of_row == of_key) if (UPPER | LOWER) & KINDS else of_row == of_key
    return inside


@triton.jit
def positions(policy, rows, keys, q_start, k_start, KINDS: tl.constexpr):
    """What the position table adds to the tile of rows and keys from these starts on: NaN where the
    index has no entry of it, which the kernels of a GPU cannot raise."""
    # The lower half of 64 bits, which take twice the registers: 80 bytes spill beside 64 rows of
    # backward on sm_80.
    index = policy.index.to(tl.pointer_type(tl.int32), bitcast=True)
    if BY_OFFSET & KINDS:
        at = index + 2 * (policy.row_len - 1 + k_start - q_start) + (2 * keys - 2 * rows)
    else:
        at = index + 2 * (tl.cast(q_start, tl.int64) * policy.column_len + k_start)
        at += rows * (2 * policy.column_len) + 2 * keys
    inside = (rows < policy.row_len - q_start) & (keys < policy.column_len - k_start)
    number = tl.load(at, mask=inside, other=0)
    is_entry = number.to(tl.uint32, bitcast=True) < policy.entries
    at = policy.table + number * policy.entry
    return tl.load(at, mask=is_entry, other=float("nan"))


@triton.jit
def scores(
    q, k, policy, q_start, k_start, visible, KINDS: tl.constexpr, EDGE: tl.constexpr,
    BOUNDED: tl.constexpr, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(one tile of scores, -inf where hidden: raw products, or in natural units; the derivative of
    the soft cap, of a capped call).

    EDGE says that the tile may hold keys that are absent or hidden, BOUNDED that it may hold some
    outside of the bounds.
    """
    rows, keys = tl.arange(0, q.shape[0]), tl.arange(0, k.shape[0])
    if KEYS_FIRST:
        x = product(k, q, PRECISION)
        rows, keys, shown = rows[None, :], keys[:, None], visible[:, None]
    else:
        x = product(q, k, PRECISION)
        rows, keys, shown = rows[:, None], keys[None, :], visible[None, :]
    derivative = x
    if NATURAL & KINDS and (not FLOAT_MASK & KINDS or SHAPED & KINDS):
        x = times(x, policy.scale)
    if CAPPED & KINDS:
        derivative = cap_derivative(x, policy)
        x = capped(x, policy)
    if BIASED & KINDS:
        distance = tl.abs(rows - keys + (q_start + policy.diagonal - k_start)).to(tl.float32)
        x = tl.fma(distance, tl.zeros_like(x) - policy.slope, x)
    if POSITIONS & KINDS:
        x = x + positions(policy, rows, keys, q_start, k_start, KINDS)
    if (BOOL_MASK | FLOAT_MASK) & KINDS:
        base = policy.mask + tl.cast(q_start, tl.int64) * policy.mask_row
        base += tl.cast(k_start, tl.int64) * policy.mask_column
        inside = (rows < policy.mask_rows - q_start) & (keys < policy.mask_columns - k_start)
        at = base + (rows * policy.mask_row + keys * policy.mask_column)
        value = tl.load(at, mask=inside, other=0)
        if BOOL_MASK & KINDS:
            x = tl.where(value != 0, x, -float("inf"))
        elif SHAPED & KINDS:
            x = x + value.to(tl.float32)
        else:
            x = tl.fma(x, tl.zeros_like(x) + policy.scale, value.to(tl.float32))
    if BOUNDED and (UPPER | LOWER | SEGMENTS) & KINDS:
        inside = seen(policy, rows, keys, q_start, k_start, KINDS)
        if EDGE:
            inside = shown & inside
        x = tl.where(inside, x, -float("inf"))
    elif EDGE:
        x = tl.where(shown, x, -float("inf"))
    return x, derivative
