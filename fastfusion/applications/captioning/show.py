"""What ``python -m fastfusion demo captioning`` prints, and the picture it draws."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfusion.applications.beside import compare, medians, print_table
from fastfusion.applications.captioning import data
from fastfusion.applications.captioning.data import Pictures
from fastfusion.applications.captioning.model import CHECKPOINT, GRID, Captioner, Checkpoint
from fastfusion.applications.captioning.train import TEST_SQUARES, exact_matches
from fastfusion.applications.stock import stock_twin
from fastfusion.core.extras import check_before_work
from fastfusion.models import CaptioningTransformer
from fastfusion.nn._attention_maps import attention_maps
from fastfusion.plotting import new_figure, overlay

SOME_SQUARES = 200  # that every variant writes about
STEPS = 32  # words, for the time of each
DRAWN = 3


def show(output: Path, checkpoint_path: Path | None = None) -> None:
    """Run the demo and write the picture to ``output``.

    Raises:
        MissingExtra: a package of the ``demo`` extra is not installed.
        ValueError: a checkpoint of another kind, or of a training of the baseline.
    """
    check_before_work(output)
    checkpoint = Checkpoint.load(checkpoint_path or CHECKPOINT)
    model = checkpoint.model
    if model is None:
        raise ValueError(f"{checkpoint_path} holds only the baseline that sees no image")
    pictures = data.load("test")
    with torch.inference_mode():
        _quality(checkpoint, model, pictures)
        _side_by_side(checkpoint, model, pictures)
        _speed(model, pictures, checkpoint)
        _picture(checkpoint, model, pictures, output)


def example(
    checkpoint_path: Path | None = None,
) -> tuple[Captioner, tuple[Any, ...], Tensor, list[str]]:
    """A model, inputs of one square, the square and the words of its caption, start first."""
    checkpoint = Checkpoint.load(checkpoint_path or CHECKPOINT)
    pictures = data.load("test", 100)
    numbers = data.test_squares(pictures, 1)
    images, texts, _ = data.pairs(pictures, numbers, checkpoint.vocabulary)
    length = int((texts[0] != 0).sum()) - 1
    # The attention that decides on a word is that of the word before it.
    words = [checkpoint.vocabulary.entries[number] for number in texts[0, 1 : 1 + length].tolist()]
    model = checkpoint.model or checkpoint.blind
    return model, (images, texts[:, :length]), images[0], words


def _quality(checkpoint: Checkpoint, model: Captioner, pictures: Pictures) -> None:
    weights = sum(p.numel() for p in model.parameters())
    words = checkpoint.vocabulary
    print(
        f"squares of four of the {len(pictures.things):,} test pictures of easy-vqa, each at half "
        f"its size; {len(words) - 4} words\n"
        f"model: CaptioningTransformer with image stem, {weights / 1e6:.2f} M weights\n"
    )
    greedy = exact_matches(model, pictures, words, TEST_SQUARES)
    beams = exact_matches(model, pictures, words, SOME_SQUARES, num_beams=4)
    blind = exact_matches(checkpoint.blind, pictures, words, SOME_SQUARES)
    print(
        f"captions that are right word for word: {greedy:.2%} of {TEST_SQUARES:,}; of the first "
        f"{SOME_SQUARES} {beams:.2%} by a search with 4 beams\n"
        f"without the image: {blind:.2%} ({checkpoint.training['blind_method']})\n"
    )
    numbers = data.test_squares(pictures, TEST_SQUARES)[:DRAWN]
    images, _, texts = data.pairs(pictures, numbers, words)
    for written, text in zip(data.decode(words, model.generate(images)), texts, strict=True):
        print(f"  {written}" + ("" if written == text else f"  (true: {text})"))


def _side_by_side(checkpoint: Checkpoint, model: Captioner, pictures: Pictures) -> None:
    """Teacher forcing in the model and its twins: logits of every word of the right captions."""
    words = checkpoint.vocabulary
    numbers = data.test_squares(pictures, SOME_SQUARES)

    def batch(count: int) -> tuple[Tensor, Tensor]:
        images, texts, _ = data.pairs(pictures, numbers[:count], words)
        return images, texts[:, :-1]

    compare(
        model,
        {f"batch {count}": batch(count) for count in (1, 8)},
        batch(32),
        lambda each: exact_matches(each, pictures, words, SOME_SQUARES, use_cache=False),
        title="exact",
    )


def _speed(model: Captioner, pictures: Pictures, checkpoint: Checkpoint) -> None:
    """Words per second: with keys and values kept, without, and in stock torch, without."""
    ours, stock = model.transformer, stock_twin(model.transformer)
    numbers = data.test_squares(pictures, 8)
    images, _, _ = data.pairs(pictures, numbers, checkpoint.vocabulary)
    memory = ours.encode(model.see(images)[0])
    calls: dict[str, Any] = {}
    for count in (1, 8):
        for name, each, cached in (
            ("stock torch.nn, no cache", stock, False),
            ("fastfusion, no cache", ours, False),
            ("fastfusion, cache", ours, True),
        ):
            calls[f"{name}, {count}"] = partial(_steps, each, memory[:count], cached)
    times = medians(calls, 8, 2)
    print(f"\nwords per second, {STEPS} words about each of 1 or 8 images, the encoder not counted")
    rows = []
    for name in ("stock torch.nn, no cache", "fastfusion, no cache", "fastfusion, cache"):
        cells = []
        for count in (1, 8):
            base = times[f"stock torch.nn, no cache, {count}"]
            took = times[f"{name}, {count}"]
            cells.append(f"{count * STEPS / took:,.0f} {base / took:6.2f}x")
        rows.append([name, *cells])
    print_table(["", "1 image", "8 images"], rows)
    ratio = times["fastfusion, no cache, 1"] / times["fastfusion, cache, 1"]
    print(f"  with the cache {ratio:.2f} times as many as without")


def _steps(transformer: CaptioningTransformer, memory: Tensor, cached: bool) -> None:
    """`STEPS` words, whatever they are: no text ends, so that all do the same work."""
    text = torch.full((len(memory), 1), data.START)
    cache: Any = transformer.decoder.new_cache(memory, STEPS) if cached else None
    for _ in range(STEPS):
        if cached:
            embedded = transformer.embedding.embed(text[:, -1:], text.shape[1] - 1)
            logits = transformer.output(transformer.decoder(embedded, None, cache=cache))[:, -1]
        else:
            logits = transformer.decode(memory, text)[:, -1]
        text = torch.cat([text, logits.argmax(dim=-1, keepdim=True)], dim=1)


def _picture(checkpoint: Checkpoint, model: Captioner, pictures: Pictures, output: Path) -> None:
    """Where the words look: attention of the last layer over the image, a row for each square."""
    words = checkpoint.vocabulary
    images, texts, written = data.pairs(
        pictures, data.test_squares(pictures, TEST_SQUARES)[:DRAWN], words
    )
    last = f"transformer.decoder.layers.{len(model.transformer.decoder.layers) - 1}.multihead_attn"
    with attention_maps(model, last) as maps:
        model(images, texts[:, :-1])
    figure = new_figure(13, 1.75 * DRAWN + 0.4)
    figure.suptitle("Where each word of a caption looks (mean of the heads, last layer)")
    columns = 9
    axes = figure.subplots(DRAWN, columns, squeeze=False)
    for row, image, text, weights in zip(axes, images, written, maps[last], strict=True):
        said = text.split()
        named = [n for n, word in enumerate(said) if word in NAMING][: columns - 1]
        row[0].imshow(image.permute(1, 2, 0).numpy(), extent=(0, 64, 64, 0))
        row[0].set_title("image", fontsize=9)
        for axis, place in zip(row[1:], named, strict=False):
            # The attention that decides on a word is that of the word before it.
            overlay(axis, image.permute(1, 2, 0), weights[place].view(GRID, GRID))
            axis.set_title(f'"{said[place]}"', fontsize=9)
        for axis in row:
            axis.set_axis_off()
    figure.savefig(output)
    print(f"\npicture of the words' attention over the image: {output.resolve()}")


NAMING = frozenset((*data.COLOURS, *data.SHAPES, *(f"{shape}s" for shape in data.SHAPES)))
