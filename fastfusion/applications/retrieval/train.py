"""Training of retrieval: ``python -m fastfusion train retrieval``.

First the pictures: an emoji in one style is to be found by itself in another, which pixels are a
good start for. Then the texts, which learn to be where their pictures are, then the pictures again,
each to be nearest to its name of all names, and last the re-ranker, on the pairs that the encoders
find hardest; what a stage is not about stays as it is. Pictures first and locked: LiT (Zhai et al.,
2022, https://arxiv.org/abs/2111.07991); encoders that learn both at once have to agree on 1,911
places first, and take many times as long.

A batch of pictures is made of runs of neighbours in Unicode's order, which are alike: faces, flags,
the hours of a clock.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from fastfusion.applications.retrieval.evaluate import (
    encode_pictures,
    encode_texts,
    pixel_scores,
    recall,
    rerank,
    scores,
)
from fastfusion.applications.retrieval.model import FORMAT, Checkpoint, Config, EmojiRetrieval
from fastfusion.applications.retrieval.subwords import Subwords
from fastfusion.applications.training import Outcome, Schedule, Training
from fastfusion.data import emoji as data
from fastfusion.data.emoji import LANGUAGES, Collection, Emoji
from fastfusion.models.parts import to_float

FOLDER = Path("emoji")  # of the packages, unless another is named
EPOCHS = {"texts": 2, "pictures to names": 1 / 3, "re-ranker": 1 / 10}  # for each of the pictures
LEARNED = ("noto", "openmoji")  # styles to learn from; the third is for tests alone


@dataclass(frozen=True)
class Batch:
    """Some emoji, each in every style and with a text; what a stage does not need is empty."""

    numbers: Tensor  # int64 (n,)
    pictures: Tensor  # float32 (styles, n, 3, 32, 32)
    texts: Tensor  # int64 (n, length)


@dataclass(frozen=True)
class Settings(Schedule):
    """The schedule, batches and augmentation; an epoch has every picture once."""

    epochs: int = 60  # of the pictures among themselves; see EPOCHS for the other stages
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 50
    subwords: int = 3000
    run: int = 8  # neighbours in a batch
    negatives: int = 4  # that a re-ranked query is held against
    mirrored: float = 0.2  # share of the pictures that may be
    rotation: float = 0.12  # radians
    scale: float = 0.12
    shift: float = 0.08  # of half the picture
    bent: float = 0.03  # how far parts move by themselves, of half the picture
    filled: float = 0.15  # share of the pictures that lose thin dark lines
    outlined: float = 0.2  # share that gets a black outline
    colour: float = 0.15
    saturation: float = 0.4
    noise: float = 0.02
    erased: float = 0.2  # share of the pictures, each of which loses a square


class Batches:
    """All emoji in random order, runs of neighbours together: pictures in every style, augmented,
    and a text: the name, keywords, or both, in one of the languages.

    Args:
        pictures: uint8 (styles, emoji, 4, 32, 32), or nothing.
        subwords: for texts, or nothing.
        max_subwords: of a text.
    """

    def __init__(
        self,
        emoji: Sequence[Emoji],
        settings: Settings,
        pictures: Tensor | None = None,
        subwords: Subwords | None = None,
        max_subwords: int = 0,
    ) -> None:
        self.emoji, self.settings, self.pictures = emoji, settings, pictures
        self.subwords, self.max_subwords = subwords, max_subwords
        self.may_mirror = torch.tensor([not one.has_sides for one in emoji])

    def __len__(self) -> int:
        return max(1, len(self.emoji) // self.settings.batch_size)

    def draw(self, generator: torch.Generator) -> Iterator[Tensor]:
        """The emoji of every batch: each of them once, but for what is left over."""
        count = len(self.emoji)
        # Runs begin anywhere; the emoji are a ring.
        start = int(torch.randint(count, (), generator=generator))
        runs = ((torch.arange(count) + start) % count).split(self.settings.run)
        order = torch.cat([runs[n] for n in torch.randperm(len(runs), generator=generator)])
        for numbers in order.split(self.settings.batch_size):
            if len(numbers) == min(self.settings.batch_size, count):
                yield numbers

    def text(self, one: Emoji, generator: torch.Generator) -> str:
        """Three times of five the name, else some keywords, half of the times behind the name."""
        which, kind, count, *order = torch.rand(40, generator=generator).tolist()
        language = int(which * len(LANGUAGES))
        name, keywords = one.names[language], one.keywords[language]
        if kind < 0.6 or not keywords:
            return name
        ranked = sorted(zip(order, keywords, strict=False))
        some = [keyword for _, keyword in ranked[: 1 + int(4 * count)]]
        return " ".join([name, *some] if kind < 0.8 else some)

    def __call__(self, generator: torch.Generator) -> Iterator[Batch]:
        for numbers in self.draw(generator):
            pictures = texts = torch.empty(0)
            if self.pictures is not None:
                some, mirror = self.pictures[:, numbers], self.may_mirror[numbers]
                pictures = torch.stack(
                    [augment(style, mirror, self.settings, generator) for style in some]
                )
            if self.subwords is not None:
                drawn = [self.text(self.emoji[int(n)], generator) for n in numbers]
                texts = self.subwords.encode(drawn, self.max_subwords)
            yield Batch(numbers, pictures, texts)


def augment(
    pictures: Tensor, may_mirror: Tensor, settings: Settings, generator: torch.Generator
) -> Tensor:
    """Pictures as other hands might have drawn them: uint8 (n, 4, size, size) to float32 (n, 3,
    size, size) on white or, less often, another colour.

    Turned, scaled, sheared, shifted, mirrored and bent; without thin dark lines or with a black
    outline; in other colours; blurred, noisy, and without a square of some.
    """
    count, size = len(pictures), pictures.shape[-1]

    def some(share: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator) < share

    def around(width: float, *shape: int) -> Tensor:
        return width * (2 * torch.rand(count, *shape, generator=generator) - 1)

    angle, scale = around(settings.rotation), 1.05 + around(settings.scale)
    aspect, shear = 1 + around(0.08), around(0.08)
    side = torch.where(may_mirror & some(settings.mirrored).flatten(), -1.0, 1.0)
    where = torch.stack(
        [
            torch.stack([angle.cos() * scale * aspect * side, shear - angle.sin() * scale], dim=1),
            torch.stack([angle.sin() * scale * side, angle.cos() * scale / aspect], dim=1),
        ],
        dim=1,
    )
    where = torch.cat([where, around(settings.shift, 2, 1)], dim=2)
    pixels = to_float(pictures)
    pixels = torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], dim=1)  # premultiplied
    grid = functional.affine_grid(where, list(pixels.shape), align_corners=False)
    bent = settings.bent * torch.randn(count, 2, 5, 5, generator=generator)
    bent = functional.interpolate(bent, size=size, mode="bicubic", align_corners=True)
    grid = grid + bent.permute(0, 2, 3, 1)
    pixels = functional.grid_sample(pixels, grid, align_corners=False)
    colours, opaque = pixels[:, :3], pixels[:, 3:]

    filled = functional.max_pool2d(colours, 3, stride=1, padding=1).minimum(opaque)
    colours = torch.where(some(settings.filled), filled, colours)
    wider = functional.max_pool2d(opaque, 3, stride=1, padding=1)
    opaque = torch.where(some(settings.outlined), wider, opaque)
    grey = colours.mean(dim=1, keepdim=True)
    colours = grey + (colours - grey) * (1 + around(settings.saturation, 1, 1, 1))
    colours = colours * (1 + around(settings.colour, 3, 1, 1)) + around(0.1, 1, 1, 1) * opaque
    mixed = torch.eye(3) + 0.05 * torch.randn(count, 3, 3, generator=generator)
    colours = (mixed @ colours.flatten(2)).view_as(colours)
    ground = torch.where(some(0.9), 1.0, torch.rand(count, 3, 1, 1, generator=generator))
    drawn = colours + ground * (1 - opaque)

    blurred = functional.avg_pool2d(drawn, 3, stride=1, padding=1, count_include_pad=False)
    drawn = torch.where(some(0.2), blurred, drawn)
    drawn = drawn + settings.noise * torch.randn(drawn.shape, generator=generator)
    line = torch.arange(size).view(1, 1, -1)
    corner, width = size * torch.rand(2, count, 1, 1, generator=generator), size // 4
    rows, columns = ((line >= place - width) & (line < place) for place in corner)
    hole = (rows.unsqueeze(3) & columns.unsqueeze(2)) & some(settings.erased)
    drawn = torch.where(hole, torch.rand(count, 1, 1, 1, generator=generator), drawn)
    return drawn.clamp(0.0, 1.0)


def picture_step(model: EmojiRetrieval) -> Callable[[Batch], Outcome]:
    """Cross-entropy of the same emoji in the other style among those of the batch, both ways."""
    transformer = model.transformer

    def step(batch: Batch) -> Outcome:
        tokens = model.encode_pictures(batch.pictures.flatten(0, 1))
        one, other = transformer.embed_visual(tokens).view(2, len(batch.numbers), -1)
        found = transformer.similarity(one, other)
        right = torch.arange(len(found))
        loss = functional.cross_entropy(found, right) + functional.cross_entropy(found.T, right)
        return Outcome.of(loss / 2, found, right)

    return step


def text_step(model: EmojiRetrieval, places: Tensor) -> Callable[[Batch], Outcome]:
    """Cross-entropy of the right emoji among all, whose pictures are at `places`."""
    transformer = model.transformer

    def step(batch: Batch) -> Outcome:
        texts = transformer.embed_text(*model.encode_texts(batch.texts))
        found = transformer.similarity(texts, places)
        loss = functional.cross_entropy(found, batch.numbers)
        return Outcome.of(loss, found, batch.numbers)

    return step


def name_step(model: EmojiRetrieval, names: Tensor) -> Callable[[Batch], Outcome]:
    """Cross-entropy of a picture's name among all, which are at `names`, for every style."""
    transformer = model.transformer

    def step(batch: Batch) -> Outcome:
        pictures = transformer.embed_visual(model.encode_pictures(batch.pictures.flatten(0, 1)))
        found = transformer.similarity(pictures, names)
        right = batch.numbers.repeat(len(batch.pictures))
        return Outcome.of(functional.cross_entropy(found, right), found, right)

    return step


