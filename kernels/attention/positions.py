"""The gradient of a position table: dS of the scores that have an entry, added up without atomics,
in an order of sizes alone.

One kernel leaves dS of a stretch of queries, summed over a part of the batch; of an index by offset
a second one walks its diagonals; a third adds up by entry, comparing each number of the index with
a block of entries, which is work for all of them but asks for no order. Stretches follow each other
on the stream, and their sums are added to those before.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastfusion.kernels.device.gradient_sums import mask_gradients, store_mask_gradient
from fastfusion.kernels.device.rows import rows_of
from fastfusion.kernels.device.score_policy import policy_of
from fastfusion.kernels.device.sums import add
from fastfusion.kernels.host.arguments import position_operands
from fastfusion.kernels.host.plan import accepted, empty, launch
from fastfusion.kernels.host.tiles import cdiv

MOST_SCORES = 1 << 24  # of a stretch of queries, 64 MB, or one tile of them
_MOST_PARTS = 64  # of the batch, or of the places of a stretch: sums of their own
_PIECE = 4096  # places that are worth a program


@triton.jit(do_not_specialize=[
    "numbers", "heads", "group", "q_len", "kv_len", "batches", "parts", "first_row", "end_row"
])  # fmt: skip
def scores_kernel(
    q, k, v, grad, grad_lse_ptr, sums_ptr, statistics_ptr, masks, numbers, heads, group, q_len,
    kv_len, batches, parts, first_row, end_row, KINDS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, OWN: tl.constexpr,
    LOOP: tl.constexpr, LSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS of the queries [first_row, end_row), summed over every `parts`-th batch entry.

    Programs: (parts, heads, tiles of queries, tiles of keys).
    """
    column_tiles, row_tiles = tl.cdiv(kv_len, LOOP), tl.cdiv(end_row - first_row, OWN)
    index = tl.program_id(0)
    column, row = index % column_tiles * LOOP, first_row + index // column_tiles % row_tiles * OWN
    owner = index // column_tiles // row_tiles
    head = owner % heads
    total = tl.zeros([OWN, LOOP], tl.float32)
    lost = tl.zeros([OWN, LOOP], tl.float32)
    for batch in range(owner // heads, batches, parts):
        slice_index = batch * heads + head
        policy = policy_of(masks, numbers, batch, head, slice_index, q_len, kv_len, KINDS)
        q_base, q_row = rows_of(q, batch, head)
        k_base, k_row = rows_of(k, batch, head // group)
        v_base, v_row = rows_of(v, batch, head // group)
        grad_base, grad_row = rows_of(grad, batch, head)
        total, lost = mask_gradients(
            total, lost, row, column, q_base, q_row, k_base, k_row, v_base, v_row, grad_base,
            grad_row, statistics_ptr, grad_lse_ptr, tl.cast(slice_index, tl.int64) * q_len,
            policy, q_len, kv_len, KINDS, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, False, False, LSE,
            DOT, PRECISION,
        )  # fmt: skip
    store_mask_gradient(
        sums_ptr, total, owner, row - first_row, column, end_row - first_row, kv_len, False, False
    )


@triton.jit(do_not_specialize=["heads", "q_len", "kv_len", "parts", "first_row", "end_row"])
def offsets_kernel(
    sums_ptr, lines_ptr, heads, q_len, kv_len, parts, first_row, end_row, ROWS: tl.constexpr,
    OFFSETS: tl.constexpr,
):  # fmt: skip
    """The same by offset of key to query, of all parts. Programs: (heads, blocks of offsets)."""
    count = q_len + kv_len - 1
    tiles = tl.cdiv(count, OFFSETS)
    index = tl.program_id(0)
    head, start = index // tiles, index % tiles * OFFSETS
    offsets = start + tl.arange(0, OFFSETS)
    total = tl.zeros([OFFSETS], tl.float32)
    lost = tl.zeros([OFFSETS], tl.float32)
    first = tl.maximum(first_row, q_len - start - OFFSETS)
    last = tl.minimum(end_row, count - start)
    for part in range(0, parts):
        slice_index = tl.cast(part * heads + head, tl.int64)
        base = sums_ptr + slice_index * (end_row - first_row) * kv_len
        for from_row in range(first, last, ROWS):
            rows = (from_row + tl.arange(0, ROWS))[:, None]
            keys = offsets[None, :] - (q_len - 1) + rows
            inside = (rows < last) & (keys >= 0) & (keys < kv_len)
            at = base + (rows - first_row).to(tl.int64) * kv_len + keys
            total, lost = add(total, lost, tl.sum(tl.load(at, mask=inside, other=0.0), 0))
    at = lines_ptr + tl.cast(head, tl.int64) * count + offsets
    if first_row > 0:
        total += tl.load(at, mask=offsets < count, other=0.0)
    tl.store(at, total, mask=offsets < count)


@triton.jit(do_not_specialize=["heads", "entries", "first_place", "places", "pieces"])
def entries_kernel(
    sums_ptr, index_ptr, parts_ptr, heads, entries, first_place, places, pieces,
    PLACES: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Sums by entry, of one piece of the `places` that an index has from the first on.

    Programs: (parts, heads, pieces, blocks of entries).
    """
    tiles = tl.cdiv(entries, ENTRIES)
    index = tl.program_id(0)
    own = index % tiles * ENTRIES + tl.arange(0, ENTRIES)
    piece, slice_index = index // tiles % pieces, index // tiles // pieces
    of_piece = tl.cdiv(places, pieces)
    last = tl.minimum((piece + 1) * of_piece, places)
    total = tl.zeros([ENTRIES, PLACES], tl.float32)
    for start in range(piece * of_piece, last, PLACES):
        at = start + tl.arange(0, PLACES)
        numbers = tl.load(index_ptr + first_place + at, mask=at < last, other=-1).to(tl.int32)
        from_slice = sums_ptr + tl.cast(slice_index, tl.int64) * places
        values = tl.load(from_slice + at, mask=at < last, other=0.0)
        total += tl.where(numbers[None, :] == own[:, None], values[None, :], 0.0)
    part, head = slice_index // heads, slice_index % heads
    at = parts_ptr + tl.cast((part * pieces + piece) * heads + head, tl.int64) * entries + own
    found = tl.sum(total, 1)
    if first_place > 0:
        found += tl.load(at, mask=own < entries, other=0.0)
    tl.store(at, found, mask=own < entries)


def position_gradient(
    call: Any, operands: list[Any], options: dict[str, Any], sizes: dict[str, int]
) -> tuple[Tensor, int]:
    """(d position_table in parts, (parts, heads, entries), and how many parts).

    Args:
        call: of an op, with a table.
        operands: query, key, value and d out, as kernels take them.
        options: arguments of the backward kernels; the rows' statistics are there.
        sizes: how the kernel of a mask's gradient is cut.
    """
    index, table, *_ = position_operands(call)
    batches, heads, q_len, _ = call.query.shape
    kv_len, entries = call.key.shape[2], table.shape[1]
    own, column_tiles = sizes["OWN"], cdiv(kv_len, sizes["LOOP"])
    grid = heads * cdiv(q_len, own) * column_tiles
    parts = max(1, min(_MOST_PARTS, batches, 1024 // grid))
    rows = min(q_len, max(1, MOST_SCORES // (parts * heads * kv_len * own)) * own)
    sums = empty(call.query, (parts * heads * rows * kv_len,), table.dtype)
    by_offset = index.dim() == 1
    places = q_len + kv_len - 1 if by_offset else rows * kv_len
    owners = 1 if by_offset else parts
    pieces = max(1, min(cdiv(places, _PIECE), _MOST_PARTS // owners))
    of_pieces = empty(call.query, (owners * pieces * heads * entries,), table.dtype)
    lines = empty(call.query, (heads * places,), table.dtype) if by_offset else sums

    def collect(values: Tensor, first_place: int, places: int) -> None:
        launch(
            entries_kernel, owners * heads * pieces * cdiv(entries, 32),
            values, index, of_pieces, heads=heads, entries=entries, first_place=first_place,
            places=places, pieces=pieces, PLACES=128, ENTRIES=32, num_warps=4,
        )  # fmt: skip

    for first in range(0, q_len, rows):
        end = min(first + rows, q_len)
        stretch = {"first_row": first, "end_row": end, "parts": parts}
        launch(
            scores_kernel, parts * heads * cdiv(end - first, own) * column_tiles,
            *operands, sums_ptr=sums, batches=batches, **stretch,
            **accepted(scores_kernel, {**options, **sizes}),
        )  # fmt: skip
        if by_offset:
            launch(
                offsets_kernel, heads * cdiv(places, 128), sums, lines, heads=heads, q_len=q_len,
                kv_len=kv_len, **stretch, ROWS=32, OFFSETS=128, num_warps=4,
            )  # fmt: skip
        else:
            collect(sums, first * kv_len, (end - first) * kv_len)
    if by_offset:
        collect(lines, 0, places)
    return of_pieces, owners * pieces
