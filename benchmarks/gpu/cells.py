"""The cells of a run on a CUDA device: what is measured, in which order, and each one's times."""

import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import active_children, get_context
from typing import Any

import torch
from torch import Tensor

import fastfusion as ff

from ..common import gate, ops, shapes
from ..common.peers import Skipped
from ..common.results import OURS, REFERENCE
from . import block, peers
from .device import DTYPES
from .peers import PEERS
from .results import OWN_PREFIX, Cell
from .timing import MODES, Clock, Timed, measure

WARM_SECONDS = 120.0
# How torch begins to say that the one backend it may use does not take the call.
NO_KERNEL = ("No available kernel", "No viable backend")


@dataclass(frozen=True)
class Settings:
    """How a cell is measured.

    Attributes:
        rounds: times that everything is timed.
        min_time: seconds that one timing takes.
        cold: also with an L2 cache that holds other things.
        compiled: where peers that compile per shape are timed: "none", "some", "all".
    """

    rounds: int = 20
    min_time: float = 5e-3
    cold: bool = False
    compiled: str = "some"


@dataclass(frozen=True)
class Job:
    """A cell that is to be measured."""

    suite: str
    shape: dict[str, Any]
    dtype: str
    backward: bool

    def __str__(self) -> str:
        direction = "forward+backward" if self.backward else "forward"
        return f"{self.suite} {self.dtype} {direction} {self.shape['name']}"

    @property
    def group(self) -> tuple[str, str, bool]:
        """What shares a table and a file."""
        return self.suite, self.dtype, self.backward


class Budget:
    """The time that a run may take; nothing new is started when it is used up."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.end = None if minutes is None else clock() + 60 * minutes
        self.left_out: list[str] = []

    def left(self) -> float | None:
        """Seconds that are left; None without a limit."""
        return None if self.end is None else max(0.0, self.end - self.clock())

    def spent(self) -> bool:
        """Whether it is used up."""
        return self.left() == 0.0

    def allows(self, name: str) -> bool:
        """Whether there is time to start this; otherwise it is noted as left out."""
        spent = self.spent()
        if spent:
            self.left_out.append(name)
        return not spent


def plan(
    suites: Sequence[str], dtypes: Sequence[str], directions: Sequence[bool], shape: str | None
) -> list[Job]:
    """The cells in the order of their importance, should time run out; blocks are for inference."""
    return [
        Job(suite, entry, dtype, backward)
        for dtype in dtypes
        for backward in directions
        for suite in suites
        if suite != block.SUITE or not backward
        for entry in shapes.select(suite, shape)
    ]


def ours(public: Callable[..., Any], call: dict[str, Any], cell: Cell) -> dict[str, Timed]:
    """Our op as a user calls it, and on each other backend that does not refuse."""
    explanation = ff.explain(public, **call)
    cell.path = explanation.chosen
    found = {OURS: Timed(partial(public, **call))}
    for backend, reasons in explanation.rows:
        if not reasons and backend != explanation.chosen:
            name = REFERENCE if backend == REFERENCE else OWN_PREFIX + backend
            found[name] = Timed(partial(public, **call, backend=backend))
    return found


def others(call: dict[str, Any], cell: Cell, compiled: str) -> dict[str, Timed]:
    """The peers that take this call; why others do not is noted in the cell."""
    found = {}
    for name, peer in PEERS[cell.suite].items():
        reason = peers.left_out(peer, cell.name, compiled)
        if reason is None:
            try:
                found[name] = Timed(peer.adapt(call), peer.context)
                continue
            except Skipped as refusal:
                reason = str(refusal)
            except Exception as error:
                reason = f"{type(error).__name__}: {_first_line(error)}"
        cell.refused[name] = reason
    return found


def call_once(job: Job, device: str) -> None:
    """A cell's call on Triton, with its backward."""
    with torch.set_grad_enabled(job.backward):
        if job.suite == block.SUITE:
            given = block.inputs(job.shape, DTYPES[job.dtype], device, 0)
            with ff.use_backend("triton"):
                block.run(given)
            return
        about = ops.SUITES[job.suite]
        call = ops.spec(about.op).inputs(job.shape, DTYPES[job.dtype], device, 0)
        leaves = ops.floating(call)
        for leaf in leaves:
            leaf.requires_grad_(job.backward)
        outputs = ops.as_tuple(getattr(ff, about.op)(**call, backend="triton"))
        if job.backward:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])


def _launch(job: Job) -> None:
    """Runs a cell's call, so that its kernels lie compiled in Triton's cache."""
    with suppress(Exception):
        call_once(job, "cuda")
        torch.cuda.synchronize()


def warm(jobs: Sequence[Job]) -> None:
    """Compiles what the cells launch on all cores but one: alone it is most of a short run's time
    (56 cells: 17 s on 16 cores). What goes wrong the cells say themselves."""
    workers = max(1, min(16, (os.cpu_count() or 1) - 1))
    try:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            try:
                list(pool.map(_launch, jobs, timeout=WARM_SECONDS))
            except BaseException:
                # Out of time or cut off: to leave the pool is to wait for what its workers do.
                for worker in active_children():
                    worker.kill()
                raise
    except (BrokenProcessPool, TimeoutError):
        pass


