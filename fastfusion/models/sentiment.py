"""Fusion of text, audio and video: cross-modal attention for each pair of them."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

import fastfusion.nn as ffnn
from fastfusion.models.parts import check_sizes, checked_padding, encoder, mean
from fastfusion.nn._checks import check_sequences

MODALITIES = ("text", "audio", "video")
PAIRS = tuple(combinations(MODALITIES, 2))


class SentimentTransformer(nn.Module):
    """Judge what someone says from words, voice and face, all three given as features.

    A Transformer encoder per modality; for each pair of modalities a
    :class:`fastfusion.nn.CrossModalAttention` layer, in which either attends to the other; a
    Transformer encoder over what a modality has learnt from both others, side by side; the mean
    over its tokens that are not padding; and a linear layer on all three. The sequences have
    lengths of their own and need not be aligned: where a frame belongs in the sentence is for the
    attention to find.

    A modality that is missing from a sample is padding as a whole: what attends to it gets 0 from
    it, its own mean is 0, and what its features hold is not read. So any subset of modalities can
    be judged, of each sample another.

    Args:
        text_dim, audio_dim, video_dim: feature width of each modality, a multiple of ``num_heads``.
        num_heads: attention heads of every layer.
        dim_feedforward: hidden width of every feed-forward part.
        num_layers: encoder layers per modality, and as many over the fused streams.
        num_classes: number of answers.
        dropout: probability of dropout, everywhere and in training only.
        activation, layer_norm_eps, norm_first, bias: as in ``torch.nn.TransformerEncoderLayer``.

    Raises:
        ValueError: a width or count below 1, a width that ``num_heads`` does not divide,
            ``dropout`` outside [0, 1], an unknown ``activation``.
        TypeError: a width or count that is not an int.

    The layout is that of MulT (Tsai et al., 2019, https://arxiv.org/abs/1906.00295), whose two
    directions of a pair are networks of their own; here they share one score matrix.
    """

    def __init__(
        self,
        text_dim: int,
        audio_dim: int,
        video_dim: int,
        num_heads: int,
        dim_feedforward: int,
        num_layers: int,
        num_classes: int,
        *,
        dropout: float = 0.1,
        activation: str = "relu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(
            num_heads, dropout, activation, text_dim=text_dim, audio_dim=audio_dim,
            video_dim=video_dim, dim_feedforward=dim_feedforward, num_layers=num_layers,
            num_classes=num_classes,
        )  # fmt: skip
        self.dims = {"text": text_dim, "audio": audio_dim, "video": video_dim}
        shared: dict[str, Any] = {
            "dropout": dropout,
            "activation": activation,
            "layer_norm_eps": layer_norm_eps,
            "norm_first": norm_first,
            "bias": bias,
            "device": device,
            "dtype": dtype,
        }
        sizes = (num_heads, dim_feedforward, num_layers)
        self.encoders = nn.ModuleDict(
            {name: encoder(width, *sizes, **shared) for name, width in self.dims.items()}
        )
        self.fusion = nn.ModuleDict(
            {
                f"{one}_{other}": ffnn.CrossModalAttention(
                    self.dims[one], self.dims[other], num_heads,
                    dim_feedforward=dim_feedforward, **shared,
                )
                for one, other in PAIRS
            }
        )  # fmt: skip
        self.memory = nn.ModuleDict(
            {name: encoder(2 * width, *sizes, **shared) for name, width in self.dims.items()}
        )
        width = 2 * sum(self.dims.values())
        self.output = nn.Linear(width, num_classes, device=device, dtype=dtype)

    def forward(
        self,
        text: Tensor,
        audio: Tensor,
        video: Tensor,
        text_padding_mask: Tensor | None = None,
        audio_padding_mask: Tensor | None = None,
        video_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Score every answer.

        Args:
            text: floating (B, Lt, text_dim).
            audio: the same dtype, (B, La, audio_dim).
            video: the same dtype, (B, Lv, video_dim).
            text_padding_mask, audio_padding_mask, video_padding_mask: bool, broadcastable to
                (B, Lt), (B, La) and (B, Lv), True = ignore the token; a sample whose tokens are
                all ignored has no such modality.

        Returns:
            Logits (B, num_classes).

        Raises:
            ValueError: a wrong rank, width or batch size, or a mask that does not fit.
            TypeError: different dtypes, or a mask that is not bool.
        """
        given = {"text": text, "audio": audio, "video": video}
        masks = dict(
            zip(MODALITIES, (text_padding_mask, audio_padding_mask, video_padding_mask),
                strict=True)
        )  # fmt: skip
        if not torch.compiler.is_compiling():
            widths = tuple(self.dims.values())
            check_sequences(given, widths, (self.output,) * len(given))
        padding = {
            name: checked_padding(name, given[name], self.dims[name], masks[name])
            for name in MODALITIES
        }
        tokens = {
            name: self.encoders[name](given[name], src_key_padding_mask=padding[name])
            for name in MODALITIES
        }
        streams = self._fuse(tokens, padding)
        pooled = [
            mean(self.memory[name](streams[name], src_key_padding_mask=padding[name]),
                 padding[name])
            for name in MODALITIES
        ]  # fmt: skip
        return self.output(torch.cat(pooled, dim=-1))

    def _fuse(
        self, tokens: Mapping[str, Tensor], padding: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        """What every modality makes of both others, (B, L, 2 * width)."""
        heard: dict[str, list[Tensor]] = {name: [] for name in MODALITIES}
        for one, other in PAIRS:
            both = self.fusion[f"{one}_{other}"](
                tokens[one], tokens[other], padding[one], padding[other]
            )
            for name, new in zip((one, other), both, strict=True):
                heard[name].append(new)
        return {name: torch.cat(several, dim=-1) for name, several in heard.items()}
