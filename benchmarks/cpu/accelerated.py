"""What `fastfusion.accelerate` does to whole models: ``python -m fastfusion models``.

Each model has a process of its own, which prints a row as JSON: layers swapped and kept, how far
outputs move, times as they are and accelerated, in turns, and the memory that a call takes.
"""

import argparse
import copy
import ctypes
import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastfusion as ff
from fastfusion.acceleration.verification import deviation, largest_of, tensors_of

from ..common import hub, machine
from ..common.timing import Spread, geometric_mean, in_turns

WEIGHTS = ("float32", "bf16", "int8")
_NAMES = {"float32": None, "bf16": "bf16", "int8": "int8"}
Row = dict[str, Any]


def measure(name: str, tiny: bool, rounds: int) -> Row:
    """The row of a model, but for `against_compiled`."""
    model, inputs = hub.build(name, tiny)
    models = {"before": model, **{w: _accelerated(model, w) for w in WEIGHTS}}
    report: Any = models["float32"].fastfusion_report
    others = [row for row in report.swapped if row.source != "torch.nn.Linear"]
    calls = {key: _call(m, inputs) for key, m in models.items()}
    outputs = {key: [*tensors_of(call())] for key, call in calls.items()}
    row = {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "swapped": len(others),
        "linear": len(report.swapped) - len(others),
        "kept": [*dict.fromkeys(f"{row.source}: {row.reason}" for row in report.kept)],
        "largest": largest_of(outputs["before"]),
        "deviation": {w: deviation(outputs["before"], outputs[w]) for w in WEIGHTS},
        "peak": {key: _peak(call) for key, call in calls.items()},
    }
    machine.keep_memory()
    times = in_turns({key: _timed(call) for key, call in calls.items()}, rounds)
    row["ms"] = {key: 1e3 * Spread.of(found).median for key, found in times.items()}
    row["speed"] = {w: _ratio(times["before"], times[w]) for w in WEIGHTS}
    return row


def _peak(call: Callable[[], Any]) -> float:
    """Megabytes that a call takes beyond what is there, at their peak."""
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return max(0.0, _status("VmHWM") - before)


