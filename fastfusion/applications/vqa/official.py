"""Training on VQA v2.0 as it is published: ``python -m fastfusion train vqa --data DIR``.

The folder holds the official files under their names, and for each image its regions' features:

    v2_OpenEnded_mscoco_train2014_questions.json   v2_mscoco_train2014_annotations.json
    v2_OpenEnded_mscoco_val2014_questions.json     v2_mscoco_val2014_annotations.json
    features/COCO_train2014_000000000009.npy (or .safetensors): (regions, width)

`fastfusion.data.vqa.extract_features` makes such files with any backbone.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastfusion.applications.training import Outcome, Schedule, Training, shuffled
from fastfusion.data import vqa
from fastfusion.data.easy_vqa import Vocabulary, words
from fastfusion.data.vqa import AnswerVocabulary, Question
from fastfusion.models import VQATransformer
from fastfusion.models.parts import TokenEmbedding

CHECKPOINT = Path("vqa_v2.safetensors")  # that is made; none ships
FOLDER = Path("vqa_v2")  # of the files, unless another is named
FORMAT = "fastfusion vqa v2 1"
MAX_WORDS = 24  # the longest question has 23, and what is behind is cut off
MIN_WORD_COUNT = 3


@dataclass(frozen=True)
class Settings(Schedule):
    """The schedule; a batch has ``batch_size`` questions."""

    epochs: int = 12
    batch_size: int = 128
    lr: float = 3e-4
    warmup_steps: int = 1000
    weight_decay: float = 0.01
    min_count: int = vqa.MIN_COUNT  # of an answer that is learnt
    sizes: Mapping[str, Any] = field(default_factory=dict)  # of Config, other than its defaults


@dataclass(frozen=True)
class Config:
    """Sizes of the network: widths of the features and inside, words and answers that it knows."""

    feature_dim: int
    words: int
    answers: int
    width: int = 384
    num_heads: int = 6
    dim_feedforward: int = 1536
    num_layers: int = 3
    dropout: float = 0.1


class FeatureVQA(nn.Module):
    """Features of regions and a question to the logits of answers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(config.feature_dim, config.width), nn.LayerNorm(config.width)
        )
        self.question = TokenEmbedding(config.words, config.width, MAX_WORDS)
        self.transformer = VQATransformer(
            config.width,
            config.width,
            config.num_heads,
            config.dim_feedforward,
            config.num_layers,
            config.answers,
            dropout=config.dropout,
        )

    def forward(self, features: Tensor, hidden: Tensor, questions: Tensor) -> Tensor:
        """Logits (B, answers) of features (B, regions, feature_dim), bool (B, regions), True where
        there is no region, and word numbers (B, length)."""
        text, padding = self.question(questions)
        return self.transformer(self.features(features), text, hidden, padding)


