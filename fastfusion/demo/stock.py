"""The stock twin of :class:`fastfusion.models.VQATransformer`: torch.nn and plain formulas, the
same ``state_dict``.

What a user of torch writes today. torch.nn has no attention in both directions, so that part is the
formula: one score matrix, a softmax over its rows and one over its columns.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class StockVQATransformer(nn.Module):
    """Arguments, results and ``state_dict`` of :class:`fastfusion.models.VQATransformer`."""

    def __init__(
        self,
        visual_dim: int,
        text_dim: int,
        num_heads: int,
        dim_feedforward: int,
        num_layers: int,
        num_classes: int,
        *,
        dropout: float = 0.1,
        norm_first: bool = False,
    ) -> None:
        super().__init__()

        def encoder(width: int) -> nn.Module:
            layer = nn.TransformerEncoderLayer(
                width, num_heads, dim_feedforward, dropout, batch_first=True, norm_first=norm_first
            )
            norm = nn.LayerNorm(width) if norm_first else None
            return nn.TransformerEncoder(layer, num_layers, norm, enable_nested_tensor=False)

        self.visual_encoder = encoder(visual_dim)
        self.text_encoder = encoder(text_dim)
        self.fusion = StockCrossModalAttention(
            visual_dim, text_dim, num_heads, dim_feedforward, dropout, norm_first
        )
        self.output = nn.Linear(visual_dim + text_dim, num_classes)

    def encode_visual(self, visual: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return self.visual_encoder(visual, src_key_padding_mask=padding_mask)

    def encode_text(self, text: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return self.text_encoder(text, src_key_padding_mask=padding_mask)

    def fuse(
        self,
        visual: Tensor,
        text: Tensor,
        visual_padding_mask: Tensor | None = None,
        text_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Any:
        visual, text, weights = self.fusion(visual, text, visual_padding_mask, text_padding_mask)
        pooled = []
        for tokens, mask in ((visual, visual_padding_mask), (text, text_padding_mask)):
            if mask is None:
                pooled.append(tokens.mean(dim=1))
            else:
                kept = ~mask.unsqueeze(-1)
                pooled.append((tokens * kept).sum(dim=1) / kept.sum(dim=1))
        logits = self.output(torch.cat(pooled, dim=-1))
        return (logits, weights.mean(dim=1)) if need_weights else logits

    def forward(
        self,
        visual: Tensor,
        text: Tensor,
        visual_padding_mask: Tensor | None = None,
        text_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Any:
        visual = self.encode_visual(visual, visual_padding_mask)
        text = self.encode_text(text, text_padding_mask)
        return self.fuse(visual, text, visual_padding_mask, text_padding_mask, need_weights)


class StockCrossModalAttention(nn.Module):
    """Both directions of attention from one score matrix, by the plain formula."""

    def __init__(
        self,
        visual_dim: int,
        text_dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        norm_first: bool,
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        width = max(visual_dim, text_dim)
        self.visual = _Stream(visual_dim, width, dim_feedforward, dropout, norm_first)
        self.text = _Stream(text_dim, width, dim_feedforward, dropout, norm_first)

    def forward(
        self,
        visual: Tensor,
        text: Tensor,
        visual_padding_mask: Tensor | None,
        text_padding_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The new tokens, and the attention (B, heads, Lt, Lv) of the text over the image."""
        query, visual_value = self.visual.project(visual, self.num_heads)
        key, text_value = self.text.project(text, self.num_heads)
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])  # (B, heads, Lv, Lt)
        over_text, over_image = scores, scores.transpose(2, 3)
        if text_padding_mask is not None:
            over_text = over_text.masked_fill(text_padding_mask[:, None, None], -math.inf)
        if visual_padding_mask is not None:
            over_image = over_image.masked_fill(visual_padding_mask[:, None, None], -math.inf)
        over_text, over_image = (
            functional.dropout(s.softmax(dim=-1), self.dropout, self.training)
            for s in (over_text, over_image)
        )
        return (
            self.visual.add(visual, over_text @ text_value),
            self.text.add(text, over_image @ visual_value),
            over_image,
        )


class _Stream(nn.Module):
    """The projections, the feed-forward and the norms of one modality."""

    def __init__(
        self,
        width: int,
        attention_width: int,
        dim_feedforward: int,
        dropout: float,
        norm_first: bool,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.in_proj = nn.Linear(width, 2 * attention_width)
        self.out_proj = nn.Linear(attention_width, width)
        self.linear1 = nn.Linear(width, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout, self.dropout1, self.dropout2 = (nn.Dropout(dropout) for _ in range(3))

    def project(self, tokens: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
        """What the scores are made of, and the values: (B, heads, length, head width) each."""
        if self.norm_first:
            tokens = self.norm1(tokens)
        scored, value = self.in_proj(tokens).unflatten(-1, (2, num_heads, -1)).unbind(2)
        return scored.transpose(1, 2), value.transpose(1, 2)

    def add(self, tokens: Tensor, attended: Tensor) -> Tensor:
        tokens = tokens + self.dropout1(self.out_proj(attended.transpose(1, 2).flatten(2)))
        if self.norm_first:
            return tokens + self.feed_forward(self.norm2(tokens))
        tokens = self.norm1(tokens)
        return self.norm2(tokens + self.feed_forward(tokens))

    def feed_forward(self, tokens: Tensor) -> Tensor:
        hidden = self.dropout(functional.relu(self.linear1(tokens)))
        return self.dropout2(self.linear2(hidden))
