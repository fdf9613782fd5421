"""How the kernels are cut: the tile of a kernel, by dtype, padded head dim and device."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfusion.kernels.host import default_tiles, plan

_CONFIGS = Path(__file__).with_name("configs")


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
    default = Tile(*default_tiles.default(kernel, dtype.itemsize, widest, capability(device)))
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
    plan.forget()


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
