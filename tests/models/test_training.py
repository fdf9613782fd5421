"""Training, resuming, and the checkpoint."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastfusion.__main__ import main
from fastfusion.applications.stock import stock_twin
from fastfusion.applications.training import fit
from fastfusion.applications.vqa.evaluate import accuracy, predict
from fastfusion.applications.vqa.model import CHECKPOINT, Checkpoint, Config, EasyVQA
from fastfusion.applications.vqa.train import Batches, Settings, model_step
from fastfusion.data import easy_vqa as data
from fastfusion.models.parts import to_float

TINY = ["--limit", "24", "--batch-size", "8", "--epochs", "4"]


@pytest.fixture(scope="module")
def split() -> data.Split:
    return data.load("train", 48)


@pytest.fixture(scope="module")
def shipped() -> Checkpoint:
    return Checkpoint.load()


def test_a_few_steps_lower_the_loss(split: data.Split) -> None:
    vocabulary = data.Vocabulary.of(split.texts)
    tokens = vocabulary.encode(split.texts)
    torch.manual_seed(0)
    model = EasyVQA(Config(words=len(vocabulary), answers=13, width=32, dim_feedforward=32))
    before = accuracy(predict(model.eval(), split, tokens), split)
    settings = Settings(epochs=8, batch_size=8, lr=3e-3, warmup_steps=10)
    losses = fit(model, model_step(model, settings), Batches(split, tokens, settings), settings)
    assert len(losses) == 8 and not model.training
    assert losses[-1] < 0.6 * losses[0]
    assert before < 0.5 < accuracy(predict(model, split, tokens), split)


@pytest.mark.parametrize("epochs_done", [1, 3])
def test_resuming_gives_the_same_bits(
    epochs_done: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # One epoch of the baseline and four of the model: the interruption falls into either.
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    assert main(["train", *TINY, "--output", str(whole)]) == 0

    done = 0
    replace_file = os.replace

    def interrupted(source: str, target: str) -> None:
        nonlocal done
        replace_file(source, target)
        done += 1
        if done == epochs_done:
            raise KeyboardInterrupt

    monkeypatch.setattr("fastfusion.applications.training.os.replace", interrupted)
    assert main(["train", *TINY, "--output", str(parts)]) == 130
    assert "--resume" in capsys.readouterr().err
    assert not parts.exists()
    state = parts.with_name(parts.name + ".state")
    assert state.exists()

    assert main(["train", *TINY, "--seed", "7", "--output", str(parts), "--resume"]) == 1
    assert "other settings" in capsys.readouterr().err

    assert main(["train", *TINY, "--output", str(parts), "--resume"]) == 0
    assert not state.exists()
    one, other = Checkpoint.load(whole), Checkpoint.load(parts)
    assert one.model is not None and other.model is not None
    for networks in ((one.model, other.model), (one.question_only, other.question_only)):
        weights = [network.state_dict() for network in networks]
        for name in weights[0]:
            assert torch.equal(weights[0][name], weights[1][name]), name


def test_seeds_matter(tmp_path: Path) -> None:
    heads = []
    for name, seed in (("a", "1"), ("b", "2")):
        path = tmp_path / name
        assert main(["train", *TINY, "--baseline-only", "--seed", seed, "--output", str(path)]) == 0
        heads.append(Checkpoint.load(path).question_only.output.weight)
    assert not torch.equal(*heads)


def test_question_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "blind.safetensors"
    assert main(["train", *TINY, "--baseline-only", "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "question only:" in printed and "with the image" not in printed
    assert Checkpoint.load(path).model is None
    assert main(["demo", "--checkpoint", str(path), "--output", str(tmp_path / "x.png")]) == 1
    assert "question-only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--resume"], 1, "nothing to resume"),
        (["--lr", "-1"], 1, "lr must be a positive number"),
        (["--lr", "nan"], 1, "lr must be a positive number"),
        (["--epochs", "0"], 2, "must be at least 1"),
        (["--batch-size", "many"], 2, "invalid"),
        (["--output", "{tmp}/missing/x.safetensors"], 1, "there is no folder"),
        (["--output", "{tmp}"], 1, "is a folder"),
    ],
)
def test_bad_training_arguments(
    arguments: list[str], status: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = [a.format(tmp=tmp_path) for a in ("--output", "{tmp}/x.safetensors", *arguments)]
    try:
        result = main(["train", *TINY, *path])
    except SystemExit as exit_:
        result = exit_.code  # type: ignore[assignment]
    assert result == status
    assert text in capsys.readouterr().err


def test_checkpoint_round_trip(shipped: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "copy.safetensors"
    shipped.save(path)
    copy = Checkpoint.load(path)
    assert copy.config == shipped.config and copy.answers == shipped.answers
    assert (
        copy.vocabulary.entries == shipped.vocabulary.entries and copy.training == shipped.training
    )
    assert copy.model is not None and shipped.model is not None
    for name, value in shipped.model.state_dict().items():
        assert torch.equal(copy.model.state_dict()[name], value)


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint of this demo"):
        Checkpoint.load(tmp_path / "x.safetensors")


def test_shipped_checkpoint_is_small_and_says_how_it_was_made(shipped: Checkpoint) -> None:
    assert CHECKPOINT.stat().st_size <= 3_000_000
    assert shipped.training["accuracy"] >= 0.995
    assert 0.6 < shipped.training["question_only_accuracy"] < 0.7
    # Nobody trained on fewer images, or with settings that a plain `train` would not use.
    settings = dict(shipped.training["settings"])
    assert settings.pop("limit") is None and settings.pop("baseline_only") is False
    assert replace(Settings(), **settings) == Settings()


@pytest.mark.parametrize("transformer", ["fastfusion", "stock"])
def test_shipped_checkpoint_answers(shipped: Checkpoint, transformer: str) -> None:
    model: Callable[..., torch.Tensor] | None = shipped.model
    assert isinstance(model, EasyVQA)
    if transformer == "stock":
        model = stock_twin(model)
    pixels = torch.full((2, 3, 64, 64), 0.95)
    pixels[0, :, 20:40, 10:40] = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1)
    line = torch.arange(64)
    disc = (line[:, None] - 40).square() + (line - 24).square() <= 12**2
    pixels[1, :, disc] = torch.tensor([1.0, 1.0, 0.0]).view(3, 1)
    asked = {
        "What color is the shape?": ("blue", "yellow"),
        "What shape is in the image?": ("rectangle", "circle"),
        "Is there a circle?": ("no", "yes"),
        "Is there not a circle in the image?": ("yes", "no"),
        "Does the image contain a blue shape?": ("yes", "no"),
        "Is no yellow shape present?": ("yes", "no"),
    }
    for question, expected in asked.items():
        words = shipped.vocabulary.encode([question] * 2)
        given = model(pixels, words).argmax(dim=1)
        assert tuple(shipped.answers[a] for a in given) == expected, question


def test_shipped_checkpoint_on_test_images(shipped: Checkpoint) -> None:
    assert shipped.model is not None
    split = data.load("test", 60)
    assert len(split) > 500
    tokens = shipped.vocabulary.encode(split.texts)
    together = predict(shipped.model, split, tokens)
    assert accuracy(together, split) > 0.98
    some = torch.arange(0, len(split), 40)
    images = to_float(split.images[split.image_index[some]])
    alone = shipped.model(images, tokens[split.text_index[some]]).argmax(dim=1)
    assert torch.equal(alone, together[some]), "sharing the encodings changes no answer"


def test_shipped_checkpoint_in_the_stock_twin(shipped: Checkpoint) -> None:
    assert shipped.model is not None
    stock = stock_twin(shipped.model)
    split = data.load("test", 20)
    some = torch.arange(0, len(split), 3)
    images = to_float(split.images[split.image_index[some]])
    words = shipped.vocabulary.encode(split.texts)[split.text_index[some]]
    with torch.inference_mode():
        torch.testing.assert_close(shipped.model(images, words), stock(images, words))
