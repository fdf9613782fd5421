"""Attention of few tokens to many, with the projections of the many done on the side of the few.

    q . (W_k c + b_k) = (W_k^T q) . c + q . b_k
    sum_j p_j (W_v c_j + b_v) = W_v (sum_j p_j c_j) + b_v

The q . b_k are one number for all keys of a query, which softmax does not see; the p_j add up to
1. So the context is attended to as it is, by queries as wide as it: 20 words to 577 patches are a
quarter of the operations.
"""

from typing import Any

import torch
from torch import Tensor

from fastfusion.integrations.transformers import _steps

# How many times fewer operations pay: those of the folded products run further below the peak than
# linear layers, which are faster with weights in bfloat16, and with 8-bit integers always faster.
_WORTH = {torch.float32: 2.5, torch.bfloat16: 3.75}


def attend(
    query: Tensor, context: Tensor, module: Any, mask: Tensor | None, scale: float | None = None
) -> Tensor | None:
    """Attention to `module.key` and `module.value` of a context, or None where it is not less work.

    Args:
        query: (batch, heads, q_len, head_dim).
        context: (batch, kv_len, width).
        module: whose keys and values have one width.
        mask: float, broadcastable to (batch, heads, q_len, kv_len).
        scale: as of `scaled_dot_product_attention`.

    Returns:
        (batch, q_len, heads * head_dim).
    """
    batch, heads, few, size = query.shape
    many, width = context.shape[1:]
    folded = heads * few * width * (size + many)
    parts = module.key, module.value
    if context.dtype != torch.float32 or not all(_steps.is_known(part, context) for part in parts):
        return None
    worth = max(_WORTH.get(_steps.weight_type(part), torch.inf) for part in parts)
    if worth * folded > many * width * heads * size:
        return None
    (of_key, _), (of_value, bias) = (_steps.weight_and_bias(part) for part in parts)
    if mask is not None:
        mask = mask.expand(batch, heads, few, many)
    query = query * (size**-0.5 if scale is None else scale)
    to_context = of_key.unflatten(0, (heads, size))
    of_context = of_value.unflatten(0, (heads, size)).transpose(1, 2)
    gathered = []
    for i in range(batch):  # the same bits alone and among batch mates
        keys = torch.bmm(query[i], to_context).flatten(0, 1)
        scores = torch.mm(keys, context[i].t()).unflatten(0, (heads, few))
        if mask is not None:
            scores += mask[i]
        values = torch.mm(torch.softmax(scores, -1).flatten(0, 1), context[i])
        gathered.append(torch.bmm(values.unflatten(0, (heads, few)), of_context))
    out = torch.stack(gathered).transpose(1, 2).flatten(2)
    return out if bias is None else out.add_(bias)
