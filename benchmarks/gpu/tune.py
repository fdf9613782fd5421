"""``make tune``: finds tiles for the GPU at hand, in kernels/host/configs/<device>.json.

A tile says how many rows a program owns, and its warps and stages. How many rows it loops over is
never tuned: that decides the bits of a result. A candidate that changes a bit is rejected, and the
default stays where nothing is more than 3 % faster. The file is written after each key, so that a
run that is cut off keeps what it found.
"""

import argparse
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from operator import ne
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import fastfusion as ff

from ..common import machine, ops, shapes
from ..common.command import Parser, UsageError
from ..common.timing import geometric_mean
from .cells import Budget
from .device import DTYPES as BY_NAME
from .device import NO_GPU, describe, file_name
from .results import replace_text
from .timing import Clock, Timed, measure

OWN = (16, 32, 64, 128)
WARPS = (4, 8)
STAGES = (1, 2, 3, 4)
GAIN = 1.03
MOST_SHAPES = 3
SUITES = ("attention", "bidirectional")
DTYPES = ("bfloat16", "float32")  # float16 has the tiles of bfloat16


@dataclass(frozen=True)
class Task:
    """One shape on which a kernel runs."""

    suite: str
    shape: dict[str, Any]
    dtype: str
    backward: bool

    def __str__(self) -> str:
        return f"{self.shape['name']} {self.dtype}{' backward' if self.backward else ''}"


@dataclass
class Result:
    """What was found for one key.

    Attributes:
        key: "kernel/bits/width", as the launcher looks it up.
        default: the tile without tuning.
        chosen: the fastest tile that was accepted, which may be the default.
        gain: time of the default over that of the chosen one, geometric mean over the shapes.
        before: seconds of the default, by shape; after: of the chosen one.
        rejected: why candidates were not accepted.
    """

    key: str
    default: Any
    chosen: Any
    gain: float = 1.0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)


Call = Callable[[], tuple[Tensor, ...]]
# By key: the default tile, and the tasks that look it up.
Keys = dict[str, tuple[Any, list[Task]]]


def launch() -> Any:
    """The module that chooses tiles; importing it imports triton."""
    return importlib.import_module("fastfusion.kernels.host.tiles")


def candidates(default: Any, every: bool) -> list[Any]:
    """Other tiles with the same loop: all of them, or those that change one thing at a time."""
    grid = [
        default._replace(own=own, warps=warps, stages=stages)
        for own, warps, stages in product(OWN, WARPS, STAGES)
    ]
    if not every:
        grid = [tile for tile in grid if sum(map(ne, tile, default)) < 2]
    return [tile for tile in grid if tile != default]


def tasks() -> list[Task]:
    """Every shape, dtype and direction."""
    return [
        Task(suite, shape, dtype, backward)
        for suite in SUITES
        for shape in shapes.select(ops.SUITES[suite].group)
        for dtype in DTYPES
        for backward in (False, True)
    ]


def may_look_up(task: Task, text: str) -> bool:
    """Whether a task may look up a key, "kernel/bits/width", that contains a text: as far as the
    text tells, without launching anything."""
    name = text[: len(text) - len(text.lstrip("abcdefghijklmnopqrstuvwxyz_"))]
    numbers = text[len(name) :]
    if ("bidirectional" in name and task.suite != "bidirectional") or (
        "backward" in name and not task.backward
    ):
        return False
    bits = 8 * BY_NAME[task.dtype].itemsize
    dims = (task.shape["head_dim"], task.shape.get("value_dim", task.shape["head_dim"]))
    ends = [f"/{bits}/{launch().width(dim)}" for dim in dims]
    return any(end.startswith(numbers) if name else numbers in end for end in ends)


def make_call(task: Task, device: str) -> Call:
    """The call of a task without arguments; a backward comes with its forward.

    On its own it could not be captured: autograd runs it on the stream of its forward.
    """
    about = ops.SUITES[task.suite]
    op, public = ops.spec(about.op), getattr(ff, about.op)
    call = op.inputs(task.shape, BY_NAME[task.dtype], device, 0)
    run = partial(public, **call, backend="triton")
    if not task.backward:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return ops.as_tuple(run())

        return forward
    with torch.no_grad():
        results = ops.as_tuple(run())
    seeds = [torch.randn_like(t) for t in results]
    leaves = [leaf.requires_grad_() for leaf in ops.floating(call)]
    return ops.with_gradients(run, leaves, seeds)


def declined() -> AbstractContextManager[None]:
    """In it launchers choose their tiles, and nothing is compiled or run."""
    build = importlib.import_module("fastfusion.benchmarks.compile_gates.triton_builds")
    return cast(AbstractContextManager[None], build.declined())


