"""The networks of visual question answering and the checkpoint that holds them."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastfusion.applications import checkpoint
from fastfusion.data.easy_vqa import Vocabulary
from fastfusion.models import VQATransformer
from fastfusion.models.parts import ImageStem, PooledClassifier, TokenEmbedding

CHECKPOINT = checkpoint.FOLDER / "easy_vqa.safetensors"
FORMAT = "fastfusion easy-vqa 2"
GRID = 8  # the stem turns 64x64 pixels into 8x8 tokens


@dataclass(frozen=True)
class Config:
    """Sizes of the networks; ``words`` and ``answers`` count the vocabulary and the answers."""

    words: int
    answers: int
    width: int = 96
    num_heads: int = 4
    dim_feedforward: int = 192
    num_layers: int = 2
    dropout: float = 0.1
    max_words: int = 16


class EasyVQA(nn.Module):
    """An image stem and a word embedding around a :class:`fastfusion.models.VQATransformer`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.stem = ImageStem(config.width)
        self.question = TokenEmbedding(config.words, config.width, config.max_words)
        self.transformer = VQATransformer(
            config.width,
            config.width,
            config.num_heads,
            config.dim_feedforward,
            config.num_layers,
            config.answers,
            dropout=config.dropout,
        )

    def forward(
        self,
        images: Tensor,
        questions: Tensor,
        image_index: Tensor | None = None,
        text_index: Tensor | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Logits (N, answers); if asked also the words' attention (N, length, 64) over the image.

        Args:
            images: float32 (images, 3, 64, 64), from 0 to 1.
            questions: int64 (texts, length), word numbers, 0 = padding.
            image_index, text_index: int64 (N,); pair n asks ``questions[text_index[n]]`` about
                ``images[image_index[n]]``, each of which is encoded once. Without them, pair n is
                image n, text n.
        """
        text, padding = self.question(questions)
        visual = self.transformer.encode_visual(self.stem(images))
        text = self.transformer.encode_text(text, padding)
        if image_index is not None:
            visual = visual.index_select(0, image_index)
        if text_index is not None:
            text, padding = text.index_select(0, text_index), padding.index_select(0, text_index)
        return self.transformer.fuse(visual, text, None, padding, need_weights)


class QuestionOnly(PooledClassifier):
    """The text half of :class:`EasyVQA`: many answers can be guessed from the words alone."""

    def __init__(self, config: Config) -> None:
        # Drawn first, as it was when the weights that ship were trained.
        question = TokenEmbedding(config.words, config.width, config.max_words)
        super().__init__(
            config.width,
            config.num_heads,
            config.dim_feedforward,
            config.num_layers,
            config.answers,
            dropout=config.dropout,
        )
        self.question = question

    def forward(self, questions: Tensor) -> Tensor:
        """Word numbers (texts, length) to logits (texts, answers)."""
        return self.classify(*self.question(questions))


@dataclass
class Checkpoint:
    """Weights and what is needed to use them; no ``model`` after a question-only training."""

    config: Config
    vocabulary: Vocabulary
    answers: list[str]
    model: EasyVQA | None
    question_only: QuestionOnly
    training: dict[str, Any] = field(default_factory=dict)

    def networks(self) -> dict[str, nn.Module]:
        """Those that there are, by the names that they have in a file."""
        return checkpoint.present(question_only=self.question_only, model=self.model)

    def metadata(self) -> dict[str, Any]:
        """What a file says of its networks."""
        return {
            "config": asdict(self.config),
            "vocabulary": self.vocabulary.entries,
            "answers": self.answers,
        }

    def save(self, path: Path) -> None:
        """Write a safetensors file: weights as tensors, the rest as JSON in the metadata."""
        about = self.metadata() | {"training": self.training}
        checkpoint.save(path, FORMAT, self.networks(), about)

    @classmethod
    def load(cls, path: Path = CHECKPOINT) -> "Checkpoint":
        """Read a checkpoint into networks in eval mode; ``ValueError`` for another kind of file."""
        content = checkpoint.load(path, FORMAT)
        about = content.metadata
        config = Config(**about["config"])
        model = content.model(lambda: EasyVQA(config))
        question_only = content.fill("question_only", QuestionOnly(config))
        vocabulary = Vocabulary(about["vocabulary"])
        return cls(config, vocabulary, about["answers"], model, question_only, about["training"])
