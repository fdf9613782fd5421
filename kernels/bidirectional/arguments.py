"""What the launchers of bidirectional attention share, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from fastfusion.kernels.host.arguments import readable, rows_readable, score_options, strides
from fastfusion.kernels.host.tiles import cdiv, width

NAMES = ("q", "k", "v", "qv")


def paddings(call: Any) -> dict[str, Any]:
    """Both padding masks as the kernels take them."""
    options: dict[str, Any] = {}
    for side, mask in (("q", call.query_padding_mask), ("k", call.key_padding_mask)):
        options[f"{side}_padding_ptr"] = call.query if mask is None else mask
        options[f"{side}_padding_batch"] = 0 if mask is None else mask.stride(0)
        options[f"{side.upper()}_PADDING"] = mask is not None
    return options


def common_options(call: Any, turned: bool = False) -> dict[str, Any]:
    """Arguments of every bidirectional kernel, forward and backward; `turned`: of an `exchanged`
    call."""
    query, key, value, query_value = call[:4]
    sizes = (*query.shape[:3], key.shape[2])
    run_time, compile_time = score_options(call, sizes)
    if turned:  # the diagonal counts from queries to keys
        run_time["diagonal"] *= -1
        compile_time["CAUSAL"] *= -1
    for name in ("padding_ptr", "padding_batch"):
        del run_time[name]
    del compile_time["PADDING"]
    dims = {"": query, "V_": value, "QV_": query_value}
    return {
        **{f"{n}_ptr": t for n, t in zip(NAMES, (query, key, value, query_value), strict=True)},
        **strides(q=query, k=key, v=value, qv=query_value), **run_time, **compile_time,
        **paddings(call),
        **{f"{n}DIM": t.shape[3] for n, t in dims.items()},
        **{f"{n}WIDTH": width(t.shape[3]) for n, t in dims.items()},
        "heads": query.shape[1], "q_len": sizes[2], "kv_len": sizes[3],
    }  # fmt: skip


def shared_sizes(
    attn_mask: Tensor | None, seed: Tensor | None, kv_len: int, loop: int
) -> tuple[int, int]:
    """(rows of a step, padded keys) of a tile of scores; products sum over either.

    Beside a bool mask's bytes and random bits they are wrong below 32 (see `visible_keys`).
    """
    bools = attn_mask is not None and attn_mask.dtype == torch.bool
    least = 32 if bools and seed is not None else 16
    return max(loop, least), max(width(kv_len), least)


def row_ranges(q_len: int, rows: int) -> tuple[int, int]:
    """(splits, rows per split) of the long side: 128 rows each, more where that makes over 32."""
    if q_len <= 256:
        return 1, max(q_len, 1)
    per_split = cdiv(max(128, cdiv(q_len, 32)), rows) * rows
    return cdiv(q_len, per_split), per_split


def exchanged(call: Any) -> Any:
    """The same call with queries and keys exchanged."""
    mask = call.attn_mask
    return call._replace(
        query=call.key,
        key=call.query,
        value=call.query_value,
        query_value=call.value,
        attn_mask=None if mask is None else torch.atleast_2d(mask).transpose(-1, -2),
        query_padding_mask=call.key_padding_mask,
        key_padding_mask=call.query_padding_mask,
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
