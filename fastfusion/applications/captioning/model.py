"""The network that writes captions, and the checkpoint that holds it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion.applications import checkpoint
from fastfusion.data.easy_vqa import Vocabulary
from fastfusion.models import CaptioningTransformer
from fastfusion.models.parts import ImageStem

CHECKPOINT = checkpoint.FOLDER / "captioning.safetensors"
FORMAT = "fastfusion captioning 1"
GRID = 8  # the stem turns 64x64 pixels into 8x8 tokens


@dataclass(frozen=True)
class Config:
    """Sizes of the network; ``words`` counts the vocabulary."""

    words: int
    width: int = 96
    num_heads: int = 4
    dim_feedforward: int = 192
    num_encoder_layers: int = 1
    num_decoder_layers: int = 2
    dropout: float = 0.1
    max_length: int = 33


class Captioner(nn.Module):
    """An image stem and a :class:`fastfusion.models.CaptioningTransformer`.

    Args:
        blind: see nothing in place of the image, which leaves a model of the language of captions.
    """

    def __init__(self, config: Config, blind: bool = False) -> None:
        super().__init__()
        self.stem = None if blind else ImageStem(config.width)
        self.transformer = CaptioningTransformer(
            config.width,
            config.num_heads,
            config.dim_feedforward,
            config.num_encoder_layers,
            config.num_decoder_layers,
            config.words,
            config.max_length,
            dropout=config.dropout,
        )

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Logits (B, length, words) of the word behind each word of the texts (B, length), about
        float32 images (B, 3, 64, 64) from 0 to 1."""
        visual, hidden = self.see(images)
        return self.transformer(visual, texts, hidden)

    def generate(self, images: Tensor, **options: Any) -> Tensor:
        """Word numbers (B, length); options as of :meth:`CaptioningTransformer.generate`."""
        return self.transformer.generate(*self.see(images), **options)

    def see(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens of the images, and which of them are hidden; a query without keys gathers 0."""
        if self.stem is not None:
            return self.stem(images), None
        nothing = images.new_zeros(len(images), 1, self.transformer.width)
        return nothing, torch.ones(nothing.shape[:2], dtype=torch.bool, device=images.device)


@dataclass
class Checkpoint:
    """Weights and what is needed to use them; no ``model`` after a training of the baseline."""

    config: Config
    vocabulary: Vocabulary
    model: Captioner | None
    blind: Captioner
    training: dict[str, Any]

    def networks(self) -> dict[str, nn.Module]:
        """Those that there are, by the names that they have in a file."""
        return checkpoint.present(blind=self.blind, model=self.model)

    def metadata(self) -> dict[str, Any]:
        """What a file says of its networks."""
        return {"config": asdict(self.config), "vocabulary": self.vocabulary.entries}

    @classmethod
    def load(cls, path: Path = CHECKPOINT) -> "Checkpoint":
        """Read a checkpoint into networks in eval mode; ``ValueError`` for another kind of file."""
        content = checkpoint.load(path, FORMAT)
        about = content.metadata
        config = Config(**about["config"])
        model = content.model(lambda: Captioner(config))
        blind = content.fill("blind", Captioner(config, blind=True))
        return cls(config, Vocabulary(about["vocabulary"]), model, blind, about["training"])
