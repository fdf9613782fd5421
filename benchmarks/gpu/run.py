"""``make gpu``: checks and times everything on an NVIDIA GPU, and keeps the results.

    smoke       a few calls on each backend, and a CUDA graph
    tests       the test suite with --device cuda
    sanitizer   compute-sanitizer on each op, where it is installed
    tune        `python -m fastfusion.benchmarks.gpu.tune` (only if asked for)
    bench       every op beside its peers, forward and with a backward

A step that fails is reported, and the next one goes on. Results are one folder of at most 8 files,
each written as its results come, so that a run that is cut off keeps what it has:

    summary.json        the machine, and what became of each step
    checks.log          what smoke test, tests and sanitizer said
    <suite>.json        every time of a suite, all dtypes and directions
    times.png           all of them as bars
    tuned.json          what tuning found; without --output kernels/host/configs/<device>.json
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ..common import shapes as all_shapes
from ..common.command import Parser, UsageError
from ..common.results import OURS
from . import checks, device, goals, peers, plots, results
from .cells import Budget, Job, Settings, plan, run_cell, run_jobs, warm
from .checks import Outcome
from .results import Cell

STEPS = ("smoke", "tests", "bench", "sanitizer", "tune")
USUAL = ("smoke", "tests", "bench", "sanitizer")
# Seconds that a step may take: quick, and otherwise.
LIMITS = {"tests": (150, 3600), "sanitizer": (120, 1200), "tune": (240, 3600)}
QUICK_MINUTES = 3.5
DTYPES = ("bfloat16", "float16", "float32")


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    result = Parser(prog="make gpu", description=__doc__.partition("\n")[0])
    add = result.add_argument
    add("--steps", default=",".join(USUAL), help=f"of {', '.join(STEPS)}; default all but tune")
    add("--quick", action="store_true", help="bfloat16, few rounds, a few tests: 10 minutes")
    add("--full", action="store_true", help="compile peers for every shape, not only for some")
    add("--minutes", type=float, help="start no new shape after so many minutes of bench")
    add("--suite", choices=tuple(peers.PEERS), help="time this suite only")
    add("--shape", help="time this shape only (names: benchmarks/shapes.json)")
    add("--dtypes", help=f"of {', '.join(DTYPES)}; default all")
    add("--direction", choices=("forward", "backward"), help="default both")
    add("--cold", action="store_true", help="also with an L2 cache that holds other things")
    add("--rounds", type=int, help="times that everything is timed, default 20")
    add("--output", type=Path, metavar="DIR", help="default benchmarks/results/<device>")
    add("--dry-run", action="store_true", help="say what would run; needs no GPU")
    return result


def _list(text: str, known: tuple[str, ...], option: str) -> list[str]:
    chosen = [word for word in text.split(",") if word]
    unknown = [word for word in chosen if word not in known]
    if unknown or not chosen:
        raise UsageError(f"{option}: unknown {', '.join(unknown) or 'nothing'}; of {known}")
    return [name for name in known if name in chosen]


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, checked.

    Raises:
        UsageError: an option or a value that does not exist.
    """
    options = parser().parse_args(argv)
    options.steps = _list(options.steps, STEPS, "--steps")
    usual = DTYPES[:1] if options.quick else DTYPES
    options.dtypes = _list(options.dtypes, DTYPES, "--dtypes") if options.dtypes else list(usual)
    if options.quick and options.full:
        raise UsageError("--quick and --full exclude each other")
    if options.minutes is None and options.quick:
        options.minutes = QUICK_MINUTES
    if options.minutes is not None and options.minutes < 0:
        raise UsageError(f"--minutes must not be negative, got {options.minutes}")
    if options.rounds is not None and options.rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {options.rounds}")
    options.suites = [options.suite] if options.suite else list(peers.PEERS)
    options.directions = {None: [False, True], "forward": [False], "backward": [True]}[
        options.direction
    ]
    try:
        options.jobs = plan(options.suites, options.dtypes, options.directions, options.shape)
    except all_shapes.UnknownShapeError as error:
        raise UsageError(str(error)) from None
    if not options.jobs:
        raise UsageError(f"no suite of this run has a shape {options.shape}")
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    """How cells are measured."""
    compiled = "none" if options.quick else "all" if options.full else "some"
    rounds = options.rounds or (7 if options.quick else 20)
    return Settings(rounds, 2e-3 if options.quick else 5e-3, options.cold, compiled)


