"""The specifications of the ops: one file each with its maths, checks, reference and costs."""

from collections.abc import Callable
from typing import Any

from fastfusion.core import flops
from fastfusion.core.int8 import pack_int8 as pack_int8
from fastfusion.core.int8 import unpack_int8 as unpack_int8
from fastfusion.core.op import Op
from fastfusion.ops import bidirectional_attention as _bidirectional
from fastfusion.ops import encoder_layer as _encoder_layer
from fastfusion.ops import linear as _linear
from fastfusion.ops import norm as _norm
from fastfusion.ops import scaled_dot_product_attention as _attention
from fastfusion.ops import varlen_attention as _varlen

ATTENTION: tuple[Op, ...] = (_attention.OP, _bidirectional.OP, _varlen.OP)
ALL: tuple[Op, ...] = (*ATTENTION, _linear.OP, _norm.OP, _encoder_layer.OP)

# The public functions, by which `explain` is asked.
FUNCTIONS: dict[Callable[..., Any], Op] = {
    _attention.scaled_dot_product_attention: _attention.OP,
    _bidirectional.bidirectional_attention: _bidirectional.OP,
    _varlen.varlen_attention: _varlen.OP,
    _linear.linear: _linear.OP,
    _norm.norm: _norm.OP,
    _encoder_layer.encoder_layer: _encoder_layer.OP,
}

flops.register()
