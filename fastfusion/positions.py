"""Indices of relative position tables, for `position_index` of `ff.scaled_dot_product_attention`::

    index = ff.positions.t5_buckets(q_len, kv_len)                # of T5: buckets of offsets
    index = ff.positions.swin_window((7, 7))                      # of Swin: offsets in a window
    out = ff.scaled_dot_product_attention(
        query, key, value, position_table=table, position_index=index
    )

The table is (heads, entries): the transpose of T5's `relative_attention_bias.weight` and of Swin's
and BEiT's `relative_position_bias_table`, of which no copy is needed.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["beit_window", "swin_window", "t5_buckets"]
_ALIGNMENTS = ("top_left", "bottom_right")


def t5_buckets(
    q_len: int,
    kv_len: int,
    *,
    bidirectional: bool = True,
    num_buckets: int = 32,
    max_distance: int = 128,
    alignment: str = "top_left",
    device: Any = None,
) -> Tensor:
    """Buckets of T5 (Raffel et al., "Exploring the Limits of Transfer Learning with a Unified
    Text-to-Text Transformer", 2020, section 2.1), as `T5Attention._relative_position_bucket` of
    transformers has them: one for each short distance, wider ones up to `max_distance`, and one for
    all that is further.

    Args:
        q_len, kv_len: lengths of queries and keys.
        bidirectional: as in the encoder, where half of the buckets are for keys behind the query;
            otherwise all of these are in bucket 0, as in the decoder, whose mask hides them.
        num_buckets: of the table, at least 2, or 4 if `bidirectional`.
        max_distance: from where on all distances are in the last bucket.
        alignment: query i stands beside key i, or with "bottom_right" the last query beside the
            last key, as where keys and values of earlier tokens are kept.

    Returns:
        int64 (q_len + kv_len - 1,), by the offset of key to query, from 1 - q_len to kv_len - 1:
        memory linear in the length.

    Raises:
        ValueError: numbers that give no buckets.
    """
    if alignment not in _ALIGNMENTS:
        raise ValueError(f"alignment must be one of {_ALIGNMENTS}, got {alignment!r}")
    buckets = num_buckets // 2 if bidirectional else num_buckets
    exact = buckets // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"num_buckets must be at least {4 if bidirectional else 2} and max_distance above half "
            f"of those of a side, got {num_buckets} and {max_distance}"
        )
    diagonal = kv_len - q_len if alignment == "bottom_right" else 0
    offset = torch.arange(1 - q_len, kv_len, device=device) - diagonal
    first = (offset > 0).to(torch.int64) * buckets if bidirectional else torch.zeros_like(offset)
    distance = offset.abs() if bidirectional else -offset.clamp(max=0)
    # In float32 and this order of operations, or a distance at an edge would be in another bucket.
    share = torch.log(distance.float() / exact) / math.log(max_distance / exact)
    far = exact + (share * (buckets - exact)).clamp(max=buckets - 1).to(torch.int64)
    return first + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


def swin_window(window_size: Sequence[int], device: Any = None) -> Tensor:
    """Entries of Swin's table (Liu et al., "Swin Transformer", 2021, equation 4): one for each
    offset of two places of a window, as `relative_position_index` of torchvision and timm.

    Args:
        window_size: (height, width), the tokens of the window row by row; 3 of them for video.

    Returns:
        int64 (tokens, tokens), for a table of prod(2 * size - 1) entries.

    Raises:
        ValueError: a size that is not positive.
    """
    sizes = [int(size) for size in window_size]
    if not sizes or min(sizes) < 1:
        raise ValueError(f"window_size must be positive, got {tuple(window_size)}")
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in sizes), indexing="ij")
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, axis in zip(sizes, axes, strict=True):
        places = axis.flatten()
        index = index * (2 * size - 1) + (places[:, None] - places + size - 1)
    return index


def beit_window(window_size: Sequence[int], device: Any = None) -> Tensor:
    """Entries of BEiT's table (Bao et al., "BEiT", 2022): Swin's, with a class token before the
    patches and three entries behind the others: of the class token to patches, of patches to it,
    and of itself.

    Args:
        window_size: (height, width) of the patches, row by row.

    Returns:
        int64 (1 + patches, 1 + patches), for a table of (2 * height - 1) * (2 * width - 1) + 3
        entries.

    Raises:
        ValueError: a size that is not positive.
    """
    patches = swin_window(window_size, device)
    entries = math.prod(2 * int(size) - 1 for size in window_size)
    index = torch.nn.functional.pad(patches, (1, 0, 1, 0))
    index[0, :], index[:, 0], index[0, 0] = entries, entries + 1, entries + 2
    return index