def dry_run(options: argparse.Namespace) -> str:
    """What would run, step by step."""
    settings = settings_of(options)
    lines = [f"steps: {', '.join(options.steps)}"]
    if "tests" in options.steps:
        command = checks.test_command(options.quick, Path("tests.xml"), checks.test_workers())
        lines.append(f"tests: python {' '.join(command[1:])}")
    if "sanitizer" in options.steps:
        found = checks.find_sanitizer() or "not installed, so left out"
        lines.append(f"sanitizer: {found}")
    if "bench" in options.steps:
        lines.append(
            f"bench: {len(options.jobs)} cells, {settings.rounds} rounds, "
            f"{'no limit' if options.minutes is None else f'{options.minutes:g} minutes'}"
        )
        for (suite, dtype, backward), jobs in groupby(options.jobs, lambda job: job.group):
            names = ", ".join(job.shape["name"] for job in jobs)
            direction = "forward+backward" if backward else "forward"
            lines.append(f"  {suite} {dtype} {direction}: {names}")
        for suite in options.suites:
            for name, peer in peers.PEERS[suite].items():
                reason = peers.left_out(peer, "", settings.compiled)
                lines.append(f"  peer of {suite}: {name}{f' ({reason})' if reason else ''}")
    return "\n".join(lines)


def bench(
    options: argparse.Namespace,
    folder: Path,
    about: dict[str, Any],
    run: Callable[[Job, Settings], Cell] = run_cell,
) -> Outcome:
    """Times the cells: after each one its suite's file, after each group its table."""
    settings = settings_of(options)
    budget = Budget(options.minutes)
    start = time.monotonic()
    peaks: dict[str, float] = about["peaks"]
    cells: list[Cell] = []
    known = {
        "quick": options.quick,
        "rounds": settings.rounds,
        "cold": settings.cold,
        "compiled peers": settings.compiled,
        "timing": "hot: the same inputs, in the L2 cache where they fit",
    }
    measured = run_jobs(options.jobs, settings, budget, run)
    for group, pairs in groupby(measured, key=lambda pair: pair[0].group):
        suite, dtype, backward = group
        found: list[Cell] = []
        for _, cell in pairs:
            found.append(cell)
            cells.append(cell)
            of_suite = [cell for cell in cells if cell.suite == suite]
            results.write(folder / f"{suite}.json", about, known, of_suite)
        direction = "forward and backward" if backward else "forward"
        print(f"\n{suite}, {dtype}, {direction}; times in us, graph/eager; lost cells first")
        print(results.table(found, peaks), flush=True)
    if cells:
        print(goals.report(cells))
    for name in budget.left_out:
        print(f"left out, no time: {name}")
    wrong = [f"{cell.name} {cell.dtype}" for cell in cells if OURS in cell.problems]
    judged = [
        goal
        for dtype in options.dtypes
        for goal in goals.judge([cell for cell in cells if cell.dtype == dtype])
        if goal.met is not None
    ]
    summary = (
        f"{len(cells)} cells, {len(wrong)} without a right result of ours, {len(budget.left_out)} "
        f"left out; {sum(goal.met is True for goal in judged)} of {len(judged)} goals met"
    )
    facts = {"wrong": wrong, "left out": budget.left_out, "goals": [str(goal) for goal in judged]}
    status = "failed" if wrong or not cells else "passed"
    return Outcome("bench", status, summary, time.monotonic() - start, facts)


