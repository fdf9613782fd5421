"""What the launchers of bidirectional attention share, forward and backward."""

from typing import Any

import torch

from fastfusion.core.score_policy import sides_of
from fastfusion.kernels.device.score_policy import BOOL_MASK, DROPOUT
from fastfusion.kernels.host.arguments import (
    operand,
    readable,
    rows_readable,
    score_options,
)
from fastfusion.kernels.host.tiles import cdiv, width


def common_options(call: Any) -> dict[str, Any]:
    """Arguments of every bidirectional kernel, forward and backward."""
    query, key, value, query_value = call[:4]
    sizes = (*query.shape[:3], key.shape[2])
    dims = {"": query, "V_": value, "QV_": query_value}
    return {
        "q": operand(query), "k": operand(key), "v": operand(value), "qv": operand(query_value),
        **score_options(call, sizes, call.query_padding_mask, call.key_padding_mask),
        **{f"{n}DIM": t.shape[3] for n, t in dims.items()},
        **{f"{n}WIDTH": width(t.shape[3]) for n, t in dims.items()},
        "heads": query.shape[1], "q_len": sizes[2], "kv_len": sizes[3],
    }  # fmt: skip


def shared_sizes(kinds: int, kv_len: int, loop: int) -> tuple[int, int]:
    """(rows of a step, padded keys) of a tile of scores; products sum over either.

    Beside a bool mask's bytes and random bits they are wrong below 32 (see `visible_keys`).
    """
    bools, drops = kinds & BOOL_MASK.value, kinds & DROPOUT.value
    least = 32 if bools and drops else 16
    return max(loop, least), max(width(kv_len), least)


def row_ranges(q_len: int, rows: int) -> tuple[int, int]:
    """(splits, rows per split) of the long side: 128 rows each, more where that makes over 32."""
    if q_len <= 256:
        return 1, max(q_len, 1)
    per_split = cdiv(max(128, cdiv(q_len, 32)), rows) * rows
    return cdiv(q_len, per_split), per_split


def exchanged(call: Any) -> Any:
    """The same call with queries and keys exchanged; a causal mask becomes a window, and a prefix
    one of rows."""
    mask, (left, right) = call.attn_mask, sides_of(call)
    return call._replace(
        query=call.key,
        key=call.query,
        value=call.query_value,
        query_value=call.value,
        attn_mask=None if mask is None else torch.atleast_2d(mask).transpose(-1, -2),
        query_padding_mask=call.key_padding_mask,
        key_padding_mask=call.query_padding_mask,
        is_causal=False,
        window_left=right,
        window_right=left,
        segment_ids_q=call.segment_ids_k,
        segment_ids_k=call.segment_ids_q,
    )


def prepared(call: Any) -> Any:
    """The call with rows and padding masks that the kernels can read in place."""
    return call._replace(
        query=rows_readable(call.query),
        key=rows_readable(call.key),
        value=rows_readable(call.value),
        query_value=rows_readable(call.query_value),
        query_padding_mask=readable(call.query_padding_mask),
        key_padding_mask=readable(call.key_padding_mask),
    )
