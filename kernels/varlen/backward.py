"""Attention over packed sequences, backward; the grids are those of the forward."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.kernels.attention.sinks import gradient_without_keys, sink_gradient
from fastfusion.kernels.device.gradient_sums import (
    key_gradients,
    mask_gradients,
    row_gradients,
    store_mask_gradient,
)
from fastfusion.kernels.device.packed import bounds, find_tile
from fastfusion.kernels.device.rows import load_rows, store_rows, tokens_of
from fastfusion.kernels.device.score_policy import SINKS, policy_of, rows_seeing
from fastfusion.kernels.device.statistics import load_grad_lse, store_statistics
from fastfusion.kernels.device.sums import nothing_lost
from fastfusion.kernels.host.arguments import gradient_scales, operand, rows_readable
from fastfusion.kernels.host.plan import empty, launch, planned
from fastfusion.kernels.host.tiles import aligned, cdiv, cut, tile, width
from fastfusion.kernels.varlen.arguments import NAMES, common_options, sizes_of


@triton.jit(do_not_specialize=NAMES)
def rows_kernel(
    q, k, v, grad, grad_lse_ptr, dq, statistics_ptr, q_offsets, k_offsets, masks, numbers, heads,
    group, sequences, q_total, k_total, gradient_scale, KINDS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr,
    LOOP: tl.constexpr, LSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and the statistics of the rows, (heads, tokens). Programs as in the forward."""
    head = tl.program_id(0) % heads
    sequence, q_start, q_first, q_len, k_first, kv_len = find_tile(
        q_offsets, q_total, k_offsets, k_total, sequences, tl.program_id(0) // heads, OWN
    )
    policy = policy_of(
        masks, numbers, tl.minimum(sequence, sequences - 1), head, sequence * heads + head, q_len,
        kv_len, KINDS,
    )  # fmt: skip
    present = q_start + tl.arange(0, OWN) < q_len
    at = tl.cast(head, tl.int64) * q_total + q_first + q_start + tl.arange(0, OWN)
    q_base, q_row = tokens_of(q, q_first, head)
    k_base, k_row = tokens_of(k, k_first, head // group)
    v_base, v_row = tokens_of(v, k_first, head // group)
    grad_base, grad_row = tokens_of(grad, q_first, head)
    of_rows, shift, share, delta = row_gradients(
        q_base, q_row, q_start, k_base, k_row, v_base, v_row, grad_base, grad_row,
        load_grad_lse(grad_lse_ptr, at, present, LSE), policy, 0, kv_len, q_len, kv_len, KINDS, DIM,
        WIDTH, VALUE_DIM, VALUE_WIDTH, OWN, LOOP, False, DOT, PRECISION,
    )  # fmt: skip
    if SINKS & KINDS:  # rows behind the last sequence have none
        share = tl.where(sequence < sequences, share, 0.0)
    base, row = tokens_of(dq, q_first, head)
    store_rows(base, of_rows * gradient_scale, q_start, present, row, DIM)
    store_statistics(statistics_ptr, at, present, shift, share, delta)


@triton.jit(do_not_specialize=NAMES)
def keys_kernel(
    q, k, v, grad, grad_lse_ptr, dk, dv, statistics_ptr, q_offsets, k_offsets, masks, numbers,
    heads, group, sequences, q_total, k_total, gradient_scale, KINDS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    OWN: tl.constexpr, LOOP: tl.constexpr, LSE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv. Programs: (tiles of keys, key heads), the last fastest."""
    kv_heads = heads // group
    kv_head = tl.program_id(0) % kv_heads
    sequence, k_start, k_first, kv_len, q_first, q_len = find_tile(
        k_offsets, k_total, q_offsets, q_total, sequences, tl.program_id(0) // kv_heads, OWN
    )
    present = k_start + tl.arange(0, OWN) < kv_len
    base, row = tokens_of(k, k_first, kv_head)
    keys = load_rows(base, k_start, present, row, DIM, WIDTH, DOT)
    base, row = tokens_of(v, k_first, kv_head)
    values = load_rows(base, k_start, present, row, VALUE_DIM, VALUE_WIDTH, DOT)
    of_keys = tl.zeros([OWN, WIDTH], tl.float32)
    of_values = tl.zeros([OWN, VALUE_WIDTH], tl.float32)
    keys_lost, values_lost = nothing_lost(of_keys, DOT), nothing_lost(of_values, DOT)
    for g in range(0, group):
        head = kv_head * group + g
        policy = policy_of(
            masks, numbers, tl.minimum(sequence, sequences - 1), head, sequence * heads + head,
            q_len, kv_len, KINDS,
        )  # fmt: skip
        first, last = rows_seeing(policy, 0, q_len, k_start, KINDS, OWN, LOOP)
        q_base, q_row = tokens_of(q, q_first, head)
        grad_base, grad_row = tokens_of(grad, q_first, head)
        of_keys, keys_lost, of_values, values_lost = key_gradients(
            (of_keys, keys_lost, of_values, values_lost), keys, values, present, k_start, first,
            last, q_base, q_row, grad_base, grad_row, statistics_ptr, grad_lse_ptr,
            tl.cast(head, tl.int64) * q_total + q_first, policy, q_len, KINDS, DIM, WIDTH,
            VALUE_DIM, VALUE_WIDTH, LOOP, LSE, DOT, PRECISION,
        )  # fmt: skip
    base, row = tokens_of(dk, k_first, kv_head)
    store_rows(base, of_keys * gradient_scale, k_start, present, row, DIM)
    base, row = tokens_of(dv, k_first, kv_head)
    store_rows(base, of_values, k_start, present, row, VALUE_DIM)


@triton.jit(do_not_specialize=[*NAMES, "rows_end", "columns_end", "mask_batches", "mask_heads"])
def mask_kernel(
    q, k, v, grad, grad_lse_ptr, dmask_ptr, statistics_ptr, q_offsets, k_offsets, masks, numbers,
    heads, group, sequences, q_total, k_total, rows_end, columns_end, mask_batches, mask_heads,
    KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr, SHARED_ROWS: tl.constexpr,
    SHARED_COLUMNS: tl.constexpr, LSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a float mask of `rows_end` by `columns_end`, as in attention/backward.py."""
    column_tiles, row_tiles = tl.cdiv(columns_end, LOOP), tl.cdiv(rows_end, OWN)
    index = tl.program_id(0)
    column, row = index % column_tiles * LOOP, index // column_tiles % row_tiles * OWN
    owner = index // column_tiles // row_tiles
    total = tl.zeros([OWN, LOOP], tl.float32)
    lost = tl.zeros([OWN, LOOP], tl.float32)
    for sequence in range(owner // mask_heads, sequences, mask_batches):
        inside = sequence < sequences
        q_first, q_len = bounds(q_offsets, sequence, inside, q_total)
        k_first, kv_len = bounds(k_offsets, sequence, inside, k_total)
        for head in range(owner % mask_heads, heads, mask_heads):
            slice_index = sequence * heads + head
            policy = policy_of(masks, numbers, sequence, head, slice_index, q_len, kv_len, KINDS)
            q_base, q_row = tokens_of(q, q_first, head)
            k_base, k_row = tokens_of(k, k_first, head // group)
            v_base, v_row = tokens_of(v, k_first, head // group)
            grad_base, grad_row = tokens_of(grad, q_first, head)
            total, lost = mask_gradients(
                total, lost, row, column, q_base, q_row, k_base, k_row, v_base, v_row, grad_base,
                grad_row, statistics_ptr, grad_lse_ptr, tl.cast(head, tl.int64) * q_total + q_first,
                policy, q_len, kv_len, KINDS, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, SHARED_ROWS,
                SHARED_COLUMNS, LSE, DOT, PRECISION,
            )  # fmt: skip
    store_mask_gradient(
        dmask_ptr, total, owner, row, column, rows_end, columns_end, SHARED_ROWS, SHARED_COLUMNS
    )


@planned
def varlen_backward(
    grads: tuple[Tensor | None, Tensor | None], call: Any, mask_gradient: bool
) -> tuple[Tensor, ...]:
    """(dq, dk, dv, d attn_mask, d sinks), the mask's empty if it is not wanted, that of sinks if
    there are none."""
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
        if grad_lse is not None:  # of rows behind the last sequence there is none
            rows = torch.arange(total, device=query.device)[:, None]
            grad_lse = grad_lse.masked_fill(rows >= call.cu_seqlens_q[-1], 0.0)
        dsinks = gradient_without_keys(call, grad_lse)
        return dq.zero_(), dk.zero_(), dv.zero_(), dmask.zero_(), dsinks
    widest = max(width(dim), width(value.shape[2]))
    # (heads, tokens), as the statistics lie: the rows of a head side by side.
    grad_lse = None if grad_lse is None else grad_lse.t().contiguous()
    common = {
        **common_options(call, query, key, value),
        "grad": operand(grad_out), "grad_lse_ptr": query if grad_lse is None else grad_lse,
        "LSE": grad_lse is not None,
        "statistics_ptr": empty(query, (heads * total * 3,), torch.float32),
    }  # fmt: skip
    of_queries, of_keys = gradient_scales(common)
    chosen = tile("varlen_rows", query.dtype, widest, query.device, aligned(dim, value.shape[2]))
    launch(
        rows_kernel, (cdiv(total, chosen.own) + sequences) * heads,
        **common, dq=operand(dq), **sizes_of(chosen), gradient_scale=of_queries,
    )  # fmt: skip
    chosen = tile("varlen_keys", query.dtype, widest, query.device, aligned(dim, value.shape[2]))
    launch(
        keys_kernel, (cdiv(key.shape[0], chosen.own) + sequences) * key.shape[1],
        **common, dk=operand(dk), dv=operand(dv), gradient_scale=of_keys, **sizes_of(chosen),
    )  # fmt: skip
    if dmask.numel():
        shared = (1,) * (4 - dmask.dim()) + tuple(dmask.shape)
        even = aligned(dim, value.shape[2])
        own, sizes = cut("attention_backward_mask", query, widest, max(shared[2], 32), even)
        launch(
            mask_kernel,
            shared[0] * shared[1] * cdiv(shared[2], own) * cdiv(shared[3], sizes["LOOP"]),
            **common, **sizes, dmask_ptr=dmask, rows_end=shared[2], columns_end=shared[3],
            mask_batches=shared[0], mask_heads=shared[1],
            SHARED_ROWS=shared[2] == 1 and call.max_seqlen_q > 1,
            SHARED_COLUMNS=shared[3] == 1 and call.max_seqlen_k > 1,
        )  # fmt: skip
    return dq, dk, dv, dmask, sink_gradient(call, 1, total, common)