def run_bench(options: argparse.Namespace, folder: Path) -> list[Outcome]:
    """Peaks, cells, tables, files, plots."""
    about = device.describe()
    about["peaks"] = device.peaks(options.dtypes)
    for name, rate in about["peaks"].items():
        unit = "TB/s" if name == "copy" else "TFLOP/s"
        print(f"peak, {name}: {rate / 1e12:.1f} {unit}", flush=True)
    start = time.monotonic()
    warm(options.jobs)
    print(f"compiled what {len(options.jobs)} cells launch: {time.monotonic() - start:.0f} s")
    outcome = bench(options, folder, about)
    why = plots.missing()
    if why is not None:
        return [outcome, Outcome("plots", "left out", why)]
    try:
        files = [folder / f"{suite}.json" for suite in options.suites]
        picture = plots.draw([file for file in files if file.exists()], folder / "times.png")
    except Exception as error:
        return [outcome, Outcome("plots", "failed", f"{type(error).__name__}: {error}")]
    drawn = "nothing to draw" if picture is None else f"all times in {picture}"
    return [outcome, Outcome("plots", "passed", drawn)]


def run_tune(options: argparse.Namespace, folder: Path, seconds: float) -> Outcome:
    """`make tune` in a process of its own: the tiles are read when the kernels are imported."""
    command = [sys.executable, "-m", "fastfusion.benchmarks.gpu.tune"]
    command += ["--quick"] * options.quick
    # It starts nothing in the last tenth of its time, which the key in hand may take.
    command += ["--minutes", f"{0.9 * seconds / 60:.2f}"]
    if options.output is not None:  # otherwise where the launcher looks for it
        command += ["--output", str(folder / "tuned.json")]
    finished = checks.run(command, folder / checks.LOG, seconds, {"OMP_NUM_THREADS": "1"})
    print(finished.tail, end="")
    summary = "out of time" if finished.code is None else f"exit code {finished.code}"
    status = "passed" if finished.code == 0 else "failed"
    return Outcome("tune", status, summary, finished.seconds)


def run_step(step: str, options: argparse.Namespace, folder: Path) -> list[Outcome]:
    """One step; what it raises is its result."""
    quick, usual = LIMITS.get(step, (0, 0))
    seconds = float(quick if options.quick else usual)
    start = time.monotonic()
    try:
        if step == "smoke":
            return [checks.run_smoke(folder)]
        if step == "tests":
            return [checks.run_tests(folder, options.quick, seconds)]
        if step == "sanitizer":
            return checks.run_sanitizer(folder, seconds)
        if step == "tune":
            return [run_tune(options, folder, seconds)]
        return run_bench(options, folder)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return [Outcome(step, "failed", text, time.monotonic() - start)]


def run(options: argparse.Namespace) -> int:
    """Runs the steps; 1 where one failed."""
    name = torch.cuda.get_device_name()
    folder = (options.output or device.results_folder(name)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if set(options.steps) - {"bench"}:
        (folder / checks.LOG).unlink(missing_ok=True)
    print(f"{name}, torch {torch.__version__}; results: {folder}", flush=True)
    machine = device.describe()
    outcomes: list[Outcome] = []

    def keep() -> None:
        steps = [outcome.as_json() for outcome in outcomes]
        results.replace_text(
            folder / "summary.json", json.dumps({"machine": machine, "steps": steps}, indent=1)
        )

    keep()
    try:
        for step in options.steps:
            print(f"\n== {step}", flush=True)
            outcomes += run_step(step, options, folder)
            keep()
    except (KeyboardInterrupt, SystemExit):
        outcomes.append(Outcome(step, "failed", "cut off; what was written before is complete"))
        keep()
        raise
    finally:
        print("\n== summary")
        print(*outcomes, sep="\n", flush=True)
    return int(any(outcome.status == "failed" for outcome in outcomes))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        print(dry_run(options))
        return 0
    if not torch.cuda.is_available():
        print(f"make gpu {device.NO_GPU}", file=sys.stderr)
        return 2
    # So that what a step started goes with it, where a time limit ends `make`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(options)
    except KeyboardInterrupt:
        return 130