def find_keys(every: Sequence[Task], device: str, budget: Budget) -> Keys:
    """The keys that tasks look up, each with its default tile and the tasks that do.

    A key that a forward looks up is tuned on forwards. Launches are recorded only: to compile what
    112 tasks launch took more than 3 minutes.
    """
    found: Keys = {}
    of_forwards: set[str] = set()
    for task in sorted(every, key=lambda task: task.backward):
        if not budget.allows(str(task)):
            continue
        try:
            with declined(), launch().watch() as seen:
                make_call(task, device)()
        except Exception as error:
            print(f"{task}: {_first_line(error)}")
            continue
        for key, default in seen.items():
            if not task.backward:
                of_forwards.add(key)
            elif key in of_forwards:
                continue
            found.setdefault(key, (default, []))[1].append(task)
    return found


def representative(some: Sequence[Task]) -> list[Task]:
    """At most 3 of them: the smallest, one in the middle and the largest."""

    def size(task: Task) -> int:
        return ops.flops(task.suite, task.shape, BY_NAME[task.dtype])

    ordered = sorted(some, key=size)
    if len(ordered) <= MOST_SHAPES:
        return ordered
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def label(tile: Any) -> str:
    """`own 64, 4 warps, 2 stages`."""
    return f"own {tile.own}, {tile.warps} warps, {tile.stages} stages"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two results are equal to the bit."""
    return all(
        torch.equal(a.contiguous().view(torch.uint8), e.contiguous().view(torch.uint8))
        for a, e in zip(actual, expected, strict=True)
    )


def accepted(
    key: str, tiles: Sequence[Any], calls: Sequence[Call], budget: Budget
) -> tuple[list[Any], dict[str, str]]:
    """The tiles that launch and give the bits of the default; why the others do not."""
    expected = [[t.clone() for t in call()] for call in calls]
    good, rejected = [], {}
    for tile in tiles:
        if budget.spent():
            rejected[label(tile)] = "no time"
            continue
        try:
            with launch().override(key, tile):
                equal = all(
                    same_bits(call(), bits) for call, bits in zip(calls, expected, strict=True)
                )
        except Exception as error:  # out of resources, or whatever a compiler says
            rejected[label(tile)] = _first_line(error)
            continue
        if equal:
            good.append(tile)
        else:
            rejected[label(tile)] = "changes the bits of the result"
    return good, rejected


def tune_key(
    key: str,
    default: Any,
    some: Sequence[Task],
    every: bool,
    rounds: int,
    budget: Budget,
    device: str = "cuda",
    clock: Clock | None = None,
) -> Result:
    """Tries the candidates of one key on its shapes, those for which there is time."""
    result = Result(key, default, default)
    named = {str(task): make_call(task, device) for task in some}
    good, result.rejected = accepted(key, candidates(default, every), list(named.values()), budget)
    tiles = [default, *good]
    times: dict[str, dict[Any, float]] = {}
    for name, call in named.items():
        timed = {label(tile): Timed(call, partial(launch().override, key, tile)) for tile in tiles}
        measured = measure(timed, rounds, 2e-3, ("graph",), clock)
        if measured.no_graph:
            raise RuntimeError(f"{name} under a graph: {next(iter(measured.no_graph.values()))}")
        graph = measured.modes["graph"]
        times[name] = {tile: graph.time(label(tile)).median for tile in tiles}
    gains = {tile: geometric_mean(t[default] / t[tile] for t in times.values()) for tile in tiles}
    best = max(tiles, key=lambda tile: gains[tile])
    if gains[best] > GAIN:
        result.chosen, result.gain = best, gains[best]
    result.before = {name: found[default] for name, found in times.items()}
    result.after = {name: found[result.chosen] for name, found in times.items()}
    return result


def warm_up(keys: Keys, every: bool, part: tuple[int, int], device: str) -> None:
    """Launches one part of all candidates, so that they lie compiled in triton's cache; ends when
    the process that wanted them has ended."""
    parent = os.getppid()
    by_task: dict[str, tuple[Task, list[tuple[str, Any]]]] = {}
    for key, (default, some) in keys.items():
        for task in representative(some):
            jobs = by_task.setdefault(str(task), (task, []))[1]
            jobs += [(key, tile) for tile in candidates(default, every)]
    for task, jobs in by_task.values():
        call = make_call(task, device)
        for key, tile in jobs[part[0] :: part[1]]:
            if os.getppid() != parent:
                return
            # The process that times says what is wrong with a candidate.
            with suppress(Exception), launch().override(key, tile):
                call()


def table(results: Sequence[Result]) -> str:
    """Before and after, the greatest gain first."""
    lines = []
    for result in sorted(results, key=lambda result: -result.gain):
        change = (
            "default stays"
            if result.chosen == result.default
            else f"{label(result.default)} -> {label(result.chosen)}"
        )
        lines.append(f"{result.key:<40} {result.gain:5.2f}x  {change}")
        for name, before in result.before.items():
            after = result.after[name]
            lines.append(f"    {name:<44} {1e6 * before:9.1f} us -> {1e6 * after:9.1f} us")
        bits = sum("bits" in why for why in result.rejected.values())
        if bits:
            lines.append(f"    {bits} candidate(s) changed the bits of the result")
    return "\n".join(lines)


def document(results: Sequence[Result], about: dict[str, Any], old: dict[str, Any]) -> dict:
    """What the file holds: tiles that differ from the default, by key; other keys stay."""
    tiles = dict(old.get("tiles", {}))
    for result in results:
        tiles.pop(result.key, None)
        if result.chosen != result.default:
            chosen = result.chosen
            tiles[result.key] = {"own": chosen.own, "warps": chosen.warps, "stages": chosen.stages}
    kept = ("gpu", "driver", "torch", "triton", "commit", "taken")
    return {**{name: about.get(name) for name in kept}, "tiles": dict(sorted(tiles.items()))}


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, checked."""
    result = Parser(prog="make tune", description=(__doc__ or "").partition("\n")[0])
    add = result.add_argument
    add("--quick", action="store_true", help="candidates that change one thing at a time")
    add("--only", default="", help="keys that contain this text, such as attention/16/64")
    add("--minutes", type=float, help="start nothing new after so many minutes")
    add("--jobs", type=int, help="processes that compile beforehand; default: cores - 2")
    add("--output", type=Path, metavar="FILE", help="default kernels/host/configs/<device>.json")
    add("--part", help=argparse.SUPPRESS)
    options = result.parse_args(argv)
    if options.minutes is not None and options.minutes < 0:
        raise UsageError(f"--minutes must not be negative, got {options.minutes}")
    if options.jobs is None:
        options.jobs = max(1, (os.cpu_count() or 1) - 2)
    if options.part is not None:
        index, _, count = options.part.partition("/")
        options.part = (int(index), int(count))
    return options


