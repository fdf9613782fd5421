"""Linear layers of the modules by the op `linear`: eager inference on a CPU.

Anything that calling a module does beside its formula (a gradient, a hook, an adapter or another
class in its place, autocast, a transform) leaves the call to the module. So do compiled code, which
fuses by itself, and exported programs, in which torch's own layers mean more to others.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastfusion.backends import cpu
from fastfusion.core.arguments import PLAIN
from fastfusion.core.op import forced_backend
from fastfusion.nn._plain import (
    activation_module_name,
    activation_name,
    does_nothing,
    has_global_hooks,
    is_bare,
    operands_of,
)
from fastfusion.nn._quantized import Operands, QuantizedLinear, product
from fastfusion.ops.linear import has_own_dtype, linear

# Numbers of a weight from which the kernel saves more than its call costs in Python: 32 x 32 take
# 1.6 times as long as torch's (linear_tiny_4 in float32, benchmarks/results/amd-epyc-zen4).
_LEAST = 1 << 14
_any_autocast = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_transforms_active = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state


def project(
    input: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`product`, by the op where its CPU kernel is what runs."""
    if weight.numel() >= _LEAST and runs(input, weight, weight_scale, bias):
        return linear(input, weight, bias, weight_scale=weight_scale)
    return product(input, weight, weight_scale, bias)


def apply(module: Any, input: Tensor) -> Tensor:
    """`module(input)`, likewise."""
    own = large_weights_of(module)
    if own is not None and is_linear(module) and runs(input, *own) and not has_global_hooks():
        weight, scale, bias = own
        return linear(input, weight, bias, weight_scale=scale)
    result: Tensor = module(input)
    return result


def feed_forward(module: Any, input: Tensor, last_dropout: Any) -> Tensor | None:
    """`module._ff_block(input)` of a Transformer layer in two calls, or None where it may mean
    more than its formula."""
    parts = module.__dict__["_modules"]
    first, second = parts.get("linear1"), parts.get("linear2")
    own, others = large_weights_of(first), large_weights_of(second)
    if own is None or others is None:
        return None
    name = activation_name(module.activation)
    if type(input) not in PLAIN or not getattr(module.self_attn, "batch_first", False):
        return None
    if name is None or has_global_hooks() or not (is_linear(first) and is_linear(second)):
        return None
    if not (does_nothing(module.dropout) and does_nothing(last_dropout)):
        return None
    if not (runs(input, *own) and runs(input, *others)):
        return None
    return _in_two_calls(input, own, name, others)


def _in_two_calls(input: Tensor, first: Operands, activation: str, second: Operands) -> Tensor:
    weight, scale, bias = first
    hidden = linear(input, weight, bias, weight_scale=scale, activation=activation)
    weight, scale, bias = second
    return linear(hidden, weight, bias, weight_scale=scale)


class AcceleratedLinear(nn.Linear):
    """`torch.nn.Linear` by the op, likewise: what `fastfusion.accelerate` makes of it."""

    def forward(self, input: Tensor) -> Tensor:
        own = large_weights_of(self)
        if own is None or not runs(input, *own):
            return super().forward(input)
        return linear(input, own[0], own[2])


class AcceleratedFeedForward(nn.Sequential):
    """Linear, activation, Linear and dropouts behind either, in two calls likewise."""

    def forward(self, input: Any) -> Any:
        found = _feed_forward_parts([*self._modules.values()])
        if found is None:
            return super().forward(input)
        first, activation, name, second, dropouts = found
        result = two_layers(input, first, activation, name, second, dropouts)
        return super().forward(input) if result is None else result


def two_layers(
    input: Any, first: Any, activation: Any, name: str, second: Any, dropouts: Iterable[Any]
) -> Tensor | None:
    """Linear layer, activation module, linear layer and dropouts behind either in two calls, or
    None where they may mean more than their formulas."""
    own, others = large_weights_of(first), large_weights_of(second)
    if (
        own is None
        or others is None
        or has_global_hooks()
        or not (is_linear(first) and is_linear(second) and is_bare(activation))
        or not all(map(does_nothing, dropouts))
        or not (runs(input, *own) and runs(input, *others))
    ):
        return None
    return _in_two_calls(input, own, name, others)


