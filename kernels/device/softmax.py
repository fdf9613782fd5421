"""Device functions of the online softmax.

Exponents are of base 2. As a rule scores stay raw products, and one fma per score,
x * factor - shift, does scale, log2(e) and maximum. With a float mask they are in natural units and
the maximum is subtracted first, because a mask of finfo.min times log2(e) would be -inf. So they
are for an extreme scale, which may overflow by log2(e) alone, or make NaN of -inf; and from about
2^26 on by what the largest score loses where it is rounded to the shift. A soft cap and ALiBi need
them anyway.
"""

import triton
import triton.language as tl

from fastfusion.kernels.device.score_policy import NATURAL, SINKS
from fastfusion.kernels.device.scores import LOG2E

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def first_sums(policy, has_sink, KINDS: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr):
    """(maximum, sum of exponentials) of rows before any key: nothing, or in a call with sinks their
    sink, if `has_sink`. SCALED: the maximum is in the unit of exponents, and not of scores."""
    maximum = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS & KINDS:
        sink = policy.sink
        if not NATURAL & KINDS:
            sink = sink * LOG2E if SCALED else sink / policy.scale
        maximum = tl.where(has_sink, tl.zeros_like(maximum) + sink, maximum)
        weight = sink_weight(policy, maximum, KINDS, SCALED)
        total = tl.where(maximum == -float("inf"), 0.0, weight)
    return maximum, total


@triton.jit
def sink_weight(policy, shift, KINDS: tl.constexpr, SCALED: tl.constexpr):
    """exp(sink - maximum) of rows with this maximum, in the unit of `first_sums`. Rounded to that a
    sink would lose the same in all rows, and their log-sum-exps with it."""
    sink = tl.zeros_like(shift) + policy.sink
    if NATURAL & KINDS:
        return tl.exp2((sink - shift) * LOG2E)
    elif SCALED:
        return tl.exp2(tl.fma(sink, tl.zeros_like(shift) + LOG2E, -shift))
    else:
        return tl.exp2(tl.fma(-shift, tl.zeros_like(shift) + policy.scale, sink) * LOG2E)


@triton.jit
def scaled_maximum(maximum, policy, KINDS: tl.constexpr):
    """A maximum of scores in the unit of exponents, in which the running maximum is kept."""
    if NATURAL & KINDS:
        return maximum
    else:
        return maximum * policy.factor


@triton.jit
def shift_of(maximum):
    """What to subtract: the maximum, or 0 where no score is visible (-inf - -inf is NaN)."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def weights(x, shift, policy, KINDS: tl.constexpr):
    """exp(scores - maximum), the shift broadcast to the tile by the caller."""
    if NATURAL & KINDS:
        return tl.exp2((x - shift) * LOG2E)
    else:
        return tl.exp2(tl.fma(x, tl.zeros_like(x) + policy.factor, tl.zeros_like(x) - shift))


@triton.jit
def rescale(before, shift, KINDS: tl.constexpr):
    """By what sums are multiplied when the maximum moves from `before` to `shift`."""
    if NATURAL & KINDS:
        return tl.exp2((before - shift) * LOG2E)
    else:
        return tl.exp2(before - shift)


@triton.jit
def exponentials(x, maximum, policy, KINDS: tl.constexpr):
    """exp(scores - maximum) with the plain maximum, for gradients: the greatest is exactly 1, so
    that a softmax over one key has exactly no gradient. One operation more than `weights`."""
    if NATURAL & KINDS:
        return tl.exp2((x - maximum) * LOG2E)
    else:
        return tl.exp2((x - maximum) * policy.factor)


@triton.jit
def log_sum(maximum, total, KINDS: tl.constexpr):
    """The natural log-sum-exp; -inf where no score is visible."""
    lse = tl.log(tl.where(total == 0.0, 1.0, total))
    if NATURAL & KINDS:
        return maximum + lse
    else:
        return maximum * LN2 + lse


@triton.jit
def inverse(total):
    """1 / total; 0 where nothing is visible, so that such rows give 0."""
    return 1.0 / tl.where(total == 0.0, float("inf"), total)
