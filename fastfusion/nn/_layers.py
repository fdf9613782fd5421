"""Whole Transformer layers of the modules by ops of one call each: eager inference on a CPU.

As with linear layers (_linear.py), anything that calling a part does beside its formula leaves the
call to the parts. All of a layer is looked at together: part by part it took 10 us, of the 25 of a
call of 4 tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion.core.arguments import PLAIN
from fastfusion.nn._linear import LINEAR, runs_on_cpu, weights_of
from fastfusion.nn._multihead import MultiheadAttention, stay_visible
from fastfusion.nn._plain import activation_name, are_bare, has_global_hooks
from fastfusion.nn._quantized import Operands
from fastfusion.ops import encoder_layer as _encoder
from fastfusion.ops import linear as _linear

_is_grad_enabled = torch.is_grad_enabled
_VISIBLE = [stay_visible]
TOGETHER: Operands = (None, None, None)  # type: ignore[assignment]


def encoder_layer(
    module: Any, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
) -> Tensor | None:
    """`TransformerEncoderLayer.forward`, or None where it may mean more than its formula.

    Args:
        src: whatever the module was given.
        mask, padding: bool (True = hidden), or float.
        is_causal: whether the mask is promised to be the causal one.
    """
    if not runs_on_cpu(src):
        return None
    own = module.__dict__
    parts = own["_modules"]
    try:
        attention, first, second = parts["self_attn"], parts["linear1"], parts["linear2"]
        norms = parts["norm1"], parts["norm2"]
        dropouts = parts["dropout"], parts["dropout1"], parts["dropout2"]
    except KeyError:
        return None
    activation = activation_name(module.activation)
    found = self_attention(attention)
    if activation is None or found is None:
        return None
    inside, in_proj, out_proj = found
    if not are_bare((first, second, *norms, *dropouts, *inside)) or has_global_hooks():
        return None
    for dropout in dropouts:
        drops = dropout.__dict__
        if type(dropout) is not nn.Dropout or (drops["training"] and drops["p"] > 0.0):
            return None
    masks = _masks(attention, src, mask, padding, is_causal)
    if masks is None or type(first) not in LINEAR or type(second) not in LINEAR:
        return None
    products = (in_proj, TOGETHER, TOGETHER, out_proj, weights_of(first), weights_of(second))
    heads, is_first = attention.__dict__["num_heads"], own["norm_first"]
    return run_encoder_layer(src, products, norms, heads, activation, is_first, *masks)


def run_encoder_layer(
    src: Tensor,
    products: Sequence[Operands | None],
    norms: Sequence[Any],
    num_heads: int,
    activation: str,
    norm_first: bool,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> Tensor | None:
    """The op on the parts of a layer, which have been found to come to their formulas, for an
    input that `runs_on_cpu`; None where it does not take them, or gradients are asked for.

    Args:
        src: (batch, length, width).
        products: what `weights_of` says of in_proj, k_proj, v_proj (`TOGETHER` where in_proj is all
            three), out_proj, linear1 and linear2.
        norms: modules.
        activation: as of the op.
        attn_mask, key_padding_mask, is_causal: as of the op.
    """
    tensors: list[Any] = [src]
    scales = []
    for given in products:
        if given is None:
            return None
        weight, scale, bias = given
        tensors += (weight, bias)
        scales.append(scale)
    for norm in norms:
        if type(norm) is not nn.LayerNorm or len(norm.__dict__["normalized_shape"]) != 1:
            return None
        parameters = norm.__dict__["_parameters"]
        tensors += (parameters["weight"], parameters["bias"])
    tensors += (attn_mask, key_padding_mask, *scales)
    if not PLAIN.issuperset(map(type, tensors)):
        return None
    if _is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
        return None
    numbers = (
        num_heads, _linear.NUMBERS[activation], norm_first, is_causal,
        *(norm.__dict__["eps"] for norm in norms),
    )  # fmt: skip
    try:
        result: Tensor | None = _encoder.OP.fuse(_encoder.Call._make((*tensors, *numbers)))
    except RuntimeError:
        return None  # what does not fit is for the parts to say
    return result


def self_attention(module: Any, batch_first: bool = True) -> tuple[Any, Any, Any] | None:
    """The parts of a self-attention, and weight, scale and bias of in_proj and of out_proj; None
    of one that does more than its formula without its parts, or has its batches elsewhere."""
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
        or own["batch_first"] != batch_first
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
    attention: Any, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
) -> tuple[Tensor | None, Tensor | None, bool] | None:
    """attn_mask, key_padding_mask and is_causal of the op; None where torch has more to say."""
    if mask is None:
        if is_causal:
            return None
        if padding is None:
            return None, None, False
    batch, length, _ = src.shape
    if padding is not None and not (
        padding.dtype == torch.bool and padding.shape == (batch, length)
    ):
        return None
    if mask is None:
        return None, padding, False
    if not (mask.dtype == torch.bool or mask.dtype == src.dtype):
        return None
    per_head = mask.shape == (batch * attention.__dict__["num_heads"], length, length)
    if not per_head and mask.shape != (length, length):
        return None
    if is_causal and padding is None:  # alone, the hint stands for the mask, as in torch
        return None, None, True
    if per_head:
        mask = mask.unflatten(0, (batch, -1))
    return ~mask if mask.dtype == torch.bool else mask, padding, False
