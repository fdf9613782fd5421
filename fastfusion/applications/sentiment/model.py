"""The networks of sentiment and the checkpoint that holds them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastfusion.applications import checkpoint
from fastfusion.applications.sentiment.data import AUDIO, CLASSES, FACE, MODALITIES, VOCABULARY
from fastfusion.models import SentimentTransformer
from fastfusion.models.parts import PooledClassifier, TokenEmbedding

CHECKPOINT = checkpoint.FOLDER / "sentiment.safetensors"
FORMAT = "fastfusion sentiment 1"


@dataclass(frozen=True)
class Config:
    """Sizes of the networks."""

    width: int = 48
    num_heads: int = 4
    dim_feedforward: int = 96
    num_layers: int = 1
    dropout: float = 0.1
    max_words: int = 16
    max_frames: int = 96


class Frames(nn.Module):
    """Frames (B, length, ...) of numbers to features (B, length, width), with learned positions.

    Args:
        size: numbers of a frame.
    """

    def __init__(self, size: int, width: int, max_length: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, width)
        self.position = nn.Parameter(nn.init.normal_(self.linear.weight.new_empty(
            max_length, width), std=0.1))  # fmt: skip

    def forward(self, frames: Tensor) -> Tensor:
        """Features.

        Raises:
            ValueError: more than `max_length` frames.
        """
        if frames.shape[1] > len(self.position):
            raise ValueError(f"at most {len(self.position)} frames, got {frames.shape[1]}")
        return self.linear(frames.flatten(2)) + self.position[: frames.shape[1]]


def _features(config: Config) -> dict[str, nn.Module]:
    """What makes features of each modality."""
    return {
        "text": TokenEmbedding(len(VOCABULARY), config.width, config.max_words),
        "audio": Frames(AUDIO, config.width, config.max_frames),
        "video": Frames(FACE * FACE, config.width, config.max_frames),
    }


def _of(features: nn.Module, given: Tensor) -> Tensor:
    made = features(given)
    return made[0] if isinstance(features, TokenEmbedding) else made


class SpokenSentiment(nn.Module):
    """Embeddings of words, sound and faces around a
    :class:`fastfusion.models.SentimentTransformer`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.features = nn.ModuleDict(_features(config))
        self.transformer = SentimentTransformer(
            config.width,
            config.width,
            config.width,
            config.num_heads,
            config.dim_feedforward,
            config.num_layers,
            len(CLASSES),
            dropout=config.dropout,
        )

    def forward(
        self,
        text: Tensor,
        audio: Tensor,
        video: Tensor,
        text_padding: Tensor,
        audio_padding: Tensor,
        video_padding: Tensor,
    ) -> Tensor:
        """Logits (B, 3); the arguments are the fields of
        :class:`~fastfusion.applications.sentiment.data.Opinions`."""
        given = dict(zip(MODALITIES, (text, audio, video), strict=True))
        made = [_of(self.features[name], one) for name, one in given.items()]
        return self.transformer(*made, text_padding, audio_padding, video_padding)


class OneModality(PooledClassifier):
    """As much of :class:`SpokenSentiment` as one modality needs."""

    def __init__(self, config: Config, modality: str) -> None:
        # Drawn first, as they were when the weights that ship were trained.
        features = _features(config)[modality]
        # As deep as a stream of the model: its encoder, the fusion and what comes behind it.
        super().__init__(
            config.width,
            config.num_heads,
            config.dim_feedforward,
            2 * config.num_layers + 1,
            len(CLASSES),
            dropout=config.dropout,
        )
        self.modality, self.features = modality, features

    def forward(self, given: Tensor, padding: Tensor) -> Tensor:
        """Logits (B, 3) of one modality and its mask."""
        return self.classify(_of(self.features, given), padding)


@dataclass
class Checkpoint:
    """Weights and how they were made; no ``model`` after a baseline-only training."""

    config: Config
    model: SpokenSentiment | None
    alone: Mapping[str, OneModality]
    training: dict[str, Any] = field(default_factory=dict)

    def networks(self) -> dict[str, nn.Module]:
        """Those that there are, by the names that they have in a file."""
        alone = {f"{name}_alone": network for name, network in self.alone.items()}
        return checkpoint.present(**alone, model=self.model)

    def metadata(self) -> dict[str, Any]:
        """What a file says of its networks."""
        return {"config": asdict(self.config), "vocabulary": VOCABULARY, "classes": CLASSES}

    @classmethod
    def load(cls, path: Path = CHECKPOINT) -> "Checkpoint":
        """Read a checkpoint into networks in eval mode.

        Raises:
            ValueError: another kind of file, or one of other words.
        """
        content = checkpoint.load(path, FORMAT)
        about = content.metadata
        if tuple(about["vocabulary"]) != VOCABULARY:
            raise ValueError(f"{path} was made with other words than this version draws")
        config = Config(**about["config"])
        model = content.model(lambda: SpokenSentiment(config))
        alone = {
            name: content.fill(f"{name}_alone", OneModality(config, name)) for name in MODALITIES
        }
        return cls(config, model, alone, about["training"])
