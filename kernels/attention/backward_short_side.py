"""Attention backward where keys or queries are few: all gradients from one look at a tile.

Keys that fit one tile: one launch, whose programs have every score of their queries, and so the
statistics of the softmax too. Few queries over more keys: the statistics of ranges of keys first;
then a program per tile of keys, which leaves dk and dv of its keys and its part of dq; then the sum
of the parts. As everywhere in the backward, orders of sums depend on lengths alone, and there are
no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.kernels.attention import tma as attention_tma
from fastfusion.kernels.device.gradients import gradients, product_gradient, softmax_gradient
from fastfusion.kernels.device.rows import load_rows, load_tile, rows_of, store_pair, store_rows
from fastfusion.kernels.device.score_policy import (
    PADDING,
    policy_of,
    signed,
    visible_keys,
    visible_range,
)
from fastfusion.kernels.device.scores import product, scores
from fastfusion.kernels.device.softmax import exponentials, inverse, shift_of
from fastfusion.kernels.device.statistics import load_grad_lse, row_sums, store_statistics
from fastfusion.kernels.host.arguments import gradient_scales, operand
from fastfusion.kernels.host.plan import accepted, empty, launch
from fastfusion.kernels.host.tiles import Tile, cdiv, tile, width

# Queries up to which parts of dq are worth their memory: per tile of keys a row in float32, twice
# the size of the keys for 64 queries; and keys from which three launches pay. On an H200 forward
# and backward of 32 queries over 257 keys take 17.5 us instead of 19.1, of one over 1,500 20
# instead of 49, but of 77 over 77 more than before.
FEW, LONG = 128, 256
_MOST_RANGES = 32  # of keys, whose statistics a program merges at once
_QUERIES = 256  # of a split, so that a long call with few keys fills the GPU
LENGTHS = [
    "numbers", "heads", "group", "q_len", "kv_len", "ranges", "range_keys", "splits", "per_split"
]  # fmt: skip


@triton.jit
def whole_statistics(x, dp, policy, KINDS: tl.constexpr):
    """(shift, 1 / sum, delta) of rows from all their scores."""
    shift = shift_of(tl.max(x, 1))
    p = exponentials(x, shift[:, None], policy, KINDS)
    share = inverse(tl.sum(p, 1))
    return shift, share, tl.sum(p * share[:, None] * dp, 1)


@triton.jit
def merged_statistics(
    base, rows, present, q_len, ranges, policy, KINDS: tl.constexpr, RANGES: tl.constexpr
):
    """(shift, 1 / sum, delta) of rows from the sums over ranges of keys."""
    some = tl.arange(0, RANGES)
    at = base + 3 * (some[None, :] * q_len + rows[:, None])
    inside = present[:, None] & (some < ranges)[None, :]
    maximum = tl.load(at, mask=inside, other=-float("inf"))
    shift = shift_of(tl.max(maximum, 1))
    alpha = exponentials(maximum, shift[:, None], policy, KINDS)
    share = inverse(tl.sum(alpha * tl.load(at + 1, mask=inside, other=0.0), 1))
    weighted = tl.sum(alpha * tl.load(at + 2, mask=inside, other=0.0), 1)
    return shift, share, weighted * share


@triton.jit(do_not_specialize=LENGTHS[:7])
def sums_kernel(
    q, k, v, grad, sums_ptr, masks, numbers, heads, group, q_len, kv_len, ranges, range_keys,
    KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Sums of the rows over a range of keys. Programs: (batch * heads, ranges, query tiles)."""
    tiles = tl.cdiv(q_len, LOOP)
    index = tl.program_id(0)
    q_start = index % tiles * LOOP
    at_range = index // tiles % ranges
    slice_index = index // tiles // ranges
    batch, head = slice_index // heads, slice_index % heads
    policy = policy_of(masks, numbers, batch, head, slice_index, q_len, kv_len, KINDS)
    first, last = visible_range(policy, kv_len, KINDS, OWN)
    first = tl.maximum(first, at_range * range_keys)
    last = tl.minimum(last, (at_range + 1) * range_keys)
    present = tl.arange(0, LOOP) < q_len - q_start
    q_base, at_q = rows_of(q, batch, head, TMA)
    k_base, at_k = rows_of(k, batch, head // group, TMA)
    v_base, at_v = rows_of(v, batch, head // group, TMA)
    base, at_grad = rows_of(grad, batch, head, TMA)
    rows = load_tile(q_base, at_q, q_start, present, DIM, WIDTH, True, DOT, TMA)
    of_out = load_tile(base, at_grad, q_start, present, VALUE_DIM, VALUE_WIDTH, True, DOT, TMA)
    maximum, total, weighted = row_sums(
        signed(rows, KINDS), of_out, q_start, k_base, at_k, v_base, at_v, policy, first, last,
        kv_len, KINDS, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, OWN, DOT, PRECISION, TMA,
    )  # fmt: skip
    at = (tl.cast(slice_index, tl.int64) * ranges + at_range) * q_len
    at += q_start + tl.arange(0, LOOP)
    store_statistics(sums_ptr, at, present, maximum, total, weighted)


@triton.jit(do_not_specialize=LENGTHS[:6] + LENGTHS[7:])
def tiles_kernel(
    q, k, v, grad, grad_lse_ptr, dq, dk, dv, partial_ptr, sums_ptr, masks, numbers, heads, group,
    q_len, kv_len, splits, per_split, ranges, of_queries, of_keys, KINDS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    OWN: tl.constexpr, LOOP: tl.constexpr, RANGES: tl.constexpr, SPLIT: tl.constexpr,
    LSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, and dq of its scores. Programs: (batch * key heads, splits of
    queries, tiles of keys).

    RANGES: 0 where the tile has all keys; else dq is one of as many parts as there are tiles, and
    the statistics come from sums over ranges of keys, that many at most. A split is `per_split`
    tiles of queries of the heads that share the keys, one after the other. `of_queries` and
    `of_keys` are the scales of gradients.
    """
    tiles = tl.cdiv(kv_len, OWN)
    index = tl.program_id(0)
    key_tile = index % tiles
    k_start = key_tile * OWN
    slice_k = index // tiles // splits
    kv_heads = heads // group
    batch, kv_head = slice_k // kv_heads, slice_k % kv_heads
    # Of all heads: such calls have neither masks of scores nor slopes.
    policy = policy_of(masks, numbers, batch, 0, 0, q_len, kv_len, KINDS)
    visible = visible_keys(policy.padding, k_start, kv_len, OWN, PADDING & KINDS)
    k_base, at_k = rows_of(k, batch, kv_head, TMA)
    v_base, at_v = rows_of(v, batch, kv_head, TMA)
    keys = load_tile(k_base, at_k, k_start, visible, DIM, WIDTH, True, DOT, TMA)
    values = load_tile(v_base, at_v, k_start, visible, VALUE_DIM, VALUE_WIDTH, True, DOT, TMA)
    ELEMENT: tl.constexpr = k_base.dtype if TMA else k_base.dtype.element_ty
    key_sum = tl.zeros([OWN, WIDTH], tl.float32)
    value_sum = tl.zeros([OWN, VALUE_WIDTH], tl.float32)
    row_tiles = tl.cdiv(q_len, LOOP)
    first = index // tiles % splits * per_split
    for unit in range(first, tl.minimum(first + per_split, group * row_tiles)):
        head, start = kv_head * group + unit // row_tiles, unit % row_tiles * LOOP
        slice_index = batch * heads + head
        rows = start + tl.arange(0, LOOP)
        present = tl.arange(0, LOOP) < q_len - start
        at = tl.cast(slice_index, tl.int64) * q_len + rows
        base, at_q = rows_of(q, batch, head, TMA)
        queries = load_tile(base, at_q, start, present, DIM, WIDTH, True, DOT, TMA)
        queries = signed(queries, KINDS)
        base, at_grad = rows_of(grad, batch, head, TMA)
        of_out = load_tile(base, at_grad, start, present, VALUE_DIM, VALUE_WIDTH, True, DOT, TMA)
        grad_lse = load_grad_lse(grad_lse_ptr, at, present, LSE)
        x, derivative = scores(
            queries, keys, policy, start, k_start, visible, KINDS, True, True, False, PRECISION
        )
        dp = product(of_out, values, PRECISION)
        if RANGES == 0:
            shift, share, delta = whole_statistics(x, dp, policy, KINDS)
        else:
            sums = sums_ptr + 3 * tl.cast(slice_index, tl.int64) * ranges * q_len
            shift, share, delta = merged_statistics(
                sums, rows, present, q_len, ranges, policy, KINDS, RANGES
            )
        _, ds = softmax_gradient(
            x,
            dp,
            True,
            shift[:, None],
            share[:, None],
            delta[:, None],
            grad_lse[:, None],
            policy,
            KINDS,
        )
        ds = product_gradient(ds, derivative, policy, KINDS).to(ELEMENT).to(DOT)
        row_sum = tl.dot(ds, keys, input_precision=PRECISION)
        if RANGES == 0:
            to, to_row = rows_of(dq, batch, head)
            store_rows(to, row_sum * of_queries, start, present, to_row, DIM)
        else:
            to = dq[0] + (tl.cast(slice_index, tl.int64) * tiles + key_tile) * q_len * DIM
            store_rows(to, row_sum, start, present, DIM, DIM)
        p, ds, derivative = gradients(
            queries, keys, values, of_out, start, k_start, visible, shift[None, :], share[None, :],
            delta[None, :], grad_lse[None, :], policy, KINDS, True, PRECISION,
        )  # fmt: skip
        value_sum = tl.dot(p.to(ELEMENT).to(DOT), of_out, value_sum, input_precision=PRECISION)
        ds = product_gradient(ds, derivative, policy, KINDS).to(ELEMENT).to(DOT)
        key_sum = tl.dot(ds, queries, key_sum, input_precision=PRECISION)
    exists = k_start + tl.arange(0, OWN) < kv_len
    store_pair(
        key_sum, value_sum, of_keys, k_start, exists,
        partial_ptr + tl.cast(index // tiles, tl.int64) * kv_len * (DIM + VALUE_DIM),
        dk, dv, batch, kv_head, SPLIT, DIM, VALUE_DIM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "q_len", "tiles"])
def rows_merge_kernel(
    parts_ptr, dq, heads, q_len, tiles, gradient_scale, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """dq of one row from the parts of all tiles of keys, sixteen at a time."""
    index = tl.program_id(0)
    slice_index, row = index // q_len, index % q_len
    step = tl.cast(q_len, tl.int64) * DIM
    base = parts_ptr + tl.cast(slice_index, tl.int64) * tiles * step + row * DIM
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(0, tiles, 16):
        present = first + tl.arange(0, 16) < tiles
        total += tl.sum(load_rows(base, first, present, step, DIM, WIDTH, tl.float32), 0)
    to, to_row = rows_of(dq, slice_index // heads, slice_index % heads)
    columns = tl.arange(0, WIDTH)
    total = (total * gradient_scale).to(to.dtype.element_ty)
    tl.store(to + tl.cast(row, tl.int64) * to_row + columns, total, mask=columns < DIM)


def inputs(
    operands: tuple[Tensor, Tensor, Tensor, Tensor], of_queries: int, of_keys: int, tma: bool
) -> list[Any]:
    """query, key, value and d out as kernels take them, or descriptors of tiles of so many rows."""
    rows = (of_queries, of_keys, of_keys, of_queries)
    return list(map(attention_tma.describe, operands, rows) if tma else map(operand, operands))


def parts_of_splits(query: Tensor, dk: Tensor, dv: Tensor, splits: int) -> Tensor:
    """Room for what each of several splits of the queries adds to dk and dv; else any tensor."""
    if splits == 1:
        return query
    return empty(query, (splits * (dk.numel() + dv.numel()),), torch.float32)


def chosen(query: Tensor, widest: int, kv_len: int, even: bool, masked: bool) -> Tile | None:
    """The tile of a call that goes this way (own: keys, loop: queries), or None.

    16-bit operands up to 64 wide, which leave registers for both orientations of the products, and
    few keys, or few queries over any number of them. None that is `masked` by an attn_mask, a
    diagonal or dropout, nor rows of which each element is a load of its own (not `even`), unless
    they are narrow.
    """
    if query.itemsize != 2 or widest > 64 or masked or not (even or widest <= 32):
        return None
    cut = tile("attention_backward_tiles", query.dtype, widest, query.device)
    few_queries = query.shape[2] <= FEW and kv_len >= LONG
    return cut if kv_len <= cut.own or few_queries else None


def backward(
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor],
    cut: Tile,
    tma: bool,
    options: dict[str, Any],
) -> tuple[Tensor, int]:
    """Fills dq and, unless the queries are cut into several splits, dk and dv.

    Args:
        operands: query, key, value and the gradient of the output.
        results: dq, dk, dv.
        cut: what `chosen` gave.
        tma: the operands can be read by descriptors.
        options: run-time and compile-time arguments of the backward kernels.

    Returns:
        The parts of dk and dv, and how many splits of the queries there are.
    """
    query, key, value, _ = operands
    dq, dk, dv = results
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    tiles, units = cdiv(kv_len, cut.own), cdiv(q_len, cut.loop) * (heads // kv_heads)
    per_split = cdiv(units, min(16, cdiv(units * cut.loop, _QUERIES if tiles == 1 else 1024)))
    splits = cdiv(units, per_split)
    partial = parts_of_splits(query, dk, dv, splits)
    given = inputs(operands, cut.loop, cut.own, tma)
    common = {**options, "OWN": cut.own, "LOOP": cut.loop, "TMA": tma, **cut.options()}
    ranges, sums, parts = 0, query, query
    if tiles > 1:
        range_keys = max(2 * cut.own, cdiv(cdiv(kv_len, _MOST_RANGES), cut.own) * cut.own)
        ranges = cdiv(kv_len, range_keys)
        sums = empty(query, (batch * heads * ranges * q_len * 3,), torch.float32)
        parts = empty(query, (batch * heads * tiles * q_len * dim,), torch.float32)
        launch(
            sums_kernel, batch * heads * ranges * cdiv(q_len, cut.loop), *given, sums_ptr=sums,
            ranges=ranges, range_keys=range_keys, **accepted(sums_kernel, common),
        )  # fmt: skip
    of_queries, of_keys = gradient_scales(options)
    launch(
        tiles_kernel, batch * kv_heads * splits * tiles,
        *given, dq=operand(dq) if tiles == 1 else (parts,), dk=operand(dk), dv=operand(dv),
        partial_ptr=partial, sums_ptr=sums, **accepted(tiles_kernel, common), splits=splits,
        per_split=per_split, ranges=ranges, RANGES=width(ranges) if ranges else 0,
        SPLIT=splits > 1, of_queries=of_queries, of_keys=of_keys,
    )  # fmt: skip
    if tiles > 1:
        launch(
            rows_merge_kernel, batch * heads * q_len, parts, operand(dq), heads=heads, q_len=q_len,
            tiles=tiles, DIM=dim, WIDTH=width(dim), num_warps=4, gradient_scale=of_queries,
        )  # fmt: skip
    return partial, splits