def run_cell(
    job: Job, settings: Settings, device: str = "cuda", clock: Clock | None = None
) -> Cell:
    """Checks one shape and times it."""
    cell = Cell(job.suite, job.shape, job.dtype, job.backward)
    prepare = _prepare_block if job.suite == block.SUITE else _prepare_op
    calls, expected, plain = prepare(cell, settings, device)
    with torch.inference_mode(not job.backward):
        right = judge(calls, expected, ops.as_tuple(calls[plain].call()), cell)
        if OURS in right:
            modes = MODES if settings.cold else MODES[:2]
            cell.add(measure(right, settings.rounds, settings.min_time, modes, clock))
    return cell


# The calls of a cell, their results in float64, and whose error sets what is allowed.
Prepared = tuple[dict[str, Timed], Sequence[Tensor], str]


def _prepare_op(cell: Cell, settings: Settings, device: str) -> Prepared:
    """A call of an op, forward or with its backward."""
    about = ops.SUITES[cell.suite]
    op, public = ops.spec(about.op), getattr(ff, about.op)
    dtype = DTYPES[cell.dtype]
    call = op.inputs(cell.shape, dtype, device, 0)
    if not cell.backward:
        cell.flops, cell.moved = op.cost(cell.shape, dtype)
    expected, seeds = ops.expected_results(op, call, about.results, cell.backward)
    leaves = ops.floating(call)
    for leaf in leaves:
        leaf.requires_grad_(cell.backward)
    calls = ours(public, call, cell) | others(call, cell, settings.compiled)
    if cell.backward:
        calls = {
            name: replace(timed, call=ops.with_gradients(timed.call, leaves, seeds))
            for name, timed in calls.items()
        }
    return calls, expected, about.plain


def _prepare_block(cell: Cell, settings: Settings, device: str) -> Prepared:
    """A block of modules, forward."""
    dtype = DTYPES[cell.dtype]
    call = block.inputs(cell.shape, dtype, device, 0)
    cell.flops, cell.moved = block.cost(cell.shape, dtype)
    calls = block.ours(call, cell) | others(call, cell, settings.compiled)
    return calls, block.expected(call), block.PLAIN


def judge(
    calls: dict[str, Timed], expected: Sequence[Tensor], plain: Sequence[Tensor], cell: Cell
) -> dict[str, Timed]:
    """The calls that may be timed; what is wrong with the others is noted in the cell."""
    right = {}
    for name, timed in calls.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with timed.context():
                    results = ops.as_tuple(timed.call())
                wrong = gate.verdict(results, expected, plain, cell.backward)
            except Exception as error:
                warned = [str(warning.message) for warning in caught]
                _note(cell, name, error, warned)
                continue
        if wrong:
            cell.problems[name] = f"WRONG, so not timed: {wrong}"
        else:
            right[name] = timed
    return right


def _note(cell: Cell, name: str, error: Exception, warned: list[str]) -> None:
    """Sorts a failure: a peer's refusal, or a problem."""
    peer = PEERS[cell.suite].get(name)
    if peer is not None and peer.sdpa is not None and str(error).startswith(NO_KERNEL):
        cell.refused[name] = peers.sdpa_refusal(warned, peer.sdpa)
    elif isinstance(error, Skipped | NotImplementedError):
        cell.refused[name] = _first_line(error)
    else:
        cell.problems[name] = f"ERROR: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def device_works() -> bool:
    """Whether the device still answers: after an illegal access it never does in this process."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError:
        return False
    return True


def clean_up() -> None:
    """Frees a cell's graphs and memory, and what was compiled for its shape."""
    gc.collect()
    if "torch._dynamo" in sys.modules:  # which only a compiled peer imports, for seconds
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_jobs(
    jobs: Sequence[Job], settings: Settings, budget: Budget, run: Callable[[Job, Settings], Cell]
) -> Iterator[tuple[Job, Cell]]:
    """Measures cells one by one and says how far it is; a cell that crashes is a cell too."""
    for index, job in enumerate(jobs):
        if not budget.allows(str(job)):
            continue
        start = time.monotonic()
        try:
            cell = run(job, settings)
        except Exception as error:
            cell = Cell(job.suite, job.shape, job.dtype, job.backward)
            cell.problems[OURS] = f"ERROR: {type(error).__name__}: {_first_line(error)}"
        took = time.monotonic() - start
        print(f"[{index + 1}/{len(jobs)}] {job}: {outcome(cell)} ({took:.1f} s)", flush=True)
        yield job, cell
        if any("ERROR" in problem for problem in cell.problems.values()) and not device_works():
            budget.left_out += map(str, jobs[index + 1 :])
            print(f"the device answers no more after {job}; the rest is left out", flush=True)
            return
        clean_up()


def outcome(cell: Cell) -> str:
    """One cell in a few words."""
    if OURS in cell.problems:
        return cell.problems[OURS]
    graph, eager, best = cell.seconds(), cell.seconds("eager"), cell.best()
    words = [
        f"{1e6 * seconds:.1f} us {mode}"
        for seconds, mode in ((graph, "graph"), (eager, "eager"))
        if seconds is not None
    ]
    if best is not None:
        words.append(f"{best[0]} {best[1].median:.2f}x")
    return ", ".join(words)
