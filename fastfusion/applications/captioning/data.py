"""Four pictures of easy-vqa in a square, and what there is to say of them.

The pictures of a square are two and two side by side, each at half its size. Its caption follows
from the ground truth of easy-vqa, which its questions and answers hold: "a red circle beside a blue
rectangle above two teal triangles".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastfusion.data import easy_vqa
from fastfusion.data.easy_vqa import PADDING, UNKNOWN, Vocabulary
from fastfusion.models.captioning import END, START
from fastfusion.models.parts import to_float

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
LONGEST = 1 + 4 * 3 + 3 + 1  # the start, four things, what is between them, the end


@dataclass(frozen=True)
class Pictures:
    """A split's pictures, uint8 (n, 3, 64, 64), and the thing in each: (colour, shape)."""

    images: Tensor
    things: list[tuple[str, str]]


def load(split: str, limit: int | None = None) -> Pictures:
    """The pictures of a split of easy-vqa whose questions tell colour and shape: 3,542 of 4,000 to
    learn from and 880 of 1,000 to test with."""
    found = easy_vqa.load("train" if split == "train" else "test", limit)
    known = things(found)
    kept = [number for number, thing in enumerate(known) if thing is not None]
    return Pictures(found.images[kept], [thing for thing in known if thing is not None])


def things(split: easy_vqa.Split) -> list[tuple[str, str] | None]:
    """Colour and shape of the thing in every picture, as its questions and their answers tell."""
    answers = easy_vqa.answers()
    facts: list[set[str]] = [set() for _ in split.images]
    rows = zip(
        split.image_index.tolist(), split.text_index.tolist(), split.answer.tolist(), strict=True
    )
    for image, text, answer in rows:
        facts[image] |= _told(easy_vqa.words(split.texts[text]), answers[answer])
    found: list[tuple[str, str] | None] = []
    for told in facts:
        colour, shape = told & set(COLOURS), told & set(SHAPES)
        known = len(colour) == 1 and len(shape) == 1
        found.append((colour.pop(), shape.pop()) if known else None)
    return found


def _told(question: list[str], answer: str) -> set[str]:
    """The colour and the shape that a question and its answer say there is."""
    named = set(question) & {*COLOURS, *SHAPES}
    if answer not in ("yes", "no"):
        return named | {answer}
    denied = "not" in question or "no" in question
    return named if (answer == "yes") != denied else set()


def caption(things: Sequence[tuple[str, str]]) -> str:
    """What to say of four things: the upper ones, then the lower ones, each from the left."""
    rows = []
    for left, right in (things[:2], things[2:]):
        if left == right:
            rows.append(f"two {left[0]} {left[1]}s")
        else:
            rows.append(f"a {left[0]} {left[1]} beside a {right[0]} {right[1]}")
    return " above ".join(rows)


def square(images: Tensor) -> Tensor:
    """Squares (n, 3, 64, 64) of pictures (n, 4, 3, 64, 64), both float."""
    small = functional.avg_pool2d(images.flatten(0, 1), 2).unflatten(0, images.shape[:2])
    rows = [torch.cat([small[:, i], small[:, i + 1]], dim=3) for i in (0, 2)]
    return torch.cat(rows, dim=2)


def vocabulary() -> Vocabulary:
    """All words of captions."""
    plural = [f"{shape}s" for shape in SHAPES]
    words = sorted(["a", "two", "beside", "above", *COLOURS, *SHAPES, *plural])
    assert (START, END) == (2, 3)
    return Vocabulary([PADDING, UNKNOWN, "<start>", "<end>", *words])


def encode(words: Vocabulary, texts: Sequence[str]) -> Tensor:
    """Word numbers (texts, LONGEST): the start, the words, the end, padding."""
    tokens = torch.zeros(len(texts), LONGEST, dtype=torch.int64)
    body = words.encode(list(texts), LONGEST - 2)
    tokens[:, 0] = START
    tokens[:, 1:-1] = body
    tokens[torch.arange(len(texts)), 1 + (body != 0).sum(dim=1)] = END
    return tokens


def decode(words: Vocabulary, tokens: Tensor) -> list[str]:
    """The texts of word numbers (texts, length), without starts, ends and what follows these."""
    texts = []
    for row in tokens.tolist():
        row = row[1 : row.index(END)] if END in row else row[1:]
        texts.append(" ".join(words.entries[number] for number in row if number))
    return texts


def pairs(
    pictures: Pictures, numbers: Tensor, words: Vocabulary
) -> tuple[Tensor, Tensor, list[str]]:
    """Squares (n, 3, 64, 64) from 0 to 1 of pictures (n, 4), their captions, encoded and not."""
    images = square(to_float(pictures.images[numbers]))
    texts = [caption([pictures.things[i] for i in row]) for row in numbers.tolist()]
    return images, encode(words, texts), texts


def test_squares(pictures: Pictures, count: int) -> Tensor:
    """Numbers (count, 4) of pictures, drawn once and for all; every tenth square has a row of two
    things that are alike, which would be rare by chance."""
    generator = torch.Generator().manual_seed(7)
    numbers = torch.randint(len(pictures.things), (count, 4), generator=generator)
    return with_twins(pictures, numbers, 0.1, generator)


def with_twins(
    pictures: Pictures, numbers: Tensor, share: float, generator: torch.Generator
) -> Tensor:
    """The same numbers, but in a share of the squares a row has the like of its left thing."""
    alike: dict[tuple[str, str], list[int]] = {}
    for number, thing in enumerate(pictures.things):
        alike.setdefault(thing, []).append(number)
    numbers = numbers.clone()
    chosen = (torch.rand(len(numbers), generator=generator) < share).nonzero().flatten()
    rows = torch.randint(2, (len(chosen),), generator=generator) * 2
    picks = torch.rand(len(chosen), generator=generator)
    for square_number, row, pick in zip(
        chosen.tolist(), rows.tolist(), picks.tolist(), strict=True
    ):
        like = alike[pictures.things[int(numbers[square_number, row])]]
        numbers[square_number, row + 1] = like[int(pick * len(like))]
    return numbers
