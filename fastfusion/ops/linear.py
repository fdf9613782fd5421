"""A linear layer with what follows it: y = activation(x W^T + bias) + residual.

The activations are those of torch.nn.functional: relu, gelu (exact, or with its approximation by
tanh; Hendrycks and Gimpel, 2016) and silu. Sums are rounded once, at the end.

On the CPU the weight is read where its owner keeps it, (features, width): no packed copy of it has
to be made, kept or brought up to date.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fastfusion.backends import cpu
from fastfusion.core import arguments
from fastfusion.core.op import Implementation, Op, never_refuses
from fastfusion.core.reference import accumulation_dtype
from fastfusion.core.torch_op import Definition

# In the order of csrc/calls.h.
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


class Arguments(NamedTuple):
    """Those of the public function, in its order."""

    input: Any
    weight: Any
    bias: Any = None
    # By name only:
    activation: Any = None
    residual: Any = None
    backend: Any = None


_POSITIONAL = 3


class Call(NamedTuple):
    """What an implementation takes; csrc/torch has its twin."""

    input: Tensor  # (..., width), width > 0
    weight: Tensor  # (features, width)
    bias: Tensor | None  # (features,)
    residual: Tensor | None  # (..., features)
    activation: int  # place in ACTIVATIONS

    def conditions(self) -> Iterator[Any]:
        """What holds for every call."""
        given = [t for t in (self.weight, self.bias, self.residual) if t is not None]
        yield arguments.are_alike(self.input, *given)
        yield self.input.dim() > 0 and self.weight.dim() == 2
        features, width = self.weight.shape
        yield width > 0
        yield self.input.shape[-1] == width
        if self.bias is not None:
            yield self.bias.dim() == 1
            yield self.bias.shape[0] == features
        if self.residual is not None:
            yield self.residual.dim() == self.input.dim()
            expected = (*self.input.shape[:-1], features)
            for size, other in zip(self.residual.shape, expected, strict=True):
                yield size == other


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(input @ weight^T + bias) + residual in one pass.

    `torch.nn.functional.linear` with what usually follows it. The same bits for a sequence alone
    and among batch mates, and for any number of threads.

    Args:
        input: (..., length, width), float32, bfloat16, float16 or float64; or (width,).
        weight: (features, width), of the same dtype, as torch.nn.Linear keeps it.
        bias: (features,).
        activation: "relu", "gelu", "gelu_tanh", "silu" or None.
        residual: (..., length, features), added behind the activation.
        backend: "cpu" or "reference" to insist on one; None chooses. Gradients are the reference's,
            whose products are torch's own.

    Returns:
        (..., length, features), contiguous, in the dtype of the input.

    Raises:
        TypeError: an argument is not of the type or dtype named above.
        ValueError: shapes, devices or names that do not fit; the message prints them.
        BackendUnavailableError: `backend` cannot run this call; the message says why.
    """
    if not torch.compiler.is_compiling():
        tensors = (input, weight, bias, residual)
        if has_torch_function_variadic(*tensors):
            given = Arguments(input, weight, bias, activation, residual, backend)
            answer = arguments.ask_torch_function(linear, given, _POSITIONAL, tensors)
            if answer is not NotImplemented:
                return answer
        number = _NUMBERS.get(activation) if isinstance(activation, str | None) else None
        if number is not None:
            result = OP.attempt(backend, Call(input, weight, bias, residual, number), False)
            if result is not None:
                return result
    call = normalize(Arguments(input, weight, bias, activation, residual))
    output: Tensor = OP.run(backend, call, False)
    return output