def feed_forward_of(module: nn.Module) -> type[nn.Module] | None:
    """What `fastfusion.accelerate` makes of a Sequential; None of those that are something else."""
    found = _feed_forward_parts([*module.children()])
    return None if found is None else AcceleratedFeedForward


def _feed_forward_parts(parts: list[Any]) -> tuple[Any, Any, str, Any, list[Any]] | None:
    """Linear layer, activation and its name, linear layer, dropouts; None of anything else."""
    dropouts = [part for part in parts if type(part) is nn.Dropout]
    others = [part for part in parts if type(part) is not nn.Dropout]
    if len(others) != 3 or parts[:2] != others[:2]:
        return None
    first, activation, second = others
    name = activation_module_name(activation)
    if name is None or type(first) not in LINEAR or type(second) not in LINEAR:
        return None
    return first, activation, name, second, dropouts


LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear, QuantizedLinear, AcceleratedLinear)


def weights_of(module: Any) -> Operands | None:
    """Weight, weight_scale and bias of a linear layer, as `linear` takes them; None of others.

    From dictionaries: nn.Module's getattr would cost what the kernel saves. Whether calling the
    module comes to the product of these is not looked at.
    """
    if module is None:
        return None
    parameters = module.__dict__["_parameters"]
    weight = parameters.get("weight")
    if weight is not None:
        return weight, None, parameters.get("bias")
    if type(module) is not QuantizedLinear:
        return None
    return operands_of(module)


def large_weights_of(module: Any) -> Operands | None:
    own = weights_of(module)
    return None if own is None or own[0].numel() < _LEAST else own


def runs(input: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the CPU kernel takes these and nobody would see the difference.

    The input has to be (batch, length, width): of packed tokens the op would not know the sequences
    by whose lengths it chooses.
    """
    tensors = [t for t in (input, weight, weight_scale, bias) if t is not None]
    return (
        runs_on_cpu(input)
        and PLAIN.issuperset(map(type, tensors))
        and (weight.dtype == input.dtype or has_own_dtype(input, weight, weight_scale))
        and (bias is None or bias.dtype == input.dtype)
        and all([t.is_cpu and not t.is_neg() for t in tensors])
        and not (torch.is_grad_enabled() and any([t.requires_grad for t in tensors]))
    )


def runs_on_cpu(x: Any) -> bool:
    """Whether the CPU kernels are what runs sequences x, (batch, length, width), for nobody to
    watch."""
    return (
        type(x) in PLAIN
        and x.is_cpu
        and x.dim() == 3
        and x.dtype in cpu.DTYPES
        and not _is_compiling()
        and cpu.unavailable() is None
        and forced_backend() in (None, "cpu")
        and not _any_autocast()
        and not _transforms_active()
        and forward_ad._current_level < 0
        and _tracing() is None
    )


def fused(
    op: Any, tensors: Sequence[Any], numbers: Sequence[Any], others: Sequence[Any] = ()
) -> Tensor | None:
    """The result of the op of a whole layer, where nobody would see the difference.

    Args:
        op: its module.
        tensors, numbers, others: its call: tensors before and behind the numbers.
    """
    given = (*tensors, *others) if others else tensors
    if not PLAIN.issuperset(map(type, given)):
        return None
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in given]):
        return None
    try:
        result: Tensor | None = op.OP.fuse(op.Call._make((*tensors, *numbers, *others)))
    except RuntimeError:
        return None  # what does not fit is for the parts to say
    return result


def is_linear(module: Any) -> bool:
    """Whether this is a linear layer whose forward comes to `product`."""
    return type(module) in LINEAR and is_bare(module)
