"""Whole Transformer layers of the modules by ops of one call each: eager inference on a CPU.

As with linear layers (_linear.py), anything that calling a part does beside its formula leaves the
call to the parts. All of a layer is looked at together: part by part it took 10 us, of the 25 of a
call of 4 tokens. Decoding with a cache is for the op alone: torch's modules have no such call.
"""

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion.core.arguments import autocast_dtype
from fastfusion.core.layers import Norm
from fastfusion.nn._linear import LINEAR, fused, runs_on_cpu, weights_of
from fastfusion.nn._multihead import MultiheadAttention, stay_visible
from fastfusion.nn._plain import activation_name, are_bare, has_global_hooks, is_layer_norm
from fastfusion.nn._quantized import Operands, part
from fastfusion.ops import decoder_layer as _decoder
from fastfusion.ops import encoder_layer as _encoder
from fastfusion.ops import linear as _linear
from fastfusion.ops._parts import AttentionWeights, FeedForwardWeights, attention_dtype
from fastfusion.ops._parts import project_memory as _project_memory

_VISIBLE = [stay_visible]
TOGETHER: Any = (None, None, None)  # key and value, projected together with the query or before


def encoder_layer(
    module: Any,
    src: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
    offsets: Tensor | None = None,
) -> Tensor | None:
    """`TransformerEncoderLayer.forward`, or None where it may mean more than its formula.

    Args:
        src: whatever the module was given.
        mask, padding: bool (True = hidden), or float.
        is_causal: whether the mask is promised to be the causal one.
        offsets: `cu_seqlens` of the op, of sequences in a batch of 1.
    """
    if not runs_on_cpu(src):
        return None
    layer = _plain_layer(module, _ENCODER_PARTS)
    if layer is None or not (layer[1] or offsets is not None):
        return None
    heads, _, activation, products, norms, epsilons = layer
    masks = _masks(heads, src, src.shape[1], mask, padding, is_causal)
    if masks is None:
        return None
    attn_mask, key_padding_mask, is_causal = masks
    (w, s, b), (w_out, s_out, b_out), (w1, s1, b1), (w2, s2, b2) = products
    tensors = [
        src, w, b, None, None, None, None, w_out, b_out, w1, b1, w2, b2, *norms, attn_mask,
        key_padding_mask, s, None, None, s_out, s1, s2,
    ]  # fmt: skip
    numbers = (heads, activation, module.norm_first, is_causal, *epsilons, offsets)
    return fused(_encoder, tensors, numbers)


def without_padding(layers: Any, src: Tensor, left_out: Tensor) -> Tensor | None:
    """What `TransformerEncoderLayer`s make of a batch in which padded tokens are 0 in the end and
    nothing to others before: of the tokens that are left, packed. None where none is left out, or
    a layer may mean more than its formula.

    Args:
        layers: a ModuleList.
        src: (batch, length, width), whatever the module was given.
        left_out: bool (batch, length).
    """
    if not runs_on_cpu(src) or type(left_out) is not Tensor or not are_bare(layers):
        return None
    kept = ~left_out
    if bool(kept.all()):
        return None
    offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    rows = src[kept].unsqueeze(0)
    for layer in layers:
        result = encoder_layer(layer, rows, None, None, False, offsets)
        if result is None:
            return None
        rows = result
    output = torch.zeros_like(src)
    output[kept] = rows[0]
    return output


