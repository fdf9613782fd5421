"""Training of visual question answering: ``python -m fastfusion train vqa``.

A batch is some images with some of their questions (of about ten), so an image is encoded once for
several.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion.applications.training import Outcome, Schedule, Training, shuffled
from fastfusion.applications.vqa.evaluate import (
    accuracy,
    predict,
    predict_from_question,
    shape_tokens,
)
from fastfusion.applications.vqa.model import FORMAT, Checkpoint, Config, EasyVQA, QuestionOnly
from fastfusion.data import easy_vqa as data
from fastfusion.data.easy_vqa import Split

Step = Callable[["Batch"], Outcome]


@dataclass(frozen=True)
class Batch:
    """Pair n asks ``questions[text_index[n]]`` about ``images[image_index[n]]``."""

    images: Tensor  # float32 (images, 3, 64, 64)
    shape: Tensor  # bool (images, 64): the tokens of the stem that see a part of the shape
    questions: Tensor  # int64 (texts, length)
    image_index: Tensor  # int64 (pairs,)
    text_index: Tensor  # int64 (pairs,)
    answer: Tensor  # int64 (pairs,)


@dataclass(frozen=True)
class Settings(Schedule):
    """The schedule, batches and augmentation; a batch has ``batch_size`` images."""

    questions_per_image: int = 4
    shift: int = 8  # pixels
    brightness: float = 0.05
    noise: float = 0.02
    attention_loss: float = 0.02


def baseline_step(model: QuestionOnly) -> Step:
    """Cross-entropy of the answers guessed from the questions."""

    def step(batch: Batch) -> Outcome:
        logits = model(batch.questions)[batch.text_index]
        loss = nn.functional.cross_entropy(logits, batch.answer)
        return Outcome.of(loss, logits, batch.answer)

    return step


def model_step(model: EasyVQA, settings: Settings) -> Step:
    """Cross-entropy of the answers, and a small loss on the words' attention that misses the shape.

    The second part is not needed for the answers: every token of the encoded image knows the shape,
    and the words' attention stays spread evenly. It makes the attention point at what the answer is
    about.
    """

    def step(batch: Batch) -> Outcome:
        logits, attention = model(
            batch.images, batch.questions, batch.image_index, batch.text_index, need_weights=True
        )
        on_shape = (attention * batch.shape[batch.image_index].unsqueeze(1)).sum(dim=2)
        word = batch.questions[batch.text_index] != 0
        miss = -on_shape[word].clamp(1e-6, 1.0).log().mean()
        loss = nn.functional.cross_entropy(logits, batch.answer) + settings.attention_loss * miss
        return Outcome.of(loss, logits, batch.answer)

    return step


class Batches:
    """All images in random order, augmented, each with some of its questions, drawn at random.

    Args:
        tokens: int64 (texts, length), the encoded ``split.texts``.
    """

    def __init__(self, split: Split, tokens: Tensor, settings: Settings) -> None:
        self.split, self.tokens, self.settings = split, tokens, settings
        self.boxes = data.shape_boxes(split.images)
        self.per_image = torch.bincount(split.image_index, minlength=len(split.images))
        self.first = self.per_image.cumsum(0) - self.per_image

    def __len__(self) -> int:
        return max(1, len(self.split.images) // self.settings.batch_size)

    def draw(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The numbers of a batch's images, those of its questions, and the image of each question,
        counted in the batch."""
        split, settings = self.split, self.settings
        order = torch.rand(len(split), generator=generator).argsort()
        # The questions of an image stay together, in the random order.
        order = order[split.image_index[order].argsort(stable=True)]
        for images in shuffled(len(split.images), settings.batch_size, generator):
            counts = self.per_image[images].clamp(max=settings.questions_per_image)
            image_index = torch.repeat_interleave(counts)
            within = torch.arange(len(image_index)) - (counts.cumsum(0) - counts)[image_index]
            yield images, order[self.first[images][image_index] + within], image_index

    def __call__(self, generator: torch.Generator) -> Iterator[Batch]:
        split, settings = self.split, self.settings
        for images, questions, image_index in self.draw(generator):
            pixels, moved = data.augment(
                split.images[images],
                self.boxes[images],
                generator,
                shift=settings.shift,
                brightness=settings.brightness,
                noise=settings.noise,
            )
            shape = shape_tokens(moved)
            texts, text_index = split.text_index[questions].unique(return_inverse=True)
            answer = split.answer[questions]
            yield Batch(pixels, shape, self.tokens[texts], image_index, text_index, answer)


def train(training: Training[Settings]) -> None:
    """Train the question-only baseline and, unless it is ``baseline_only``, the model; write both.

    `limit` is of the images of each split.
    """
    settings, limit, say = training.settings, training.limit, training.say
    learning, testing = data.load("train", limit), data.load("test", limit)
    vocabulary = data.Vocabulary.of(learning.texts)
    tokens, test_tokens = vocabulary.encode(learning.texts), vocabulary.encode(testing.texts)
    answers = data.answers()
    config = Config(words=len(vocabulary), answers=len(answers))
    say(
        f"easy-vqa: {len(learning.images):,} images and {len(learning):,} questions to learn from, "
        f"{len(testing.images):,} and {len(testing):,} to test with; "
        f"{torch.get_num_threads()} thread(s)"
    )
    batches = Batches(learning, tokens, settings)

    torch.manual_seed(settings.seed)
    baseline = QuestionOnly(config)
    # The words alone are learnt long before the images are.
    short = replace(settings, epochs=math.ceil(settings.epochs / 4))
    training.stage("question only", baseline, baseline_step(baseline), batches, short)
    blind = accuracy(predict_from_question(baseline, testing, test_tokens), testing)
    say(f"question only: {blind:.2%} of the test questions right")

    model = None
    results: dict[str, Any] = {
        "question_only_accuracy": blind,
        "question_only_method": "the text half of the model, trained in the same way for "
        f"{short.epochs} epochs without the images",
    }
    if not training.baseline_only:
        torch.manual_seed(settings.seed)
        model = EasyVQA(config)
        training.stage("model", model, model_step(model, settings), batches)
        results["accuracy"] = accuracy(predict(model, testing, test_tokens), testing)
        say(f"with the image: {results['accuracy']:.2%} of the test questions right")
    made = Checkpoint(config, vocabulary, answers, model, baseline)
    # csrc/examples/encoder.cpp reads these weights where they lie in the file.
    training.finish(FORMAT, made.networks(), made.metadata(), results, torch.float32)