def configs_file(device_name: str) -> Path:
    """Where the launcher looks for the tiles of a device."""
    folder = Path(launch().__file__).with_name("configs")
    return folder / f"{file_name(device_name)}.json"


def compile_beforehand(argv: list[str], jobs: int, seconds: float | None) -> None:
    """Runs this command as several processes that only compile; they end with this one."""
    command = [sys.executable, "-m", "fastfusion.benchmarks.gpu.tune", *argv, "--part"]
    processes: list[subprocess.Popen[bytes]] = []
    end = None if seconds is None else time.monotonic() + seconds
    try:
        for index in range(jobs):
            part = f"{index}/{jobs}"
            processes.append(subprocess.Popen([*command, part], stdout=subprocess.DEVNULL))
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(None if end is None else max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def run(options: argparse.Namespace, argv: list[str], device: str = "cuda") -> int:
    """Tunes key after key, and writes the file after each; 1 where nothing could be tuned."""
    budget = Budget(options.minutes)
    asked = [task for task in tasks() if may_look_up(task, options.only)]
    found = find_keys(asked, device, budget)
    keys = {key: about for key, about in found.items() if options.only in key}
    if options.part is not None:
        warm_up(keys, not options.quick, options.part, device)
        return 0
    if not keys:
        why = "no time" if budget.left_out else "no kernel with such tiles ran"
        print(f"make tune: {why}", file=sys.stderr)
        return 1
    if options.jobs > 1:
        print(f"{len(keys)} keys; compiling candidates in {options.jobs} processes", flush=True)
        left = budget.left()
        compile_beforehand(argv, options.jobs, None if left is None else left / 2)
    known = {**machine.describe(), **describe()} if device == "cuda" else {}
    output = options.output or configs_file(torch.cuda.get_device_name())
    old = json.loads(output.read_text()) if output.exists() else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for result in tune_all(keys, options, budget, device):
        results.append(result)
        replace_text(output, json.dumps(document(results, known, old), indent=1))
    print(table(results))
    for name in budget.left_out:
        print(f"left out, no time: {name}")
    changed = sum(result.chosen != result.default for result in results)
    written = f"written to {output}" if results else "nothing written"
    print(f"{changed} of {len(results)} tiles changed; {written}")
    return 0


def tune_all(
    keys: Keys,
    options: argparse.Namespace,
    budget: Budget,
    device: str,
) -> Iterator[Result]:
    """Tunes key after key while there is time."""
    for index, (key, (default, some)) in enumerate(keys.items()):
        if not budget.allows(key):
            continue
        start = time.monotonic()
        few = representative(some)
        try:
            result = tune_key(key, default, few, not options.quick, 5, budget, device)
        except Exception as error:
            print(f"[{index + 1}/{len(keys)}] {key}: {_first_line(error)}", flush=True)
            continue
        took = time.monotonic() - start
        print(
            f"[{index + 1}/{len(keys)}] {key}: {result.gain:.2f}x with {label(result.chosen)} "
            f"({took:.0f} s)",
            flush=True,
        )
        yield result
        gc.collect()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = parse(argv)
    except UsageError as error:
        print(f"make tune: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(f"make tune {NO_GPU}", file=sys.stderr)
        return 2
    # So that the processes that compile end with this one, where a time limit ends `make`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return run(options, argv)


if __name__ == "__main__":
    sys.exit(main())
