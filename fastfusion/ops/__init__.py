"""The specifications of the ops: one file each with its maths, checks, reference and costs."""

from collections.abc import Callable
from typing import Any

from fastfusion.core import flops
from fastfusion.core.int8 import pack_int8, unpack_int8
from fastfusion.core.layers import Norm
from fastfusion.core.op import Op
from fastfusion.ops import attention_statistics as _statistics
from fastfusion.ops import bidirectional_attention as _bidirectional
from fastfusion.ops import cross_attention_layer as _cross_attention
from fastfusion.ops import cross_modal_layer as _cross_modal
from fastfusion.ops import decoder_layer as _decoder
from fastfusion.ops import encoder_layer as _encoder
from fastfusion.ops import linear as _linear
from fastfusion.ops import norm as _norm
from fastfusion.ops import scaled_dot_product_attention as _attention
from fastfusion.ops import varlen_attention as _varlen
from fastfusion.ops._parts import (
    AttentionWeights,
    FeedForwardWeights,
    StreamWeights,
    project_memory,
)

ATTENTION: tuple[Op, ...] = (_attention.OP, _bidirectional.OP, _varlen.OP)
# Attention with the products around it.
LAYERS: tuple[Op, ...] = (_cross_attention.OP, _cross_modal.OP)
ALL: tuple[Op, ...] = (*ATTENTION, _linear.OP, _norm.OP, _encoder.OP, _decoder.OP, *LAYERS)

# The public functions, by which `explain` is asked; statistics are no results of the dtype and the
# shapes of an op in `ALL`.
FUNCTIONS: dict[Callable[..., Any], Op] = {
    _attention.scaled_dot_product_attention: _attention.OP,
    _bidirectional.bidirectional_attention: _bidirectional.OP,
    _varlen.varlen_attention: _varlen.OP,
    _linear.linear: _linear.OP,
    _norm.norm: _norm.OP,
    _encoder.encoder_layer: _encoder.OP,
    _decoder.decoder_layer: _decoder.OP,
    _cross_attention.cross_attention_layer: _cross_attention.OP,
    _cross_modal.cross_modal_layer: _cross_modal.OP,
    _statistics.attention_statistics: _statistics.OP,
}

__all__ = [
    "ALL", "ATTENTION", "FUNCTIONS", "LAYERS", "AttentionWeights", "FeedForwardWeights", "Norm",
    "StreamWeights", "pack_int8", "project_memory", "unpack_int8",
]  # fmt: skip

flops.register()
