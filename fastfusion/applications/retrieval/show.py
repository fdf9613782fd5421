"""What ``python -m fastfusion demo retrieval`` prints, and the picture it draws."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastfusion.applications.beside import compare, medians, print_table
from fastfusion.applications.retrieval.evaluate import (
    CANDIDATES,
    Encoded,
    encode_pictures,
    encode_texts,
    recall,
    rerank,
    scores,
)
from fastfusion.applications.retrieval.model import CHECKPOINT, Checkpoint, EmojiRetrieval
from fastfusion.applications.retrieval.picture import Panel, draw
from fastfusion.applications.retrieval.subwords import Subwords
from fastfusion.applications.retrieval.train import LEARNED, measure
from fastfusion.core.extras import check_before_work
from fastfusion.data.emoji import LANGUAGES, Collection
from fastfusion.models.parts import to_float

SEARCHES = 8  # for names, evenly spread over all, the last two in German
FIRST = 8  # pictures per search in the picture
SHOWN = 3  # names per search
SOME = 500  # texts that every variant looks for


def show(output: Path, checkpoint_path: Path | None = None) -> None:
    """Run the demo and write the picture to ``output``.

    Raises:
        MissingExtra: a package of the ``demo`` extra is not installed.
        ValueError: a checkpoint of another kind, or of a baseline-only training.
    """
    check_before_work(output)
    checkpoint = Checkpoint.load(checkpoint_path or CHECKPOINT)
    model, subwords = checkpoint.model, checkpoint.subwords
    if model is None:
        raise ValueError(f"{checkpoint_path} holds only the baseline by pixels")
    test = Collection.load()
    with torch.inference_mode():
        _recalls(checkpoint, model, test)
        _side_by_side(model, subwords, test)
        panels = _search(model, subwords, test)
        draw(panels, output)
    print(f"\npicture of what is found for {len(panels)} searches: {output.resolve()}")


def example(
    checkpoint_path: Path | None = None,
) -> tuple[EmojiRetrieval, tuple[Tensor, Tensor], Tensor, list[str]]:
    """A model, inputs of one pair, its picture and the subwords of its name.

    Raises:
        ValueError: a checkpoint of a baseline-only training.
    """
    checkpoint = Checkpoint.load(checkpoint_path or CHECKPOINT)
    if checkpoint.model is None:
        raise ValueError(f"{checkpoint_path} holds only the baseline by pixels")
    test = Collection.load()
    number = next(n for n, one in enumerate(test.emoji) if one.names[0] == "woman farmer")
    tokens = checkpoint.subwords.encode(["woman farmer"], checkpoint.config.max_subwords)
    picture = to_float(test.pictures[number])
    words = checkpoint.subwords.split("woman farmer")
    return checkpoint.model, (picture.unsqueeze(0), tokens), picture, words


def _recalls(checkpoint: Checkpoint, model: EmojiRetrieval, test: Collection) -> None:
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"emoji: {len(test):,} in the style of Twemoji, which no training has seen; learnt from "
        f"{' and '.join(LEARNED)}, names and keywords of CLDR in {' and '.join(LANGUAGES)}"
    )
    print(
        f"model: RetrievalTransformer with image stem and subword embedding, {weights / 1e6:.2f} M "
        f"weights\n\nrecall over all {len(test):,} pictures, the query a name or a picture"
    )
    found = measure(model, checkpoint.subwords, test)
    rows = [
        [name, *(f"{share:.2%}" for share in shares)]
        for name, shares in {**found, "by pixels alone": checkpoint.training["pixels"]}.items()
    ]
    rows.append(["by chance", *(f"{first / len(test):.2%}" for first in (1, 5, 10))])
    print_table(["", "@1", "@5", "@10"], rows)
    print(
        f"  re-ranked: the best {CANDIDATES} of the encoders in the order of cross-modal attention "
        f"between picture and text;\n  by pixels alone ({checkpoint.training['pixels_method']}): "
        "as the training measured it"
    )


def _side_by_side(model: EmojiRetrieval, subwords: Subwords, test: Collection) -> None:
    """Pairs scored by the model, its twin of stock torch.nn and copies with narrower weights."""

    def pairs(count: int) -> tuple[Tensor, Tensor]:
        some = test.head(count)
        names = [one.names[0] for one in some.emoji]
        return to_float(some.pictures), subwords.encode(names, model.text.position.shape[0])

    some = test.head(SOME)
    names = [one.names[0] for one in some.emoji]

    def first(each: EmojiRetrieval) -> float:
        found = scores(
            each, encode_texts(each, subwords, names), encode_pictures(each, some.pictures)
        )
        return recall(found)[0]

    compare(
        model,
        {f"{n} pair{'s' * (n > 1)}": pairs(n) for n in (1, CANDIDATES)},
        pairs(32),
        first,
        title=f"recall@1 of {SOME}",
    )
    pictures = encode_pictures(model, test.pictures)
    texts = encode_texts(model, subwords, names[:1])
    found = scores(model, texts, pictures)
    steps: dict[str, Callable[[], object]] = {
        "text": partial(encode_texts, model, subwords, names[:1]),
        "search": partial(scores, model, texts, pictures),
        "re-ranker": partial(rerank, model, found, texts, pictures, to_text=False),
    }
    times = medians(steps, 30, 5)
    print(
        f"  a search among {len(test):,} pictures, encoded before: "
        + ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items())
    )


def _search(model: EmojiRetrieval, subwords: Subwords, test: Collection) -> list[Panel]:
    """Print what is found first for some names."""
    sought = [(2 * place + 1) * len(test) // (2 * SEARCHES) for place in range(SEARCHES)]
    languages = [int(place >= SEARCHES - 2) for place in range(SEARCHES)]
    queries = [test.emoji[n].names[la] for n, la in zip(sought, languages, strict=True)]
    pictures = encode_pictures(model, test.pictures)
    order = _first(model, encode_texts(model, subwords, queries), pictures)
    print(
        f"\nsearches by name: the place of the right picture, and the first {SHOWN} that are found"
    )
    panels = []
    rows = zip(queries, sought, languages, order.tolist(), strict=True)
    for query, right, language, numbers in rows:
        names = [test.emoji[number].names[language] for number in numbers]
        place = f"{numbers.index(right) + 1}." if right in numbers else f">{FIRST}"
        print(f"  {place:>3}  {query:<32} {', '.join(names[:SHOWN])}")
        panels.append(Panel(query, test.pictures[numbers], names))
    return panels


def _first(model: EmojiRetrieval, texts: Encoded, pictures: Encoded) -> Tensor:
    """The numbers of the pictures found first, (texts, FIRST)."""
    found = scores(model, texts, pictures)
    ranked = rerank(model, found, texts, pictures, to_text=False)
    return ranked.topk(FIRST, dim=1).indices
