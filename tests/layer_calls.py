"""What the tests of the layer ops share: flat calls, plain formulas, and their suite.

In a flat call each tensor has a name of its own, so that tests can walk over them: parts of a tuple
are "context.0", "query_norm.weight", "text_weights.norm1.bias".
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from suite import OpSuite, Target, plain_attention, relayout
from test_bidirectional_attention import plain_bidirectional
from torch import Tensor

import fastfusion as ff
from fastfusion.ops.linear import ACTIVATIONS

Call = dict[str, Any]
TUPLES: dict[str, Callable[..., Any]] = {
    "context": lambda *pair: pair,
    "memory": lambda *pair: pair,
    "cache": lambda *pair: pair,
    "norms": lambda *norms: norms,
    "self_attn": ff.ops.AttentionWeights,
    "cross_attn": ff.ops.AttentionWeights,
    "feed_forward": ff.ops.FeedForwardWeights,
    "visual_weights": ff.ops.StreamWeights,
    "text_weights": ff.ops.StreamWeights,
} | dict.fromkeys(("query_norm", "context_norm", "norm1", "norm2", "0", "1", "2"), ff.ops.Norm)


def flat(call: Call) -> Call:
    """Arguments of a public function, tuples in parts."""
    found: Call = {}
    for name, value in call.items():
        if isinstance(value, tuple):
            fields = getattr(value, "_fields", range(len(value)))
            parts = flat(dict(zip(map(str, fields), value, strict=True)))
            found |= {f"{name}.{part}": each for part, each in parts.items()}
        else:
            found[name] = value
    return found


def nested(call: Call) -> Call:
    """The arguments of a flat call."""
    groups: dict[str, Call] = {}
    for name, value in call.items():
        first, _, rest = name.partition(".")
        groups.setdefault(first, {})[rest] = value
    return {
        name: parts[""] if "" in parts else TUPLES[name](*nested(parts).values())
        for name, parts in groups.items()
    }


def cross_attention_layer(**call: Any) -> Tensor:
    return ff.cross_attention_layer(**nested(call))


def cross_modal_layer(**call: Any) -> tuple[Tensor, Tensor]:
    return ff.cross_modal_layer(**nested(call))


def heads_of(projected: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    batch, length, features = projected.shape
    shape = (batch, length, parts, heads, features // (parts * heads))
    return projected.reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)


def plain_cross_attention(**call: Any) -> tuple[Tensor, ...]:
    """As torch.nn would compute it, every step in the dtype of the inputs."""
    given = nested(call)

    def normalized(x: Tensor, norm: Any) -> Tensor:
        if norm is None:
            return x
        if not given.get("rms_norm"):
            return F.layer_norm(x, x.shape[-1:], *norm)
        x = F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
        return x if norm.bias is None else x + norm.bias

    heads, context = given["num_heads"], given["context"]
    query = normalized(given["query"], given.get("query_norm"))
    (q,) = heads_of(F.linear(query, given["q_weight"], given["q_bias"]), 1, heads)
    if isinstance(context, Tensor):
        context = normalized(context, given.get("context_norm"))
        parts = 2 if given.get("v_weight") is None else 1
        both = heads_of(F.linear(context, given["kv_weight"], given["kv_bias"]), parts, heads)
        if parts == 1:
            values = given.get("value_context")
            values = context if values is None else values
            both += heads_of(F.linear(values, given["v_weight"], given.get("v_bias")), 1, heads)
        context = both
    out, _ = plain_attention(
        q, *context, given.get("attn_mask"), scale=given.get("scale"),
        key_padding_mask=given.get("key_padding_mask"),
    )  # fmt: skip
    rows = out.transpose(1, 2).flatten(2)
    result = F.linear(rows, given["out_weight"], given["out_bias"])
    return (result if given.get("residual") is None else result + given["residual"],)


def plain_cross_modal(**call: Any) -> tuple[Tensor, ...]:
    """Likewise."""
    given = nested(call)
    weights = given["visual_weights"], given["text_weights"]
    tokens, first = [given["visual"], given["text"]], given.get("norm_first", False)
    activate = ACTIVATIONS[given.get("activation", "relu")]

    def norm(x: Tensor, norm: Any, wanted: bool) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *norm) if wanted else x

    (query, visual_value), (key, text_value) = (
        heads_of(F.linear(norm(x, w.norm1, first), w.in_weight, w.in_bias), 2, given["num_heads"])
        for x, w in zip(tokens, weights, strict=True)
    )
    attended = plain_bidirectional(
        query, key, text_value, visual_value, attn_mask=given.get("attn_mask"),
        query_padding_mask=given.get("visual_padding_mask"),
        key_padding_mask=given.get("text_padding_mask"),
    )[:2]  # fmt: skip
    results = []
    for x, w, found in zip(tokens, weights, attended, strict=True):
        rows = found.transpose(1, 2).flatten(2)
        x = norm(x + F.linear(rows, w.out_weight, w.out_bias), w.norm1, not first)
        hidden = F.linear(norm(x, w.norm2, first), w.linear1_weight, w.linear1_bias)
        x = x + F.linear(activate(hidden), w.linear2_weight, w.linear2_bias)
        results.append(norm(x, w.norm2, not first))
    return tuple(results)


class LayerSuite(OpSuite):
    """The shared suite on a layer, of flat calls."""

    with_lse: Any = {}

    @classmethod
    def inputs(cls, shape: Call, dtype: torch.dtype, seed: int) -> Call:
        return flat(cls.op.inputs(shape, dtype, seed=seed))

    @classmethod
    def reference(cls, **call: Any) -> tuple[Tensor, ...]:
        return cls.op.reference(**nested(call))

    def takes(self, target: Target, call: Call) -> bool:
        """CUDA's kernels are those of 16 bits, and project the context themselves, at once."""
        refused = target.backend == "cuda" and (
            call[next(iter(call))].dtype == torch.float32
            or "context.0" in call
            or call.get("v_weight") is not None
        )
        if refused:
            with pytest.raises(ff.BackendUnavailableError, match="is left to Triton"):
                target.call(type(self).function, **call)
        return not refused

    @staticmethod
    def relayout(tensor: Tensor, layout: str) -> Tensor:
        """Equal tokens would make a softmax constant, and gradients rounding noise."""
        if layout == "repeated" and tensor.dim() == 3:
            return tensor[:1].expand(tensor.shape)
        return relayout(tensor, layout)


def leaves_of(call: Call) -> dict[str, Tensor]:
    """The tensors of a flat call that may have a gradient."""
    return {k: v for k, v in call.items() if isinstance(v, Tensor) and v.is_floating_point()}
