"""The score policy: all that a call does to the products of queries and keys before the softmax
over them, for every kernel. A kind of mask is a bit of KINDS, fields of `Policy` and its part in

    range      seen_range, rows_seeing: the keys that a tile of queries may see, and the other way
    sinks      `first_sums` in softmax.py: what sums begin with, and `sinks_kernel` their gradient
    shape      `scores` in scores.py: a soft cap, then ALiBi, then the entries of a position table,
               then a float mask, in natural units
    mask       the same function: bools, bounds and segments, keys that are absent or hidden
    derivative `product_gradient` in gradients.py: through the cap, and the part of extreme scales

in this order, which is FlashAttention's. Launchers hand it over as three arguments: `masks`, the
tensors with their strides; `numbers`, for none of which a kernel is compiled anew; and KINDS, what
it is compiled for (`score_options` in kernels/host/arguments.py). `policy_of` makes of them the
policy of one head. KINDS stays an argument of its own: variables that are tuples hold no constants.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# What kernels are compiled for, as bits of KINDS.
NEGATIVE = tl.constexpr(1)  # the sign of the scale
UPPER = tl.constexpr(2)  # a row sees no column behind its upper bound
LOWER = tl.constexpr(4)  # nor any before its lower one
CAPPED = tl.constexpr(8)  # a soft cap
BIASED = tl.constexpr(16)  # slopes of ALiBi
BOOL_MASK = tl.constexpr(32)
FLOAT_MASK = tl.constexpr(64)
NATURAL = tl.constexpr(128)  # scores are in natural units, and not raw products
EXTREME = tl.constexpr(256)  # dS times the scale, or scores times log2(e), might overflow
ROW_PADDING = tl.constexpr(512)
PADDING = tl.constexpr(1024)  # of columns
DROPOUT = tl.constexpr(2048)
EXCHANGED = tl.constexpr(4096)  # the softmax over queries: rows are keys, and columns queries
SEGMENTS = tl.constexpr(8192)  # a row sees the columns of its number
PREFIX = tl.constexpr(16384)  # the first columns are seen from below their upper bound, too
ROW_PREFIX = tl.constexpr(32768)  # the first rows see beyond their lower bound, too
SINKS = tl.constexpr(65536)  # one more score of a row, of a column without a value
POSITIONS = tl.constexpr(131072)  # a position table, whose index has a number for each score
BY_OFFSET = tl.constexpr(262144)  # or for each offset of key to query
# A product is no score yet, before masks.
SHAPED = tl.constexpr(CAPPED.value | BIASED.value | POSITIONS.value)
# Columns may be hidden from some rows anywhere in the range of a tile.
MIXED = tl.constexpr(PADDING.value | LOWER.value | SEGMENTS.value)


class Policy(NamedTuple):
    """What decides about the scores of one head, with KINDS, in which the bits of UPPER and LOWER,
    PREFIX and ROW_PREFIX, ROW_PADDING and PADDING are those of rows and columns as they are here.

    Attributes:
        mask, mask_row, mask_column: where the attn_mask of the head begins, and its strides.
        mask_rows, mask_columns: how many of either it has.
        row_padding, padding: where those of the batch entry begin, of rows and of columns.
        row_segments, segments: likewise, numbers of rows and of columns.
        row_len, column_len: how many there are of either.
        diagonal: row i stands beside column i + diagonal.
        lower, upper: row i sees the columns from i + lower to i + upper.
        prefix: so many columns that all rows see, or rows that see all columns.
        sink: the score without a column.
        index: which entry of the position table a score has, row by row without a gap.
        table, entry, entries: the numbers of the head, how far apart they are, how many.
        slope: of ALiBi.
        cap, inverse_cap: of the soft cap.
        scale: of products, without its sign, which rows or columns carry.
        factor: see `weights` in softmax.py; of an extreme scale see `gradient_scales`.
        seed, slice_index, threshold, keep_scale: of dropout.
    """

    mask: Any
    mask_row: Any
    mask_column: Any
    mask_rows: Any
    mask_columns: Any
    row_padding: Any
    padding: Any
    row_segments: Any
    segments: Any
    row_len: Any
    column_len: Any
    diagonal: Any
    lower: Any
    upper: Any
    prefix: Any
    sink: Any
    index: Any
    table: Any
    entry: Any
    entries: Any
    slope: Any
    cap: Any
    inverse_cap: Any
    scale: Any
    factor: Any
    seed: Any
    slice_index: Any
    threshold: Any
    keep_scale: Any


@triton.jit
def policy_of(masks, numbers, batch, head, slice_index, row_len, column_len, KINDS: tl.constexpr):
    """The policy of a head of a batch entry, from what `score_options` makes of a call."""
    (
        mask, mask_batch, mask_head, mask_row, mask_column, row_padding, padding, seed, slope,
        row_segments, own_row_segments, segments, own_segments, prefix, prefix_batch, sink,
        sinks_head, index, table, table_head, entry, entries,
    ) = masks  # fmt: skip
    (
        left, right, bottom_right, mask_rows, mask_columns, row_padding_batch, padding_batch,
        slopes_batch, slopes_head, threshold, keep_scale, scale, factor, cap, inverse_cap,
    ) = numbers  # fmt: skip
    if EXCHANGED & KINDS:
        mask_row, mask_column = mask_column, mask_row
        mask_rows, mask_columns = mask_columns, mask_rows
        row_padding, padding = padding, row_padding
        row_padding_batch, padding_batch = padding_batch, row_padding_batch
        row_segments, segments = segments, row_segments
        own_row_segments, own_segments = own_segments, own_row_segments
        left, right = right, left
    # What is not there is 0, since Triton 3.6 makes no tuple of None.
    batch, head = tl.cast(batch, tl.int64), tl.cast(head, tl.int64)
    masked: tl.constexpr = (BOOL_MASK | FLOAT_MASK) & KINDS
    mask = mask + batch * mask_batch + head * mask_head if masked else 0
    row_padding = row_padding + batch * row_padding_batch if ROW_PADDING & KINDS else 0
    padding = padding + batch * padding_batch if PADDING & KINDS else 0
    if SEGMENTS & KINDS:
        row_segments += batch * row_len * own_row_segments
        segments += batch * column_len * own_segments
    else:
        row_segments, segments = 0, 0
    seed = tl.load(seed) if DROPOUT & KINDS else 0
    slope = tl.load(slope + batch * slopes_batch + head * slopes_head) if BIASED & KINDS else 0.0
    sink = tl.load(sink + head * sinks_head) if SINKS & KINDS else 0.0
    if POSITIONS & KINDS:
        table += head * table_head
    else:
        index, table, entry, entries = 0, 0, 0, 0
    if (PREFIX | ROW_PREFIX) & KINDS:
        longest = row_len if ROW_PREFIX & KINDS else column_len
        prefix = tl.load(prefix + batch * prefix_batch)  # of 64 bits
        prefix = tl.minimum(tl.maximum(prefix, 0), longest).to(tl.int32)
    else:
        prefix = 0
    diagonal = bottom_right * (column_len - row_len)
    return Policy(
        mask, mask_row, mask_column, mask_rows, mask_columns, row_padding, padding, row_segments,
        segments, row_len, column_len, diagonal, diagonal - left, diagonal + right, prefix, sink,
        index, table, entry, entries, slope, cap, inverse_cap, scale, factor, seed, slice_index,
        threshold, keep_scale,
    )  # fmt: skip


@triton.jit
def signed(tile, KINDS: tl.constexpr):
    """Rows or columns with the sign of the scale."""
    if NEGATIVE & KINDS:
        tile = tile * -1
    return tile


@triton.jit
def visible_keys(
    padding_ptr, start, kv_len, KEYS: tl.constexpr, PADDED: tl.constexpr,
    APART: tl.constexpr = False,
):  # fmt: skip
    """Which of the keys start, start + 1, ... exist and are not hidden by the padding mask.

    APART: for products over 16 keys or rows of weights that random bits drop. Triton before 3.8
    takes 16-bit weights that follow from a byte and from a join for unpacked 4-bit ones, and gives
    their product 8 a lane, which is wrong below 32. It does not look through a reduction: here the
    maximum of one flag each.
    """
    at = start + tl.arange(0, KEYS)
    visible = tl.arange(0, KEYS) < kv_len - start
    if PADDED and APART:
        flags = tl.load(padding_ptr + at[:, None], mask=visible[:, None], other=1)
        visible = visible & (tl.max(flags.to(tl.int32), 1) == 0)
    elif PADDED:
        visible = visible & (tl.load(padding_ptr + at, mask=visible, other=1) == 0)
    return visible


@triton.jit
def visible_range(policy, kv_len, KINDS: tl.constexpr, KEYS: tl.constexpr):
    """[first, last) around all columns that padding shows, first a multiple of KEYS; hidden ends
    cost nothing.

    Bounds and no test inside the loop, since a branch there would keep loads from being pipelined.
    """
    if PADDING & KINDS:
        first, last = kv_len, 0
        for start in range(0, kv_len, 1024):
            at = start + tl.arange(0, 1024)
            visible = visible_keys(policy.padding, start, kv_len, 1024, True)
            first = tl.minimum(first, tl.min(tl.where(visible, at, kv_len)))
            last = tl.maximum(last, tl.max(tl.where(visible, at + 1, 0)))
        return first // KEYS * KEYS, last
    else:
        return 0, kv_len


@triton.jit
def segments_between(
    own, own_len, other, start, first, last, OWN: tl.constexpr, LOOP: tl.constexpr
):  # fmt: skip
    """[first, last) without the tiles of LOOP numbers of `other` at its ends that are all outside
    of those of OWN from `start` on of `own`, of `own_len`.

    Compared are the least and the greatest number of the tile: where segments lie one behind the
    other and are counted so, or backwards, no other one is read.
    """
    own_ids = tl.load(own + tl.minimum(start + tl.arange(0, OWN), own_len - 1))
    least, greatest = tl.min(own_ids), tl.max(own_ids)
    begin, end = last, first
    for at_block in range(first, last, 1024):
        at = at_block + tl.arange(0, 1024)
        ids = tl.load(other + at, mask=at < last, other=0)
        alike = (at < last) & (ids >= least) & (ids <= greatest)
        begin = tl.minimum(begin, tl.min(tl.where(alike, at, last)))
        end = tl.maximum(end, tl.max(tl.where(alike, at + 1, first)))
    return begin // LOOP * LOOP, end


@triton.jit
def seen_range(
    policy, first, last, start, KINDS: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr
):
    """[first, last) without the tiles of LOOP columns that no row of OWN from `start` on sees."""
    if UPPER & KINDS:
        end = tl.maximum(start + OWN + policy.upper, 0)
        last = tl.minimum(last, tl.maximum(end, policy.prefix) if PREFIX & KINDS else end)
    if LOWER & KINDS:
        begin = tl.maximum(start + policy.lower, 0) // LOOP * LOOP
        if ROW_PREFIX & KINDS:
            begin = tl.where(start < policy.prefix, 0, begin)
        first = tl.maximum(first, begin)
    if SEGMENTS & KINDS:
        first, last = segments_between(
            policy.row_segments, policy.row_len, policy.segments, start, first, last, OWN, LOOP
        )
    return first, last


@triton.jit
def rows_seeing(
    policy, first, last, start, KINDS: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr
):
    """[first, last) without the tiles of LOOP rows that see none of OWN columns from `start` on.

    Rows of a prefix are a call's keys, of which no kernel asks this.
    """
    if LOWER & KINDS:
        last = tl.minimum(last, tl.maximum(start + OWN - policy.lower, 0))
    if UPPER & KINDS:
        begin = tl.maximum(start - policy.upper, 0) // LOOP * LOOP
        if PREFIX & KINDS:
            begin = tl.where(start < policy.prefix, 0, begin)
        first = tl.maximum(first, begin)
    if SEGMENTS & KINDS:
        first, last = segments_between(
            policy.segments, policy.column_len, policy.row_segments, start, first, last, OWN, LOOP
        )
    return first, last


@triton.jit
def first_edge(policy, first, last, start, KINDS: tl.constexpr, LOOP: tl.constexpr):
    """Where in the range that rows from `start` on see, in steps of LOOP, columns begin that may be
    absent or hidden from some of them."""
    edge = first
    if not MIXED & KINDS:
        edge = last // LOOP * LOOP
        if UPPER & KINDS:
            end = tl.maximum(start + policy.upper + 1, 0)
            end = tl.maximum(end, policy.prefix) if PREFIX & KINDS else end
            edge = tl.minimum(edge, end // LOOP * LOOP)
            edge = tl.maximum(edge, first)
    return edge
