"""Normalisation of each row, of a sum of two: layer norm and RMS norm.

    layer norm (Ba, Kiros and Hinton, 2016):     (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    RMS norm (Zhang and Sennrich, 2019):         x / sqrt(mean(x^2) + eps) * weight + bias

with x = input + residual, which is not rounded in between.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fastfusion.backends import cpu
from fastfusion.core import arguments, layers
from fastfusion.core.op import Implementation, Op, never_refuses
from fastfusion.core.reference import accumulation_dtype, cast
from fastfusion.core.torch_op import Definition


class Arguments(NamedTuple):
    """Those of the public function, in its order."""

    input: Any
    weight: Any = None
    bias: Any = None
    # By name only:
    residual: Any = None
    eps: Any = 1e-5
    rms: Any = False
    backend: Any = None


_POSITIONAL = 3


class Call(NamedTuple):
    """What an implementation takes; csrc/torch has its twin."""

    input: Tensor  # (..., width)
    weight: Tensor | None  # (width,)
    bias: Tensor | None  # (width,)
    residual: Tensor | None  # as input
    eps: float
    rms: bool = False

    def conditions(self) -> Iterator[Any]:
        """What holds for every call."""
        given = [t for t in (self.weight, self.bias, self.residual) if t is not None]
        yield arguments.are_alike(self.input, *given)
        yield self.input.dim() > 0
        for vector in (self.weight, self.bias):
            if vector is not None:
                yield vector.dim() == 1
                yield vector.shape[0] == self.input.shape[-1]
        if self.residual is not None:
            yield self.residual.dim() == self.input.dim()
            for size, other in zip(self.residual.shape, self.input.shape, strict=True):
                yield size == other


def norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Layer norm or RMS norm of input + residual over the last dimension.

    Args:
        input: (..., width), float32, bfloat16, float16 or float64.
        weight, bias: (width,), of the same dtype; without them 1 and 0.
        residual: of the shape and dtype of the input, added before.
        eps: added to the variance, or the mean of squares; not negative.
        rms: RMS norm, else layer norm.
        backend: "cpu" or "reference" to insist on one; None chooses. Gradients are the reference's.

    Returns:
        The shape and dtype of the input, contiguous.

    Raises:
        TypeError: an argument is not of the type or dtype named above.
        ValueError: shapes, devices or numbers that do not fit; the message prints them.
        BackendUnavailableError: `backend` cannot run this call; the message says why.
    """
    if not torch.compiler.is_compiling():
        tensors = (input, weight, bias, residual)
        if has_torch_function_variadic(*tensors):
            given = Arguments(input, weight, bias, residual, eps, rms, backend)
            answer = arguments.ask_torch_function(norm, given, _POSITIONAL, tensors)
            if answer is not NotImplemented:
                return answer
        if type(eps) is float and type(rms) is bool and 0.0 <= eps <= arguments.MAX_SCALE:
            result = OP.attempt(backend, Call(input, weight, bias, residual, eps, rms), False)
            if result is not None:
                return result
    call = normalize(Arguments(input, weight, bias, residual, eps, rms))
    output: Tensor = OP.run(backend, call, False)
    return output


def check(given: Arguments) -> None:
    """Raise TypeError or ValueError for arguments that are not legal."""
    optional = {"weight": given.weight, "bias": given.bias, "residual": given.residual}
    tensors = {"input": given.input}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    arguments.check_tensors(**tensors)
    sizes = arguments.shapes(**tensors)
    if given.input.dim() == 0:
        raise ValueError(f"input must have a last dimension, the width, got {sizes}")
    for name in ("weight", "bias"):
        if optional[name] is not None and tuple(optional[name].shape) != given.input.shape[-1:]:
            raise ValueError(f"{name} must be (width,), got {sizes}")
    if given.residual is not None and given.residual.shape != given.input.shape:
        raise ValueError(f"residual must have the shape of input, got {sizes}")
    check_eps("eps", given.eps)
    arguments.check_flag("rms", given.rms)


def check_eps(name: str, eps: Any) -> None:
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"{name} must be a float, got {type(eps).__name__}")
    if not 0.0 <= eps <= arguments.MAX_SCALE:
        raise ValueError(f"{name} must not be negative, and finite in float32, got {eps}")


def normalize(given: Arguments) -> Call:
    """Public arguments, cast as autocast asks and checked, as every implementation takes them.

    As torch's own norms, which autocast runs in float32 on a GPU, this one keeps the dtype of its
    input; what else has another dtype takes that.
    """
    eps = arguments.number("eps", given.eps)
    given = given._replace(eps=eps)
    if arguments.autocast_dtype(arguments.device_type_of(given.input)) is not None:
        dtype = getattr(given.input, "dtype", None)
        weight, bias, residual = arguments.autocast_cast(
            dtype, given.weight, given.bias, given.residual
        )
        given = given._replace(weight=weight, bias=bias, residual=residual)
    if not torch.compiler.is_compiling():
        check(given)
    return Call(given.input, given.weight, given.bias, given.residual, float(eps), given.rms)


def run_reference(call: Call, lse: bool) -> Any:
    """The definition."""
    acc = accumulation_dtype(call.input.dtype)
    x = cast(call.input, acc)
    if call.residual is not None:
        x = x + cast(call.residual, acc)
    out = layers.normalized(x, call.weight, call.bias, call.eps, call.rms)
    return cast(out, call.input.dtype)


def _fake(call: Call) -> Tensor:
    return call.input.new_empty(call.input.shape)


def _flops(call: Call, backward: bool) -> int:
    return 0  # as torch's counter has it: products alone count


DEFINITION = Definition(
    "norm", Call, gradients=4, results=1, outputs=1, fake=_fake,
    reference=lambda call: (run_reference(call, False),), flops=_flops,
)  # fmt: skip
_CPU = cpu.forward_op(DEFINITION)


def _cpu_refuses(call: Call) -> Sequence[str]:
    return cpu.refuses_gradient(call, DEFINITION)


def _cpu_path(call: Call) -> str:
    return cpu.isa()


def inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: Any = None, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of a legal call, normally distributed, with weight and bias.

    Args:
        shape: length and width; optionally batch, rms and residual (bools).
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device() if device is None else device

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu").to(device=device, dtype=dtype)

    size = (shape.get("batch", 1), shape["length"], shape["width"])
    call: dict[str, Any] = {
        "input": normal(*size),
        "weight": normal(shape["width"]),
        "bias": normal(shape["width"]),
        "rms": bool(shape.get("rms")),
    }
    if shape.get("residual"):
        call["residual"] = normal(*size)
    return call


def cost(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Floating-point operations, about eight for a number, and bytes read and written once."""
    numbers = shape.get("batch", 1) * shape["length"] * shape["width"]
    moved = numbers * (3 if shape.get("residual") else 2) + 2 * shape["width"]
    return 8 * numbers, moved * dtype.itemsize


OP = Op(
    name="norm",
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
