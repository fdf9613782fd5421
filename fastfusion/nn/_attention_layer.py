"""`MultiheadAttention` by the op `cross_attention_layer`, one call: eager inference on a CPU.

As with linear layers (_linear.py), anything that calling a part does beside its formula leaves the
call to the parts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfusion.core.arguments import PLAIN
from fastfusion.nn._linear import fused, is_linear, weights_of
from fastfusion.nn._plain import has_global_hooks
from fastfusion.nn._quantized import Operands, part
from fastfusion.ops import cross_attention_layer as _layer

_ABSENT: Any = (None, None, None)


def attention_layer(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    same: bool,
    batch_first: bool,
    in_proj: Sequence[Operands],
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor | None:
    """What `module.out_proj` makes of the attention, in the shape of the query, or None where it
    may mean more than its formula.

    Args:
        module: a `MultiheadAttention` that neither drops anything out nor adds keys.
        query: (batch, q_len, width), or if not `batch_first` (q_len, batch, width), on which CPU
            kernels run.
        key, value: likewise.
        same: whether these are one tensor.
        in_proj: one projection that is three side by side, or three.
        attn_mask, key_padding_mask: as of the op.
    """
    output = module.__dict__["_modules"]["out_proj"]
    of_output = weights_of(output)
    if of_output is None or not is_linear(output) or has_global_hooks():
        return None
    own = [tensor for operands in in_proj for tensor in operands if tensor is not None]
    if not PLAIN.issuperset(map(type, own)):  # others may not be cut into parts
        return None
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in own]):
        return None
    if len(in_proj) == 3:
        (w_q, s_q, b_q), (w_k, s_k, b_k), (w_v, s_v, b_v) = in_proj
    else:
        whole, width = in_proj[0], module.num_heads * module.head_dim
        w_q, s_q, b_q = part(whole, 0, 1, width)
        w_k, s_k, b_k = part(whole, 1, 3 if same else 2, width)
        w_v, s_v, b_v = _ABSENT if same else part(whole, 2, 3, width)
    if not batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    w_out, s_out, b_out = of_output
    tensors = [
        query, key, None, None, w_q, b_q, w_k, b_k, w_out, b_out, None, None, None, None, None,
        attn_mask, key_padding_mask,
    ]  # fmt: skip
    numbers = (module.num_heads, None, None, None, False)
    others = [s_q, s_k, s_out, s_v, w_v, b_v, None if same else value]
    result = fused(_layer, tensors, numbers, others)
    return result if batch_first or result is None else result.transpose(0, 1).contiguous()
