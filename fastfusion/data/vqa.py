"""VQA v2.0 as it is published: files, answers, targets and the official accuracy.

Goyal et al., "Making the V in VQA Matter", 2017; Antol et al., "VQA: Visual Question Answering",
2015. Questions and annotations are the JSON files of visualqa.org, ten human answers to each
question. Answers that at least nine questions have for their most frequent one make the vocabulary
(3,129 of train and val together), and a model learns how much each would score: 0.3, 0.6, 0.9 or 1
(Teney et al., "Tips and Tricks for Visual Question Answering", 2017).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MIN_COUNT = 9
_SCORES = (0.0, 0.3, 0.6, 0.9)  # of an answer that so many of the ten people gave; above, 1

# ---- the official accuracy

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_AROUND_A_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # that are taken out of one answer at most

# Words that get their apostrophe back where it is missing; of two, where either is missing.
_ONE_APOSTROPHE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's "
    "how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've "
    "o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll "
    "someone's something'd something'll that's there'd there're there's they'd they'll they're "
    "they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd "
    "you'll you're you've"
)
_TWO_APOSTROPHES = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've "
    "someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've"
)


def _contractions() -> dict[str, str]:
    found = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _TWO_APOSTROPHES.split():
        first, second, third = word.split("'")
        found[f"{first}{second}'{third}"] = word
        found[f"{first}'{second}{third}"] = word
    found["somebody'd"] = "somebodyd"  # the evaluation takes this one out
    return found | {
        "ow's'at": "'ow's'at",
        "'ows'at": "'ow's'at",
        "'ow'sat": "'ow's'at",
        "yall'll": "y'all'll",
        "y'allll": "y'all'll",
        "yall'd've": "y'all'd've",
        "y'alld've": "y'all'd've",
        "y'all'dve": "y'all'd've",
    }


_CONTRACTIONS = _contractions()


def normalize_answer(answer: str) -> str:
    """An answer as the evaluation compares it: without punctuation and articles, in lower case,
    numbers up to ten as digits, contractions with their apostrophe."""
    answer = _stripped(answer)
    together = _DIGITS_AROUND_A_COMMA.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        at_an_edge = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if together or at_an_edge else " ")
    text = _PERIOD.sub("", text, count=_PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def accuracy(prediction: str, answers: Iterable[str | Mapping[str, Any]]) -> float:
    """The official accuracy of one prediction, as the authors' own evaluation computes it.

    The mean over the people of min(1, n / 3), where n of the others gave this answer. Answers and
    prediction are normalised (:func:`normalize_answer`), but neither where all people gave one and
    the same string: "yes." scores 0 against ten times "yes".

    Args:
        prediction: the answer to be judged.
        answers: of people, ten of them in VQA: strings, or rows of an annotation file, of which
            equal ones are left out together, where they have no `answer_id`.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: no answers.
        TypeError: a prediction or an answer that is no str.
    """
    if not isinstance(prediction, str):
        raise TypeError(f"prediction must be a str, got {type(prediction).__name__}")
    people: list[tuple[Any, str]] = []
    for i, answer in enumerate(answers):
        text = answer.get("answer") if isinstance(answer, Mapping) else answer
        if not isinstance(text, str):
            raise TypeError(f"answers[{i}] must be a str, got {type(text).__name__}")
        rest = i
        if isinstance(answer, Mapping):
            rest = sorted((str(k), str(v)) for k, v in answer.items() if k != "answer")  # type: ignore[assignment]
        people.append((rest, _stripped(text)))
    if not people:
        raise ValueError("answers must not be empty")
    prediction = _stripped(prediction)
    if len({text for _, text in people}) > 1:
        people = [(rest, normalize_answer(text)) for rest, text in people]
        prediction = normalize_answer(prediction)
    scores = []
    for person in people:
        agreeing = sum(other != person and other[1] == prediction for other in people)
        scores.append(min(1.0, agreeing / 3))
    return sum(scores) / len(scores)


@dataclass(frozen=True)
class Accuracies:
    """Percentages, rounded to two digits as the evaluation rounds them.

    Attributes:
        overall: over all questions.
        by_answer_type: "yes/no", "number" and "other".
        by_question_type: by the first words, "what is the" and so on.
    """

    overall: float
    by_answer_type: dict[str, float]
    by_question_type: dict[str, float]


def evaluate(predictions: Mapping[int, str], questions: Iterable["Question"]) -> Accuracies:
    """The official accuracies of predictions, by question_id.

    Raises:
        ValueError: a question without prediction or without answers; no questions.
    """
    scores: list[float] = []
    answer_types: dict[str, list[float]] = {}
    question_types: dict[str, list[float]] = {}
    for question in questions:
        if question.question_id not in predictions:
            raise ValueError(f"predictions has no answer to question {question.question_id}")
        score = accuracy(predictions[question.question_id], question.answers)
        scores.append(score)
        answer_types.setdefault(question.answer_type, []).append(score)
        question_types.setdefault(question.question_type, []).append(score)
    if not scores:
        raise ValueError("questions must not be empty")

    def percent(some: Sequence[float]) -> float:
        return round(100 * sum(some) / len(some), 2)

    return Accuracies(
        percent(scores),
        {name: percent(some) for name, some in answer_types.items()},
        {name: percent(some) for name, some in question_types.items()},
    )


# ---- files


@dataclass(frozen=True)
class Question:
    """A question about an image; of test splits without answers.

    Attributes:
        question_id, image_id: numbers of the data set.
        question: the text.
        answers: what people answered, ten of them.
        answer: the most frequent of these; None without answers.
        answer_type, question_type: as the data set calls them; "" without answers.
    """

    question_id: int
    image_id: int
    question: str
    answers: tuple[str, ...] = ()
    answer: str | None = None
    answer_type: str = ""
    question_type: str = ""


def read(questions: str | Path, annotations: str | Path | None = None) -> list[Question]:
    """Read a file of questions, and one of annotations where the split has answers.

    Args:
        questions: such as v2_OpenEnded_mscoco_train2014_questions.json.
        annotations: such as v2_mscoco_train2014_annotations.json.

    Returns:
        The questions, in the order of their file.

    Raises:
        ValueError: a file that is not of this form, or questions and annotations of two splits.
    """
    asked = _rows(questions, "questions", ("question_id", "image_id", "question"))
    if annotations is None:
        return [Question(r["question_id"], r["image_id"], r["question"]) for r in asked]
    needed = ("question_id", "image_id", "answers", "answer_type", "question_type")
    answered = {row["question_id"]: row for row in _rows(annotations, "annotations", needed)}
    found = []
    for row in asked:
        about = answered.get(row["question_id"])
        if about is None or about["image_id"] != row["image_id"]:
            raise ValueError(
                f"{annotations} has no answers to question {row['question_id']} about image "
                f"{row['image_id']}: is it of the same split as {questions}?"
            )
        answers = tuple(answer["answer"] for answer in about["answers"])
        most = about.get("multiple_choice_answer") or Counter(answers).most_common(1)[0][0]
        found.append(
            Question(
                row["question_id"], row["image_id"], row["question"], answers, most,
                about["answer_type"], about["question_type"],
            )
        )  # fmt: skip
    return found


def from_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Question, Any]]:
    """Questions and their images out of rows, one at a time, as the Hugging Face package `datasets`
    and others give them.

    Args:
        rows: with ``question`` and ``image``, which is passed on as it is; where the row has them,
            ``question_id`` and ``image_id`` (otherwise its place), ``answers`` (texts, or mappings
            with ``answer``), ``multiple_choice_answer``, ``answer_type`` and ``question_type``.

    Raises:
        ValueError: a row without question or image.
    """
    for place, row in enumerate(rows):
        missing = [key for key in ("question", "image") if key not in row]
        if missing:
            raise ValueError(f"row {place} has no {', '.join(missing)}; it has {sorted(row)}")
        given = row.get("answers") or ()
        answers = tuple(a if isinstance(a, str) else a["answer"] for a in given)
        most = row.get("multiple_choice_answer")
        if most is None and answers:
            most = Counter(answers).most_common(1)[0][0]
        question = Question(
            row.get("question_id", place), row.get("image_id", place), row["question"], answers,
            most, row.get("answer_type") or "", row.get("question_type") or "",
        )  # fmt: skip
        yield question, row["image"]


def _rows(path: str | Path, name: str, needed: Sequence[str]) -> list[dict[str, Any]]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold an object with a list {name!r}")
    for i, row in enumerate(rows):
        missing = [key for key in needed if not isinstance(row, dict) or key not in row]
        if missing:
            raise ValueError(f"{path}: {name}[{i}] has no {', '.join(missing)}")
    return rows


def image_path(folder: str | Path, split: str, image_id: int) -> Path:
    """Where an image of COCO lies: folder/train2014/COCO_train2014_000000000042.jpg."""
    return Path(folder) / split / f"COCO_{split}_{image_id:012d}.jpg"


def write_results(path: str | Path, predictions: Mapping[int, str]) -> None:
    """A file of predictions, by question_id, as the evaluation and its server take it."""
    rows = [{"question_id": number, "answer": text} for number, text in predictions.items()]
    Path(path).write_text(json.dumps(rows), encoding="utf-8")


def read_results(path: str | Path) -> dict[int, str]:
    """What `write_results` wrote, or another program for the same evaluation.

    Raises:
        ValueError: another form, or two answers to one question.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    found: dict[int, str] = {}
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, dict) or not {"question_id", "answer"} <= row.keys():
            raise ValueError(f"{path} must hold a list of {{question_id, answer}}, got {row!r}")
        if row["question_id"] in found:
            raise ValueError(f"{path} answers question {row['question_id']} twice")
        found[row["question_id"]] = row["answer"]
    return found


