"""Attention forward: softmax(scale * Q K^T + bias) V without the score matrix.

A program owns a tile of queries of one head and loops over the keys with an online softmax (Milakov
and Gimelshein, 2018; Dao et al., FlashAttention, 2022). Few queries over many keys are split into
ranges of a fixed number of keys, merged sixteen at a time by a second kernel.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.kernels.attention import tma
from fastfusion.kernels.device.attend import attend, store_results
from fastfusion.kernels.device.rows import rows_of, store_rows
from fastfusion.kernels.device.score_policy import UPPER, policy_of, visible_range
from fastfusion.kernels.device.softmax import inverse, log_sum, rescale, shift_of
from fastfusion.kernels.host.arguments import (
    has_values,
    operand,
    readable,
    rows_outside,
    rows_readable,
    score_options,
    units,
)
from fastfusion.kernels.host.plan import empty, launch, planned
from fastfusion.kernels.host.tiles import aligned, cdiv, owned, tile, width


@triton.jit
def attend_program(
    index, q, k, v, out, lse_ptr, partial_ptr, masks, numbers, heads, group, q_len, kv_len, splits,
    KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr, SPLIT: tl.constexpr,
    LSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries, one split of keys; (batch * heads, splits, tiles), the last fastest."""
    tiles = tl.cdiv(q_len, OWN)
    slice_index = index // tiles // splits
    batch, head = slice_index // heads, slice_index % heads
    kv_head = head // group
    policy = policy_of(masks, numbers, batch, head, slice_index, q_len, kv_len, KINDS)
    q_start = index % tiles * OWN
    if UPPER & KINDS:  # the longest rows first
        q_start = (tiles - 1 - index % tiles) * OWN
    first, last = visible_range(policy, kv_len, KINDS, LOOP)
    has_sink = True
    if SPLIT > 0:
        split = index // tiles % splits
        has_sink = split == 0
        first = tl.maximum(first, split * SPLIT)
        last = tl.minimum(last, (split + 1) * SPLIT)
    q_base, q_row = rows_of(q, batch, head)
    k_base, k_row = rows_of(k, batch, kv_head)
    v_base, v_row = rows_of(v, batch, kv_head)
    maximum, total, acc = attend(
        q_base, q_row, q_start, k_base, k_row, v_base, v_row, policy, first, last, q_len, kv_len,
        has_sink, KINDS, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, OWN, LOOP, DOT, PRECISION,
    )  # fmt: skip
    if SPLIT > 0:
        base = partial_ptr + tl.cast(index // tiles, tl.int64) * q_len * (VALUE_DIM + 2)
        store_partial(base, maximum, total, acc, q_start, q_len, VALUE_DIM)
    else:
        out_base, out_row = rows_of(out, batch, head)
        store_results(
            out_base, out_row, lse_ptr, slice_index, maximum, total, acc, q_start, q_len,
            VALUE_DIM, KINDS, LSE,
        )  # fmt: skip


@triton.jit
def store_partial(base, maximum, total, acc, start, length, DIM: tl.constexpr):
    """What a split leaves for the merge: weighted values, then maximum and sum, of each row."""
    rows = start + tl.arange(0, acc.shape[0])
    present = rows < length
    store_rows(base, acc, start, present, DIM + 2, DIM)
    statistics = base + rows.to(tl.int64) * (DIM + 2) + DIM
    tl.store(statistics, maximum, mask=present)
    tl.store(statistics + 1, total, mask=present)


LENGTHS = ["numbers", "heads", "group", "q_len", "kv_len", "splits"]


@triton.jit(do_not_specialize=LENGTHS)
def attention_kernel(
    q, k, v, out, lse_ptr, partial_ptr, masks, numbers, heads, group, q_len, kv_len, splits,
    KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr, SPLIT: tl.constexpr,
    LSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    attend_program(
        tl.program_id(0), q, k, v, out, lse_ptr, partial_ptr, masks, numbers, heads, group, q_len,
        kv_len, splits, KINDS, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, OWN, LOOP, SPLIT, LSE,
        DOT, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "q_len", "splits"])
def merge_kernel(
    partial_ptr, out, lse_ptr, heads, q_len, splits, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, KINDS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """One query of one head from the splits of its keys, sixteen at a time."""
    index = tl.program_id(0)
    slice_index, row = index // q_len, index % q_len
    columns = tl.arange(0, VALUE_WIDTH)
    partial_row = VALUE_DIM + 2
    step = tl.cast(q_len, tl.int64) * partial_row
    base = partial_ptr + tl.cast(slice_index, tl.int64) * splits * step + row * partial_row
    maximum = -float("inf")
    some = tl.arange(0, 16)  # at once, for the latency of one load
    for first in range(0, splits, 16):
        at = base + (first + some) * step + VALUE_DIM
        grown = tl.load(at, mask=first + some < splits, other=-float("inf"))
        maximum = tl.maximum(maximum, tl.max(grown))
    shift = shift_of(maximum)
    total = 0.0
    acc = tl.zeros([VALUE_WIDTH], tl.float32)
    for first in range(0, splits, 16):
        present = first + some < splits
        at = base + (first + some) * step
        alpha = rescale(tl.load(at + VALUE_DIM, mask=present, other=-float("inf")), shift, KINDS)
        total += tl.sum(alpha * tl.load(at + VALUE_DIM + 1, mask=present, other=0.0))
        inside = present[:, None] & (columns[None, :] < VALUE_DIM)
        parts = tl.load(at[:, None] + columns[None, :], mask=inside, other=0.0)
        acc += tl.sum(alpha[:, None] * parts, 0)
    batch, head = slice_index // heads, slice_index % heads
    base, out_row = rows_of(out, batch, head)
    acc = (acc * inverse(total)).to(base.dtype.element_ty)
    tl.store(base + tl.cast(row, tl.int64) * out_row + columns, acc, mask=columns < VALUE_DIM)
    if LSE:
        tl.store(lse_ptr + tl.cast(index, tl.int64), log_sum(maximum, total, KINDS))


def split_length(q_len: int, kv_len: int, is_causal: bool) -> int:
    """Keys per split, a function of the shape alone so that bits are too; 0 for no splits.

    Few queries leave most of a GPU idle: one row tile of one head is one program.
    """
    if is_causal or q_len > 512:
        return 0
    if q_len <= 128:  # fewer than four of them take longer than one program over all keys
        return 128 if kv_len >= 512 else 0
    return 2048 if kv_len >= 4096 else 0


@planned
def attention_forward(call: Any, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """out (B, H, Lq, Dv) and lse (B, H, Lq), float32, or None."""
    query, key, value = map(rows_readable, (call.query, call.key, call.value))
    batch, heads, q_len, dim = query.shape
    kv_len, value_dim = value.shape[2:]
    out = rows_outside(query, batch, heads, q_len, value_dim)
    lse = empty(query, (batch, heads, q_len), torch.float32) if return_lse else None
    if batch * heads * q_len == 0:
        return out, lse
    scores = score_options(
        call, (batch, heads, q_len, kv_len), None, readable(call.key_padding_mask)
    )
    widest = max(width(dim), width(value_dim))
    sizes = {
        "heads": heads, "group": heads // key.shape[1], "q_len": q_len, "kv_len": kv_len,
        "DIM": dim, "WIDTH": width(dim), "VALUE_DIM": value_dim, "VALUE_WIDTH": width(value_dim),
        "LSE": return_lse,
    }  # fmt: skip
    results = {"out": operand(out), "lse_ptr": query if lse is None else lse}
    if tma.takes(query, key, value, widest, scores["KINDS"]):
        tma.forward(query, key, value, widest, {**sizes, **scores, **results})
        return out, lse
    # Beside whole tiles of 64 columns numbers of positions spill 88 bytes on sm_90, 20 on sm_80.
    even = aligned(dim, value_dim) and (call.position_table is None or widest > 64)
    chosen = tile("attention", query.dtype, widest, query.device, even, has_values(call))
    split = split_length(q_len, kv_len, call.is_causal)
    splits = cdiv(kv_len, split) if split else 1
    own = owned(chosen, q_len, query.dtype)
    partial = (
        empty(query, (batch * heads * splits * q_len * (value_dim + 2),), torch.float32)
        if split
        else query
    )
    launch(
        attention_kernel, batch * heads * splits * cdiv(q_len, own),
        *map(operand, (query, key, value)), **results, partial_ptr=partial, **scores, **sizes,
        splits=splits, OWN=own, LOOP=chosen.loop, SPLIT=split, **chosen.options(),
    )  # fmt: skip
    if split:
        launch(
            merge_kernel, batch * heads * q_len,
            partial, **results, heads=heads, q_len=q_len, splits=splits, VALUE_DIM=value_dim,
            VALUE_WIDTH=width(value_dim), KINDS=units(scores), LSE=return_lse, num_warps=4,
        )  # fmt: skip
    return out, lse
