"""The networks of the demo and the checkpoint that holds them."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastfusion.nn as ffnn
from fastfusion.demo.data import Vocabulary
from fastfusion.demo.extras import require
from fastfusion.models import VQATransformer

CHECKPOINT = Path(__file__).parent.parent / "models" / "easy_vqa.safetensors"
FORMAT = "fastfusion easy-vqa 1"
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


class QuestionEmbedding(nn.Module):
    """Word numbers (texts, length) to features (texts, length, width) and the padding mask."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.word = nn.Embedding(config.words, config.width, padding_idx=0)
        self.position = nn.Parameter(torch.empty(config.max_words, config.width).normal_(std=0.1))
        with torch.no_grad():
            self.word.weight.normal_(std=0.3)
            # Padding and the unknown word say nothing; no training question moves them away from 0.
            self.word.weight[:2] = 0.0

    def forward(self, questions: Tensor) -> tuple[Tensor, Tensor]:
        return self.word(questions) + self.position[: questions.shape[1]], questions == 0


class EasyVQA(nn.Module):
    """A convolution stem and a word embedding around a :class:`fastfusion.models.VQATransformer`.

    Args:
        transformer: the class between embeddings and logits, so that a twin built from other parts
            can stand in for ``VQATransformer``.
    """

    def __init__(self, config: Config, transformer: type[nn.Module] = VQATransformer) -> None:
        super().__init__()
        width = config.width
        # An even kernel centres what a token sees on its own 8x8 pixels.
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 4, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 4, width // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
        )
        self.position = nn.Parameter(torch.empty(GRID * GRID, width).normal_(std=0.1))
        self.question = QuestionEmbedding(config)
        self.transformer: Any = transformer(
            width,
            width,
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
        visual = self.stem(images * 2 - 1).flatten(2).transpose(1, 2) + self.position
        text, padding = self.question(questions)
        visual = self.transformer.encode_visual(visual)
        text = self.transformer.encode_text(text, padding)
        if image_index is not None:
            visual = visual.index_select(0, image_index)
        if text_index is not None:
            text, padding = text.index_select(0, text_index), padding.index_select(0, text_index)
        return self.transformer.fuse(visual, text, None, padding, need_weights)


class QuestionOnly(nn.Module):
    """The text half of :class:`EasyVQA`: many answers can be guessed from the words alone."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.question = QuestionEmbedding(config)
        self.encoder = ffnn.TransformerEncoder(
            ffnn.TransformerEncoderLayer(
                config.width,
                config.num_heads,
                config.dim_feedforward,
                config.dropout,
                batch_first=True,
            ),
            config.num_layers,
            enable_nested_tensor=False,
        )
        self.output = nn.Linear(config.width, config.answers)

    def forward(self, questions: Tensor) -> Tensor:
        """Word numbers (texts, length) to logits (texts, answers)."""
        text, padding = self.question(questions)
        text = self.encoder(text, src_key_padding_mask=padding)
        kept = ~padding.unsqueeze(-1)
        return self.output((text * kept).sum(dim=1) / kept.sum(dim=1))


@dataclass
class Checkpoint:
    """Weights and what is needed to use them; no ``model`` after a question-only training."""

    config: Config
    vocabulary: Vocabulary
    answers: list[str]
    model: EasyVQA | None
    question_only: QuestionOnly
    training: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write one safetensors file: weights as tensors, the rest as JSON in the metadata."""
        tensors = {f"question_only.{k}": v for k, v in self.question_only.state_dict().items()}
        if self.model is not None:
            tensors |= {f"model.{k}": v for k, v in self.model.state_dict().items()}
        metadata = {
            "format": FORMAT,
            "config": json.dumps(asdict(self.config)),
            "vocabulary": json.dumps(self.vocabulary.entries),
            "answers": json.dumps(self.answers),
            "training": json.dumps(self.training),
        }
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        path.write_bytes(require("safetensors.torch").save(contiguous, metadata))

    @classmethod
    def load(cls, path: Path = CHECKPOINT) -> "Checkpoint":
        """Read a checkpoint into networks in eval mode; ``ValueError`` for another kind of file."""
        with require("safetensors").safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is not a checkpoint of this demo: no format {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = Config(**json.loads(metadata["config"]))

        def weights(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        model = None
        if weights("model."):
            model = EasyVQA(config)
            model.load_state_dict(weights("model."))
            model.eval()
        question_only = QuestionOnly(config)
        question_only.load_state_dict(weights("question_only."))
        return cls(
            config,
            Vocabulary(json.loads(metadata["vocabulary"])),
            json.loads(metadata["answers"]),
            model,
            question_only.eval(),
            json.loads(metadata["training"]),
        )
