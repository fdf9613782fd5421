"""Grounding DINO (Liu et al., 2023) and MM-Grounding-DINO: fusion of image and text both ways in
one `bidirectional_attention`, attention of text and of queries, deformable attention.

The layers return attention weights whether anybody reads them or not; that they are not read is
known inside an encoder or a decoder that was not asked for them, so there these are None.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.models.grounding_dino import modeling_grounding_dino as source
from transformers.models.mm_grounding_dino import modeling_mm_grounding_dino as mm_source

from fastfusion.integrations.transformers import _deformable, _steps
from fastfusion.ops.bidirectional_attention import bidirectional_attention
from fastfusion.ops.linear import linear as _linear

_is_compiling = torch.compiler.is_compiling
_MAX_HEAD_DIM = 256  # what the kernels are made for
_weights_are_read: ContextVar[bool] = ContextVar("weights_are_read", default=True)


@contextmanager
def weights_unread() -> Iterator[None]:
    token = _weights_are_read.set(False)
    try:
        yield
    finally:
        _weights_are_read.reset(token)


def _nobody_reads_weights() -> bool:
    return not (_is_compiling() or _weights_are_read.get())


class _Encoder:
    """Says to its layers that nobody reads attention weights, unless somebody does."""

    config: Any

    def forward(self, *args: Any, output_attentions: bool | None = None, **kwargs: Any) -> Any:
        wanted = self.config.output_attentions if output_attentions is None else output_attentions
        call = super().forward  # type: ignore[misc]
        if wanted or args or _is_compiling():
            return call(*args, output_attentions=output_attentions, **kwargs)
        with weights_unread():
            return call(output_attentions=output_attentions, **kwargs)


class _BiMultiHeadAttention:
    """Both directions in one call, without the score matrix."""

    def forward(
        self: Any,
        vision_features: Tensor,
        text_features: Tensor,
        vision_attention_mask: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
    ) -> Any:
        masks = vision_attention_mask, text_attention_mask
        if (
            _nobody_reads_weights()
            and all(mask is None or mask.dtype == torch.bool for mask in masks)
            and _steps.is_quiet(self)
            and _steps.passes(self, (vision_features, text_features, *masks), (), [self.dropout])
        ):
            vision, text = attend_both_ways(self, vision_features, text_features, *masks)
            return (vision, None), (text, None)
        return super().forward(vision_features, text_features, *masks)  # type: ignore[misc]


def attend_both_ways(
    module: Any,
    vision: Tensor,
    text: Tensor,
    vision_mask: Tensor | None,
    text_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What the attention adds to both, for bool masks that are True for padding."""
    count = module.num_heads
    if _is_less_on_text(module, vision, text):
        return _projected_on_text(module, vision, text, vision_mask, text_mask)
    to_vision, to_text = bidirectional_attention(
        _steps.heads(_steps.linear(module.vision_proj, vision), count),
        _steps.heads(_steps.linear(module.text_proj, text), count),
        _steps.heads(_steps.linear(module.values_text_proj, text), count),
        _steps.heads(_steps.linear(module.values_vision_proj, vision), count),
        query_padding_mask=vision_mask,
        key_padding_mask=text_mask,
        scale=module.scale,
    )
    return (
        _steps.linear(module.out_vision_proj, to_vision.transpose(1, 2).flatten(2)),
        _steps.linear(module.out_text_proj, to_text.transpose(1, 2).flatten(2)),
    )


def _is_less_on_text(module: Any, vision: Tensor, text: Tensor) -> bool:
    """Whether it is less work to do the projections of the image tokens on the side of the text:
    2,125 of an image of 320 x 320 stand beside 256 of a text at most."""
    parts = (module.vision_proj, module.values_vision_proj, module.out_vision_proj)
    if not all(_steps.is_known(part, vision) for part in parts):
        return False
    tokens, words, width = vision.shape[1], text.shape[1], vision.shape[2]
    inner, each = module.embed_dim, width * module.num_heads
    apart = tokens * inner * (width + words)
    return width <= _MAX_HEAD_DIM and words * inner * width + tokens * words * each < apart


