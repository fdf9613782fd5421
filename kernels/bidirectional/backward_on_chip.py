"""Bidirectional attention backward where all keys are one tile on chip: every score is made once.

A program owns a range of rows, as in the forward. The first kernel leaves each range's part of the
columns' statistics; the second adds them up, takes the rows' own from the tile itself, and makes
dS once for dq and dk: seven products, and two for the statistics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.kernels.attention.backward import merge_splits
from fastfusion.kernels.bidirectional.arguments import row_ranges, shared_sizes
from fastfusion.kernels.device.dropout import kept_pair
from fastfusion.kernels.device.gradients import product_gradient, softmax_gradient
from fastfusion.kernels.device.rows import load_rows, rows_of, store_pair, store_rows
from fastfusion.kernels.device.score_policy import (
    DROPOUT,
    PADDING,
    ROW_PADDING,
    policy_of,
    signed,
    visible_keys,
)
from fastfusion.kernels.device.scores import scores
from fastfusion.kernels.device.softmax import exponentials, inverse, shift_of
from fastfusion.kernels.device.statistics import load_grad_lse
from fastfusion.kernels.device.sums import add, multiply_add, nothing_lost
from fastfusion.kernels.host.arguments import gradient_scales, operand
from fastfusion.kernels.host.plan import accepted, empty, launch
from fastfusion.kernels.host.tiles import tile, width

LENGTHS = ["numbers", "heads", "q_len", "kv_len", "splits", "per_split"]


@triton.jit(do_not_specialize=LENGTHS)
def columns_kernel(
    q, k, qv, grad_k, columns_ptr, masks, numbers, heads, q_len, kv_len, splits, per_split,
    KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, QV_DIM: tl.constexpr,
    QV_WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, EXCHANGED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(maximum, sum, weighted dP) of every column over a range of rows: (ranges, 3, keys)."""
    index = tl.program_id(0)
    slice_index = index // splits
    batch, head = slice_index // heads, slice_index % heads
    policy = policy_of(masks, numbers, batch, head, slice_index, q_len, kv_len, KINDS)
    q_base, q_row = rows_of(q, batch, head)
    qv_base, qv_row = rows_of(qv, batch, head)
    at_keys = tl.arange(0, KEYS)
    existing = at_keys < kv_len
    base, row = rows_of(k, batch, head)
    keys = signed(load_rows(base, 0, existing, row, DIM, WIDTH, DOT), KINDS)
    base, row = rows_of(grad_k, batch, head)
    key_grads = load_rows(base, 0, existing, row, QV_DIM, QV_WIDTH, DOT)
    maximum = tl.full([KEYS], -float("inf"), tl.float32)
    total = tl.zeros([KEYS], tl.float32)
    total_lost, weighted, weighted_lost = total, total, total
    first = index % splits * per_split
    for start in range(first, tl.minimum(first + per_split, q_len), ROWS):
        present = tl.arange(0, ROWS) < q_len - start
        visible = visible_keys(
            policy.row_padding, start, q_len, ROWS, ROW_PADDING & KINDS, DROPOUT & KINDS
        )
        queries = load_rows(q_base, start, present, q_row, DIM, WIDTH, DOT)
        values = load_rows(qv_base, start, visible, qv_row, QV_DIM, QV_WIDTH, DOT)
        x, _ = scores(
            queries, keys, policy, start, 0, existing, KINDS, False, True, False, PRECISION
        )
        x = tl.where(visible[:, None], x, -float("inf"))
        dp = tl.dot(values, tl.trans(key_grads), input_precision=PRECISION)
        if DROPOUT & KINDS:
            keep = kept_pair(policy, start, 0, ROWS, KEYS, not EXCHANGED, EXCHANGED)
            dp = tl.where(keep, dp * policy.keep_scale, 0.0)
        grown = tl.maximum(maximum, tl.max(x, 0))
        shift = shift_of(grown)
        p = exponentials(x, shift[None, :], policy, KINDS)
        alpha = exponentials(maximum, shift, policy, KINDS)
        total, total_lost = add(total * alpha, total_lost * alpha, tl.sum(p, 0))
        weighted, weighted_lost = add(weighted * alpha, weighted_lost * alpha, tl.sum(p * dp, 0))
        maximum = grown
    at = columns_ptr + tl.cast(index, tl.int64) * 3 * KEYS + at_keys
    tl.store(at, maximum)
    tl.store(at + KEYS, total)
    tl.store(at + 2 * KEYS, weighted)


