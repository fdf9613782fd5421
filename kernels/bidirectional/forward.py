"""Bidirectional attention forward: two softmax directions from one score matrix.

Where one side is short, its keys, its values and the sums over the other side stay on chip: a
program owns a range of the long side's rows, makes every score once, finishes the softmax of each
row and carries the columns' on (three products instead of four). The ranges depend on the shape
alone, and a second kernel merges them in order.

Where it is not, one launch runs both directions as attention (column sums of 256 keys by 256
values would be 256 KB per program; parts of them per tile of rows would be written and read again
at twice the traffic of everything else).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.core.score_policy import sides_of
from fastfusion.kernels.attention.forward import (
    attend_program,
    merge_kernel,
    split_length,
    store_partial,
)
from fastfusion.kernels.bidirectional.arguments import (
    common_options,
    exchanged,
    prepared,
    row_ranges,
    shared_sizes,
)
from fastfusion.kernels.device.dropout import kept_pair
from fastfusion.kernels.device.rows import load_rows, rows_of, store_rows
from fastfusion.kernels.device.score_policy import (
    DROPOUT,
    PADDING,
    ROW_PADDING,
    policy_of,
    signed,
    visible_keys,
)
from fastfusion.kernels.device.scores import scores
from fastfusion.kernels.device.softmax import (
    inverse,
    log_sum,
    rescale,
    scaled_maximum,
    shift_of,
    weights,
)
from fastfusion.kernels.device.sums import add, multiply_add, nothing_lost
from fastfusion.kernels.host import tiles
from fastfusion.kernels.host.arguments import (
    exchanged_kinds,
    has_segments,
    operand,
    rows_outside,
    shapes_scores,
    units,
)
from fastfusion.kernels.host.plan import empty, launch, planned
from fastfusion.kernels.host.tiles import cdiv, owned, tile, width

# Bytes of the column sums as operands; twice that as float32: the accumulators of 256 threads.
ON_CHIP = 32768
# Keys up to which a step takes 64 rows on Hopper: a call of 36 x 20 takes 4.2 us and not 5.9 with
# 32 (H200), one of 196 x 64 14 and not 20 with 16.
FEW_KEYS = 64
# Lengths of the longer side from which one score matrix pays. Shorter calls have no products to
# save, and a program that has all rows of a head leaves a GPU idle: of 196 x 64 it takes 13.5 us
# where a launch that computes each direction takes 4.6, of 2,125 x 64 with 256 columns 31 where
# that takes 41 (H200).
LONG = 512
LENGTHS = [
    "numbers", "heads", "q_len", "kv_len", "splits", "per_split", "q_splits", "k_splits",
    "q_programs",
]  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS[:6])
def shared_kernel(
    q, k, v, qv, out_q, out_k, lse_q_ptr, lse_k_ptr, partial_ptr, masks, numbers, heads, q_len,
    kv_len, splits, per_split, KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, QV_DIM: tl.constexpr, QV_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, EXCHANGED: tl.constexpr,
    LSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, TURN_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Programs: (batch * heads, splits of the rows). All keys are one tile of KEYS.

    Keys come first in a tile of scores: the warps share them, and the rows may be few. With rows
    first, each warp would hold 16 rows of all keys, twice the registers there are. The product with
    the values turns these before Hopper, as 16 rows of all weights take 56 bytes of spills; from
    there on it turns the weights, since wgmma with a transposed left operand of 256 rows reads past
    the end of shared memory (Triton 3.6 on an H200).
    """
    index = tl.program_id(0)
    slice_index = index // splits
    batch, head = slice_index // heads, slice_index % heads
    policy = policy_of(masks, numbers, batch, head, slice_index, q_len, kv_len, KINDS)
    q_base, q_row = rows_of(q, batch, head)
    qv_base, qv_row = rows_of(qv, batch, head)
    out_q_base, out_q_row = rows_of(out_q, batch, head)
    ELEMENT: tl.constexpr = q_base.dtype.element_ty
    at_keys = tl.arange(0, KEYS)
    existing = at_keys < kv_len
    k_visible = visible_keys(policy.padding, 0, kv_len, KEYS, PADDING & KINDS, DROPOUT & KINDS)
    # A hidden key has scores still: its own output gathers from the queries.
    base, row = rows_of(k, batch, head)
    keys = signed(load_rows(base, 0, existing, row, DIM, WIDTH, DOT), KINDS)
    base, row = rows_of(v, batch, head)
    values = load_rows(base, 0, k_visible, row, V_DIM, V_WIDTH, DOT)
    maximum = tl.full([KEYS], -float("inf"), tl.float32)
    total = tl.zeros([KEYS], tl.float32)
    total_lost = total
    acc = tl.zeros([KEYS, QV_WIDTH], tl.float32)
    acc_lost = nothing_lost(acc, DOT)
    first = index % splits * per_split
    for start in range(first, tl.minimum(first + per_split, q_len), ROWS):
        rows = start + tl.arange(0, ROWS)
        present = tl.arange(0, ROWS) < q_len - start
        q_visible = visible_keys(
            policy.row_padding, start, q_len, ROWS, ROW_PADDING & KINDS, DROPOUT & KINDS
        )
        queries = load_rows(q_base, start, present, q_row, DIM, WIDTH, DOT)
        x, _ = scores(
            queries, keys, policy, start, 0, existing, KINDS, False, True, True, PRECISION
        )
        by_row = tl.where(k_visible[:, None], x, -float("inf"))
        row_maximum = scaled_maximum(tl.max(by_row, 0), policy, KINDS)
        p = weights(by_row, shift_of(row_maximum)[None, :], policy, KINDS)
        row_total = tl.sum(p, 0)
        if LSE:
            at = lse_q_ptr + tl.cast(slice_index, tl.int64) * q_len + rows
            tl.store(at, log_sum(row_maximum, row_total, KINDS), mask=present)
        if DROPOUT & KINDS:
            keep = kept_pair(policy, 0, start, KEYS, ROWS, EXCHANGED, not EXCHANGED)
            p = tl.where(keep, p * policy.keep_scale, 0.0)
        p = p.to(ELEMENT).to(DOT)
        if TURN_WEIGHTS:
            out = (
                tl.dot(tl.trans(p), values, input_precision=PRECISION) * inverse(row_total)[:, None]
            )
        else:
            out = (
                tl.dot(tl.trans(values), p, input_precision=PRECISION) * inverse(row_total)[None, :]
            )
            out = tl.trans(out)
        store_rows(out_q_base, out, start, present, out_q_row, V_DIM)

        by_column = tl.where(q_visible[None, :], x, -float("inf"))
        grown = tl.maximum(maximum, scaled_maximum(tl.max(by_column, 1), policy, KINDS))
        shift = shift_of(grown)
        p = weights(by_column, shift[:, None], policy, KINDS)
        alpha = rescale(maximum, shift, KINDS)
        total, total_lost = add(total * alpha, total_lost * alpha, tl.sum(p, 1))
        maximum = grown
        if DROPOUT & KINDS:
            keep = kept_pair(policy, 0, start, KEYS, ROWS, not EXCHANGED, not EXCHANGED)
            p = tl.where(keep, p * policy.keep_scale, 0.0)
        p = p.to(ELEMENT).to(DOT)
        row_values = load_rows(qv_base, start, q_visible, qv_row, QV_DIM, QV_WIDTH, DOT)
        if tl.float32 == DOT:
            acc_lost = acc_lost * alpha[:, None]
        acc, acc_lost = multiply_add(acc * alpha[:, None], acc_lost, p, row_values, PRECISION)
    if SPLIT:
        base = partial_ptr + tl.cast(index, tl.int64) * kv_len * (QV_DIM + 2)
        store_partial(base, maximum, total, acc, 0, kv_len, QV_DIM)
    else:
        base, out_row = rows_of(out_k, batch, head)
        out = acc * inverse(total)[:, None]
        store_rows(base, out, 0, existing, out_row, QV_DIM)
        if LSE:
            at = lse_k_ptr + tl.cast(slice_index, tl.int64) * kv_len + at_keys
            tl.store(at, log_sum(maximum, total, KINDS), mask=existing)


