"""A linear layer with weights of 8-bit integers or of bfloat16."""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfusion.core.arguments import autocast_dtype
from fastfusion.core.int8 import pack_int8, pack_integers, unpack_int8
from fastfusion.nn import _nested
from fastfusion.nn._tracing import be_leaf
from fastfusion.ops.linear import MAX_INT8_WIDTH, linear

WEIGHTS = ("int8", "bf16")
# Weight, weight_scale and bias, as `linear` takes them.
Operands = tuple[Tensor, Tensor | None, Tensor | None]


def product(
    input: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`F.linear`, with weights that may be narrower than the input."""
    if input.is_nested and (weight_scale is not None or input.dtype != weight.dtype):
        packed = _nested.pack(input)
        if packed is None:
            raise ValueError("a nested input must be (batch, ragged length, width)")
        return _nested.unpack(product(packed.values, weight, weight_scale, bias), packed)
    if weight_scale is None:
        if input.dtype == weight.dtype or autocast_dtype(input.device.type) is not None:
            return F.linear(input, weight, bias)
        if input.dim() == 2:
            # Whose sequences are not known: each row is one, so that others do not change its bits.
            return linear(input.unsqueeze(1), weight, bias).squeeze(1)
    return linear(input, weight, bias, weight_scale=weight_scale)


class QuantizedLinear(nn.Module):
    """y = x W^T + b with a weight that takes a quarter or half of the memory of float32.

    Of 8-bit integers ("int8"): W is rounded to 255 steps for each feature and x, as it comes, for
    each token, see :func:`fastfusion.linear`. It is for inference: a backward through it raises
    RuntimeError. Of bfloat16 ("bf16"): x is rounded to bfloat16, sums and bias stay float32.

    Integers are kept as kernels read them, in the buffer `packed`; a state_dict holds `weight` int8
    (out_features, in_features), `weight_scale` float32 (out_features,) and `bias`, a copy that is
    packed again when it is loaded. With "bf16" it holds `weight` bfloat16 and `bias`. Casting the
    module casts the bias alone, and a bfloat16 weight.

    Args:
        weight: (out_features, in_features), as of torch.nn.Linear; float32 for "bf16".
        bias: (out_features,); a Parameter stays the same one.
        weights: "int8" or "bf16".
        parts: how many weights of equal size stand side by side in `weight`, to be used alone too.

    Raises:
        TypeError, ValueError: a weight or bias that is not as above, or NaN or infinity in a weight
            that integers are to be made of.
    """

    packed: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, weights: str = "int8", *, parts: int = 1
    ) -> None:
        super().__init__()
        check_weights(weights)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"weight must be a floating Tensor, got {kind}")
        if weight.dim() != 2:
            shape = tuple(weight.shape)
            raise ValueError(f"weight must be (out_features, in_features), got {shape}")
        self.out_features, self.in_features = weight.shape
        if bias is not None and not isinstance(bias, Tensor):
            raise TypeError(f"bias must be a Tensor or None, got {type(bias).__name__}")
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"bias must be ({self.out_features},), got {tuple(bias.shape)}")
        self.weights, self.parts = weights, parts
        if weights == "int8":
            if self.in_features > MAX_INT8_WIDTH:
                raise ValueError(
                    f"weight may be {MAX_INT8_WIDTH} wide at most, got {self.in_features}"
                )
            packed, scale = pack_int8(weight, parts)
            self.register_buffer("packed", packed, persistent=False)
            self.register_buffer("weight_scale", scale)
        else:
            if weight.dtype != torch.float32:
                raise TypeError(f"weight must be float32 to become bfloat16, got {weight.dtype}")
            self.weight = nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach())
        self.register_parameter("bias", bias)
        be_leaf(self)

    @classmethod
    def from_linear(cls, linear: nn.Linear, weights: str = "int8", *, parts: int = 1) -> Self:
        """A layer with the weight of `linear`, quantised, and its bias itself.

        Raises:
            TypeError, ValueError: as of the class; or what is no torch.nn.Linear.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        return cls(linear.weight, linear.bias, weights, parts=parts).train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features), or nested (batch, ragged, in_features), to (..., out_features)
        of the same dtype, which is that of the bias."""
        return product(input, *self.operands())

    def operands(self, first: int = 0, end: int | None = None) -> Operands:
        """Weight, weight_scale and bias of the parts from `first` to before `end`, as
        :func:`fastfusion.linear` takes them."""
        scale = self._buffers.get("weight_scale")
        weight = self.weight if scale is None else self.packed
        if end is None:
            return weight, scale, self.bias
        return part((weight, scale, self.bias), first, end, self.out_features // self.parts)

    def dequantize(self) -> Tensor:
        """The weight that is computed with: float32 (out_features, in_features)."""
        if self.weights == "bf16":
            return self.weight.detach().float()
        return self._integers().float() * self.weight_scale[:, None]

    def _integers(self) -> Tensor:
        return unpack_int8(self.packed, self.in_features, self.out_features // self.parts)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weights={self.weights}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)  # moved, but not cast
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.weights == "int8":
            destination[f"{prefix}weight"] = self._integers()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        def load(given: dict[str, Any]) -> None:
            nn.Module._load_from_state_dict(
                self, given, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                error_msgs,
            )  # fmt: skip

        if self.weights != "int8":
            return load(state_dict)
        key = f"{prefix}weight"
        load({name: value for name, value in state_dict.items() if name != key})
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = self.weight_scale.float()
        weight = state_dict.get(key)
        size = (self.out_features, self.in_features)
        if weight is None:
            if strict:
                missing_keys.append(key)
        elif weight.dtype != torch.int8:
            error_msgs.append(
                f"{key} must be int8, as the state_dict of a quantised layer has it, got "
                f"{weight.dtype}: load such weights before fastfusion.quantize."
            )
        elif tuple(weight.shape) != size:
            error_msgs.append(
                f"size mismatch for {key}: copying a param with shape {tuple(weight.shape)} from "
                f"checkpoint, the shape in current model is {size}."
            )
        elif local_metadata.get("assign_to_params_buffers", False):
            self.packed = pack_integers(weight, self.parts)
        else:
            self.packed.copy_(pack_integers(weight, self.parts))


def part(operands: Operands, first: int, end: int, features: int) -> Operands:
    """Some of the weights that stand side by side in one, each of so many features."""
    weight, scale, bias = operands
    rows = slice(first * features, end * features)
    bias = None if bias is None else bias[rows]
    if scale is None:
        return weight[rows], None, bias
    return weight[first:end], scale[rows], bias


def check_weights(weights: Any) -> None:
    if weights not in WEIGHTS:
        names = ", ".join(repr(name) for name in WEIGHTS)
        raise ValueError(f"weights must be one of {names}, got {weights!r}")