def decoder_layer(
    module: Any,
    tgt: Tensor,
    memory: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    paddings: tuple[Tensor | None, Tensor | None],
    are_causal: tuple[bool, bool],
) -> Tensor | None:
    """`TransformerDecoderLayer.forward` likewise; pairs are of the target and of the memory."""
    if not (runs_on_cpu(tgt) and runs_on_cpu(memory) and memory.shape[0] == tgt.shape[0]):
        return None
    layer = _plain_layer(module, _DECODER_PARTS)
    if layer is None or not layer[1]:
        return None
    heads, _, activation, products, norms, epsilons = layer
    own = _masks(heads, tgt, tgt.shape[1], masks[0], paddings[0], are_causal[0])
    others = _masks(heads, tgt, memory.shape[1], masks[1], paddings[1], False)
    if own is None or others is None or are_causal[1]:
        return None
    (w, s, b), (w_out, s_out, b_out), cross, (cw, cs, cb), (w1, s1, b1), (w2, s2, b2) = products
    query, key, value = (part(cross, i, i + 1, tgt.shape[2]) for i in range(3))
    tensors = [
        tgt, w, b, None, None, None, None, w_out, b_out, query[0], query[2], key[0], key[2],
        value[0], value[2], cw, cb, w1, b1, w2, b2, *norms, memory, None, None, others[0], own[0],
        own[1], others[1], s, None, None, s_out, query[1], key[1], value[1], cs, s1, s2, None, None,
    ]  # fmt: skip
    numbers = (heads, 0, activation, module.norm_first, own[2], *epsilons)
    return fused(_decoder, tensors, numbers)


def cached_decoder_layer(
    module: Any,
    tgt: Tensor,
    memory: tuple[Tensor, Tensor],
    memory_padding: Tensor | None,
    cache: tuple[Tensor, Tensor],
    past_length: int,
    padding: Tensor | None,
) -> Tensor:
    """What `decoder_layer` of the op does with the weights of a `TransformerDecoderLayer`.

    Raises:
        ValueError: a layer whose parts mean more than their formulas.
    """
    layer = _plain_layer(module, _DECODER_PARTS)
    if layer is None:
        raise ValueError(
            "a layer cannot decode with a cache: a part of it is hooked or replaced, drops out in "
            "training, or has another activation than relu and gelu"
        )
    heads, _, activation, products, of_norms, epsilons = layer
    in_proj, out_proj, cross, cross_out, first, second = products
    query = part(cross, 0, 1, tgt.shape[2])
    (w, s, b), (w_out, s_out, b_out), (cw, cs, cb), (w1, s1, b1), (w2, s2, b2) = (
        in_proj, out_proj, cross_out, first, second,
    )  # fmt: skip
    tensors = [
        tgt, w, b, None, None, None, None, w_out, b_out, query[0], query[2], None, None, None, None,
        cw, cb, w1, b1, w2, b2, *of_norms, None, *memory, None, None, padding, memory_padding, s,
        None, None, s_out, query[1], None, None, cs, s1, s2, *cache,
    ]  # fmt: skip
    numbers = (heads, past_length, activation, module.norm_first, True, *epsilons)
    result: Tensor | None
    result = _decoder.OP.attempt(None, _decoder.Call._make((*tensors, *numbers)), False)
    if result is not None:
        return result
    norms = zip(of_norms[::2], of_norms[1::2], epsilons, strict=True)
    return _decoder.decoder_layer(
        tgt, _weights(in_proj, out_proj),
        FeedForwardWeights(first[0], first[2], second[0], second[2], first[1], second[1]),
        tuple(Norm(*norm) for norm in norms), heads, memory=memory,
        cross_attn=_weights(query, cross_out), activation=activation_name(module.activation),
        norm_first=module.norm_first, is_causal=True, key_padding_mask=padding,
        memory_padding_mask=memory_padding, cache=cache, past_length=past_length,
    )  # fmt: skip


