"""What the launchers share: number formats, operands, the score policy of a call."""

import math
from itertools import chain
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastfusion.core.score_policy import ranges_in, sides_of
from fastfusion.kernels.device import score_policy as flags
from fastfusion.kernels.host.plan import INTERPRETED, empty

# A side of a window that shows all keys, and leaves room for lengths beside it in 32 bits.
_FARTHEST = 2**30
_ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Numbers(NamedTuple):
    """Numbers that `policy_of` reads. Kernels are compiled for none in particular, but for integers
    that are 1 or multiples of 16: `do_not_specialize` does not reach into tuples (Triton 3.6 to
    3.9), which is why lengths are arguments of their own."""

    left: int
    right: int
    bottom_right: int
    mask_rows: int
    mask_columns: int
    row_padding_batch: int
    padding_batch: int
    slopes_batch: int
    slopes_head: int
    threshold: int
    keep_scale: float
    scale: float
    factor: float
    cap: float
    inverse_cap: float


def numbers(dtype: torch.dtype) -> dict[str, Any]:
    """Constants of the products: the dtype of operands, and how float32 ones are multiplied.

    The interpreter multiplies the bit patterns of bfloat16, so there operands become float32 (after
    the rounding to 16 bits that the hardware's operands have). float32 is multiplied exactly unless
    torch is allowed tf32 (torch.set_float32_matmul_precision).
    """
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "DOT": tl.float32 if INTERPRETED else _ELEMENTS[dtype],
        "PRECISION": "ieee" if exact else "tf32",
    }


def rows_readable(tensor: Tensor) -> Tensor:
    """The tensor itself if the elements of its last dimension lie side by side, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def readable(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else rows_readable(mask)


def operand(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor as kernels take it: with its strides but for the last, which is 1."""
    return tensor, *tensor.stride()[:-1]


def score_options(
    call: Any,
    sizes: tuple[int, int, int, int],
    row_padding: Tensor | None = None,
    padding: Tensor | None = None,
) -> dict[str, Any]:
    """The arguments that say how the scores of a call are made, and how they are multiplied; the
    same in all kernels.

    Args:
        call: of an op.
        sizes: those that the mask broadcasts to: batch, heads, queries, keys.
        row_padding, padding: of queries and of keys.
    """
    query, attn_mask, seed, dropout_p = call.query, call.attn_mask, call.seed, call.dropout_p
    slopes, softcap = call.alibi_slopes, call.softcap
    scale = query.shape[-1] ** -0.5 if call.scale is None else float(call.scale)
    extreme = not 2.0**-16 <= abs(scale) <= 2.0**16
    factor = abs(scale) * math.log2(math.e)
    if extreme:  # for gradients, see `gradient_scale`
        factor = 2.0 ** round(math.log2(abs(scale)) / 2) if scale else 1.0
    left, right = sides_of(call)
    q_ids, k_ids, prefix = ranges_in(call)
    sinks = getattr(call, "sinks", None)
    index, *table = position_operands(call)
    has = {
        flags.NEGATIVE: scale < 0,
        flags.UPPER: right is not None,
        flags.LOWER: left is not None,
        flags.CAPPED: softcap is not None,
        flags.BIASED: slopes is not None,
        flags.BOOL_MASK: attn_mask is not None and attn_mask.dtype == torch.bool,
        flags.FLOAT_MASK: attn_mask is not None and attn_mask.dtype != torch.bool,
        flags.EXTREME: extreme,
        flags.ROW_PADDING: row_padding is not None,
        flags.PADDING: padding is not None,
        flags.DROPOUT: seed is not None,
        flags.SEGMENTS: q_ids is not None,
        flags.PREFIX: prefix is not None and call.is_causal,
        flags.ROW_PREFIX: prefix is not None and not call.is_causal,  # see `exchanged`
        flags.SINKS: sinks is not None,
        flags.POSITIONS: index is not None,
        flags.BY_OFFSET: index is not None and index.dim() == 1,
    }
    # What the factor of raw products loses is common to all rows, of which a sink's gradient is a
    # sum: 1.2e-7 of 66 rows where the plain formula errs by 5e-8.
    exact = sinks is not None and query.dtype == torch.float32
    natural = shapes_scores(call) or extreme or has[flags.FLOAT_MASK] or exact
    kinds = sum(flag.value for flag, is_there in has.items() if is_there)
    kinds += flags.NATURAL.value if natural else 0
    given = Numbers(
        left=0 if left is None else min(left, _FARTHEST),
        right=0 if right is None else min(right, _FARTHEST),
        bottom_right=int(call.bottom_right),
        mask_rows=0 if attn_mask is None else sizes[2],
        mask_columns=0 if attn_mask is None else sizes[3],
        row_padding_batch=0 if row_padding is None else row_padding.stride(0),
        padding_batch=0 if padding is None else padding.stride(0),
        slopes_batch=0 if slopes is None else slopes.stride(0),
        slopes_head=0 if slopes is None else slopes.stride(1),
        threshold=min(round(dropout_p * 2**32), 2**32 - 1),
        keep_scale=1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
        scale=abs(scale),
        factor=factor,
        cap=1.0 if softcap is None else softcap,
        inverse_cap=1.0 if softcap is None else 1.0 / softcap,
    )
    mask_strides = (0, 0, 0, 0) if attn_mask is None else attn_mask.expand(sizes).stride()
    # Strides of what is not there are None, too, which kernels do not take.
    numbered = [(t, None if t is None else t.stride(0)) for t in (prefix, sinks)]
    ids = chain(_segments(q_ids), _segments(k_ids), *numbered)
    masks = (attn_mask, *mask_strides, row_padding, padding, seed, slopes, *ids, index, *table)
    return {
        "masks": masks, "numbers": tuple(given), "KINDS": kinds, **numbers(query.dtype),
    }  # fmt: skip