class Folder:
    """Questions of a split and the features of its images.

    Args:
        folder: as this file's first lines say.
        split: ``"train2014"`` or ``"val2014"``.
        limit: the first so many questions only.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: files of another form.
    """

    def __init__(self, folder: Path, split: str, limit: int | None = None) -> None:
        self.folder, self.split = folder, split
        self.questions = vqa.read(
            folder / f"v2_OpenEnded_mscoco_{split}_questions.json",
            folder / f"v2_mscoco_{split}_annotations.json",
        )[:limit]
        if not self.questions:
            raise ValueError(f"{folder} has no questions of {split}")

    def features(self, image_id: int) -> Tensor:
        """float32 (regions, width) of an image."""
        name = vqa.image_path(self.folder, self.split, image_id).stem
        for suffix in (".npy", ".safetensors"):
            path = self.folder / "features" / (name + suffix)
            if path.exists():
                return vqa.read_features(path)
        raise FileNotFoundError(
            f"there is no {self.folder / 'features' / name}.npy or .safetensors; "
            "fastfusion.data.vqa.extract_features makes them"
        )

    def batch(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """Features (B, most regions, width), padded with 0, and bool (B, regions), True there."""
        rows = [self.features(question.image_id) for question in questions]
        features = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return features, torch.arange(features.shape[1]) >= lengths.unsqueeze(1)


def word_vocabulary(questions: Sequence[Question]) -> Vocabulary:
    """Words that at least `MIN_WORD_COUNT` questions have; of fewer questions, all of them."""
    counts: dict[str, int] = {}
    for question in questions:
        for word in set(words(question.question)):
            counts[word] = counts.get(word, 0) + 1
    least = MIN_WORD_COUNT if len(questions) > 1000 else 1
    kept = [word for word, count in counts.items() if count >= least]
    return Vocabulary.of([" ".join(kept)])


def encode(vocabulary: Vocabulary, questions: Sequence[Question]) -> Tensor:
    """Word numbers (questions, length); what is behind `MAX_WORDS` words is cut off."""
    texts = [" ".join(words(q.question)[:MAX_WORDS]) or "?unknown" for q in questions]
    return vocabulary.encode(texts)


class Batches:
    """All questions that have an answer in the vocabulary, in random order."""

    def __init__(
        self, data: Folder, vocabulary: Vocabulary, answers: AnswerVocabulary, settings: Settings
    ) -> None:
        self.data, self.vocabulary, self.answers = data, vocabulary, answers
        self.settings = settings
        self.questions = [
            q for q in data.questions if any(answers.number(a) is not None for a in q.answers)
        ]
        if not self.questions:
            raise ValueError(
                f"no answer has {settings.min_count} of the {len(data.questions)} questions"
            )

    def __len__(self) -> int:
        return max(1, len(self.questions) // self.settings.batch_size)

    def __call__(self, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        for numbers in shuffled(len(self.questions), self.settings.batch_size, generator):
            some = [self.questions[number] for number in numbers.tolist()]
            features, hidden = self.data.batch(some)
            yield features, hidden, encode(self.vocabulary, some), self.answers.targets(some)


def step(model: FeatureVQA) -> Callable[[tuple[Tensor, ...]], Outcome]:
    """Binary cross-entropy of every answer with how much it would score (Teney et al., 2017); an
    answer counts as right if it is among those that score most."""

    def run(batch: tuple[Tensor, ...]) -> Outcome:
        *inputs, target = batch
        logits = model(*inputs)
        loss = functional.binary_cross_entropy_with_logits(logits, target) * target.shape[1]
        chosen = target.gather(1, logits.argmax(dim=1, keepdim=True))
        right = int((chosen == target.amax(dim=1, keepdim=True)).sum())
        return Outcome(loss, right, len(target))

    return run


@torch.inference_mode()
def predict(
    model: FeatureVQA, data: Folder, vocabulary: Vocabulary, answers: AnswerVocabulary,
    chunk: int = 256,
) -> dict[int, str]:  # fmt: skip
    """An answer to every question, by question_id."""
    found: dict[int, str] = {}
    for first in range(0, len(data.questions), chunk):
        some = data.questions[first : first + chunk]
        logits = model(*data.batch(some), encode(vocabulary, some))
        found |= answers.predictions(some, logits)
    return found


def train(training: Training[Settings], folder: Path = FOLDER) -> None:
    """Train on the train split, write the checkpoint, and answer the val split by the official
    accuracy; its answers lie in ``<output>.results.json``. `limit` is of the questions of each
    split, and there is no baseline.

    Args:
        folder: as this file's first lines say.

    Raises:
        FileNotFoundError, ValueError: files that are missing or of another form.
    """
    settings, limit, say = training.settings, training.limit, training.say
    learning, testing = (Folder(folder, split, limit) for split in ("train2014", "val2014"))
    vocabulary = word_vocabulary(learning.questions)
    answers = AnswerVocabulary.of(learning.questions, settings.min_count)
    batches = Batches(learning, vocabulary, answers, settings)
    feature_dim = learning.features(learning.questions[0].image_id).shape[1]
    config = Config(feature_dim, len(vocabulary), len(answers), **settings.sizes)
    say(
        f"VQA v2.0: {len(batches.questions):,} of {len(learning.questions):,} questions to learn "
        f"from, {len(testing.questions):,} to test with; {len(answers):,} answers, "
        f"{len(vocabulary):,} words, regions {feature_dim} wide"
    )
    torch.manual_seed(settings.seed)
    model = FeatureVQA(config)
    # What is learnt first is how rare answers are.
    nn.init.constant_(model.transformer.output.bias, -math.log(len(answers)))
    training.stage("model", model, step(model), batches)
    predictions = predict(model, testing, vocabulary, answers)
    found = vqa.evaluate(predictions, testing.questions)
    for name, value in {"all": found.overall, **found.by_answer_type}.items():
        say(f"official accuracy, {name}: {value:.2f}")
    results = training.output.with_name(training.output.name + ".results.json")
    vqa.write_results(results, predictions)
    say(f"wrote {results}")
    about = {
        "config": asdict(config),
        "vocabulary": vocabulary.entries,
        "answers": list(answers.answers),
    }
    training.finish(FORMAT, {"model": model}, about, {"accuracy": found.overall})
