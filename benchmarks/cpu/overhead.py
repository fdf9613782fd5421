"""The suite "overhead": what our Python costs where there is next to nothing to compute."""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import fastfusion as ff

from ..common.results import Goal
from ..common.timing import Measurement
from .timing import measure

INFERENCE_US = 6.0
AGAINST_SDPA = 1.2
GRADIENT_US = 14.0
IMPORT_MS = 60.0
# Packages that would make the import slow, and that only some users have.
HEAVY = (
    "triton", "transformers", "onnx", "onnxruntime", "openvino", "xformers", "flash_attn",
    "matplotlib", "PIL", "easy_vqa", "torch._dynamo", "torch._inductor",
)  # fmt: skip

_IMPORT = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import fastfusion
print(time.perf_counter() - start)
print(*sorted(set(sys.modules) - before))
"""


def time_import(repeats: int) -> tuple[float, set[str]]:
    """Median seconds of ``import fastfusion`` after ``import torch``, and what it imports."""
    seconds, modules = [], set[str]()
    # Compiled bytecode is cached, as it is for users; the median leaves out the run that makes it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(repeats):
        command = [sys.executable, "-c", _IMPORT]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        first, second = result.stdout.splitlines()
        seconds.append(float(first))
        modules.update(second.split())
    return statistics.median(seconds), modules


def heavy(modules: set[str]) -> list[str]:
    """The members of HEAVY among imported modules."""
    return [name for name in HEAVY if name in modules]


def time_calls(requires_grad: bool, rounds: int, min_time: float) -> Measurement:
    """One public call on 1x1 sequences, ours and torch's, in turns."""
    query, key, value = (torch.randn(1, 1, 1, 8, requires_grad=requires_grad) for _ in range(3))
    calls: dict[str, Callable[[], object]] = {
        "fastfusion": partial(ff.scaled_dot_product_attention, query, key, value),
        "sdpa": partial(F.scaled_dot_product_attention, query, key, value),
    }
    with torch.inference_mode(not requires_grad):
        return measure(calls, rounds, min_time)


def run(rounds: int, min_time: float) -> list[Goal]:
    """Measures every number of the suite, each beside its limit."""
    inference = time_calls(False, rounds, min_time)
    gradient = time_calls(True, rounds, min_time)
    ratio = inference.ratio("fastfusion", "sdpa")
    seconds, modules = time_import(repeats=5)
    found = heavy(modules)

    def goal(name: str, value: float, limit: float, unit: str, detail: str) -> Goal:
        return Goal(name, value, limit, at_most=True, unit=unit, detail=detail)

    def call(name: str, measured: Measurement, limit: float) -> Goal:
        ours, sdpa = measured.time("fastfusion"), measured.time("sdpa")
        detail = (
            f"quartiles {1e6 * ours.lower:.2f}-{1e6 * ours.upper:.2f}, "
            f"SDPA {1e6 * sdpa.median:.2f} us"
        )
        return goal(name, 1e6 * ours.median, limit, " us", detail)

    against = f"quartiles {ratio.lower:.2f}-{ratio.upper:.2f}"
    return [
        call("one call on 1x1 sequences, inference_mode", inference, INFERENCE_US),
        goal("the same against SDPA", ratio.median, AGAINST_SDPA, "x", against),
        call("one call on 1x1 sequences, forward with gradients", gradient, GRADIENT_US),
        goal("import fastfusion on top of import torch", 1e3 * seconds, IMPORT_MS, " ms",
             "median of 5 processes"),
        goal("heavy packages imported with it", len(found), 0, "", ", ".join(found) or "none"),
    ]  # fmt: skip
