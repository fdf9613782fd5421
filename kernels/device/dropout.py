"""Device functions of dropout: the random bits of a tile of scores."""

import triton
import triton.language as tl

from fastfusion.kernels.device.score_policy import EXCHANGED


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
    policy, a_start, b_start, A: tl.constexpr, B: tl.constexpr, STREAM: tl.constexpr,
    EXCHANGED: tl.constexpr,
):  # fmt: skip
    """Which scores of an (A, B) tile dropout keeps; EXCHANGED: the rows are keys, not queries."""
    seed, slice_index = policy.seed, policy.slice_index
    if EXCHANGED:
        words = tl.trans(random_words(seed, slice_index, b_start, a_start, B, A, STREAM))
    else:
        words = random_words(seed, slice_index, a_start, b_start, A, B, STREAM)
    return words >= policy.threshold


@triton.jit
def kept(
    policy, q_start, k_start, KINDS: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Which scores of a tile of one attention dropout keeps.

    Stream 1 is the softmax over queries of a bidirectional call: there the rows of a tile are its
    keys, and bits count (query, key) as in the whole.
    """
    if EXCHANGED & KINDS:
        keep = kept_pair(policy, q_start, k_start, Q, K, 1, True)
    else:
        keep = kept_pair(policy, q_start, k_start, Q, K, 0, False)
    if KEYS_FIRST:
        keep = tl.trans(keep)
    return keep
