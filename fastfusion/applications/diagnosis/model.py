"""The network that weighs a picture and a report, its halves, and the checkpoint of all three."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion.applications import checkpoint
from fastfusion.applications.diagnosis import data
from fastfusion.data.easy_vqa import Vocabulary
from fastfusion.models import VQATransformer
from fastfusion.models.parts import ImageStem, PooledClassifier, TokenEmbedding

CHECKPOINT = checkpoint.FOLDER / "diagnosis.safetensors"
FORMAT = "fastfusion diagnosis 1"
GRID = 8  # the stem turns 64x64 pixels into 8x8 tokens


@dataclass(frozen=True)
class Config:
    """Sizes of the networks; ``words`` counts the vocabulary."""

    words: int
    width: int = 64
    num_heads: int = 4
    dim_feedforward: int = 128
    num_layers: int = 2
    dropout: float = 0.1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.num_heads, self.dim_feedforward, self.num_layers, len(data.DIAGNOSES)


class Diagnoser(nn.Module):
    """An image stem and a word embedding around a :class:`fastfusion.models.VQATransformer`, whose
    logits are divided by a temperature in evaluation (Guo et al., "On Calibration of Modern Neural
    Networks", 2017)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.stem = ImageStem(config.width, channels=1)
        self.report = TokenEmbedding(config.words, config.width, data.MAX_WORDS)
        self.transformer = VQATransformer(
            config.width, config.width, *config.sizes, dropout=config.dropout
        )
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, images: Tensor, reports: Tensor, need_weights: bool = False) -> Any:
        """Logits (B, diagnoses) of float32 images (B, 1, 64, 64) and word numbers (B, length); if
        asked also the words' attention (B, length, 64) over the image."""
        text, padding = self.report(reports)
        found = self.transformer(self.stem(images), text, None, padding, need_weights)
        logits, *weights = found if need_weights else (found,)
        if not self.training:
            logits = logits / self.temperature
        return (logits, *weights) if need_weights else logits


class ReportOnly(PooledClassifier):
    """A diagnosis from the report alone."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.width, *config.sizes, dropout=config.dropout)
        self.report = TokenEmbedding(config.words, config.width, data.MAX_WORDS)

    def forward(self, images: Tensor, reports: Tensor) -> Tensor:
        """As :meth:`Diagnoser.forward`."""
        return self.classify(*self.report(reports))


class ImageOnly(PooledClassifier):
    """A diagnosis from the picture alone."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.width, *config.sizes, dropout=config.dropout)
        self.stem = ImageStem(config.width, channels=1)

    def forward(self, images: Tensor, reports: Tensor) -> Tensor:
        """As :meth:`Diagnoser.forward`."""
        return self.classify(self.stem(images))


@dataclass
class Checkpoint:
    """Weights and what is needed to use them; no ``model`` after a training of the baselines."""

    config: Config
    vocabulary: Vocabulary
    model: Diagnoser | None
    image_only: ImageOnly
    report_only: ReportOnly
    training: dict[str, Any]

    def networks(self) -> dict[str, nn.Module]:
        """Those that there are, by the names that they have in a file."""
        return checkpoint.present(
            image_only=self.image_only, report_only=self.report_only, model=self.model
        )

    def metadata(self) -> dict[str, Any]:
        """What a file says of its networks."""
        return {"config": asdict(self.config), "vocabulary": self.vocabulary.entries}

    @classmethod
    def load(cls, path: Path = CHECKPOINT) -> "Checkpoint":
        """Read a checkpoint into networks in eval mode; ``ValueError`` for another kind of file."""
        content = checkpoint.load(path, FORMAT)
        about = content.metadata
        config = Config(**about["config"])
        model = content.model(lambda: Diagnoser(config))
        image_only = content.fill("image_only", ImageOnly(config))
        report_only = content.fill("report_only", ReportOnly(config))
        words = Vocabulary(about["vocabulary"])
        return cls(config, words, model, image_only, report_only, about["training"])
