"""What ``python -m fastfusion demo`` prints, and the picture it draws."""

import math
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from fastfusion.demo import data
from fastfusion.demo.data import Split
from fastfusion.demo.evaluate import (
    accuracy,
    latencies,
    predict,
    predict_from_question,
    quantized,
    shape_tokens,
    to_float,
)
from fastfusion.demo.extras import check_before_work
from fastfusion.demo.model import CHECKPOINT, Checkpoint, EasyVQA
from fastfusion.demo.picture import Panel, draw
from fastfusion.demo.stock import StockVQATransformer

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
SAMPLE = 256  # questions for the comparison with stock torch and for the attention's statistics


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
        _side_by_side(checkpoint, checkpoint.model, split, tokens, predicted)
        _picture(checkpoint, checkpoint.model, split, tokens, predicted, examples, output)


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


def _side_by_side(
    checkpoint: Checkpoint, model: EasyVQA, split: Split, tokens: Tensor, predicted: Tensor
) -> None:
    """The model beside its twin of stock torch.nn, and its copies with narrower weights."""
    stock = EasyVQA(checkpoint.config, StockVQATransformer)
    stock.load_state_dict(model.state_dict(), strict=True)
    sample = _pairs(split, tokens, _spread(split, SAMPLE))
    models = {"stock torch.nn": stock.eval(), "fastfusion": model}
    cosines = {}
    for weights in ("bf16", "int8"):
        name = f"fastfusion {weights}"
        models[name], report = quantized(model, weights, _pairs(split, tokens, _spread(split, 32)))
        cosines[name] = min(layer.cosine or 0.0 for layer in report.quantized)
    some = split.head(SOME_IMAGES)
    logits = {name: each(*sample) for name, each in models.items()}
    answers = {
        name: predicted[: len(some)] if each is model else predict(each, some, tokens)
        for name, each in models.items()
    }
    pairs = {batch: _pairs(split, tokens, _spread(split, batch)) for batch in (1, 8)}
    times = {
        batch: latencies(
            {name: partial(each, *pair) for name, each in models.items()}
            | {"stem": partial(model.stem, pair[0])},
            rounds=30,
        )
        for batch, pair in pairs.items()
    }

    print(
        f"\nthe same weights in stock torch.nn, in float32, and as bfloat16 and 8-bit integers "
        f"(ff.quantize), {torch.get_num_threads()} thread(s)"
    )
    print(
        f"  {'':<15}  {'batch 1':>16}  {'batch 8':>16}  {'accuracy':>8}  {'difference':>10}  "
        f"{'MB':>5}  layers' cosine"
    )
    plain = logits["stock torch.nn"]
    for name, each in models.items():
        cells = [
            f"{1e3 * time[name]:6.2f} ms {time['stock torch.nn'] / time[name]:5.2f}x"
            for time in times.values()
        ]
        difference = (logits[name] - plain).abs().max().item()
        cosine = f">= {math.floor(1e5 * cosines[name]) / 1e5:.5f}" if name in cosines else ""
        print(
            f"  {name:<15}  {cells[0]:>16}  {cells[1]:>16}  {accuracy(answers[name], some):>8.2%}  "
            f"{difference:>10.1e}  {_megabytes(each):>5.2f}  {cosine}".rstrip()
        )
    print(
        f"  latency: median of interleaved rounds; accuracy: of the same {len(some):,} questions; "
        f"difference: the largest of the logits of {SAMPLE} questions, which reach "
        f"{plain.abs().max().item():.0f}"
    )
    one = times[1]
    ours = one["fastfusion"]
    print(
        f"  what made the difference, batch 1: fused layers {one['stock torch.nn'] / ours:.2f}x, "
        f"their products in bfloat16 another {ours / one['fastfusion bf16']:.2f}x or in integers "
        f"{ours / one['fastfusion int8']:.2f}x; the image stem's convolutions, "
        f"{1e3 * one['stem']:.2f} ms, are the same in all"
    )


def _megabytes(model: torch.nn.Module) -> float:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


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