def names_of(model: EmojiRetrieval, subwords: Subwords, emoji: Sequence[Emoji]) -> Tensor:
    """Where names are: the mean of the vectors in all languages, of unit length again."""
    vectors = [
        encode_texts(model, subwords, [one.names[number] for one in emoji]).vectors
        for number in range(len(LANGUAGES))
    ]
    return functional.normalize(torch.stack(vectors).mean(dim=0), dim=-1).clone()


def places_of(model: EmojiRetrieval, styles: Tensor) -> Tensor:
    """Where emoji are: the mean of their vectors in all styles, of unit length again.

    Args:
        styles: uint8 (styles, emoji, 4, 32, 32).
    """
    vectors = [encode_pictures(model, data.on_white(style)).vectors for style in styles]
    return functional.normalize(torch.stack(vectors).mean(dim=0), dim=-1).clone()


def reranker_step(model: EmojiRetrieval, negatives: int) -> Callable[[Batch], Outcome]:
    """Cross-entropy of the right candidate among those that the encoders rank highest besides it,
    both ways; the encoders stay as they are."""
    transformer = model.transformer

    def step(batch: Batch) -> Outcome:
        with torch.no_grad():
            # One of the styles, each as often as the other.
            style = int(batch.numbers[0]) % len(batch.pictures)
            pictures = model.encode_pictures(batch.pictures[style])
            texts, padding = model.encode_texts(batch.texts)
            vectors = transformer.embed_visual(pictures), transformer.embed_text(texts, padding)
            found = transformer.similarity(*vectors)
            own = torch.arange(len(found))
            wrong = found - torch.diag(torch.full((len(found),), torch.inf))
            hardest = min(negatives, len(found) - 1)
            columns = [
                torch.cat([own.unsqueeze(1), each.topk(hardest, dim=1).indices], dim=1)
                for each in (wrong, wrong.T)
            ]
        query = own.unsqueeze(1).expand_as(columns[0]).flatten()
        picture = torch.cat([query, columns[1].flatten()])
        text = torch.cat([columns[0].flatten(), query])
        added = transformer.match(pictures[picture], texts[text], None, padding[text])
        ranked = (found[picture, text] + added).view(2 * len(found), 1 + hardest)
        right = torch.zeros(len(ranked), dtype=torch.int64)
        return Outcome.of(functional.cross_entropy(ranked, right), ranked, right)

    return step


