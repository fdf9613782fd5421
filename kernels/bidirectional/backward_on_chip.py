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
from fastfusion.kernels.device.gradients import partly_scaled, softmax_gradient
from fastfusion.kernels.device.masks import visible_keys
from fastfusion.kernels.device.rows import load_rows, slice_base, store_key_gradients, store_rows
from fastfusion.kernels.device.scores import scores
from fastfusion.kernels.device.softmax import exponentials, inverse, shift_of
from fastfusion.kernels.device.statistics import load_grad_lse
from fastfusion.kernels.device.sums import add, multiply_add, nothing_lost
from fastfusion.kernels.host.arguments import gradient_scale, strides
from fastfusion.kernels.host.plan import accepted, empty, launch
from fastfusion.kernels.host.tiles import tile, width

LENGTHS = [
    "heads", "q_len", "kv_len", "q_padding_batch", "diagonal", "threshold", "k_padding_batch"
]  # fmt: skip
RANGES = ["splits", "per_split"]


@triton.jit(do_not_specialize=[*LENGTHS[:6], *RANGES])
def columns_kernel(
    q_ptr, k_ptr, qv_ptr, grad_k_ptr, columns_ptr, mask_ptr, q_padding_ptr, seed_ptr, q_batch,
    q_head, q_row, k_batch, k_head, k_row, qv_batch, qv_head, qv_row, grad_k_batch, grad_k_head,
    grad_k_row, mask_batch, mask_head, mask_row, mask_column, q_padding_batch, diagonal, heads,
    q_len, kv_len, splits, per_split, scale, factor, threshold, keep_scale, SIGN: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, QV_DIM: tl.constexpr, QV_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EXCHANGED: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, Q_PADDING: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(maximum, sum, weighted dP) of every column over a range of rows: (ranges, 3, keys)."""
    index = tl.program_id(0)
    slice_index = index // splits
    batch, head = slice_index // heads, slice_index % heads
    q_base = slice_base(q_ptr, batch, head, q_batch, q_head)
    qv_base = slice_base(qv_ptr, batch, head, qv_batch, qv_head)
    mask_base = slice_base(mask_ptr, batch, head, mask_batch, mask_head)
    mask = (mask_base, mask_row, mask_column, q_len, kv_len, diagonal)
    q_padding = q_padding_ptr + tl.cast(batch, tl.int64) * q_padding_batch
    keys = tl.arange(0, KEYS)
    existing = keys < kv_len
    k_base = slice_base(k_ptr, batch, head, k_batch, k_head)
    k = load_rows(k_base, 0, existing, k_row, DIM, WIDTH, DOT)
    if SIGN != 1:
        k = k * SIGN
    base = slice_base(grad_k_ptr, batch, head, grad_k_batch, grad_k_head)
    grad_k = load_rows(base, 0, existing, grad_k_row, QV_DIM, QV_WIDTH, DOT)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    maximum = tl.full([KEYS], -float("inf"), tl.float32)
    total = tl.zeros([KEYS], tl.float32)
    total_lost, weighted, weighted_lost = total, total, total
    first = index % splits * per_split
    for start in range(first, tl.minimum(first + per_split, q_len), ROWS):
        visible = visible_keys(q_padding, start, q_len, ROWS, Q_PADDING, DROPOUT)
        q = load_rows(q_base, start, tl.arange(0, ROWS) < q_len - start, q_row, DIM, WIDTH, DOT)
        qv = load_rows(qv_base, start, visible, qv_row, QV_DIM, QV_WIDTH, DOT)
        x = scores(q, k, start, 0, existing, mask, scale, False, CAUSAL, MASK, False, PRECISION)
        x = tl.where(visible[:, None], x, -float("inf"))
        dp = tl.dot(qv, tl.trans(grad_k), input_precision=PRECISION)
        if DROPOUT:
            keep = kept_pair(
                seed, slice_index, start, 0, threshold, ROWS, KEYS, not EXCHANGED, EXCHANGED
            )
            dp = tl.where(keep, dp * keep_scale, 0.0)
        grown = tl.maximum(maximum, tl.max(x, 0))
        shift = shift_of(grown)
        p = exponentials(x, shift[None, :], factor, MASK)
        alpha = exponentials(maximum, shift, factor, MASK)
        total, total_lost = add(total * alpha, total_lost * alpha, tl.sum(p, 0))
        weighted, weighted_lost = add(weighted * alpha, weighted_lost * alpha, tl.sum(p * dp, 0))
        maximum = grown
    at = columns_ptr + tl.cast(index, tl.int64) * 3 * KEYS + keys
    tl.store(at, maximum)
    tl.store(at + KEYS, total)
    tl.store(at + 2 * KEYS, weighted)


@triton.jit
def merged_columns(
    columns_ptr, slice_index, splits, factor, KEYS: tl.constexpr, MASK: tl.constexpr
):
    """(shift, 1 / sum, delta) of every column from its ranges, in ascending order."""
    base = columns_ptr + tl.cast(slice_index, tl.int64) * splits * 3 * KEYS + tl.arange(0, KEYS)
    maximum = tl.full([KEYS], -float("inf"), tl.float32)
    for split in range(0, splits):
        maximum = tl.maximum(maximum, tl.load(base + split * 3 * KEYS))
    shift = shift_of(maximum)
    total = tl.zeros([KEYS], tl.float32)
    weighted = tl.zeros([KEYS], tl.float32)
    for split in range(0, splits):
        at = base + split * 3 * KEYS
        alpha = exponentials(tl.load(at), shift, factor, MASK)
        total += alpha * tl.load(at + KEYS)
        weighted += alpha * tl.load(at + 2 * KEYS)
    share = inverse(total)
    return shift, share, weighted * share


@triton.jit(do_not_specialize=[*LENGTHS, *RANGES])
def gradients_kernel(
    q_ptr, k_ptr, v_ptr, qv_ptr, grad_q_ptr, grad_k_ptr, q_grad_lse_ptr, k_grad_lse_ptr,
    columns_ptr, dq_ptr, dk_ptr, dv_ptr, dqv_ptr, partial_ptr, mask_ptr, q_padding_ptr,
    k_padding_ptr, seed_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    qv_batch, qv_head, qv_row, grad_q_batch, grad_q_head, grad_q_row, grad_k_batch, grad_k_head,
    grad_k_row, dq_batch, dq_head, dq_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    dqv_batch, dqv_head, dqv_row, mask_batch, mask_head, mask_row, mask_column, q_padding_batch,
    k_padding_batch, diagonal, heads, q_len, kv_len, splits, per_split, scale, factor, threshold,
    keep_scale, gradient_scale, SIGN: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, QV_DIM: tl.constexpr, QV_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, EXCHANGED: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, Q_PADDING: tl.constexpr, K_PADDING: tl.constexpr,
    DROPOUT: tl.constexpr, LSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and d query_value of a range of rows, and its part of dk and d value."""
    index = tl.program_id(0)
    slice_index = index // splits
    batch, head = slice_index // heads, slice_index % heads
    q_base = slice_base(q_ptr, batch, head, q_batch, q_head)
    qv_base = slice_base(qv_ptr, batch, head, qv_batch, qv_head)
    grad_q_base = slice_base(grad_q_ptr, batch, head, grad_q_batch, grad_q_head)
    dq_base = slice_base(dq_ptr, batch, head, dq_batch, dq_head)
    dqv_base = slice_base(dqv_ptr, batch, head, dqv_batch, dqv_head)
    mask_base = slice_base(mask_ptr, batch, head, mask_batch, mask_head)
    mask = (mask_base, mask_row, mask_column, q_len, kv_len, diagonal)
    q_padding = q_padding_ptr + tl.cast(batch, tl.int64) * q_padding_batch
    k_padding = k_padding_ptr + tl.cast(batch, tl.int64) * k_padding_batch
    existing = tl.arange(0, KEYS) < kv_len
    k_visible = visible_keys(k_padding, 0, kv_len, KEYS, K_PADDING, DROPOUT)
    k_base = slice_base(k_ptr, batch, head, k_batch, k_head)
    k = load_rows(k_base, 0, existing, k_row, DIM, WIDTH, DOT)
    signed = k
    if SIGN != 1:
        signed = k * SIGN
    v_base = slice_base(v_ptr, batch, head, v_batch, v_head)
    v = load_rows(v_base, 0, k_visible, v_row, V_DIM, V_WIDTH, DOT)
    base = slice_base(grad_k_ptr, batch, head, grad_k_batch, grad_k_head)
    grad_k = load_rows(base, 0, existing, grad_k_row, QV_DIM, QV_WIDTH, DOT)
    at = tl.cast(slice_index, tl.int64) * kv_len + tl.arange(0, KEYS)
    k_grad_lse = load_grad_lse(k_grad_lse_ptr, at, existing, LSE)
    k_shift, k_share, k_delta = merged_columns(columns_ptr, slice_index, splits, factor, KEYS, MASK)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, V_WIDTH], tl.float32)
    dk_lost, dv_lost = nothing_lost(dk, DOT), nothing_lost(dv, DOT)
    first = index % splits * per_split
    for start in range(first, tl.minimum(first + per_split, q_len), ROWS):
        rows = start + tl.arange(0, ROWS)
        present = tl.arange(0, ROWS) < q_len - start
        visible = visible_keys(q_padding, start, q_len, ROWS, Q_PADDING, DROPOUT)
        q = load_rows(q_base, start, present, q_row, DIM, WIDTH, DOT)
        qv = load_rows(qv_base, start, visible, qv_row, QV_DIM, QV_WIDTH, DOT)
        grad_q = load_rows(grad_q_base, start, present, grad_q_row, V_DIM, V_WIDTH, DOT)
        x = scores(q, signed, start, 0, existing, mask, scale, False, CAUSAL, MASK, True, PRECISION)
        over_keys = tl.dot(v, tl.trans(grad_q), input_precision=PRECISION)
        over_rows = tl.dot(grad_k, tl.trans(qv), input_precision=PRECISION)
        keep_keys, keep_rows = over_keys == over_keys, over_rows == over_rows
        if DROPOUT:
            keep_keys = kept_pair(
                seed, slice_index, 0, start, threshold, KEYS, ROWS, EXCHANGED, not EXCHANGED
            )
            keep_rows = kept_pair(
                seed, slice_index, 0, start, threshold, KEYS, ROWS, not EXCHANGED, not EXCHANGED
            )
            over_keys = tl.where(keep_keys, over_keys * keep_scale, 0.0)
            over_rows = tl.where(keep_rows, over_rows * keep_scale, 0.0)
        p_rows, ds = softmax_gradient(
            tl.where(visible[None, :], x, -float("inf")), over_rows, keep_rows, k_shift[:, None],
            k_share[:, None], k_delta[:, None], k_grad_lse[:, None], factor, keep_scale, MASK,
            DROPOUT,
        )  # fmt: skip
        x = tl.where(k_visible[:, None], x, -float("inf"))
        p = exponentials(x, shift_of(tl.max(x, 0))[None, :], factor, MASK)
        p = p * inverse(tl.sum(p, 0))[None, :]
        delta = tl.sum(p * over_keys, 0)
        q_at = tl.cast(slice_index, tl.int64) * q_len + rows
        grad_lse = load_grad_lse(q_grad_lse_ptr, q_at, present, LSE)
        ds += p * ((over_keys - delta[None, :]) + grad_lse[None, :])
        if DROPOUT:
            p = tl.where(keep_keys, p * keep_scale, 0.0)
        ds = partly_scaled(ds, factor, MASK)
        ds = ds.to(q_ptr.dtype.element_ty).to(DOT)
        p = p.to(q_ptr.dtype.element_ty).to(DOT)
        p_rows = p_rows.to(q_ptr.dtype.element_ty).to(DOT)
        dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION) * gradient_scale
        store_rows(dq_base, dq, start, present, dq_row, DIM)
        dqv = tl.dot(tl.trans(p_rows), grad_k, input_precision=PRECISION)
        store_rows(dqv_base, dqv, start, present, dqv_row, QV_DIM)
        dk, dk_lost = multiply_add(dk, dk_lost, ds, q, PRECISION)
        # Rows that do not exist have a softmax too; their gradient is 0.
        dv, dv_lost = multiply_add(dv, dv_lost, p, grad_q, PRECISION)
    store_key_gradients(
        dk, dv, gradient_scale, 0, existing,
        partial_ptr + tl.cast(index, tl.int64) * kv_len * (DIM + V_DIM), dk_ptr, dv_ptr, batch,
        head, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, SPLIT, DIM, V_DIM,
    )  # fmt: skip


def keys_on_chip(kv_len: int, widest: int, itemsize: int) -> bool:
    """Whether dk and d value of all keys fit the registers beside the tiles: 64 keys by 64."""
    return kv_len <= 128 and width(kv_len) * widest * itemsize <= 8192


def shared_backward(
    given: dict[str, Any], found: dict[str, Tensor], widest: int, turned: bool
) -> None:
    """Fill `found` (dq, dk, dv, dqv); `given` are the arguments common to the kernels."""
    query = given["q_ptr"]
    (batch, heads, q_len, dim), kv_len = query.shape, given["kv_len"]
    chosen = tile("bidirectional_shared", query.dtype, widest, query.device)
    mask = given["mask_ptr"] if given["MASK"] else None
    seed = given["seed_ptr"] if given["DROPOUT"] else None
    rows, keys = shared_sizes(mask, seed, kv_len, chosen.loop)
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
        gradients_kernel, programs, **given, **{f"{n}_ptr": g for n, g in found.items()},
        **strides(**found), partial_ptr=partial, SPLIT=splits > 1,
        gradient_scale=given["SIGN"] * gradient_scale(given),
    )  # fmt: skip
    if splits > 1 and kv_len:
        merge_splits(partial, found["dk"], found["dv"], splits)