def _status(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def against_compiled(name: str, tiny: bool, rounds: int) -> float:
    """The time of torch.compile of a model over that of the accelerated one."""
    model, inputs = hub.build(name, tiny)
    fast = _accelerated(model, "float32")
    compiled: Any = torch.compile(model)
    calls = {"compiled": _call(compiled, inputs), "fast": _call(fast, inputs)}
    for call in (*calls.values(), *calls.values()):
        call()
    times = in_turns({key: _timed(call) for key, call in calls.items()}, rounds)
    return _ratio(times["compiled"], times["fast"])


def _ratio(one: Sequence[float], other: Sequence[float]) -> float:
    return Spread.of([a / b for a, b in zip(one, other, strict=True)]).median


def _accelerated(model: nn.Module, weights: str) -> nn.Module:
    """A copy, with the parameters of the model itself as far as they stay what they are."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    return ff.accelerate(copy.deepcopy(model, shared), weights=_NAMES[weights])


def _call(model: nn.Module, inputs: hub.Inputs) -> Callable[[], Any]:
    def call() -> Any:
        torch.manual_seed(0)  # ViLT draws patches
        with torch.inference_mode():
            return model(**inputs)

    return call


def _timed(call: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return seconds


# ---- all models


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each model that is asked for, of processes of their own."""
    for name in arguments.models or hub.MAKERS:
        row = _work(name, arguments)
        if arguments.compile and "error" not in row:
            found = _work(name, arguments, "--compile")
            row["compiled"] = found.get("compiled", found.get("error"))
        yield row


def _work(name: str, arguments: argparse.Namespace, *options: str) -> Row:
    """What a process finds, or {"error": why it found nothing}."""
    command = [
        sys.executable, "-m", "fastfusion", "models", "--worker", name, *options,
        "--rounds", str(arguments.rounds), "--threads", str(arguments.threads),
    ]  # fmt: skip
    command += ["--tiny"] if arguments.tiny else []
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=arguments.timeout,
            env=machine.pinned(arguments.threads),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"took longer than {arguments.timeout:.0f} s"}
    if done.returncode:
        message = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"name": name, "error": message[-1]}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def _worker(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    name, tiny = arguments.worker, arguments.tiny
    if arguments.compile:
        machine.keep_memory()
        row: Row = {"compiled": against_compiled(name, tiny, arguments.rounds)}
    else:
        row = measure(name, tiny, arguments.rounds)
    print(json.dumps(row))


# ---- a page of it

_HEAD = (
    "model", "parameters", "layers (linear)", "deviation", "ms", "float32", "bf16 weights", "int8",
    "against compiled", "MB", "float32", "bf16 weights", "int8",
)  # fmt: skip
_ABOUT = """\
Models with random weights, in the configurations that their authors publish, at batch 1, as
`fastfusion.accelerate` finds them and as it leaves them; made by `python -m fastfusion models`.

- layers: how many are swapped, linear ones counted apart; at the end of the page, what is not.
- deviation: the largest difference of outputs in float32, and the largest output.
- ms: of a call by transformers as it comes (attention by `sdpa` where the model has it), then
  accelerated, with float32 weights, weights in bfloat16 and in 8 bits. In one process, calls in
  turns; medians, and in brackets the median of ratios within rounds.
- against compiled: the time of `torch.compile` of the same model over ours, both in float32.
- MB: what a call takes beyond the model and its inputs at its peak, before and after.
"""


def _cells(row: Row) -> tuple[str, ...]:
    if "error" in row:
        return (row["name"], *["-"] * (len(_HEAD) - 1))
    ms, speed, memory = row["ms"], row["speed"], row["peak"]
    compiled = row.get("compiled")
    return (
        row["name"],
        f"{row['parameters'] / 1e6:.1f} M",
        f"{row['swapped']} ({row['linear']})",
        f"{row['deviation']['float32']:.0e} of {row['largest']:.1f}",
        f"{ms['before']:.1f}",
        *(f"{ms[w]:.1f} ({speed[w]:.2f}x)" for w in WEIGHTS),
        f"{compiled:.2f}x" if isinstance(compiled, float) else "-",
        *(f"{memory[w]:.1f}" for w in ("before", *WEIGHTS)),
    )


def document(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """docs/models.md: the slowest gains first."""
    good = sorted((r for r in rows if "error" not in r), key=lambda r: r["speed"]["float32"])
    bad = [r for r in rows if "error" in r]
    lines = ["# Models of transformers, accelerated", "", *_ABOUT.splitlines(), ""]
    lines += ["; ".join(f"{name} {value}" for name, value in facts.items()), ""]
    lines += [f"| {' | '.join(_HEAD)} |", "|" + "---|" * len(_HEAD)]
    lines += [f"| {' | '.join(_cells(row))} |" for row in (*bad, *good)]
    if good:
        lines += ["", f"Geometric means of {len(good)} models: {_means(good)}."]
    lines += ["", "## What is not swapped, and why", ""]
    for row in good:
        lines += [f"- {row['name']}: {kept}" for kept in row["kept"]]
        if isinstance(row.get("compiled"), str):
            lines += [f"- {row['name']}, torch.compile: {row['compiled']}"]
    lines += [f"- {row['name']}, all of it: {row['error']}" for row in bad]
    return "\n".join(lines) + "\n"


def _means(rows: Sequence[Row]) -> str:
    means = [f"{w} {geometric_mean(r['speed'][w] for r in rows):.2f}x" for w in WEIGHTS]
    found = [r["compiled"] for r in rows if isinstance(r.get("compiled"), float)]
    if found:
        means.append(f"against torch.compile ({len(found)}) {geometric_mean(found):.2f}x")
    return ", ".join(means)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastfusion models",
        description="Accelerate models of transformers with random weights, and write down what "
        "that does to each.",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(hub.MAKERS))
    parser.add_argument("--output", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--rounds", type=int, default=9, help="of timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds, of each process")
    parser.add_argument("--compile", action="store_true", help="time torch.compile as well")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the command")
    parser.add_argument("--worker", choices=hub.MAKERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.models) - set(hub.MAKERS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}; {', '.join(hub.MAKERS)}")
    try:
        importlib.import_module("transformers")
    except ImportError:
        print("this needs transformers: pip install transformers==5.23.0", file=sys.stderr)
        return 1
    if arguments.worker:
        _worker(arguments)
        return 0
    rows = []
    for row in run(arguments):
        rows.append(row)
        print("  ".join(_cells(row)), row.get("error", ""), flush=True)
    facts = machine.describe()
    names = ("cpu", "cpu isa", "torch", "commit", "taken")
    known = {name: facts[name] for name in names} | {
        "transformers": version("transformers"),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(document(rows, known))
    print(arguments.output)
    return 0
