"""The suite "goals": what attention on the CPU shall reach, and whether it does on this machine.

Ratios are of whole public calls unless a line says "kernel": that is the compiled op without
Python, less what the same op takes on 1x1 sequences.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastfusion as ff
from fastfusion.backends import library

from ..common import machine, ops, peers, shapes
from ..common.results import OURS, REFERENCE, Goal
from ..common.timing import Measurement, geometric_mean
from . import cells
from .results import Row
from .settings import Settings
from .timing import measure

Call = Callable[[], Any]
# What no cell may lose to.
PEERS = ("sdpa", "unfused", "onnxruntime", "onnxruntime fused", "openvino")

SHARES = {
    "float32": {"20x36": 0.66, "197x197": 0.85, "512x512": 0.87, "2048x2048": 0.89},
    "bfloat16": {"20x36": 0.60, "197x197": 0.80, "512x512": 0.84, "2048x2048": 0.84},
}
AGAINST_SDPA = {"float32": 1.7, "bfloat16": 4.2, "float16": 3.8}
WITH_GRADIENT = {"float32": 1.5, "bfloat16": 4.0}
DECODING = {"float32": 2.0, "bfloat16": 20.0}
MASKED = {"float32": 1.06, "bfloat16": 1.10}


@dataclass(frozen=True)
class Effort:
    """How long to measure; `most` is the number of operations beyond which a shape is left out."""

    rounds: int
    min_time: float
    most: float


def shape_of(q_len: int, kv_len: int, **more: Any) -> dict[str, Any]:
    """Twelve heads of 64, as most encoders have."""
    return {"q_len": q_len, "kv_len": kv_len, "heads": 12, "head_dim": 64, **more}


def inputs(shape: dict[str, Any], dtype: str) -> dict[str, Any]:
    op = ops.spec("scaled_dot_product_attention")
    return op.inputs(shape, getattr(torch, dtype), "cpu", 0)


def attend(call: dict[str, Any]) -> Call:
    """Our public function on a call."""
    return partial(ff.scaled_dot_product_attention, **call)


def run(rounds: int, min_time: float, most: float) -> Iterator[tuple[str, list[Goal]]]:
    """Sections of goals, as they are measured."""
    effort = Effort(rounds, min_time, most)
    with torch.inference_mode():
        for dtype in SHARES:
            yield f"share of the peak, kernel, {dtype}", list(shares(dtype, effort))
    for dtype in AGAINST_SDPA:
        yield f"against peers, {dtype}", against_peers(dtype, False, effort)
    for dtype in WITH_GRADIENT:
        yield f"against peers with gradients, {dtype}", against_peers(dtype, True, effort)
    with torch.inference_mode():
        for dtype in MASKED:
            yield f"masks and views, {dtype}", list(masks(dtype, effort))
    yield "2 threads against 1", threads(effort)
    for dtype in ("float32", "bfloat16"):
        yield f"bidirectional, {dtype}", list(bidirectional(dtype, effort))
    yield "statistics of the weights against attention", list(statistics(effort))
    yield "one call, memory", [*calls(effort), *memory()]


def shares(dtype: str, effort: Effort) -> Iterator[Goal]:
    """Operations per second of the kernel over those of a loop of products."""
    native: Any = library.native
    op = torch.ops.fastfusion.attention_out.default
    few = [torch.randn(1, 1, 1, 8, dtype=getattr(torch, dtype)) for _ in range(3)]
    spec = ops.spec("scaled_dot_product_attention")
    for name, limit in SHARES[dtype].items():
        shape = shape_of(*map(int, name.split("x")))
        flops, _ = spec.cost(shape, getattr(torch, dtype))
        if flops > effort.most:
            yield Goal(name, None, limit, detail="left out by --quick", unit="")
            continue
        call = inputs(shape, dtype)
        timed = measure(
            {
                "kernel": partial(op, call["query"], call["key"], call["value"]),
                "empty": partial(op, *few),
                "peak": partial(native.peak_operations, dtype, 10000),
            },
            effort.rounds,
            effort.min_time,
        )
        peak = native.peak_operations(dtype, 10000) / timed.time("peak").median
        speed = flops / (timed.time("kernel").median - timed.time("empty").median)
        detail = f"{speed / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s"
        yield Goal(name, speed / peak, limit, detail=detail, unit="")


def rows(suite: str, dtype: str, backward: bool, effort: Effort) -> list[Row]:
    """The shapes of a suite beside their peers."""
    settings = Settings(
        getattr(torch, dtype), backward, effort.rounds, effort.min_time, peers=PEERS
    )
    chosen = [
        shape
        for shape in shapes.select(cells.SUITES[suite].group)
        if ops.flops(suite, shape, getattr(torch, dtype)) <= effort.most
    ]
    return [cells.run_shape(suite, shape, settings) for shape in chosen]


def against_peers(dtype: str, backward: bool, effort: Effort) -> list[Goal]:
    found = [row for row in rows("attention", dtype, backward, effort) if OURS in row.times]
    ratios = [row.ratios["sdpa"].median for row in found if "sdpa" in row.ratios]
    worst = min(found, key=lambda row: row.hardest().median)
    others = {k: v.median for k, v in worst.ratios.items() if k != REFERENCE}
    peer = min(others, key=lambda name: others[name])
    limit = (WITH_GRADIENT if backward else AGAINST_SDPA)[dtype]
    mean = geometric_mean(ratios)
    goals = [Goal("SDPA, geometric mean", mean, limit, detail=f"{len(ratios)} shapes")]
    detail = f"{worst.shape['name']}, {peer}"
    goals.append(Goal("the closest cell", worst.hardest().median, 1.0, detail=detail))
    if not backward and dtype == "bfloat16":
        beside = [row.ratios["openvino"].median for row in found if "openvino" in row.ratios]
        detail = f"{len(beside)} shapes" if beside else "pip install openvino"
        found_mean = geometric_mean(beside) if beside else None
        goals.append(Goal("OpenVINO, geometric mean", found_mean, 1.35, detail=detail))
    for row in found:
        if row.shape["name"] == "decode_1024" and not backward and dtype in DECODING:
            ratio = row.ratios["sdpa"].median
            goals.append(Goal("one token over 1024 keys, SDPA", ratio, DECODING[dtype]))
    return goals


def masks(dtype: str, effort: Effort) -> Iterator[Goal]:
    """What half the keys padded, a dense mask and strided views cost."""
    for q_len, kv_len, limit in ((20, 36, 0.7), (185, 185, 0.55), (512, 512, 0.55)):
        call = inputs(shape_of(q_len, kv_len), dtype)
        padding = torch.zeros(1, kv_len, dtype=torch.bool)
        padding[:, kv_len // 2 :] = True
        timed = in_turns(attend({**call, "key_padding_mask": padding}), attend(call), effort)
        name = f"half the keys padded, {q_len}x{kv_len}"
        yield Goal(name, timed.ratio("a", "b").median, limit, at_most=True)
    for q_len, kv_len in ((197, 197), (512, 512)):
        call = inputs(shape_of(q_len, kv_len), dtype)
        mask = torch.rand(1, 1, q_len, kv_len) > 0.1
        timed = in_turns(attend({**call, "attn_mask": mask}), attend(call), effort)
        name = f"dense bool mask, {q_len}x{kv_len}"
        yield Goal(name, timed.ratio("a", "b").median, MASKED[dtype], at_most=True)
    for q_len, kv_len in ((20, 36), (197, 197)):
        call = inputs(shape_of(q_len, kv_len), dtype)
        views = {k: t.transpose(1, 2).contiguous().transpose(1, 2) for k, t in call.items()}
        timed = in_turns(attend(views), attend(call), effort)
        name = f"(B, L, H, D) views, {q_len}x{kv_len}"
        yield Goal(name, timed.ratio("a", "b").median, 1.1, at_most=True)


def in_turns(a: Call, b: Call, effort: Effort) -> Measurement:
    return measure({"a": a, "b": b}, effort.rounds, effort.min_time)


def threads(effort: Effort, module: str = "goals") -> list[Goal]:
    """What a module says of threads, in a process of its own, whose threads keep to their cores."""
    command = [sys.executable, "-m", f"fastfusion.benchmarks.cpu.{module}"]
    result = subprocess.run(
        [*command, str(effort.rounds), str(effort.min_time)],
        env=machine.pinned(2), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [Goal(**goal) for goal in json.loads(result.stdout)]


def under(count: int, call: Call) -> Call:
    """The call with so many threads."""

    def timed() -> None:
        torch.set_num_threads(count)
        call()

    return timed


def measure_threads(rounds: int, min_time: float) -> Iterator[dict[str, Any]]:
    """One call under 1 and 2 threads, in turns."""
    for dtype in ("float32", "bfloat16"):
        for q_len, kv_len in ((20, 36), (50, 50), (197, 197)):
            call = attend(inputs(shape_of(q_len, kv_len), dtype))
            with torch.inference_mode():
                timed = measure({"one": under(1, call), "two": under(2, call)}, rounds, min_time)
            microseconds = 1e6 * timed.time("one").median
            # Below 20 us starting threads is half of the work, and must only not be a loss.
            limit = 1.85 if microseconds >= 200 else 1.5 if microseconds >= 20 else 1.0
            yield {
                "name": f"{q_len}x{kv_len}, {dtype}",
                "value": timed.ratio("one", "two").median,
                "limit": limit,
                "detail": f"{microseconds:.0f} us with one",
            }


def two_calls(call: dict[str, Any]) -> Call:
    """Both directions by two calls of our own attention."""
    query, key = call["query"], call["key"]
    masks = call.get("key_padding_mask"), call.get("query_padding_mask")

    def run() -> tuple[Tensor, Tensor]:
        return (
            ff.scaled_dot_product_attention(query, key, call["value"], key_padding_mask=masks[0]),
            ff.scaled_dot_product_attention(
                key, query, call["query_value"], key_padding_mask=masks[1]
            ),
        )

    return run


def bidirectional(dtype: str, effort: Effort) -> Iterator[Goal]:
    """Against two calls of our own attention, and against the formula of Grounding DINO."""
    op = ops.spec("bidirectional_attention")
    for masked in (False, True):
        own, formula, names = [], [], []
        for shape in shapes.select("bidirectional"):
            if ops.flops("bidirectional", shape, getattr(torch, dtype)) > effort.most:
                continue
            shape = shape if masked else {**shape, "mask": None}
            call = op.inputs(shape, getattr(torch, dtype), "cpu", 0)
            with torch.inference_mode():
                timed = measure(
                    {
                        OURS: partial(ff.bidirectional_attention, **call),
                        "two": two_calls(call),
                        "formula": peers.two_unfused(call),
                    },
                    effort.rounds,
                    effort.min_time,
                )
            names.append(shape["name"])
            own.append(timed.ratio("two", OURS).median)
            formula.append(timed.ratio("formula", OURS).median)
        which = "a quarter of each side padded" if masked else "no masks"
        limits = (1.3, 1.2) if dtype == "float32" else (1.1, 1.1)
        for about, ratios, (mean, each) in (
            ("two calls of ours", own, limits),
            ("the formula", formula, (2.8, 1.4)),
        ):
            worst = min(range(len(names)), key=ratios.__getitem__)
            yield Goal(f"{about}, {which}, geometric mean", geometric_mean(ratios), mean)
            yield Goal(f"{about}, {which}, each", ratios[worst], each, detail=names[worst])


def statistics(effort: Effort) -> Iterator[Goal]:
    """What mass and entropy take, beside attention itself."""
    for length in (512, 2048):
        call = inputs(shape_of(length, length), "float32")
        names = ("query", "key")
        with torch.inference_mode():
            timed = in_turns(
                partial(ff.attention_statistics, **{name: call[name] for name in names}),
                attend(call),
                effort,
            )
        ratio = timed.ratio("a", "b").median
        yield Goal(f"mass and entropy, {length}x{length}", ratio, 1.6, at_most=True)


def calls(effort: Effort) -> Iterator[Goal]:
    """What a call costs that has next to nothing to compute."""
    query = torch.randn(1, 1, 1, 8)
    op = torch.ops.fastfusion.attention_out.default
    with torch.inference_mode():
        timed = in_turns(
            partial(ff.scaled_dot_product_attention, query, query, query),
            lambda: op(query, query, query),
            effort,
        )
    for name, key, limit in (("public call on 1x1", "a", 6.0), ("the op alone", "b", 3.8)):
        yield Goal(name, 1e6 * timed.time(key).median, limit, at_most=True, unit=" us")


_MEMORY = """
import re, sys, torch
import fastfusion as ff

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1024

torch.set_num_threads(1)
backward = sys.argv[1] == "backward"
def call(length):
    tensors = [torch.randn(1, 1, length, 64, requires_grad=backward) for _ in range(3)]
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    out = ff.scaled_dot_product_attention(*tensors)
    if backward:
        torch.autograd.grad(out, tensors, torch.ones_like(out))
    results = (4 if backward else 1) * length * 64 * 4 / 2**20 + backward * length * 64 * 4 / 2**20
    return status("VmHWM") - before - results
call(64)
print(max(0.0, call(16384)))
"""


def memory() -> Iterator[Goal]:
    """What 16,384 queries over as many keys take beyond inputs and outputs."""
    for direction, limit in (("forward", 100.0), ("backward", 200.0)):
        result = subprocess.run(
            [sys.executable, "-c", _MEMORY, direction], capture_output=True, text=True
        )
        value = float(result.stdout) if result.returncode == 0 else None
        name = f"extra memory, 16,384 x 16,384, {direction}"
        yield Goal(name, value, limit, at_most=True, unit=" MB")


if __name__ == "__main__":
    machine.keep_memory()
    print(json.dumps(list(measure_threads(int(sys.argv[1]), float(sys.argv[2])))))