def _projected_on_text(
    module: Any,
    vision: Tensor,
    text: Tensor,
    vision_mask: Tensor | None,
    text_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same with all three projections of the image tokens x on the side of the text.

    (W x + b) . k = x . (W^T k) + b . k, a projected sum_j p_j v_j is the sum of the projected v_j,
    and sum_i p_i (W x_i + b) = W sum_i p_i x_i + b, since the p_i add up to 1. So the tokens
    themselves are queries and values. It is done head by head, because each has an output of its
    own as large as the image, and these are summed.
    """
    count, scale = module.num_heads, module.scale
    names = ("vision_proj", "values_vision_proj", "out_vision_proj")
    (query_weight, query_bias), (value_weight, value_bias), (out_weight, out_bias) = (
        _steps.weight_and_bias(getattr(module, name)) for name in names
    )
    keys = _steps.heads(_steps.linear(module.text_proj, text), count)
    values = _steps.heads(_steps.linear(module.values_text_proj, text), count)
    if query_bias is not None:
        biases = keys.float() * query_bias.float().unflatten(0, (count, 1, -1))
        biases = biases.sum(-1).unsqueeze(2) * scale
    if value_bias is not None and vision_mask is not None:  # a word that sees no pixel gathers 0
        value_bias = value_bias * ~vision_mask.all(1)[:, None, None]
    tokens = vision[:, None]
    to_vision: Any = out_bias
    to_text = []
    size = module.head_dim
    for head in range(count):
        features = slice(head * size, (head + 1) * size)
        of_vision, of_text = bidirectional_attention(
            tokens,
            _linear(keys[:, head], query_weight[features].t())[:, None],
            _linear(values[:, head], out_weight[:, features])[:, None],
            tokens,
            attn_mask=None if query_bias is None else biases[:, head, None],
            query_padding_mask=vision_mask,
            key_padding_mask=text_mask,
            scale=scale,
        )
        to_text.append(_linear(of_text[:, 0], value_weight[features]))
        if head == 0:
            to_vision = of_vision[:, 0] if to_vision is None else of_vision[:, 0].add_(to_vision)
        else:
            to_vision += of_vision[:, 0]
        del of_vision, of_text
    gathered = torch.cat(to_text, -1)
    if value_bias is not None:
        gathered += value_bias
    return to_vision, _steps.linear(module.out_text_proj, gathered)


class _MultiheadAttention:
    """Attention of text tokens, or of queries among themselves and to text."""

    def forward(
        self: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> Any:
        given = queries, keys, values, attention_mask
        if (
            (_nobody_reads_weights() or not output_attentions)
            and (attention_mask is None or attention_mask.is_floating_point())
            and _steps.is_quiet(self)
            and _steps.passes(self, given, (), [self.dropout])
        ):
            count = self.num_attention_heads
            out = _steps.attend(
                _steps.heads(_steps.linear(self.query, queries), count),
                _steps.heads(_steps.linear(self.key, keys), count),
                _steps.heads(_steps.linear(self.value, values), count),
                attention_mask,
            )
            out = _steps.linear(self.out_proj, out)
            return (out, None) if output_attentions else (out,)
        return super().forward(*given, output_attentions)  # type: ignore[misc]


class _DeformableLayer:
    """Deformable attention among image tokens, and their feed-forward part."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        dropouts = self.dropout, self.activation_dropout
        given = hidden_states, attention_mask
        if (
            args
            or self.training  # where infinities are looked for
            or not _steps.passes(self, given, (), dropouts)
        ):
            return super().forward(*given, *args, **kwargs)  # type: ignore[misc]
        attended, weights = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=hidden_states,
            encoder_attention_mask=attention_mask,
            **kwargs,
        )
        x = _steps.norm(self.self_attn_layer_norm, attended, hidden_states)
        return _feed_forward(self, x), weights


