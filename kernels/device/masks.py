"""Device functions that say which keys a tile sees: kinds of masks, padding, the diagonal.

A `mask` is what hides scores and is added to them: (where the attn_mask of the head begins, its
strides of rows and columns, how many of either it has, the diagonal). Of a causal call, query i
sees the keys up to i + diagonal. CAUSAL is 1, or -1 where queries and keys are exchanged: there
the row j of a tile sees the columns from j - diagonal on.
"""

import triton
import triton.language as tl

# Values of MASK, 0 for none. From FLOAT_MASK on scores are in natural units.
BOOL_MASK = tl.constexpr(1)
FLOAT_MASK = tl.constexpr(2)
EXTREME_FLOAT = tl.constexpr(3)  # a float mask and an extreme scale
EXTREME = tl.constexpr(4)
EXTREME_BOOL = tl.constexpr(5)


@triton.jit
def visible_keys(
    padding_ptr, start, kv_len, KEYS: tl.constexpr, PADDING: tl.constexpr,
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
    if PADDING and APART:
        flags = tl.load(padding_ptr + at[:, None], mask=visible[:, None], other=1)
        visible = visible & (tl.max(flags.to(tl.int32), 1) == 0)
    elif PADDING:
        visible = visible & (tl.load(padding_ptr + at, mask=visible, other=1) == 0)
    return visible


@triton.jit
def visible_range(padding_ptr, kv_len, KEYS: tl.constexpr, PADDING: tl.constexpr):
    """[first, last) around all visible keys, first a multiple of KEYS; hidden ends cost nothing.

    Bounds and no test inside the loop, since a branch there would keep loads from being pipelined.
    """
    if PADDING:
        first, last = kv_len, 0
        for start in range(0, kv_len, 1024):
            at = start + tl.arange(0, 1024)
            visible = visible_keys(padding_ptr, start, kv_len, 1024, True)
            first = tl.minimum(first, tl.min(tl.where(visible, at, kv_len)))
            last = tl.maximum(last, tl.max(tl.where(visible, at + 1, 0)))
        return first // KEYS * KEYS, last
    else:
        return 0, kv_len


@triton.jit
def seen_range(
    first, last, start, diagonal, OWN: tl.constexpr, LOOP: tl.constexpr, CAUSAL: tl.constexpr
):
    """[first, last) without the tiles that the diagonal hides from all of OWN rows."""
    if CAUSAL == 1:
        last = tl.minimum(last, tl.maximum(start + OWN + diagonal, 0))
    if CAUSAL == -1:
        first = tl.maximum(first, tl.maximum(start - diagonal, 0) // LOOP * LOOP)
    return first, last
