"""What ``python -m fastfusion demo`` prints, and the picture it draws."""

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
        _beside_stock(checkpoint, checkpoint.model, split, tokens)
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


def _beside_stock(checkpoint: Checkpoint, model: EasyVQA, split: Split, tokens: Tensor) -> None:
    stock = EasyVQA(checkpoint.config, StockVQATransformer)
    stock.load_state_dict(model.state_dict(), strict=True)
    stock.eval()
    images, words = _pairs(split, tokens, _spread(split, SAMPLE))
    difference = (model(images, words) - stock(images, words)).abs().max().item()
    print("\nthe same model built from stock torch.nn, with the same weights")
    print(f"  largest difference of the logits of {SAMPLE} questions: {difference:.1e}")
    threads = torch.get_num_threads()
    print(f"  latency, median of interleaved rounds, {threads} thread(s)")
    for batch in (1, 8):
        pair = _pairs(split, tokens, _spread(split, batch))
        times = latencies({"ours": partial(model, *pair), "stock": partial(stock, *pair)})
        ours, theirs = 1e3 * times["ours"], 1e3 * times["stock"]
        print(
            f"    batch {batch}: fastfusion {ours:.2f} ms, stock torch.nn {theirs:.2f} ms "
            f"(stock / fastfusion = {theirs / ours:.2f})"
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
