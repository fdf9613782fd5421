"""Fusion of two modalities: attention both ways from one score matrix."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion import _arguments as arguments
from fastfusion.nn import _fused
from fastfusion.nn._cross_attention import (
    ACTIVATIONS,
    check_activation,
    check_counts,
    check_dropout,
    check_sequences,
    init_halves,
)
from fastfusion.nn._weights import bidirectional_with_weights
from fastfusion.ops.bidirectional_attention import bidirectional_attention


class CrossModalAttention(nn.Module):
    """A fusion layer in which image and text attend to each other.

    One score matrix S = Q_visual K_text^T / sqrt(head_dim) serves both directions: its rows,
    normalised, gather the text for every visual token, its columns the image for every word.
    Each modality then has its own output projection, residual connection and norm, and its own
    feed-forward part with residual connection and norm.

    The layer is the cross-modal Transformer layer of ViLBERT (Lu et al., 2019) and LXMERT (Tan
    and Bansal, 2019) with the shared scores of GLIP (Li et al., 2022, section 3.2), Grounding DINO
    (Liu et al., 2023) and BiXT (Hiller et al., 2024), over the attention and feed-forward of
    Vaswani et al. (2017).

    Args:
        visual_dim: width of the visual tokens.
        text_dim: width of the text tokens.
        num_heads: number of heads.
        embed_dim: width of the attention, a multiple of num_heads; by default the greater of
            visual_dim and text_dim.
        dim_feedforward: hidden width of both feed-forward parts.
        dropout: probability of dropout, everywhere and in training only.
        activation: of the feed-forward parts: "relu", "gelu" or a function of one tensor.
        layer_norm_eps: eps of the norms.
        norm_first: norm before attention and feed-forward instead of after them.
        bias: whether projections, feed-forward parts and norms learn an additive bias.
        device, dtype: of the parameters.

    Raises:
        TypeError: an argument is not of the type named above.
        ValueError: a width or count below 1, an embed_dim that num_heads does not divide, a
            dropout outside [0, 1], an unknown activation.
    """

    def __init__(
        self,
        visual_dim: int,
        text_dim: int,
        num_heads: int,
        *,
        embed_dim: int | None = None,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(
            visual_dim=visual_dim,
            text_dim=text_dim,
            num_heads=num_heads,
            dim_feedforward=dim_feedforward,
        )
        embed_dim = max(visual_dim, text_dim) if embed_dim is None else embed_dim
        check_counts(embed_dim=embed_dim)
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
            )
        check_dropout(dropout)
        check_activation(activation)
        self.visual_dim, self.text_dim, self.embed_dim = visual_dim, text_dim, embed_dim
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.dropout = dropout
        self.norm_first = norm_first
        self.visual, self.text = (
            _Stream(
                width,
                embed_dim,
                dim_feedforward,
                dropout,
                activation if callable(activation) else ACTIVATIONS[activation],
                layer_norm_eps,
                bias,
                {"device": device, "dtype": dtype},
            )
            for width in (visual_dim, text_dim)
        )

    def forward(
        self,
        visual: Tensor,
        text: Tensor,
        visual_padding_mask: Tensor | None = None,
        text_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, ...]:
        """Fuse the two sequences.

        Args:
            visual: (batch, visual_len, visual_dim).
            text: (batch, text_len, text_dim).
            visual_padding_mask: bool (batch, visual_len), True = text ignores this token.
            text_padding_mask: bool (batch, text_len), True = the image ignores this token.
            need_weights: also return the weights of both directions, as they are after dropout.
            average_attn_weights: average the weights over the heads.

        Returns:
            The new visual and text tokens, in the shapes of the old; with `need_weights` also the
            weights of visual tokens on text (batch, visual_len, text_len) and of text on visual
            tokens (batch, text_len, visual_len), with num_heads behind batch if not averaged.
            Padded tokens get an output too, which means nothing.

        Raises:
            TypeError, ValueError: arguments that do not fit; the message names and prints them.
        """
        if not torch.compiler.is_compiling():
            self._check(visual, text, visual_padding_mask, text_padding_mask)
        if not need_weights and _fused.cross_modal_fits(self, visual, text):
            return _fused.cross_modal(self, visual, text, visual_padding_mask, text_padding_mask)
        heads = (2, self.num_heads, self.head_dim)
        if self.norm_first:
            query, visual_value = self.visual.project(self.visual.norm1(visual), heads)
            key, text_value = self.text.project(self.text.norm1(text), heads)
        else:
            query, visual_value = self.visual.project(visual, heads)
            key, text_value = self.text.project(text, heads)
        dropout_p = self.dropout if self.training else 0.0
        weights: tuple[Tensor, ...] = ()
        if need_weights:
            to_visual, to_text, *both = bidirectional_with_weights(
                query, key, text_value, visual_value,
                None, visual_padding_mask, text_padding_mask, dropout_p,
            )  # fmt: skip
            weights = tuple(w.mean(1) if average_attn_weights else w for w in both)
        else:
            to_visual, to_text = bidirectional_attention(
                query, key, text_value, visual_value,
                query_padding_mask=visual_padding_mask, key_padding_mask=text_padding_mask,
                dropout_p=dropout_p,
            )  # fmt: skip
        return (
            self.visual.add(visual, to_visual, self.norm_first),
            self.text.add(text, to_text, self.norm_first),
            *weights,
        )

    def _check(
        self, visual: Any, text: Any, visual_padding_mask: Any, text_padding_mask: Any
    ) -> None:
        _, given = check_sequences(
            {"visual": visual, "text": text},
            (self.visual_dim, self.text_dim),
            self.visual.in_proj.weight,
        )
        for name, mask, tensor in (
            ("visual_padding_mask", visual_padding_mask, visual),
            ("text_padding_mask", text_padding_mask, text),
        ):
            arguments.check_padding_mask(name, mask, tensor, tuple(tensor.shape[:2]), given)

    def extra_repr(self) -> str:
        return (
            f"visual_dim={self.visual_dim}, text_dim={self.text_dim}, "
            f"num_heads={self.num_heads}, embed_dim={self.embed_dim}, dropout={self.dropout}, "
            f"norm_first={self.norm_first}"
        )


class _Stream(nn.Module):
    """What one modality owns: projections, norms and feed-forward."""

    def __init__(
        self,
        width: int,
        embed_dim: int,
        dim_feedforward: int,
        dropout: float,
        activation: Callable[[Tensor], Tensor],
        layer_norm_eps: float,
        bias: bool,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        # What scores are made of (queries or keys) and the values, side by side.
        self.in_proj = nn.Linear(width, 2 * embed_dim, bias=bias, **factory)
        self.out_proj = nn.Linear(embed_dim, width, bias=bias, **factory)
        self.linear1 = nn.Linear(width, dim_feedforward, bias=bias, **factory)
        self.linear2 = nn.Linear(dim_feedforward, width, bias=bias, **factory)
        self.norm1 = nn.LayerNorm(width, layer_norm_eps, bias=bias, **factory)
        self.norm2 = nn.LayerNorm(width, layer_norm_eps, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = activation
        init_halves(self.in_proj)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    def project(self, tokens: Tensor, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        scored, value = self.in_proj(tokens).unflatten(-1, heads).unbind(2)
        return scored.transpose(1, 2), value.transpose(1, 2)

    def add(self, tokens: Tensor, attended: Tensor, norm_first: bool) -> Tensor:
        """The output, from the layer's input and what (batch, heads, length, head_dim) attended."""
        x = tokens + self.dropout1(self.out_proj(attended.transpose(1, 2).flatten(2)))
        if norm_first:
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x)
        return self.norm2(x + self._feed_forward(x))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))
