"""Sentiment of spoken opinions: the synthetic data, training, and the checkpoint that ships."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastfusion.__main__ import main
from fastfusion.applications.sentiment import data
from fastfusion.applications.sentiment.data import CLASSES, MODALITIES, VOCABULARY, make
from fastfusion.applications.sentiment.model import CHECKPOINT, Checkpoint
from fastfusion.applications.sentiment.train import (
    TEST_SEED,
    Batches,
    Settings,
    accuracy,
    model_inputs,
    with_subsets,
)
from fastfusion.applications.stock import stock_twin

TINY = ["--limit", "32", "--batch-size", "8", "--epochs", "1"]


@pytest.fixture(scope="module")
def shipped() -> Checkpoint:
    return Checkpoint.load()


@pytest.fixture(scope="module")
def opinions() -> data.Opinions:
    return make(400, TEST_SEED)


def test_data_follow_from_the_seed() -> None:
    one, same, other = make(20, 3), make(20, 3), make(20, 4)
    for name, value in vars(one).items():
        assert torch.equal(value, vars(same)[name]), name
    assert [one.sentence(n) for n in range(20)] != [other.sentence(n) for n in range(20)]
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        make(0, 3)


def test_words_mean_what_the_sample_says(opinions: data.Opinions) -> None:
    value = dict.fromkeys(data.GOOD, 1) | dict.fromkeys(data.BAD, -1) | dict.fromkeys(data.PLAIN, 0)
    for number in range(100):
        words = opinions.sentence(number).split()
        place = int(opinions.stressed[number])
        start = max(n for n in range(place) if words[n] == "was")
        said = value[words[place]] * (-1 if "not" in words[start:place] else 1)
        if opinions.sarcastic[number]:
            said = -said
        assert CLASSES[said + 1] == CLASSES[int(opinions.label[number])]
    assert (opinions.label.bincount(minlength=3) > 100).all()


def test_the_voice_is_loudest_at_the_word_that_matters(opinions: data.Opinions) -> None:
    plain = (~opinions.sarcastic).nonzero().flatten()
    length = (~opinions.audio_padding).sum(dim=1)
    words = (~opinions.text_padding).sum(dim=1)
    loud = opinions.audio[:, :, 1].masked_fill(opinions.audio_padding, -9.0).argmax(dim=1) / length
    late = opinions.stressed == words - 1
    assert ((loud > 0.6) == late)[plain].double().mean() > 0.8
    # Slow speech has more frames per word.
    frames = length / words
    assert frames[opinions.sarcastic].mean() > 1.2 * frames[~opinions.sarcastic].mean()


def test_lengths_are_not_aligned_and_padding_is_empty(opinions: data.Opinions) -> None:
    lengths = {}
    for name in MODALITIES:
        padding, values = vars(opinions)[f"{name}_padding"], vars(opinions)[name]
        assert (values[padding] == 0).all()
        lengths[name] = (~padding).sum(dim=1)
        assert len(lengths[name].unique()) > 3
    assert (lengths["audio"] > lengths["text"]).double().mean() > 0.9
    assert (lengths["text"] > lengths["video"]).double().mean() > 0.6


def test_faces_smile_and_frown() -> None:
    faces = data.draw_faces(torch.tensor([1.0, 0.0, -1.0]), torch.zeros(3, 2), torch.zeros(3))
    assert faces.shape == (3, data.FACE, data.FACE)
    for face in faces:
        torch.testing.assert_close(face, face.flip(1))
    # The corners of the mouth: above its middle in a smile, below it in a frown.
    corner = faces[:, 9:14, 5].argmax(dim=1) - faces[:, 9:14, 7].argmax(dim=1)
    assert corner[0] < corner[1] <= corner[2] and corner[2] > 0


def test_augmentation_takes_modalities_away_but_never_all(opinions: data.Opinions) -> None:
    batches = Batches(opinions, Settings(), missing=1.0)
    hidden = batches.augment(opinions, torch.Generator().manual_seed(0))
    gone = torch.stack([vars(hidden)[f"{name}_padding"].all(dim=1) for name in MODALITIES])
    assert set(gone.sum(dim=0).tolist()) == {1, 2}
    whole = replace(batches.settings, noise=0.0)
    kept = Batches(opinions, whole, missing=0.0).augment(opinions, torch.Generator())
    assert torch.equal(kept.text, opinions.text)
    assert torch.equal(kept.video_padding, opinions.video_padding)
    with pytest.raises(ValueError, match="a modality is one of .* got 'smell'"):
        opinions.without("smell")


def test_tiny_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.safetensors"
    command = ["train", "sentiment", *TINY, "--output", str(path)]
    assert main(command) == 0
    assert "text + video: " in capsys.readouterr().out
    made = Checkpoint.load(path)
    assert made.model is not None and set(made.alone) == set(MODALITIES)
    assert len(made.training["by_modalities"]) == 7
    assert main([*command, "--baseline-only"]) == 0
    assert Checkpoint.load(path).model is None
    demo = ["demo", "sentiment", "--checkpoint", str(path), "--output", str(tmp_path / "x.png")]
    assert main(demo) == 1
    assert "only the baselines" in capsys.readouterr().err


def test_checkpoint_of_other_words_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fastfusion.applications.sentiment.model.VOCABULARY", (*VOCABULARY[:-1], "odd")
    )
    with pytest.raises(ValueError, match="made with other words"):
        Checkpoint.load()


def test_shipped_checkpoint_is_small_and_says_how_it_was_made(shipped: Checkpoint) -> None:
    assert CHECKPOINT.stat().st_size <= 3_000_000
    settings = dict(shipped.training["settings"])
    assert settings.pop("limit") is None and settings.pop("baseline_only") is False
    assert replace(Settings(), **settings) == Settings()
    best = max(shipped.training[f"{name}_alone"] for name in MODALITIES)
    assert shipped.training["accuracy"] >= best + 0.05


def test_shipped_checkpoint_without_some_modalities(
    shipped: Checkpoint, opinions: data.Opinions
) -> None:
    assert shipped.model is not None
    shares = with_subsets(shipped.model, opinions)
    alone = {name: accuracy(network, opinions) for name, network in shipped.alone.items()}
    whole = shares[" + ".join(MODALITIES)]
    assert whole >= max(alone.values()) + 0.05
    for kept, share in shares.items():
        # Without the words or the face it is worse, but not much worse than what was trained on
        # that alone; the voice adds little.
        if "text" not in kept or "video" not in kept:
            assert share < whole - 0.05, kept
        assert share >= max(alone[name] for name in kept.split(" + ")) - 0.08, kept


def test_shipped_checkpoint_in_the_stock_twin(shipped: Checkpoint, opinions: data.Opinions) -> None:
    assert shipped.model is not None
    given = model_inputs(opinions.take(torch.arange(20)))
    with torch.inference_mode():
        torch.testing.assert_close(shipped.model(*given), stock_twin(shipped.model)(*given))


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "sentiment.png"
    assert main(["demo", "sentiment", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    gain = re.search(r"all three: ([\d.]+) points above", printed)
    assert gain is not None and float(gain[1]) >= 5
    assert "without video: 32 of 32 samples are NaN in stock torch.nn" in printed
    assert "; 0 here" in printed and printed.count("(true: ") == 3
    assert "synthetic" in printed and str(picture) in printed

    from PIL import Image

    with Image.open(picture) as image:
        assert min(image.size) > 500
