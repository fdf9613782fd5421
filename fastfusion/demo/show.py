"""What ``python -m fastfusion demo`` prints: accuracy, examples, the stock twin beside it, and a picture."""

from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from fastfusion.demo import data
from fastfusion.demo.data import Split
from fastfusion.demo.evaluate import accuracy, latencies, predict, predict_from_question, to_float
from fastfusion.demo.extras import require_all
from fastfusion.demo.model import CHECKPOINT, Checkpoint, EasyVQA
from fastfusion.demo.picture import Panel, draw
from fastfusion.demo.stock import StockVQATransformer

# One question of every kind, each about another kind of shape or colour.
EXAMPLES = (
    "what color is the shape?",
    "what shape is in the image?",
    "is there not a circle in the image?",
    "does the image contain a triangle?",
    "what is the red shape?",
    "is no teal shape present?",
)
DRAWN = 4  # of the examples, how many the picture shows


def _examples(split: Split) -> list[int]:
    """For every example, a question of the split that asks it, each about another image with another answer where possible."""
    chosen: list[int] = []
    for number, text in enumerate(EXAMPLES):
        asked = (split.text_index == split.texts.index(text)).nonzero().flatten().tolist()
        used_answers = {int(split.answer[n]) for n in chosen}
        used_images = {int(split.image_index[n]) for n in chosen}
        asked = [n for n in asked if int(split.image_index[n]) not in used_images] or asked
        fresh = [n for n in asked if int(split.answer[n]) not in used_answers] or asked
        # Spread over the split, so that the examples are not all among its first images.
        chosen.append(fresh[number * len(fresh) // len(EXAMPLES)])
    return chosen


def _pairs(split: Split, tokens: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Images and tokens of some questions, without columns that only hold padding."""
    words = tokens[split.text_index[numbers]]
    words = words[:, : int((words != 0).sum(dim=1).max())]
    return to_float(split.images[split.image_index[numbers]]), words


@torch.inference_mode()
def _beside_stock(checkpoint: Checkpoint, model: EasyVQA, split: Split, tokens: Tensor) -> None:
    stock = EasyVQA(checkpoint.config, StockVQATransformer)
    stock.load_state_dict(model.state_dict(), strict=True)
    stock.eval()
    step = max(1, len(split) // 256)
    images, words = _pairs(split, tokens, list(range(0, len(split), step))[:256])
    difference = (model(images, words) - stock(images, words)).abs().max().item()
    print("\nthe same model from stock torch.nn, with the same weights (loaded strictly)")
    print(f"  largest difference of a logit over {len(images)} questions: {difference:.1e}")

    print(f"  latency, median of interleaved rounds, {torch.get_num_threads()} thread(s):")
    for batch in (1, 8):
        pair = _pairs(split, tokens, list(range(0, len(split), len(split) // batch))[:batch])
        times = latencies({"ours": lambda: model(*pair), "stock": lambda: stock(*pair)})
        ours, theirs = times["ours"], times["stock"]
        print(
            f"    batch {batch}: fastfusion {1e3 * ours:6.2f} ms, stock {1e3 * theirs:6.2f} ms"
            f"  ({theirs / ours:.2f} x)"
        )


@torch.inference_mode()
def show(output: Path, checkpoint_path: Path | None = None) -> None:
    """Run the demo and write the picture to ``output``.

    Raises:
        MissingExtra: a package of the ``demo`` extra is not installed.
        ValueError: a checkpoint of another kind, or of a question-only training.
    """
    require_all()
    checkpoint = Checkpoint.load(checkpoint_path or CHECKPOINT)
    model = checkpoint.model
    if model is None:
        raise ValueError(f"{checkpoint_path} holds only the question-only baseline")
    split = data.load("test")
    tokens = checkpoint.vocabulary.encode(split.texts)
    weights = sum(p.numel() for p in model.parameters())
    print(
        f"easy-vqa, test split: {len(split.images):,} images, {len(split):,} questions "
        f"({len(split.texts)} distinct), {len(checkpoint.answers)} answers"
    )
    print(f"VQATransformer with stem and embeddings: {weights / 1e6:.2f} M parameters")

    start = perf_counter()
    predicted = predict(model, split, tokens)
    seconds = perf_counter() - start
    right = int((predicted == split.answer).sum())
    blind = accuracy(predict_from_question(checkpoint.question_only, split, tokens), split)
    print(f"\naccuracy on the whole test split: {right / len(split):.2%} ({right:,} of {len(split):,}, {seconds:.1f} s)")
    print(f"accuracy of a question-only model: {blind:.2%} ({checkpoint.training['question_only_method']})")

    print("\nquestions and answers")
    examples = _examples(split)
    for number in examples:
        image, text = int(split.image_index[number]), split.texts[split.text_index[number]]
        answer, truth = (checkpoint.answers[a[number]] for a in (predicted, split.answer))
        print(f"  image {image:>4}  {text:<40} {answer:<10} (true: {truth})")

    _beside_stock(checkpoint, model, split, tokens)

    panels = []
    for number in examples[:DRAWN]:
        image, words = _pairs(split, tokens, [number])
        _, attention = model(image, words, need_weights=True)
        text = split.texts[split.text_index[number]]
        panels.append(
            Panel(
                image[0].permute(1, 2, 0),
                text,
                data.words(text),
                attention[0],
                checkpoint.answers[predicted[number]],
                checkpoint.answers[split.answer[number]],
            )
        )
    draw(panels, output)
    print(f"\nthe words' attention over the image: {output.resolve()}")
