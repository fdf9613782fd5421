"""Whole Transformer layers of the modules by ops of one call each: eager inference on a CPU.

As with linear layers (_linear.py), anything that calling a part does beside its formula leaves the
call to the parts.
"""

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from fastfusion.backends import cpu
from fastfusion.core.arguments import PLAIN
from fastfusion.core.op import forced_backend
from fastfusion.nn._linear import is_linear, weights_of
from fastfusion.nn._multihead import MultiheadAttention, stay_visible
from fastfusion.nn._plain import activation_name, does_nothing, has_global_hooks, is_bare
from fastfusion.ops import encoder_layer as _encoder
from fastfusion.ops import linear as _linear

_any_autocast = torch._C._is_any_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled


def encoder_layer(
    module: Any, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
) -> Tensor | None:
    """`TransformerEncoderLayer.forward`, or None where it may mean more than its formula.

    Args:
        src: whatever the module was given.
        mask, padding: bool (True = hidden), or float.
        is_causal: whether the mask is promised to be the causal one.
    """
    if not _runs_on_cpu(src):
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
    projections = _self_attention(attention)
    if activation is None or projections is None or has_global_hooks():
        return None
    if not (is_linear(first) and is_linear(second) and all(map(does_nothing, dropouts))):
        return None
    operands = (*projections, weights_of(first), weights_of(second))
    masks = _masks(attention, src, mask, padding, is_causal)
    if masks is None or not all(map(_is_norm, norms)):
        return None
    tensors: list[Any] = [src]
    scales = []
    for given in operands:
        if given is None:
            return None
        weight, scale, bias = given
        tensors += (weight, bias)
        scales.append(scale)
    for norm in norms:
        parameters = norm.__dict__["_parameters"]
        tensors += (parameters["weight"], parameters["bias"])
    attn_mask, key_padding_mask, is_causal = masks
    numbers = (
        attention.__dict__["num_heads"], _linear.NUMBERS[activation], own["norm_first"], is_causal,
        norms[0].__dict__["eps"], norms[1].__dict__["eps"],
    )  # fmt: skip
    call = _encoder.Call._make((*tensors, attn_mask, key_padding_mask, *scales, *numbers))
    if not _are_plain(call):
        return None
    result: Tensor | None = _encoder.OP.attempt(None, call, False)
    return result


def _runs_on_cpu(x: Any) -> bool:
    """Whether the CPU kernels are what runs a layer of this input, for nobody to watch."""
    return (
        type(x) in PLAIN
        and not torch.compiler.is_compiling()
        and x.is_cpu
        and x.dim() == 3
        and x.dtype in cpu.DTYPES
        and cpu.unavailable() is None
        and forced_backend() in (None, "cpu")
        and not _any_autocast()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def _are_plain(call: Any) -> bool:
    """Whether the tensors of a call are no more than their numbers, and nobody wants a gradient."""
    tensors = [t for t in call[: _encoder.DEFINITION.tensors] if t is not None]
    return (
        PLAIN.issuperset(map(type, tensors))
        and not any([t.is_neg() for t in tensors])
        and not (_is_grad_enabled() and any([t.requires_grad for t in tensors]))
    )


def _self_attention(module: Any) -> tuple[Any, Any] | None:
    """Weight, scale and bias of in_proj and of out_proj of a self-attention that comes to its
    formula."""
    if type(module) is not MultiheadAttention:
        return None
    own = module.__dict__
    parts, hooks = own["_modules"], own["_forward_pre_hooks"]
    if [*hooks.values()] != [stay_visible] or not is_bare(module, pre_hooks=len(hooks)):
        return None
    if (
        own.get("_recorders")
        or not (own["batch_first"] and own["_qkv_same_embed_dim"])
        or own["add_zero_attn"]
        or (own["training"] and own["dropout"] > 0.0)
    ):
        return None
    parameters = own["_parameters"]
    if parameters.get("bias_k") is not None or parameters.get("bias_v") is not None:
        return None
    output, inside = parts["out_proj"], parts.get("in_proj")
    if not is_linear(output) or not (inside is None or is_linear(inside)):
        return None
    if inside is not None:
        return weights_of(inside), weights_of(output)
    weight = parameters.get("in_proj_weight")
    if weight is None:  # parametrized
        return None
    return (weight, None, parameters.get("in_proj_bias")), weights_of(output)


def _is_norm(module: Any) -> bool:
    own = module.__dict__
    return type(module) is nn.LayerNorm and len(own["normalized_shape"]) == 1 and is_bare(module)


def _masks(
    attention: Any, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
) -> tuple[Tensor | None, Tensor | None, bool] | None:
    """attn_mask, key_padding_mask and is_causal of the op; None where torch has more to say."""
    if mask is None and padding is None:
        return None if is_causal else (None, None, False)
    batch, length, _ = src.shape
    if padding is not None and not (
        padding.dtype == torch.bool and padding.shape == (batch, length)
    ):
        return None
    if mask is None:
        return None if is_causal else (None, padding, False)
    shape = mask.shape
    if not (mask.dtype == torch.bool or mask.dtype == src.dtype):
        return None
    if shape == (length, length):
        # Alone, the hint stands for the mask, as in torch.
        if is_causal and padding is None:
            return None, None, True
    elif shape == (batch * attention.__dict__["num_heads"], length, length):
        mask = mask.unflatten(0, (batch, -1))
        if is_causal and padding is None:
            return None, None, True
    else:
        return None
    return ~mask if mask.dtype == torch.bool else mask, padding, False
