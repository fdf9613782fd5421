"""The command ``python -m fastfusion bench``: is it faster, for which shapes, by how much?"""

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import cpu_goals, layers, machine, ops, overhead, shapes
from .results import Goal, Row, table, write_json

SUITES = ("overhead", "attention", "bidirectional", "layers", "goals")
WITHOUT_SHAPES = ("overhead", "goals")
DTYPES = ("float32", "bfloat16", "float16", "float64")
# A quick run leaves out what takes longer than about a tenth of a second per call.
QUICK_FLOPS = 5e9

Measure = Callable[[], Row]


class UsageError(Exception):
    """The command line makes no sense; the message says why in one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    result = _Parser(prog="python -m fastfusion bench", description=__doc__)
    result.add_argument(
        "suite",
        nargs="?",
        metavar="suite",
        choices=SUITES,
        help=f"{', '.join(SUITES)}; default all",
    )
    result.add_argument("--shape", help="measure this shape only (names: benchmarks/shapes.json)")
    result.add_argument("--dtype", choices=DTYPES, default="float32", metavar="DTYPE")
    result.add_argument("--threads", type=int, default=1, help="threads of torch, default 1")
    result.add_argument("--rounds", type=int, help="times that everything is timed, default 20")
    result.add_argument("--backward", action="store_true", help="time forward and backward")
    result.add_argument("--quick", action="store_true", help="few rounds, no very large shapes")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    return result


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, checked.

    Raises:
        UsageError: an option or a value that does not exist, or a shape of another suite.
    """
    options = parser().parse_args(argv)
    if options.threads < 1:
        raise UsageError(f"--threads must be at least 1, got {options.threads}")
    if options.rounds is None:
        options.rounds = 7 if options.quick else 20
    if options.rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {options.rounds}")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise UsageError(f"--json: there is no folder {options.json.parent}")
    options.suites = [options.suite] if options.suite else list(SUITES)
    if options.shape is not None:
        options.suites = [name for name in options.suites if name not in WITHOUT_SHAPES]
        try:
            found = [name for name in options.suites if choose(name, options.shape)]
        except shapes.UnknownShapeError as error:
            raise UsageError(str(error)) from None
        if not found:
            raise UsageError(f"suite {options.suite} has no shape {options.shape}")
        options.suites = found
    return options


def choose(suite: str, name: str | None) -> list[tuple[str, shapes.Shape]]:
    """The shapes of a suite, or the one that was asked for, each with its group."""
    groups = layers.GROUPS if suite == "layers" else (ops.SUITES[suite].group,)
    return [(group, shape) for group in groups for shape in shapes.select(group, name)]


def plan(suite: str, options: argparse.Namespace) -> Iterator[tuple[str, Measure]]:
    """The shapes of a suite, each with the function that measures it."""
    dtype = getattr(torch, options.dtype)
    common: dict[str, Any] = {
        "dtype": dtype,
        "backward": options.backward,
        "rounds": options.rounds,
        "min_time": 1e-3 if options.quick else 5e-3,
    }
    for group, shape in choose(suite, options.shape):
        if suite == "layers":
            yield shape["name"], partial(layers.run_shape, group, shape, **common)
        elif options.quick and ops.flops(suite, shape, dtype) > QUICK_FLOPS:
            print(f"{shape['name']}: left out by --quick", file=sys.stderr)
        else:
            yield shape["name"], partial(ops.run_shape, suite, shape, **common)


def run_rows(suite: str, options: argparse.Namespace, rows: list[Row]) -> None:
    """Measures a suite and prints its table; an interrupt keeps what is measured."""
    measured: list[Row] = []
    jobs = list(plan(suite, options))
    try:
        for index, (name, job) in enumerate(jobs):
            if sys.stderr.isatty():
                print(f"\r\033[K{suite} {index + 1}/{len(jobs)} {name}", end="", file=sys.stderr)
            measured.append(job())
    finally:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        rows += measured
        if measured:
            direction = "forward and backward" if options.backward else "forward"
            print(
                f"\n{suite}, {options.dtype}, {direction}: our time (quartiles), and how many "
                "times as long the others take"
            )
            print(table(measured), flush=True)


def judge(goals: dict[str, list[Goal]], sections: Iterable[tuple[str, list[Goal]]]) -> None:
    """Prints the sections as they are measured, and keeps them in `goals`."""
    for about, section in sections:
        goals[about] = section
        print(f"\n{about}: each number beside its goal")
        print(*section, sep="\n", flush=True)


def run(options: argparse.Namespace) -> int:
    """Runs the suites; 1 where a result of ours was wrong or crashed, otherwise 0."""
    torch.set_num_threads(options.threads)
    about = machine.describe()
    print(
        f"{about['cpu']}, {about['threads']} thread(s) of {about['cores']} cores, "
        f"torch {about['torch']}, fastfusion {about['fastfusion']} {about['commit'] or ''}"
    )
    rows: list[Row] = []
    goals: dict[str, list[Goal]] = {}
    interrupted = False
    try:
        for suite in options.suites:
            if suite == "overhead":
                judge(goals, [("overhead", overhead.run(5 * options.rounds, min_time=5e-3))])
            elif suite == "goals":
                most = QUICK_FLOPS if options.quick else math.inf
                judge(goals, cpu_goals.run(options.rounds, 1e-3 if options.quick else 5e-3, most))
            else:
                run_rows(suite, options, rows)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted; what is above is complete", file=sys.stderr)
    if options.json is not None:
        settings = {
            name: getattr(options, name)
            for name in ("suites", "shape", "dtype", "threads", "rounds", "backward", "quick")
        }
        write_json(options.json, about, settings, rows, goals)
    if interrupted:
        return 130
    return int(any("fastfusion" in row.problems for row in rows))


def run_pinned(argv: list[str], threads: int) -> int:
    """The same command in a new process whose threads stay on their cores."""
    command = [sys.executable, "-m", "fastfusion.benchmarks", *argv]
    return subprocess.run(command, env=machine.pinned(threads)).returncode


def main(argv: list[str] | None = None) -> int:
    """Runs the command line ``argv`` and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = parse(argv)
    except UsageError as error:
        print(f"python -m fastfusion bench: {error}", file=sys.stderr)
        return 2
    if options.threads > 1 and os.environ.get("OMP_PROC_BIND") != "true":
        return run_pinned(argv, options.threads)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
