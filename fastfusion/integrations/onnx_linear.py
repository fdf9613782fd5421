"""Linear layers, norms and the encoder layer in ONNX operators, around the attention of onnx.py."""

import math
from collections.abc import Callable
from typing import Any

from fastfusion.core.int8 import LEAST, LIMIT, PANEL, STEP, ZERO
from fastfusion.integrations.onnx import _DOUBLE, _FLOAT, _attention, _cast, _size


def _linear(
    op: Any,
    *,
    input: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    weight_scale: Any,
    activation: int,
) -> tuple[Any]:
    dtype = op.dtype(input)
    bias, residual = (None if t is None else _cast(op, t, dtype, _FLOAT) for t in (bias, residual))
    if weight_scale is not None:
        out = _product_of_integers(op, _cast(op, input, dtype, _FLOAT), weight, weight_scale)
    else:
        narrow = op.dtype(weight)
        input = _cast(op, _cast(op, input, dtype, narrow), narrow, _FLOAT)
        out = op.MatMul(input, op.Transpose(_cast(op, weight, narrow, _FLOAT), perm=[1, 0]))
    if bias is not None:
        out = op.Add(out, bias)
    out = _ACTIVATIONS[activation](op, out)
    if residual is not None:
        out = op.Add(out, residual)
    return (_cast(op, out, _FLOAT, dtype),)


def _product_of_integers(op: Any, x: Any, weight: Any, scale: Any) -> Any:
    """Its sums are exact in float64, where MatMulInteger saturates on some processors; and a row
    with NaN or infinity, which makes one of its numbers NaN, becomes NaN."""
    largest = op.ReduceMax(op.Abs(x), [-1], keepdims=1)
    inverse = op.Where(op.Less(largest, LEAST), 0.0, op.Div(LIMIT, largest))
    numbers = op.Cast(op.Round(op.Mul(x, inverse)), to=_DOUBLE)
    parts, panels, steps = (_size(op, weight, dim) for dim in range(3))
    width, part_features = _size(op, x, -1), op.Div(_size(op, scale, 0), parts)
    padded = op.Concat(parts, op.Mul(panels, [PANEL]), op.Mul(steps, [STEP]), axis=0)
    rows = op.Reshape(op.Transpose(weight, perm=[0, 1, 3, 2, 4]), padded)
    rows = op.Slice(rows, [0, 0], op.Concat(part_features, width, axis=0), [1, 2])
    rows = op.Cast(op.Reshape(rows, op.Concat([-1], width, axis=0)), to=_DOUBLE)
    rows = op.Sub(rows, op.Cast(float(ZERO), to=_DOUBLE))
    sums = op.Cast(op.MatMul(numbers, op.Transpose(rows, perm=[1, 0])), to=_FLOAT)
    return op.Mul(sums, op.Mul(op.Div(largest, LIMIT), scale))


def _gelu(op: Any, x: Any) -> Any:
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Erf(op.Mul(x, math.sqrt(0.5))), 1.0))


def _gelu_tanh(op: Any, x: Any) -> Any:
    """0.5 x (1 + tanh(u)) = x sigmoid(2 u)."""
    factor = op.Add(op.Mul(op.Mul(x, x), 0.044715), 1.0)
    twice = op.Mul(op.Mul(x, factor), 2.0 * math.sqrt(2.0 / math.pi))
    return op.Mul(x, op.Sigmoid(twice))


# In the order of fastfusion.ops.linear.
_ACTIVATIONS: tuple[Callable[[Any, Any], Any], ...] = (
    lambda op, x: x,
    lambda op, x: op.Relu(x),
    _gelu,
    _gelu_tanh,
    lambda op, x: op.Mul(x, op.Sigmoid(x)),
)


def _norm(
    op: Any, *, input: Any, weight: Any, bias: Any, residual: Any, eps: float, rms: bool
) -> tuple[Any]:
    dtype = op.dtype(input)
    x, weight, bias, residual = (
        None if t is None else _cast(op, t, dtype, _FLOAT) for t in (input, weight, bias, residual)
    )
    if residual is not None:
        x = op.Add(x, residual)
    if not rms:
        x = op.Sub(x, op.ReduceMean(x, [-1], keepdims=1))
    squares = op.ReduceMean(op.Mul(x, x), [-1], keepdims=1)
    x = op.Div(x, op.Sqrt(op.Add(squares, eps)))
    x = x if weight is None else op.Mul(x, weight)
    x = x if bias is None else op.Add(x, bias)
    return (_cast(op, x, _FLOAT, dtype),)


def _encoder_layer(
    op: Any,
    *,
    input: Any,
    attn_mask: Any,
    key_padding_mask: Any,
    num_heads: int,
    activation: int,
    norm_first: bool,
    is_causal: bool,
    **parts: Any,
) -> tuple[Any]:
    def linear(name: str, x: Any, residual: Any = None) -> Any:
        return _linear(
            op, input=x, residual=residual, weight=parts[f"{name}_weight"],
            bias=parts[f"{name}_bias"], weight_scale=parts[f"{name}_scale"],
            activation=activation if name == "linear1" else 0,
        )[0]  # fmt: skip

    def norm(name: str, x: Any) -> Any:
        given = {key: parts[f"{name}_{key}"] for key in ("weight", "bias", "eps")}
        return _norm(op, input=x, residual=None, rms=False, **given)[0]

    width = _size(op, input, 2)
    heads = linear("in_proj", norm("norm1", input) if norm_first else input)
    shape = op.Concat([0, 0, 3, num_heads, -1], axis=0)
    heads = op.Transpose(op.Reshape(heads, shape), perm=[2, 0, 3, 1, 4])
    query, key, value = (op.Squeeze(op.Slice(heads, [i], [i + 1], [0]), [0]) for i in range(3))
    out = _attention(
        op, query=query, key=key, value=value, attn_mask=attn_mask,
        key_padding_mask=key_padding_mask, is_causal=is_causal, scale=None,
    )[0]  # fmt: skip
    rows = op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), op.Concat([0, 0], width, axis=0))
    y = linear("out_proj", rows, input)
    if norm_first:
        return (linear("linear2", linear("linear1", norm("norm2", y)), y),)
    y = norm("norm1", y)
    return (norm("norm2", linear("linear2", linear("linear1", y), y)),)


FORMULAS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "linear": _linear,
    "norm": _norm,
    "encoder_layer": _encoder_layer,
}
