"""Fusion of two modalities: attention both ways from one score matrix."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion.core import arguments
from fastfusion.core.reference import cast
from fastfusion.nn import _nested
from fastfusion.nn._attention_maps import RecordsAttention
from fastfusion.nn._checks import (
    ACTIVATIONS,
    check_activation,
    check_counts,
    check_dropout,
    check_sequences,
    without_mask_object,
)
from fastfusion.nn._cross_attention import init_halves
from fastfusion.nn._nested_pair import clear_absent, is_nested, pack_pair, pad, padding_of, unpad
from fastfusion.nn._plain import (
    activation_name,
    attention_dtype_between,
    is_plain_call,
    operands_of,
    parameters,
)
from fastfusion.nn._tracing import be_leaf
from fastfusion.nn._weights import bidirectional_with_weights
from fastfusion.ops import cross_modal_layer as _layer
from fastfusion.ops.bidirectional_attention import bidirectional_attention


class CrossModalAttention(RecordsAttention):
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
        be_leaf(self)

    def forward(
        self,
        visual: Tensor,
        text: Tensor,
        visual_padding_mask: Tensor | None = None,
        text_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        average_attn_weights: bool = True,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Fuse the two sequences.

        Args:
            visual: (batch, visual_len, visual_dim), or nested (batch, ragged length, visual_dim).
            text: (batch, text_len, text_dim), or nested as `visual` is.
            visual_padding_mask: bool, broadcastable to (batch, visual_len), True = text ignores
                this token. No mask goes with nested tensors.
            text_padding_mask: bool, broadcastable to (batch, text_len), True = the image ignores
                this token.
            need_weights: also return the weights of both directions, as they are after dropout.
            average_attn_weights: average the weights over the heads.
            attn_mask: broadcastable to (batch, num_heads, visual_len, text_len): bool, True = these
                two must not attend to each other, or float, added to the scores that both
                directions share; or a causal mask of `torch.nn.attention.bias`.

        Returns:
            The new visual and text tokens, in the shapes of the old, nested if they are; with
            `need_weights` also the weights of visual tokens on text (batch, visual_len, text_len)
            and of text on visual tokens (batch, text_len, visual_len), with num_heads behind batch
            if not averaged, padded with 0 for nested tensors. A token with nothing left to attend
            to gathers 0. Padded tokens get an output too, which means nothing.

        Raises:
            TypeError, ValueError: arguments that do not fit; the message names and prints them.
        """
        if is_nested(visual, text):
            return self._forward_nested(
                visual, text, need_weights, average_attn_weights, attn_mask=attn_mask,
                visual_padding_mask=visual_padding_mask, text_padding_mask=text_padding_mask,
            )  # fmt: skip
        if attn_mask is None and not (need_weights or self._recorders):
            fused = self._fused_unchecked(visual, text, visual_padding_mask, text_padding_mask)
            if fused is not None:
                return fused
        attn_mask = without_mask_object(attn_mask, visual)
        if not torch.compiler.is_compiling():
            self._check(visual, text, visual_padding_mask, text_padding_mask, attn_mask)
        if visual_padding_mask is not None:
            visual_padding_mask = visual_padding_mask.expand(visual.shape[:2])
        if text_padding_mask is not None:
            text_padding_mask = text_padding_mask.expand(text.shape[:2])
        with_weights = need_weights or bool(self._recorders)
        if not with_weights:
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                attn_mask = ~attn_mask
            if not torch.compiler.is_compiling() and _layer.OP.may_fuse(visual):
                masks = (attn_mask, visual_padding_mask, text_padding_mask)
                fused = self._fused(visual, text, *masks)
                if fused is not None:
                    return fused
        elif attn_mask is not None:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        of_visual, of_text = self._project(visual, text)
        to_visual, to_text, *weights = self._attend(
            of_visual, of_text, attn_mask, visual_padding_mask, text_padding_mask, with_weights
        )
        return (
            self.visual.add(visual, to_visual, self.norm_first),
            self.text.add(text, to_text, self.norm_first),
            *self._hand_out(weights, need_weights, average_attn_weights),
        )

    def _fused_unchecked(
        self, visual: Any, text: Any, visual_padding_mask: Any, text_padding_mask: Any
    ) -> tuple[Tensor, Tensor] | None:
        """`_fused` of arguments that nobody has checked: the op refuses what does not fit, for
        `_check` to say what it is."""
        if type(visual) is not Tensor or type(text) is not Tensor:
            return None
        if torch.compiler.is_compiling() or not _layer.OP.may_fuse(visual):
            return None
        try:
            return self._fused(visual, text, None, visual_padding_mask, text_padding_mask)
        except RuntimeError:
            return None

    def _fused(
        self,
        visual: Tensor,
        text: Tensor,
        attn_mask: Tensor | None,
        visual_padding_mask: Tensor | None,
        text_padding_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """The outputs by the op `cross_modal_layer`, for a bool mask that is True where two tokens
        attend to each other; None where the parts are to run."""
        if self.training and self.dropout > 0.0:
            return None
        streams = (self.visual, self.text)
        activation = activation_name(streams[0].activation)
        if activation is None or streams[0].activation is not streams[1].activation:
            return None
        modules = [m for s in streams for m in s.__dict__["_modules"].values()]
        if not is_plain_call((visual, text), modules, attn_mask):
            return None
        weights, epsilons, scales = zip(*(s.weights() for s in streams), strict=True)
        values: list[Any] = [
            visual, text, *weights[0], *weights[1], attn_mask, visual_padding_mask,
            text_padding_mask, self.num_heads, _layer.number_of(activation), self.norm_first,
            *epsilons[0], *epsilons[1], *scales[0], *scales[1],
        ]  # fmt: skip
        result: tuple[Tensor, Tensor] | None = _layer.OP.fuse(_layer.Call(*values))
        return result

    def _forward_nested(
        self, visual: Any, text: Any, need_weights: bool, average_attn_weights: bool, **masks: Any
    ) -> tuple[Tensor, ...]:
        """Everything but the attention runs on the packed tokens; that, on padded heads."""
        images, words = pack_pair(
            {"visual": visual, "text": text},
            (self.visual_dim, self.text_dim),
            (self.visual.in_proj, self.text.in_proj),
            **masks,
        )
        paddings = padding_of(images), padding_of(words)
        of_visual, of_text = self._project(images.values, words.values)
        to_visual, to_text, *weights = self._attend(
            [pad(t, paddings[0]) for t in of_visual], [pad(t, paddings[1]) for t in of_text],
            None, paddings[0].absent, paddings[1].absent, need_weights or bool(self._recorders),
        )  # fmt: skip
        weights = clear_absent(weights, paddings)
        fused = (
            self.visual.add(images.values, unpad(to_visual, paddings[0]), self.norm_first),
            self.text.add(words.values, unpad(to_text, paddings[1]), self.norm_first),
        )
        return (
            _nested.unpack(fused[0], images),
            _nested.unpack(fused[1], words),
            *self._hand_out(weights, need_weights, average_attn_weights),
        )

    def _project(self, visual: Tensor, text: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """What scores are made of and values, (..., length, heads, head_dim), of each modality."""
        heads = (2, self.num_heads, self.head_dim)
        if self.norm_first:
            visual, text = self.visual.norm1(visual), self.text.norm1(text)
        return self.visual.project(visual, heads), self.text.project(text, heads)

    def _attend(
        self,
        of_visual: Sequence[Tensor],
        of_text: Sequence[Tensor],
        attn_mask: Tensor | None,
        visual_padding_mask: Tensor | None,
        text_padding_mask: Tensor | None,
        with_weights: bool,
    ) -> tuple[Tensor, ...]:
        """Attention both ways, in and out (batch, length, heads, head_dim), and the weights if
        need be."""
        query, visual_value = of_visual
        key, text_value = of_text
        query, visual_value = query.transpose(1, 2), visual_value.transpose(1, 2)
        key, text_value = key.transpose(1, 2), text_value.transpose(1, 2)
        dropout_p = self.dropout if self.training else 0.0
        weights: Sequence[Tensor] = ()
        if with_weights:
            to_visual, to_text, *weights = bidirectional_with_weights(
                query, key, text_value, visual_value,
                attn_mask, visual_padding_mask, text_padding_mask, dropout_p,
            )  # fmt: skip
        else:
            dtype = attention_dtype_between(query, self.visual.in_proj, self.text.in_proj)
            operands = (cast(t, dtype) for t in (query, key, text_value, visual_value))
            attended = bidirectional_attention(
                *operands, attn_mask=attn_mask, query_padding_mask=visual_padding_mask,
                key_padding_mask=text_padding_mask, dropout_p=dropout_p,
            )  # fmt: skip
            to_visual, to_text = (cast(t, query.dtype) for t in attended)
        return to_visual.transpose(1, 2), to_text.transpose(1, 2), *weights

    def _hand_out(
        self, weights: Sequence[Tensor], need_weights: bool, average: bool
    ) -> Sequence[Tensor]:
        """Weights (batch, heads, length, length), if any, to who reads them; the caller's."""
        if weights:
            self._record(*weights)
        if not need_weights:
            return ()
        return [w.mean(1) for w in weights] if average else weights

    def _check(
        self,
        visual: Any,
        text: Any,
        visual_padding_mask: Any,
        text_padding_mask: Any,
        attn_mask: Any,
    ) -> None:
        dtype, given = check_sequences(
            {"visual": visual, "text": text},
            (self.visual_dim, self.text_dim),
            (self.visual.in_proj, self.text.in_proj),
        )
        for name, mask, tensor in (
            ("visual_padding_mask", visual_padding_mask, visual),
            ("text_padding_mask", text_padding_mask, text),
        ):
            arguments.check_padding_mask(name, mask, tensor, tuple(tensor.shape[:2]), given)
        target = (visual.shape[0], self.num_heads, visual.shape[1], text.shape[1])
        mask = arguments.autocast_mask(dtype, attn_mask)
        arguments.check_attn_mask(mask, visual, target, given)

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

    def weights(self) -> tuple[list[Any], tuple[float, float], list[Tensor | None]]:
        """What a call of the op `cross_modal_layer` takes of a stream: weights and biases, the eps
        of its norms, and scales of weights."""
        parts = self.__dict__["_modules"]
        tensors: list[Any] = []
        scales = []
        for name in ("in_proj", "out_proj", "linear1", "linear2"):
            weight, scale, bias = operands_of(parts[name])
            tensors += (weight, bias)
            scales.append(scale)
        for name in ("norm1", "norm2"):
            tensors += parameters(parts[name])
        return tensors, (parts["norm1"].eps, parts["norm2"].eps), scales

    def project(self, tokens: Tensor, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        scored, value = self.in_proj(tokens).unflatten(-1, heads).unbind(-3)
        return scored, value

    def add(self, tokens: Tensor, attended: Tensor, norm_first: bool) -> Tensor:
        """The output, from the layer's input and what (..., length, heads, head_dim) attended."""
        x = tokens + self.dropout1(self.out_proj(attended.flatten(-2)))
        if norm_first:
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x)
        return self.norm2(x + self._feed_forward(x))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))