@triton.jit
def merged_columns(columns_ptr, splits, policy, KINDS: tl.constexpr, KEYS: tl.constexpr):
    """(shift, 1 / sum, delta) of every column from its ranges, in ascending order."""
    base = columns_ptr + tl.cast(policy.slice_index, tl.int64) * splits * 3 * KEYS
    base += tl.arange(0, KEYS)
    maximum = tl.full([KEYS], -float("inf"), tl.float32)
    for split in range(0, splits):
        maximum = tl.maximum(maximum, tl.load(base + split * 3 * KEYS))
    shift = shift_of(maximum)
    total = tl.zeros([KEYS], tl.float32)
    weighted = tl.zeros([KEYS], tl.float32)
    for split in range(0, splits):
        at = base + split * 3 * KEYS
        alpha = exponentials(tl.load(at), shift, policy, KINDS)
        total += alpha * tl.load(at + KEYS)
        weighted += alpha * tl.load(at + 2 * KEYS)
    share = inverse(total)
    return shift, share, weighted * share


@triton.jit(do_not_specialize=LENGTHS)
def gradients_kernel(
    q, k, v, qv, grad_q, grad_k, q_grad_lse_ptr, k_grad_lse_ptr, columns_ptr, dq, dk, dv, dqv,
    partial_ptr, masks, numbers, heads, q_len, kv_len, splits, per_split, gradient_scale,
    KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, V_DIM: tl.constexpr,
    V_WIDTH: tl.constexpr, QV_DIM: tl.constexpr, QV_WIDTH: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SPLIT: tl.constexpr, EXCHANGED: tl.constexpr, LSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and d query_value of a range of rows, and its part of dk and d value."""
    index = tl.program_id(0)
    slice_index = index // splits
    batch, head = slice_index // heads, slice_index % heads
    policy = policy_of(masks, numbers, batch, head, slice_index, q_len, kv_len, KINDS)
    q_base, q_row = rows_of(q, batch, head)
    qv_base, qv_row = rows_of(qv, batch, head)
    grad_q_base, grad_q_row = rows_of(grad_q, batch, head)
    dq_base, dq_row = rows_of(dq, batch, head)
    dqv_base, dqv_row = rows_of(dqv, batch, head)
    ELEMENT: tl.constexpr = q_base.dtype.element_ty
    existing = tl.arange(0, KEYS) < kv_len
    k_visible = visible_keys(policy.padding, 0, kv_len, KEYS, PADDING & KINDS, DROPOUT & KINDS)
    base, row = rows_of(k, batch, head)
    keys = load_rows(base, 0, existing, row, DIM, WIDTH, DOT)
    base, row = rows_of(v, batch, head)
    key_values = load_rows(base, 0, k_visible, row, V_DIM, V_WIDTH, DOT)
    base, row = rows_of(grad_k, batch, head)
    key_grads = load_rows(base, 0, existing, row, QV_DIM, QV_WIDTH, DOT)
    at = tl.cast(slice_index, tl.int64) * kv_len + tl.arange(0, KEYS)
    k_grad_lse = load_grad_lse(k_grad_lse_ptr, at, existing, LSE)
    k_shift, k_share, k_delta = merged_columns(columns_ptr, splits, policy, KINDS, KEYS)
    key_sum = tl.zeros([KEYS, WIDTH], tl.float32)
    value_sum = tl.zeros([KEYS, V_WIDTH], tl.float32)
    key_lost, value_lost = nothing_lost(key_sum, DOT), nothing_lost(value_sum, DOT)
    first = index % splits * per_split
    for start in range(first, tl.minimum(first + per_split, q_len), ROWS):
        rows = start + tl.arange(0, ROWS)
        present = tl.arange(0, ROWS) < q_len - start
        visible = visible_keys(
            policy.row_padding, start, q_len, ROWS, ROW_PADDING & KINDS, DROPOUT & KINDS
        )
        queries = load_rows(q_base, start, present, q_row, DIM, WIDTH, DOT)
        values = load_rows(qv_base, start, visible, qv_row, QV_DIM, QV_WIDTH, DOT)
        grads = load_rows(grad_q_base, start, present, grad_q_row, V_DIM, V_WIDTH, DOT)
        x, derivative = scores(
            queries, signed(keys, KINDS), policy, start, 0, existing, KINDS, False, True, True,
            PRECISION,
        )  # fmt: skip
        over_keys = tl.dot(key_values, tl.trans(grads), input_precision=PRECISION)
        over_rows = tl.dot(key_grads, tl.trans(values), input_precision=PRECISION)
        keep_keys, keep_rows = over_keys == over_keys, over_rows == over_rows
        if DROPOUT & KINDS:
            keep_keys = kept_pair(policy, 0, start, KEYS, ROWS, EXCHANGED, not EXCHANGED)
            keep_rows = kept_pair(policy, 0, start, KEYS, ROWS, not EXCHANGED, not EXCHANGED)
            over_keys = tl.where(keep_keys, over_keys * policy.keep_scale, 0.0)
            over_rows = tl.where(keep_rows, over_rows * policy.keep_scale, 0.0)
        p_rows, ds = softmax_gradient(
            tl.where(visible[None, :], x, -float("inf")), over_rows, keep_rows, k_shift[:, None],
            k_share[:, None], k_delta[:, None], k_grad_lse[:, None], policy, KINDS,
        )  # fmt: skip
        x = tl.where(k_visible[:, None], x, -float("inf"))
        p = exponentials(x, shift_of(tl.max(x, 0))[None, :], policy, KINDS)
        p = p * inverse(tl.sum(p, 0))[None, :]
        delta = tl.sum(p * over_keys, 0)
        q_at = tl.cast(slice_index, tl.int64) * q_len + rows
        grad_lse = load_grad_lse(q_grad_lse_ptr, q_at, present, LSE)
        ds += p * ((over_keys - delta[None, :]) + grad_lse[None, :])
        if DROPOUT & KINDS:
            p = tl.where(keep_keys, p * policy.keep_scale, 0.0)
        ds = product_gradient(ds, derivative, policy, KINDS)
        ds = ds.to(ELEMENT).to(DOT)
        p = p.to(ELEMENT).to(DOT)
        p_rows = p_rows.to(ELEMENT).to(DOT)
        row_sum = tl.dot(tl.trans(ds), keys, input_precision=PRECISION) * gradient_scale
        store_rows(dq_base, row_sum, start, present, dq_row, DIM)
        row_sum = tl.dot(tl.trans(p_rows), key_grads, input_precision=PRECISION)
        store_rows(dqv_base, row_sum, start, present, dqv_row, QV_DIM)
        key_sum, key_lost = multiply_add(key_sum, key_lost, ds, queries, PRECISION)
        # Rows that do not exist have a softmax too; their gradient is 0.
        value_sum, value_lost = multiply_add(value_sum, value_lost, p, grads, PRECISION)
    store_pair(
        key_sum, value_sum, gradient_scale, 0, existing,
        partial_ptr + tl.cast(index, tl.int64) * kv_len * (DIM + V_DIM), dk, dv, batch, head, SPLIT,
        DIM, V_DIM,
    )  # fmt: skip


def keys_on_chip(kv_len: int, widest: int, itemsize: int) -> bool:
    """Whether dk and d value of all keys fit the registers beside the tiles: 64 keys by 64."""
    return kv_len <= 128 and width(kv_len) * widest * itemsize <= 8192


def shared_backward(
    given: dict[str, Any], found: dict[str, Tensor], widest: int, turned: bool
) -> None:
    """Fill `found` (dq, dk, dv, dqv); `given` are the arguments common to the kernels."""
    query = given["q"][0]
    (batch, heads, q_len, dim), kv_len = query.shape, given["kv_len"]
    chosen = tile("bidirectional_shared", query.dtype, widest, query.device)
    rows, keys = shared_sizes(given["KINDS"], kv_len, chosen.loop)
    splits, per_split = row_ranges(q_len, rows)
    programs = batch * heads * splits
    v_dim = given["V_DIM"]
    sizes = {
        "columns_ptr": empty(query, (programs * 3 * keys,), torch.float32), "splits": splits,
        "per_split": per_split, "ROWS": rows, "KEYS": keys, "EXCHANGED": turned,
        **chosen.options(),
    }  # fmt: skip
    given = {**given, **sizes}
    launch(columns_kernel, programs, **accepted(columns_kernel, given))
    partial = query
    if splits > 1:
        partial = empty(query, (programs * kv_len * (dim + v_dim),), torch.float32)
    launch(
        gradients_kernel, programs, **given, **{n: operand(g) for n, g in found.items()},
        partial_ptr=partial, SPLIT=splits > 1, gradient_scale=gradient_scales(given)[0],
    )  # fmt: skip
    if splits > 1 and kv_len:
        merge_splits(partial, found["dk"], found["dv"], splits)