@triton.jit(do_not_specialize=LENGTHS[:4] + LENGTHS[6:])
def both_kernel(
    q, k, v, qv, out_q, out_k, lse_q_ptr, lse_k_ptr, partial_q_ptr, partial_k_ptr, masks, numbers,
    heads, q_len, kv_len, q_programs, q_splits, k_splits, KINDS: tl.constexpr,
    KEY_KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, V_DIM: tl.constexpr,
    V_WIDTH: tl.constexpr, QV_DIM: tl.constexpr, QV_WIDTH: tl.constexpr, OWN: tl.constexpr,
    LOOP: tl.constexpr, Q_SPLIT: tl.constexpr, K_SPLIT: tl.constexpr, LSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs: q_programs of the queries' direction, then those of the keys'."""
    index = tl.program_id(0)
    if index < q_programs:
        attend_program(
            index, q, k, v, out_q, lse_q_ptr, partial_q_ptr, masks, numbers, heads, 1, q_len,
            kv_len, q_splits, KINDS, DIM, WIDTH, V_DIM, V_WIDTH, OWN, LOOP, Q_SPLIT, LSE,
            DOT, PRECISION,
        )  # fmt: skip
    else:
        attend_program(
            index - q_programs, k, q, qv, out_k, lse_k_ptr, partial_k_ptr, masks, numbers, heads, 1,
            kv_len, q_len, k_splits, KEY_KINDS, DIM, WIDTH, QV_DIM, QV_WIDTH, OWN, LOOP, K_SPLIT,
            LSE, DOT, PRECISION,
        )  # fmt: skip


def keys_on_chip(kv_len: int, widest: int, itemsize: int, extras: int) -> bool:
    """Whether the sums over the columns of all keys fit on chip; each of `extras` halves the room,
    as it needs registers of its own."""
    return kv_len <= 256 and width(kv_len) * widest * itemsize <= ON_CHIP >> extras


def extras(call: Any) -> int:
    """A mask, random bits, a cap or slopes, segments, a prefix, and rows that are read one element
    at a time."""
    unaligned = any(t.shape[3] % 8 for t in (call.query, call.value, call.query_value))
    tensors = call.attn_mask, call.seed, call.segment_ids_q, call.prefix_len
    return sum((*(t is not None for t in tensors), shapes_scores(call), unaligned))


class Results:
    """out_q, out_k and their log-sum-exps, with what the kernels need to write and merge them."""

    def __init__(self, call: Any, return_lse: bool) -> None:
        query, key, value, query_value = call[:4]
        self.query = query
        self.outs, self.statistics = [], []
        for rows, values in ((query, value), (key, query_value)):
            size = rows.shape[:3]
            self.outs.append(rows_outside(query, *size, values.shape[3]))
            lse = empty(query, size, torch.float32) if return_lse else None
            self.statistics.append(lse)
        out_q, out_k = self.outs
        lse_q, lse_k = (query if s is None else s for s in self.statistics)
        self.options = {
            "out_q": operand(out_q), "out_k": operand(out_k),
            "lse_q_ptr": lse_q, "lse_k_ptr": lse_k, "LSE": return_lse,
        }  # fmt: skip

    def partial(self, side: int, splits: int) -> Tensor:
        """Where the splits of a side (0 queries, 1 keys) leave their sums."""
        batch, heads, length, dim = self.outs[side].shape
        elements = batch * heads * splits * length * (dim + 2) if splits > 1 else 0
        return empty(self.query, (elements,), torch.float32) if elements else self.query

    def merge(self, side: int, partial: Tensor, splits: int, kinds: int) -> None:
        out, lse = self.outs[side], self.statistics[side]
        batch, heads, length, dim = out.shape
        if splits > 1 and length > 0:
            launch(
                merge_kernel, batch * heads * length,
                partial, operand(out), self.query if lse is None else lse, heads=heads,
                q_len=length, splits=splits, VALUE_DIM=dim, VALUE_WIDTH=width(dim),
                KINDS=kinds, LSE=lse is not None, num_warps=4,
            )  # fmt: skip

    def all(self) -> tuple[Any, ...]:
        return (*self.outs, *self.statistics)


def _shared(call: Any, return_lse: bool, widest: int, turned: bool) -> tuple[Any, ...]:
    """One score matrix, with keys no longer than queries."""
    query, kv_len = call.query, call.key.shape[2]
    results = Results(call, return_lse)
    # A diagonal takes registers of its own, and so do segments, a cap and slopes.
    bounded = sides_of(call) != (None, None) or has_segments(call)
    few = kv_len <= FEW_KEYS and not (bounded or shapes_scores(call))
    name = "bidirectional_few" if few else "bidirectional"
    chosen = tile(name, query.dtype, widest, query.device)
    common = common_options(call)
    rows, keys = shared_sizes(common["KINDS"], kv_len, chosen.loop)
    splits, per_split = row_ranges(query.shape[2], rows)
    partial = results.partial(1, splits)
    launch(
        shared_kernel, query.shape[0] * query.shape[1] * splits,
        **common, **results.options, partial_ptr=partial, splits=splits, per_split=per_split,
        ROWS=rows, KEYS=keys, SPLIT=splits > 1, EXCHANGED=turned,
        TURN_WEIGHTS=tiles.capability(query.device)[0] >= 9,
        **chosen.options(),
    )  # fmt: skip
    results.merge(1, partial, splits, units(common))
    return results.all()


def _both(call: Any, return_lse: bool, widest: int) -> tuple[Any, ...]:
    """Each direction as attention, in one launch."""
    query, key = call.query, call.key
    results = Results(call, return_lse)
    (batch, heads, q_len, _), kv_len = query.shape, key.shape[2]
    chosen = tile("bidirectional_both", query.dtype, widest, query.device)
    if has_segments(call):  # beside tiles that wait their numbers spill 24 bytes on sm_86
        chosen = chosen._replace(stages=1)
    own = owned(chosen, max(q_len, kv_len), query.dtype)
    is_causal = call.is_causal
    lengths = split_length(q_len, kv_len, is_causal), split_length(kv_len, q_len, is_causal)
    q_splits = cdiv(kv_len, lengths[0]) if lengths[0] else 1
    k_splits = cdiv(q_len, lengths[1]) if lengths[1] else 1
    partials = results.partial(0, q_splits), results.partial(1, k_splits)
    programs = q_splits * cdiv(q_len, own), k_splits * cdiv(kv_len, own)
    common = common_options(call)
    launch(
        both_kernel, batch * heads * sum(programs),
        **common, **results.options, partial_q_ptr=partials[0], partial_k_ptr=partials[1],
        KEY_KINDS=exchanged_kinds(common["KINDS"]),
        q_programs=batch * heads * programs[0], q_splits=q_splits, k_splits=k_splits, OWN=own,
        LOOP=chosen.loop, Q_SPLIT=lengths[0], K_SPLIT=lengths[1], **chosen.options(),
    )  # fmt: skip
    results.merge(0, partials[0], q_splits, units(common))
    results.merge(1, partials[1], k_splits, units(common))
    return results.all()


@planned
def bidirectional_forward(call: Any, return_lse: bool) -> tuple[Any, ...]:
    """out_q (B, H, Lq, Dv), out_k (B, H, Lk, Dw), lse_q (B, H, Lq) and lse_k (B, H, Lk) in float32,
    or None."""
    call = prepared(call)
    query, key = call.query, call.key
    q_len, kv_len = query.shape[2], key.shape[2]
    if query.shape[0] * query.shape[1] * (q_len + kv_len) == 0:
        return Results(call, return_lse).all()
    widest = max(width(t.shape[3]) for t in (query, call.value, call.query_value))
    sides = min(q_len, kv_len), max(q_len, kv_len)
    on_chip = keys_on_chip(sides[0], widest, query.element_size(), extras(call))
    if sides[1] < LONG or not on_chip:
        return _both(call, return_lse, widest)
    if q_len >= kv_len:
        return _shared(call, return_lse, widest, False)
    out_k, out_q, lse_k, lse_q = _shared(exchanged(call), return_lse, widest, True)
    return out_q, out_k, lse_q, lse_k
