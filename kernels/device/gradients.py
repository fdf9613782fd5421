"""Device functions of the backward kernels: dP and dS of a tile of scores."""

import triton
import triton.language as tl

from fastfusion.kernels.device.dropout import kept
from fastfusion.kernels.device.score_policy import CAPPED, DROPOUT, EXTREME
from fastfusion.kernels.device.scores import product, scores
from fastfusion.kernels.device.softmax import exponentials


@triton.jit
def weight_gradient(
    grad, v, policy, q_start, k_start, KINDS: tl.constexpr, KEYS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dP of a tile of scores, and the dropout factor's bits (True without dropout)."""
    dp = product(v, grad, PRECISION) if KEYS_FIRST else product(grad, v, PRECISION)
    keep = dp == dp
    if DROPOUT & KINDS:
        keep = kept(policy, q_start, k_start, KINDS, grad.shape[0], v.shape[0], KEYS_FIRST)
        dp = tl.where(keep, dp * policy.keep_scale, 0.0)
    return dp, keep


@triton.jit
def softmax_gradient(x, dp, keep, shift, share, delta, grad_lse, policy, KINDS: tl.constexpr):
    """(P with dropout, dS) of a tile, from its scores and dP; statistics come broadcast.

    Where P is 1 the row has no other key, and dP - delta is 0: said here, because delta may come
    from a product with its operands exchanged, added in another order.
    """
    p = exponentials(x, shift, policy, KINDS) * share
    ds = p * (tl.where(p == 1.0, 0.0, dp - delta) + grad_lse)
    if DROPOUT & KINDS:
        p = tl.where(keep, p * policy.keep_scale, 0.0)
    return p, ds


@triton.jit
def product_gradient(ds, derivative, policy, KINDS: tl.constexpr):
    """What is summed for the gradients of queries and keys: dS through the soft cap, whose
    derivative `scores` gave, and with its part of an extreme scale."""
    if CAPPED & KINDS:
        ds = ds * derivative
    if EXTREME & KINDS:
        ds = ds * policy.factor
    return ds


@triton.jit
def gradients(
    q, k, v, grad, q_start, k_start, visible, shift, share, delta, grad_lse, policy,
    KINDS: tl.constexpr, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(P with dropout, dS, the cap's derivative) of a tile of scores; the statistics of its rows
    come broadcast."""
    x, derivative = scores(
        q, k, policy, q_start, k_start, visible, KINDS, True, True, KEYS_FIRST, PRECISION
    )
    dp, keep = weight_gradient(grad, v, policy, q_start, k_start, KINDS, KEYS_FIRST, PRECISION)
    p, ds = softmax_gradient(x, dp, keep, shift, share, delta, grad_lse, policy, KINDS)
    return p, ds, derivative
