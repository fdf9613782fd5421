"""Device functions for sums over tiles that keep what their rounding loses."""

import triton
import triton.language as tl


@triton.jit
def add(total, lost, value):
    """(total + value, what its rounding lost), Kahan's sum.

    One float32 chain over the tiles of 4,096 values of one sign errs by four times the plain
    formula.
    """
    value = value - lost
    grown = total + value
    return grown, (grown - total) - value


@triton.jit
def nothing_lost(acc, DOT: tl.constexpr):
    """The second half of an accumulator of products: see multiply_add."""
    if tl.float32 == DOT:
        return tl.zeros_like(acc)
    else:
        return 0.0


@triton.jit
def multiply_add(acc, lost, a, b, PRECISION: tl.constexpr):
    """(acc + a @ b, what its rounding lost): Kahan's sum of tiles for float32 operands, which the
    matrix units otherwise add as one chain over all keys. 16-bit operands lose more themselves."""
    if a.dtype == tl.float32:
        value = tl.dot(a, b, -lost, input_precision=PRECISION)
        grown = acc + value
        return grown, (grown - acc) - value
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION), lost
