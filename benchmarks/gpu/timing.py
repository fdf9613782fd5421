"""Timing on a CUDA device: kernels under a CUDA graph, and eager calls, in turns.

A call has two prices there. Under a graph the launches cost next to nothing and what remains is the
kernels' time; in eager mode a small op takes as long as Python and the driver need to launch it.
Both are measured in every round, in rotating order, so that drifting clocks meet all alike.

Times are hot: the same inputs again and again, in the L2 cache where they fit. "cold" times are
taken of single replays, the L2 cache overwritten before each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import torch

from fastfusion import _cuda_graph

from ..common.timing import Call, Measurement, in_turns, loops_for

MODES = ("graph", "eager", "cold")
# One launch of a graph costs a few microseconds; a graph of this length hides them.
GRAPH_SECONDS = 1e-4
MOST_COPIES = 32
COLD_LOOPS = 10
MOST_LOOPS = 1_000_000


@dataclass(frozen=True)
class Timed:
    """A call, and the context in which it makes its choices, which is entered outside the clock."""

    call: Call
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Times:
    """What `measure` found.

    Attributes:
        modes: the measurement of each mode ("graph", "eager", "cold").
        no_graph: why a call could not be captured, by name.
    """

    modes: dict[str, Measurement]
    no_graph: dict[str, str]


class Clock:
    """Seconds between two events on the device, and graphs; tests put another one in its place."""

    def __init__(self) -> None:
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush: torch.Tensor | None = None

    def seconds(self, run: Call, loops: int) -> float:
        """Seconds of `loops` calls in a row."""
        torch.cuda.synchronize()
        self.start.record()
        for _ in repeat(None, loops):
            run()
        self.end.record()
        self.end.synchronize()
        return 1e-3 * self.start.elapsed_time(self.end)

    def cold_seconds(self, run: Call, loops: int) -> float:
        """Seconds of `loops` calls, each after the L2 cache was overwritten."""
        if self.flush is None:
            cache = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0)
            self.flush = torch.empty(max(4 * cache, 1 << 28), dtype=torch.int8, device="cuda")
        pairs = []
        for _ in repeat(None, loops):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return 1e-3 * sum(start.elapsed_time(end) for start, end in pairs)

    def capture(self, call: Call, copies: int) -> Call:
        """A graph of `copies` calls in a row, as the call that replays it."""

        def run() -> None:
            for _ in repeat(None, copies):
                call()

        recording = _cuda_graph.Recording(torch.device("cuda", torch.cuda.current_device()))
        recording.warm_up(call)
        recording.capture(run)
        return recording.graph.replay


def autorange(clock: Clock, run: Call, min_time: float) -> int:
    """How many calls in a row take `min_time` seconds; warms the call up on the way."""
    run()
    return loops_for(partial(clock.seconds, run), min_time, MOST_LOOPS)


def graphed(clock: Clock, call: Call) -> tuple[Call, int]:
    """A graph of so many copies of a call that its own launch is hidden, and their number."""
    replay = clock.capture(call, 1)
    replay()
    single = min(clock.seconds(replay, 3) / 3 for _ in range(2))
    copies = max(1, min(MOST_COPIES, math.ceil(GRAPH_SECONDS / max(single, 1e-9))))
    return (replay, 1) if copies == 1 else (clock.capture(call, copies), copies)


@dataclass(frozen=True)
class _Job:
    """One thing to time: what runs, how often, how many calls that makes, and by which clock."""

    timed: Timed
    seconds: Callable[[int], float]
    loops: int
    copies: int

    def sample(self) -> float:
        with self.timed.context():
            return self.seconds(self.loops) / (self.loops * self.copies)


def _jobs(
    clock: Clock,
    name: str,
    timed: Timed,
    min_time: float,
    modes: Sequence[str],
    no_graph: dict[str, str],
) -> dict[tuple[str, str], _Job]:
    """The jobs of one call, by mode and name."""
    jobs = {}
    with timed.context():
        if "eager" in modes:
            loops = autorange(clock, timed.call, min_time)
            jobs["eager", name] = _Job(timed, partial(clock.seconds, timed.call), loops, 1)
        try:
            replay, copies = graphed(clock, timed.call)
        except Exception as error:
            no_graph[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return jobs
    hot = partial(clock.seconds, replay)
    jobs["graph", name] = _Job(Timed(replay), hot, autorange(clock, replay, min_time), copies)
    if "cold" in modes:
        once = replay if copies == 1 else clock.capture(timed.call, 1)
        flushed = partial(clock.cold_seconds, once)
        jobs["cold", name] = _Job(Timed(once), flushed, COLD_LOOPS, 1)
    return jobs


def measure(
    calls: Mapping[str, Timed],
    rounds: int,
    min_time: float,
    modes: Sequence[str] = ("graph", "eager"),
    clock: Clock | None = None,
) -> Times:
    """Times calls against each other.

    Args:
        calls: what to time, by name; each has run before, so that nothing is left to compile.
        rounds: how many times each of them is timed, at least 1.
        min_time: seconds that one timing should take; faster calls run in a loop.
        modes: "graph", and also "eager" and "cold" (single replays with an L2 cache that holds
            other things).
        clock: another clock, for tests.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    clock = Clock() if clock is None else clock
    no_graph: dict[str, str] = {}
    jobs: dict[tuple[str, str], _Job] = {}
    for name, timed in calls.items():
        jobs |= _jobs(clock, name, timed, min_time, modes, no_graph)
    samples = in_turns({key: job.sample for key, job in jobs.items()}, rounds)
    found = {}
    for mode in MODES:
        names = [name for kind, name in jobs if kind == mode]
        if names:
            found[mode] = Measurement(
                {name: samples[mode, name] for name in names},
                {name: jobs[mode, name].loops * jobs[mode, name].copies for name in names},
            )
    return Times(found, no_graph)
