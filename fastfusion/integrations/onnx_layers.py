"""The ops of whole layers in ONNX operators: products and norms around the attention of onnx.py.

Everything between the casts at both ends is float32.
"""

from collections.abc import Callable
from typing import Any

from fastfusion.integrations import onnx
from fastfusion.integrations.onnx_linear import ACTIVATIONS, normalized


def _product(op: Any, x: Any, weight: Any, bias: Any) -> Any:
    out = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return out if bias is None else op.Add(out, bias)


def _heads(op: Any, x: Any, weight: Any, parts: int, heads: int) -> tuple[Any, ...]:
    """(batch, heads, length, head_dim) of each part of what `weight` projected."""
    features = op.size(weight, 0)
    head_dim = -1 if features is None else features // (parts * heads)
    x = op.Reshape(x, [0, 0, parts, heads, head_dim])
    x = op.Transpose(x, perm=[2, 0, 3, 1, 4])
    return tuple(op.Gather(x, part, axis=0) for part in range(parts))


def _joined(op: Any, attended: Any, weight: Any) -> Any:
    """(batch, length, heads * head_dim), which `weight` projects next."""
    width = op.size(weight, 1)
    return op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), [0, 0, width or -1])


def _in_float32(op: Any, dtype: int, given: dict[str, Any], others: tuple[str, ...]) -> Any:
    """The tensors among the arguments; those that are not there are None."""
    return {
        name: None if value is None or name in others else onnx._cast(op, value, dtype, onnx._FLOAT)
        for name, value in given.items()
    }


def _cross_attention_layer(
    op: Any,
    *,
    attn_mask: Any,
    key_padding_mask: Any,
    num_heads: int,
    scale: float | None,
    query_norm_eps: float | None,
    context_norm_eps: float | None,
    rms_norm: bool,
    **tensors: Any,
) -> tuple[Any]:
    weights, dtype = tensors, op.dtype(tensors["query"])
    t = _in_float32(op, dtype, tensors, ())
    query, context, k, v = t["query"], t["context"], t["key"], t["value"]
    if query_norm_eps is not None:
        norm = t["query_norm_weight"], t["query_norm_bias"]
        query = normalized(op, query, *norm, query_norm_eps, rms_norm)
    q = _product(op, query, t["q_weight"], t["q_bias"])
    (q,) = _heads(op, q, weights["q_weight"], 1, num_heads)
    if context is not None:
        if context_norm_eps is not None:
            norm = t["context_norm_weight"], t["context_norm_bias"]
            context = normalized(op, context, *norm, context_norm_eps, rms_norm)
        kv = _product(op, context, t["kv_weight"], t["kv_bias"])
        k, v = _heads(op, kv, weights["kv_weight"], 2, num_heads)
    bias, visible = onnx._split(op, attn_mask)
    fused = op.fused and dtype == onnx._FLOAT and (scale is None or scale > 0.0)
    out, _ = onnx._rows(op, q, k, v, bias, visible, key_padding_mask, scale, 0.0, False, fused)
    out = _joined(op, out, weights["out_weight"])
    out = _product(op, out, t["out_weight"], t["out_bias"])
    if t["residual"] is not None:
        out = op.Add(out, t["residual"])
    return (onnx._cast(op, out, onnx._FLOAT, dtype),)


def _cross_modal_layer(
    op: Any,
    *,
    attn_mask: Any,
    visual_padding_mask: Any,
    text_padding_mask: Any,
    num_heads: int,
    activation: int,
    norm_first: bool,
    **given: Any,
) -> tuple[Any, ...]:
    names = ("visual", "text")
    epsilons = {name: value for name, value in given.items() if name.endswith("_eps")}
    dtype = op.dtype(given["visual"])
    t = _in_float32(op, dtype, given, tuple(epsilons))

    def product(name: str, part: str, x: Any) -> Any:
        return _product(op, x, t[f"{name}_{part}_weight"], t[f"{name}_{part}_bias"])

    def norm(name: str, part: str, x: Any, wanted: bool) -> Any:
        if not wanted:
            return x
        weights = t[f"{name}_{part}_weight"], t[f"{name}_{part}_bias"]
        return normalized(op, x, *weights, epsilons[f"{name}_{part}_eps"], False)

    (query, visual_value), (key, text_value) = (
        _heads(op, product(name, "in", norm(name, "norm1", t[name], norm_first)),
               given[f"{name}_in_weight"], 2, num_heads)
        for name in names
    )  # fmt: skip
    attended = onnx._both_ways(
        op, query, key, text_value, visual_value, attn_mask, visual_padding_mask,
        text_padding_mask, False, False, None, 0.0,
    )[:2]  # fmt: skip
    results = []
    for name, found in zip(names, attended, strict=True):
        rows = _joined(op, found, given[f"{name}_out_weight"])
        x = op.Add(t[name], product(name, "out", rows))
        x = norm(name, "norm1", x, not norm_first)
        hidden = product(name, "linear1", norm(name, "norm2", x, norm_first))
        hidden = ACTIVATIONS[activation](op, hidden)
        x = norm(name, "norm2", op.Add(x, product(name, "linear2", hidden)), not norm_first)
        results.append(onnx._cast(op, x, onnx._FLOAT, dtype))
    return tuple(results)


FORMULAS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "cross_attention_layer": _cross_attention_layer,
    "cross_modal_layer": _cross_modal_layer,
}
