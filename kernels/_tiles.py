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
    "bidirectional": {
        2: {32: (16, 16, 8, 1), 64: (16, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
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
        2: {64: (64, 64, 8, 2), 128: (32, 32, 4, 2), 256: (64, 32, 8, 2)},
        4: {64: (32, 32, 4, 2), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
    },
    "varlen_rows": {
        2: {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (16, 32, 8, 1)},
        4: {64: (32, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "varlen_keys": {
        2: {64: (32, 32, 8, 2), 128: (16, 32, 8, 2), 256: (16, 32, 8, 1)},
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
    "attention_backward_mask": {
        2: {64: (64, 32, 8, 1), 128: (64, 32, 8, 1), 256: (16, 32, 8, 1)},
        4: {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
    },
}


# Where Hopper's own matrix instructions want another one; `loop` is the same, and with it the bits.
_HOPPER: dict[tuple[str, int, int], Sizes] = {
    ("attention", 2, 256): (64, 32, 8, 2),
    ("bidirectional_backward", 2, 256): (16, 32, 8, 2),
}


def default(kernel: str, itemsize: int, width: int, capability: tuple[int, int]) -> Sizes:
    """The tile of a kernel for elements of `itemsize` bytes and a padded head dim of `width`."""
    by_width = _DEFAULTS[kernel][itemsize]
    limit = next(limit for limit in sorted(by_width) if width <= limit)
    if capability[0] == 9:
        return _HOPPER.get((kernel, itemsize, limit), by_width[limit])
    return by_width[limit]
