"""Device functions of the attention kernels: one tile of rows, of scores, of random bits.

A tile of scores holds Q queries by K keys, or K by Q where a kernel wants the keys first (so that
its second product takes the tile as it lies in registers). Offsets within a tile are 32-bit, the
tile's own base is 64-bit: 32-bit offsets from the start of a head overflow at 2^31 elements, 64-bit
ones per element cost registers (8-72 bytes of spills).

Exponents are of base 2. As a rule scores stay raw products, and one fma per score,
x * factor - shift, does scale, log2(e) and maximum. With a float mask they are in natural units and
the maximum is subtracted first, because a mask of finfo.min times log2(e) would be -inf. So they
are for an extreme scale, which may overflow by log2(e) alone, or make NaN of -inf.

A `mask` is what hides scores and is added to them: (where the attn_mask of the head begins, its
strides of rows and columns, how many of either it has, the diagonal). Of a causal call, query i
sees the keys up to i + diagonal. CAUSAL is 1, or -1 where queries and keys are exchanged: there
the row j of a tile sees the columns from j - diagonal on.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Values of MASK, 0 for none. From FLOAT_MASK on scores are in natural units.
BOOL_MASK = tl.constexpr(1)
FLOAT_MASK = tl.constexpr(2)
EXTREME_FLOAT = tl.constexpr(3)  # a float mask and an extreme scale
EXTREME = tl.constexpr(4)
EXTREME_BOOL = tl.constexpr(5)


@triton.jit
def slice_base(ptr, batch, head, batch_stride, head_stride):
    """Where the rows of one head of one batch entry begin."""
    return ptr + tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride


@triton.jit
def load_rows(
    base, start, present, stride, DIM: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr
):
    """Rows start, start + 1, ...: (rows, WIDTH); those not `present` and columns past DIM are 0."""
    rows = tl.arange(0, present.shape[0])
    columns = tl.arange(0, WIDTH)
    at = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if DIM == WIDTH:
        tile = tl.load(at, mask=present[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=present[:, None] & (columns[None, :] < DIM), other=0.0)
    return tile.to(DOT)


@triton.jit
def load_tile(
    base, row, start, visible, DIM: tl.constexpr, WIDTH: tl.constexpr, EDGE: tl.constexpr,
    DOT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The rows of `visible`: by TMA from a descriptor, whose `row` is (batch entry, head), with
    zeros behind the last; or from pointers, whose `row` is a stride, those that EDGE lets be absent
    or hidden as zeros."""
    ROWS: tl.constexpr = visible.shape[0]
    if TMA:
        tile = tl.reshape(base.load([row[0], row[1], start, 0]), [ROWS, WIDTH])
        return tile.to(DOT)
    elif EDGE:
        return load_rows(base, start, visible, row, DIM, WIDTH, DOT)
    else:
        rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        at = base + tl.cast(start, tl.int64) * row + (rows[:, None] * row + columns[None, :])
        inside = columns[None, :] < DIM
        return (tl.load(at) if DIM == WIDTH else tl.load(at, mask=inside, other=0.0)).to(DOT)


@triton.jit
def rows_of(ptr, batch, head, batch_stride, head_stride, row_stride, TMA: tl.constexpr):
    """Where the rows of a head are, as `load_tile` takes it."""
    if TMA:
        return ptr, (batch, head)
    else:
        return slice_base(ptr, batch, head, batch_stride, head_stride), row_stride


@triton.jit
def store_rows(base, tile, start, present, stride, DIM: tl.constexpr):
    rows = tl.arange(0, tile.shape[0])
    columns = tl.arange(0, tile.shape[1])
    at = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    inside = present[:, None] & (columns[None, :] < DIM)
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)


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


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a times the transpose of b, over up to 256 columns.

    Exact float32 products of more than 128 are summed in parts of 64: one chain of 256 terms errs
    by 4.9e-7 on an H200, where cuBLAS errs by 1.4e-7.
    """
    COLUMNS: tl.constexpr = a.shape[1]
    if a.dtype == tl.float32 and COLUMNS > 128 and PRECISION == "ieee":
        PARTS: tl.constexpr = COLUMNS // 64
        left = tl.permute(tl.reshape(a, [a.shape[0], PARTS, 64]), [1, 0, 2])
        right = tl.permute(tl.reshape(b, [b.shape[0], PARTS, 64]), [1, 2, 0])
        return tl.sum(tl.dot(left, right, input_precision=PRECISION), 0)
    else:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def scores(
    q, k, q_start, k_start, visible, mask, scale, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of scores, -inf where hidden: raw products, or in natural units.

    EDGE says that the tile may hold keys that are absent or hidden, CAUSAL that it may hold some
    behind the diagonal.
    """
    mask_ptr, mask_row, mask_column, mask_rows, mask_columns, diagonal = mask
    rows, keys = tl.arange(0, q.shape[0]), tl.arange(0, k.shape[0])
    if KEYS_FIRST:
        x = product(k, q, PRECISION)
        rows, keys, shown = rows[None, :], keys[:, None], visible[:, None]
    else:
        x = product(q, k, PRECISION)
        rows, keys, shown = rows[:, None], keys[None, :], visible[None, :]
    if MASK >= EXTREME:  # no plain product: with the maximum taken off it would become one fma
        x = tl.fma(x, tl.zeros_like(x) + scale, tl.zeros_like(x))
    if MASK != 0 and MASK != EXTREME:
        base = mask_ptr + tl.cast(q_start, tl.int64) * mask_row
        base += tl.cast(k_start, tl.int64) * mask_column
        inside = (rows < mask_rows - q_start) & (keys < mask_columns - k_start)
        value = tl.load(base + (rows * mask_row + keys * mask_column), mask=inside, other=0)
        if MASK >= FLOAT_MASK and MASK <= EXTREME_FLOAT:
            x = tl.fma(x, tl.zeros_like(x) + scale, value.to(tl.float32))
        else:
            x = tl.where(value != 0, x, -float("inf"))
    if CAUSAL != 0:
        if CAUSAL == 1:
            before = rows - keys >= k_start - q_start - diagonal
        else:
            before = keys - rows >= q_start - k_start - diagonal
        if EDGE:
            before = shown & before
        x = tl.where(before, x, -float("inf"))
    elif EDGE:
        x = tl.where(shown, x, -float("inf"))
    return x


