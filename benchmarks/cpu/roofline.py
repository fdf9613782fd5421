"""What the machine can do at most, and how much of it a call reaches (Williams et al., 2009).

Two ceilings: operations per second of a loop of nothing but products, and bytes per second of a
copy too large for any cache. A call that works on inputs in a cache may lie above the second.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastfusion.backends import library

from .timing import measure

# The dtype in which the kernels compute, where that is another one.
COMPUTED_IN = {"float16": "float32", "bf16w": "bfloat16"}
COPIED = 1 << 27  # bytes, several times the largest cache


@dataclass(frozen=True)
class Machine:
    """Ceilings of all threads together.

    Attributes:
        operations: per second, by "float32", "bfloat16" and "int8"; those it can do.
        bandwidth: bytes per second, read and written, of a copy.
    """

    operations: dict[str, float]
    bandwidth: float

    def peak(self, dtype: str) -> float | None:
        """Operations per second in which the kernels compute a dtype; None without kernels."""
        return self.operations.get(COMPUTED_IN.get(dtype, dtype))

    def share(
        self, flops: int, moved: int, dtype: str, seconds: float, cold: bool, float_flops: int = 0
    ) -> float | None:
        """Time at the ceilings over the time taken; inputs in cache have the first one only.

        `float_flops` of the operations are in float32.
        """
        peak, float_peak = self.peak(dtype), self.peak("float32")
        if peak is None or float_peak is None:
            return None
        least = (flops - float_flops) / peak + float_flops / float_peak
        return max(least, moved / self.bandwidth if cold else 0.0) / seconds


def ceilings(threads: int, rounds: int = 9) -> Machine:
    """Measures the machine: products on one thread, times the threads; the copy on all of them."""
    native: Any = library.native
    dtypes = ("float32", "bfloat16", "int8") if native is not None else ()
    loops = {name: partial(native.peak_operations, name, 20000) for name in dtypes}
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    timed = measure({**loops, "copy": partial(target.copy_, source)}, rounds, 1e-3)
    found = {name: run() / timed.time(name).median for name, run in loops.items()}
    return Machine(
        {name: threads * speed for name, speed in found.items() if speed > 0},
        2 * COPIED / timed.time("copy").median,
    )
