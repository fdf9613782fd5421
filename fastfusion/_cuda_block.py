"""`CrossAttention` in three launches of the CUDA kernels, as one op: inference on short sequences.

1 q_proj and kv_proj, 2 attention, 3 out_proj. The kernels read the weights where they are.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastfusion.backends import cuda
from fastfusion.core.op import forced_backend

DTYPES = frozenset((torch.float16, torch.bfloat16))
# Rows have to fit into the shared memory of every GPU, 16 at a time.
MAX_WIDTH = 2048
# Of either sequence. Beyond it the tiles of a library for large matrices are better; the choice
# looks at no batch size, so that batch mates change no bit.
MAX_LENGTH = 512


def runs_on(module: Any, query: Tensor, context: Tensor) -> bool:
    """Whether the CUDA kernels are what runs a `CrossAttention`: where they are asked for, and on a
    GPU that Triton does not take."""
    if torch.compiler.is_compiling():
        return False
    forced = forced_backend()
    if forced != "cuda" and (forced is not None or not query.is_cuda):
        return False
    return (
        query.dtype in DTYPES
        and max(query.shape[1], context.shape[1]) <= MAX_LENGTH
        and max(query.shape[2], context.shape[2], module.num_heads * module.head_dim) <= MAX_WIDTH
        and module.head_dim <= cuda.MAX_DIM
        and not cuda.refuses_tensor(query)
    )


def cross_attention(
    module: Any,
    query: Tensor,
    context: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> Tensor:
    """`CrossAttention.forward` where it `runs_on`; a bool `attn_mask` is True where a query
    attends."""
    q, kv, out = module.q_proj, module.kv_proj, module.out_proj
    result: Tensor = block()(
        query, context, q.weight, q.bias, kv.weight, kv.bias, out.weight, out.bias, attn_mask,
        key_padding_mask, None, None, None, None, None, module.num_heads, None, None, None, False,
    )  # fmt: skip
    return result


@cache
def block() -> Any:
    """The op, once its library is loaded.

    residual + out_proj(attention(q_proj(norm(query)), kv_proj(norm(context)))), where residual and
    norms are left out if they are not given. The
    arguments are those of csrc/torch/cuda_cross_attention_layer.cpp.
    """
    torch.library.register_fake("fastfusion::cuda_cross_attention_block", _fake)
    return torch.ops.fastfusion.cuda_cross_attention_block.default


def _fake(query: Tensor, context: Tensor, *others: Any) -> Tensor:
    out_weight = others[4]
    return query.new_empty(*query.shape[:2], out_weight.shape[0])
