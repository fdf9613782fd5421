"""A run of ``python -m fastfusion bench`` on a CPU: its suites, its processes, its output."""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..common import gate, machine
from ..common.command import UsageError
from ..common.ops import flops
from ..common.results import OURS, Goal
from . import (
    cells,
    compare,
    goals,
    layer_goals,
    layers,
    models,
    overhead,
    own,
    plots,
    report,
    results,
    roofline,
)
from .command import choose, only_suite
from .results import Row, table

Measure = Callable[[], Row]
Document = dict[str, Any]


def plan(suite: str, options: argparse.Namespace) -> Iterator[tuple[str, Measure]]:
    """The shapes of a suite, each with the function that measures it."""
    if options.own is not None:
        yield options.own["name"], partial(cells.run_shape, suite, options.own, options.settings)
        return
    for group, shape in choose(suite, options.shape):
        if suite == "layers":
            yield shape["name"], partial(layers.run_shape, group, shape, options.settings)
        elif suite == "models":
            yield shape["name"], partial(models.run_shape, shape, options.settings)
        elif flops(suite, shape, options.settings.dtype) > options.most:
            print(f"{shape['name']}: left out by --quick", file=sys.stderr)
        else:
            yield shape["name"], partial(cells.run_shape, suite, shape, options.settings)


class Run:
    """What one process measures, as it goes: an interrupt loses only the cell at hand."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[Row] = []
        self.goals: dict[str, list[Goal]] = {}
        self.machine = machine.describe()
        self._ceilings: roofline.Machine | None = None

    @property
    def ceilings(self) -> roofline.Machine:
        """The machine's peaks, measured in this run."""
        if self._ceilings is None:
            self._ceilings = roofline.ceilings(torch.get_num_threads())
        return self._ceilings

    def all(self) -> None:
        """Every suite that was asked for."""
        options = self.options
        if options.model is not None:
            jobs = partial(own.run, options.model, options.against, options.inputs)
            self.cells("own", [(options.model, partial(jobs, options.settings))])
            return
        for suite in options.suites:
            if suite == "overhead":
                found = overhead.run(5 * options.rounds, min_time=5e-3)
                self.judge([("overhead", found)])
            elif suite == "goals":
                settings = options.settings
                self.judge(goals.run(settings.rounds, settings.min_time, options.most))
            elif suite == "layer-goals":
                settings = options.settings
                effort = goals.Effort(settings.rounds, settings.min_time, options.most)
                self.judge(layer_goals.run(effort, self.ceilings))
            else:
                self.cells(suite, list(plan(suite, options)))

    def cells(self, suite: str, jobs: list[tuple[str, Measure]]) -> None:
        """Measures a suite and prints its table, also where it is interrupted."""
        measured: list[Row] = []
        settings = self.options.settings
        try:
            for index, (name, job) in enumerate(jobs):
                if sys.stderr.isatty():
                    print(f"\r\033[K{suite} {index + 1}/{len(jobs)} {name}", end="",
                          file=sys.stderr)  # fmt: skip
                measured.append(self.shared(job()))
        finally:
            if sys.stderr.isatty():
                print("\r\033[K", end="", file=sys.stderr)
            self.rows += measured
            if measured:
                direction = "forward and backward" if settings.backward else "forward"
                direction += ", cold" if settings.cold else ""
                if settings.weights is not None:
                    direction += (
                        f", inputs float32, right from a cosine of {gate.LEAST_COSINE} of each "
                        "token with float64 on"
                    )
                print(
                    f"\n{suite}, {settings.dtype_name}, {direction}: our time (quartiles), and "
                    "how many times as long the others take"
                )
                print(table(measured), flush=True)

    def shared(self, row: Row) -> Row:
        """The row with its share of the peak."""
        if row.flops is not None and row.moved is not None and OURS in row.times:
            seconds = row.times[OURS].median
            row.share = self.ceilings.share(
                row.flops, row.moved, row.dtype, seconds, row.cold, row.float_flops
            )
        return row

    def judge(self, sections: Iterable[tuple[str, list[Goal]]]) -> None:
        """Prints sections of goals as they are measured."""
        for about, section in sections:
            self.goals[about] = section
            print(f"\n{about}: each number beside its goal")
            print(*section, sep="\n", flush=True)

    def summary(self) -> str | None:
        """Everything in one line."""
        options = self.options
        what = "your shape" if options.own is not None else "your module" if options.model else ""
        names = [row.shape["name"] for row in self.rows]
        return results.summary(
            self.rows, what or (f"{len(names)} shapes" if len(names) != 1 else names[0])
        )

    def document(self) -> Document:
        """Everything that was measured."""
        options = self.options
        names = ("suites", "shape", "dtype", "threads", "rounds", "backward", "cold", "peers",
                 "quick", "model", "against", "inputs")  # fmt: skip
        settings = {name: getattr(options, name) for name in names}
        ceilings = {} if self._ceilings is None else asdict(self._ceilings)
        return results.document(self.machine, settings, ceilings, self.rows, self.goals)


def run(options: argparse.Namespace) -> tuple[int, Document]:
    """Measures in this process; 1 where a result of ours was wrong or crashed, otherwise 0."""
    torch.set_num_threads(options.counts[0])
    machine.keep_memory()
    this = Run(options)
    about = this.machine
    print(
        f"{about['cpu']}, {about['threads']} thread(s) of {about['cores']} cores, "
        f"torch {about['torch']}, fastfusion {about['fastfusion']} {about['commit'] or ''}"
    )
    interrupted = False
    try:
        this.all()
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted; what is above is complete", file=sys.stderr)
    line = this.summary()
    if line is not None:
        print(f"\n{line}")
    wrong = any(OURS in row.problems for row in this.rows)
    return 130 if interrupted else int(wrong), this.document()


def run_pinned(argv: list[str], options: argparse.Namespace) -> tuple[int, Document]:
    """The same for each count of threads, in a new process whose threads keep to their cores."""
    codes, documents = [], []
    with tempfile.TemporaryDirectory() as folder:
        for count in options.counts:
            file = Path(folder, f"{count}.json")
            command = [
                *(sys.executable, "-m", "fastfusion.benchmarks", *only_suite(argv)),
                *("--threads", str(count), "--json", str(file)),
            ]
            process = subprocess.Popen(command, env=machine.pinned(count))
            try:
                codes.append(process.wait())
            except KeyboardInterrupt:  # the process has it, too, and keeps what it measured
                codes.append(process.wait())
                options.counts.clear()
            if file.is_file():
                documents.append(results.read(file))
    if not documents:
        raise UsageError("no run of any number of threads came to its end")
    return max(codes), results.merged(documents)


def output(options: argparse.Namespace, document: Document, argv: list[str]) -> None:
    """Writes what was asked for, and compares.

    Raises:
        UsageError: what to compare with makes no sense.
    """
    if options.json is not None:
        results.write(options.json, document)
    if options.plots is not None:
        try:
            for path in plots.draw_all(document, options.plots):
                print(path)
        except ImportError:
            print("--plots: matplotlib is not installed", file=sys.stderr)
    if options.html is not None:
        options.html.write_text(report.page(document))
        print(options.html)
    if options.compare is not None:
        threads = ("--threads", options.threads)
        try:
            before = compare.load(options.compare, [*only_suite(argv), *threads])
        except (ValueError, OSError) as error:
            raise UsageError(str(error)) from None
        print(f"\n{compare.report(before, document)}")
