"""What ``python -m fastfusion demo sentiment`` prints, and the picture it draws."""

from pathlib import Path

import torch
from torch import Tensor

import fastfusion as ff
from fastfusion.applications.beside import compare, print_table
from fastfusion.applications.sentiment.data import CLASSES, MODALITIES, VOCABULARY, Opinions, make
from fastfusion.applications.sentiment.model import CHECKPOINT, Checkpoint, SpokenSentiment
from fastfusion.applications.sentiment.picture import Panel, draw
from fastfusion.applications.sentiment.train import (
    TEST_SEED,
    TESTING,
    accuracy,
    model_inputs,
    predict,
    with_subsets,
)
from fastfusion.applications.stock import stock_twin
from fastfusion.core.extras import check_before_work

SOME = 500  # samples that every variant answers


def show(output: Path, checkpoint_path: Path | None = None) -> None:
    """Run the demo and write the picture to ``output``.

    Raises:
        MissingExtra: a package of the ``demo`` extra is not installed.
        ValueError: a checkpoint of another kind, or of a baseline-only training.
    """
    check_before_work(output)
    checkpoint = Checkpoint.load(checkpoint_path or CHECKPOINT)
    model = checkpoint.model
    if model is None:
        raise ValueError(f"{checkpoint_path} holds only the baselines of one modality")
    opinions = make(TESTING, TEST_SEED + checkpoint.training["settings"]["seed"])
    with torch.inference_mode():
        _accuracies(checkpoint, model, opinions)
        predicted = predict(model, opinions)
        examples = _examples(opinions, predicted)
        compare(
            model,
            {f"batch {n}": model_inputs(opinions.take(torch.arange(n))) for n in (1, 8)},
            model_inputs(opinions.take(torch.arange(32))),
            lambda each: accuracy(each, opinions.take(torch.arange(SOME))),
        )
        _missing_in_stock(model, opinions)
        draw([_panel(model, opinions, number, predicted) for number in examples], output)
    print(f"\npicture of what the words listen to: {output.resolve()}")


def example(
    checkpoint_path: Path | None = None,
) -> tuple[SpokenSentiment, tuple[Tensor, ...], Tensor, list[str]]:
    """A model, inputs of one sample, its video's nine frames row by row as a picture, and its
    words.

    Raises:
        ValueError: a checkpoint of a baseline-only training.
    """
    checkpoint = Checkpoint.load(checkpoint_path or CHECKPOINT)
    if checkpoint.model is None:
        raise ValueError(f"{checkpoint_path} holds only the baselines of one modality")
    opinions = make(TESTING, TEST_SEED)
    frames, words = ((~mask).sum(dim=1) for mask in (opinions.video_padding, opinions.text_padding))
    one = opinions.take(((frames == 9) & (words > 9)).nonzero()[0])
    inputs = model_inputs(one)
    rows = inputs[2][0].unflatten(0, (3, 3)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    return checkpoint.model, inputs, rows.expand(3, -1, -1), one.sentence(0).split()


def _accuracies(checkpoint: Checkpoint, model: SpokenSentiment, opinions: Opinions) -> None:
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"synthetic spoken opinions, made from a seed: {len(opinions):,} to test with, "
        f"{', '.join(CLASSES)}; no recording and no person is in them"
    )
    print(f"model: SentimentTransformer with embeddings, {weights / 1e6:.2f} M weights")
    subsets = with_subsets(model, opinions)
    alone = {name: accuracy(net, opinions) for name, net in checkpoint.alone.items()}
    rows = []
    for kept, share in subsets.items():
        own = f"{alone[kept]:.2%}" if kept in alone else ""
        rows.append([kept, f"{share:.2%}", own])
    print("\naccuracy by the modalities that are there")
    print_table(["", "the model, others masked", "trained on it alone"], rows)
    best = max(alone, key=lambda name: alone[name])
    whole = subsets[" + ".join(MODALITIES)]
    kinds = {"sarcastic": opinions.sarcastic, "straight faces": opinions.straight}
    print(
        f"  all three: {100 * (whole - alone[best]):.1f} points above {best}, the best alone; "
        + "; ".join(
            f"{name}: {accuracy(model, opinions.take(which.nonzero().flatten())):.2%}"
            for name, which in kinds.items()
        )
    )


def _examples(opinions: Opinions, predicted: Tensor) -> list[int]:
    """Print one sample of every kind; their numbers."""
    plain = ~opinions.sarcastic & ~opinions.straight
    kinds = {
        "as it is said": plain & (opinions.label == 2),
        "with a straight face": opinions.straight & ~opinions.sarcastic & (opinions.label == 0),
        "sarcastic": opinions.sarcastic & ~opinions.straight,
    }
    print("\nopinions and what the model makes of them")
    chosen: list[int] = []
    for kind, which in kinds.items():
        number = int(which.nonzero()[len(chosen)])
        chosen.append(number)
        words = opinions.sentence(number).split()
        place = int(opinions.stressed[number])
        words[place] = words[place].upper()
        given, truth = CLASSES[int(predicted[number])], CLASSES[int(opinions.label[number])]
        print(f"  {' '.join(words):<62} {kind:<22} {given:<9} (true: {truth})")
    print("  in capitals: the word that the voice stresses")
    return chosen


def _missing_in_stock(model: SpokenSentiment, opinions: Opinions) -> None:
    """What the stock twin makes of samples without a modality."""
    some = model_inputs(opinions.take(torch.arange(32)).without("video"))
    stock = stock_twin(model)(*some)
    lost = int(stock.isnan().any(dim=1).sum())
    print(
        f"  without video: {lost} of 32 samples are NaN in stock torch.nn, whose softmax over "
        f"masked keys alone has no value; {int(model(*some).isnan().any(dim=1).sum())} here"
    )


def _panel(model: SpokenSentiment, opinions: Opinions, number: int, predicted: Tensor) -> Panel:
    one = opinions.take(torch.tensor([number]))
    text, audio, video, *padding = model_inputs(one)
    with ff.attention_maps(model) as maps:
        model(text, audio, video, *padding)
    return Panel(
        [VOCABULARY[n] for n in text[0].tolist()],
        audio[0],
        video[0],
        # The first of a pair's maps is what its first modality attends to.
        maps["transformer.fusion.text_audio"][0][0],
        maps["transformer.fusion.text_video"][0][0],
        int(one.stressed),
        CLASSES[int(predicted[number])],
        CLASSES[int(one.label)],
        bool(one.sarcastic),
    )
