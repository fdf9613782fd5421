"""Whole layers, and blocks of layers, as BERT and ViT have made them popular, on parts of any name.

A whole layer is the op `encoder_layer` where all of its parts come to their formulas; a block is
some steps (_steps.py).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfusion.integrations.transformers import _steps
from fastfusion.integrations.transformers._interface import NAME
from fastfusion.nn._layers import TOGETHER, run_encoder_layer
from fastfusion.nn._linear import LINEAR, runs_on_cpu, weights_of
from fastfusion.nn._plain import are_bare, has_global_hooks, is_idle


def encoder_layer(
    x: Any,
    mask: Tensor | None,
    projections: Sequence[Any],
    others: Sequence[Any],
    norms: Sequence[Any],
    activation: Any,
    num_heads: int,
    norm_first: bool,
    around: Iterable[Any],
    dropouts: Iterable[Any],
) -> Tensor | None:
    """A whole layer by the op, or None where it may mean more than its formula.

    Args:
        x: (batch, length, width), whatever the layer was given.
        mask: bool (True = attend) or float, broadcastable to (batch, heads, length, length).
        projections: linear layers of query, key and value, or of all three at once; or of these
            what `weights_of` says, where calling them has been looked at.
        others: out_proj, linear1 and linear2.
        norms: of attention and of the feed-forward part.
        activation: module or function.
        num_heads, norm_first: as of the op.
        around: modules whose parts these are.
        dropouts: modules.
    """
    if not runs_on_cpu(x) or has_global_hooks():
        return None
    linears = [*(p for p in projections if not isinstance(p, tuple)), *others]
    name = _steps.activation_name(activation)
    if name is None or any([type(module) not in LINEAR for module in linears]):
        return None
    if not are_bare((*linears, *norms)) or not all(map(_steps.is_quiet, around)):
        return None
    if not all(map(is_idle, dropouts)):
        return None
    if mask is not None and not (mask.dtype == torch.bool or mask.dtype == x.dtype):
        return None
    products = [p if isinstance(p, tuple) else weights_of(p) for p in projections]
    if len(products) == 1:
        products += (TOGETHER, TOGETHER)
    products += map(weights_of, others)
    return run_encoder_layer(x, products, norms, num_heads, name, norm_first, mask, None, False)


def bert_layer(
    x: Any, mask: Any, attention: Any, intermediate: Any, output: Any, inside: Any = None
) -> Tensor | None:
    """Self-attention and feed-forward of BERT's structure and names by the op, or None.

    Args:
        x: whatever the layer was given.
        mask: whatever it was given to be added to scores, or with `inside` what `resolves`.
        attention, intermediate, output: parts of the layer.
        inside: the part of `attention` that projects and attends by the attention interface;
            `attention.self` by default, which does so by itself.
    """
    if inside is None:
        if not _steps.is_added(mask):
            return None
        inside = attention.self
        inner = [inside.dropout]
    else:
        inner = []
    return encoder_layer(
        x, mask,
        (inside.query, inside.key, inside.value),
        (attention.output.dense, intermediate.dense, output.dense),
        (attention.output.LayerNorm, output.LayerNorm),
        intermediate.intermediate_act_fn, inside.num_attention_heads, False,
        (attention, inside, attention.output, intermediate, output),
        (*inner, attention.output.dropout, output.dropout),
    )  # fmt: skip


def resolves(inside: Any, mask: Any) -> bool:
    """Whether the attention interface, as an attention is set up, comes to softmax over what this
    mask leaves, with nothing causal about it."""
    name = inside.config._attn_implementation
    if mask is None:
        return name == "eager" or (name in (NAME, "sdpa") and not inside.is_causal)
    if not isinstance(mask, Tensor):
        return False
    return name in (NAME, "sdpa") or (name == "eager" and mask.is_floating_point())


def attention(
    x: Tensor, context: Tensor, mask: Tensor | None, module: Any, num_heads: int
) -> Tensor:
    """Of x to a context, by the query, key and value of a module: (batch, length, width)."""
    return _steps.attend(
        _steps.heads(_steps.linear(module.query, x), num_heads),
        _steps.heads(_steps.linear(module.key, context), num_heads),
        _steps.heads(_steps.linear(module.value, context), num_heads),
        mask,
    )


def add_and_norm(x: Tensor, residual: Tensor, output: Any) -> Tensor:
    """norm(dense(x) + residual), of a module that has both."""
    return _steps.norm(output.LayerNorm, _steps.linear(output.dense, x, residual=residual))


def feed_forward(x: Tensor, intermediate: Any, output: Any) -> Tensor:
    """The second half of a layer of BERT."""
    hidden = _steps.linear(intermediate.dense, x, intermediate.intermediate_act_fn)
    return add_and_norm(hidden, x, output)
