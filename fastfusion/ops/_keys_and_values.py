"""The keys and values of a cross-attention layer: given, or projected by one weight or by two.

Of arguments and calls that name them as `cross_attention_layer` does.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastfusion.core import layers
from fastfusion.core import reference as formulas
from fastfusion.ops._parts import check_any_product, heads_fit, part_of

# What is None beside a `kv_weight` for both, and what beside keys and values that are given.
_OF_VALUES = ("v_bias", "v_scale", "value_context")
_OF_CONTEXT = ("kv_weight", "kv_bias", "kv_scale", "v_weight", *_OF_VALUES, "context_norm")


def projections(call: Any) -> list[tuple[str, Tensor, int]]:
    """The linear layers by name, what each is a product of, and what it gives: 2 for keys and
    values; of a context that is not projected already."""
    if call.context is None:
        return []
    if call.v_weight is None:
        return [("kv", call.context, 2)]
    return [("kv", call.context, 1), ("v", _value_context(call), 1)]


def _value_context(given: Any) -> Any:
    return given.context if given.value_context is None else given.value_context


# ---- a check, in the words of people


def check(given: Any, leading: tuple[int, int], inner: int, sizes: str) -> int:
    """How many keys there are; `leading` is batch and heads."""
    if isinstance(given.context, tuple):
        return _check_given(given, leading, inner // leading[1], sizes)
    context, values = given.context, _value_context(given)
    layers.check_sequence("context", context, leading[0], sizes)
    if given.v_weight is None:
        _check_absent(given, _OF_VALUES, "without v_weight", sizes)
        check_any_product(
            "kv", part_of(given, "kv"), context, 2 * inner, "(2 * inner, context_dim)", sizes
        )
    else:
        layers.check_sequence("value_context", values, leading[0], sizes)
        if values.shape[1] != context.shape[1]:
            raise ValueError(f"value_context must be as long as context, got {sizes}")
        if given.value_context is not None:
            _check_absent(given, ("context_norm",), "beside value_context", sizes)
        for name, x, width in (("kv", context, "context_dim"), ("v", values, "value_dim")):
            check_any_product(name, part_of(given, name), x, inner, f"(inner, {width})", sizes)
    if given.context_norm is not None:
        layers.check_norm("context_norm", given.context_norm, context.shape[2], sizes)
    length: int = context.shape[1]
    return length


def _check_absent(given: Any, names: tuple[str, ...], where: str, sizes: str) -> None:
    for name in names:
        if getattr(given, name) is not None:
            raise ValueError(f"{name} must be None {where}; {sizes}")


def _check_given(given: Any, leading: tuple[int, int], head_dim: int, sizes: str) -> int:
    if len(given.context) != 2:
        raise TypeError("context must be a Tensor, or a pair of keys and values")
    _check_absent(given, _OF_CONTEXT, "where context is projected already", sizes)
    key, value = given.context
    if key.dim() != 4 or tuple(key.shape) != (*leading, *key.shape[2:3], head_dim):
        raise ValueError(
            f"the keys of context must be {(*leading, 'kv_len', head_dim)}, got {sizes}"
        )
    if value.shape != key.shape:
        raise ValueError(f"the values of context must have the shape of its keys, got {sizes}")
    length: int = key.shape[2]
    return length


# ---- the same as conditions of a call


def conditions(call: Any, batch: Any, inner: Any) -> Iterator[Any]:
    kv_len, found = call.kv_len(), projections(call)
    if found:
        yield call.key is None and call.value is None and call.kv_weight is not None
        yield call.value_context is None or call.context_norm_eps is None
        for _, x, _ in found:
            yield x.shape[2] > 0
            yield from layers.sequence_fits(x, batch, kv_len, x.shape[2])
        for name, x, parts in found:
            product = call.linear(name, x)
            yield from product.conditions()
            yield product.features == parts * inner
        yield from layers.vector_fits(call.context_norm_weight, call.context.shape[2])
        yield from layers.vector_fits(call.context_norm_bias, call.context.shape[2])
    else:
        yield call.kv_weight is None and call.kv_bias is None and call.kv_scale is None
        yield call.context_norm_eps is None and call.v_weight is None
        yield call.key is not None and call.value is not None
        size = (batch, call.num_heads, kv_len, inner // call.num_heads)
        yield from heads_fit(call.query, size, call.key, call.value)
    if call.v_weight is None:
        yield call.v_bias is None and call.v_scale is None and call.value_context is None


# ---- the reference


def keys_and_values(
    call: Any,
    dtype: torch.dtype,
    project: Callable[[str, Tensor], Tensor],
    normalize: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """(batch, heads, kv_len, head_dim) each.

    Args:
        dtype: of the tokens that `project`, of a layer's name and tokens, and `normalize` take.
    """

    def tokens(x: Tensor) -> Tensor:
        if call.key_padding_mask is not None:  # a NaN would get into the gradient of kv_weight
            x = x.masked_fill(call.key_padding_mask[..., None], 0.0)
        return formulas.cast(x, dtype)

    if call.context is None:
        return formulas.cast(call.key, dtype), formulas.cast(call.value, dtype)
    heads = call.num_heads
    context = tokens(call.context)
    if call.context_norm_eps is not None:
        context = normalize(context)
    if call.v_weight is None:
        key, value = layers.heads_of(project("kv", context), 2, heads)
        return key, value
    values = context if call.value_context is None else tokens(call.value_context)
    (key,) = layers.heads_of(project("kv", context), 1, heads)
    (value,) = layers.heads_of(project("v", values), 1, heads)
    return key, value
