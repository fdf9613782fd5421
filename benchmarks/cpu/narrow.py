"""torch's own linear layers with narrow weights, as peers of ours."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfusion.ops.linear import ACTIVATIONS

from ..common import peers
from ..common.peers import Adapter, Arguments, Skipped

# What ff.quantize calls weights, and a shape of the op.
NAMES = {"int8": "int8", "bf16": "bfloat16"}


def _finish(call: Arguments, product: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The activation and residual of a call behind its product."""
    residual, activate = call.get("residual"), ACTIVATIONS[call["activation"]]

    def run() -> Tensor:
        result = activate(product())
        return result if residual is None else result + residual

    return run


def bfloat16(call: Arguments) -> Callable[[], Tensor]:
    """torch's linear layer in bfloat16, inputs too."""
    return peers.linear({k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in call.items()})


def _scales(weight: Tensor) -> Tensor:
    return weight.abs().amax(1) / 127


def dynamic(call: Arguments) -> Callable[[], Tensor]:
    """torch's dynamically quantised linear layer: weights by feature, inputs by tensor."""
    input, weight = call["input"], call["weight"]
    if not any(name != "none" for name in torch.backends.quantized.supported_engines):
        raise Skipped("this torch has no engine for it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and what there is
        quantized = torch.quantize_per_channel(
            weight, _scales(weight).double(), torch.zeros(len(weight), dtype=torch.int64), 0,
            torch.qint8,
        )  # fmt: skip
        packed = torch.ops.quantized.linear_prepack(quantized, call["bias"])
    op: Any = torch.ops.quantized.linear_dynamic.default
    return _finish(call, lambda: op(input, packed, False))


def int_mm(call: Arguments) -> Callable[[], Tensor]:
    """torch's product of integers, inputs quantised by token with torch's operations."""
    input, weight, bias = call["input"], call["weight"], call["bias"]
    scales = _scales(weight)
    integers = (weight / scales[:, None]).round().to(torch.int8).t()

    def product() -> Tensor:
        rows = input.flatten(0, -2)
        scale = rows.abs().amax(1, keepdim=True) / 127
        sums = torch._int_mm((rows / scale).round_().to(torch.int8), integers)
        return (sums * scale).mul_(scales).add_(bias).view(*input.shape[:-1], -1)

    return _finish(call, product)


LINEAR: dict[str, dict[str, Adapter]] = {
    "int8": {"torch dynamic": dynamic, "torch _int_mm": int_mm},
    "bf16": {"torch bfloat16": bfloat16},
}