# ---- what a model learns


class AnswerVocabulary:
    """The answers that a model chooses from, and their numbers.

    Args:
        answers: normalised, each once.

    Raises:
        ValueError: an answer that stands there twice.
    """

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = tuple(answers)
        self._number = {answer: number for number, answer in enumerate(self.answers)}
        if len(self._number) < len(self.answers):
            twice = next(a for a, count in Counter(self.answers).items() if count > 1)
            raise ValueError(f"answers must be different ones, got {twice!r} twice")

    @classmethod
    def of(cls, questions: Iterable[Question], min_count: int = MIN_COUNT) -> "AnswerVocabulary":
        """The most frequent answers to at least `min_count` of the questions, frequent ones first,
        equally frequent ones in alphabetical order."""
        counts = Counter(normalize_answer(q.answer) for q in questions if q.answer is not None)
        kept = [(-count, answer) for answer, count in counts.items() if count >= min_count]
        return cls([answer for _, answer in sorted(kept)])

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, number: int) -> str:
        return self.answers[number]

    def number(self, answer: str) -> int | None:
        """That of an answer, normalised; None of one that is not in the vocabulary."""
        return self._number.get(normalize_answer(answer))

    def targets(self, questions: Sequence[Question]) -> Tensor:
        """How much each answer would score, to be learnt with binary cross-entropy.

        Returns:
            float32 (questions, answers): 0, 0.3, 0.6, 0.9, or 1 where more than three of the people
            gave the answer. Rows of questions of whose answers none is in the vocabulary are 0.
        """
        scores = torch.zeros(len(questions), len(self), dtype=torch.float32)
        for row, question in zip(scores, questions, strict=True):
            for answer, count in Counter(map(normalize_answer, question.answers)).items():
                number = self._number.get(answer)
                if number is not None:
                    row[number] = _SCORES[count] if count < len(_SCORES) else 1.0
        return scores

    def predictions(self, questions: Sequence[Question], logits: Tensor) -> dict[int, str]:
        """The best answer to each question by its logits (questions, answers), by question_id."""
        best = logits.argmax(-1).tolist()
        return {q.question_id: self.answers[n] for q, n in zip(questions, best, strict=True)}


