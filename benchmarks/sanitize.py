"""What compute-sanitizer watches: each op on all kernels of the device, at sizes no tile divides.

    compute-sanitizer --tool memcheck python -m fastfusion.benchmarks.sanitize

Results are held to the same rule as those that are timed (`gate.py`).
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import fastfusion as ff
from fastfusion._op import Op

from . import gate, ops
from .results import REFERENCE

# Lengths of one tile and less, of several with a rest, and long enough to be split.
SHAPES: dict[str, list[dict[str, Any]]] = {
    "attention": [
        {"batch": 2, "heads": 2, "q_len": 19, "kv_len": 37, "head_dim": 64, "mask": "key_padding"},
        {"batch": 1, "heads": 4, "kv_heads": 2, "q_len": 77, "kv_len": 77, "head_dim": 40,
         "causal": True},
        {"batch": 1, "heads": 1, "q_len": 1, "kv_len": 1100, "head_dim": 64},
        {"batch": 2, "heads": 1, "q_len": 70, "kv_len": 130, "head_dim": 6, "value_dim": 20,
         "mask": "bias"},
        {"batch": 1, "heads": 1, "q_len": 33, "kv_len": 65, "head_dim": 160, "mask": "bool"},
    ],
    "bidirectional": [
        {"batch": 2, "heads": 2, "q_len": 37, "kv_len": 19, "head_dim": 64, "mask": "both_padding"},
        {"batch": 1, "heads": 1, "q_len": 130, "kv_len": 70, "head_dim": 32, "value_dim": 48},
    ],
}  # fmt: skip
DTYPES = (torch.float16, torch.float32)


def cases() -> Iterator[tuple[str, dict[str, Any], torch.dtype, bool]]:
    """Suite, shape, dtype and whether with a backward."""
    for suite, shapes in SHAPES.items():
        for shape in shapes:
            for dtype in DTYPES:
                for backward in (False, True):
                    yield suite, shape, dtype, backward


def kernels(op: Op, call: dict[str, Any]) -> list[str]:
    """The backends that have kernels for a call on its device."""
    given = op.normalize(**call)
    return [
        i.backend
        for i in op.implementations
        if i.backend != REFERENCE
        and not i.refuses(*given)
        and not (i.on_request and i.on_request(*given))
    ]


def check(
    suite: str, shape: dict[str, Any], dtype: torch.dtype, backward: bool, device: str
) -> str | None:
    """Runs one call on each backend; why a result is wrong, or None."""
    about = ops.SUITES[suite]
    op, public = ops.spec(about.op), getattr(ff, about.op)
    call = op.inputs(shape, dtype, device, 0)
    expected, seeds = ops.expected_results(op, call, about.results, backward)
    leaves = ops.floating(call)
    for leaf in leaves:
        leaf.requires_grad_(backward)
    backends = kernels(op, call)
    calls: list[ops.Call] = [partial(public, **call, backend=backend) for backend in backends]
    calls.append(about.others[about.plain](call))
    if backward:
        calls = [ops.with_gradients(run, leaves, seeds) for run in calls]
    with torch.inference_mode(not backward):
        *results, plain = (ops.as_tuple(run()) for run in calls)
    for backend, actual in zip(backends, results, strict=True):
        why = gate.verdict(actual, expected, plain, backward)
        if why is not None:
            return f"{backend}: {why}"
    return None if backends else "no backend has kernels for it"


def main(device: str = "cuda") -> int:
    """Runs every case; 1 where one is wrong."""
    wrong = 0
    for suite, shape, dtype, backward in cases():
        why = check(suite, shape, dtype, backward, device)
        if why is not None:
            wrong += 1
            direction = "forward and backward" if backward else "forward"
            print(f"{suite} {dtype} {direction} {shape}: {why}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
