"""Perceiver (Jaegle et al., 2021): latents that attend to inputs, and to each other."""

from typing import Any

from torch import Tensor, nn
from transformers.models.perceiver import modeling_perceiver as source

from fastfusion.integrations.transformers import _blocks, _steps


class PerceiverSelfAttention(source.PerceiverSelfAttention):
    """Of latents to themselves or to inputs, without the score matrix."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inputs: Tensor | None = None,
        inputs_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> Any:
        given = hidden_states, attention_mask, inputs, inputs_mask
        mask = attention_mask if inputs is None else inputs_mask
        if (
            output_attentions
            or not _steps.is_added(mask)
            or not _steps.passes(self, given, (), [self.dropout])
        ):
            return super().forward(*given, output_attentions)
        x = _steps.norm(self.layernorm1, hidden_states)
        context = x
        if inputs is not None:
            second = self.layernorm2
            context = second(inputs) if type(second) is nn.Identity else _steps.norm(second, inputs)
        query, key, value = (
            _steps.heads(_steps.linear(part, states), self.num_heads)
            for part, states in ((self.query, x), (self.key, context), (self.value, context))
        )
        return (_steps.attend(query, key, value, mask),)


class PerceiverLayer(source.PerceiverLayer):
    """Among latents in one call where all widths are one, else in steps."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inputs: Tensor | None = None,
        inputs_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> Any:
        given = hidden_states, attention_mask, inputs, inputs_mask
        attention, mlp = self.attention, self.mlp
        inside, output = attention.self, attention.output
        if output_attentions or self.chunk_size_feed_forward:
            return super().forward(*given, output_attentions)
        if (
            inputs is None
            and attention.use_query_residual
            and _steps.is_added(attention_mask)
            and inside.qk_channels == inside.v_channels == hidden_states.shape[-1]
        ):
            result = _blocks.encoder_layer(
                hidden_states, attention_mask, (inside.query, inside.key, inside.value),
                (output.dense, mlp.dense1, mlp.dense2), (inside.layernorm1, self.layernorm),
                mlp.intermediate_act_fn, inside.num_heads, True,
                (attention, inside, inside.layernorm2, output, mlp), [inside.dropout],
            )  # fmt: skip
            if result is not None:
                return (result,)
        if not _steps.passes(self, given, (attention, output, mlp)):
            return super().forward(*given, output_attentions)
        residual = hidden_states if attention.use_query_residual else None
        (attended,) = inside(*given)
        x = _steps.linear(output.dense, attended, residual=residual)
        hidden = _steps.norm(self.layernorm, x)
        hidden = _steps.linear(mlp.dense1, hidden, mlp.intermediate_act_fn)
        return (_steps.linear(mlp.dense2, hidden, residual=x),)