def check(given: Arguments) -> None:
    """Raise TypeError or ValueError for arguments that are not legal."""
    tensors = {"input": given.input, "weight": given.weight}
    optional = {"bias": given.bias, "residual": given.residual}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    arguments.check_tensors(**tensors)
    sizes = arguments.shapes(**tensors)
    if given.input.dim() == 0:
        raise ValueError(f"input must have a last dimension, the width, got {sizes}")
    if given.weight.dim() != 2 or given.weight.shape[1] != given.input.shape[-1]:
        raise ValueError(f"weight must be (features, width) with the width of input, got {sizes}")
    features = given.weight.shape[0]
    if given.bias is not None and tuple(given.bias.shape) != (features,):
        raise ValueError(f"bias must be (features,), got {sizes}")
    expected = (*given.input.shape[:-1], features)
    if given.residual is not None and tuple(given.residual.shape) != expected:
        raise ValueError(f"residual must have the shape of the output, {expected}, got {sizes}")
    if not isinstance(given.activation, str | None) or given.activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"activation must be one of {names}, got {given.activation!r}")


def normalize(given: Arguments) -> Call:
    """Public arguments, cast as autocast asks and checked, as every implementation takes them."""
    dtype = arguments.autocast_dtype(arguments.device_type_of(given.input))
    input, weight, bias, residual = arguments.autocast_cast(
        dtype, given.input, given.weight, given.bias, given.residual
    )
    if not torch.compiler.is_compiling():
        check(given._replace(input=input, weight=weight, bias=bias, residual=residual))
    if weight.shape[1] == 0:  # a sum of nothing is 0
        input, weight = F.pad(input, (0, 1)), F.pad(weight, (0, 1))
    return Call(input, weight, bias, residual, _NUMBERS[given.activation])


def run_reference(call: Call, lse: bool) -> Any:
    """The definition."""
    acc = accumulation_dtype(call.input.dtype)
    bias = None if call.bias is None else call.bias.to(acc)
    activate = tuple(ACTIVATIONS.values())[call.activation]
    result = activate(F.linear(call.input.to(acc), call.weight.to(acc), bias))
    if call.residual is not None:
        result = result + call.residual.to(acc)
    return result.to(call.input.dtype)


def _fake(call: Call) -> Tensor:
    return call.input.new_empty(*call.input.shape[:-1], call.weight.shape[0])


def _flops(call: Call, backward: bool) -> int:
    return 2 * call.input.numel() * call.weight.shape[0] * (2 if backward else 1)


DEFINITION = Definition(
    "linear", Call, gradients=4, results=1, outputs=1, fake=_fake,
    reference=lambda call: (run_reference(call, False),), flops=_flops,
)  # fmt: skip
_CPU = cpu.forward_op(DEFINITION)


def _cpu_refuses(call: Call) -> Sequence[str]:
    return cpu.refuses_gradient(call, DEFINITION)


def _cpu_path(call: Call) -> str:
    return f"{cpu.isa()}, weights in place{cpu.products(call.input.dtype)}"


def inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: Any = None, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of a legal call, normally distributed, with a bias.

    Args:
        shape: length, width and features; optionally batch, activation and residual (a bool).
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device() if device is None else device

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu").to(device=device, dtype=dtype)

    batch, length, features = shape.get("batch", 1), shape["length"], shape["features"]
    call: dict[str, Any] = {
        "input": normal(batch, length, shape["width"]),
        "weight": normal(features, shape["width"]),
        "bias": normal(features),
        "activation": shape.get("activation"),
    }
    if shape.get("residual"):
        call["residual"] = normal(batch, length, features)
    return call


def cost(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Floating-point operations of the product, and bytes read and written once."""
    rows, width, features = (
        shape.get("batch", 1) * shape["length"],
        shape["width"],
        shape["features"],
    )
    elements = rows * width + features * (width + 1) + rows * features
    elements += rows * features if shape.get("residual") else 0
    return 2 * rows * width * features, elements * dtype.itemsize


OP = Op(
    name="linear",
    arguments=Arguments,
    check=check,
    normalize=normalize,
    definition=DEFINITION,
    inputs=inputs,
    cost=cost,
    ranks=range(1, 65),
    implementations=(
        Implementation(
            "cpu", _CPU, _cpu_refuses, differentiable=False, checks=True, path=_cpu_path
        ),
        Implementation("reference", run_reference, never_refuses),
    ),
)  # fmt: skip
