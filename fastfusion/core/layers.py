"""What the ops of whole layers share: norms, and the checks and formulas of their parts."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfusion.core import arguments
from fastfusion.core import reference as formulas


class Norm(NamedTuple):
    """A LayerNorm over the last dimension, or an RMSNorm where an op says so.

    Attributes:
        weight, bias: (width,), or None.
        eps: added to the variance.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


def is_plain_norm(norm: Any) -> bool:
    """Whether an eager call may be tried with this norm as it came."""
    return type(norm) is Norm and type(norm.eps) is float and norm.eps >= 0.0


def tensors_of(**given: Any) -> dict[str, Any]:
    """What is given by name, the parts of tuples by their own: `norm.weight`, `context.0`."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, tuple):
            names = getattr(value, "_fields", range(len(value)))
            parts = {f"{name}.{n}": v for n, v in zip(names, value, strict=True) if n != "eps"}
            found |= tensors_of(**parts)
        elif value is not None:
            found[name] = value
    return found


def cast(dtype: torch.dtype | None, value: Any) -> Any:
    """`arguments.autocast_cast` of an argument, or of all in a tuple but scales of weights."""
    if dtype is None or not isinstance(value, tuple):
        return arguments.autocast_cast(dtype, value)[0]
    if not hasattr(value, "_fields"):
        return tuple(cast(dtype, part) for part in value)
    return type(value)(
        *(
            part if name.endswith("_scale") else cast(dtype, part)
            for name, part in zip(value._fields, value, strict=True)
        )
    )


# ---- checks, in the words of people


def check_sequence(name: str, tensor: Tensor, batch: int, sizes: str) -> None:
    if tensor.dim() != 3 or tensor.shape[2] == 0:
        raise ValueError(f"{name} must be (batch, length, width), width above 0, got {sizes}")
    if tensor.shape[0] != batch:
        raise ValueError(f"{name} must have the batch size of the other sequence, got {sizes}")


def check_linear(
    name: str, weight: Any, bias: Any, features: int, width: int, what: str, sizes: str
) -> None:
    """A weight (features, width) and a bias (features,); `what` says where the sizes come from."""
    if weight is None:
        raise TypeError(f"{name}_weight must be a Tensor, got NoneType")
    if tuple(weight.shape) != (features, width):
        raise ValueError(f"{name}_weight must be {what}, {features, width}, got {sizes}")
    if bias is not None and tuple(bias.shape) != (features,):
        raise ValueError(f"{name}_bias must be ({features},), got {sizes}")


def check_is_norm(name: str, norm: Any) -> None:
    if not isinstance(norm, Norm):
        raise TypeError(f"{name} must be a fastfusion.ops.Norm, got {type(norm).__name__}")


def check_norm(name: str, norm: Norm, width: int, sizes: str) -> None:
    for part, tensor in (("weight", norm.weight), ("bias", norm.bias)):
        if tensor is not None and tuple(tensor.shape) != (width,):
            raise ValueError(f"{name}.{part} must be ({width},), got {sizes}")
    if isinstance(norm.eps, bool) or not isinstance(norm.eps, int | float):
        raise TypeError(f"{name}.eps must be a float, got {type(norm.eps).__name__}")
    if not norm.eps >= 0.0:
        raise ValueError(f"{name}.eps must not be negative, got {norm.eps}")


def check_heads(num_heads: Any, width: int, what: str, sizes: str) -> None:
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an int, got {type(num_heads).__name__}")
    if num_heads < 1 or width < 1 or width % num_heads:
        raise ValueError(f"num_heads must divide {what}, {width}, got {num_heads}; {sizes}")


# ---- the same as conditions of a call


def vector_fits(vector: Tensor | None, size: Any) -> Iterator[Any]:
    if vector is not None:
        yield vector.dim() == 1
        yield vector.shape[0] == size


def sequence_fits(tensor: Tensor, batch: Any, length: Any, width: Any) -> Iterator[Any]:
    yield tensor.dim() == 3
    for size, expected in zip(tensor.shape, (batch, length, width), strict=True):
        yield size == expected


# ---- formulas, in the dtype that sums are taken in


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(
        x, formulas.cast(weight, x.dtype), None if bias is None else formulas.cast(bias, x.dtype)
    )


def normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> Any:
    weight, bias = (None if t is None else formulas.cast(t, x.dtype) for t in (weight, bias))
    if not rms:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    x = F.rms_norm(x, x.shape[-1:], weight, eps)
    return x if bias is None else x + bias


def heads_of(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(batch, heads, length, head_dim) of each part of a projection's features."""
    batch, length, features = x.shape
    x = x.reshape(batch, length, parts, heads, features // (parts * heads))
    return x.permute(2, 0, 3, 1, 4).unbind(0)


def rows_of(attended: Tensor) -> Tensor:
    """(batch, length, heads * head_dim) of what heads gathered."""
    return attended.transpose(1, 2).flatten(2)
