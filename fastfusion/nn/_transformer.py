"""The Transformer modules as drop-ins for torch.nn's (Vaswani et al., 2017)."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.nn.modules.transformer import _get_seq_len

from fastfusion.nn import _nested
from fastfusion.nn._decoding import DecoderCache, decode, make_cache
from fastfusion.nn._layers import decoder_layer, encoder_layer, without_padding
from fastfusion.nn._linear import feed_forward
from fastfusion.nn._multihead import MultiheadAttention, settle_in
from fastfusion.nn._tracing import be_leaf

Activation = str | Callable[[Tensor], Tensor]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Self-attention and feed-forward, a drop-in for `torch.nn.TransformerEncoderLayer`.

    Arguments, shapes, state_dict and initial weights are torch's. Every part is called, in eval
    mode too, so hooks and replaced parts always count. Nested input (strided and jagged) works in
    training as well: all parts but `self_attn` see its packed values.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        be_leaf(self)
        _retag(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Pass `src` through the layer.

        Args:
            src: (length, batch, d_model), (batch, length, d_model) if `batch_first`, or
                (length, d_model); or nested (batch, ragged, d_model) if `batch_first`.
            src_mask: (length, length) or (batch * nhead, length, length): bool, True = must not
                attend, or float, added to the scores.
            src_key_padding_mask: (batch, length) or (length,): bool, True = ignore, or float.
            is_causal: promises that `src_mask` is the causal mask.

        Returns:
            A tensor of the shape of `src`.
        """
        if src_mask is not None or src_key_padding_mask is not None:
            ours = type(self.self_attn).forward is MultiheadAttention.forward
            src_mask, src_key_padding_mask = _checked_masks(
                src, src_mask, "src_mask", src_key_padding_mask, as_float=not ours
            )
        if src.is_nested:
            if _nested.has_holes(src):
                rest = (src_mask, src_key_padding_mask, is_causal)
                return _nested.around_holes(
                    src, lambda full: TransformerEncoderLayer.forward(self, full, *rest)
                )
            return self._forward_nested(src, src_mask, src_key_padding_mask, is_causal)
        if type(self) is TransformerEncoderLayer:
            result = encoder_layer(self, src, src_mask, src_key_padding_mask, is_causal)
            if result is not None:
                return result
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(x + self._ff_block(x))

    def _forward_nested(
        self, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> Tensor:
        packed = _nested.pack(src)
        if packed is None:
            # self_attn knows what to say about such a shape.
            return self._sa_block(src, mask, padding, is_causal)
        if type(self) is TransformerEncoderLayer and mask is padding is None and not is_causal:
            rows = packed.values.unsqueeze(0)
            result = encoder_layer(self, rows, None, None, False, packed.offsets)
            if result is not None:
                return _nested.unpack(result[0], packed)

        def attend(values: Tensor) -> Tensor:
            nested = _nested.unpack(values, packed)
            return _nested.values_of(self._sa_block(nested, mask, padding, is_causal))

        x = packed.values
        if self.norm_first:
            x = x + attend(self.norm1(x))
            x = x + self._ff_block(self.norm2(x))
        else:
            x = self.norm1(x + attend(x))
            x = self.norm2(x + self._ff_block(x))
        return _nested.unpack(x, packed)

    def _ff_block(self, x: Tensor) -> Tensor:
        result = feed_forward(self, x, self.dropout2)
        return super()._ff_block(x) if result is None else result


class TransformerEncoder(nn.TransformerEncoder):
    """A stack of encoder layers, a drop-in for `torch.nn.TransformerEncoder`.

    No mask's values are ever branched on, so that `torch.compile(fullgraph=True)` and
    `torch.export` take it. Consequences:

    - `is_causal=None` does not search `mask` for a causal one. The result is the same; pass
      `is_causal=True` to have hidden keys skipped.
    - In eval mode without gradients torch turns left-aligned padding into a nested tensor, which
      leaves 0 at padded positions (before the final norm). So does this module, under the same
      conditions, `enable_nested_tensor` and `mask_check` included, and under torch.compile as in
      eager mode. Whether the padding is left-aligned is computed, not branched on; `mask_check`
      set to False promises that it is.
    - Finite numbers in a float mask are added to the scores in eval mode as in training, where
      torch's C++ path takes them for a hard mask.
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor, mask_check)
        be_leaf(self)
        # The layers are copies, so the caller's own stays what it is; the norm is the caller's.
        _retag(self.layers)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Pass `src` through all layers and the final norm.

        Args:
            src, mask, src_key_padding_mask: as `TransformerEncoderLayer.forward` takes them.
            is_causal: promises that `mask` is the causal mask; None as False.

        Returns:
            A tensor of the shape of `src`.
        """
        if mask is not None or src_key_padding_mask is not None:
            ours = all(type(m).forward is TransformerEncoderLayer.forward for m in self.layers)
            mask, src_key_padding_mask = _checked_masks(
                src, mask, "mask", src_key_padding_mask, as_float=not ours
            )
        _check_rank(src, self.layers[0])
        if src.is_nested and _nested.has_holes(src):
            rest = (mask, src_key_padding_mask, is_causal)
            return _nested.around_holes(
                src, lambda full: TransformerEncoder.forward(self, full, *rest)
            )
        left_out = None
        if src_key_padding_mask is not None and self._leaves_out_padding(
            src, mask, src_key_padding_mask
        ):
            left_out = _positions_left_out(src_key_padding_mask, getattr(self, "mask_check", True))
            if not is_causal and all(type(m) is TransformerEncoderLayer for m in self.layers):
                packed = without_padding(self.layers, src, left_out.squeeze(-1))
                if packed is not None:
                    return packed if self.norm is None else self.norm(packed)
        output = src
        for layer in self.layers:
            output = layer(
                output,
                src_mask=mask,
                is_causal=is_causal is True,
                src_key_padding_mask=src_key_padding_mask,
            )
        if left_out is not None:
            output = output.masked_fill(left_out, 0.0)
        if self.norm is not None:
            output = self.norm(output)
        return output

    def _leaves_out_padding(self, src: Tensor, mask: Tensor | None, padding: Tensor) -> bool:
        """Whether torch would try to make a nested tensor of `src`."""
        first = self.layers[0]
        if first.training or mask is not None or src.is_nested or src.shape[:-1] != padding.shape:
            return False
        if not (getattr(self, "use_nested_tensor", False) and src.dim() == 3):
            return False
        if torch.is_autocast_enabled() or not torch.backends.mha.get_fastpath_enabled():
            return False
        return not torch.is_grad_enabled() or not (
            _requires_grad(src) or any(map(_requires_grad, first.parameters()))
        )


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Self-attention, attention to a memory and feed-forward, as `torch.nn`'s of the same name.

    Arguments, shapes, state_dict and initial weights are torch's. Every part is called, or what
    they come to computed in one call, so hooks and replaced parts always count; both attentions are
    :class:`MultiheadAttention`. Nested targets and memories work in training too.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        be_leaf(self)
        _retag(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Pass `tgt` through the layer; arguments and result as of `TransformerDecoder`."""
        # torch.fx can trace torch's layer, with something that is no tensor.
        if isinstance(tgt, Tensor) and tgt.is_nested and _nested.has_holes(tgt):
            rest = (
                memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                tgt_is_causal, memory_is_causal,
            )  # fmt: skip
            return _nested.around_holes(
                tgt, lambda full: TransformerDecoderLayer.forward(self, full, *rest)
            )
        if type(self) is TransformerDecoderLayer:
            result = decoder_layer(
                self, tgt, memory, (tgt_mask, memory_mask),
                (tgt_key_padding_mask, memory_key_padding_mask), (tgt_is_causal, memory_is_causal),
            )  # fmt: skip
            if result is not None:
                return result
        return super().forward(
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
            tgt_is_causal, memory_is_causal,
        )  # fmt: skip

    def _ff_block(self, x: Tensor) -> Tensor:
        result = feed_forward(self, x, self.dropout3)
        return super()._ff_block(x) if result is None else result


class TransformerDecoder(nn.TransformerDecoder):
    """A stack of decoder layers, a drop-in for `torch.nn.TransformerDecoder`.

    As in :class:`TransformerEncoder`, `tgt_is_causal=None` does not search `tgt_mask` for a causal
    one, and no mask's values are looked at.

    Beyond torch's, it decodes token by token, each at the cost of one::

        cache = decoder.new_cache(memory, capacity=200)
        hidden = decoder(prompt, None, cache=cache)
        while not done:
            hidden = decoder(embed(next_token(hidden)), None, cache=cache)
    """

    def __init__(
        self,
        decoder_layer: nn.TransformerDecoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__(decoder_layer, num_layers, norm)
        be_leaf(self)
        _retag(self.layers)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Pass `tgt` through all layers and the final norm.

        Args:
            tgt: (tgt_len, batch, d_model), (batch, tgt_len, d_model) if `batch_first`, or
                (tgt_len, d_model).
            memory: the same with src_len; None with a cache, which has it.
            tgt_mask, memory_mask: (tgt_len, tgt_len) and (tgt_len, src_len), or with
                batch * nhead in front: bool, True = must not attend, or float, added.
            tgt_key_padding_mask, memory_key_padding_mask: (batch, tgt_len) and (batch, src_len):
                bool, True = ignore, or float, added.
            tgt_is_causal, memory_is_causal: promise that the mask is the causal one; None as
                False.
            cache: from `new_cache`. `tgt` are the tokens behind those that it holds, and it takes
                them up. Each token sees those before it and itself: there are no masks but
                `tgt_key_padding_mask`, bool (batch, all tokens so far).

        Returns:
            A tensor of the shape of `tgt`.

        Raises:
            ValueError: a cache that is full or does not fit, beside a memory or a mask, or in a
                decoder whose parts are hooked or replaced, or drop out in training.
        """
        if cache is not None:
            given = (memory, tgt_mask, memory_mask, memory_key_padding_mask)
            if any(t is not None for t in given) or memory_is_causal:
                raise ValueError("with a cache, memory and masks but tgt_key_padding_mask are None")
            self._check_decodes()
            first: Any = self.layers[0]
            batch_first = first.self_attn.batch_first
            output = decode(self.layers, tgt, tgt_key_padding_mask, cache, batch_first)
            return output if self.norm is None else self.norm(output)
        _check_rank(tgt, self.layers[0])
        if tgt.is_nested and _nested.has_holes(tgt):
            rest = (
                memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                tgt_is_causal, memory_is_causal,
            )  # fmt: skip
            return _nested.around_holes(
                tgt, lambda full: TransformerDecoder.forward(self, full, *rest)
            )
        output = tgt
        for layer in self.layers:
            output = layer(
                output,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal is True,
                memory_is_causal=memory_is_causal,
            )
        if self.norm is not None:
            output = self.norm(output)
        return output

    def new_cache(
        self, memory: Tensor, capacity: int, memory_key_padding_mask: Tensor | None = None
    ) -> DecoderCache:
        """What `forward` needs to decode `capacity` tokens one after the other, with the keys and
        values of `memory` in it.

        Args:
            memory: as of `forward`, with a batch dimension.
            capacity: how many tokens there may be.
            memory_key_padding_mask: bool (batch, src_len), True = ignore.

        Raises:
            TypeError, ValueError: arguments that are not as above, or a decoder with parts that are
                hooked or replaced, or drop out in training.
        """
        self._check_decodes()
        first: Any = self.layers[0]
        batch_first = first.self_attn.batch_first
        return make_cache(self.layers, memory, capacity, memory_key_padding_mask, batch_first)

    def _check_decodes(self) -> None:
        if len(self.layers) == 0 or any(
            type(m) is not TransformerDecoderLayer for m in self.layers
        ):
            raise ValueError(
                "a decoder with a cache must be of fastfusion.nn.TransformerDecoderLayer"
            )


class Transformer(nn.Transformer):
    """Encoder and decoder, a drop-in for `torch.nn.Transformer`.

    Arguments, shapes, state_dict and initial weights are torch's. A `custom_encoder` or
    `custom_decoder` stays the object that was passed.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout,
            activation, custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first,
            bias, device, dtype,
        )  # fmt: skip
        be_leaf(self)
        if custom_encoder is None:
            _retag(self.encoder)
        if custom_decoder is None:
            _retag(self.decoder)


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerDecoder: TransformerDecoder,
    nn.Transformer: Transformer,
}


def _retag(module: nn.Module) -> nn.Module:
    """Give `module` and its parts our class where theirs is exactly torch's; return `module`.

    Nothing is rebuilt: parameters, buffers, hooks and the random state stay as they are.
    """
    for part in module.modules():
        ours = REPLACEMENTS.get(type(part))
        if ours is None:
            continue
        part.__class__ = ours
        settle_in(part)
    return module


def _check_rank(src: Tensor, layer: Any) -> None:
    """torch's stacks read the length before a layer sees the input: their IndexError."""
    if not src.is_nested and src.dim() < 2:
        _get_seq_len(src, layer.self_attn.batch_first)


def _checked_masks(
    src: Tensor, mask: Tensor | None, name: str, padding: Tensor | None, *, as_float: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The masks, if they are bool or float; torch's error otherwise.

    torch makes both of them float here. Ours stay bool, which a fused kernel can skip by;
    `as_float` is for parts of other people's that may rely on it.
    """
    legal = all(
        m is None or (isinstance(m, Tensor) and (m.dtype == torch.bool or m.is_floating_point()))
        for m in (mask, padding)
    )
    if legal and not as_float:
        return mask, padding
    padding = F._canonical_mask(
        mask=padding,
        mask_name="src_key_padding_mask",
        other_type=F._none_or_dtype(mask),
        other_name=name,
        target_type=src.dtype,
    )
    mask = F._canonical_mask(
        mask=mask,
        mask_name=name,
        other_type=None,
        other_name="",
        target_type=src.dtype,
        check_other=False,
    )
    return mask, padding


def _requires_grad(tensor: Tensor) -> bool:
    """Whether this tensor or one that vmap batches in it, which it does not say, does."""
    if not torch.compiler.is_compiling():  # which cannot trace this question
        while not tensor.requires_grad and is_functorch_wrapped_tensor(tensor):
            tensor = get_unwrapped(tensor)
    return tensor.requires_grad


def _positions_left_out(padding: Tensor, check: bool) -> Tensor:
    """Where torch's nested tensor of a batch with this padding mask would have no rows.

    Returns:
        bool (batch, length, 1), all False where `check` is set and the padding of any sequence
        is not at its end.
    """
    left_out = padding if padding.dtype == torch.bool else padding == -math.inf
    if check:
        left_out = left_out & (left_out[:, 1:] >= left_out[:, :-1]).all()
    return left_out[..., None]
