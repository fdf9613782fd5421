"""How good diagnoses are: accuracy, calibration, and whether the words look at the finding."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastfusion.applications.diagnosis.data import Cases
from fastfusion.applications.diagnosis.model import GRID, Diagnoser

BINS = 15


@torch.inference_mode()
def logits_of(model: nn.Module, cases: Cases, chunk: int = 250) -> Tensor:
    """Logits (cases, diagnoses)."""
    parts = [slice(first, first + chunk) for first in range(0, len(cases), chunk)]
    return torch.cat([model(cases.images[some], cases.tokens[some]) for some in parts])


def accuracy(logits: Tensor, cases: Cases) -> float:
    """The share of right diagnoses, from 0 to 1."""
    return (logits.argmax(dim=1) == cases.diagnosis).double().mean().item()


def calibration_error(logits: Tensor, cases: Cases) -> float:
    """Expected calibration error: how far the probability of the chosen diagnosis is from how often
    it is right, over bins of equal width (Guo et al., 2017, section 2)."""
    probability, chosen = logits.softmax(dim=1).max(dim=1)
    right = (chosen == cases.diagnosis).double()
    bins = (probability * BINS).long().clamp(max=BINS - 1)
    total = torch.zeros(BINS, dtype=torch.float64)
    total.index_add_(0, bins, right - probability.double())
    return (total.abs().sum() / len(cases)).item()


def fit_temperature(logits: Tensor, cases: Cases) -> Tensor:
    """What logits are to be divided by for the least cross-entropy on cases not learnt from."""
    candidates = torch.logspace(-1, 1, 401)
    losses = [functional.cross_entropy(logits / t, cases.diagnosis) for t in candidates]
    return candidates[int(torch.stack(losses).argmin())]


def finding_tokens(new: Tensor) -> Tensor:
    """Tokens whose 8x8 pixels are covered by an opacity to an eighth: bool (n, 64) of masks
    (n, 64, 64)."""
    size = new.shape[-1] // GRID
    cells = new.unflatten(1, (GRID, size)).unflatten(3, (GRID, size)).float().mean(dim=(2, 4))
    return cells.flatten(1) >= 1 / 8


def over_words(attention: Tensor, tokens: Tensor) -> Tensor:
    """The mean (n, 64) of the attention (n, length, 64) of the words that are there."""
    word = (tokens != 0).unsqueeze(2)
    return (attention * word).sum(dim=1) / word.sum(dim=1)


@torch.inference_mode()
def region_iou(model: Diagnoser, cases: Cases) -> float:
    """Intersection over union of the finding's tokens and as many of the most attended ones, mean
    over the cases that have a new finding."""
    truth = finding_tokens(cases.new)
    there = truth.any(dim=1)
    _, attention = model(cases.images[there], cases.tokens[there], need_weights=True)
    mean = over_words(attention, cases.tokens[there])
    truth = truth[there]
    rank = mean.argsort(dim=1, descending=True).argsort(dim=1)
    looked = rank < truth.sum(dim=1, keepdim=True)
    return ((looked & truth).sum(dim=1) / (looked | truth).sum(dim=1)).double().mean().item()
