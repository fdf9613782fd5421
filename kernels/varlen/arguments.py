"""What the launchers of packed sequences share, forward and backward."""

from typing import Any

from torch import Tensor

from fastfusion.kernels.host.arguments import operand, score_options
from fastfusion.kernels.host.tiles import Tile, width

NAMES = ["numbers", "heads", "group", "sequences", "q_total", "k_total"]


def common_options(call: Any, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Any]:
    """Arguments of all kernels; the tensors are those of the call that kernels can read.

    The longest lengths bound what is read of a mask even where a sequence is longer.
    """
    q_offsets, k_offsets = call.cu_seqlens_q, call.cu_seqlens_k
    heads, dim = query.shape[1:]
    value_dim, sequences = value.shape[2], q_offsets.shape[0] - 1
    sizes = (sequences, heads, call.max_seqlen_q, call.max_seqlen_k)
    return {
        "q": operand(query), "k": operand(key), "v": operand(value),
        "q_offsets": (q_offsets, q_offsets.stride(0)),
        "k_offsets": (k_offsets, k_offsets.stride(0)), **score_options(call, sizes),
        "heads": heads, "group": heads // key.shape[1], "sequences": sequences,
        "q_total": query.shape[0], "k_total": key.shape[0], "DIM": dim, "WIDTH": width(dim),
        "VALUE_DIM": value_dim, "VALUE_WIDTH": width(value_dim),
    }  # fmt: skip


def sizes_of(chosen: Tile) -> dict[str, int]:
    return {"OWN": chosen.own, "LOOP": chosen.loop, **chosen.options()}
