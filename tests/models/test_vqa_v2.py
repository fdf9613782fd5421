"""Training on files of the form of VQA v2.0, which the test makes: colours of regions, and which
there is more of."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastfusion.__main__ import main
from fastfusion.applications import checkpoint
from fastfusion.applications.training import Training
from fastfusion.applications.vqa import official
from fastfusion.data import vqa

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
SMALL = {"width": 32, "num_heads": 2, "dim_feedforward": 48, "num_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vqa")
    draw = random.Random(0)
    for split, count, first in (("train2014", 240, 1), ("val2014", 80, 1000)):
        questions: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(first, first + count):
            colour = draw.choice(list(COLOURS))
            regions = draw.randint(2, 5)
            features = numpy.full((regions, 4), 0.1, dtype=numpy.float32)
            features[draw.randrange(regions), list(COLOURS).index(colour)] = 2.0
            name = vqa.image_path(folder, split, number).stem
            (folder / "features").mkdir(exist_ok=True)
            numpy.save(folder / "features" / f"{name}.npy", features)
            asked = draw.choice(list(COLOURS))
            rows = [
                ("What color is it?", colour, "other"),
                (f"Is there anything {asked}?", "yes" if asked == colour else "no", "yes/no"),
            ]
            for text, answer, kind in rows:
                common = {"question_id": len(questions) + 10 * first, "image_id": number}
                questions.append({**common, "question": text})
                texts = [answer] * 9 + ["The thing"]
                given = [{"answer": text, "answer_id": i} for i, text in enumerate(texts)]
                annotations.append({
                    **common, "answers": given, "multiple_choice_answer": answer,
                    "answer_type": kind, "question_type": text[:4],
                })  # fmt: skip
        files = {"v2_OpenEnded_mscoco_{}_questions": ("questions", questions)}
        files["v2_mscoco_{}_annotations"] = ("annotations", annotations)
        for name, (key, content) in files.items():
            (folder / f"{name.format(split)}.json").write_text(json.dumps({key: content}))
    return folder


def test_training_learns_and_is_judged_officially(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    output = tmp_path / "x.safetensors"
    settings = official.Settings(epochs=12, batch_size=32, lr=4e-3, warmup_steps=20, sizes=SMALL)
    official.train(Training(output, settings, say=said.append), folder)
    predictions = vqa.read_results(tmp_path / "x.safetensors.results.json")
    questions = official.Folder(folder, "val2014").questions
    found = vqa.evaluate(predictions, questions)
    assert found.overall > 85 and set(found.by_answer_type) == {"other", "yes/no"}
    assert f"official accuracy, all: {found.overall:.2f}" in said

    content = checkpoint.load(output, official.FORMAT)
    assert set(content.metadata["answers"]) == {"red", "green", "blue", "yes", "no"}
    assert content.metadata["training"]["accuracy"] == found.overall
    model = official.FeatureVQA(official.Config(**content.metadata["config"]))
    content.fill("model", model)
    vocabulary = official.Vocabulary(content.metadata["vocabulary"])
    data = official.Folder(folder, "val2014", 20)
    answers = vqa.AnswerVocabulary(content.metadata["answers"])
    again = official.predict(model, data, vocabulary, answers, chunk=7)
    assert again == {q.question_id: predictions[q.question_id] for q in data.questions}


def test_missing_regions_do_not_count(folder: Path) -> None:
    data = official.Folder(folder, "train2014", 12)
    features, hidden = data.batch(data.questions)
    lengths = [len(data.features(q.image_id)) for q in data.questions]
    assert (~hidden).sum(dim=1).tolist() == lengths and features.shape[1] == max(lengths)
    torch.manual_seed(0)
    model = official.FeatureVQA(official.Config(4, 20, 5, **SMALL)).eval()
    tokens = official.encode(official.word_vocabulary(data.questions), data.questions)
    expected = model(features, hidden, tokens)
    torch.testing.assert_close(
        model(features.masked_fill(hidden.unsqueeze(-1), 9.0), hidden, tokens), expected
    )


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "x"), "--limit", "60", "--epochs", "1"]
    assert main(["train", "vqa", "--data", str(folder), *output]) == 0
    assert "official accuracy, yes/no" in capsys.readouterr().out
    assert main(["train", "vqa", "--data", str(tmp_path), *output]) == 1
    assert "v2_OpenEnded_mscoco_train2014_questions.json" in capsys.readouterr().err
    assert main(["train", "captioning", "--data", str(folder), *output]) == 1
    assert "--data is not for it" in capsys.readouterr().err


def test_missing_features_are_named(folder: Path) -> None:
    data = official.Folder(folder, "train2014", 2)
    with pytest.raises(FileNotFoundError, match="COCO_train2014_000000099999.npy"):
        data.features(99999)


def test_long_and_empty_questions() -> None:
    questions = [vqa.Question(1, 1, " ".join(["why"] * 40)), vqa.Question(2, 1, "???")]
    tokens = official.encode(official.word_vocabulary(questions), questions)
    assert tokens.shape == (2, official.MAX_WORDS)
    assert (tokens[1] != 0).sum() == 1, "a question without words is an unknown one"


# ---- features of a backbone, and rows of other packages


def as_map(x: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(x, 16)


BACKBONES: dict[str, Callable[[Tensor], Any]] = {
    "map": as_map,
    "tokens": lambda x: as_map(x).flatten(2).transpose(1, 2),
    "transformers": lambda x: SimpleNamespace(last_hidden_state=as_map(x).flatten(2).mT),
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_features_of_a_backbone(kind: str, tmp_path: Path) -> None:
    paths = []
    for name, colour in COLOURS.items():
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", (40, 20), colour).save(paths[-1])
    given = {"size": 32, "mean": (0, 0, 0), "std": (1, 1, 1), "batch_size": 2}
    assert vqa.extract_features(paths, tmp_path / "f", BACKBONES[kind], **given) == 3
    assert vqa.extract_features(paths, tmp_path / "f", BACKBONES[kind], **given) == 0
    for name, colour in COLOURS.items():
        found = vqa.read_features(tmp_path / "f" / f"{name}.npy")
        expected = torch.tensor(colour).float().expand(4, 3) / 255
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"got \(1, 3072\)"):
        vqa.extract_features(paths[:1], tmp_path / "g", lambda x: x.flatten(1), size=32)


def test_features_of_a_real_backbone(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=1, image_size=64)
    model = transformers.ViTModel(config).eval()
    Image.new("RGB", (50, 50), (9, 99, 199)).save(tmp_path / "a.png")
    vqa.extract_features([tmp_path / "a.png"], tmp_path, model, size=64)
    assert vqa.read_features(tmp_path / "a.npy").shape == (17, 48)


def test_rows_of_other_packages() -> None:
    picture = object()
    given = [{"answer": "red", "answer_id": 1}] * 7 + [{"answer": "blue", "answer_id": 2}] * 3
    rows = [
        {
            "question": "what?",
            "image": picture,
            "question_id": 7,
            "image_id": 3,
            "answers": given,
        },
        {"question": "who?", "image": picture, "answers": ["you", "me", "me"], "answer_type": "x"},
        {"question": "when?", "image": picture},
    ]
    found = list(vqa.from_rows(iter(rows)))
    assert all(image is picture for _, image in found)
    first, second, third = (question for question, _ in found)
    assert (first.question_id, first.image_id, first.answer) == (7, 3, "red")
    assert second.answers == ("you", "me", "me") and second.answer == "me"
    assert (second.question_id, second.answer_type) == (1, "x")
    assert third.answers == () and third.answer is None
    with pytest.raises(ValueError, match="row 0 has no image; it has"):
        next(vqa.from_rows([{"question": "what?"}]))
