"""What the models are made of besides attention: stems, embeddings, encoders and pooling."""

from typing import Any

import torch
from torch import Tensor, nn

import fastfusion.nn as ffnn
from fastfusion.core.arguments import check_padding_mask, check_tensors, shapes
from fastfusion.nn._checks import check_activation, check_counts, check_dropout, check_sequences

PADDING = 0  # the number of a word that is none


def to_float(pictures: Tensor) -> Tensor:
    """uint8 pixels to float32 from 0 to 1."""
    return pictures.to(torch.float32) / 255


class ImageStem(nn.Sequential):
    """Pictures (B, channels, size, size) to tokens (B, (size // 8)^2, width): three convolutions of
    stride 2 and a learned position for each token.

    A few convolutions in place of one large patch make small models learn faster (Xiao et al.,
    "Early Convolutions Help Transformers See Better", 2021). An even kernel centres what a token
    sees on its own 8x8 pixels.

    Args:
        width: of the tokens, a multiple of 4.
        size: of the pictures, a multiple of 8.
        channels: of the pictures.
    """

    def __init__(self, width: int, size: int = 64, channels: int = 3) -> None:
        check_counts(width=width, size=size, channels=channels)
        if width % 4 or size % 8:
            raise ValueError(f"width must be a multiple of 4 and size of 8, got {width} and {size}")
        super().__init__(
            nn.Conv2d(channels, width // 4, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 4, width // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
        )
        self.grid = size // 8
        self.position = nn.Parameter(torch.empty(self.grid**2, width).normal_(std=0.1))

    def forward(self, pictures: Tensor) -> Tensor:
        """Tokens of float pictures from 0 to 1, rows of the picture one after the other."""
        return super().forward(pictures * 2 - 1).flatten(2).transpose(1, 2) + self.position


class TokenEmbedding(nn.Module):
    """Word numbers (B, length) to features (B, length, width), and where they are padding.

    Args:
        words: how many there are; 0 is padding.
        width: of the features.
        max_length: the most words of a text.
    """

    def __init__(self, words: int, width: int, max_length: int) -> None:
        super().__init__()
        check_counts(words=words, width=width, max_length=max_length)
        self.max_length = max_length
        self.word = nn.Embedding(words, width, padding_idx=PADDING)
        self.position = nn.Parameter(torch.empty(max_length, width).normal_(std=0.1))
        with torch.no_grad():
            self.word.weight.normal_(std=0.3)
            # Padding and the unknown word say nothing; no text to learn from moves them from 0.
            self.word.weight[:2] = 0.0

    def forward(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and bool (B, length), True at padding.

        Raises:
            ValueError: more than `max_length` words.
        """
        return self.embed(texts), texts == PADDING

    def embed(self, texts: Tensor, start: int = 0) -> Tensor:
        """Features of words of which the first is number `start` of its text."""
        end = start + texts.shape[1]
        if end > self.max_length:
            raise ValueError(f"a text has at most {self.max_length} words, got {end}")
        return self.word(texts) + self.position[start:end]


def encoder(
    width: int,
    num_heads: int,
    dim_feedforward: int,
    num_layers: int,
    *,
    dropout: float = 0.1,
    activation: Any = "relu",
    layer_norm_eps: float = 1e-5,
    norm_first: bool = False,
    bias: bool = True,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> ffnn.TransformerEncoder:
    """A batch_first Transformer encoder; its arguments are those of its layers."""
    layer = ffnn.TransformerEncoderLayer(
        width, num_heads, dim_feedforward, dropout, activation, layer_norm_eps, True, norm_first,
        bias, device, dtype,
    )  # fmt: skip
    # The residual stream of a norm_first encoder ends without a norm of its own.
    norm = (
        nn.LayerNorm(width, layer_norm_eps, bias=bias, device=device, dtype=dtype)
        if norm_first
        else None
    )
    return ffnn.TransformerEncoder(layer, num_layers, norm, enable_nested_tensor=False)


def mean(tokens: Tensor, padding_mask: Tensor | None) -> Tensor:
    """The mean (B, width) over the tokens (B, L, width) that are not padding; 0 where all are."""
    if padding_mask is None:
        return tokens.sum(dim=1) / max(tokens.shape[1], 1)
    padding_mask = padding_mask.expand(tokens.shape[:2])
    total = tokens.masked_fill(padding_mask.unsqueeze(-1), 0.0).sum(dim=1)
    count = (~padding_mask).sum(dim=1, keepdim=True).clamp(min=1)
    return total / count


class PooledClassifier(nn.Module):
    """An encoder over one modality, the mean of its tokens, and a linear layer over classes."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        dim_feedforward: int,
        num_layers: int,
        num_classes: int,
        *,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.encoder = encoder(width, num_heads, dim_feedforward, num_layers, dropout=dropout)
        self.output = nn.Linear(width, num_classes)

    def classify(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of tokens (B, L, width)."""
        encoded = self.encoder(tokens, src_key_padding_mask=padding_mask)
        return self.output(mean(encoded, padding_mask))


def check_sizes(num_heads: int, dropout: float, activation: Any, **sizes: Any) -> None:
    """Sizes of a model, of which those that end in `_dim` or are `width` are split into heads.

    Raises:
        TypeError: a size that is not an int.
        ValueError: a size below 1, a width that `num_heads` does not divide, a `dropout` outside
            [0, 1], an unknown `activation`.
    """
    check_counts(num_heads=num_heads, **sizes)
    for name, size in sizes.items():
        if (name.endswith("_dim") or name == "width") and size % num_heads:
            raise ValueError(f"{name} must be a multiple of num_heads={num_heads}, got {size}")
    check_dropout(dropout)
    check_activation(activation)


def checked_padding(
    name: str, tokens: Tensor, width: int, padding_mask: Tensor | None
) -> Tensor | None:
    """The mask (batch, length), once it and the tokens have been found to fit."""
    if not torch.compiler.is_compiling():
        check_tensors(**{name: tokens})
        given = shapes(**{name: tokens})
        if tokens.dim() != 3 or tokens.shape[2] != width:
            raise ValueError(f"{name} must have shape (batch, length, {width}), got {given}")
        check_padding_mask(
            f"{name}_padding_mask", padding_mask, tokens, tuple(tokens.shape[:2]), given
        )
    return None if padding_mask is None else padding_mask.expand(tokens.shape[:2])


class TwoEncoders(nn.Module):
    """What models of pictures and texts begin with: a Transformer encoder per modality.

    The encoders do not see each other, so an encoding can be used with several of the other
    modality. Models call :meth:`check_pair` before they encode.

    Args:
        visual_dim, text_dim: feature width of each modality.
        num_heads, dim_feedforward, num_layers, options: as of :func:`encoder`.
    """

    def __init__(
        self,
        visual_dim: int,
        text_dim: int,
        num_heads: int,
        dim_feedforward: int,
        num_layers: int,
        **options: Any,
    ) -> None:
        super().__init__()
        self.visual_dim, self.text_dim = visual_dim, text_dim
        sizes = (num_heads, dim_feedforward, num_layers)
        self.visual_encoder = encoder(visual_dim, *sizes, **options)
        self.text_encoder = encoder(text_dim, *sizes, **options)

    def encode_visual(self, visual: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Encode pictures (B, Lv, visual_dim), in and out; the mask is that of ``forward``."""
        padding_mask = checked_padding("visual", visual, self.visual_dim, padding_mask)
        return self.visual_encoder(visual, src_key_padding_mask=padding_mask)

    def encode_text(self, text: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Encode texts (B, Lt, text_dim), in and out; the mask is that of ``forward``."""
        padding_mask = checked_padding("text", text, self.text_dim, padding_mask)
        return self.text_encoder(text, src_key_padding_mask=padding_mask)

    def check_pair(self, visual: Tensor, text: Tensor, output: nn.Linear) -> None:
        """Both inputs of ``forward`` at once, so that a wrong text fails before the picture is
        encoded; `output` is the layer whose dtype and device they must have."""
        if not torch.compiler.is_compiling():
            widths = (self.visual_dim, self.text_dim)
            check_sequences({"visual": visual, "text": text}, widths, (output, output))
