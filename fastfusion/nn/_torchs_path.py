"""torch's own multi-head attention, for what the fused path does not take and for its errors."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def torchs_slow_path(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """What torch.nn.MultiheadAttention.forward does outside its C++ path, for `module`, a
    `MultiheadAttention`; but `out_proj` is called."""
    batch_first = module.batch_first and query.dim() == 3
    for mask in (attn_mask, key_padding_mask):
        if mask is not None:
            torch.is_floating_point(mask)  # TypeError for what is no tensor
    key_padding_mask = F._canonical_mask(
        mask=key_padding_mask,
        mask_name="key_padding_mask",
        other_type=F._none_or_dtype(attn_mask),
        other_name="attn_mask",
        target_type=query.dtype,
    )
    attn_mask = F._canonical_mask(
        mask=attn_mask,
        mask_name="attn_mask",
        other_type=None,
        other_name="",
        target_type=query.dtype,
        check_other=False,
    )
    if batch_first:
        # The function below looks at which of the three are one tensor.
        if key is value:
            if query is key:
                query = key = value = query.transpose(1, 0)
            else:
                query, key = query.transpose(1, 0), key.transpose(1, 0)
                value = key
        else:
            query, key, value = (t.transpose(1, 0) for t in (query, key, value))
    recorded = bool(module._recorders)
    in_proj_weight, in_proj_bias, *separate = module._plain_in_proj(query.dtype)
    out, weights = F.multi_head_attention_forward(
        query,
        key,
        value,
        module.embed_dim,
        module.num_heads,
        in_proj_weight,
        in_proj_bias,
        module.bias_k,
        module.bias_v,
        module.add_zero_attn,
        module.dropout,
        # The identity, of the query's kind (DTensors do not mix with tensors), leaves out_proj to
        # be called.
        query.new_ones(module.embed_dim).diag(),
        None,
        training=module.training,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights or recorded,
        attn_mask=attn_mask,
        use_separate_proj_weight=not module._qkv_same_embed_dim,
        **dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), separate, strict=True)),
        average_attn_weights=average_attn_weights and not recorded,
        is_causal=is_causal,
    )
    if recorded:
        weights = module._hand_out(weights, need_weights, average_attn_weights)
    out = module.out_proj(out)
    return (out.transpose(1, 0) if batch_first else out), weights
