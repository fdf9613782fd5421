"""Attention over packed sequences, forward, without a look at their lengths.

The grid has one program per tile that the longest possible cut of the tokens could need, total /
OWN + sequences of them, and each finds its sequence in the offsets by itself: nothing waits for the
device to tell the host how long the sequences are. The programs that find none end at once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.kernels.device.attend import attend
from fastfusion.kernels.device.packed import find_tile, sequence_mask
from fastfusion.kernels.device.rows import store_rows
from fastfusion.kernels.device.softmax import inverse, log_sum
from fastfusion.kernels.host.arguments import rows_readable
from fastfusion.kernels.host.plan import empty, launch, planned
from fastfusion.kernels.host.tiles import aligned, cdiv, tile, width
from fastfusion.kernels.varlen.arguments import NAMES, common_options, sizes_of, token_strides


@triton.jit(do_not_specialize=NAMES)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_offsets_ptr, k_offsets_ptr, mask_ptr, seed_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, mask_batch, mask_head, mask_row,
    mask_column, mask_rows, mask_columns, bottom_right, q_offsets_step, k_offsets_step, heads,
    group, sequences, q_total, k_total, scale, factor, threshold, keep_scale, SIGN: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    OWN: tl.constexpr, LOOP: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    DROPOUT: tl.constexpr, LSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs: (tiles of queries, heads), the last fastest."""
    head = tl.program_id(0) % heads
    sequence, q_start, q_first, q_len, k_first, kv_len = find_tile(
        q_offsets_ptr, q_offsets_step, q_total, k_offsets_ptr, k_offsets_step, k_total, sequences,
        tl.program_id(0) // heads, OWN,
    )  # fmt: skip
    mask = sequence_mask(
        mask_ptr, sequence, head, mask_batch, mask_head, mask_row, mask_column, mask_rows,
        mask_columns, bottom_right, q_len, kv_len,
    )  # fmt: skip
    seed = tl.load(seed_ptr) if DROPOUT else 0
    maximum, total, acc = attend(
        q_ptr + q_first * q_row + head * q_head, q_row, q_start,
        k_ptr + k_first * k_row + (head // group) * k_head, k_row,
        v_ptr + k_first * v_row + (head // group) * v_head, v_row,
        mask, q_ptr, seed, sequence * heads + head, 0, kv_len, q_len, kv_len, scale, factor,
        threshold, keep_scale, SIGN, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, OWN, LOOP, CAUSAL, MASK,
        False, DROPOUT, 0, DOT, PRECISION,
    )  # fmt: skip
    rows = q_start + tl.arange(0, OWN)
    present = rows < q_len
    out = out_ptr + q_first * out_row + head * out_head
    store_rows(out, acc * inverse(total)[:, None], q_start, present, out_row, VALUE_DIM)
    if LSE:
        at = (q_first + rows) * heads + head
        tl.store(lse_ptr + at, log_sum(maximum, total, MASK), mask=present)


@planned
def varlen_forward(call: Any, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """out (total_q, H, Dv) and lse (total_q, H), float32, or None.

    The longest lengths only say which shape the mask broadcasts to: (sequences, H, max_seqlen_q,
    max_seqlen_k). Rows behind the last offset give 0 and -inf.
    """
    query, key, value = map(rows_readable, (call.query, call.key, call.value))
    total, heads, dim = query.shape
    out = empty(query, (total, heads, value.shape[2]))
    lse = empty(query, (total, heads), torch.float32) if return_lse else None
    sequences = call.cu_seqlens_q.shape[0] - 1
    if total * heads == 0:
        return out, lse
    widest = max(width(dim), width(value.shape[2]))
    chosen = tile("varlen", query.dtype, widest, query.device, aligned(dim, value.shape[2]))
    launch(
        forward_kernel, (cdiv(total, chosen.own) + sequences) * heads,
        **common_options(call, query, key, value),
        out_ptr=out, lse_ptr=query if lse is None else lse, LSE=return_lse,
        **token_strides(out=out), **sizes_of(chosen),
    )  # fmt: skip
    return out, lse
