"""Training of sentiment: ``python -m fastfusion train sentiment``.

In some samples one modality is missing, or two are, so that the model learns to do without.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion.applications.sentiment.data import MODALITIES, Opinions, make
from fastfusion.applications.sentiment.model import (
    FORMAT,
    Checkpoint,
    Config,
    OneModality,
    SpokenSentiment,
)
from fastfusion.applications.training import Outcome, Schedule, Training, shuffled

LEARNING, TESTING = 4000, 2000  # samples
TEST_SEED = 1_000_003  # of the test samples; those to learn from have the seed of the settings
SUBSETS = tuple(
    kept for count in (3, 2, 1) for kept in combinations(MODALITIES, count)
)  # of modalities, all of them first
CHUNK = 500


@dataclass(frozen=True)
class Settings(Schedule):
    """The schedule and augmentation."""

    epochs: int = 10
    batch_size: int = 64
    lr: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.02
    missing: float = 0.25  # share of the samples without some modality
    noise: float = 0.1  # added to the voice
    dimmed: float = 0.2  # how far the light of the faces varies


class Batches:
    """All samples in random order, noisy, some without a modality or two.

    Args:
        missing: share of the samples that are; the modalities that stay are drawn from `SUBSETS`.
    """

    def __init__(self, opinions: Opinions, settings: Settings, missing: float) -> None:
        self.opinions, self.settings, self.missing = opinions, settings, missing

    def __len__(self) -> int:
        return max(1, len(self.opinions) // self.settings.batch_size)

    def __call__(self, generator: torch.Generator) -> Iterator[Opinions]:
        for numbers in shuffled(len(self.opinions), self.settings.batch_size, generator):
            yield self.augment(self.opinions.take(numbers), generator)

    def augment(self, some: Opinions, generator: torch.Generator) -> Opinions:
        """A voice of another pitch and loudness, noise, another light, and what goes missing."""
        count = len(some)
        audio = some.audio.clone()
        audio[:, :, :2] += 0.2 * torch.randn(count, 1, 2, generator=generator)
        audio += self.settings.noise * torch.randn(audio.shape, generator=generator)
        light = 1 + self.settings.dimmed * (2 * torch.rand(count, 1, 1, 1, generator=generator) - 1)
        hit = torch.rand(count, generator=generator) < self.missing
        kept = torch.randint(1, len(SUBSETS), (count,), generator=generator)
        gone = {
            f"{name}_padding": vars(some)[f"{name}_padding"]
            | (hit & torch.tensor([name not in subset for subset in SUBSETS])[kept]).unsqueeze(1)
            for name in MODALITIES
        }
        return Opinions(**(vars(some) | gone | {"audio": audio, "video": some.video * light}))


def model_inputs(some: Opinions) -> tuple[Tensor, ...]:
    """The arguments of :class:`SpokenSentiment`, cut to the longest of each modality."""
    cut = {}
    for name in MODALITIES:
        padding = vars(some)[f"{name}_padding"]
        length = max(1, int((~padding).sum(dim=1).max()))
        cut[name], cut[f"{name}_padding"] = vars(some)[name][:, :length], padding[:, :length]
    return (
        *(cut[name] for name in MODALITIES),
        *(cut[f"{name}_padding"] for name in MODALITIES),
    )


def model_step(model: SpokenSentiment) -> Callable[[Opinions], Outcome]:
    """Cross-entropy of the sentiment."""

    def step(batch: Opinions) -> Outcome:
        logits = model(*model_inputs(batch))
        return Outcome.of(nn.functional.cross_entropy(logits, batch.label), logits, batch.label)

    return step


def alone_step(model: OneModality) -> Callable[[Opinions], Outcome]:
    """Cross-entropy of the sentiment, from one modality."""

    def step(batch: Opinions) -> Outcome:
        logits = model(*_alone_inputs(model, batch))
        return Outcome.of(nn.functional.cross_entropy(logits, batch.label), logits, batch.label)

    return step


def _alone_inputs(model: OneModality, some: Opinions) -> tuple[Tensor, Tensor]:
    return vars(some)[model.modality], vars(some)[f"{model.modality}_padding"]


@torch.inference_mode()
def predict(model: nn.Module, opinions: Opinions) -> Tensor:
    """The class (samples,) that a model, or one of a single modality, gives to every sample."""
    parts = []
    for numbers in torch.arange(len(opinions)).split(CHUNK):
        some = opinions.take(numbers)
        inputs: tuple[Tensor, ...] = (
            _alone_inputs(model, some) if isinstance(model, OneModality) else model_inputs(some)
        )
        parts.append(model(*inputs).argmax(dim=1))
    return torch.cat(parts)


def accuracy(model: nn.Module, opinions: Opinions) -> float:
    """The share of right classes, from 0 to 1."""
    return (predict(model, opinions) == opinions.label).double().mean().item()


def with_subsets(model: SpokenSentiment, opinions: Opinions) -> dict[str, float]:
    """The accuracy with every set of modalities that can be left, by their names."""
    return {
        " + ".join(kept): accuracy(
            model, opinions.without(*(name for name in MODALITIES if name not in kept))
        )
        for kept in SUBSETS
    }


def train(training: Training[Settings]) -> None:
    """Train a baseline per modality and, unless it is ``baseline_only``, the model; write all.

    `limit` is of the samples to learn from, and as many to test with.
    """
    settings, limit, say = training.settings, training.limit, training.say
    learning = make(min(limit or LEARNING, LEARNING), settings.seed)
    testing = make(min(limit or TESTING, TESTING), TEST_SEED + settings.seed)
    say(
        f"sentiment: {len(learning):,} synthetic samples to learn from, {len(testing):,} to test "
        f"with; {torch.get_num_threads()} thread(s)"
    )
    config = Config()
    alone, results = {}, dict[str, Any]()
    for name in MODALITIES:
        torch.manual_seed(settings.seed)
        alone[name] = OneModality(config, name)
        whole = Batches(learning, settings, missing=0.0)
        training.stage(f"{name} alone", alone[name], alone_step(alone[name]), whole)
        results[f"{name}_alone"] = accuracy(alone[name], testing)
        say(f"{name} alone: {results[f'{name}_alone']:.2%} of the test samples right")

    model = None
    if not training.baseline_only:
        torch.manual_seed(settings.seed)
        model = SpokenSentiment(config)
        batches = Batches(learning, settings, settings.missing)
        training.stage("model", model, model_step(model), batches)
        results["by_modalities"] = with_subsets(model, testing)
        results["accuracy"] = results["by_modalities"][" + ".join(MODALITIES)]
        for kept, share in results["by_modalities"].items():
            say(f"{kept}: {share:.2%} of the test samples right")
    made = Checkpoint(config, model, alone)
    training.finish(FORMAT, made.networks(), made.metadata(), results)
