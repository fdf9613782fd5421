"""The one rule by which a result counts as accurate.

A kernel may not be worse than what a user would write: its relative Frobenius error against the
float64 reference, for each (batch, head) slice, is at most twice that of the plain torch formula
in the same dtype, and at least eps(dtype) is granted, where the formula happens to be exact.
Twice, because a kernel adds in another order and rounds at other places; a relative norm, because
an absolute tolerance is blind to small values; per slice, because one bad head in twelve would
drown in the norm of all. The formula's error is that of its worst slice in the call: on a slice of
a few numbers it is luck, between 0 and several eps, and no yardstick.

eps(dtype) is the spacing of the dtype at 1: 1.2e-7, 7.8e-3 and 9.8e-4 for float32, bfloat16 and
float16. A floor that grew with the square root of the number of terms would be toothless: 17 times
the formula's error in bfloat16.
"""

import torch
from torch import Tensor


def slice_errors(actual: Tensor, exact: Tensor) -> Tensor:
    """Relative Frobenius error of each row; infinities must agree and count as equal."""
    actual, exact = actual.detach().double(), exact.detach().double()
    infinite = exact.isinf()
    assert torch.equal(actual.isinf(), infinite), "infinities at other places"
    assert torch.equal(actual[infinite], exact[infinite]), "infinities of the other sign"
    actual, exact = (t.masked_fill(infinite, 0.0) for t in (actual, exact))
    norm, error = exact.norm(dim=-1), (actual - exact).norm(dim=-1)
    return torch.where(norm > 0, error / norm.clamp_min(1e-300), error)


def assert_accurate(actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Every slice of `actual` is at most twice as far from `exact` as `plain` is at its worst.

    Args:
        actual: (slices, elements), what the implementation gave.
        exact: the float64 reference on the same inputs.
        plain: the plain formula in the dtype of the inputs; its dtype sets the floor.
    """
    assert actual.shape == exact.shape, f"shape {actual.shape}, expected {exact.shape}"
    if actual.numel() == 0:
        return
    error = slice_errors(actual, exact)
    assert not error.isnan().any(), "NaN in the result"
    plain_error = float(slice_errors(plain, exact).max())
    # What is 0 in exact arithmetic (hidden keys, dead rows, a softmax over one key) must be 0.
    bound = max(2 * plain_error, torch.finfo(plain.dtype).eps) * (exact.norm(dim=-1) > 0)
    worst = int((error - bound).argmax())
    assert bool((error <= bound).all()), (
        f"slice {worst}: relative error {error[worst]:.3g}, allowed {bound[worst]:.3g} "
        f"(plain formula {plain_error:.3g})"
    )
