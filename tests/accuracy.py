"""The one rule by which a result counts as accurate.

A kernel may not be worse than what a user would write: its relative Frobenius error against the
float64 reference, for each (batch, head) slice, is at most twice that of the plain torch formula
in the same dtype, and at least eps(dtype) is granted, for slices where the formula happens to be
exact. Twice, because a kernel adds in another order and rounds at other places; a relative norm,
because an absolute tolerance is blind to small values; per slice, because one bad head in twelve
would drown in the norm of all.

eps(dtype) is the spacing of the dtype at 1: 1.2e-7, 7.8e-3 and 9.8e-4 for float32, bfloat16 and
float16. A floor that grew with the square root of the number of terms would be toothless: 17 times
the formula's error in bfloat16.
"""

import torch
from torch import Tensor


def slice_errors(actual: Tensor, exact: Tensor, slice_dims: int) -> Tensor:
    """Relative Frobenius error of each slice; infinities must agree and count as equal."""
    actual, exact = actual.detach().double(), exact.detach().double()
    assert actual.shape == exact.shape, f"shape {actual.shape}, expected {exact.shape}"
    infinite = exact.isinf()
    assert torch.equal(actual.isinf(), infinite), "infinities at other places"
    assert torch.equal(actual[infinite], exact[infinite]), "infinities of the other sign"
    actual, exact = (t.masked_fill(infinite, 0.0) for t in (actual, exact))
    difference = (actual - exact).flatten(slice_dims).flatten(0, slice_dims - 1)
    norm = exact.flatten(slice_dims).flatten(0, slice_dims - 1).norm(dim=-1)
    error = difference.norm(dim=-1)
    return torch.where(norm > 0, error / norm.clamp_min(1e-300), error)


def assert_accurate(actual: Tensor, exact: Tensor, plain: Tensor, slice_dims: int = 2) -> None:
    """`actual` is at most twice as far from `exact` (float64) as `plain` is, slice by slice.

    Args:
        actual: what the implementation gave.
        exact: the float64 reference on the same inputs.
        plain: the plain formula in the dtype of the inputs; its dtype sets the floor.
        slice_dims: how many leading dimensions tell slices apart: (batch, head) by default.
    """
    if exact.dim() < slice_dims + 1:
        actual, exact, plain = (
            t.reshape(*[1] * (slice_dims + 1 - t.dim()), *t.shape) for t in (actual, exact, plain)
        )
    if actual.numel() == 0:
        assert actual.shape == exact.shape
        return
    error = slice_errors(actual, exact, slice_dims)
    allowed = 2 * slice_errors(plain, exact, slice_dims)
    # What is 0 by definition (hidden keys, dead rows) must be exactly 0: no floor for it.
    exactly_zero = exact.flatten(slice_dims).flatten(0, slice_dims - 1).norm(dim=-1) == 0
    floor = torch.full_like(error, torch.finfo(plain.dtype).eps).masked_fill(exactly_zero, 0.0)
    bound = torch.maximum(allowed, floor)
    worst = int((error - bound).argmax())
    assert not error.isnan().any(), "NaN in the result"
    assert bool((error <= bound).all()), (
        f"slice {worst}: relative error {error[worst]:.3g}, allowed {bound[worst]:.3g} "
        f"(plain formula {allowed[worst] / 2:.3g})"
    )
