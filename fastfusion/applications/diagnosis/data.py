"""Phantoms of a chest with a finding, and reports: what neither tells alone, both tell together.

Everything here is drawn by a generator and means nothing in medicine. A picture holds a pair of
lungs and, in two of three cases, a new opacity, round or diffuse, at times too faint to see. In
half of all cases it also holds an old opacity of either kind in the other lung, of which the report
says that it is known, and on which side. The report also says whether the complaint came suddenly
or slowly; some reports do not say so clearly. The diagnosis follows from the new opacity and the
complaint.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfusion.data.easy_vqa import PADDING, UNKNOWN, Vocabulary

SIZE = 64  # pixels
OPACITIES = ("none", "round", "diffuse")
# By opacity, then by complaint: sudden or slow.
DIAGNOSES = ("bronchitis", "asthma", "abscess", "tumour", "pneumonia", "fibrosis")
SUDDEN = (
    "fever and cough since yesterday",
    "sudden chills and high temperature",
    "acute pain on breathing for two days",
    "coughing with fever for three days",
)
SLOW = (
    "weight loss over several months",
    "breathless for a year and slowly worse",
    "tired and losing weight for many weeks",
    "dry cough for months without fever",
)
UNCLEAR = ("feels unwell and has a cough", "comes because of a cough")
PEOPLE = ("woman", "man", "patient")
KNOWN = (
    "known opacity in the {side} lung unchanged",
    "old scar in the {side} lung stable since last year",
    "the finding in the {side} lung was there before",
)
NOTHING_KNOWN = ("no earlier findings", "no earlier pictures to compare")
SIDES = ("left", "right")
MAX_WORDS = 24
LUNGS = (19.5, 44.5)  # the middles of the left and of the right one, as the picture shows them

Uniform = Callable[..., Tensor]  # from where to where, and the shape behind the number of cases


@dataclass(frozen=True)
class Cases:
    """Cases as tensors; `reports` are their texts."""

    images: Tensor  # float32 (n, 1, 64, 64), about from 0 to 1
    tokens: Tensor  # int64 (n, MAX_WORDS)
    diagnosis: Tensor  # int64 (n,): index into DIAGNOSES
    new: Tensor  # bool (n, 64, 64): where the new opacity is, nowhere if there is none
    reports: list[str]

    def __len__(self) -> int:
        return len(self.diagnosis)

    def __getitem__(self, some: slice) -> "Cases":
        tensors = self.images[some], self.tokens[some], self.diagnosis[some], self.new[some]
        return Cases(*tensors, self.reports[some])


def vocabulary() -> Vocabulary:
    """All words of reports."""
    sentences = (*SUDDEN, *SLOW, *UNCLEAR, *PEOPLE, *KNOWN, *NOTHING_KNOWN, *SIDES)
    return Vocabulary(
        [PADDING, UNKNOWN, *sorted({w for s in sentences for w in s.split() if "{" not in w})]
    )


def draw(count: int, generator: torch.Generator, words: Vocabulary | None = None) -> Cases:
    """Draw cases; the same generator, the same cases."""

    def choose(options: int) -> Tensor:
        return torch.randint(options, (count,), generator=generator)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    kind, slow, side = choose(3), choose(2), choose(2)
    old = choose(2) == 1
    images, lungs = _chests(count, uniform)
    # A new opacity in the lung of `side`, of many contrasts; an old one in the other.
    new = _opacity(kind, side, uniform)
    old_kind = torch.where(old, 1 + choose(2), 0)
    earlier = _opacity(old_kind, 1 - side, uniform)
    images = images + uniform(0.1, 0.5, 1, 1) * new + uniform(0.25, 0.5, 1, 1) * earlier
    images = images + 0.06 * torch.randn(images.shape, generator=generator)
    place = (new > 0.5) & lungs

    unclear = uniform(0, 1) < 0.1
    picks = [choose(n).tolist() for n in (4, 2, 3, 3, 2)]
    reports = []
    for i in range(count):
        if unclear[i]:
            complaint = UNCLEAR[picks[1][i]]
        else:
            complaint = (SLOW if slow[i] else SUDDEN)[picks[0][i]]
        other = SIDES[1 - int(side[i])]
        known = KNOWN[picks[3][i]].format(side=other) if old[i] else NOTHING_KNOWN[picks[4][i]]
        reports.append(f"{PEOPLE[picks[2][i]]} {complaint} {known}")
    tokens = (words or vocabulary()).encode(reports, MAX_WORDS)
    return Cases(images.unsqueeze(1), tokens, 2 * kind + slow, place, reports)


def _grid() -> tuple[Tensor, Tensor]:
    line = torch.arange(SIZE) + 0.5
    return line.view(1, 1, -1), line.view(1, -1, 1)


def _ellipse(x: Tensor, y: Tensor, wide: Tensor, high: Tensor, edge: float) -> Tensor:
    """1 inside and 0 outside of ellipses (n, 64, 64), with a soft edge."""
    across, down = _grid()
    distance = ((across - x) / wide).square() + ((down - y) / high).square()
    return torch.sigmoid((1 - distance.sqrt()) * edge)


def _chests(count: int, uniform: Uniform) -> tuple[Tensor, Tensor]:
    """Pictures (n, 64, 64) of a bright chest with two dark lungs, and where the lungs are."""
    body = _ellipse(32 + uniform(-1, 1, 1, 1), 34 + uniform(-1, 1, 1, 1),
                    uniform(27, 30, 1, 1), uniform(26, 29, 1, 1), 12.0)  # fmt: skip
    wide, high = uniform(8.5, 10, 1, 1), uniform(16, 19, 1, 1)
    left, right = (
        _ellipse(torch.full((count, 1, 1), x), torch.full((count, 1, 1), 34.0), wide, high, 8.0)
        for x in LUNGS
    )
    lungs = torch.maximum(left, right)
    return 0.55 * body - 0.35 * lungs + 0.1, lungs > 0.5


def _opacity(kind: Tensor, side: Tensor, uniform: Uniform) -> Tensor:
    """Opacities (n, 64, 64) from 0 to 1: a disc, or a group of soft spots; nothing for kind 0."""
    middle = torch.tensor(LUNGS)[side].view(-1, 1, 1)
    x, y = middle + uniform(-3, 3, 1, 1), 34 + uniform(-9, 9, 1, 1)
    radius = uniform(4, 6, 1, 1)
    disc = _ellipse(x, y, radius, radius, 10.0)
    diffuse = torch.zeros_like(disc)
    for _ in range(5):
        spot_x, spot_y = x + uniform(-4, 4, 1, 1), y + uniform(-6, 6, 1, 1)
        spread = uniform(2.0, 3.5, 1, 1)
        across, down = _grid()
        distance = (across - spot_x).square() + (down - spot_y).square()
        diffuse = torch.maximum(diffuse, torch.exp(-distance / (2 * spread.square())))
    kind = kind.view(-1, 1, 1)
    return torch.where(kind == 1, disc, torch.where(kind == 2, diffuse, 0.0))
