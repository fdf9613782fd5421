"""The networks of retrieval and the checkpoint that holds them."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion.applications import checkpoint
from fastfusion.applications.retrieval.subwords import Subwords
from fastfusion.data.emoji import SIZE
from fastfusion.models import RetrievalTransformer
from fastfusion.models.parts import ImageStem, TokenEmbedding

CHECKPOINT = checkpoint.FOLDER / "retrieval.safetensors"
FORMAT = "fastfusion emoji retrieval 1"


@dataclass(frozen=True)
class Config:
    """Sizes of the networks; ``subwords`` counts the vocabulary."""

    subwords: int
    width: int = 96
    num_heads: int = 4
    dim_feedforward: int = 192
    num_layers: int = 2
    embedding_dim: int = 256
    dropout: float = 0.0
    max_subwords: int = 12


class EmojiRetrieval(nn.Module):
    """An image stem and a word embedding around a :class:`fastfusion.models.RetrievalTransformer`.

    ``encode`` methods return tokens and their padding mask, ``transformer.embed_visual`` and
    ``embed_text`` make the vectors to search by of them, ``transformer.match`` is the re-ranker.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.stem = ImageStem(config.width, SIZE)
        self.text = TokenEmbedding(config.subwords, config.width, config.max_subwords)
        self.transformer = RetrievalTransformer(
            config.width,
            config.width,
            config.num_heads,
            config.dim_feedforward,
            config.num_layers,
            config.embedding_dim,
            visual_len=(SIZE // 8) ** 2,
            dropout=config.dropout,
            norm_first=True,
        )
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Convolutions behind which pictures still differ, and tables that learn fast: Adam's steps
        have one size, whatever that of the weights."""
        for part in self.stem:
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
        nn.init.zeros_(self.transformer.output.weight)  # a re-ranker that changes nothing yet
        nn.init.zeros_(self.transformer.output.bias)
        for table in (self.text.word.weight, self.text.position, self.stem.position):
            table.mul_(0.1)

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Tokens (B, 16, width) of float pictures (B, 3, 32, 32) from 0 to 1."""
        return self.transformer.encode_visual(self.stem(pictures))

    def encode_texts(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, length, width) of subword numbers (B, length), and their padding mask."""
        tokens, padding = self.text(texts)
        return self.transformer.encode_text(tokens, padding), padding

    def forward(self, pictures: Tensor, texts: Tensor) -> Tensor:
        """Score pairs (B,): picture n with text n."""
        tokens, padding = self.text(texts)
        return self.transformer(self.stem(pictures), tokens, None, padding)


@dataclass
class Checkpoint:
    """Weights and what is needed to use them; no ``model`` after a baseline-only training."""

    config: Config
    subwords: Subwords
    model: EmojiRetrieval | None
    training: dict[str, Any] = field(default_factory=dict)

    def networks(self) -> dict[str, nn.Module]:
        """Those that there are, by the names that they have in a file."""
        return checkpoint.present(model=self.model)

    def metadata(self) -> dict[str, Any]:
        """What a file says of its networks."""
        return {
            "config": asdict(self.config),
            "letters": self.subwords.letters,
            "merges": self.subwords.merges,
        }

    @classmethod
    def load(cls, path: Path = CHECKPOINT) -> "Checkpoint":
        """Read a checkpoint into networks in eval mode; ``ValueError`` for another kind of file."""
        content = checkpoint.load(path, FORMAT)
        about = content.metadata
        config = Config(**about["config"])
        model = content.model(lambda: EmojiRetrieval(config))
        subwords = Subwords(about["letters"], about["merges"])
        return cls(config, subwords, model, about["training"])
