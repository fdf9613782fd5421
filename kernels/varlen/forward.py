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
from fastfusion.kernels.device.packed import find_tile
from fastfusion.kernels.device.rows import store_rows, tokens_of
from fastfusion.kernels.device.score_policy import policy_of
from fastfusion.kernels.device.softmax import inverse, log_sum
from fastfusion.kernels.host.arguments import operand, rows_readable
from fastfusion.kernels.host.plan import empty, launch, planned
from fastfusion.kernels.host.tiles import aligned, cdiv, tile, width
from fastfusion.kernels.varlen.arguments import NAMES, common_options, sizes_of


@triton.jit(do_not_specialize=NAMES)
def forward_kernel(
    q, k, v, out, lse_ptr, q_offsets, k_offsets, masks, numbers, heads, group, sequences, q_total,
    k_total, KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr, LSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs: (tiles of queries, heads), the last fastest."""
    head = tl.program_id(0) % heads
    sequence, q_start, q_first, q_len, k_first, kv_len = find_tile(
        q_offsets, q_total, k_offsets, k_total, sequences, tl.program_id(0) // heads, OWN
    )
    policy = policy_of(
        masks, numbers, tl.minimum(sequence, sequences - 1), head, sequence * heads + head, q_len,
        kv_len, KINDS,
    )  # fmt: skip
    q_base, q_row = tokens_of(q, q_first, head)
    k_base, k_row = tokens_of(k, k_first, head // group)
    v_base, v_row = tokens_of(v, k_first, head // group)
    maximum, total, acc = attend(
        q_base, q_row, q_start, k_base, k_row, v_base, v_row, policy, 0, kv_len, q_len, kv_len,
        sequence < sequences, KINDS, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, OWN, LOOP, DOT, PRECISION,
    )  # fmt: skip
    rows = q_start + tl.arange(0, OWN)
    present = rows < q_len
    base, out_row = tokens_of(out, q_first, head)
    store_rows(base, acc * inverse(total)[:, None], q_start, present, out_row, VALUE_DIM)
    if LSE:
        at = (q_first + rows) * heads + head
        tl.store(lse_ptr + at, log_sum(maximum, total, KINDS), mask=present)


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
    if total * heads * sequences == 0:
        return out.zero_(), None if lse is None else lse.fill_(-torch.inf)
    widest = max(width(dim), width(value.shape[2]))
    chosen = tile("varlen", query.dtype, widest, query.device, aligned(dim, value.shape[2]))
    launch(
        forward_kernel, (cdiv(total, chosen.own) + sequences) * heads,
        **common_options(call, query, key, value),
        out=operand(out), lse_ptr=query if lse is None else lse, LSE=return_lse,
        **sizes_of(chosen),
    )  # fmt: skip
    return out, lse
