"""BridgeTower (Xu et al., 2023).

Its cross-modal layers say of bidirectional attention that it is causal, which its own eager code
never looks at: by the attention interface, images would see only what lies behind. And its models
return the weights of that attention, asked or not. So it stays as it is, and what is around it is
faster.
"""

from typing import Any

from torch import Tensor
from transformers.models.bridgetower import modeling_bridgetower as source

from fastfusion.integrations.transformers import _blocks, _steps
from fastfusion.integrations.transformers._interface import wants_weights
from fastfusion.nn._layers import attention_parts


class BridgeTowerTextLayer(source.BridgeTowerTextLayer):
    """A layer of the text encoder in one call."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        inside = self.attention.self
        if (
            not (self.chunk_size_feed_forward or wants_weights(kwargs))
            and encoder_hidden_states is None
            and past_key_values is None
            and _blocks.resolves(inside, attention_mask)
            and not inside.training
        ):
            parts = self.attention, self.intermediate, self.output
            result = _blocks.bert_layer(hidden_states, attention_mask, *parts, inside)
            if result is not None:
                return result
        return super().forward(
            hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
            past_key_values, **kwargs,
        )  # fmt: skip


class BridgeTowerBertCrossLayer(source.BridgeTowerBertCrossLayer):
    """A cross-modal layer in steps, around its attention."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        own, cross = self.attention, self.crossattention
        halves = self.intermediate, self.output
        given = hidden_states, encoder_hidden_states, attention_mask, encoder_attention_mask
        outputs = own.output, cross.output, self.output
        if self.chunk_size_feed_forward or not _steps.passes(
            self, given, (own, cross, *outputs, self.intermediate), [o.dropout for o in outputs]
        ):
            return super().forward(*given, past_key_values, **kwargs)
        attended, own_weights = own.self(hidden_states, attention_mask=attention_mask, **kwargs)
        x = _blocks.add_and_norm(attended, hidden_states, own.output)
        attended, cross_weights = cross.self(
            x,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        x = _blocks.add_and_norm(attended, x, cross.output)
        return _blocks.feed_forward(x, *halves), own_weights, cross_weights


class BridgeTowerResidualAttention(source.BridgeTowerResidualAttention):
    """A layer of the image encoder in one call, of tokens (length, batch, width)."""

    def forward(self, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Any:
        attention, mlp = self.attn, self.mlp
        found = None
        if attention_mask is None and self.attn_mask is None and not attention.batch_first:
            found = attention_parts(attention)
        if found is not None:
            inside, in_proj, _ = found
            result = _blocks.encoder_layer(
                hidden_state.transpose(0, 1), None, [in_proj],
                (attention.out_proj, mlp["c_fc"], mlp["c_proj"]), (self.ln_1, self.ln_2),
                mlp["gelu"], attention.num_heads, True, (mlp, *inside), (),
            )  # fmt: skip
            if result is not None:
                return result.transpose(0, 1)
        return super().forward(hidden_state, attention_mask)
