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

from fastfusion.core.score_policy import hides
from fastfusion.kernels.attention import backward_short_side
from fastfusion.kernels.attention import tma as attention_tma
from fastfusion.kernels.attention.backward_short_side import inputs, parts_of_splits
from fastfusion.kernels.attention.positions import position_gradient
from fastfusion.kernels.attention.sinks import gradient_without_keys, sink_gradient
from fastfusion.kernels.device.gradient_sums import (
    key_gradients,
    mask_gradients,
    row_gradients,
    store_mask_gradient,
)
from fastfusion.kernels.device.rows import load_rows, load_tile, rows_of, store_pair, store_rows
from fastfusion.kernels.device.score_policy import (
    PADDING,
    UPPER,
    policy_of,
    rows_seeing,
    visible_keys,
    visible_range,
)
from fastfusion.kernels.device.statistics import load_grad_lse, store_statistics
from fastfusion.kernels.device.sums import nothing_lost
from fastfusion.kernels.host.arguments import (
    gradient_scales,
    has_segments,
    has_values,
    operand,
    readable,
    rows_outside,
    rows_readable,
    score_options,
)
from fastfusion.kernels.host.plan import empty, launch, planned
from fastfusion.kernels.host.tiles import aligned, cdiv, cut, width

LENGTHS = ["numbers", "heads", "group", "q_len", "kv_len", "splits", "per_split"]


