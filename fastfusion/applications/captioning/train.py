"""Training of captions: ``python -m fastfusion train captioning``."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from fastfusion.applications.captioning import data
from fastfusion.applications.captioning.data import Pictures
from fastfusion.applications.captioning.model import FORMAT, Captioner, Checkpoint, Config
from fastfusion.applications.training import Outcome, Schedule, Training
from fastfusion.data import easy_vqa
from fastfusion.data.easy_vqa import Vocabulary

TEST_SQUARES = 2000


@dataclass(frozen=True)
class Settings(Schedule):
    """The schedule and batches; a batch has ``batch_size`` squares."""

    epochs: int = 30
    squares: int = 4096  # of an epoch, drawn anew for each
    twins: float = 0.15  # the share of squares with a row of two things that are alike


class Batches:
    """Squares of pictures drawn at random and augmented, each by itself, with their captions."""

    def __init__(self, pictures: Pictures, words: Vocabulary, settings: Settings) -> None:
        self.pictures, self.words, self.settings = pictures, words, settings
        self.boxes = easy_vqa.shape_boxes(pictures.images)

    def __len__(self) -> int:
        return max(1, self.settings.squares // self.settings.batch_size)

    def __call__(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        pictures, settings = self.pictures, self.settings
        for _ in range(len(self)):
            shape = (settings.batch_size, 4)
            numbers = torch.randint(len(pictures.things), shape, generator=generator)
            numbers = data.with_twins(pictures, numbers, settings.twins, generator)
            texts = [data.caption([pictures.things[i] for i in row]) for row in numbers.tolist()]
            flat = numbers.flatten()
            moved, _ = easy_vqa.augment(pictures.images[flat], self.boxes[flat], generator)
            images = data.square(moved.unflatten(0, shape))
            yield images, data.encode(self.words, texts)


def step(model: Captioner) -> Callable[..., Outcome]:
    """Cross-entropy of every word behind the start, each seen with the right words before it."""

    def run(batch: tuple[Tensor, Tensor]) -> Outcome:
        images, texts = batch
        logits = model(images, texts[:, :-1]).flatten(0, 1)
        target = texts[:, 1:].flatten().masked_fill(texts[:, 1:].flatten() == 0, -100)
        loss = functional.cross_entropy(logits, target)
        return Outcome.of(loss, logits, target)

    return run


@torch.inference_mode()
def exact_matches(
    model: Captioner, pictures: Pictures, words: Vocabulary, count: int, **options: object
) -> float:
    """The share of test squares whose caption is right, word for word."""
    right = 0
    for numbers in data.test_squares(pictures, count).split(100):
        images, _, texts = data.pairs(pictures, numbers, words)
        written = data.decode(words, model.generate(images, **options))
        right += sum(one == other for one, other in zip(written, texts, strict=True))
    return right / count


def train(training: Training[Settings]) -> None:
    """Train the blind baseline and, unless it is ``baseline_only``, the model; write both.

    `limit` is of the pictures of each split, and of the squares of an epoch.
    """
    settings, limit, say = training.settings, training.limit, training.say
    learning, testing = data.load("train", limit), data.load("test", limit)
    words = data.vocabulary()
    config = Config(words=len(words))
    if limit is not None:
        settings = replace(settings, squares=min(settings.squares, limit))
    batches = Batches(learning, words, settings)
    count = TEST_SQUARES if limit is None else limit
    say(
        f"squares of four of {len(learning.things):,} pictures to learn from, of "
        f"{len(testing.things):,} others to test with; {torch.get_num_threads()} thread(s)"
    )

    torch.manual_seed(settings.seed)
    blind = Captioner(config, blind=True)
    short = replace(settings, epochs=math.ceil(settings.epochs / 15))
    training.stage("blind", blind, step(blind), batches, short)
    results: dict[str, object] = {
        "blind_exact": exact_matches(blind, testing, words, count),
        "blind_method": f"the same model, trained for {short.epochs} epochs with the image hidden",
    }
    say(f"without the image: {results['blind_exact']:.2%} of the captions right")
    model = None
    if not training.baseline_only:
        torch.manual_seed(settings.seed)
        model = Captioner(config)
        training.stage("model", model, step(model), batches, settings)
        results["exact"] = exact_matches(model, testing, words, count)
        say(f"with the image: {results['exact']:.2%} of {count:,} captions right, word for word")
    made = Checkpoint(config, words, model, blind, {})
    training.finish(FORMAT, made.networks(), made.metadata(), results)