class _DecoderLayer:
    """Attention of queries among themselves, to text and to image, and their feed-forward part."""

    def forward(
        self: Any, hidden_states: Tensor, position_embeddings: Tensor | None = None, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        dropouts = self.dropout, self.activation_dropout
        given = hidden_states, position_embeddings
        if args or kwargs.get("output_attentions") or not _steps.passes(self, given, (), dropouts):
            return super().forward(*given, *args, **kwargs)  # type: ignore[misc]
        return (self._queries(*given, **kwargs),)

    def _queries(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Tensor | None,
        vision_encoder_hidden_states: Tensor | None = None,
        vision_encoder_attention_mask: Tensor | None = None,
        text_encoder_hidden_states: Tensor | None = None,
        text_encoder_attention_mask: Tensor | None = None,
        self_attn_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **places: Any,
    ) -> Tensor:
        x = hidden_states
        queries = self.with_pos_embed(x, position_embeddings)
        attended = self.self_attn(
            queries=queries, keys=queries, values=x, attention_mask=self_attn_mask
        )
        x = _steps.norm(self.self_attn_layer_norm, attended[0], x)
        attended = self.encoder_attn_text(
            queries=self.with_pos_embed(x, position_embeddings),
            keys=text_encoder_hidden_states,
            values=text_encoder_hidden_states,
            attention_mask=text_encoder_attention_mask,
        )
        x = _steps.norm(self.encoder_attn_text_layer_norm, attended[0], x)
        attended = self.encoder_attn(
            hidden_states=x,
            attention_mask=vision_encoder_attention_mask,
            encoder_hidden_states=vision_encoder_hidden_states,
            encoder_attention_mask=vision_encoder_attention_mask,
            position_embeddings=position_embeddings,
            **places,
        )
        x = _steps.norm(self.encoder_attn_layer_norm, attended[0], x)
        return _feed_forward(self, x)


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    hidden = _steps.linear(layer.fc1, x, layer.activation_fn)
    return _steps.norm(layer.final_layer_norm, _steps.linear(layer.fc2, hidden, residual=x))


class _Sampling:
    """Of deformable attention, in one sum."""

    def forward(
        self: Any,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Any,
        level_start_index: Any,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: Any,
    ) -> Tensor:
        tensors = value, sampling_locations, attention_weights
        if (
            all(t.is_cpu and t.dtype == torch.float32 for t in tensors)
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
            and _steps.passes(self, tensors, ())
        ):
            return _deformable.sample(
                value, value_spatial_shapes_list, sampling_locations, attention_weights
            )
        result: Tensor = super().forward(  # type: ignore[misc]
            value, value_spatial_shapes, value_spatial_shapes_list, level_start_index,
            sampling_locations, attention_weights, im2col_step,
        )  # fmt: skip
        return result


class GroundingDinoEncoder(_Encoder, source.GroundingDinoEncoder):
    pass


class GroundingDinoDecoder(_Encoder, source.GroundingDinoDecoder):
    pass


class GroundingDinoBiMultiHeadAttention(
    _BiMultiHeadAttention, source.GroundingDinoBiMultiHeadAttention
):
    pass


class GroundingDinoMultiheadAttention(_MultiheadAttention, source.GroundingDinoMultiheadAttention):
    pass


class GroundingDinoDeformableLayer(_DeformableLayer, source.GroundingDinoDeformableLayer):
    pass


class GroundingDinoDecoderLayer(_DecoderLayer, source.GroundingDinoDecoderLayer):
    pass


class MultiScaleDeformableAttention(_Sampling, source.MultiScaleDeformableAttention):
    pass


class MMGroundingDinoEncoder(_Encoder, mm_source.MMGroundingDinoEncoder):
    pass


class MMGroundingDinoDecoder(_Encoder, mm_source.MMGroundingDinoDecoder):
    pass


class MMGroundingDinoBiMultiHeadAttention(
    _BiMultiHeadAttention, mm_source.MMGroundingDinoBiMultiHeadAttention
):
    pass


class MMGroundingDinoMultiheadAttention(
    _MultiheadAttention, mm_source.MMGroundingDinoMultiheadAttention
):
    pass


class MMGroundingDinoDeformableLayer(_DeformableLayer, mm_source.MMGroundingDinoDeformableLayer):
    pass


class MMGroundingDinoDecoderLayer(_DecoderLayer, mm_source.MMGroundingDinoDecoderLayer):
    pass


class MMMultiScaleDeformableAttention(_Sampling, mm_source.MultiScaleDeformableAttention):
    pass
