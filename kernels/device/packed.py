"""Device functions of packed sequences: which rows a program has."""

import triton
import triton.language as tl


@triton.jit
def bounds(offsets, sequence, inside, total):
    """(first row, number of rows) of a sequence; behind the last one, of what it leaves."""
    offsets_ptr, stride = offsets
    begin = tl.load(offsets_ptr + sequence * stride).to(tl.int64)
    end = tl.load(offsets_ptr + (sequence + 1) * stride, mask=inside, other=0).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), total)
    end = tl.minimum(tl.maximum(tl.where(inside, end, total), begin), total)
    return begin, (end - begin).to(tl.int32)


@triton.jit
def find_tile(offsets, total, others, other_total, sequences, index, OWN: tl.constexpr):
    """Where tile `index` is, counting OWN rows a tile of each sequence, and of the rows behind all.

    Returns the sequence, the first row of the tile in it, where it begins and its length, and the
    same two of the other side. Rows behind the last sequence are one more, whose other side is
    empty. Offsets beyond the tokens end with them.
    """
    offsets_ptr, stride = offsets
    passed = 0
    tiles_before = 0
    seen = 0
    for start in range(0, sequences, 128):
        at = start + tl.arange(0, 128)
        inside = at < sequences
        begin = tl.load(offsets_ptr + at * stride, mask=inside, other=0)
        end = tl.load(offsets_ptr + (at + 1) * stride, mask=inside, other=0)
        tiles = tl.cdiv(tl.maximum(tl.minimum(end, total) - begin, 0), OWN).to(tl.int32)
        upto = seen + tl.cumsum(tiles, 0)
        before = inside & (upto <= index)
        passed += tl.sum(before.to(tl.int32), 0)
        tiles_before = tl.maximum(tiles_before, tl.max(tl.where(before, upto, 0), 0))
        seen += tl.sum(tiles, 0)
    inside = passed < sequences
    first, length = bounds(offsets, passed, inside, total)
    other_first, other_length = bounds(others, passed, inside, other_total)
    other_length = tl.where(inside, other_length, 0)
    return passed, (index - tiles_before) * OWN, first, length, other_first, other_length
