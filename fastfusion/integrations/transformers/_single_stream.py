"""Models that have image and text in one sequence: VisualBERT (Li et al., 2019), ViLT (Kim et al.,
2021) and the encoders of FLAVA (Singh et al., 2022)."""

from typing import Any

from torch import Tensor
from transformers.models.flava import modeling_flava as flava
from transformers.models.vilt import modeling_vilt as vilt
from transformers.models.visual_bert import modeling_visual_bert as visual_bert

from fastfusion.integrations.transformers import _blocks, _steps


class _SelfAttention:
    """Without the score matrix."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Any:
        given = hidden_states, attention_mask
        if (
            not output_attentions
            and _steps.is_added(attention_mask)
            and _steps.passes(self, given, (), [self.dropout])
        ):
            count = self.num_attention_heads
            return (_blocks.attention(hidden_states, *given, self, count),)
        return super().forward(*given, output_attentions)  # type: ignore[misc]


class _BertLayer:
    """A layer with its norms behind the residuals, in one call."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Any:
        if not output_attentions and not self.chunk_size_feed_forward:
            parts = self.attention, self.intermediate, self.output
            result = _blocks.bert_layer(hidden_states, attention_mask, *parts)
            if result is not None:
                return (result,)
        return super().forward(  # type: ignore[misc]
            hidden_states, attention_mask, output_attentions
        )


class _ViTLayer:
    """A layer with its norms first, in one call."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Any:
        attention, intermediate, output = self.attention, self.intermediate, self.output
        inside = attention.attention
        if not output_attentions and _steps.is_added(attention_mask):
            result = _blocks.encoder_layer(
                hidden_states, attention_mask,
                (inside.query, inside.key, inside.value),
                (attention.output.dense, intermediate.dense, output.dense),
                (self.layernorm_before, self.layernorm_after),
                intermediate.intermediate_act_fn, inside.num_attention_heads, True,
                (attention, inside, attention.output, intermediate, output),
                (inside.dropout, attention.output.dropout, output.dropout),
            )  # fmt: skip
            if result is not None:
                return (result,)
        return super().forward(  # type: ignore[misc]
            hidden_states, attention_mask, output_attentions
        )


class VisualBertSelfAttention(_SelfAttention, visual_bert.VisualBertSelfAttention):
    pass


class VisualBertLayer(_BertLayer, visual_bert.VisualBertLayer):
    pass


class ViltSelfAttention(_SelfAttention, vilt.ViltSelfAttention):
    pass


class ViltLayer(_ViTLayer, vilt.ViltLayer):
    pass


class FlavaSelfAttention(_SelfAttention, flava.FlavaSelfAttention):
    pass


class FlavaLayer(_ViTLayer, flava.FlavaLayer):
    pass
