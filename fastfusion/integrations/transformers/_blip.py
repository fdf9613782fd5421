"""BLIP (Li et al., 2022) and the Q-Former of BLIP-2 (Li et al., 2023)."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.models.blip import modeling_blip as vision
from transformers.models.blip import modeling_blip_text as text
from transformers.models.blip_2 import modeling_blip_2 as blip_2

from fastfusion.integrations.transformers import _blocks, _few_to_many, _steps
from fastfusion.integrations.transformers._interface import wants_weights


class BlipAttention(vision.BlipAttention):
    """Of patches, without the score matrix."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        if wants_weights(kwargs) or not _steps.passes(self, [hidden_states], (), [self.dropout]):
            return super().forward(hidden_states, **kwargs)
        query, key, value = (
            _steps.linear(self.qkv, hidden_states)
            .unflatten(-1, (3, self.num_heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        out = _steps.attend(query, key, value, None, self.scale)
        return _steps.linear(self.projection, out), None


class BlipEncoderLayer(vision.BlipEncoderLayer):
    """A layer of the image encoder in one call."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        attention, mlp = self.self_attn, self.mlp
        if not wants_weights(kwargs):
            result = _blocks.encoder_layer(
                hidden_states, None, [attention.qkv], (attention.projection, mlp.fc1, mlp.fc2),
                (self.layer_norm1, self.layer_norm2), mlp.activation_fn, attention.num_heads, True,
                (attention, mlp), [attention.dropout],
            )  # fmt: skip
            if result is not None:
                return result
        return super().forward(hidden_states, **kwargs)


class BlipTextSelfAttention(text.BlipTextSelfAttention):
    """Of words among themselves or to an image, without the score matrix."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        is_cross = encoder_hidden_states is not None
        mask = encoder_attention_mask if is_cross else attention_mask
        given = hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask
        if (
            wants_weights(kwargs)
            or not _steps.is_added(mask)
            or not _steps.passes(self, given, (), [self.dropout])
        ):
            return super().forward(*given, past_key_values, **kwargs)
        count = self.num_attention_heads
        query = _steps.heads(_steps.linear(self.query, hidden_states), count)
        if encoder_hidden_states is not None and past_key_values is None:
            out = _few_to_many.attend(query, encoder_hidden_states, self, mask)
            if out is not None:
                return out, None
        key, value = self._keys_and_values(hidden_states, encoder_hidden_states, past_key_values)
        return _steps.attend(query, key, value, mask), None

    def _keys_and_values(
        self, hidden_states: Tensor, context: Tensor | None, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """From the context or the words, and with what the cache has, which keeps them."""
        cache: Any = past_key_values
        both = isinstance(cache, EncoderDecoderCache)
        if both:
            known = context is not None and cache.is_updated.get(self.layer_idx)
            cache = cache.self_attention_cache if context is None else cache.cross_attention_cache
            if known:
                layer = cache.layers[self.layer_idx]
                return layer.keys, layer.values
        states = hidden_states if context is None else context
        key, value = (
            _steps.heads(_steps.linear(part, states), self.num_attention_heads)
            for part in (self.key, self.value)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            if both and context is not None:
                past_key_values.is_updated[self.layer_idx] = True  # type: ignore[union-attr]
        return key, value


class BlipTextLayer(text.BlipTextLayer):
    """A layer of the text encoder in one call; of the decoder, in steps."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        def source() -> Any:
            return super(BlipTextLayer, self).forward(
                hidden_states, encoder_hidden_states, attention_mask, encoder_attention_mask,
                past_key_values, **kwargs,
            )  # fmt: skip

        if self.chunk_size_feed_forward or wants_weights(kwargs):
            return source()
        attention, intermediate, output = self.attention, self.intermediate, self.output
        if encoder_hidden_states is None and past_key_values is None:
            parts = attention, intermediate, output
            result = _blocks.bert_layer(hidden_states, attention_mask, *parts)
            return source() if result is None else result
        around = [attention, attention.output, intermediate, output]
        dropouts = [attention.output.dropout, output.dropout]
        if encoder_hidden_states is not None:
            cross = self.crossattention
            around += [cross, cross.output]
            dropouts.append(cross.output.dropout)
        inputs = hidden_states, encoder_hidden_states
        if not _steps.passes(self, inputs, around, dropouts):
            return source()
        x, _ = attention.self(
            hidden_states, attention_mask=attention_mask, past_key_values=past_key_values
        )
        x = _blocks.add_and_norm(x, hidden_states, attention.output)
        if encoder_hidden_states is not None:
            attended, _ = cross.self(
                x,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                past_key_values=past_key_values,
            )
            x = _blocks.add_and_norm(attended, x, cross.output)
        return _blocks.feed_forward(x, intermediate, output)


class Blip2QFormerLayer(blip_2.Blip2QFormerLayer):
    """A layer of queries: in one call where they do not look at the image, else in steps."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        query_length: int = 0,
        **kwargs: Any,
    ) -> Any:
        def source() -> Any:
            return super(Blip2QFormerLayer, self).forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
                query_length, **kwargs,
            )  # fmt: skip

        if self.chunk_size_feed_forward or wants_weights(kwargs):
            return source()
        attention = self.attention
        on_queries, on_text = query_length > 0, hidden_states.shape[1] > query_length
        looks = on_queries and self.has_cross_attention
        halves = []
        if on_queries:
            halves.append((self.intermediate_query, self.output_query))
        if on_text:
            halves.append((self.intermediate, self.output))
        if len(halves) == 1 and not looks and _blocks.resolves(attention.attention, attention_mask):
            inside, (intermediate, output) = attention.attention, halves[0]
            result = _blocks.bert_layer(
                hidden_states, attention_mask, attention, intermediate, output, inside
            )
            if result is not None:
                return result
        blocks = [attention, self.crossattention] if looks else [attention]
        around = [module for half in halves for module in half]
        outputs = [block.output for block in blocks] + [output for _, output in halves]
        given = hidden_states, encoder_hidden_states if looks else None
        if looks and encoder_hidden_states is None:
            return source()
        if not _steps.passes(
            self, given, (*blocks, *outputs, *around), [output.dropout for output in outputs]
        ):
            return source()
        attended, _ = attention.attention(
            hidden_states=hidden_states, attention_mask=attention_mask, **kwargs
        )
        x = _blocks.add_and_norm(attended, hidden_states, attention.output)
        if not on_queries:
            return _blocks.feed_forward(x, *halves[0])
        queries = x[:, :query_length]
        if looks:
            attended, _ = self.crossattention.attention(
                hidden_states=queries,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                **kwargs,
            )
            queries = _blocks.add_and_norm(attended, queries, self.crossattention.output)
        queries = _blocks.feed_forward(queries, *halves[0])
        if not on_text:
            return queries
        return torch.cat((queries, _blocks.feed_forward(x[:, query_length:], *halves[1])), 1)
