"""The ops of whole layers in ONNX operators: products and norms around the attention of onnx.py.

Everything between the casts at both ends is float32.
"""

import re
from collections.abc import Callable
from typing import Any

from fastfusion.integrations import onnx
from fastfusion.integrations.onnx_linear import ACTIVATIONS, _activated, normalized


class _Products:
    """The linear layers of a call of `dtype` by name; of their input in float32.

    Args:
        given: all weights, biases and scales by name, as the call has them.
    """

    def __init__(self, op: Any, dtype: int, given: dict[str, Any]) -> None:
        self.op, self.dtype, self.given = op, dtype, given

    def __call__(self, name: str, x: Any) -> Any:
        weight, bias, scale = (self.given[f"{name}_{part}"] for part in ("weight", "bias", "scale"))
        return _activated(self.op, x, self.dtype, weight, bias, scale, 0)

    def features(self, name: str) -> int | None:
        """How many, where the program says it."""
        scale = self.given[f"{name}_scale"]
        size: int | None = self.op.size(self.given[f"{name}_weight"] if scale is None else scale, 0)
        return size

    def heads(self, name: str, x: Any, parts: int, heads: int) -> tuple[Any, ...]:
        """(batch, heads, length, head_dim) of each part of what `name` projects."""
        op, features = self.op, self.features(name)
        head_dim = -1 if features is None else features // (parts * heads)
        x = op.Reshape(self(name, x), [0, 0, parts, heads, head_dim])
        x = op.Transpose(x, perm=[2, 0, 3, 1, 4])
        return tuple(op.Gather(x, part, axis=0) for part in range(parts))


def _joined(op: Any, attended: Any, width: int | None) -> Any:
    """(batch, length, heads * head_dim)."""
    return op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), [0, 0, width or -1])


# Read by `_Products`, in dtypes of their own.
_OF_PRODUCTS = re.compile(r"(q|kv|v|in|out|linear[12])_(weight|bias|scale)$")


def _in_float32(op: Any, dtype: int, given: dict[str, Any]) -> dict[str, Any]:
    """The tensors among the arguments but those of products; those that are not there are None."""
    return {
        name: None if value is None else onnx._cast(op, value, dtype, onnx._FLOAT)
        for name, value in given.items()
        if not _OF_PRODUCTS.search(name)
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
    dtype = op.dtype(tensors["query"])
    product = _Products(op, dtype, tensors)
    t = _in_float32(op, dtype, tensors)
    query, context, k, v = t["query"], t["context"], t["key"], t["value"]
    if query_norm_eps is not None:
        norm = t["query_norm_weight"], t["query_norm_bias"]
        query = normalized(op, query, *norm, query_norm_eps, rms_norm)
    (q,) = product.heads("q", query, 1, num_heads)
    if context is not None:
        if context_norm_eps is not None:
            norm = t["context_norm_weight"], t["context_norm_bias"]
            context = normalized(op, context, *norm, context_norm_eps, rms_norm)
        if tensors["v_weight"] is None:
            k, v = product.heads("kv", context, 2, num_heads)
        else:
            values = context if t["value_context"] is None else t["value_context"]
            (k,) = product.heads("kv", context, 1, num_heads)
            (v,) = product.heads("v", values, 1, num_heads)
    bias, visible = onnx._split(op, attn_mask)
    fused = op.fused and dtype == onnx._FLOAT and (scale is None or scale > 0.0)
    out, _ = onnx._rows(op, q, k, v, bias, visible, key_padding_mask, scale, 0.0, False, fused)
    out = product("out", _joined(op, out, product.features("q")))
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
    t = _in_float32(op, dtype, {k: value for k, value in given.items() if k not in epsilons})
    product = _Products(op, dtype, given)

    def norm(name: str, part: str, x: Any, wanted: bool) -> Any:
        if not wanted:
            return x
        weights = t[f"{name}_{part}_weight"], t[f"{name}_{part}_bias"]
        return normalized(op, x, *weights, epsilons[f"{name}_{part}_eps"], False)

    (query, visual_value), (key, text_value) = (
        product.heads(f"{name}_in", norm(name, "norm1", t[name], norm_first), 2, num_heads)
        for name in names
    )  # fmt: skip
    attended = onnx._both_ways(
        op, query, key, text_value, visual_value, attn_mask, visual_padding_mask,
        text_padding_mask, False, False, None, 0.0,
    )[:2]  # fmt: skip
    results = []
    for name, found in zip(names, attended, strict=True):
        features = product.features(f"{name}_in")
        rows = _joined(op, found, None if features is None else features // 2)
        x = op.Add(t[name], product(f"{name}_out", rows))
        x = norm(name, "norm1", x, not norm_first)
        hidden = product(f"{name}_linear1", norm(name, "norm2", x, norm_first))
        hidden = ACTIVATIONS[activation](op, hidden)
        x = norm(name, "norm2", op.Add(x, product(f"{name}_linear2", hidden)), not norm_first)
        results.append(onnx._cast(op, x, onnx._FLOAT, dtype))
    return tuple(results)


FORMULAS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "cross_attention_layer": _cross_attention_layer,
    "cross_modal_layer": _cross_modal_layer,
}
