"""Linear layers, norms and the encoder layer in ONNX operators, around the attention of onnx.py."""

import math
from collections.abc import Callable
from typing import Any

from fastfusion.core.int8 import LEAST, LIMIT, PANEL, STEP, ZERO
from fastfusion.integrations.onnx import (
    _DOUBLE,
    _FLOAT,
    _and,
    _cast,
    _causal,
    _rows,
    _size,
    _split,
)


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
    x, residual = (None if t is None else _cast(op, t, dtype, _FLOAT) for t in (input, residual))
    out = _activated(op, x, dtype, weight, bias, weight_scale, activation)
    return (_cast(op, out if residual is None else op.Add(out, residual), _FLOAT, dtype),)


def _activated(
    op: Any, x: Any, dtype: int, weight: Any, bias: Any, weight_scale: Any, activation: int
) -> Any:
    """activation(x W^T + bias) in float32, of x that was of `dtype`, as the bias is."""
    if weight_scale is not None:
        out = _product_of_integers(op, x, weight, weight_scale)
    else:
        narrow = op.dtype(weight)
        if narrow != dtype:
            x = _cast(op, _cast(op, x, _FLOAT, narrow), narrow, _FLOAT)
        out = op.MatMul(x, op.Transpose(_cast(op, weight, narrow, _FLOAT), perm=[1, 0]))
    if bias is not None:
        out = op.Add(out, _cast(op, bias, dtype, _FLOAT))
    return ACTIVATIONS[activation](op, out)


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
ACTIVATIONS: tuple[Callable[[Any, Any], Any], ...] = (
    lambda op, x: x,
    lambda op, x: op.Relu(x),
    _gelu,
    _gelu_tanh,
    lambda op, x: op.Mul(x, op.Sigmoid(x)),
    lambda op, x: op.Mul(x, op.Sigmoid(op.Mul(x, 1.702))),
)


def _norm(
    op: Any, *, input: Any, weight: Any, bias: Any, residual: Any, eps: float, rms: bool
) -> tuple[Any]:
    dtype = op.dtype(input)
    x, weight, bias, residual = (
        None if t is None else _cast(op, t, dtype, _FLOAT) for t in (input, weight, bias, residual)
    )
    x = x if residual is None else op.Add(x, residual)
    return (_cast(op, normalized(op, x, weight, bias, eps, rms), _FLOAT, dtype),)


def normalized(op: Any, x: Any, weight: Any, bias: Any, eps: float, rms: bool) -> Any:
    """Of float32. Not by LayerNormalization, which asks for a weight and has no twin without a
    mean."""
    if not rms:
        x = op.Sub(x, op.ReduceMean(x, [-1], keepdims=1))
    squares = op.ReduceMean(op.Mul(x, x), [-1], keepdims=1)
    x = op.Div(x, op.Sqrt(op.Add(squares, float(eps))))
    x = x if weight is None else op.Mul(x, weight)
    return x if bias is None else op.Add(x, bias)


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
    """In float32 from its input to its output."""
    dtype = op.dtype(input)

    def linear(name: str, x: Any) -> Any:
        weight, bias, scale = (parts[f"{name}_{key}"] for key in ("weight", "bias", "scale"))
        number = activation if name == "linear1" else 0
        return _activated(op, x, dtype, weight, bias, scale, number)

    def norm(name: str, x: Any) -> Any:
        given = (parts[f"{name}_{key}"] for key in ("weight", "bias"))
        weight, bias = (None if t is None else _cast(op, t, dtype, _FLOAT) for t in given)
        return normalized(op, x, weight, bias, parts[f"{name}_eps"], False)

    def heads_of(name: str, x: Any, count: int) -> list[Any]:
        heads = op.Reshape(linear(name, x), [0, 0, count, num_heads, -1])
        heads = op.Transpose(heads, perm=[2, 0, 3, 1, 4])
        return [op.Gather(heads, part, axis=0) for part in range(count)]

    def attend(x: Any) -> Any:
        if parts["k_proj_weight"] is None:
            query, key, value = heads_of("in_proj", x, 3)
        else:
            names = ("in_proj", "k_proj", "v_proj")
            query, key, value = (heads_of(name, x, 1)[0] for name in names)
        bias, visible = _split(op, attn_mask)
        if is_causal:
            visible = _and(op, visible, _causal(op, query, key, None))
        fused = op.fused and dtype == _FLOAT
        given = (bias, visible, key_padding_mask, None, 0.0, False, fused)
        out, _ = _rows(op, query, key, value, *given)
        width = op.Concat([0, 0], _size(op, x, 2), axis=0)
        return linear("out_proj", op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), width))

    def feed_forward(x: Any) -> Any:
        return linear("linear2", linear("linear1", x))

    x = _cast(op, input, dtype, _FLOAT)
    if norm_first:
        x = op.Add(x, attend(norm("norm1", x)))
        x = op.Add(x, feed_forward(norm("norm2", x)))
    else:
        x = norm("norm1", op.Add(x, attend(x)))
        x = norm("norm2", op.Add(x, feed_forward(x)))
    return (_cast(op, x, _FLOAT, dtype),)


FORMULAS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "linear": _linear,
    "norm": _norm,
    "encoder_layer": _encoder_layer,
}
