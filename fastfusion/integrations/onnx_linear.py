"""Linear layers, norms and Transformer layers in ONNX operators, around attention of onnx.py."""

import math
from collections.abc import Callable
from typing import Any

from fastfusion.core.int8 import LEAST, LIMIT, PANEL, STEP, ZERO
from fastfusion.integrations.onnx import (
    _DOUBLE,
    _FLOAT,
    _INT64,
    _cast,
    _kinds,
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


class _Parts:
    """The linear layers, norms and attentions of a Transformer layer, in float32 in between.

    Args:
        input: of the layer.
        parts: its weights, biases, scales and epsilons by name.
        heads: of its attentions.
        first: the activation of linear1.
    """

    def __init__(self, op: Any, input: Any, parts: dict[str, Any], heads: int, first: int) -> None:
        self.op, self.parts, self.heads, self.first = op, parts, heads, first
        self.dtype, self.width = op.dtype(input), _size(op, input, 2)

    def linear(self, name: str, x: Any) -> Any:
        weight, bias, scale = (self.parts[f"{name}_{key}"] for key in ("weight", "bias", "scale"))
        number = self.first if name == "linear1" else 0
        return _activated(self.op, x, self.dtype, weight, bias, scale, number)

    def norm(self, name: str, x: Any, wanted: bool) -> Any:
        if not wanted:
            return x
        given = (self.parts[f"{name}_{key}"] for key in ("weight", "bias"))
        weight, bias = (None if t is None else _cast(self.op, t, self.dtype, _FLOAT) for t in given)
        return normalized(self.op, x, weight, bias, self.parts[f"{name}_eps"], False)

    def heads_of(self, name: str, x: Any, count: int) -> list[Any]:
        op = self.op
        heads = op.Reshape(self.linear(name, x), [0, 0, count, self.heads, -1])
        heads = op.Transpose(heads, perm=[2, 0, 3, 1, 4])
        return [op.Gather(heads, part, axis=0) for part in range(count)]

    def separate(self, x: Any, *names: str) -> list[Any]:
        """Query, key and value from the first of the layers, or from one each."""
        if self.parts[f"{names[1]}_weight"] is None:
            return self.heads_of(names[0], x, 3)
        return [self.heads_of(name, x, 1)[0] for name in names]

    def attend(self, name: str, heads: Any, mask: Any, padding: Any, causal: bool) -> Any:
        """Projected by `name`."""
        op, (query, key, value) = self.op, heads
        bias, visible = _split(op, mask)
        if causal:
            _, visible = _kinds(op, query, key, None, visible, None, True)
        fused = op.fused and self.dtype == _FLOAT
        out, _ = _rows(op, query, key, value, bias, visible, padding, None, 0.0, False, fused)
        width = op.Concat([0, 0], self.width, axis=0)
        return self.linear(name, op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), width))

    def feed_forward(self, x: Any) -> Any:
        return self.linear("linear2", self.linear("linear1", x))


def _same_sequence(op: Any, offsets: Any, total: Any) -> Any:
    """bool (total, total), True where two tokens are of one sequence, behind as many ends."""
    tokens, ends = op.Range(0, total, 1), op.Slice(offsets, [1], [2**31 - 1], [0])
    ends = op.Cast(ends, to=_INT64)
    behind = op.LessOrEqual(op.Unsqueeze(ends, [0]), op.Unsqueeze(tokens, [1]))
    number = op.ReduceSum(op.Cast(behind, to=_INT64), [1], keepdims=0)
    return op.Equal(op.Unsqueeze(number, [1]), op.Unsqueeze(number, [0]))


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
    cu_seqlens: Any = None,
    **parts: Any,
) -> tuple[Any]:
    """In float32 from its input to its output."""
    dtype = op.dtype(input)
    if cu_seqlens is not None:
        attn_mask = _same_sequence(op, cu_seqlens, op.Squeeze(_size(op, input, 1), [0]))
    layer = _Parts(op, input, parts, num_heads, activation)
    x = _cast(op, input, dtype, _FLOAT)
    heads = layer.separate(layer.norm("norm1", x, norm_first), "in_proj", "k_proj", "v_proj")
    out = layer.attend("out_proj", heads, attn_mask, key_padding_mask, is_causal)
    x = layer.norm("norm1", op.Add(x, out), not norm_first)
    x = op.Add(x, layer.feed_forward(layer.norm("norm2", x, norm_first)))
    return (_cast(op, layer.norm("norm2", x, not norm_first), _FLOAT, dtype),)


def _decoder_layer(
    op: Any,
    *,
    input: Any,
    memory: Any,
    memory_key: Any,
    memory_value: Any,
    memory_mask: Any,
    attn_mask: Any,
    key_padding_mask: Any,
    memory_padding_mask: Any,
    key_cache: Any,
    value_cache: Any,
    num_heads: int,
    past_length: int,
    activation: int,
    norm_first: bool,
    is_causal: bool,
    **parts: Any,
) -> tuple[Any]:
    """Likewise; it has no cache, to which another op writes."""
    dtype = op.dtype(input)
    layer = _Parts(op, input, parts, num_heads, activation)
    x = _cast(op, input, dtype, _FLOAT)
    heads = layer.separate(layer.norm("norm1", x, norm_first), "self_q", "self_k", "self_v")
    out = layer.attend("self_out", heads, attn_mask, key_padding_mask, is_causal)
    x = layer.norm("norm1", op.Add(x, out), not norm_first)
    if memory is not None or memory_key is not None:
        (query,) = layer.heads_of("cross_q", layer.norm("norm2", x, norm_first), 1)
        if memory is not None:
            asked = _cast(op, memory, dtype, _FLOAT)
            key, value = (layer.heads_of(name, asked, 1)[0] for name in ("cross_k", "cross_v"))
        else:
            key, value = (_cast(op, t, dtype, _FLOAT) for t in (memory_key, memory_value))
        out = layer.attend(
            "cross_out", (query, key, value), memory_mask, memory_padding_mask, False
        )
        x = layer.norm("norm2", op.Add(x, out), not norm_first)
    x = op.Add(x, layer.feed_forward(layer.norm("norm3", x, norm_first)))
    return (_cast(op, layer.norm("norm3", x, not norm_first), _FLOAT, dtype),)


FORMULAS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "linear": _linear,
    "norm": _norm,
    "encoder_layer": _encoder_layer,
    "decoder_layer": _decoder_layer,
}
