"""Attention forward of long sequences whose tiles the copy engine of Hopper and later brings (TMA).

The same tiles in the same order as in forward.py, and so the same bits; but one thread asks for a
tile by its coordinates, where there all threads compute addresses, compare and copy 16 bytes each.
The descriptors that say where a head's rows lie are made on the host, per call.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastfusion.kernels.device.attend import attend, store_results
from fastfusion.kernels.device.rows import rows_of
from fastfusion.kernels.device.score_policy import NATURAL, NEGATIVE, UPPER, policy_of
from fastfusion.kernels.host import tiles
from fastfusion.kernels.host.plan import accepted, launch
from fastfusion.kernels.host.tiles import aligned, cdiv, tile, width

# Lengths from which it pays, by the width of the heads: on an H200 2,048 tokens take 36 us and not
# 38 with 64 columns, 1,024 take 21 and not 27 with 128 (benchmarks/results/nvidia-h200/tiles.json);
# eager calls of 1,024 and 1,500 tokens took at least 23 us more, for three descriptors.
LONG = {64: 2048, 128: 512}
# Hopper and Blackwell's data-centre chips; three stages of 128 columns are more than the 99 KB that
# a block has on sm_120.
_MAJORS = (9, 10, 11)


@triton.jit(do_not_specialize=["numbers", "heads", "group", "q_len", "kv_len"])
def tma_kernel(
    q, k, v, out, lse_ptr, masks, numbers, heads, group, q_len, kv_len, KINDS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    OWN: tl.constexpr, LOOP: tl.constexpr, LSE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries: (batch * heads, tiles), the last fastest."""
    index, tiles = tl.program_id(0), tl.cdiv(q_len, OWN)
    slice_index = index // tiles
    batch, head = slice_index // heads, slice_index % heads
    policy = policy_of(masks, numbers, batch, head, slice_index, q_len, kv_len, KINDS)
    q_start = index % tiles * OWN
    if UPPER & KINDS:  # the longest rows first
        q_start = (tiles - 1 - index % tiles) * OWN
    at_keys = (batch, head // group)
    maximum, total, acc = attend(
        q, (batch, head), q_start, k, at_keys, v, at_keys, policy, 0, kv_len, q_len, kv_len, True,
        KINDS, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, OWN, LOOP, DOT, PRECISION, True,
    )  # fmt: skip
    base, out_row = rows_of(out, batch, head)
    store_results(
        base, out_row, lse_ptr, slice_index, maximum, total, acc, q_start, q_len, VALUE_DIM,
        NATURAL & KINDS, LSE,
    )  # fmt: skip


def takes(
    query: Tensor, key: Tensor, value: Tensor, widest: int, kinds: int, *others: Tensor
) -> bool:
    """Whether a call goes this way: long, of 16-bit operands in rows of whole 16 bytes, up to 128
    wide (of 256 columns no second stage has room), and with no `kinds` but a causal mask.

    Rows of 40, 72 or 88 elements do at any length: from pointers each element is a load of its own.
    """
    if query.itemsize != 2 or widest > max(LONG) or key.shape[2] == 0:
        return False
    long = min(query.shape[2], key.shape[2]) >= LONG[max(widest, min(LONG))]
    return (
        (long or not aligned(query.shape[3], value.shape[3]))
        and not kinds & ~(NEGATIVE.value | UPPER.value)
        and tiles.capability(query.device)[0] in _MAJORS
        and all(_describable(t) for t in (query, key, value, *others))
    )


def _describable(tensor: Tensor) -> bool:
    """Whether the copy engine can address it: rows at multiples of 16 bytes, none shared."""
    strides = [s for s, size in zip(tensor.stride()[:3], tensor.shape, strict=False) if size > 1]
    return tensor.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in strides)


def describe(tensor: Tensor, rows: int) -> TensorDescriptor:
    """How the kernel reads `rows` rows of a (batch, heads, length, dim) tensor at once."""
    *_, dim = tensor.shape
    padded = -(-dim // 8) * 8  # the stride of a dimension of one element counts as well
    strides = [
        stride if size > 1 else padded
        for stride, size in zip(tensor.stride()[:3], tensor.shape, strict=False)
    ]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, width(dim)])


def forward(
    query: Tensor, key: Tensor, value: Tensor, widest: int, options: dict[str, Any]
) -> None:
    """Fills out (B, H, Lq, Dv) and lse (B, H, Lq) of the options, if they ask for it."""
    few = key.shape[2] < LONG[max(widest, min(LONG))]
    chosen = tile(f"attention_tma{'_few' if few else ''}", query.dtype, widest, query.device)
    rows = (chosen.own, chosen.loop, chosen.loop)
    batch, heads, q_len, _ = query.shape
    launch(
        tma_kernel, batch * heads * cdiv(q_len, chosen.own),
        *map(describe, (query, key, value), rows), **accepted(tma_kernel, options),
        OWN=chosen.own, LOOP=chosen.loop, **chosen.options(),
    )  # fmt: skip