def measure(model: EmojiRetrieval, subwords: Subwords, test: Collection) -> dict[str, list[float]]:
    """Recall at 1, 5 and 10 over all pictures of a collection, by direction, language and whether
    the re-ranker was on: ``"text to picture, en, re-ranked"``."""
    pictures = encode_pictures(model, test.pictures)
    found: dict[str, list[float]] = {}
    for number, language in enumerate(LANGUAGES):
        texts = encode_texts(model, subwords, [one.names[number] for one in test.emoji])
        by_text = scores(model, texts, pictures)
        for direction, each in (("text to picture", by_text), ("picture to text", by_text.T)):
            name = f"{direction}, {language}"
            to_text = direction == "picture to text"
            found[name] = recall(each)
            ranked = rerank(model, each, texts, pictures, to_text=to_text)
            found[f"{name}, re-ranked"] = recall(ranked)
    return found


def _epochs(settings: Settings, stage: str) -> int:
    return math.ceil(settings.epochs * EPOCHS[stage])


def train(training: Training[Settings], data_folder: Path = FOLDER) -> None:
    """Measure the baseline and, unless it is ``baseline_only``, train the model; write it all.

    `limit` is of the emoji.

    Args:
        data_folder: the packages with the pictures to learn from.

    Raises:
        FileNotFoundError: a package is not there; the message has the command that fetches them.
    """
    settings, limit, say = training.settings, training.limit, training.say
    test = Collection.load()
    if limit is not None:
        test = test.head(limit)
    pictures = torch.stack([data.pictures(style, test.emoji, data_folder) for style in LEARNED])
    say(
        f"emoji: {len(test):,}, each in two styles to learn from ({', '.join(LEARNED)}) and in a "
        f"third to test with (twemoji), names and keywords in {' and '.join(LANGUAGES)}; "
        f"{torch.get_num_threads()} thread(s)"
    )
    by_pixels = pixel_scores([data.on_white(style) for style in pictures], test.pictures)
    results: dict[str, object] = {
        "pixels": recall(by_pixels),
        "pixels_method": "no model: pictures by the correlation of their pixels with those of the "
        "emoji in the two styles to learn from",
    }
    say(f"by pixels alone: {recall(by_pixels)[0]:.2%} of the emoji found in the third style")

    texts = [t for one in test.emoji for n in (0, 1) for t in (one.names[n], *one.keywords[n])]
    subwords = Subwords.of(texts, settings.subwords)
    config = Config(len(subwords))
    model = None
    if not training.baseline_only:
        torch.manual_seed(settings.seed)
        model = EmojiRetrieval(config)
        training.stage(
            "pictures", model, picture_step(model), Batches(test.emoji, settings, pictures)
        )
        short = replace(settings, epochs=_epochs(settings, "texts"), run=1)
        training.stage(
            "texts", model, text_step(model, places_of(model, pictures)),
            Batches(test.emoji, short, None, subwords, config.max_subwords), short,
        )  # fmt: skip
        short = replace(settings, epochs=_epochs(settings, "pictures to names"))
        training.stage(
            "pictures to names", model, name_step(model, names_of(model, subwords, test.emoji)),
            Batches(test.emoji, short, pictures), short,
        )  # fmt: skip
        short = replace(settings, epochs=_epochs(settings, "re-ranker"))
        training.stage(
            "re-ranker", model, reranker_step(model, settings.negatives),
            Batches(test.emoji, short, pictures, subwords, config.max_subwords), short,
        )  # fmt: skip
        model.half().float()  # as it is in the file, which has half the size so
        recalls = measure(model, subwords, test)
        results["recall"] = recalls
        results["recall_at_1"] = recalls["text to picture, en, re-ranked"][0]
        for name, (at_1, at_5, at_10) in recalls.items():
            say(f"{name}: recall@1 {at_1:.2%}, @5 {at_5:.2%}, @10 {at_10:.2%}")
    made = Checkpoint(config, subwords, model)
    training.finish(FORMAT, made.networks(), made.metadata(), results)