@triton.jit(do_not_specialize=LENGTHS[:5])
def rows_kernel(
    q, k, v, grad, grad_lse_ptr, dq, statistics_ptr, masks, numbers, heads, group, q_len, kv_len,
    gradient_scale, KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr,
    SINGLE: tl.constexpr, LSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """dq and the statistics of the rows. Programs: (batch * heads, tiles of queries)."""
    tiles = tl.cdiv(q_len, OWN)
    index = tl.program_id(0)
    slice_index = index // tiles
    batch, head = slice_index // heads, slice_index % heads
    policy = policy_of(masks, numbers, batch, head, slice_index, q_len, kv_len, KINDS)
    q_start = index % tiles * OWN
    if UPPER & KINDS:  # the longest rows first
        q_start = (tiles - 1 - index % tiles) * OWN
    present = q_start + tl.arange(0, OWN) < q_len
    at = tl.cast(slice_index, tl.int64) * q_len + q_start + tl.arange(0, OWN)
    first, last = visible_range(policy, kv_len, KINDS, LOOP)
    kv_head = head // group
    q_base, at_q = rows_of(q, batch, head, TMA)
    k_base, at_k = rows_of(k, batch, kv_head, TMA)
    v_base, at_v = rows_of(v, batch, kv_head, TMA)
    grad_base, at_grad = rows_of(grad, batch, head, TMA)
    of_rows, shift, share, delta = row_gradients(
        q_base, at_q, q_start, k_base, at_k, v_base, at_v, grad_base, at_grad,
        load_grad_lse(grad_lse_ptr, at, present, LSE), policy, first, last, q_len, kv_len, KINDS,
        DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, OWN, LOOP, SINGLE, DOT, PRECISION, TMA,
    )  # fmt: skip
    base, row = rows_of(dq, batch, head)
    store_rows(base, of_rows * gradient_scale, q_start, present, row, DIM)
    store_statistics(statistics_ptr, at, present, shift, share, delta)


@triton.jit(do_not_specialize=LENGTHS)
def keys_kernel(
    q, k, v, grad, grad_lse_ptr, dk, dv, partial_ptr, statistics_ptr, masks, numbers, heads, group,
    q_len, kv_len, splits, per_split, gradient_scale, KINDS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr,
    LOOP: tl.constexpr, SPLIT: tl.constexpr, LSE: tl.constexpr, DOT: tl.constexpr,
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
    of_batch = policy_of(masks, numbers, batch, 0, 0, q_len, kv_len, KINDS)
    present = k_start + tl.arange(0, OWN) < kv_len
    visible = visible_keys(of_batch.padding, k_start, kv_len, OWN, PADDING & KINDS)
    k_base, at_k = rows_of(k, batch, kv_head, TMA)
    v_base, at_v = rows_of(v, batch, kv_head, TMA)
    keys = load_tile(k_base, at_k, k_start, visible, DIM, WIDTH, True, DOT, TMA)
    values = load_tile(v_base, at_v, k_start, visible, VALUE_DIM, VALUE_WIDTH, True, DOT, TMA)
    of_keys = tl.zeros([OWN, WIDTH], tl.float32)
    of_values = tl.zeros([OWN, VALUE_WIDTH], tl.float32)
    keys_lost, values_lost = nothing_lost(of_keys, DOT), nothing_lost(of_values, DOT)
    row_tiles = tl.cdiv(q_len, LOOP)
    first = index // tiles % splits * per_split
    last = tl.minimum(first + per_split, group * row_tiles)
    if PADDING & KINDS:  # a tile without a visible key loops over nothing
        last = tl.where(tl.max(visible.to(tl.int32)) > 0, last, first)
    for g in range(first // row_tiles, tl.cdiv(last, row_tiles)):
        head = kv_head * group + g
        slice_index = batch * heads + head
        policy = policy_of(masks, numbers, batch, head, slice_index, q_len, kv_len, KINDS)
        q_base, at_q = rows_of(q, batch, head, TMA)
        grad_base, at_grad = rows_of(grad, batch, head, TMA)
        from_row, to_row = rows_seeing(
            policy, tl.maximum(first - g * row_tiles, 0) * LOOP,
            tl.minimum(last - g * row_tiles, row_tiles) * LOOP, k_start, KINDS, OWN, LOOP,
        )  # fmt: skip
        of_keys, keys_lost, of_values, values_lost = key_gradients(
            (of_keys, keys_lost, of_values, values_lost), keys, values, visible, k_start,
            from_row, to_row, q_base, at_q, grad_base, at_grad, statistics_ptr, grad_lse_ptr,
            tl.cast(slice_index, tl.int64) * q_len, policy, q_len, KINDS, DIM, WIDTH, VALUE_DIM,
            VALUE_WIDTH, LOOP, LSE, DOT, PRECISION, TMA,
        )  # fmt: skip
    store_pair(
        of_keys, of_values, gradient_scale, k_start, present,
        partial_ptr + tl.cast(index // tiles, tl.int64) * kv_len * (DIM + VALUE_DIM),
        dk, dv, batch, kv_head, SPLIT, DIM, VALUE_DIM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["kv_heads", "kv_len", "splits"])
def merge_kernel(
    partial_ptr, dk, dv, kv_heads, kv_len, splits, DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One key of one head: the sum of its splits. Programs: (batch * key heads, keys)."""
    index = tl.program_id(0)
    slice_k, key = index // kv_len, index % kv_len
    row: tl.constexpr = DIM + VALUE_DIM
    step = tl.cast(kv_len, tl.int64) * row
    base = partial_ptr + tl.cast(slice_k, tl.int64) * splits * step + tl.cast(key, tl.int64) * row
    present = tl.arange(0, SPLITS) < splits
    of_key = tl.sum(load_rows(base, 0, present, step, DIM, WIDTH, tl.float32), 0)
    base += DIM
    of_value = tl.sum(load_rows(base, 0, present, step, VALUE_DIM, VALUE_WIDTH, tl.float32), 0)
    batch, head = slice_k // kv_heads, slice_k % kv_heads
    at, key_row = rows_of(dk, batch, head)
    columns = tl.arange(0, WIDTH)
    at += tl.cast(key, tl.int64) * key_row
    tl.store(at + columns, of_key.to(at.dtype.element_ty), mask=columns < DIM)
    at, value_row = rows_of(dv, batch, head)
    columns = tl.arange(0, VALUE_WIDTH)
    at += tl.cast(key, tl.int64) * value_row
    tl.store(at + columns, of_value.to(at.dtype.element_ty), mask=columns < VALUE_DIM)


@triton.jit(do_not_specialize=[*LENGTHS[:6], "batches", "mask_batches", "mask_heads"])
def mask_kernel(
    q, k, v, grad, grad_lse_ptr, dmask_ptr, statistics_ptr, masks, numbers, heads, group, q_len,
    kv_len, splits, batches, mask_batches, mask_heads, KINDS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr,
    LOOP: tl.constexpr, SHARED_ROWS: tl.constexpr, SHARED_COLUMNS: tl.constexpr, LSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
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
    total = tl.zeros([OWN, LOOP], tl.float32)
    lost = tl.zeros([OWN, LOOP], tl.float32)
    for batch in range(first, batches, mask_batches * splits):
        for head in range(owner % mask_heads, heads, mask_heads):
            slice_index = batch * heads + head
            policy = policy_of(masks, numbers, batch, head, slice_index, q_len, kv_len, KINDS)
            q_base, q_row = rows_of(q, batch, head)
            k_base, k_row = rows_of(k, batch, head // group)
            v_base, v_row = rows_of(v, batch, head // group)
            grad_base, grad_row = rows_of(grad, batch, head)
            total, lost = mask_gradients(
                total, lost, row, column, q_base, q_row, k_base, k_row, v_base, v_row, grad_base,
                grad_row, statistics_ptr, grad_lse_ptr, tl.cast(slice_index, tl.int64) * q_len,
                policy, q_len, kv_len, KINDS, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, SHARED_ROWS,
                SHARED_COLUMNS, LSE, DOT, PRECISION,
            )  # fmt: skip
    store_mask_gradient(
        dmask_ptr, total, part, row, column, rows_end, columns_end, SHARED_ROWS, SHARED_COLUMNS
    )


@triton.jit(do_not_specialize=["elements", "splits"])
def mask_merge_kernel(parts_ptr, dmask_ptr, elements, splits, BLOCK: tl.constexpr):
    """The sum of the splits' parts of the gradient of a mask, or of a position table. Programs:
    blocks of its elements."""
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
        merge_kernel, batch * heads * length, partial, operand(of_side), operand(of_value),
        kv_heads=heads, kv_len=length, splits=splits,
        DIM=dim, WIDTH=width(dim), VALUE_DIM=value_dim, VALUE_WIDTH=width(value_dim),
        SPLITS=width(splits), num_warps=4,
    )  # fmt: skip


def merge_elements(parts: Tensor, splits: int, gradient: Tensor) -> None:
    """Fill the gradient of a mask or a table from its parts, one behind the other."""
    elements = gradient.numel()
    launch(
        mask_merge_kernel, cdiv(elements, 256), parts, gradient, elements=elements, splits=splits,
        BLOCK=256, num_warps=4,
    )  # fmt: skip


@planned
def attention_backward(
    grads: tuple[Tensor | None, Tensor | None], call: Any, mask_gradient: bool
) -> tuple[Tensor, ...]:
    """(dq, dk, dv, d attn_mask, d position_table, d sinks): the mask's empty if it is not wanted,
    those of table and sinks if there are none."""
    (grad_out, grad_lse), attn_mask = grads, call.attn_mask
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
    table = call.position_table
    dmask = empty(query, (0,))
    dtable = empty(query, (0,) if table is None else table.shape, torch.float32)
    if mask_gradient and attn_mask is not None and attn_mask.is_floating_point():
        dmask = empty(attn_mask, attn_mask.shape)
    if batch * heads * q_len == 0 or batch * kv_heads * kv_len == 0:
        of_rows = None if grad_lse is None else grad_lse.transpose(1, 2).flatten(0, 1)
        dsinks = gradient_without_keys(call, of_rows)
        return dq.zero_(), dk.zero_(), dv.zero_(), dmask.zero_(), dtable.zero_(), dsinks
    scores = score_options(
        call, (batch, heads, q_len, kv_len), None, readable(call.key_padding_mask)
    )
    of_queries, of_keys = gradient_scales(scores)
    masked = has_values(call)
    group, widest = heads // kv_heads, max(width(dim), width(value_dim))
    common = {
        "grad_lse_ptr": query if grad_lse is None else grad_lse,
        "statistics_ptr": empty(query, (batch * heads * q_len * 3,), torch.float32), **scores,
        "heads": heads, "group": group, "q_len": q_len, "kv_len": kv_len,
        "DIM": dim, "WIDTH": width(dim), "VALUE_DIM": value_dim, "VALUE_WIDTH": width(value_dim),
        "LSE": grad_lse is not None,
    }  # fmt: skip

    tma = attention_tma.takes(query, key, value, widest, scores["KINDS"], grad_out)

    even = tma or aligned(dim, value_dim)

    # The derivative of a cap takes as many registers as the scores, of which rows have none left;
    # numbers of positions spill 124 bytes beside dropout.
    roomy = even and call.softcap is call.position_table is None

    def chosen(kernel: str, rows: int) -> tuple[int, dict[str, int]]:
        name = f"attention_backward_{kernel}{'_tma' if tma else ''}"
        own, sizes = cut(name, query, widest, rows, roomy if kernel == "rows" else even, masked)
        # Beside tiles that wait numbers of segments spill: 4 bytes in rows of 64 columns on sm_80,
        # 20 in keys of 32 on sm_86; and those of positions: 152 in rows on sm_80, 36 in keys.
        numbered = has_segments(call) or call.position_table is not None
        if numbered and (kernel == "rows" or widest <= 32):
            sizes["num_stages"] = 1
        return own, sizes

    hidden = masked or hides(call) or call.sinks is not None
    short = backward_short_side.chosen(query, widest, kv_len, even, hidden)
    if short is not None:
        partial, splits = backward_short_side.backward(
            (query, key, value, grad_out), (dq, dk, dv), short, tma, common
        )
    else:
        operands = (query, key, value, grad_out)
        own, sizes = chosen("rows", q_len)
        launch(
            rows_kernel, batch * heads * cdiv(q_len, own),
            *inputs(operands, own, sizes["LOOP"], tma), dq=operand(dq), **common, **sizes, TMA=tma,
            gradient_scale=of_queries, SINGLE=kv_len <= sizes["LOOP"],
        )  # fmt: skip
        own, sizes = chosen("keys", kv_len)
        splits, per_split = row_splits(cdiv(q_len, sizes["LOOP"]), group, sizes["LOOP"])
        partial = parts_of_splits(query, dk, dv, splits)
        launch(
            keys_kernel, batch * kv_heads * splits * cdiv(kv_len, own),
            *inputs(operands, sizes["LOOP"], own, tma), dk=operand(dk), dv=operand(dv),
            partial_ptr=partial, **common, **sizes, TMA=tma, gradient_scale=of_keys,
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
            *inputs((query, key, value, grad_out), own, sizes["LOOP"], False), dmask_ptr=parts,
            **common, **sizes, splits=splits,
            batches=batch, mask_batches=shared[0], mask_heads=shared[1],
            SHARED_ROWS=shared[2] == 1 and q_len > 1,
            SHARED_COLUMNS=shared[3] == 1 and kv_len > 1,
        )  # fmt: skip
        if splits > 1:
            merge_elements(parts, splits, dmask)
    if dtable.numel():
        own, sizes = chosen("mask", max(q_len, 32))
        given = inputs((query, key, value, grad_out), own, sizes["LOOP"], False)
        sums, splits = position_gradient(call, given, common, sizes)
        merge_elements(sums, splits, dtable)
    return dq, dk, dv, dmask, dtable, sink_gradient(call, batch, q_len, common)
