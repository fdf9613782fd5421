"""Default tile sizes: (own, loop, warps, stages) by kernel, element size and padded head dim.

Chosen by compiling, not by timing: the widest tiles that spill no register on any architecture
from sm_80 to sm_100 and fit the shared memory of the smallest (99 KB on sm_86 and sm_89).
`make kernels` holds them to that.
"""

Sizes = tuple[int, int, int, int]
# kernel -> element size in bytes -> padded head dim -> (own, loop, warps, stages). A missing
# head dim takes the next wider one.
_DEFAULTS: dict[str, dict[int, dict[int, Sizes]]] = {
    "attention": {
        2: {32: (64, 64, 8, 2), 64: (128, 64, 8, 3), 128: (64, 32, 8, 3), 256: (64, 32, 8, 1)},
        4: {64: (32, 32, 4, 2), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
    },
    "attention_tma": {2: {128: (64, 64, 4, 3)}},  # same `loop` as attention on Hopper
    "attention_tma_few": {2: {64: (64, 64, 4, 3), 128: (64, 64, 4, 3)}},
    "attention_backward_rows_tma": {2: {128: (64, 64, 4, 2)}},
    "attention_backward_keys_tma": {2: {128: (64, 32, 4, 2)}},
    "bidirectional": {
        2: {64: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
        4: {64: (16, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    "bidirectional_few": {
        2: {64: (16, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
        4: {64: (16, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    "bidirectional_backward": {
        2: {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
        4: {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "bidirectional_shared": {
        2: {256: (16, 16, 8, 1)},
        4: {64: (16, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    "bidirectional_mask": {
        2: {64: (16, 32, 4, 1), 256: (16, 32, 8, 1)},
        4: {64: (16, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "varlen": {
        2: {64: (64, 64, 8, 2), 128: (32, 32, 8, 2), 256: (64, 32, 8, 2)},
        4: {64: (32, 32, 4, 2), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
    },
    "varlen_rows": {
        2: {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (16, 32, 8, 1)},
        4: {64: (32, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "varlen_keys": {
        2: {32: (32, 32, 8, 1), 64: (32, 32, 8, 2), 128: (16, 32, 8, 2), 256: (16, 32, 8, 1)},
        4: {64: (32, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "attention_backward_keys": {
        2: {64: (32, 32, 4, 2), 128: (32, 32, 8, 2), 256: (16, 32, 8, 1)},
        4: {64: (32, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "attention_backward_rows": {
        2: {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (16, 32, 8, 1)},
        4: {64: (32, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "attention_backward_tiles": {2: {16: (32, 32, 8, 1), 64: (32, 32, 4, 1)}},  # own: keys
    "attention_backward_mask": {
        2: {64: (64, 32, 8, 1), 128: (64, 32, 8, 1), 256: (16, 32, 8, 1)},
        4: {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
    },
}
_DEFAULTS["bidirectional_both"] = _DEFAULTS["attention"]
# What an H200 ran fastest of what spills little (benchmarks/results/nvidia-h200/tiles.json).
_HOPPER: dict[tuple[str, int, int], Sizes] = {
    ("attention", 2, 32): (64, 64, 4, 3),
    ("attention", 2, 64): (64, 64, 4, 3),
    ("attention", 2, 128): (64, 64, 4, 3),
    ("attention", 2, 256): (128, 32, 8, 3),
    ("attention_tma_few", 2, 64): (128, 64, 4, 2),
    ("attention_masked", 2, 32): (64, 64, 8, 2),
    ("attention_masked", 2, 64): (64, 64, 4, 3),
    ("attention_masked", 2, 256): (64, 32, 8, 2),
    ("attention_backward_rows", 2, 64): (64, 64, 4, 3),
    ("attention_backward_rows", 2, 128): (64, 64, 4, 2),
    ("attention_backward_rows", 2, 256): (64, 32, 4, 1),
    ("attention_backward_keys", 2, 32): (64, 64, 4, 2),
    ("attention_backward_keys", 2, 64): (64, 32, 4, 1),
    ("attention_backward_keys", 2, 128): (64, 16, 4, 2),
    ("attention_backward_tiles", 2, 16): (64, 64, 4, 1),
    ("attention_backward_tiles", 2, 64): (64, 64, 4, 1),
    ("bidirectional_few", 2, 64): (16, 64, 8, 1),
    ("bidirectional_mask", 2, 256): (16, 32, 8, 2),
    ("bidirectional_both", 2, 64): (64, 64, 4, 3),
    ("bidirectional_both", 2, 256): (64, 32, 8, 2),
    ("bidirectional_backward", 2, 256): (16, 32, 8, 2),
}


def default(kernel: str, itemsize: int, width: int, capability: tuple[int, int]) -> Sizes:
    """The tile of a kernel for elements of `itemsize` bytes and a padded head dim of `width`; of
    "<kernel>_masked" where nothing else is said that of the kernel."""
    by_width = _DEFAULTS[kernel.removesuffix("_masked")][itemsize]
    limit = next(limit for limit in sorted(by_width) if width <= limit)
    if capability[0] == 9:
        return _HOPPER.get((kernel, itemsize, limit), by_width[limit])
    return by_width[limit]