def project_memory(module: Any, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, heads, memory_len, head_dim) of a `TransformerDecoderLayer`'s memory.

    Raises:
        ValueError: as of `cached_decoder_layer`.
    """
    found = attention_parts(module.multihead_attn)
    if found is None or found[1] is None or found[2] is None:
        raise ValueError("multihead_attn is replaced or hooked, or drops out in training")
    heads: int = module.multihead_attn.num_heads
    return _project_memory(memory, _weights(found[1], found[2]), heads)


def attention_dtype_of(module: Any, x: Tensor) -> torch.dtype:
    """Of the self-attention of a `TransformerDecoderLayer` that can decode, of tokens like `x`."""
    cast = autocast_dtype(x.device.type)
    found = attention_parts(module.self_attn)
    if cast is not None or found is None or found[1] is None:
        return cast or x.dtype
    return attention_dtype(x, found[1][0])


def _weights(in_proj: Operands, out_proj: Operands) -> AttentionWeights:
    return AttentionWeights(
        in_proj[0], in_proj[2], out_proj[0], out_proj[2], in_proj_scale=in_proj[1],
        out_proj_scale=out_proj[1],
    )  # fmt: skip


def run_encoder_layer(
    src: Tensor,
    products: Sequence[Operands | None],
    norms: Iterable[Any],
    num_heads: int,
    activation: str,
    norm_first: bool,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> Tensor | None:
    """The op on the parts of a layer of any library, which have been found to come to their
    formulas, for an input that `runs_on_cpu`; None where it does not take them, or gradients are
    asked for.

    Args:
        src: (batch, length, width).
        products: what `weights_of` says of in_proj, k_proj, v_proj (`TOGETHER` where in_proj is all
            three), out_proj, linear1 and linear2.
        norms: modules.
        activation: as of the op.
        attn_mask, key_padding_mask, is_causal: as of the op.
    """
    found = _norms(norms)
    if found is None or not all(products):
        return None
    tensors, scales = _in_a_row(products)  # type: ignore[arg-type]
    tensors = [src, *tensors, *found[0], attn_mask, key_padding_mask, *scales]
    numbers = (num_heads, _linear.NUMBERS[activation], norm_first, is_causal, *found[1], None)
    return fused(_encoder, tensors, numbers)


def run_decoder_layer(
    tgt: Tensor,
    products: Sequence[Operands | None],
    norms: Sequence[Any],
    num_heads: int,
    activation: str,
    norm_first: bool,
    memory: tuple[Tensor, Tensor],
    memory_masks: tuple[Tensor | None, Tensor | None],
    attn_mask: Tensor | None,
    is_causal: bool,
    cache: tuple[Tensor, Tensor],
    past_length: int,
) -> Tensor | None:
    """Likewise, of a decoder layer with its keys and values in a cache and those of its memory
    projected.

    Args:
        tgt: (batch, length, width).
        products: of in_proj, k_proj, v_proj, out_proj, of the query and the output of attention to
            the memory, of linear1 and linear2.
        memory, cache, past_length, attn_mask, is_causal: as of the op.
        memory_masks: memory_mask and memory_padding_mask.
    """
    found = _norms(norms)
    if found is None or not all(products):
        return None
    given = (*products[:5], TOGETHER, TOGETHER, *products[5:])
    tensors, scales = _in_a_row(given)
    mask, padding = memory_masks
    tensors = [
        tgt, *tensors, *found[0], None, *memory, mask, attn_mask, None, padding, *scales, *cache
    ]  # fmt: skip
    number = _linear.NUMBERS[activation]
    numbers = (num_heads, past_length, number, norm_first, is_causal, *found[1])
    return fused(_decoder, tensors, numbers)


class _Parts:
    """The names of a layer's attentions, norms and dropouts, beside linear1 and linear2."""

    def __init__(self, attentions: Sequence[str], norms: Sequence[str], dropouts: Sequence[str]):
        names = (*attentions, *norms, *dropouts, "linear1", "linear2")
        self.all_of: Callable[[Any], tuple[Any, ...]] = itemgetter(*names)
        self.attentions, self.norms = len(attentions), len(attentions) + len(norms)


_ENCODER_PARTS = _Parts(["self_attn"], ["norm1", "norm2"], ["dropout", "dropout1", "dropout2"])
_DECODER_PARTS = _Parts(
    ["self_attn", "multihead_attn"], ["norm1", "norm2", "norm3"],
    ["dropout", "dropout1", "dropout2", "dropout3"],
)  # fmt: skip

# Of a layer whose parts come to their formulas: number of heads, whether batches are first, number
# of the activation in a call; operands of in_proj and out_proj of each attention and of linear1 and
# linear2; weight and bias of each norm; and their epsilons. A tuple,
# because it is made for every call.
_Layer = tuple[int, bool, int, list[Any], list[Any], list[float]]


