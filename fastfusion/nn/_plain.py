"""Whether calling modules comes to their formulas: no hooks, no other forward, nothing watching.

Attributes come from dictionaries: 19 us for a fusion layer, 44 through nn.Module's getattr.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext

from fastfusion._info import Watching
from fastfusion.core import arguments
from fastfusion.nn._quantized import Operands, QuantizedLinear
from fastfusion.ops._parts import attention_dtype

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# torch fills these and never replaces them.
_GLOBAL_HOOKS: list[dict[int, Any]] = [getattr(torch_module, f"_global{name}") for name in _HOOKS]
ACTIVATION_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu"}
# Classes of other libraries whose layers are torch's layer norm, and whether this one is.
LAYER_NORMS: dict[type, Callable[[Any], bool]] = {nn.LayerNorm: lambda module: True}
_PLAIN_TENSORS = (Tensor, nn.Parameter)
# torch.set_default_device, and `explain`, which describes what runs without it.
_HARMLESS_MODES = (DeviceContext, Watching)


def has_global_hooks() -> bool:
    """Whether torch calls something for every module."""
    return any(_GLOBAL_HOOKS)


def is_bare(module: Any) -> bool:
    """Whether calling this module runs the forward of its class and nothing else."""
    return are_bare((module,))


def are_bare(modules: Iterable[Any]) -> bool:
    """Whether that holds for all of them."""
    for module in modules:
        own = module.__dict__
        if (
            own["_forward_pre_hooks"]
            or own["_forward_hooks"]
            or own["_backward_pre_hooks"]
            or own["_backward_hooks"]
            or "forward" in own
        ):
            return False
    return True


def does_nothing(dropout: Any) -> bool:
    """Whether this is a dropout that changes and shows nothing."""
    own = dropout.__dict__
    return (
        type(dropout) is nn.Dropout
        and not (own["training"] and own["p"] > 0.0)
        and is_bare(dropout)
    )


def is_idle(module: Any) -> bool:
    """Whether calling this module gives its input and shows it to nobody."""
    return does_nothing(module) or (type(module) is nn.Identity and is_bare(module))


def is_plain_call(
    inputs: tuple[Tensor, ...], modules: Iterable[Any], attn_mask: Tensor | None
) -> bool:
    """Whether calling these modules on plain tensors, in eager mode and with this mask, comes to
    nothing but their formulas.

    Any circumstance in which a kernel in their place would skip something that a user may count on
    says no: a gradient, dropout, a hook, another class of module, autocast, a transform, a mode.
    """
    if (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or arguments.autocast_dtype(inputs[0].device.type) is not None
        or has_global_hooks()
    ):
        return False
    if torch._C._len_torch_function_stack() > 0 and any(
        type(mode) not in _HARMLESS_MODES
        for mode in torch.overrides._get_current_function_mode_stack()
    ):
        return False
    tracked = torch.is_grad_enabled()
    if tracked and attn_mask is not None and attn_mask.requires_grad:
        return False
    tensors: list[Any] = [*inputs]
    narrow: list[Any] = []  # weights of a dtype of their own, and scales of these
    for module in modules:
        own = module.__dict__
        if not is_bare(module):
            return False
        kind = type(module)
        if kind is nn.Dropout:
            if own["training"] and own["p"] > 0.0:
                return False
        elif kind is nn.Linear or (kind is nn.LayerNorm and len(own["normalized_shape"]) == 1):
            tensors += own["_parameters"].values()
        elif kind is QuantizedLinear:
            weight, scale, bias = operands_of(module)
            narrow += (weight, scale)
            tensors.append(bias)
        else:
            return False
    dtype, device = inputs[0].dtype, inputs[0].device
    for given, alike in ((tensors, True), (narrow, False)):
        for tensor in given:
            if tensor is not None and (
                (tracked and tensor.requires_grad)
                or type(tensor) not in _PLAIN_TENSORS
                or (alike and tensor.dtype is not dtype)
                or tensor.device != device
                or tensor.layout is not torch.strided
                or tensor.is_neg()
            ):
                return False
    return True


def is_layer_norm(module: Any) -> bool:
    """Whether the forward of this module is a layer norm over the last dimension."""
    is_one = LAYER_NORMS.get(type(module))
    return is_one is not None and is_one(module) and len(module.__dict__["normalized_shape"]) == 1


def parameters(module: Any) -> tuple[Any, Any]:
    """`module.weight` and `module.bias`, of a linear layer or a norm."""
    own = module.__dict__["_parameters"]
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return module.weight, module.bias  # replicas of nn.DataParallel have them as attributes


def operands_of(module: Any) -> Operands:
    """Weight, scale and bias of a linear layer or a `QuantizedLinear`."""
    if type(module) is QuantizedLinear:
        own = module.__dict__
        buffers, given = own["_buffers"], own["_parameters"]
        scale = buffers.get("weight_scale")
        return given["weight"] if scale is None else buffers["packed"], scale, given["bias"]
    weight, bias = parameters(module)
    return weight, None, bias


def attention_dtype_between(x: Tensor, *projections: Any) -> torch.dtype:
    """Of an attention to what these modules project, from tokens like x."""
    if not all(type(module) is QuantizedLinear for module in projections):
        return x.dtype
    return attention_dtype(x, *(operands_of(module)[0] for module in projections))


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The kernels' name for an activation that they have."""
    if activation is F.relu:
        return "relu"
    return "gelu" if activation is F.gelu else None


def activation_module_name(module: Any) -> str | None:
    """The same for an activation that is a module."""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return ACTIVATION_MODULES.get(type(module))
