"""Attention backward: dq, dk, dv and the gradient of a float mask, without atomics.

Softmax statistics are taken anew and not from lse: the rounding of lse is common to a row and
breaks the accuracy rule, and a row of finfo.min has no bits left in it. delta = rowsum(P * dP) and
not rowsum(dO * out), whose 16-bit out has lost what the difference dP - delta needs. So the kernel
of the rows makes two passes over the keys where they do not fit one tile, and leaves (maximum,
1 / sum, delta) of each row to the others.

Sums over queries are cut into ranges that depend on the shape alone and merged as a tree: one
float32 chain over 8 heads of 4,096 queries errs by five times the plain formula.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.kernels.attention import backward_short_side
from fastfusion.kernels.attention import tma as attention_tma
from fastfusion.kernels.attention.backward_short_side import inputs, parts_of_splits
from fastfusion.kernels.device.gradient_sums import (
    key_gradients,
    mask_gradients,
    row_gradients,
    store_mask_gradient,
)
from fastfusion.kernels.device.masks import visible_keys, visible_range
from fastfusion.kernels.device.rows import (
    load_rows,
    load_tile,
    rows_of,
    slice_base,
    store_key_gradients,
    store_rows,
)
from fastfusion.kernels.device.statistics import load_grad_lse, store_statistics
from fastfusion.kernels.device.sums import nothing_lost
from fastfusion.kernels.host.arguments import (
    gradient_scale,
    readable,
    rows_outside,
    rows_readable,
    score_options,
    strides,
)
from fastfusion.kernels.host.plan import empty, launch, planned
from fastfusion.kernels.host.tiles import aligned, cdiv, cut, width

LENGTHS = [
    "heads", "group", "q_len", "kv_len", "padding_batch", "threshold", "diagonal", "splits",
    "per_split",
]  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS[:7])
def rows_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, grad_lse_ptr, dq_ptr, statistics_ptr, mask_ptr, padding_ptr,
    seed_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    grad_batch, grad_head, grad_row, dq_batch, dq_head, dq_row,
    mask_batch, mask_head, mask_row, mask_column, padding_batch,
    diagonal, heads, group, q_len, kv_len, scale, factor, threshold, keep_scale, gradient_scale,
    SIGN: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, PADDING: tl.constexpr, DROPOUT: tl.constexpr, STREAM: tl.constexpr,
    SINGLE: tl.constexpr, LSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """dq and the statistics of the rows. Programs: (batch * heads, tiles of queries)."""
    tiles = tl.cdiv(q_len, OWN)
    index = tl.program_id(0)
    q_start = index % tiles * OWN
    if CAUSAL == 1:  # the longest rows first
        q_start = (tiles - 1 - index % tiles) * OWN
    slice_index = index // tiles
    batch, head = slice_index // heads, slice_index % heads
    present = q_start + tl.arange(0, OWN) < q_len
    at = tl.cast(slice_index, tl.int64) * q_len + q_start + tl.arange(0, OWN)
    padding = padding_ptr + tl.cast(batch, tl.int64) * padding_batch
    first, last = visible_range(padding, kv_len, LOOP, PADDING)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    kv_head = head // group
    q, at_q = rows_of(q_ptr, batch, head, q_batch, q_head, q_row, TMA)
    k, at_k = rows_of(k_ptr, batch, kv_head, k_batch, k_head, k_row, TMA)
    v, at_v = rows_of(v_ptr, batch, kv_head, v_batch, v_head, v_row, TMA)
    grad, at_grad = rows_of(grad_ptr, batch, head, grad_batch, grad_head, grad_row, TMA)
    dq, shift, share, delta = row_gradients(
        q, at_q, q_start, k, at_k, v, at_v, grad, at_grad,
        load_grad_lse(grad_lse_ptr, at, present, LSE),
        (
            slice_base(mask_ptr, batch, head, mask_batch, mask_head), mask_row, mask_column, q_len,
            kv_len, diagonal,
        ),
        padding, seed, slice_index, first, last, q_len, kv_len, scale, factor, threshold,
        keep_scale, SIGN, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, OWN, LOOP, CAUSAL, MASK, PADDING,
        DROPOUT, STREAM, SINGLE, DOT, PRECISION, TMA,
    )  # fmt: skip
    base = slice_base(dq_ptr, batch, head, dq_batch, dq_head)
    store_rows(base, dq * gradient_scale, q_start, present, dq_row, DIM)
    store_statistics(statistics_ptr, at, present, shift, share, delta)


@triton.jit(do_not_specialize=LENGTHS)
def keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, grad_lse_ptr, dk_ptr, dv_ptr, partial_ptr, statistics_ptr,
    mask_ptr, padding_ptr, seed_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, grad_batch, grad_head, grad_row, dk_batch, dk_head, dk_row,
    dv_batch, dv_head, dv_row, mask_batch, mask_head, mask_row, mask_column, padding_batch,
    diagonal, heads, group, q_len, kv_len, splits, per_split, scale, factor, threshold, keep_scale,
    gradient_scale, SIGN: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr,
    SPLIT: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PADDING: tl.constexpr,
    DROPOUT: tl.constexpr, STREAM: tl.constexpr, LSE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dk and dv. Programs: (batch * key heads, splits, tiles of keys).

    A split is `per_split` tiles of queries of the heads that share the keys, one after the other.
    """
    tiles = tl.cdiv(kv_len, OWN)
    index = tl.program_id(0)
    k_start = index % tiles * OWN
    slice_k = index // tiles // splits
    kv_heads = heads // group
    batch, kv_head = slice_k // kv_heads, slice_k % kv_heads
    padding = padding_ptr + tl.cast(batch, tl.int64) * padding_batch
    present = k_start + tl.arange(0, OWN) < kv_len
    visible = visible_keys(padding, k_start, kv_len, OWN, PADDING)
    k_base, at_k = rows_of(k_ptr, batch, kv_head, k_batch, k_head, k_row, TMA)
    v_base, at_v = rows_of(v_ptr, batch, kv_head, v_batch, v_head, v_row, TMA)
    k = load_tile(k_base, at_k, k_start, visible, DIM, WIDTH, True, DOT, TMA)
    v = load_tile(v_base, at_v, k_start, visible, VALUE_DIM, VALUE_WIDTH, True, DOT, TMA)
    dk = tl.zeros([OWN, WIDTH], tl.float32)
    dv = tl.zeros([OWN, VALUE_WIDTH], tl.float32)
    dk_lost, dv_lost = nothing_lost(dk, DOT), nothing_lost(dv, DOT)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    row_tiles = tl.cdiv(q_len, LOOP)
    first = index // tiles % splits * per_split
    last = tl.minimum(first + per_split, group * row_tiles)
    if PADDING:  # a tile without a visible key loops over nothing
        last = tl.where(tl.max(visible.to(tl.int32)) > 0, last, first)
    lowest = 0
    if CAUSAL == 1:
        lowest = tl.maximum(k_start - diagonal, 0) // LOOP
    for g in range(first // row_tiles, tl.cdiv(last, row_tiles)):
        head = kv_head * group + g
        slice_index = batch * heads + head
        q, at_q = rows_of(q_ptr, batch, head, q_batch, q_head, q_row, TMA)
        grad, at_grad = rows_of(grad_ptr, batch, head, grad_batch, grad_head, grad_row, TMA)
        dk, dk_lost, dv, dv_lost = key_gradients(
            (dk, dk_lost, dv, dv_lost), k, v, visible, k_start,
            tl.maximum(first - g * row_tiles, lowest) * LOOP,
            tl.minimum(last - g * row_tiles, row_tiles) * LOOP,
            q, at_q, grad, at_grad,
            statistics_ptr, grad_lse_ptr, tl.cast(slice_index, tl.int64) * q_len,
            (
                slice_base(mask_ptr, batch, head, mask_batch, mask_head), mask_row, mask_column,
                q_len, kv_len, diagonal,
            ),
            seed, slice_index, q_len, scale, factor, threshold, keep_scale, SIGN, DIM,
            WIDTH, VALUE_DIM, VALUE_WIDTH, LOOP, CAUSAL, MASK, DROPOUT, STREAM, LSE, DOT, PRECISION,
            TMA,
        )  # fmt: skip
    store_key_gradients(
        dk, dv, gradient_scale, k_start, present,
        partial_ptr + tl.cast(index // tiles, tl.int64) * kv_len * (DIM + VALUE_DIM),
        dk_ptr, dv_ptr, batch, kv_head, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, SPLIT,
        DIM, VALUE_DIM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["kv_heads", "kv_len", "splits"])
def merge_kernel(
    partial_ptr, dk_ptr, dv_ptr, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    kv_heads, kv_len, splits, DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One key of one head: the sum of its splits. Programs: (batch * key heads, keys)."""
    index = tl.program_id(0)
    slice_k, key = index // kv_len, index % kv_len
    row: tl.constexpr = DIM + VALUE_DIM
    step = tl.cast(kv_len, tl.int64) * row
    base = partial_ptr + tl.cast(slice_k, tl.int64) * splits * step + tl.cast(key, tl.int64) * row
    present = tl.arange(0, SPLITS) < splits
    dk = tl.sum(load_rows(base, 0, present, step, DIM, WIDTH, tl.float32), 0)
    dv = tl.sum(load_rows(base + DIM, 0, present, step, VALUE_DIM, VALUE_WIDTH, tl.float32), 0)
    batch, head = slice_k // kv_heads, slice_k % kv_heads
    at = slice_base(dk_ptr, batch, head, dk_batch, dk_head) + tl.cast(key, tl.int64) * dk_row
    columns = tl.arange(0, WIDTH)
    tl.store(at + columns, dk.to(dk_ptr.dtype.element_ty), mask=columns < DIM)
    at = slice_base(dv_ptr, batch, head, dv_batch, dv_head) + tl.cast(key, tl.int64) * dv_row
    columns = tl.arange(0, VALUE_WIDTH)
    tl.store(at + columns, dv.to(dv_ptr.dtype.element_ty), mask=columns < VALUE_DIM)


@triton.jit(do_not_specialize=[*LENGTHS[:8], "batches", "mask_batches", "mask_heads"])
def mask_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, grad_lse_ptr, dmask_ptr, statistics_ptr, mask_ptr, padding_ptr,
    seed_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    grad_batch, grad_head, grad_row, mask_batch, mask_head, mask_row, mask_column, padding_batch,
    diagonal, heads, group, q_len, kv_len, splits, batches, mask_batches, mask_heads, scale, factor,
    threshold, keep_scale, SIGN: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr,
    SHARED_ROWS: tl.constexpr, SHARED_COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, PADDING: tl.constexpr, DROPOUT: tl.constexpr, STREAM: tl.constexpr,
    LSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a float mask: a program owns a tile of it and adds up whatever shares it, or
    every `splits`-th batch entry of that.

    Programs: (splits, batches and heads of the mask, tiles of rows, tiles of columns).
    """
    columns_end = 1 if SHARED_COLUMNS else kv_len
    rows_end = 1 if SHARED_ROWS else q_len
    column_tiles, row_tiles = tl.cdiv(columns_end, LOOP), tl.cdiv(rows_end, OWN)
    index = tl.program_id(0)
    column, row = index % column_tiles * LOOP, index // column_tiles % row_tiles * OWN
    part = index // column_tiles // row_tiles
    owner = part % (mask_batches * mask_heads)
    first = owner // mask_heads + part // (mask_batches * mask_heads) * mask_batches
    seed = tl.load(seed_ptr) if DROPOUT else 0
    total = tl.zeros([OWN, LOOP], tl.float32)
    lost = tl.zeros([OWN, LOOP], tl.float32)
    for batch in range(first, batches, mask_batches * splits):
        padding = padding_ptr + tl.cast(batch, tl.int64) * padding_batch
        for head in range(owner % mask_heads, heads, mask_heads):
            slice_index = batch * heads + head
            q_base = slice_base(q_ptr, batch, head, q_batch, q_head)
            k_base = slice_base(k_ptr, batch, head // group, k_batch, k_head)
            v_base = slice_base(v_ptr, batch, head // group, v_batch, v_head)
            grad_base = slice_base(grad_ptr, batch, head, grad_batch, grad_head)
            mask_base = slice_base(mask_ptr, batch, head, mask_batch, mask_head)
            mask = (mask_base, mask_row, mask_column, q_len, kv_len, diagonal)
            total, lost = mask_gradients(
                total, lost, row, column, q_base, q_row, k_base, k_row, v_base, v_row, grad_base,
                grad_row, statistics_ptr, grad_lse_ptr, tl.cast(slice_index, tl.int64) * q_len,
                mask, padding, seed, slice_index, q_len, kv_len, scale, factor, threshold,
                keep_scale, SIGN, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, SHARED_ROWS, SHARED_COLUMNS,
                CAUSAL, MASK, PADDING, DROPOUT, STREAM, LSE, DOT, PRECISION,
            )  # fmt: skip
    store_mask_gradient(
        dmask_ptr, total, part, row, column, rows_end, columns_end, SHARED_ROWS, SHARED_COLUMNS
    )


@triton.jit(do_not_specialize=["elements", "splits"])
def mask_merge_kernel(parts_ptr, dmask_ptr, elements, splits, BLOCK: tl.constexpr):
    """The sum of the splits' parts of a mask's gradient. Programs: blocks of its elements."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        from_split = parts_ptr + tl.cast(split, tl.int64) * elements
        total += tl.load(from_split + at, mask=at < elements, other=0.0)
    tl.store(dmask_ptr + at, total.to(dmask_ptr.dtype.element_ty), mask=at < elements)


def row_splits(row_tiles: int, group: int, loop: int) -> tuple[int, int]:
    """(splits, tiles of queries per split) of the sums over queries.

    About 1,024 queries each, for occupancy where keys are few and for short float32 chains; 16 at
    most, so that the partial sums stay linear in the length.
    """
    units = row_tiles * group
    splits = min(16, cdiv(units * loop, 1024))
    per_split = cdiv(units, splits)
    return cdiv(units, per_split), per_split


def merge_splits(partial: Tensor, of_side: Tensor, of_value: Tensor, splits: int) -> None:
    """Fill the gradients of keys (or queries) and of their values from the splits' parts."""
    (batch, heads, length, dim), value_dim = of_side.shape, of_value.shape[3]
    launch(
        merge_kernel, batch * heads * length, partial, of_side, of_value,
        **strides(dk=of_side, dv=of_value), kv_heads=heads, kv_len=length, splits=splits,
        DIM=dim, WIDTH=width(dim), VALUE_DIM=value_dim, VALUE_WIDTH=width(value_dim),
        SPLITS=width(splits), num_warps=4,
    )  # fmt: skip


@planned
def attention_backward(
    grads: tuple[Tensor | None, Tensor | None], call: Any, mask_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, d attn_mask); the last is empty if not wanted."""
    (grad_out, grad_lse), attn_mask, is_causal = grads, call.attn_mask, call.is_causal
    query, key, value = call.query, call.key, call.value
    if grad_out is None:
        grad_out = query.new_zeros(*query.shape[:3], value.shape[3])
    grad_out, query, key, value = map(rows_readable, (grad_out, query, key, value))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len, value_dim = value.shape[1:]
    dq = rows_outside(query, batch, heads, q_len, dim)
    dk = rows_outside(query, batch, kv_heads, kv_len, dim)
    dv = rows_outside(query, batch, kv_heads, kv_len, value_dim)
    dmask = empty(query, (0,))
    if mask_gradient and attn_mask is not None and attn_mask.is_floating_point():
        dmask = empty(attn_mask, attn_mask.shape)
    if batch * heads * q_len == 0 or batch * kv_heads * kv_len == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dmask.zero_()
    run_time, compile_time = score_options(
        call, (batch, heads, q_len, kv_len), readable(call.key_padding_mask)
    )
    after = gradient_scale({**run_time, **compile_time})
    masked = attn_mask is not None or call.seed is not None
    group, widest = heads // kv_heads, max(width(dim), width(value_dim))
    common = {
        "grad_lse_ptr": query if grad_lse is None else grad_lse,
        "statistics_ptr": empty(query, (batch * heads * q_len * 3,), torch.float32),
        **strides(q=query, k=key, v=value, grad=grad_out), **run_time,
        "heads": heads, "group": group, "q_len": q_len, "kv_len": kv_len,
        "DIM": dim, "WIDTH": width(dim), "VALUE_DIM": value_dim, "VALUE_WIDTH": width(value_dim),
        "STREAM": 0, "LSE": grad_lse is not None, **compile_time,
    }  # fmt: skip

    tma = attention_tma.takes(query, key, value, widest, compile_time, grad_out)

    even = tma or aligned(dim, value_dim)

    def chosen(kernel: str, rows: int) -> tuple[int, dict[str, int]]:
        name = f"attention_backward_{kernel}{'_tma' if tma else ''}"
        return cut(name, query, widest, rows, even, masked)

    hidden = masked or is_causal
    short = backward_short_side.chosen(query, widest, kv_len, even, hidden)
    if short is not None:
        partial, splits = backward_short_side.backward(
            (query, key, value, grad_out), (dq, dk, dv), short, tma, after, common,
        )  # fmt: skip
    else:
        operands = (query, key, value, grad_out)
        own, sizes = chosen("rows", q_len)
        launch(
            rows_kernel, batch * heads * cdiv(q_len, own),
            *inputs(operands, own, sizes["LOOP"], tma), dq_ptr=dq, **strides(dq=dq), **common,
            **sizes, TMA=tma, gradient_scale=compile_time["SIGN"] * after,
            SINGLE=kv_len <= sizes["LOOP"],
        )  # fmt: skip
        own, sizes = chosen("keys", kv_len)
        splits, per_split = row_splits(cdiv(q_len, sizes["LOOP"]), group, sizes["LOOP"])
        partial = parts_of_splits(query, dk, dv, splits)
        launch(
            keys_kernel, batch * kv_heads * splits * cdiv(kv_len, own),
            *inputs(operands, sizes["LOOP"], own, tma), dk_ptr=dk, dv_ptr=dv, partial_ptr=partial,
            **strides(dk=dk, dv=dv), **common, **sizes, TMA=tma, gradient_scale=after,
            splits=splits, per_split=per_split, SPLIT=splits > 1,
        )  # fmt: skip
    if splits > 1:
        merge_splits(partial, dk, dv, splits)
    if dmask.numel():
        shared = (1,) * (4 - dmask.dim()) + tuple(dmask.shape)
        # 16 rows at a time spill 128 bytes on sm_80.
        own, sizes = chosen("mask", max(shared[2], 32))
        grid = shared[0] * shared[1] * cdiv(shared[2], own) * cdiv(shared[3], sizes["LOOP"])
        splits = max(1, min(16, batch // shared[0], 1024 // grid))
        parts = dmask if splits == 1 else empty(dmask, (splits * dmask.numel(),), torch.float32)
        launch(
            mask_kernel, splits * grid,
            query, key, value, grad_out, dmask_ptr=parts, **common, **sizes, splits=splits,
            batches=batch, mask_batches=shared[0], mask_heads=shared[1],
            SHARED_ROWS=shared[2] == 1 and q_len > 1,
            SHARED_COLUMNS=shared[3] == 1 and kv_len > 1,
        )  # fmt: skip
        if splits > 1:
            launch(
                mask_merge_kernel, cdiv(dmask.numel(), 256), parts, dmask, elements=dmask.numel(),
                splits=splits, BLOCK=256, num_warps=4,
            )  # fmt: skip
    return dq, dk, dv, dmask
