"""What compute-sanitizer watches: each op on all kernels of the device, at sizes no tile divides.

    compute-sanitizer --tool memcheck python -m fastfusion.benchmarks.gpu.sanitize

Results are held to the same rule as those that are timed (`gate.py`).
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import fastfusion as ff
from fastfusion import _cuda_graph
from fastfusion.core.op import Op

from ..common import gate, ops
from ..common.results import REFERENCE

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
    given = op.call(**call)
    return [
        i.backend
        for i in op.implementations
        if i.backend != REFERENCE
        and not i.refuses(given)
        and not (i.on_request and i.on_request(given))
    ]


def check(
    suite: str,
    shape: dict[str, Any],
    dtype: torch.dtype,
    backward: bool,
    device: str,
    only: str | None = None,
) -> str | None:
    """Runs one call twice on each backend, or on one; why a result is wrong, or None."""
    about = ops.SUITES[suite]
    op, public = ops.spec(about.op), getattr(ff, about.op)
    call = op.inputs(shape, dtype, device, 0)
    expected, seeds = ops.expected_results(op, call, about.results, backward)
    leaves = ops.floating(call)
    for leaf in leaves:
        leaf.requires_grad_(backward)
    backends = [b for b in kernels(op, call) if only in (None, b)]
    calls: list[ops.Call] = [partial(public, **call, backend=backend) for backend in backends]
    calls.append(about.others[about.plain](call))
    if backward:
        calls = [ops.with_gradients(run, leaves, seeds) for run in calls]
    with torch.inference_mode(not backward):
        *results, plain = (ops.as_tuple(run()) for run in calls)
        again = [ops.as_tuple(run()) for run in calls[:-1]]  # as planned by the first call
    for backend, actual, repeated in zip(backends, results, again, strict=True):
        why = gate.verdict(actual, expected, plain, backward)
        if why is None and not all(map(torch.equal, actual, repeated)):
            why = "a second call gives other bits"
        if why is not None:
            return f"{backend}: {why}"
    return None if backends or only else "no backend has kernels for it"


def check_graph(backend: str) -> str | None:
    """One call in a CUDA graph, replayed on other inputs; why a result is wrong, or None."""
    query, key = (torch.randn(1, 12, n, 64, device="cuda").bfloat16() for n in (20, 36))
    with torch.inference_mode():
        run = partial(ff.scaled_dot_product_attention, query, key, key, backend=backend)
        recording = _cuda_graph.Recording(query.device)
        recording.warm_up(run)
        out = recording.capture(run)
        query.copy_(torch.randn_like(query))
        recording.graph.replay()
        return None if torch.equal(out, run()) else "a graph gives other bits than the call"


def main(argv: list[str] | None = None, device: str = "cuda") -> int:
    """Runs every case, a line for each; 1 where one is wrong."""
    parser = argparse.ArgumentParser(prog="sanitize", description=__doc__)
    parser.add_argument("--backend", choices=("cuda", "triton"), help="default both")
    parser.add_argument("--smoke", action="store_true", help="one shape per suite, and CUDA graphs")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    checks: dict[str, Callable[[], str | None]] = {}
    for suite, shape, dtype, backward in cases():
        if options.smoke and shape is not SHAPES[suite][0]:
            continue
        name = f"{suite} {dtype} {'forward and backward' if backward else 'forward'} {shape}"
        checks[name] = partial(check, suite, shape, dtype, backward, device, options.backend)
    if options.smoke and device == "cuda":
        for backend in ("cuda", "triton"):
            checks[f"a CUDA graph of {backend}"] = partial(check_graph, backend)
    wrong = 0
    for name, run in checks.items():
        why = run()
        wrong += why is not None
        print(f"{'ok' if why is None else 'WRONG'}  {name}{f': {why}' if why else ''}", flush=True)
    print(f"{len(checks) - wrong} right, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
