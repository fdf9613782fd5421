"""Training of diagnoses: ``python -m fastfusion train diagnosis``."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from fastfusion.applications.diagnosis import data
from fastfusion.applications.diagnosis.data import Cases
from fastfusion.applications.diagnosis.evaluate import (
    accuracy,
    calibration_error,
    finding_tokens,
    fit_temperature,
    logits_of,
    over_words,
    region_iou,
)
from fastfusion.applications.diagnosis.model import (
    FORMAT,
    Checkpoint,
    Config,
    Diagnoser,
    ImageOnly,
    ReportOnly,
)
from fastfusion.applications.training import Outcome, Schedule, Training
from fastfusion.data.easy_vqa import Vocabulary

TEST_CASES, TEST_SEED = 2000, 1_000_001
HELD_OUT, HELD_OUT_SEED = 1000, 1_000_002  # for the temperature


@dataclass(frozen=True)
class Settings(Schedule):
    """The schedule; no case is seen twice."""

    epochs: int = 12
    batch_size: int = 64
    cases: int = 8192  # of an epoch
    attention_loss: float = 0.05


class Batches:
    """New cases every time."""

    def __init__(self, words: Vocabulary, settings: Settings) -> None:
        self.words, self.settings = words, settings

    def __len__(self) -> int:
        return max(1, self.settings.cases // self.settings.batch_size)

    def __call__(self, generator: torch.Generator) -> Iterator[Cases]:
        for _ in range(len(self)):
            yield data.draw(self.settings.batch_size, generator, self.words)


def half_step(model: nn.Module) -> Callable[[Cases], Outcome]:
    """Cross-entropy of the diagnoses of one modality."""

    def step(cases: Cases) -> Outcome:
        logits = model(cases.images, cases.tokens)
        return Outcome.of(
            functional.cross_entropy(logits, cases.diagnosis), logits, cases.diagnosis
        )

    return step


def model_step(model: Diagnoser, attention_loss: float) -> Callable[[Cases], Outcome]:
    """Cross-entropy, and a small loss on attention of the words that misses the new finding."""

    def step(cases: Cases) -> Outcome:
        logits, attention = model(cases.images, cases.tokens, need_weights=True)
        truth = finding_tokens(cases.new)
        on_finding = (over_words(attention, cases.tokens) * truth).sum(dim=1)[truth.any(dim=1)]
        loss = functional.cross_entropy(logits, cases.diagnosis)
        loss = loss - attention_loss * on_finding.clamp(min=1e-6).log().mean()
        return Outcome.of(loss, logits, cases.diagnosis)

    return step


def test_cases(words: Vocabulary, count: int = TEST_CASES) -> Cases:
    """The cases that results are of, always the same."""
    return data.draw(count, torch.Generator().manual_seed(TEST_SEED), words)


def train(training: Training[Settings]) -> None:
    """Train both halves and, unless it is ``baseline_only``, the model; write all.

    `limit` is of the cases that are drawn for each purpose.
    """
    settings, limit, say = training.settings, training.limit, training.say
    words = data.vocabulary()
    config = Config(words=len(words))
    if limit is not None:
        settings = replace(settings, cases=min(settings.cases, limit))
    batches = Batches(words, settings)
    testing = test_cases(words, min(TEST_CASES, limit or TEST_CASES))
    say(
        f"{settings.epochs * len(batches) * settings.batch_size:,} drawn cases to learn from, "
        f"{len(testing):,} others to test with; {torch.get_num_threads()} thread(s)"
    )
    short = replace(settings, epochs=math.ceil(settings.epochs / 2))
    results: dict[str, float | str] = {
        "halves_method": f"an encoder over one modality, trained for {short.epochs} epochs",
    }
    torch.manual_seed(settings.seed)
    report_only, image_only = ReportOnly(config), ImageOnly(config)
    for name, half in (("report_only", report_only), ("image_only", image_only)):
        training.stage(name, half, half_step(half), batches, short)
        results[name] = accuracy(logits_of(half, testing), testing)
        say(f"{name.replace('_', ' ')}: {results[name]:.2%} of the diagnoses right")
    model = None
    if not training.baseline_only:
        torch.manual_seed(settings.seed)
        model = Diagnoser(config)
        step = model_step(model, settings.attention_loss)
        training.stage("model", model, step, batches, settings)
        held_out = data.draw(HELD_OUT, torch.Generator().manual_seed(HELD_OUT_SEED), words)
        model.temperature.copy_(fit_temperature(logits_of(model, held_out), held_out))
        logits = logits_of(model, testing)
        results["accuracy"] = accuracy(logits, testing)
        results["calibration_error"] = calibration_error(logits, testing)
        results["iou"] = region_iou(model, testing)
        say(
            f"both: {results['accuracy']:.2%} right, calibration error "
            f"{results['calibration_error']:.3f}, attended region's IoU {results['iou']:.2f}"
        )
    made = Checkpoint(config, words, model, image_only, report_only, {})
    training.finish(FORMAT, made.networks(), made.metadata(), results)
