"""Triton's interpreter, mended where it differs from hardware.

- It cuts the digits off that bfloat16 does not hold; hardware rounds to the nearest.
- It multiplies by BLAS, which adds a transposed product in another order than the product itself.
  Matrix units do not, and kernels count on it: a tile of scores and its transpose agree bit for
  bit. Sums in float64 agree too.
"""

from typing import Any

import numpy as np


def mend() -> None:
    """For the rest of the process."""
    import triton.language as tl
    from triton.runtime import interpreter

    from fastfusion.kernels.host import default_tiles as _tiles

    default = _tiles.default

    def large(*given: Any) -> tuple[int, int, int, int]:
        own, loop, warps, stages = default(*given)
        return max(own, 64), max(loop, 64), warps, stages

    _tiles.default = large

    convert = interpreter._convert_float

    def to_nearest(value: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(value, source, target, rounding)
        bits = np.ascontiguousarray(value).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
        return np.where(np.isnan(value), (bits >> 16) | 0x40, rounded).astype(np.uint16)

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    interpreter._convert_float = to_nearest
    interpreter.InterpreterBuilder.create_dot = dot