@triton.jit
def scaled_maximum(maximum, factor, MASK: tl.constexpr):
    """A maximum of scores in the unit of exponents, in which the running maximum is kept."""
    if MASK >= FLOAT_MASK:
        return maximum
    else:
        return maximum * factor


@triton.jit
def shift_of(maximum):
    """What to subtract: the maximum, or 0 where no score is visible (-inf - -inf is NaN)."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def weights(x, shift, factor, MASK: tl.constexpr):
    """exp(scores - maximum), the shift broadcast to the tile by the caller."""
    if MASK >= FLOAT_MASK:
        return tl.exp2((x - shift) * LOG2E)
    else:
        return tl.exp2(tl.fma(x, tl.zeros_like(x) + factor, tl.zeros_like(x) - shift))


@triton.jit
def rescale(before, shift, MASK: tl.constexpr):
    """By what sums are multiplied when the maximum moves from `before` to `shift`."""
    if MASK >= FLOAT_MASK:
        return tl.exp2((before - shift) * LOG2E)
    else:
        return tl.exp2(before - shift)


@triton.jit
def exponentials(x, maximum, factor, MASK: tl.constexpr):
    """exp(scores - maximum) with the plain maximum, for gradients: the greatest is exactly 1, so
    that a softmax over one key has exactly no gradient. One operation more than `weights`."""
    if MASK >= FLOAT_MASK:
        return tl.exp2((x - maximum) * LOG2E)
    else:
        return tl.exp2((x - maximum) * factor)


@triton.jit
def log_sum(maximum, total, MASK: tl.constexpr):
    """The natural log-sum-exp; -inf where no score is visible."""
    lse = tl.log(tl.where(total == 0.0, 1.0, total))
    if MASK >= FLOAT_MASK:
        return maximum + lse
    else:
        return maximum * LN2 + lse


@triton.jit
def inverse(total):
    """1 / total; 0 where nothing is visible, so that such rows give 0."""
    return 1.0 / tl.where(total == 0.0, float("inf"), total)


@triton.jit
def add(total, lost, value):
    """(total + value, what its rounding lost), Kahan's sum.

    One float32 chain over the tiles of 4,096 values of one sign errs by four times the plain
    formula.
    """
    value = value - lost
    grown = total + value
    return grown, (grown - total) - value


@triton.jit
def nothing_lost(acc, DOT: tl.constexpr):
    """The second half of an accumulator of products: see multiply_add."""
    if tl.float32 == DOT:
        return tl.zeros_like(acc)
    else:
        return 0.0


@triton.jit
def multiply_add(acc, lost, a, b, PRECISION: tl.constexpr):
    """(acc + a @ b, what its rounding lost): Kahan's sum of tiles for float32 operands, which the
    matrix units otherwise add as one chain over all keys. 16-bit operands lose more themselves."""
    if a.dtype == tl.float32:
        value = tl.dot(a, b, -lost, input_precision=PRECISION)
        grown = acc + value
        return grown, (grown - acc) - value
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION), lost


@triton.jit
def random_words(
    seed,
    slice_index,
    i_start,
    j_start,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STREAM: tl.constexpr,
):
    """Philox4x32-10 words of the scores (i, j), (ROWS, COLUMNS) of uint32; 4 divides j_start."""
    zero = tl.zeros([ROWS, COLUMNS // 4], tl.uint32)
    group = zero + (j_start // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :]
    row = zero + (i_start + tl.arange(0, ROWS)).to(tl.uint32)[:, None]
    entry = zero + tl.cast(slice_index, tl.uint32)
    a, b, c, d = tl.philox(seed, group, row, entry, zero + STREAM)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [ROWS, COLUMNS])


@triton.jit
def kept_pair(
    seed, slice_index, a_start, b_start, threshold, A: tl.constexpr, B: tl.constexpr,
    STREAM: tl.constexpr, EXCHANGED: tl.constexpr,
):  # fmt: skip
    """Which scores of an (A, B) tile dropout keeps; EXCHANGED: the rows are keys, not queries."""
    if EXCHANGED:
        words = tl.trans(random_words(seed, slice_index, b_start, a_start, B, A, STREAM))
    else:
        words = random_words(seed, slice_index, a_start, b_start, A, B, STREAM)
    return words >= threshold


@triton.jit
def kept(
    seed, slice_index, q_start, k_start, threshold, Q: tl.constexpr, K: tl.constexpr,
    STREAM: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Which scores of a tile of one attention dropout keeps.

    Stream 1 is the softmax over queries of a bidirectional call: there the rows of a tile are its
    keys, and bits count (query, key) as in the whole.
    """
    keep = kept_pair(seed, slice_index, q_start, k_start, threshold, Q, K, STREAM, STREAM == 1)
    if KEYS_FIRST:
        keep = tl.trans(keep)
    return keep
