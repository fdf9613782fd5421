"""LXMERT (Tan and Bansal, "LXMERT: Learning Cross-Modality Encoder Representations from
Transformers", 2019)."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.lxmert import modeling_lxmert as source

from fastfusion.integrations.transformers import _blocks, _steps


class LxmertAttention(source.LxmertAttention):
    """Of tokens to a context, without the score matrix."""

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Any:
        given = hidden_states, context, attention_mask
        if (
            not output_attentions
            and _steps.is_added(attention_mask)
            and _steps.passes(self, given, (), [self.dropout])
        ):
            return (_blocks.attention(*given, self, self.num_attention_heads),)
        return super().forward(*given, output_attentions)


class LxmertLayer(source.LxmertLayer):
    """A layer of one modality in one call."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Any:
        if not output_attentions:
            parts = self.attention, self.intermediate, self.output
            result = _blocks.bert_layer(hidden_states, attention_mask, *parts)
            if result is not None:
                return (result,)
        return super().forward(hidden_states, attention_mask, output_attentions)


class LxmertXLayer(source.LxmertXLayer):
    """A layer of both modalities: cross-attention, then a layer of each.

    One attention serves both directions, so both are projected together: its weights are read once.
    """

    def cross_att(
        self,
        lang_input: Tensor,
        lang_attention_mask: Tensor | None,
        visual_input: Tensor,
        visual_attention_mask: Tensor | None,
        output_x_attentions: bool = False,
    ) -> Any:
        layer = self.visual_attention
        inside, output = layer.att, layer.output
        given = lang_input, lang_attention_mask, visual_input, visual_attention_mask
        around = layer, inside, output
        dropouts = inside.dropout, output.dropout
        masks = lang_attention_mask, visual_attention_mask
        if (
            output_x_attentions
            or not all(map(_steps.is_added, masks))
            or lang_input.dtype != visual_input.dtype
            or not _steps.is_bare(output.LayerNorm)
            or not _steps.passes(layer, given, around, dropouts)
        ):
            return super().cross_att(*given, output_x_attentions)
        both = torch.cat((lang_input, visual_input), 1)
        linears = inside.query, inside.key, inside.value, output.dense
        if not all([_steps.is_known(part, both) for part in linears]):
            return super().cross_att(*given, output_x_attentions)
        lengths = lang_input.shape[1], visual_input.shape[1]
        count = inside.num_attention_heads
        query, key, value = (
            _steps.heads(_steps.linear(part, both), count).split(lengths, 2)
            for part in (inside.query, inside.key, inside.value)
        )
        attended = torch.cat(
            (
                _steps.attend(query[0], key[1], value[1], visual_attention_mask),
                _steps.attend(query[1], key[0], value[0], lang_attention_mask),
            ),
            1,
        )
        lang, visual = _blocks.add_and_norm(attended, both, output).split(lengths, 1)
        return (lang,), (visual,)

    def forward(
        self,
        lang_feats: Tensor,
        lang_attention_mask: Tensor | None,
        visual_feats: Tensor,
        visual_attention_mask: Tensor | None,
        output_attentions: bool = False,
    ) -> Any:
        given = lang_feats, lang_attention_mask, visual_feats, visual_attention_mask
        if output_attentions or not all(map(_steps.is_added, given[1::2])):
            return super().forward(*given, output_attentions)
        (lang, *_), (visual, *_) = self.cross_att(*given)
        given = lang, lang_attention_mask, visual, visual_attention_mask
        parts = self.lang_self_att, self.lang_inter, self.lang_output
        lang_output = _blocks.bert_layer(*given[:2], *parts)
        if lang_output is not None:
            parts = self.visn_self_att, self.visn_inter, self.visn_output
            visual_output = _blocks.bert_layer(*given[2:], *parts)
            if visual_output is not None:
                return lang_output, visual_output
        return self.output_fc(*self.self_att(*given))
