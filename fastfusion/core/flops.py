"""FLOP formulas of the ops, for torch.utils.flop_counter.

They are registered when that module is imported, by whoever counts: it imports Triton where that is
installed, 160 ms that every `import fastfusion` would pay.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastfusion.core.on_import import on_import

Shape = Sequence[int]


def attention(query: Shape, key: Shape, value: Shape, *given: Any, **kwargs: Any) -> int:
    batch, heads, q_len, dim = query
    return 2 * batch * heads * q_len * key[2] * (dim + value[3])


def attention_backward(
    grad_out: Any, grad_lse: Any, query: Shape, key: Shape, value: Shape, *given: Any, **kwargs: Any
) -> int:
    # Scores again, dP, dV, dQ and dK: five products against the forward's two.
    batch, heads, q_len, dim = query
    return 2 * batch * heads * q_len * key[2] * (3 * dim + 2 * value[3])


def bidirectional(
    query: Shape, key: Shape, value: Shape, query_value: Shape, *given: Any, **kwargs: Any
) -> int:
    batch, heads, q_len, dim = query
    return 2 * batch * heads * q_len * key[2] * (dim + value[3] + query_value[3])


def bidirectional_backward(*shapes: Any, **kwargs: Any) -> int:
    # Scores, dP and the gradient of the values for each direction, dQ and dK: seven products.
    query, key, value, query_value = shapes[4:8]
    batch, heads, q_len, dim = query
    return 2 * batch * heads * q_len * key[2] * (3 * dim + 2 * value[3] + 2 * query_value[3])


def _pairs(cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any) -> int:
    """Scores of all sequences; of fake tensors, which have no values, as if all were longest."""
    if isinstance(cu_seqlens_q, FakeTensor) or cu_seqlens_q.is_meta:
        return (cu_seqlens_q.shape[0] - 1) * max_seqlen_q * max_seqlen_k
    return int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff().long()).sum())


def varlen(query: Any, key: Any, value: Any, attn_mask: Any, *given: Any, **kwargs: Any) -> int:
    return 2 * query.shape[1] * _pairs(*given[:4]) * (query.shape[2] + value.shape[2])


def varlen_backward(
    grad_out: Any, grad_lse: Any, query: Any, key: Any, value: Any, attn_mask: Any, *given: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    dims = 3 * query.shape[2] + 2 * value.shape[2]
    return 2 * query.shape[1] * _pairs(*given[:4]) * dims


# From tensors: what they cost is in the values of the offsets.
_RAW_FORMULAS: dict[str, Callable[..., int]] = {
    "varlen": varlen,
    "varlen_forward": varlen,
    "varlen_out": varlen,
    "varlen_backward": varlen_backward,
    "triton_varlen": varlen,
    "triton_varlen_forward": varlen,
    "triton_varlen_backward": varlen_backward,
}
_FORMULAS: dict[str, Callable[..., int]] = {
    "attention": attention,
    "attention_forward": attention,
    "attention_out": attention,
    "attention_backward": attention_backward,
    "bidirectional": bidirectional,
    "bidirectional_forward": bidirectional,
    "bidirectional_out": bidirectional,
    "bidirectional_backward": bidirectional_backward,
    "cuda_attention_forward": attention,
    "cuda_attention_out": attention,
    "cuda_bidirectional_forward": bidirectional,
    "cuda_bidirectional_out": bidirectional,
    "triton_attention": attention,
    "triton_attention_forward": attention,
    "triton_attention_backward": attention_backward,
    "triton_bidirectional": bidirectional,
    "triton_bidirectional_forward": bidirectional,
    "triton_bidirectional_backward": bidirectional_backward,
}


def _register(counter: Any) -> None:
    for formulas, raw in ((_FORMULAS, False), (_RAW_FORMULAS, True)):
        for name, formula in formulas.items():
            if hasattr(torch.ops.fastfusion, name):
                counter.register_flop_formula(getattr(torch.ops.fastfusion, name), get_raw=raw)(
                    lambda *a, out_shape=None, out_val=None, f=formula, **k: f(*a, **k)
                )


def register() -> None:
    """Now if the counter is imported already, otherwise when it is."""
    on_import("torch.utils.flop_counter", _register)
