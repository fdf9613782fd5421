"""The stock twin of a model: torch.nn and plain formulas in place of fastfusion's layers.

What a user of torch writes today. torch.nn has no attention between sequences of different widths,
and none in both directions; there it is `scaled_dot_product_attention`, and the formula: one score
matrix, a softmax over its rows and one over its columns.
"""

import copy
import math
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional

import fastfusion.nn as ffnn
from fastfusion.nn import _cross_modal

M = TypeVar("M", bound=nn.Module)


def stock_twin(model: M) -> M:
    """A copy of a model that shares no weights with it, with torch.nn's layers inside.

    The same ``state_dict`` and the same functions; a decoder has no cache there.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        kind = _STOCK.get(type(module))
        if kind is not None:
            module.__class__ = kind
            module.__dict__.pop("__module__", None)
    return twin


class _StockCrossModalAttention(nn.Module):
    """Both directions of attention from one score matrix, by the plain formula."""

    num_heads: int
    head_dim: int
    dropout: float
    norm_first: bool
    visual: Any
    text: Any

    def forward(
        self,
        visual: Tensor,
        text: Tensor,
        visual_padding_mask: Tensor | None = None,
        text_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, ...]:
        sizes = (2, self.num_heads, self.head_dim)
        query, visual_value = self.visual.project(visual, sizes, self.norm_first)
        key, text_value = self.text.project(text, sizes, self.norm_first)
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
        new_visual = self.visual.add(visual, over_text @ text_value, self.norm_first)
        new_text = self.text.add(text, over_image @ visual_value, self.norm_first)
        if need_weights:
            return new_visual, new_text, over_text.mean(dim=1), over_image.mean(dim=1)
        return new_visual, new_text


class _StockStream(nn.Module):
    """The projections, the feed-forward and the norms of one modality."""

    in_proj: Any
    out_proj: Any
    linear1: Any
    linear2: Any
    norm1: Any
    norm2: Any
    dropout: Any
    dropout1: Any
    dropout2: Any
    activation: Any

    def project(
        self, tokens: Tensor, sizes: tuple[int, int, int], norm_first: bool
    ) -> tuple[Tensor, Tensor]:
        """What the scores are made of, and the values: (B, heads, length, head width) each."""
        if norm_first:
            tokens = self.norm1(tokens)
        scored, value = self.in_proj(tokens).unflatten(-1, sizes).unbind(2)
        return scored.transpose(1, 2), value.transpose(1, 2)

    def add(self, tokens: Tensor, attended: Tensor, norm_first: bool) -> Tensor:
        attended = self.out_proj(attended.transpose(1, 2).flatten(2))
        tokens = tokens + self.dropout1(attended)
        if norm_first:
            return tokens + self.feed_forward(self.norm2(tokens))
        tokens = self.norm1(tokens)
        return self.norm2(tokens + self.feed_forward(tokens))

    def feed_forward(self, tokens: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.linear1(tokens)))
        return self.dropout2(self.linear2(hidden))


class _StockCrossAttention(nn.Module):
    """Queries of one sequence over another by `scaled_dot_product_attention`."""

    num_heads: int
    dropout: float
    q_proj: Any
    kv_proj: Any
    out_proj: Any

    def forward(
        self, query: Tensor, context: Tensor, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        heads = (self.num_heads, -1)
        q = self.q_proj(query).unflatten(-1, heads).transpose(1, 2)
        k, v = (
            half.unflatten(-1, heads).transpose(1, 2)
            for half in self.kv_proj(context).chunk(2, dim=-1)
        )
        mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None]
        attended = functional.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))


_STOCK: dict[type, type[nn.Module]] = {
    ffnn.MultiheadAttention: nn.MultiheadAttention,
    ffnn.TransformerEncoderLayer: nn.TransformerEncoderLayer,
    ffnn.TransformerEncoder: nn.TransformerEncoder,
    ffnn.TransformerDecoderLayer: nn.TransformerDecoderLayer,
    ffnn.TransformerDecoder: nn.TransformerDecoder,
    ffnn.CrossAttention: _StockCrossAttention,
    ffnn.CrossModalAttention: _StockCrossModalAttention,
    _cross_modal._Stream: _StockStream,
}
