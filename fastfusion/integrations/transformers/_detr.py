"""DETR (Carion et al., 2020): positions are added to queries and keys and not to values, which no
op of a whole layer does; its layers go by steps."""

from typing import Any

from torch import Tensor
from transformers.models.conditional_detr import modeling_conditional_detr as conditional
from transformers.models.detr import modeling_detr as detr

from fastfusion.integrations.transformers import _steps
from fastfusion.integrations.transformers._blocks import resolves
from fastfusion.integrations.transformers._interface import wants_weights


def _attend(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    residual: Tensor,
    norm: Any,
) -> Tensor:
    """norm(attention + residual), of inputs that have their positions."""
    dim = attention.head_dim
    q, k, v = [
        _steps.linear(projection, x).unflatten(-1, (-1, dim)).transpose(1, 2)
        for projection, x in (
            (attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, value),
        )
    ]  # fmt: skip
    out = _steps.attend(q, k, v, mask, attention.scaling)
    return _steps.norm(norm, _steps.linear(attention.o_proj, out, residual=residual))


def _with(x: Tensor, positions: Tensor | None) -> Tensor:
    return x if positions is None else x + positions


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    mlp = layer.mlp
    hidden = _steps.linear(mlp.fc1, x, mlp.activation_fn)
    return _steps.norm(layer.final_layer_norm, _steps.linear(mlp.fc2, hidden, residual=x))


def _passes(layer: Any, inputs: Any, masks: Any, attentions: Any, kwargs: Any) -> bool:
    """Whether a layer comes to its steps.

    Args:
        masks: of the attentions, in their order.
        kwargs: what was given besides, of which nothing else may matter.
    """
    mlp = layer.mlp
    dropouts = [layer.dropout, mlp.activation_dropout, mlp.dropout]
    dropouts += [attention.attention_dropout for attention in attentions]
    return (
        not layer.training
        and not wants_weights(kwargs)
        and all(value is None or value is False for value in kwargs.values())
        and all(map(resolves, attentions, masks))
        and _steps.passes(layer, (*inputs, *masks), (*attentions, mlp), dropouts)
    )


class _EncoderLayer:
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        spatial_position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        x, mask, positions = hidden_states, attention_mask, spatial_position_embeddings
        attention = self.self_attn
        if not _passes(self, (x, positions), (mask,), (attention,), kwargs):
            return super().forward(x, mask, positions, **kwargs)  # type: ignore[misc]
        placed = _with(x, positions)
        norm = self.self_attn_layer_norm
        return _feed_forward(self, _attend(attention, placed, placed, x, mask, x, norm))


class DetrEncoderLayer(_EncoderLayer, detr.DetrEncoderLayer):
    pass


class ConditionalDetrEncoderLayer(_EncoderLayer, conditional.ConditionalDetrEncoderLayer):
    pass


class DetrDecoderLayer(detr.DetrDecoderLayer):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        object_queries_position_embeddings: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        x, memory = hidden_states, encoder_hidden_states
        places, queries = spatial_position_embeddings, object_queries_position_embeddings
        masks = attention_mask, encoder_attention_mask
        attentions = self.self_attn, self.encoder_attn
        if memory is None or not _passes(
            self, (x, places, queries, memory), masks, attentions, kwargs
        ):
            return super().forward(
                x, attention_mask, places, queries, memory, encoder_attention_mask, **kwargs
            )
        placed = _with(x, queries)
        x = _attend(self.self_attn, placed, placed, x, masks[0], x, self.self_attn_layer_norm)
        x = _attend(
            self.encoder_attn, _with(x, queries), _with(memory, places), memory, masks[1], x,
            self.encoder_attn_layer_norm,
        )  # fmt: skip
        return _feed_forward(self, x)