def _plain_layer(module: Any, parts: _Parts) -> _Layer | None:
    try:
        found = parts.all_of(module.__dict__["_modules"])
    except KeyError:
        return None
    activation = activation_name(module.activation)
    if activation is None:
        return None
    heads, batch_first = 0, True
    products: list[Any] = []
    inside = found[parts.attentions :]
    for attention in found[: parts.attentions]:
        of_attention = attention_parts(attention)
        if of_attention is None:
            return None
        own = attention.__dict__
        heads, batch_first = own["num_heads"], batch_first and own["batch_first"]
        inside += of_attention[0]
        products += of_attention[1:]
    if not are_bare(inside) or has_global_hooks():
        return None
    first, second = found[-2:]
    if type(first) not in LINEAR or type(second) not in LINEAR:
        return None
    products += (weights_of(first), weights_of(second))
    if not all(products):
        return None
    norms = _norms(found[parts.attentions : parts.norms])
    if norms is None:
        return None
    for dropout in found[parts.norms : -2]:
        own = dropout.__dict__
        if type(dropout) is not nn.Dropout or (own["training"] and own["p"] > 0.0):
            return None
    return heads, batch_first, _linear.NUMBERS[activation], products, *norms


def _norms(modules: Iterable[Any]) -> tuple[list[Tensor | None], list[float]] | None:
    """Weights and biases in turn, and what is added to the variances; None of other norms."""
    tensors: list[Tensor | None] = []
    epsilons = []
    for norm in modules:
        if not is_layer_norm(norm):
            return None
        own = norm.__dict__
        parameters = own["_parameters"]
        tensors += (parameters["weight"], parameters["bias"])
        epsilons.append(own["eps"])
    return tensors, epsilons


def _in_a_row(products: Iterable[Operands]) -> tuple[list[Any], list[Any]]:
    """Weights and biases in turn, and the scales."""
    tensors: list[Any] = []
    scales = []
    for weight, scale, bias in products:
        tensors += (weight, bias)
        scales.append(scale)
    return tensors, scales


def attention_parts(module: Any) -> tuple[tuple[Any, ...], Any, Any] | None:
    """The parts of an attention of one width, and weight, scale and bias of in_proj and
    of out_proj; None of one that does more than its formula without its parts."""
    if type(module) is not MultiheadAttention:
        return None
    own = module.__dict__
    if (
        [*own["_forward_pre_hooks"].values()] != _VISIBLE
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
        or own.get("_recorders")
        or not own["_qkv_same_embed_dim"]
        or own["add_zero_attn"]
        or (own["training"] and own["dropout"] > 0.0)
    ):
        return None
    parameters, parts = own["_parameters"], own["_modules"]
    if parameters.get("bias_k") is not None or parameters.get("bias_v") is not None:
        return None
    output = parts["out_proj"]
    if type(output) not in LINEAR:
        return None
    if "in_proj" in parts:
        whole = parts["in_proj"]
        return (output, whole), weights_of(whole), weights_of(output)
    weight = parameters.get("in_proj_weight")
    if weight is None:  # parametrized
        return None
    return (output,), (weight, None, parameters["in_proj_bias"]), weights_of(output)


def _masks(
    heads: int,
    query: Tensor,
    kv_len: int,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
) -> tuple[Tensor | None, Tensor | None, bool] | None:
    """attn_mask, key_padding_mask and is_causal of the op; None where torch has more to say."""
    if mask is None:
        if is_causal:
            return None
        if padding is None:
            return None, None, False
    batch, length, _ = query.shape
    if padding is not None and not (
        padding.dtype == torch.bool and padding.shape == (batch, kv_len)
    ):
        return None
    if mask is None:
        return None, padding, False
    if not (mask.dtype == torch.bool or mask.dtype == query.dtype):
        return None
    per_head = mask.shape == (batch * heads, length, kv_len)
    if not per_head and mask.shape != (length, kv_len):
        return None
    if is_causal and padding is None:  # alone, the hint stands for the mask, as in torch
        return None, None, True
    if per_head:
        mask = mask.unflatten(0, (batch, -1))
    return ~mask if mask.dtype == torch.bool else mask, padding, False
