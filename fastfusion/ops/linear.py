"""A linear layer with what follows it: y = activation(x W^T + bias) + residual.

The activations are those of torch.nn.functional, relu, gelu (exact, or with its approximation by
tanh) and silu, and quick_gelu, x sigmoid(1.702 x), CLIP's approximation of GELU (both: Hendrycks
and Gimpel, "Gaussian Error Linear Units", 2016). Sums are rounded once, at the end.

On the CPU the weight is read where its owner keeps it, (features, width): no packed copy of it has
to be made, kept or brought up to date.

A weight may be narrower than the input. Of bfloat16 or float16 beside float32, the input is rounded
to its dtype and all else stays float32. Of 8-bit integers (Jacob et al., 2018, without zero points)
it stands packed beside a scale for each feature, `pack_int8`, and each row x of the input becomes
integers as it comes, by the largest of its own numbers:

    q = round(x * 127 / max|x|)     y = (q . w) * (max|x| / 127) * weight_scale

with sums of integers, which are exact in any order. Such products have no gradient.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import has_torch_function_variadic

from fastfusion.backends import cpu
from fastfusion.core import arguments
from fastfusion.core.int8 import LEAST, LIMIT, ZERO, pack_int8, shape_of, unpacked
from fastfusion.core.op import Implementation, Op, never_refuses
from fastfusion.core.reference import accumulation_dtype, cast
from fastfusion.core.torch_op import LIBRARY, Definition, needs_gradient

# In the order of csrc/calls.h.
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


MAX_INT8_WIDTH = 65536  # sums of int32
_HALVES = (torch.bfloat16, torch.float16)


class Arguments(NamedTuple):
    """Those of the public function, in its order."""

    input: Any
    weight: Any
    bias: Any = None
    # By name only:
    weight_scale: Any = None
    activation: Any = None
    residual: Any = None
    backend: Any = None


_POSITIONAL = 3


class Call(NamedTuple):
    """What an implementation takes; csrc/torch has its twin."""

    input: Tensor  # (..., width), width > 0
    weight: Tensor  # (features, width); or packed
    bias: Tensor | None = None  # (features,)
    residual: Tensor | None = None  # (..., features)
    weight_scale: Tensor | None = None  # (features,), of a packed weight
    activation: int = 0  # place in ACTIVATIONS

    @property
    def features(self) -> int:
        return (self.weight if self.weight_scale is None else self.weight_scale).shape[0]

    def conditions(self) -> Iterator[Any]:
        """What holds for every call."""
        input, weight, scale = self.input, self.weight, self.weight_scale
        alike = [t for t in (self.bias, self.residual) if t is not None]
        if not has_own_dtype(input, weight, scale):
            alike.append(weight)
        yield arguments.are_alike(input, *alike)
        for tensor in (weight, scale):
            if tensor is not None:
                yield tensor.device == input.device and tensor.layout is torch.strided
        yield input.dim() > 0
        width = input.shape[-1]
        yield width > 0
        if scale is None:
            yield weight.dim() == 2
            yield weight.shape[1] == width
        else:
            yield weight.dtype == torch.uint8 and weight.dim() == 5
            yield scale.dtype == torch.float32 and scale.dim() == 1
            yield width <= MAX_INT8_WIDTH
            parts = weight.shape[0]
            yield parts > 0
            yield scale.shape[0] % parts == 0
            expected: tuple[int, ...] = shape_of(parts, scale.shape[0] // parts, width)
            for size, other in zip(weight.shape, expected, strict=True):
                yield size == other
        if self.bias is not None:
            yield self.bias.dim() == 1
            yield self.bias.shape[0] == self.features
        if self.residual is not None:
            yield self.residual.dim() == input.dim()
            expected = (*input.shape[:-1], self.features)
            for size, other in zip(self.residual.shape, expected, strict=True):
                yield size == other


def has_own_dtype(input: Tensor, weight: Tensor, weight_scale: Tensor | None) -> bool:
    """Whether the weight is narrower than the input."""
    return weight_scale is not None or (input.dtype == torch.float32 and weight.dtype in _HALVES)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(input @ weight^T + bias) + residual in one pass.

    `torch.nn.functional.linear` with what usually follows it. The same bits for a sequence alone
    and among batch mates, and for any number of threads.

    Args:
        input: (..., length, width), float32, bfloat16, float16 or float64; or (width,).
        weight: (features, width), as torch.nn.Linear keeps it: of the same dtype, or of bfloat16 or
            float16 beside an input of float32, which is then rounded to its dtype. Beside
            `weight_scale` uint8, as `fastfusion.ops.pack_int8` gives it, for a width of at most
            65,536: rows of the input become 8-bit integers too, and a row with NaN or infinity is
            NaN.
        bias: (features,), of the dtype of the input.
        weight_scale: (features,), float32, of a packed weight.
        activation: "relu", "gelu", "gelu_tanh", "silu", "quick_gelu" or None.
        residual: (..., length, features), added behind the activation.
        backend: "cpu" or "reference" to insist on one; None chooses. Gradients are the reference's,
            whose products are torch's own.

    Returns:
        (..., length, features), contiguous, in the dtype of the input. With a packed weight it has
        no gradient: the backward raises RuntimeError.

    Raises:
        TypeError: an argument is not of the type or dtype named above.
        ValueError: shapes, devices or names that do not fit; the message prints them.
        BackendUnavailableError: `backend` cannot run this call; the message says why.
    """
    if not torch.compiler.is_compiling():
        tensors = (input, weight, bias, weight_scale, residual)
        if has_torch_function_variadic(*tensors):
            given = Arguments(input, weight, bias, weight_scale, activation, residual, backend)
            answer = arguments.ask_torch_function(linear, given, _POSITIONAL, tensors)
            if answer is not NotImplemented:
                return answer
        number = NUMBERS.get(activation) if isinstance(activation, str | None) else None
        if number is not None and not (weight_scale is not None and _may_track()):
            call = Call(input, weight, bias, residual, weight_scale, number)
            result = OP.attempt(backend, call, False)
            if result is not None:
                return result
    call = normalize(Arguments(input, weight, bias, weight_scale, activation, residual))
    if weight_scale is not None and _is_tracked(call):
        return _OfIntegers.apply(backend, *call)
    output: Tensor = OP.run(backend, call, False)
    return output


