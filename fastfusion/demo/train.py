"""Training of the demo's networks: ``python -m fastfusion train``.

A batch is some images with some of their questions (of about ten), so an image is encoded once for
several. All randomness of an epoch follows from the seed and the epoch's number, so a resumed
training takes the same steps as one that was never interrupted.
"""

import math
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion.demo import data
from fastfusion.demo.data import IMAGE_SIZE, Split
from fastfusion.demo.evaluate import (
    accuracy,
    predict,
    predict_from_question,
    shape_tokens,
    to_float,
)
from fastfusion.demo.extras import check_before_work, require
from fastfusion.demo.model import Checkpoint, Config, EasyVQA, QuestionOnly


@dataclass(frozen=True)
class Batch:
    """Pair n asks ``questions[text_index[n]]`` about ``images[image_index[n]]``."""

    images: Tensor  # float32 (images, 3, 64, 64)
    shape: Tensor  # bool (images, 64): the tokens of the stem that see a part of the shape
    questions: Tensor  # int64 (texts, length)
    image_index: Tensor  # int64 (pairs,)
    text_index: Tensor  # int64 (pairs,)
    answer: Tensor  # int64 (pairs,)


# A batch to its loss and the logits (pairs, answers).
Step = Callable[[Batch], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Settings:
    """What a training depends on, besides the data and the number of threads."""

    epochs: int = 20
    batch_size: int = 32  # images
    questions_per_image: int = 4
    lr: float = 1e-3
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    seed: int = 0
    shift: int = 8  # pixels
    brightness: float = 0.05
    noise: float = 0.02
    attention_loss: float = 0.02

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be a positive number, got {self.lr}")


def baseline_step(model: QuestionOnly) -> Step:
    """Cross-entropy of the answers guessed from the questions."""

    def step(batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.questions)[batch.text_index]
        return nn.functional.cross_entropy(logits, batch.answer), logits

    return step


def model_step(model: EasyVQA, settings: Settings) -> Step:
    """Cross-entropy of the answers, and a small loss on the words' attention that misses the shape.

    The second part is not needed for the answers: every token of the encoded image knows the shape,
    and the words' attention stays spread evenly. It makes the attention point at what the answer is
    about.
    """

    def step(batch: Batch) -> tuple[Tensor, Tensor]:
        logits, attention = model(
            batch.images, batch.questions, batch.image_index, batch.text_index, need_weights=True
        )
        on_shape = (attention * batch.shape[batch.image_index].unsqueeze(1)).sum(dim=2)
        word = batch.questions[batch.text_index] != 0
        miss = -on_shape[word].clamp(1e-6, 1.0).log().mean()
        loss = nn.functional.cross_entropy(logits, batch.answer) + settings.attention_loss * miss
        return loss, logits

    return step


def augment(
    images: Tensor, boxes: Tensor, settings: Settings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mirror, shift, brighten and add noise: uint8 (n, 3, 64, 64) to float32, and ``Batch.shape``.

    No question speaks of a place, so mirroring and shifting keep the answers right; a shift never
    cuts the shape (``boxes``, from :func:`fastfusion.demo.data.shape_boxes`), so what wraps around
    is plain background. The eight colours stay far apart under changes of a few per cent.
    """
    count = len(images)
    room = torch.stack([-boxes[:, 0::2], IMAGE_SIZE - boxes[:, 1::2]]).clamp(
        -settings.shift, settings.shift
    )
    low, high = room.unbind()
    uniform = torch.rand(count, 4, generator=generator)
    shift = low + (uniform[:, :2] * (high - low + 1)).long()

    # Where every pixel of the result comes from: the shifted image, then mirrored.
    x = y = torch.arange(IMAGE_SIZE).expand(count, -1)
    x = torch.where(uniform[:, 2:3] < 0.5, x, IMAGE_SIZE - 1 - x)
    x, y = ((place - shift[:, n : n + 1]) % IMAGE_SIZE for n, place in enumerate((x, y)))
    moved = images.gather(3, x[:, None, None, :].expand_as(images))
    moved = moved.gather(2, y[:, None, :, None].expand_as(images))

    gain = 1 + settings.brightness * (2 * uniform[:, 3].view(-1, 1, 1, 1) - 1)
    noise = settings.noise * torch.randn(moved.shape, generator=generator)
    return to_float(moved) * gain + noise, shape_tokens(moved)


def batches(
    split: Split, settings: Settings, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """All images in random order, each with some of its questions, drawn at random.

    Yields the numbers of a batch's images, those of its questions, and the image of each question,
    counted in the batch. The last, smaller batch is left out; another one in every epoch.
    """
    per_image = torch.bincount(split.image_index, minlength=len(split.images))
    first = per_image.cumsum(0) - per_image
    shuffled = torch.rand(len(split), generator=generator).argsort()
    # The questions of an image stay together, in the shuffled order.
    shuffled = shuffled[split.image_index[shuffled].argsort(stable=True)]
    for images in torch.randperm(len(split.images), generator=generator).split(settings.batch_size):
        if len(images) < min(settings.batch_size, len(split.images)):
            return
        counts = per_image[images].clamp(max=settings.questions_per_image)
        image_index = torch.repeat_interleave(counts)
        within = torch.arange(len(image_index)) - (counts.cumsum(0) - counts)[image_index]
        yield images, shuffled[first[images][image_index] + within], image_index


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.lr * warmup * (1 + math.cos(math.pi * step / steps)) / 2


def fit(
    model: nn.Module,
    step: Step,
    split: Split,
    tokens: Tensor,
    settings: Settings,
    saved: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    title: str = "",
) -> list[float]:
    """Train a model; returns the mean loss of every epoch.

    Args:
        step: the loss of a batch and the model's answers.
        tokens: int64 (texts, length), the encoded ``split.texts``.
        saved: a state that ``save`` was given, to go on from.
        save: called after every epoch with all that is needed to go on from there.
    """
    tqdm = require("tqdm").tqdm
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, betas=(0.9, 0.98))
    losses: list[float] = []
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = list(saved["losses"])
    boxes = data.shape_boxes(split.images)
    per_epoch = max(1, len(split.images) // settings.batch_size)
    model.train()

    for epoch in range(len(losses), settings.epochs):
        seed = settings.seed * 100_003 + epoch
        torch.manual_seed(seed)  # dropout
        generator = torch.Generator().manual_seed(seed)  # order and augmentation
        total, right, seen = 0.0, 0, 0
        bar = tqdm(total=per_epoch, desc=f"{title} {epoch + 1}/{settings.epochs}", mininterval=1.0)
        with bar:
            for number, (images, questions, image_index) in enumerate(
                batches(split, settings, generator)
            ):
                rate = learning_rate(
                    epoch * per_epoch + number, per_epoch * settings.epochs, settings
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate
                pixels, shape = augment(split.images[images], boxes[images], settings, generator)
                texts, text_index = split.text_index[questions].unique(return_inverse=True)
                target = split.answer[questions]

                loss, logits = step(
                    Batch(pixels, shape, tokens[texts], image_index, text_index, target)
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                optimizer.step()

                total += loss.item() * len(target)
                right += int((logits.argmax(dim=1) == target).sum())
                seen += len(target)
                bar.update()
                bar.set_postfix(
                    loss=f"{total / seen:.4f}", right=f"{right / seen:.2%}", refresh=False
                )
        losses.append(total / seen)
        save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses})
    model.eval()
    return losses


class StateFile:
    """The state of an unfinished training; an interruption never leaves half a file."""

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.content: dict[str, Any] = {"identity": identity}
        if not resume:
            return
        if not path.exists():
            raise FileNotFoundError(f"nothing to resume: there is no {path}")
        self.content = torch.load(path, weights_only=True)
        if self.content["identity"] != identity:
            raise ValueError(
                f"{path} belongs to other settings: {self.content['identity']}, not {identity}"
            )

    def part(self, name: str) -> dict[str, Any] | None:
        return self.content.get(name)

    def saver(self, name: str) -> Callable[[dict[str, Any]], None]:
        def save(state: dict[str, Any]) -> None:
            self.content[name] = state
            unfinished = self.path.with_name(self.path.name + ".new")
            torch.save(self.content, unfinished)
            os.replace(unfinished, self.path)

        return save


def train(
    output: Path,
    settings: Settings,
    *,
    question_only: bool = False,
    resume: bool = False,
    images: int | None = None,
    say: Callable[[str], None] = print,
) -> Checkpoint:
    """Train the question-only baseline and, unless ``question_only``, the model; write both.

    Args:
        resume: go on from ``<output>.state``, which every epoch writes and a finished training
            removes.
        images: use only so many images of each split (for a quick try).

    Raises:
        FileNotFoundError, ValueError: ``resume`` without a state, or with one of other settings.
    """
    check_before_work(output)
    started = perf_counter()
    identity = asdict(settings) | {"question_only": question_only, "images": images}
    state = StateFile(output.with_name(output.name + ".state"), identity, resume)
    learning, testing = data.load("train", images), data.load("test", images)
    vocabulary = data.Vocabulary.of(learning.texts)
    tokens, test_tokens = vocabulary.encode(learning.texts), vocabulary.encode(testing.texts)
    answers = data.answers()
    config = Config(words=len(vocabulary), answers=len(answers))
    say(
        f"easy-vqa: {len(learning.images):,} images and {len(learning):,} questions to learn from, "
        f"{len(testing.images):,} and {len(testing):,} to test with; "
        f"{torch.get_num_threads()} thread(s)"
    )

    torch.manual_seed(settings.seed)
    baseline = QuestionOnly(config)
    # The words alone are learnt long before the images are.
    short = replace(settings, epochs=math.ceil(settings.epochs / 4))
    fit(
        baseline,
        baseline_step(baseline),
        learning,
        tokens,
        short,
        state.part("question_only"),
        state.saver("question_only"),
        "question only",
    )
    blind = accuracy(predict_from_question(baseline, testing, test_tokens), testing)
    say(f"question only: {blind:.2%} of the test questions right")

    model = None
    results: dict[str, Any] = {
        "question_only_accuracy": blind,
        "question_only_method": "the text half of the model, trained in the same way for "
        f"{short.epochs} epochs without the images",
    }
    if not question_only:
        torch.manual_seed(settings.seed)
        model = EasyVQA(config)
        fit(
            model,
            model_step(model, settings),
            learning,
            tokens,
            settings,
            state.part("model"),
            state.saver("model"),
            "epoch",
        )
        seen = accuracy(predict(model, testing, test_tokens), testing)
        results["accuracy"] = seen
        say(f"with the image: {seen:.2%} of the test questions right")

    facts = {
        "settings": identity,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": round(perf_counter() - started),
    }
    checkpoint = Checkpoint(config, vocabulary, answers, model, baseline, results | facts)
    checkpoint.save(output)
    state.path.unlink(missing_ok=True)
    minutes = (perf_counter() - started) / 60
    say(f"wrote {output} ({output.stat().st_size / 1e6:.2f} MB) after {minutes:.1f} minutes")
    return checkpoint
