"""What ``python -m fastfusion demo vqa`` prints, and the picture it draws."""

from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fastfusion.applications.beside import compare, medians
from fastfusion.applications.vqa.evaluate import (
    accuracy,
    predict,
    predict_from_question,
    shape_tokens,
)
from fastfusion.applications.vqa.model import CHECKPOINT, Checkpoint, EasyVQA
from fastfusion.applications.vqa.picture import Panel, draw
from fastfusion.core.extras import check_before_work
from fastfusion.data import easy_vqa as data
from fastfusion.data.easy_vqa import Split
from fastfusion.models.parts import to_float

# Questions of every kind, and the words whose attention the picture shows.
EXAMPLES = {
    "what color is the shape?": ("color", "shape"),
    "what shape is in the image?": ("shape", "image"),
    "is there not a circle in the image?": ("not", "circle"),
    "does the image contain a triangle?": ("contain", "triangle"),
    "what is the red shape?": ("red", "shape"),
    "is no teal shape present?": ("no", "teal"),
}
SOME_IMAGES = 100  # whose questions every variant answers
SAMPLE = 256  # questions for the attention's statistics


def show(output: Path, checkpoint_path: Path | None = None) -> None:
    """Run the demo and write the picture to ``output``.

    Raises:
        MissingExtra: a package of the ``demo`` extra is not installed.
        ValueError: a checkpoint of another kind, or of a question-only training.
    """
    check_before_work(output)
    checkpoint = Checkpoint.load(checkpoint_path or CHECKPOINT)
    if checkpoint.model is None:
        raise ValueError(f"{checkpoint_path} holds only the question-only baseline")
    split = data.load("test")
    tokens = checkpoint.vocabulary.encode(split.texts)
    with torch.inference_mode():
        predicted = _accuracy(checkpoint, checkpoint.model, split, tokens)
        examples = _examples(checkpoint, split, predicted)
        _side_by_side(checkpoint.model, split, tokens)
        _picture(checkpoint, checkpoint.model, split, tokens, predicted, examples, output)


def example(
    checkpoint_path: Path | None = None,
) -> tuple[EasyVQA, tuple[Any, ...], Tensor, list[str]]:
    """A model, inputs of one question, its image and its words.

    Raises:
        ValueError: a checkpoint of a question-only training.
    """
    checkpoint = Checkpoint.load(checkpoint_path or CHECKPOINT)
    if checkpoint.model is None:
        raise ValueError(f"{checkpoint_path} holds only the question-only baseline")
    split = data.load("test", 1)
    images, words = _pairs(split, checkpoint.vocabulary.encode(split.texts), [0])
    text = data.words(split.texts[int(split.text_index[0])])
    return checkpoint.model, (images, words), images[0], text


def _accuracy(checkpoint: Checkpoint, model: EasyVQA, split: Split, tokens: Tensor) -> Tensor:
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"easy-vqa, test split: {len(split.images):,} images, {len(split):,} questions "
        f"({len(split.texts)} distinct), {len(checkpoint.answers)} answers"
    )
    print(
        f"model: VQATransformer with image stem and word embedding, {weights / 1e6:.2f} M weights"
    )
    start = perf_counter()
    predicted = predict(model, split, tokens)
    seconds = perf_counter() - start
    right = int((predicted == split.answer).sum())
    blind = accuracy(predict_from_question(checkpoint.question_only, split, tokens), split)
    method = checkpoint.training["question_only_method"]
    print(
        f"\naccuracy on the whole test split: {right / len(split):.2%} "
        f"({right:,} of {len(split):,} right, {seconds:.1f} s)"
    )
    print(f"accuracy of a question-only model: {blind:.2%} ({method})")
    return predicted


def _examples(checkpoint: Checkpoint, split: Split, predicted: Tensor) -> list[int]:
    """Print one question of the split for every example, about different images; their numbers."""
    print("\nquestions and answers")
    chosen: list[int] = []
    for place, text in enumerate(EXAMPLES):
        asked = (split.text_index == split.texts.index(text)).nonzero().flatten().tolist()
        # Spread over the split, and with an answer that no example before has, if there is one.
        asked = asked[(2 * place + 1) * len(asked) // (2 * len(EXAMPLES)) :] + asked
        given = {int(split.answer[number]) for number in chosen}
        number = next((n for n in asked if int(split.answer[n]) not in given), asked[0])
        chosen.append(number)
        answer, truth = (checkpoint.answers[int(a[number])] for a in (predicted, split.answer))
        image = int(split.image_index[number])
        print(f"  image {image:>3}  {text:<37} {answer:<10} (true: {truth})")
    return chosen


def _pairs(split: Split, tokens: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Images and words of some questions, without columns that only hold padding."""
    words = tokens[split.text_index[numbers]]
    words = words[:, : int((words != 0).sum(dim=1).max())]
    return to_float(split.images[split.image_index[numbers]]), words


def _spread(split: Split, count: int) -> list[int]:
    """``count`` questions, evenly spaced."""
    return [place * len(split) // count for place in range(count)]


def _side_by_side(model: EasyVQA, split: Split, tokens: Tensor) -> None:
    """The model beside its twin of stock torch.nn, and its copies with narrower weights."""
    some = split.head(SOME_IMAGES)
    pairs = {n: _pairs(split, tokens, _spread(split, n)) for n in (1, 8, 32)}
    times = compare(
        model,
        {f"batch {n}": pairs[n] for n in (1, 8)},
        pairs[32],
        lambda each: accuracy(predict(each, some, tokens), some),
    )
    stem = 1e3 * medians({"stem": partial(model.stem, pairs[1][0])}, 30, 5)["stem"]
    alone = times["batch 1"]
    ours, int8 = alone["fastfusion"], alone["fastfusion int8"]
    print(
        f"  accuracy of the same {len(some):,} questions; what made the difference, batch 1: fused "
        f"layers {alone['stock torch.nn'] / ours:.2f}x, their products in bfloat16 another "
        f"{ours / alone['fastfusion bf16']:.2f}x or in integers {ours / int8:.2f}x; "
        f"the image stem's convolutions, {stem:.2f} ms, are the same in all"
    )


def _picture(
    checkpoint: Checkpoint,
    model: EasyVQA,
    split: Split,
    tokens: Tensor,
    predicted: Tensor,
    examples: list[int],
    output: Path,
) -> None:
    shape = shape_tokens(split.images)
    sample = _spread(split, SAMPLE)
    images, words = _pairs(split, tokens, sample)
    _, attention = model(images, words, need_weights=True)
    about = shape[split.image_index[sample]]
    on_shape = (attention * about.unsqueeze(1)).sum(dim=2)[words != 0].mean().item()

    panels = []
    for number in examples:
        image, words = _pairs(split, tokens, [number])
        _, attention = model(image, words, need_weights=True)
        text = split.texts[int(split.text_index[number])]
        panels.append(
            Panel(
                image[0].permute(1, 2, 0),
                text,
                {word: attention[0, data.words(text).index(word)] for word in EXAMPLES[text]},
                shape[int(split.image_index[number])],
                checkpoint.answers[int(predicted[number])],
                checkpoint.answers[int(split.answer[number])],
            )
        )
    draw(panels, output)
    print(
        f"\n{on_shape:.0%} of the words' attention falls on the shape, which fills "
        f"{about.double().mean().item():.0%} of the image (training rewards it a little)"
    )
    print(f"picture of the words' attention over the image: {output.resolve()}")
