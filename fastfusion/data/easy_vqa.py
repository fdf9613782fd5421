"""The easy-vqa data set as tensors: one coloured shape per 64x64 image, and questions about it.

https://github.com/vzhou842/easy-VQA, the PyPI package ``easy-vqa``: 4,000 + 1,000 images, 38,575 +
9,673 questions made of 107 distinct sentences, 13 answers. None of the sentences speaks of a place
or a size, so moving and mirroring an image keeps every answer right.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy
import torch
from torch import Tensor

from fastfusion.core.extras import require

IMAGE_SIZE = 64
PADDING, UNKNOWN = "<padding>", "<unknown>"


def words(question: str) -> list[str]:
    """The words of a question in lower case, without punctuation."""
    return re.findall(r"[a-z0-9]+", question.lower())


class Vocabulary:
    """Words and their numbers; 0 pads short questions and 1 stands for every unknown word."""

    def __init__(self, entries: list[str]) -> None:
        if entries[:2] != [PADDING, UNKNOWN]:
            raise ValueError(
                f"a vocabulary starts with {PADDING!r}, {UNKNOWN!r}; got {entries[:2]}"
            )
        self.entries = entries
        self._number = {word: number for number, word in enumerate(entries)}

    @classmethod
    def of(cls, questions: list[str]) -> "Vocabulary":
        """The vocabulary of some questions, in alphabetical order."""
        return cls(
            [PADDING, UNKNOWN, *sorted({word for text in questions for word in words(text)})]
        )

    def __len__(self) -> int:
        return len(self.entries)

    def encode(self, questions: list[str], length: int | None = None) -> Tensor:
        """Number the words of every question: int64 (questions, length), padded with 0.

        ``length`` is that of the longest question unless given. Raises ``ValueError`` for a
        question without words or with more than ``length``.
        """
        rows = [[self._number.get(word, 1) for word in words(text)] for text in questions]
        if length is None:
            length = max(map(len, rows), default=0)
        tokens = torch.zeros(len(rows), length, dtype=torch.int64)
        for text, row, target in zip(questions, rows, tokens, strict=True):
            if not 0 < len(row) <= length:
                raise ValueError(f"a question has 1 to {length} words, got {len(row)}: {text!r}")
            target[: len(row)] = torch.tensor(row)
        return tokens


@dataclass(frozen=True)
class Split:
    """A split of the data set; question n is ``texts[text_index[n]]`` about image
    ``image_index[n]``.
    """

    images: Tensor  # uint8 (images, 3, 64, 64)
    texts: list[str]  # the distinct questions, in alphabetical order
    image_index: Tensor  # int64 (questions,), ascending
    text_index: Tensor  # int64 (questions,)
    answer: Tensor  # int64 (questions,): index into answers()

    def __len__(self) -> int:
        return self.answer.numel()

    def head(self, count: int) -> "Split":
        """The first ``count`` images and their questions."""
        kept = self.image_index < count
        return Split(
            self.images[:count],
            self.texts,
            self.image_index[kept],
            self.text_index[kept],
            self.answer[kept],
        )


def answers() -> list[str]:
    """The 13 answers, in alphabetical order (the package stores them in no order)."""
    return sorted(require("easy_vqa").get_answers())


def load(split: Literal["train", "test"], images: int | None = None) -> Split:
    """Read a split, or its first ``images`` images; every picture is decoded once.

    Raises ``MissingExtra`` without easy-vqa or Pillow.
    """
    source, pictures = require("easy_vqa"), require("PIL.Image")
    if split == "train":
        questions, paths = source.get_train_questions(), source.get_train_image_paths()
    else:
        questions, paths = source.get_test_questions(), source.get_test_image_paths()
    count = len(paths) if images is None else images

    pixels = numpy.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=numpy.uint8)
    for number in range(count):
        with pictures.open(paths[number]) as picture:
            pixels[number] = picture.convert("RGB")

    texts = sorted(set(questions[0]))
    text_number = {text: number for number, text in enumerate(texts)}
    answer_number = {answer: number for number, answer in enumerate(answers())}
    rows = torch.tensor(
        [
            (image, text_number[text], answer_number[answer])
            for text, answer, image in zip(*questions, strict=True)
            if image < count
        ]
    )
    rows = rows[rows[:, 0].argsort(stable=True)]
    image_index, text_index, answer = rows.unbind(1)
    return Split(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        texts,
        image_index.contiguous(),
        text_index.contiguous(),
        answer.contiguous(),
    )


def drawn(images: Tensor) -> Tensor:
    """Where the shape is: uint8 images (n, 3, size, size) to bool (n, size, size).

    The background is one colour and covers more than half of every image, so it is each channel's
    median.
    """
    background = images.flatten(2).median(dim=2).values[:, :, None, None]
    return (images != background).any(dim=1)


def shape_boxes(images: Tensor) -> Tensor:
    """The box around every shape: int64 (n, 4), left, right, top, bottom, the ends exclusive."""
    shape = drawn(images)
    edges = []
    for line in (shape.any(dim=1), shape.any(dim=2)):
        marks = line.to(torch.uint8)
        edges += [marks.argmax(dim=1), line.shape[1] - marks.flip(1).argmax(dim=1)]
    return torch.stack(edges, dim=1)


def augment(
    images: Tensor,
    boxes: Tensor,
    generator: torch.Generator,
    *,
    shift: int = 8,
    brightness: float = 0.05,
    noise: float = 0.02,
) -> tuple[Tensor, Tensor]:
    """Mirror, shift, brighten, add noise: uint8 (n, 3, 64, 64) to float32, about from 0 to 1, and
    what was moved only, uint8.

    No question speaks of a place, so mirroring and shifting keep the answers right; a shift never
    cuts the shape (``boxes``, from :func:`shape_boxes`), so what wraps around is plain background.
    The eight colours stay far apart under changes of a few per cent.
    """
    count = len(images)
    room = torch.stack([-boxes[:, 0::2], IMAGE_SIZE - boxes[:, 1::2]]).clamp(-shift, shift)
    low, high = room.unbind()
    uniform = torch.rand(count, 4, generator=generator)
    offset = low + (uniform[:, :2] * (high - low + 1)).long()

    # Where every pixel of the result comes from: the shifted image, then mirrored.
    x = y = torch.arange(IMAGE_SIZE).expand(count, -1)
    x = torch.where(uniform[:, 2:3] < 0.5, x, IMAGE_SIZE - 1 - x)
    x, y = ((place - offset[:, n : n + 1]) % IMAGE_SIZE for n, place in enumerate((x, y)))
    moved = images.gather(3, x[:, None, None, :].expand_as(images))
    moved = moved.gather(2, y[:, None, :, None].expand_as(images))

    gain = 1 + brightness * (2 * uniform[:, 3].view(-1, 1, 1, 1) - 1)
    noisy = noise * torch.randn(moved.shape, generator=generator)
    return moved.to(torch.float32) / 255 * gain + noisy, moved
