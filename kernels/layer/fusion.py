"""Whole layers of fusion in few launches: products and norms around an attention.

A launch holds both streams, or both sequences, at once. The cross-modal layer:

    norm_first                              otherwise
    1  norm1                                1  in_proj, written as heads
    2  in_proj, written as heads            2  attention
    3  attention                            3  out_proj + bias + residual
    4  out_proj + bias + residual           4  norm1
    5  norm2                                5  linear1 + bias + activation
    6  linear1 + bias + activation          6  linear2 + bias + residual
    7  linear2 + bias + residual            7  norm2

that is 7, and one more for each further kernel of the attention; torch needs 9 a stream and the
attention. The cross-attention layer: 3 (q_proj and kv_proj, attention, out_proj), and one more for
norms, or for values with a weight of their own; torch needs 3 and the attention. A sum is rounded
once where torch rounds after every step.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastfusion.kernels.layer.linear import ACTIVATIONS, Product, linears, project_heads
from fastfusion.kernels.layer.norm import Rows, norms

Attend = Callable[..., Any]


def cross_attention_layer(call: Any, attend: Attend) -> Tensor:
    """The op's call; `attend` takes it, then queries, keys and values, of
    (batch, heads, length, head_dim)."""
    query, context = _normalized(call)
    asking, heads = Product(query, call.q_weight, call.q_bias), call.num_heads
    if context is None:
        k, v = call.key, call.value
        ((q,),) = project_heads((asking,), (1,), heads)
    else:
        asked = Product(context, call.kv_weight, call.kv_bias)
        if call.v_weight is None:
            (q,), (k, v) = project_heads((asking, asked), (1, 2), heads)
        else:
            values = context if call.value_context is None else call.value_context
            (q,), (k,) = project_heads((asking, asked), (1, 1), heads)
            ((v,),) = project_heads((Product(values, call.v_weight, call.v_bias),), (1,), heads)
    rows = _rows(attend(call, q, k, v))
    return linears((Product(rows, call.out_weight, call.out_bias, call.residual),))[0]


def _normalized(call: Any) -> tuple[Tensor, Tensor | None]:
    """The query and the context behind their norms, in one launch."""
    rows = []
    if call.query_norm_eps is not None:
        norm = call.query_norm_weight, call.query_norm_bias, call.query_norm_eps
        rows.append(Rows(call.query, *norm))
    if call.context_norm_eps is not None:
        norm = call.context_norm_weight, call.context_norm_bias, call.context_norm_eps
        rows.append(Rows(call.context, *norm))
    found = list(norms(*rows, rms=call.rms_norm)) if rows else []
    query = found.pop(0) if call.query_norm_eps is not None else call.query
    return query, found.pop() if found else call.context


def cross_modal_layer(call: Any, attend: Attend) -> tuple[Tensor, Tensor]:
    """The op's call; `attend` takes it, queries, keys, values and the values of the queries."""
    streams, first = call.streams(), call.norm_first
    both: Sequence[Tensor] = (call.visual, call.text)
    scored = _norms(streams, "norm1", both, call.first_eps()) if first else both
    (query, visual_value), (key, text_value) = project_heads(
        _products(streams, "in", scored), (2, 2), call.num_heads
    )
    attended = [_rows(t) for t in attend(call, query, key, text_value, visual_value)]
    both = linears(_products(streams, "out", attended, both))
    both = both if first else _norms(streams, "norm1", both, call.first_eps())
    hidden = _norms(streams, "norm2", both, call.second_eps()) if first else both
    hidden = linears(_products(streams, "linear1", hidden), ACTIVATIONS[call.activation])
    both = linears(_products(streams, "linear2", hidden, both))
    visual, text = both if first else _norms(streams, "norm2", both, call.second_eps())
    return visual, text


def _products(
    streams: Sequence[Any],
    part: str,
    inputs: Sequence[Tensor],
    residuals: Sequence[Tensor | None] = (None, None),
) -> tuple[Product, ...]:
    given = zip(inputs, streams, residuals, strict=True)
    return tuple(
        Product(x, getattr(s, f"{part}_weight"), getattr(s, f"{part}_bias"), residual)
        for x, s, residual in given
    )


def _norms(
    streams: Sequence[Any], part: str, inputs: Sequence[Tensor], epsilons: Sequence[float]
) -> Sequence[Tensor]:
    given = zip(inputs, streams, epsilons, strict=True)
    return norms(
        *(Rows(x, getattr(s, f"{part}_weight"), getattr(s, f"{part}_bias"), eps)
          for x, s, eps in given)
    )  # fmt: skip


def _rows(attended: Tensor) -> Tensor:
    """(batch, length, heads * head_dim), a view."""
    return attended.transpose(1, 2).flatten(2)
