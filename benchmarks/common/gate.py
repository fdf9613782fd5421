"""The correctness gate: a wrong result prints no time.

The rule for results: the relative Frobenius error of each batch entry and head against float64 is
at most twice that of the plain formula in the same dtype, plus the dtype's epsilon, so that tiny
shapes do not fail by the order of a few additions.

Rounding weights to 8-bit integers or bfloat16 is no rounding of results: beside such weights the
cosine of each token (the last dimension) with float64 has to reach `LEAST_COSINE`, of peers too.

Gradients are differences of numbers of like size, so that their errors in float32 vary by more than
a factor of two from head to head, torch's own included. There the plain formula's largest error
over all heads counts, plus 8 epsilon of float32 (for float64, of float64).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_COSINE = 0.999


def relative_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """The relative Frobenius error of each matrix (the last two dimensions) of ``expected``."""
    keep = max(0, expected.dim() - 2)
    difference = (actual.double() - expected).flatten(keep).norm(dim=-1)
    size = expected.flatten(keep).norm(dim=-1)
    return torch.where(difference == 0, 0.0, difference / size)


def verdict(
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    baseline: Sequence[Tensor],
    gradients: bool = False,
) -> str | None:
    """Why ``actual`` is wrong, or None where it is right.

    Args:
        actual: the results to judge.
        expected: the same in float64.
        baseline: the same by the plain formula in the dtype of ``actual``.
        gradients: whether they are gradients, for which the wider rule holds.
    """
    if len(actual) != len(expected):
        return f"{len(actual)} results instead of {len(expected)}"
    for index, (ours, true, plain) in enumerate(zip(actual, expected, baseline, strict=True)):
        if ours.shape != true.shape:
            return f"result {index} has shape {tuple(ours.shape)}, expected {tuple(true.shape)}"
        least = torch.finfo(ours.dtype).eps
        errors, plain_errors = relative_errors(ours, true), relative_errors(plain, true)
        if gradients:
            least = max(least, 8 * min(least, torch.finfo(torch.float32).eps))
            plain_errors = plain_errors.max().expand_as(errors)
        allowed = 2 * plain_errors + least
        # Written so that NaN counts as wrong.
        wrong = ~(errors <= allowed)
        if wrong.any():
            error, limit = errors[wrong][0].item(), allowed[wrong][0].item()
            return f"result {index} has relative error {error:.1e}, allowed {limit:.1e}"
    return None


def least_cosine(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The lowest cosine similarity of a token with what is expected; NaN where one is no number."""
    found = [
        F.cosine_similarity(ours.double(), true.double(), dim=-1).min()
        for ours, true in zip(actual, expected, strict=True)
    ]
    return float(torch.stack(found).min())


def verdict_of_cosine(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """Why results with narrow weights are wrong, or None where they are right."""
    for index, (ours, true) in enumerate(zip(actual, expected, strict=True)):
        if ours.shape != true.shape:
            return f"result {index} has shape {tuple(ours.shape)}, expected {tuple(true.shape)}"
    cosine = least_cosine(actual, expected)
    # Written so that NaN counts as wrong.
    if not cosine >= LEAST_COSINE:
        return f"a token has cosine {cosine:.5f}, must be at least {LEAST_COSINE}"
    return None
