"""VQA v2.0: the official accuracy on odd answers, worked out by hand, and files of its form."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fastfusion.data import vqa
from fastfusion.data.vqa import AnswerVocabulary, Question

# Answers and what the evaluation compares.
NORMALIZED = [
    ("yes", "yes"),
    ("Yes.", "yes"),
    ("  YES \n", "yes"),
    ("the dog", "dog"),
    ("The  Dog", "dog"),
    ("a", ""),
    ("an apple a day", "apple day"),
    ("another", "another"),
    ("two", "2"),
    ("Ten", "10"),
    ("eleven", "eleven"),
    ("none", "0"),
    ("None of the above", "0 of above"),
    ("twenty one", "twenty 1"),
    ("1,000", "1000"),
    ("1, 2", "1 2"),
    ("1,000 red-white", "1000 redwhite"),
    ("red-white", "red white"),
    ("red - white", "red white"),
    ("red -white", "red white"),
    ("red-white -blue", "redwhite blue"),
    ("red/white", "red white"),
    ("red / white", "red white"),
    ("red, white", "red white"),
    ("red,white", "red white"),
    ("3.5", "3.5"),
    ("3. 5", "3 5"),
    (".5", ".5"),
    ("5.", "5"),
    ("u.s.a.", "usa"),
    ("p.m", "pm"),
    ("10:30", "10:30"),
    ("10:30 p.m.", "10:30 pm"),
    ("$5", "$5"),
    ("50%", "50%"),
    ("#1", "#1"),
    ("what?!", "what"),
    ("a_b", "b"),
    ("x@y", "x y"),
    ("(left)", "left"),
    ("[left] side", "left side"),
    ('"stop"', "stop"),
    ("dont", "don't"),
    ("don't", "don't"),
    ("Im", "im"),
    ("I'm", "i'm"),
    ("lets", "lets"),
    ("let's", "let's"),
    ("couldntve", "couldntve"),
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("somebody'd", "somebodyd"),
    ("somebodyd've", "somebody'd've"),
    ("yalld've", "yalld've"),
    ("yall'd've", "y'all'd've"),
    ("ow's'at", "'ow's'at"),
    ("twas", "'twas"),
    ("its", "its"),
    ("dont.", "don't"),
    ("one-way", "1 way"),
    ("the.", ""),
    ("", ""),
    (". " * 40, "." + " ." * 7),
    ("no\tparking", "no parking"),
    ("tt\nff", "tt ff"),
]


@pytest.mark.parametrize(("answer", "expected"), NORMALIZED)
def test_what_is_compared(answer: str, expected: str) -> None:
    assert vqa.normalize_answer(answer) == expected


def rows(*answers: str) -> list[dict[str, Any]]:
    return [
        {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
        for i, answer in enumerate(answers)
    ]


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)]
)
def test_so_many_of_ten_agree(count: int, expected: float) -> None:
    answers = ["red"] * count + [f"other {i}" for i in range(10 - count)]
    assert vqa.accuracy("red", answers) == pytest.approx(expected)
    assert vqa.accuracy("Red.", rows(*answers)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        # One and the same string: nothing is normalised, the prediction neither.
        ("yes", ["yes"] * 10, 1.0),
        ("yes.", ["yes"] * 10, 0.0),
        ("Yes", ["yes"] * 10, 0.0),
        ("two", ["Two"] * 10, 0.0),
        ("Two", ["Two"] * 10, 1.0),
        (" yes\n", ["yes"] * 10, 1.0),
        ("a dog", ["a dog"] * 10, 1.0),
        ("dog", ["a dog"] * 10, 0.0),
        # Of blanks around them strings are freed first: these are the same.
        ("yes.", ["yes"] * 9 + ["yes "], 0.0),
        # Two strings, if alike once they are normalised.
        ("yes.", ["yes"] * 9 + ["Yes"], 1.0),
        ("2", ["two"] * 5 + ["2"] * 5, 1.0),
        ("two", ["2"] * 9 + ["no"], 1.0),
        ("two", ["Two"] * 9 + ["no"], 1.0),
        ("", ["a"] * 3 + ["the"] * 7, 1.0),
        ("dog", ["a dog"] * 2 + ["cat"] * 8, 0.6),
        # Three and less than ten people.
        ("yes", ["yes", "no"], 1 / 6),
        ("yes", ["yes"], 0.0),
        ("yes", ["yes", "yes"], 1 / 3),
    ],
)
def test_accuracy(prediction: str, answers: list[str], expected: float) -> None:
    assert vqa.accuracy(prediction, answers) == pytest.approx(expected)
    assert vqa.accuracy(prediction, rows(*answers)) == pytest.approx(expected)


def test_equal_rows_without_ids_are_left_out_together() -> None:
    same = [{"answer": "red", "answer_confidence": "yes"}] * 4
    answers = [*same, *[{"answer": "blue", "answer_confidence": "yes"}] * 6]
    # Four people are asked without any "red", six with four of them.
    assert vqa.accuracy("red", answers) == pytest.approx(0.6)
    unsure = [{"answer": "red", "answer_confidence": "maybe"}, *answers[1:]]
    # The unsure one sees three "red", the three sure ones the unsure one alone.
    assert vqa.accuracy("red", unsure) == pytest.approx((1 + 3 * 1 / 3 + 6) / 10)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (("yes", []), ValueError, "answers must not be empty"),
        ((1, ["yes"]), TypeError, "prediction must be a str, got int"),
        (("yes", ["yes", None]), TypeError, r"answers\[1\] must be a str, got NoneType"),
        (("yes", [{"id": 3}]), TypeError, r"answers\[0\] must be a str, got NoneType"),
    ],
)
def test_bad_answers(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vqa.accuracy(*given)


# ---- files


def write_split(folder: Path, count: int = 30) -> tuple[Path, Path]:
    """Questions and annotations in the form of the published files."""
    questions, annotations = [], []
    for i in range(count):
        color = ("red", "Green", "blue")[i % 3]
        answers = [color] * 6 + ["two", "the dog", f"thing {i}", "3"]
        about = {"question_id": 1000 + i, "image_id": 40 + i // 3}
        questions.append({**about, "question": "What color is it?"})
        annotations.append(
            {
                **about,
                "question_type": ("what color is the", "how many")[i % 2],
                "answer_type": ("other", "number")[i % 2],
                "multiple_choice_answer": color,
                "answers": rows(*answers),
            }
        )
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "train2014"}
    paths = folder / "questions.json", folder / "annotations.json"
    paths[0].write_text(json.dumps({**head, "task_type": "Open-Ended", "questions": questions}))
    paths[1].write_text(json.dumps({**head, "annotations": annotations}))
    return paths


def test_files_are_read(tmp_path: Path) -> None:
    questions, annotations = write_split(tmp_path)
    read = vqa.read(questions, annotations)
    assert len(read) == 30
    assert read[4].question_id == 1004 and read[4].image_id == 41 and read[4].answer == "Green"
    assert read[4].question_type == "what color is the" and read[4].answer_type == "other"
    assert len(read[4].answers) == 10 and read[4].answers[6:8] == ("two", "the dog")
    test = vqa.read(questions)
    assert test[4] == Question(1004, 41, "What color is it?")
    path = vqa.image_path("coco", "train2014", 42)
    assert path == Path("coco/train2014/COCO_train2014_000000000042.jpg")


def test_results_and_accuracies(tmp_path: Path) -> None:
    read = vqa.read(*write_split(tmp_path))
    predictions = {q.question_id: ("green" if i % 3 == 1 else "2") for i, q in enumerate(read)}
    vqa.write_results(tmp_path / "results.json", predictions)
    assert vqa.read_results(tmp_path / "results.json") == predictions
    found = vqa.evaluate(predictions, read)
    assert found.overall == round(100 * (10 * 1.0 + 20 * 0.3) / 30, 2) == 53.33
    assert found.by_answer_type == {"other": 53.33, "number": 53.33}
    assert list(found.by_question_type) == ["what color is the", "how many"]
    with pytest.raises(ValueError, match="predictions has no answer to question 1000"):
        vqa.evaluate({}, read)
    with pytest.raises(ValueError, match="questions must not be empty"):
        vqa.evaluate({}, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON file"),
        ("[]", "an object with a list 'questions'"),
        ('{"questions": [{"question_id": 1}]}', r"questions\[0\] has no image_id, question"),
        ('{"questions": [3]}', r"questions\[0\] has no question_id"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "questions.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        vqa.read(path)


def test_files_of_two_splits(tmp_path: Path) -> None:
    questions, annotations = write_split(tmp_path)
    other = json.loads(annotations.read_text())
    del other["annotations"][7]
    annotations.write_text(json.dumps(other))
    with pytest.raises(
        ValueError, match="no answers to question 1007 about image 42: is it of the"
    ):
        vqa.read(questions, annotations)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", "is no JSON file"),
        ('{"question_id": 3}', "must hold a list of"),
        ('[{"question_id": 3, "answer": "a"}, {"question_id": 3, "answer": "b"}]', "3 twice"),
    ],
)
def test_bad_results(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        vqa.read_results(path)


# ---- what a model learns


def test_vocabulary_and_targets(tmp_path: Path) -> None:
    read = vqa.read(*write_split(tmp_path))
    vocabulary = AnswerVocabulary.of(read)
    assert vocabulary.answers == ("blue", "green", "red")  # ten each: in alphabetical order
    assert len(AnswerVocabulary.of(read, min_count=11)) == 0
    assert vocabulary.number("Red.") == 2 and vocabulary.number("two") is None
    wider = AnswerVocabulary(["red", "2", "dog", "green"])
    targets = wider.targets(read[:2])
    expected = [[1.0, 0.3, 0.3, 0.0], [0.0, 0.3, 0.3, 1.0]]
    assert targets.dtype == torch.float32 and targets.tolist() == torch.tensor(expected).tolist()
    people = Question(1, 1, "?", ("a red", "red", "Red.", "blue"), "red")
    assert wider.targets([people])[0, 0] == pytest.approx(0.9)
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [1.0, 0.0, 0.0, 0.0]])
    assert wider.predictions(read[:2], logits) == {1000: "2", 1001: "red"}
    with pytest.raises(ValueError, match="'red' twice"):
        AnswerVocabulary(["red", "2", "red"])


# ---- features


def test_features(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    features = torch.randn(36, 8)
    numpy.save(tmp_path / "a.npy", features.double().numpy())
    save_file({"features": features, "boxes": torch.rand(36, 4)}, tmp_path / "b.safetensors")
    save_file({"x": features.half()}, tmp_path / "c.safetensors")
    for name in ("a.npy", "b.safetensors"):
        read = vqa.read_features(tmp_path / name)
        assert read.dtype == torch.float32 and torch.equal(read, features)
    assert torch.equal(vqa.read_features(tmp_path / "c.safetensors"), features.half().float())
    save_file({"x": features, "y": features + 1}, tmp_path / "d.safetensors")
    numpy.save(tmp_path / "e.npy", numpy.zeros(3))
    numpy.save(tmp_path / "f.npy", numpy.zeros((3, 3), dtype=numpy.int64))
    for name, message in (
        ("d.safetensors", "must hold one tensor or 'features'"),
        ("e.npy", r"numbers \(regions, width\)"),
        ("f.npy", r"numbers \(regions, width\), got torch.int64"),
        ("g.csv", "must end in .npy or .safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            vqa.read_features(tmp_path / name)
