"""The references of the layers of cross-attention where weights are narrower than the tokens.

Their products round an operand, so that what a step hands to the next counts: each is one of the
ops `linear`, `norm` and an attention, in the dtype of the tokens, as in `encoder_layer`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastfusion.core import layers
from fastfusion.core import reference as formulas
from fastfusion.ops import linear as _linear
from fastfusion.ops import norm as _norm
from fastfusion.ops._keys_and_values import keys_and_values
from fastfusion.ops._parts import attend


def cross_attention_in_steps(call: Any) -> Tensor:
    """Of a call of `cross_attention_layer`."""

    def linear(name: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _run(call.linear(name, x, residual))

    def norm(name: str, x: Tensor, eps: float | None) -> Tensor:
        return x if eps is None else _normalized(call, name, x, eps, call.rms_norm)

    heads = call.num_heads
    asking = norm("query_norm", call.query, call.query_norm_eps)
    (query,) = layers.heads_of(linear("q", asking), 1, heads)
    key, value = keys_and_values(
        call, call.query.dtype, linear, lambda x: norm("context_norm", x, call.context_norm_eps)
    )
    attended = attend(
        call.attention_dtype, None, query, key, value, call.attn_mask, call.key_padding_mask,
        call.scale,
    )  # fmt: skip
    return linear("out", attended, call.residual)


def cross_modal_in_steps(call: Any, attend: Callable[..., Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Of a call of `cross_modal_layer`.

    Args:
        attend: the reference of the attention inside: takes the call, what scores are made of and
            the values of the text, and the values of the image.
    """
    streams, tokens = call.streams(), [call.visual, call.text]

    def norm(of: Sequence[Tensor], name: str, epsilons: tuple[float, float]) -> list[Tensor]:
        return [
            _normalized(stream, name, x, eps)
            for x, stream, eps in zip(of, streams, epsilons, strict=True)
        ]

    scored = norm(tokens, "norm1", call.first_eps()) if call.norm_first else tokens
    query, visual_value, key, text_value = (
        formulas.cast(part, call.attention_dtype)
        for x, stream in zip(scored, streams, strict=True)
        for part in layers.heads_of(_run(stream.linear("in", x)), 2, call.num_heads)
    )
    attended = attend(call, query, key, text_value, visual_value)
    for i, (stream, found) in enumerate(zip(streams, attended, strict=True)):
        rows = layers.rows_of(formulas.cast(found, tokens[i].dtype))
        tokens[i] = _run(stream.linear("out", rows, tokens[i]))
    if not call.norm_first:
        tokens = norm(tokens, "norm1", call.first_eps())
    fed = norm(tokens, "norm2", call.second_eps()) if call.norm_first else tokens
    for i, (stream, x) in enumerate(zip(streams, fed, strict=True)):
        hidden = _run(stream.linear("linear1", x, activation=call.activation))
        tokens[i] = _run(stream.linear("linear2", hidden, tokens[i]))
    return tuple(tokens if call.norm_first else norm(tokens, "norm2", call.second_eps()))


def _run(call: _linear.Call) -> Tensor:
    result: Tensor = _linear.run_reference(call, False)
    return result


def _normalized(of: Any, name: str, x: Tensor, eps: float, rms: bool = False) -> Tensor:
    weight, bias = getattr(of, f"{name}_weight"), getattr(of, f"{name}_bias")
    result: Tensor = _norm.run_reference(_norm.Call(x, weight, bias, None, eps, rms), False)
    return result