def _segments(ids: Tensor | None) -> tuple[Tensor | None, int | None]:
    """Numbers (batch, length) as kernels read them, each entry's behind the one before, and 1; or
    one entry's for all, and 0: of strides that follow lengths kernels would be compiled anew."""
    if ids is None:
        return None, None
    batch, length = ids.shape
    shared = batch == 1 or ids.stride(0) == 0
    adjacent = ids.stride(1) == 1 or length == 1
    if not (adjacent and (shared or ids.stride(0) == length)):
        ids, shared = ids.contiguous(), batch == 1
    return ids, int(not shared)


def position_operands(call: Any) -> tuple[Any, ...]:
    """Position index of a call, without gaps, and table, its strides and how many entries it has;
    all None where there is none."""
    index, table = (getattr(call, name, None) for name in ("position_index", "position_table"))
    if index is None or table is None:
        return (None,) * 5
    return index.contiguous(), table, *table.stride(), table.shape[1]


def exchanged_kinds(kinds: int) -> int:
    """KINDS of the softmax over queries, of those of a call."""
    found = kinds | flags.EXCHANGED.value
    for one, other in (
        (flags.UPPER, flags.LOWER),
        (flags.PREFIX, flags.ROW_PREFIX),
        (flags.ROW_PADDING, flags.PADDING),
    ):
        found &= ~(one.value | other.value)
        found |= one.value * bool(kinds & other.value) | other.value * bool(kinds & one.value)
    return found


def units(options: dict[str, Any]) -> int:
    """Of the KINDS of a call all that merges of its splits ask for, so that they are few builds."""
    return int(options["KINDS"] & flags.NATURAL.value)


def shapes_scores(call: Any) -> bool:
    """Whether scores are more than products, before masks."""
    table = getattr(call, "position_table", None)
    return not (call.softcap is call.alibi_slopes is table is None)


def has_values(call: Any) -> bool:
    """Whether a call has what takes registers beside the scores: a mask's values, random bits, a
    cap, slopes or positions, numbers of segments."""
    return (
        call.attn_mask is not None
        or call.seed is not None
        or shapes_scores(call)
        or has_segments(call)
    )


def has_segments(call: Any) -> bool:
    return ranges_in(call)[0] is not None


def gradient_scales(options: dict[str, Any]) -> tuple[float, float]:
    """What sums of dS are multiplied by, of queries and of keys: the scale, or of an extreme one
    what its square root, taken before, leaves over. Either way to put in all at once could
    overflow. Queries carry the sign in the products."""
    kinds, given = options["KINDS"], Numbers(*options["numbers"])
    scale = given.scale / given.factor if kinds & flags.EXTREME.value else given.scale
    return -scale if kinds & flags.NEGATIVE.value else scale, scale


def rows_outside(like: Tensor, batch: int, heads: int, length: int, dim: int) -> Tensor:
    """A new (batch, heads, length, dim) in memory (batch, length, heads, dim)."""
    return empty(like, (batch, heads, length, dim), order=(0, 2, 1, 3))
