"""What the launchers share: number formats, strides, arguments common to all kernels."""

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastfusion.kernels.device.masks import (
    BOOL_MASK,
    EXTREME,
    EXTREME_BOOL,
    EXTREME_FLOAT,
    FLOAT_MASK,
)
from fastfusion.kernels.host.plan import INTERPRETED, empty

# Values of MASK by the mask's being there and of bools, and by whether the scale is extreme.
_MASKS = {
    (False, False): (0, EXTREME.value),
    (True, False): (FLOAT_MASK.value, EXTREME_FLOAT.value),
    (True, True): (BOOL_MASK.value, EXTREME_BOOL.value),
}
_ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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


def score_options(
    call: Any, sizes: tuple[int, int, int, int], key_padding_mask: Tensor | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run-time and compile-time arguments that say how the scores of a call are made; the same in
    all kernels.

    `sizes` are those that the mask broadcasts to: batch, heads, queries, keys.
    """
    query, attn_mask, seed, dropout_p = call.query, call.attn_mask, call.seed, call.dropout_p
    scale = query.shape[-1] ** -0.5 if call.scale is None else float(call.scale)
    masked = attn_mask is not None
    bools = attn_mask is not None and attn_mask.dtype == torch.bool
    mask_strides = attn_mask.expand(sizes).stride() if attn_mask is not None else (0, 0, 0, 0)
    extreme = not 2.0**-16 <= abs(scale) <= 2.0**16
    factor = abs(scale) * math.log2(math.e)
    if extreme:  # for gradients, see `gradient_scale`
        factor = 2.0 ** round(math.log2(abs(scale)) / 2) if scale else 1.0
    run_time = {
        "mask_ptr": query if attn_mask is None else attn_mask,
        **dict(
            zip(("mask_batch", "mask_head", "mask_row", "mask_column"), mask_strides, strict=True)
        ),
        "padding_ptr": query if key_padding_mask is None else key_padding_mask,
        "padding_batch": 0 if key_padding_mask is None else key_padding_mask.stride(0),
        "seed_ptr": query if seed is None else seed,
        "diagonal": sizes[3] - sizes[2] if call.is_causal and call.bottom_right else 0,
        "threshold": min(round(dropout_p * 2**32), 2**32 - 1),
        "keep_scale": 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
        "scale": abs(scale),
        "factor": factor,
    }
    compile_time = {
        "SIGN": -1 if scale < 0 else 1,
        "CAUSAL": int(call.is_causal),
        "MASK": _MASKS[masked, bools][extreme],
        "PADDING": key_padding_mask is not None,
        "DROPOUT": seed is not None,
        **numbers(query.dtype),
    }
    return run_time, compile_time


def gradient_scale(options: dict[str, Any]) -> float:
    """What sums of dS are multiplied by: the scale without its sign, or of an extreme one what its
    square root, taken before, leaves over. Either way to put in all at once could overflow."""
    extreme = options["MASK"] >= EXTREME_FLOAT.value
    return options["scale"] / options["factor"] if extreme else options["scale"]


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of batch, head and row, by the names that the kernels give them."""
    parts = ("batch", "head", "row")
    return {f"{n}_{p}": t.stride(i) for n, t in tensors.items() for i, p in enumerate(parts)}


def rows_outside(like: Tensor, batch: int, heads: int, length: int, dim: int) -> Tensor:
    """A new (batch, heads, length, dim) in memory (batch, length, heads, dim)."""
    return empty(like, (batch, heads, length, dim), order=(0, 2, 1, 3))
