"""Device functions of the backward kernels: dP and dS of a tile of scores."""

import triton
import triton.language as tl

from fastfusion.kernels.device.dropout import kept
from fastfusion.kernels.device.masks import EXTREME_FLOAT
from fastfusion.kernels.device.scores import product, scores
from fastfusion.kernels.device.softmax import exponentials


@triton.jit
def product_gradient(
    grad, v, seed, slice_index, q_start, k_start, threshold, keep_scale,
    DROPOUT: tl.constexpr, STREAM: tl.constexpr, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dP of a tile of scores, and the dropout factor's bits (True without dropout)."""
    dp = product(v, grad, PRECISION) if KEYS_FIRST else product(grad, v, PRECISION)
    keep = dp == dp
    if DROPOUT:
        keep = kept(
            seed, slice_index, q_start, k_start, threshold, grad.shape[0], v.shape[0], STREAM,
            KEYS_FIRST,
        )  # fmt: skip
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return dp, keep


@triton.jit
def softmax_gradient(
    x, dp, keep, shift, share, delta, grad_lse, factor, keep_scale, MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """(P with dropout, dS) of a tile, from its scores and dP; statistics come broadcast.

    Where P is 1 the row has no other key, and dP - delta is 0: said here, because delta may come
    from a product with its operands exchanged, added in another order.
    """
    p = exponentials(x, shift, factor, MASK) * share
    ds = p * (tl.where(p == 1.0, 0.0, dp - delta) + grad_lse)
    if DROPOUT:
        p = tl.where(keep, p * keep_scale, 0.0)
    return p, ds


@triton.jit
def partly_scaled(ds, factor, MASK: tl.constexpr):
    """dS as it is summed for the gradients of queries and keys."""
    if MASK >= EXTREME_FLOAT:
        return ds * factor
    else:
        return ds


@triton.jit
def gradients(
    q, k, v, grad, q_start, k_start, visible, shift, share, delta, grad_lse, mask, seed,
    slice_index, scale, factor, threshold, keep_scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, STREAM: tl.constexpr,
    KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(P with dropout, dS) of a tile of scores; the statistics of its rows come broadcast."""
    x = scores(
        q, k, q_start, k_start, visible, mask, scale, True, CAUSAL, MASK, KEYS_FIRST, PRECISION
    )
    dp, keep = product_gradient(
        grad, v, seed, slice_index, q_start, k_start, threshold, keep_scale, DROPOUT, STREAM,
        KEYS_FIRST, PRECISION,
    )  # fmt: skip
    return softmax_gradient(
        x, dp, keep, shift, share, delta, grad_lse, factor, keep_scale, MASK, DROPOUT
    )
