"""What the launchers of packed sequences share, forward and backward."""

from typing import Any

from torch import Tensor

from fastfusion.kernels.host.arguments import score_options
from fastfusion.kernels.host.tiles import Tile, width

NAMES = [
    "heads", "group", "sequences", "q_total", "k_total", "threshold", "mask_rows", "mask_columns",
    "bottom_right",
]  # fmt: skip


def token_strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of tokens and heads, by the names that the kernels give them."""
    parts = ("row", "head")
    return {f"{n}_{p}": t.stride(i) for n, t in tensors.items() for i, p in enumerate(parts)}


def common_options(call: Any, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Any]:
    """Arguments of all kernels; the tensors are those of the call that kernels can read."""
    q_offsets, k_offsets = call.cu_seqlens_q, call.cu_seqlens_k
    heads, dim = query.shape[1:]
    value_dim, sequences = value.shape[2], q_offsets.shape[0] - 1
    sizes = (sequences, heads, call.max_seqlen_q, call.max_seqlen_k)
    run_time, compile_time = score_options(call, sizes)
    for name in ("padding_ptr", "padding_batch", "diagonal"):  # the diagonal is a sequence's own
        del run_time[name]
    del compile_time["PADDING"]
    masked = call.attn_mask is not None
    return {
        "q_ptr": query, "k_ptr": key, "v_ptr": value, "q_offsets_ptr": q_offsets,
        "k_offsets_ptr": k_offsets, "q_offsets_step": q_offsets.stride(0),
        "k_offsets_step": k_offsets.stride(0), **run_time, **compile_time,
        "mask_rows": sizes[2] if masked else 0, "mask_columns": sizes[3] if masked else 0,
        "bottom_right": int(call.bottom_right), **token_strides(q=query, k=key, v=value),
        "heads": heads, "group": heads // key.shape[1], "sequences": sequences,
        "q_total": query.shape[0], "k_total": key.shape[0], "DIM": dim, "WIDTH": width(dim),
        "VALUE_DIM": value_dim, "VALUE_WIDTH": width(value_dim),
    }  # fmt: skip


def sizes_of(chosen: Tile) -> dict[str, int]:
    return {"OWN": chosen.own, "LOOP": chosen.loop, **chosen.options()}
