"""Steps that layers are made of, each by a kernel where that is what calling its modules comes to.

For layers that no op computes whole. A step calls the modules it is given where they do more than
their formulas (a hook, an adapter, a gradient, compiled code, another device), so that all that a
layer has to ask for itself is whether the modules around them may be passed over: `passes`.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from fastfusion.core.arguments import PLAIN
from fastfusion.integrations.transformers._activations import activation_of
from fastfusion.integrations.transformers._interface import are_idle
from fastfusion.nn._linear import LINEAR, large_weights_of, runs, runs_on_cpu, weights_of
from fastfusion.nn._plain import activation_name as _plain_name
from fastfusion.nn._plain import has_global_hooks, is_bare, is_idle
from fastfusion.nn._quantized import QuantizedLinear
from fastfusion.ops.linear import linear as _linear
from fastfusion.ops.norm import norm as _norm
from fastfusion.ops.scaled_dot_product_attention import scaled_dot_product_attention

_is_compiling = torch.compiler.is_compiling
_tracing = torch._C._get_tracing_state
_HOOKS = ("_forward_pre_hooks", "_backward_pre_hooks", "_backward_hooks")


def passes(
    layer: nn.Module, inputs: Iterable[Any], around: Iterable[Any], dropouts: Iterable[Any] = ()
) -> bool:
    """Whether the steps of a layer, on these inputs, come to the layer.

    Args:
        layer: the layer itself.
        inputs: tensors that it was given, or None.
        around: modules whose parts are called in their place.
        dropouts: modules that steps leave out, or probabilities.
    """
    if _is_compiling() or _tracing() is not None:
        return False
    tensors = [t for t in inputs if t is not None]
    if not PLAIN.issuperset(map(type, tensors)):
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if has_global_hooks() or not all(map(is_quiet, around)):
        return False
    if not all(
        is_idle(dropout)
        if isinstance(dropout, nn.Module)
        else not (layer.training and dropout > 0.0)
        for dropout in dropouts
    ):
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(t.requires_grad for t in (*tensors, *layer.parameters()))


def is_added(mask: Any) -> bool:
    """Whether a mask is none, or float: what eager code adds to its scores. It adds a bool one,
    too, as 0 and 1, which is left to it."""
    return mask is None or (isinstance(mask, Tensor) and mask.is_floating_point())


def is_quiet(module: Any) -> bool:
    """Whether calling a module runs the forward of its class and nothing else that matters now."""
    own = module.__dict__
    if any(own[name] for name in _HOOKS) or "forward" in own:
        return False
    return not own["_forward_hooks"] or are_idle(own["_forward_hooks"])


def linear(
    module: Any, x: Tensor, activation: Any = None, residual: Tensor | None = None
) -> Tensor:
    """activation(module(x)) + residual."""
    name = None if activation is None else activation_name(activation)
    own = large_weights_of(module)
    if (
        own is not None
        and (activation is None or name is not None)
        and type(module) in LINEAR
        and is_bare(module)
        and runs(x, *own)
        and (residual is None or (type(residual) in PLAIN and residual.dtype == x.dtype))
    ):
        weight, scale, bias = own
        return _linear(x, weight, bias, weight_scale=scale, activation=name, residual=residual)
    result: Tensor = module(x)
    if activation is not None:
        result = activation(result)
    return result if residual is None else result + residual


def is_known(module: Any, x: Tensor) -> bool:
    """Whether calling a linear layer comes to a product with what `weight_and_bias` says."""
    own = weights_of(module)
    return own is not None and type(module) in LINEAR and is_bare(module) and runs(x, *own)


def weight_type(module: Any) -> torch.dtype:
    """Of such a layer; uint8 of a packed one."""
    own = weights_of(module)
    assert own is not None
    return own[0].dtype


def weight_and_bias(module: Any) -> tuple[Tensor, Tensor | None]:
    """Of such a layer, in the dtype of its input."""
    if isinstance(module, QuantizedLinear):
        return module.dequantize(), module.bias
    return module.weight, module.bias


def norm(module: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """module(x + residual), of a LayerNorm."""
    own = module.__dict__
    if (
        type(module) is nn.LayerNorm
        and len(own["normalized_shape"]) == 1
        and is_bare(module)
        and runs_on_cpu(x)
        and not torch.is_grad_enabled()
    ):
        parameters = own["_parameters"]
        weight, bias = parameters["weight"], parameters["bias"]
        given = [t for t in (weight, bias, residual) if t is not None]
        if PLAIN.issuperset(map(type, given)) and all([t.dtype == x.dtype for t in given]):
            return _norm(x, weight, bias, residual=residual, eps=own["eps"])
    result: Tensor = module(x if residual is None else x + residual)
    return result


def heads(x: Tensor, count: int) -> Tensor:
    """(batch, length, count * dim) as (batch, count, length, dim)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Attention of heads (batch, heads, length, dim), with the heads side by side again."""
    out = scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


def activation_name(activation: Any) -> str | None:
    """The kernels' name for an activation; None of others, and of one that does more than its
    formula."""
    if not isinstance(activation, nn.Module):
        return _plain_name(activation)
    return activation_of(activation) if is_bare(activation) else None
