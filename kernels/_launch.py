"""What the launchers share: tile sizes, number formats, arguments common to all kernels."""

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastfusion.kernels import _plan, _tiles
from fastfusion.kernels._plan import INTERPRETED, empty
from fastfusion.kernels.device.masks import (
    BOOL_MASK,
    EXTREME,
    EXTREME_BOOL,
    EXTREME_FLOAT,
    FLOAT_MASK,
)

_CONFIGS = Path(__file__).with_name("configs")
# Values of MASK by the mask's being there and of bools, and by whether the scale is extreme.
_MASKS = {
    (False, False): (0, EXTREME.value),
    (True, False): (FLOAT_MASK.value, EXTREME_FLOAT.value),
    (True, True): (BOOL_MASK.value, EXTREME_BOOL.value),
}
_ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tile(NamedTuple):
    """How a kernel is cut: rows that a program owns, rows that it loops over, warps, stages.

    `loop` decides the order of sums and so the bits of a result; it is the same for every length
    and device of a compute capability. The other three may be tuned.
    """

    own: int
    loop: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# What `override` and `watch` set; nothing else does.
_overrides: dict[str, Tile] = {}
_watched: dict[str, Tile] | None = None


def width(dim: int) -> int:
    """The power of two that a head dim is padded to; 16 is the least that a dot takes."""
    return max(16, 1 << (dim - 1).bit_length())


def aligned(*dims: int) -> bool:
    """Whether Triton knows that rows of these dims start at multiples of 16 elements."""
    return all(dim % 16 == 0 for dim in dims)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def _tuned(device_name: str) -> dict[str, Any]:
    path = _CONFIGS / f"{device_file(device_name)}.json"
    return json.loads(path.read_text())["tiles"] if path.exists() else {}


def device_file(device_name: str) -> str:
    """The stem of a device's files: its name in lower case, with dashes for spaces."""
    return "-".join(device_name.lower().split())


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that tiles are chosen for; the interpreter has that of an A100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@functools.cache
def tile(
    kernel: str,
    dtype: torch.dtype,
    widest: int,
    device: torch.device,
    aligned: bool = True,
    masked: bool = False,
) -> Tile:
    """The tile of a kernel for heads of `widest` padded elements on a device.

    What tuning found for the device by that name, or the default of its compute capability: another
    one for calls that are `masked` (by an attn_mask or dropout, whose values take registers beside
    the scores), and half of it for rows that are not `aligned`, whose single elements do as well.
    """
    if masked:
        kernel = f"{kernel}_masked"
    if not aligned:
        chosen = tile(kernel, dtype, widest, device)
        return chosen._replace(own=max(16, chosen.own // 2))
    default = Tile(*_tiles.default(kernel, dtype.itemsize, widest, capability(device)))
    key = f"{kernel}/{8 * dtype.itemsize}/{widest}"
    if _watched is not None:
        _watched[key] = default
    if key in _overrides:
        return _overrides[key]
    if device.type != "cuda":
        return default
    tuned = _tuned(torch.cuda.get_device_name(device)).get(key)
    return default if tuned is None else default._replace(**tuned)


def forget() -> None:
    """Choose tiles anew, because something that decides about them has changed."""
    tile.cache_clear()
    _plan.forget()


@contextmanager
def override(key: str, instead: Tile) -> Iterator[None]:
    """Launch the kernel of a key, "kernel/bits/width", with another tile; for `make tune`."""
    before = dict(_overrides)
    _overrides[key] = instead
    forget()
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
        forget()


@contextmanager
def watch() -> Iterator[dict[str, Tile]]:
    """The keys of the tiles that are chosen in the block, each with its default tile."""
    global _watched
    before, _watched = _watched, {}
    forget()
    try:
        yield _watched
    finally:
        _watched = before
        forget()


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


def score_options(
    query: Tensor,
    sizes: tuple[int, int, int, int],
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    bottom_right: bool,
    scale: float | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run-time and compile-time arguments that say how scores are made; the same in all kernels.

    `sizes` are those that the mask broadcasts to: batch, heads, queries, keys.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    masked = attn_mask is not None
    bools = attn_mask is not None and attn_mask.dtype == torch.bool
    mask_strides = attn_mask.expand(sizes).stride() if attn_mask is not None else (0, 0, 0, 0)
    extreme = not 2.0**-32 <= abs(scale) <= 2.0**32
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
        "diagonal": sizes[3] - sizes[2] if is_causal and bottom_right else 0,
        "threshold": min(round(dropout_p * 2**32), 2**32 - 1),
        "keep_scale": 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
        "scale": abs(scale),
        "factor": factor,
    }
    compile_time = {
        "SIGN": -1 if scale < 0 else 1,
        "CAUSAL": int(is_causal),
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


def readable(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else rows_readable(mask)


def owned(chosen: Tile, rows: int, dtype: torch.dtype) -> int:
    """The rows that a program owns.

    In 16 bits always the tile's: fewer rows would be laid out over the warps in another way, their
    sums added up in another order, and so a row's bits would depend on how many are beside it. A
    call of 20 queries takes 3.0 us with 64 rows and 2.8 us with 16 (H200). In float32 no more than
    there are, 16 at least.
    """
    return chosen.own if dtype.itemsize == 2 else min(chosen.own, width(max(rows, 1)))


def cut(
    kernel: str, query: Tensor, widest: int, rows: int, even: bool = True, masked: bool = False
) -> tuple[int, dict[str, int]]:
    """The rows that a program owns, and the arguments that say how a kernel is cut."""
    chosen = tile(kernel, query.dtype, widest, query.device, even, masked)
    own = owned(chosen, rows, query.dtype)
    return own, {"OWN": own, "LOOP": chosen.loop, **chosen.options()}