def _may_track() -> bool:
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _is_tracked(call: Call) -> bool:
    """Whether somebody may ask for a derivative of the result. An exported program has none."""
    if arguments.is_exporting():
        return False
    if torch.compiler.is_compiling():
        return needs_gradient(DEFINITION, call)
    return _may_track() and (
        needs_gradient(DEFINITION, call)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _no_gradient(grad: Tensor, shape: Sequence[int]) -> Tensor:
    raise RuntimeError(
        "linear with a weight of 8-bit integers has no derivative: its input is rounded; such "
        "layers are for inference (torch.no_grad)"
    )


# An op, for compiled code, whose backward is traced before anybody asks for it.
LIBRARY.define("no_gradient(Tensor grad, SymInt[] shape) -> Tensor")
LIBRARY.impl("no_gradient", _no_gradient, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastfusion::no_gradient", lambda grad, shape: grad.new_empty(shape), lib=LIBRARY
)


class _OfIntegers(Function):
    """A call with a packed weight for those who track gradients, of which it has none: rounding
    makes steps. Models are mostly called with tracking on, so it is the backward that raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(backend: str | None, *given: Any) -> Tensor:
        output: Tensor = OP.run(backend, Call(*given), False)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.shapes = [None if t is None else t.shape for t in inputs[1 : 1 + DEFINITION.gradients]]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refused = _no_gradients(grads[0], ctx.shapes, ctx.needs_input_grad[1:])
        return None, *refused, None, None


def _no_gradients(grad: Tensor, shapes: Any, needed: Any) -> tuple[Tensor | None, ...]:
    return tuple(
        torch.ops.fastfusion.no_gradient(grad, shape) if is_needed else None
        for shape, is_needed in zip(shapes, needed, strict=False)
    )


def check(given: Arguments) -> None:
    """Raise TypeError or ValueError for arguments that are not legal."""
    tensors = {"input": given.input, "weight": given.weight}
    optional = {"bias": given.bias, "residual": given.residual}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    sizes = arguments.shapes(**tensors, weight_scale=given.weight_scale)
    if isinstance(given.input, Tensor) and isinstance(given.weight, Tensor):
        own = has_own_dtype(given.input, given.weight, given.weight_scale)
    else:
        own = False
    arguments.check_tensors(**{k: t for k, t in tensors.items() if not (own and k == "weight")})
    if given.input.dim() == 0:
        raise ValueError(f"input must have a last dimension, the width, got {sizes}")
    width = given.input.shape[-1]
    if own:
        arguments.check_dense("weight", given.weight)
        arguments.check_device("weight", given.weight, "input", given.input)
    if given.weight_scale is not None:
        features = _check_packed(given, width, sizes)
    elif given.weight.dim() != 2 or given.weight.shape[1] != width:
        raise ValueError(f"weight must be (features, width) with the width of input, got {sizes}")
    else:
        features = given.weight.shape[0]
    if given.bias is not None and tuple(given.bias.shape) != (features,):
        raise ValueError(f"bias must be (features,), got {sizes}")
    expected = (*given.input.shape[:-1], features)
    if given.residual is not None and tuple(given.residual.shape) != expected:
        raise ValueError(f"residual must have the shape of the output, {expected}, got {sizes}")
    if not isinstance(given.activation, str | None) or given.activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"activation must be one of {names}, got {given.activation!r}")


def _check_packed(given: Arguments, width: int, sizes: str) -> int:
    """The number of features."""
    weight, scale = given.weight, given.weight_scale
    if not isinstance(scale, Tensor):
        raise TypeError(f"weight_scale must be a Tensor or None, got {type(scale).__name__}")
    arguments.check_dense("weight_scale", scale)
    arguments.check_device("weight_scale", scale, "input", given.input)
    if scale.dtype != torch.float32:
        raise TypeError(f"weight_scale must be float32, got {scale.dtype}")
    if weight.dtype != torch.uint8:
        raise TypeError(
            f"weight must be uint8 beside weight_scale, as pack_int8 gives it, got {weight.dtype}"
        )
    if scale.dim() != 1:
        raise ValueError(f"weight_scale must be (features,), got {sizes}")
    if width > MAX_INT8_WIDTH:
        raise ValueError(f"input must have a width of at most {MAX_INT8_WIDTH} here, got {sizes}")
    features, parts = scale.shape[0], weight.shape[0] if weight.dim() else 0
    if parts == 0 or features % parts:
        raise ValueError(f"weight must be in parts of the same number of features, got {sizes}")
    expected = shape_of(parts, features // parts, width)
    if tuple(weight.shape) != expected:
        raise ValueError(f"weight must be packed by pack_int8, {expected}, got {sizes}")
    return features


def normalize(given: Arguments) -> Call:
    """Public arguments, cast as autocast asks and checked, as every implementation takes them."""
    dtype = arguments.autocast_dtype(arguments.device_type_of(given.input))
    input, weight, bias, residual = arguments.autocast_cast(
        dtype, given.input, given.weight, given.bias, given.residual
    )
    scale = given.weight_scale
    if not torch.compiler.is_compiling():
        check(given._replace(input=input, weight=weight, bias=bias, residual=residual))
    if input.shape[-1] == 0:  # a sum of nothing is 0
        input = F.pad(input, (0, 1))
        if scale is None:
            weight = F.pad(weight, (0, 1))
        else:
            weight = F.pad(weight, (0, 0, 0, 0, 0, 1), value=ZERO)
    return Call(input, weight, bias, residual, scale, NUMBERS[given.activation])


def run_reference(call: Call, lse: bool) -> Any:
    """The definition."""
    acc = accumulation_dtype(call.input.dtype)
    activate = tuple(ACTIVATIONS.values())[call.activation]
    bias = None if call.bias is None else cast(call.bias, acc)
    if call.weight_scale is None:
        input = call.input
        if has_own_dtype(input, call.weight, None):
            input = cast(input, call.weight.dtype)
        result = F.linear(cast(input, acc), cast(call.weight, acc), bias)
    else:
        result = _product_of_integers(call, acc)
        result = result if bias is None else result + bias
    result = activate(result)
    if call.residual is not None:
        result = result + cast(call.residual, acc)
    return cast(result, call.input.dtype)


def _product_of_integers(call: Call, acc: torch.dtype) -> Tensor:
    """input @ weight^T of 8-bit integers, scaled."""
    assert call.weight_scale is not None
    given = cast(call.input, acc), call.weight, cast(call.weight_scale, acc)
    if _is_tracked(call):  # the reference of a layer's op, which has a gradient
        return _RoundedProduct.apply(*given)
    return _rounded_product(*given)


def _rounded_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The sums are exact in float64."""
    largest = x.abs().amax(-1, keepdim=True)
    limit = torch.full_like(largest, LIMIT)  # 127 / x of a number is rounded twice in torch
    inverse = torch.where(largest < LEAST, 0.0, limit / largest)
    numbers = (x * inverse).round().clamp(-LIMIT, LIMIT).double()
    rows = unpacked(weight, x.shape[-1], scale.shape[0] // weight.shape[0]).double() - ZERO
    scales = torch.where(largest.isfinite(), largest / limit, torch.nan) * scale
    return cast(numbers @ rows.t(), x.dtype) * scales


class _RoundedProduct(Function):
    """`_rounded_product`, whose derivative nobody gets by accident: it is 0 but at the steps."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return _rounded_product(x, weight, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.shapes = [t.shape for t in inputs]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _no_gradients(grads[0], ctx.shapes, ctx.needs_input_grad)


def _fake(call: Call) -> Tensor:
    return call.input.new_empty(*call.input.shape[:-1], call.features)


def _flops(call: Call, backward: bool) -> int:
    return 2 * call.input.numel() * call.features * (2 if backward else 1)


DEFINITION = Definition(
    "linear", Call, gradients=4, results=1, outputs=1, fake=_fake,
    reference=lambda call: (run_reference(call, False),), flops=_flops,
)  # fmt: skip
_CPU = cpu.forward_op(DEFINITION)


def _cpu_refuses(call: Call) -> Sequence[str]:
    if call.weight_scale is not None:  # which has no gradient
        return cpu.refuses(call)
    return cpu.refuses_gradient(call, DEFINITION)


def _cpu_path(call: Call) -> str:
    return f"{cpu.isa()}, {cpu_path(call)}"


def cpu_path(call: Call) -> str:
    """How the kernels read the weight of a call and multiply."""
    if call.weight_scale is not None:
        return "packed 8-bit weights"
    return f"weights in place{cpu.products(call.weight.dtype)}"


def inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: Any = None, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of a legal call, normally distributed, with a bias.

    Args:
        shape: length, width and features; optionally batch, activation, residual (a bool), and
            weights: "int8", "bfloat16" or "float16" where these are narrower.
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
    weights = shape.get("weights")
    if weights == "int8":
        call["weight"], call["weight_scale"] = pack_int8(call["weight"])
    elif weights is not None:
        call["weight"] = call["weight"].to(getattr(torch, weights))
    return call


def cost(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Floating-point operations of the product, and bytes read and written once."""
    rows, width = shape.get("batch", 1) * shape["length"], shape["width"]
    features = shape["features"]
    elements = rows * width + features + rows * features
    elements += rows * features if shape.get("residual") else 0
    weights = getattr(torch, shape["weights"]) if shape.get("weights") else dtype
    return 2 * rows * width * features, (
        elements * dtype.itemsize + features * width * weights.itemsize
    )


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