# ---- features


def read_features(path: str | Path) -> Tensor:
    """Features of an image's regions from a file: .npy, or .safetensors with one tensor, or one
    that is called "features".

    Returns:
        float32 (regions, width).

    Raises:
        ValueError: another kind of file, or features of another form.
    """
    path = Path(path)
    if path.suffix == ".npy":
        import numpy

        tensor = torch.from_numpy(numpy.load(path, allow_pickle=False))
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
        if len(tensors) != 1 and "features" not in tensors:
            raise ValueError(f"{path} must hold one tensor or 'features', got {sorted(tensors)}")
        tensor = tensors["features"] if "features" in tensors else next(iter(tensors.values()))
    else:
        raise ValueError(f"{path} must end in .npy or .safetensors")
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(
            f"{path} must hold numbers (regions, width), got {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor.float()


# As torchvision, timm and transformers normalise pictures of ImageNet.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def extract_features(
    images: Iterable[str | Path],
    folder: str | Path,
    backbone: Callable[[Tensor], Any],
    *,
    size: int = 224,
    mean: Sequence[float] = _MEAN,
    std: Sequence[float] = _STD,
    batch_size: int = 16,
) -> int:
    """Write features of images, as :func:`read_features` reads them: ``folder/<image's name>.npy``.

    Args:
        images: files that Pillow reads.
        folder: made if it is missing; an image whose file is there already is left out.
        backbone: from float32 (n, 3, size, size) to a feature map (n, width, rows, columns), tokens
            (n, regions, width), or an object with these as ``last_hidden_state`` or ``features``:
            torchvision's and timm's ``forward_features``, a model of transformers. Called in
            inference mode as it is, so call `eval()` on it before.
        size: to which pictures are resized, both ways.
        mean, std: of each channel, subtracted from and divided out of numbers from 0 to 1.
        batch_size: pictures in a call.

    Returns:
        How many files were written.

    Raises:
        ValueError: features of another form.
        ImportError: Pillow is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    todo = [p for p in map(Path, images) if not (folder / f"{p.stem}.npy").exists()]
    shift, scale = (torch.tensor(tuple(each)).view(-1, 1, 1) for each in (mean, std))
    for first in range(0, len(todo), batch_size):
        some = todo[first : first + batch_size]
        pictures = torch.stack([(_picture(path, size) - shift) / scale for path in some])
        with torch.inference_mode():
            features = _regions(backbone(pictures))
        for path, row in zip(some, features, strict=True):
            _save(folder / f"{path.stem}.npy", row)
    return len(todo)


def _picture(path: Path, size: int) -> Tensor:
    import numpy
    from PIL import Image

    with Image.open(path) as image:
        pixels = numpy.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _regions(output: Any) -> Tensor:
    for name in ("last_hidden_state", "features"):
        output = getattr(output, name, output)
    if not isinstance(output, Tensor) or output.dim() not in (3, 4):
        form = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            "backbone must return a feature map (n, width, rows, columns) or tokens (n, regions, "
            f"width), got {form}"
        )
    return output.flatten(2).transpose(1, 2) if output.dim() == 4 else output


def _save(path: Path, features: Tensor) -> None:
    import numpy

    numpy.save(path, features.float().numpy(), allow_pickle=False)
