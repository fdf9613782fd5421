"""Attention over packed sequences, backward; the grids are those of the forward."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.kernels.device.gradient_sums import (
    key_gradients,
    mask_gradients,
    row_gradients,
    store_mask_gradient,
)
from fastfusion.kernels.device.packed import bounds, find_tile, sequence_mask
from fastfusion.kernels.device.rows import load_rows, store_rows
from fastfusion.kernels.device.statistics import load_grad_lse, store_statistics
from fastfusion.kernels.device.sums import nothing_lost
from fastfusion.kernels.host.arguments import gradient_scale, rows_readable
from fastfusion.kernels.host.plan import empty, launch, planned
from fastfusion.kernels.host.tiles import aligned, cdiv, cut, tile, width
from fastfusion.kernels.varlen.arguments import NAMES, common_options, sizes_of, token_strides


@triton.jit(do_not_specialize=NAMES)
def rows_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, grad_lse_ptr, dq_ptr, statistics_ptr, q_offsets_ptr,
    k_offsets_ptr, mask_ptr, seed_ptr, q_row, q_head, k_row, k_head, v_row, v_head, grad_row,
    grad_head, dq_row, dq_head, mask_batch, mask_head, mask_row, mask_column, mask_rows,
    mask_columns, bottom_right, q_offsets_step, k_offsets_step, heads, group, sequences, q_total,
    k_total, scale, factor, threshold, keep_scale, gradient_scale, SIGN: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    OWN: tl.constexpr, LOOP: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    DROPOUT: tl.constexpr, LSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and the statistics of the rows, (heads, tokens). Programs as in the forward."""
    head = tl.program_id(0) % heads
    sequence, q_start, q_first, q_len, k_first, kv_len = find_tile(
        q_offsets_ptr, q_offsets_step, q_total, k_offsets_ptr, k_offsets_step, k_total, sequences,
        tl.program_id(0) // heads, OWN,
    )  # fmt: skip
    mask = sequence_mask(
        mask_ptr, sequence, head, mask_batch, mask_head, mask_row, mask_column, mask_rows,
        mask_columns, bottom_right, q_len, kv_len,
    )  # fmt: skip
    present = q_start + tl.arange(0, OWN) < q_len
    at = tl.cast(head, tl.int64) * q_total + q_first + q_start + tl.arange(0, OWN)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    dq, shift, share, delta = row_gradients(
        q_ptr + q_first * q_row + head * q_head, q_row, q_start,
        k_ptr + k_first * k_row + (head // group) * k_head, k_row,
        v_ptr + k_first * v_row + (head // group) * v_head, v_row,
        grad_ptr + q_first * grad_row + head * grad_head, grad_row,
        load_grad_lse(grad_lse_ptr, at, present, LSE),
        mask, q_ptr, seed, sequence * heads + head, 0, kv_len, q_len, kv_len, scale, factor,
        threshold, keep_scale, SIGN, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, OWN, LOOP, CAUSAL, MASK,
        False, DROPOUT, 0, False, DOT, PRECISION,
    )  # fmt: skip
    base = dq_ptr + q_first * dq_row + head * dq_head
    store_rows(base, dq * gradient_scale, q_start, present, dq_row, DIM)
    store_statistics(statistics_ptr, at, present, shift, share, delta)


@triton.jit(do_not_specialize=NAMES)
def keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, grad_lse_ptr, dk_ptr, dv_ptr, statistics_ptr, q_offsets_ptr,
    k_offsets_ptr, mask_ptr, seed_ptr, q_row, q_head, k_row, k_head, v_row, v_head, grad_row,
    grad_head, dk_row, dk_head, dv_row, dv_head, mask_batch, mask_head, mask_row, mask_column,
    mask_rows, mask_columns, bottom_right, q_offsets_step, k_offsets_step, heads, group, sequences,
    q_total, k_total, scale, factor, threshold, keep_scale, gradient_scale, SIGN: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    OWN: tl.constexpr, LOOP: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    DROPOUT: tl.constexpr, LSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv. Programs: (tiles of keys, key heads), the last fastest."""
    kv_heads = heads // group
    kv_head = tl.program_id(0) % kv_heads
    sequence, k_start, k_first, kv_len, q_first, q_len = find_tile(
        k_offsets_ptr, k_offsets_step, k_total, q_offsets_ptr, q_offsets_step, q_total, sequences,
        tl.program_id(0) // kv_heads, OWN,
    )  # fmt: skip
    present = k_start + tl.arange(0, OWN) < kv_len
    k_base = k_ptr + k_first * k_row + kv_head * k_head
    v_base = v_ptr + k_first * v_row + kv_head * v_head
    k = load_rows(k_base, k_start, present, k_row, DIM, WIDTH, DOT)
    v = load_rows(v_base, k_start, present, v_row, VALUE_DIM, VALUE_WIDTH, DOT)
    dk = tl.zeros([OWN, WIDTH], tl.float32)
    dv = tl.zeros([OWN, VALUE_WIDTH], tl.float32)
    dk_lost, dv_lost = nothing_lost(dk, DOT), nothing_lost(dv, DOT)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    lowest = 0
    if CAUSAL:
        lowest = tl.maximum(k_start - bottom_right * (kv_len - q_len), 0) // LOOP * LOOP
    for g in range(0, group):
        head = kv_head * group + g
        mask = sequence_mask(
            mask_ptr, sequence, head, mask_batch, mask_head, mask_row, mask_column, mask_rows,
            mask_columns, bottom_right, q_len, kv_len,
        )  # fmt: skip
        dk, dk_lost, dv, dv_lost = key_gradients(
            (dk, dk_lost, dv, dv_lost), k, v, present, k_start, lowest, q_len,
            q_ptr + q_first * q_row + head * q_head, q_row,
            grad_ptr + q_first * grad_row + head * grad_head, grad_row, statistics_ptr,
            grad_lse_ptr, tl.cast(head, tl.int64) * q_total + q_first, mask, seed,
            sequence * heads + head, q_len, scale, factor, threshold, keep_scale, SIGN, DIM, WIDTH,
            VALUE_DIM, VALUE_WIDTH, LOOP, CAUSAL, MASK, DROPOUT, 0, LSE, DOT, PRECISION,
        )  # fmt: skip
    base = dk_ptr + k_first * dk_row + kv_head * dk_head
    store_rows(base, dk * gradient_scale, k_start, present, dk_row, DIM)
    base = dv_ptr + k_first * dv_row + kv_head * dv_head
    store_rows(base, dv, k_start, present, dv_row, VALUE_DIM)


@triton.jit(do_not_specialize=[*NAMES, "mask_batches", "mask_heads"])
def mask_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, grad_lse_ptr, dmask_ptr, statistics_ptr, q_offsets_ptr,
    k_offsets_ptr, mask_ptr, seed_ptr, q_row, q_head, k_row, k_head, v_row, v_head, grad_row,
    grad_head, mask_batch, mask_head, mask_row, mask_column, mask_rows, mask_columns, bottom_right,
    q_offsets_step, k_offsets_step, heads, group, sequences, q_total, k_total, mask_batches,
    mask_heads, scale, factor, threshold, keep_scale, SIGN: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr,
    LOOP: tl.constexpr, SHARED_ROWS: tl.constexpr, SHARED_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, LSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a float mask, as in attention/backward.py."""
    columns_end = 1 if SHARED_COLUMNS else mask_columns
    rows_end = 1 if SHARED_ROWS else mask_rows
    column_tiles, row_tiles = tl.cdiv(columns_end, LOOP), tl.cdiv(rows_end, OWN)
    index = tl.program_id(0)
    column, row = index % column_tiles * LOOP, index // column_tiles % row_tiles * OWN
    owner = index // column_tiles // row_tiles
    seed = tl.load(seed_ptr) if DROPOUT else 0
    total = tl.zeros([OWN, LOOP], tl.float32)
    lost = tl.zeros([OWN, LOOP], tl.float32)
    for sequence in range(owner // mask_heads, sequences, mask_batches):
        inside = sequence < sequences
        q_first, q_len = bounds(q_offsets_ptr, q_offsets_step, sequence, inside, q_total)
        k_first, kv_len = bounds(k_offsets_ptr, k_offsets_step, sequence, inside, k_total)
        for head in range(owner % mask_heads, heads, mask_heads):
            mask = sequence_mask(
                mask_ptr, sequence, head, mask_batch, mask_head, mask_row, mask_column, mask_rows,
                mask_columns, bottom_right, q_len, kv_len,
            )  # fmt: skip
            total, lost = mask_gradients(
                total, lost, row, column, q_ptr + q_first * q_row + head * q_head, q_row,
                k_ptr + k_first * k_row + (head // group) * k_head, k_row,
                v_ptr + k_first * v_row + (head // group) * v_head, v_row,
                grad_ptr + q_first * grad_row + head * grad_head, grad_row, statistics_ptr,
                grad_lse_ptr, tl.cast(head, tl.int64) * q_total + q_first, mask, q_ptr, seed,
                sequence * heads + head, q_len, kv_len, scale, factor, threshold, keep_scale, SIGN,
                DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, SHARED_ROWS, SHARED_COLUMNS, CAUSAL, MASK,
                False, DROPOUT, 0, LSE, DOT, PRECISION,
            )  # fmt: skip
    store_mask_gradient(
        dmask_ptr, total, owner, row, column, rows_end, columns_end, SHARED_ROWS, SHARED_COLUMNS
    )


@planned
def varlen_backward(
    grads: tuple[Tensor | None, Tensor | None], call: Any, mask_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, d attn_mask); the last is empty if not wanted."""
    (grad_out, grad_lse), attn_mask = grads, call.attn_mask
    query, key, value = call.query, call.key, call.value
    if grad_out is None:
        grad_out = query.new_zeros(*query.shape[:2], value.shape[2])
    grad_out, query, key, value = map(rows_readable, (grad_out, query, key, value))
    dq, dk, dv = (empty(t, t.shape) for t in (query, key, value))
    total, heads, dim = query.shape
    sequences = call.cu_seqlens_q.shape[0] - 1
    dmask = empty(query, (0,))
    if mask_gradient and attn_mask is not None and attn_mask.is_floating_point():
        dmask = empty(attn_mask, attn_mask.shape)
    if total * heads == 0 or sequences == 0 or key.shape[0] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dmask.zero_()
    widest = max(width(dim), width(value.shape[2]))
    # (heads, tokens), as the statistics lie: the rows of a head side by side.
    grad_lse = None if grad_lse is None else grad_lse.t().contiguous()
    common = {
        **common_options(call, query, key, value),
        "grad_ptr": grad_out, "grad_lse_ptr": query if grad_lse is None else grad_lse,
        "LSE": grad_lse is not None, **token_strides(grad=grad_out),
        "statistics_ptr": empty(query, (heads * total * 3,), torch.float32),
    }  # fmt: skip
    chosen = tile("varlen_rows", query.dtype, widest, query.device, aligned(dim, value.shape[2]))
    launch(
        rows_kernel, (cdiv(total, chosen.own) + sequences) * heads,
        **common, dq_ptr=dq, **token_strides(dq=dq), **sizes_of(chosen),
        gradient_scale=common["SIGN"] * gradient_scale(common),
    )  # fmt: skip
    chosen = tile("varlen_keys", query.dtype, widest, query.device, aligned(dim, value.shape[2]))
    launch(
        keys_kernel, (cdiv(key.shape[0], chosen.own) + sequences) * key.shape[1],
        **common, dk_ptr=dk, dv_ptr=dv, **token_strides(dk=dk, dv=dv),
        gradient_scale=gradient_scale(common), **sizes_of(chosen),
    )  # fmt: skip
    if dmask.numel():
        shared = (1,) * (4 - dmask.dim()) + tuple(dmask.shape)
        even = aligned(dim, value.shape[2])
        own, sizes = cut("attention_backward_mask", query, widest, max(shared[2], 32), even)
        launch(
            mask_kernel,
            shared[0] * shared[1] * cdiv(shared[2], own) * cdiv(shared[3], sizes["LOOP"]),
            **common, **sizes, dmask_ptr=dmask, mask_batches=shared[0], mask_heads=shared[1],
            SHARED_ROWS=shared[2] == 1 and call.max_seqlen_q > 1,
            SHARED_COLUMNS=shared[3] == 1 and call.max_seqlen_k > 1,
        )  # fmt: skip
    return dq, dk, dv, dmask
