"""Timing of calls against each other, in one process and in turns.

A machine's speed drifts (clocks, neighbours, caches), so times taken one after the other are not
comparable. Here every round times each call once, in rotating order, and what is compared are the
times of the same round.
"""

import gc
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import repeat
from time import perf_counter

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles: seconds per call, or a ratio of such times."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, samples: list[float]) -> "Spread":
        """The spread of at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Measurement:
    """What `measure` found.

    Attributes:
        samples: for each call, its seconds per call in each round.
        loops: for each call, how often it ran within one round.
    """

    samples: dict[str, list[float]]
    loops: dict[str, int]

    def time(self, name: str) -> Spread:
        """Seconds per call."""
        return Spread.of(self.samples[name])

    def ratio(self, name: str, base: str) -> Spread:
        """Time of ``name`` divided by the time of ``base``, taken within each round."""
        pairs = zip(self.samples[name], self.samples[base], strict=True)
        return Spread.of([a / b for a, b in pairs])


def measure(
    calls: Mapping[str, Call], rounds: int, min_time: float, before: Call | None = None
) -> Measurement:
    """Times ``calls`` against each other.

    Args:
        calls: what to time, by name. Every call is warmed up before the first round.
        rounds: how many times each of them is timed, at least 1.
        min_time: seconds that one timing should take; faster calls run in a loop.
        before: runs before each timing, which is of a single call then.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    # Warms up, too.
    loops = {name: autorange(call, min_time) for name, call in calls.items()}
    if before is not None:
        loops = dict.fromkeys(loops, 1)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                if before is not None:
                    before()
                samples[name].append(time_loop(calls[name], loops[name]) / loops[name])
    finally:
        if collecting:
            gc.enable()
    return Measurement(samples, loops)


def time_loop(call: Call, loops: int) -> float:
    """Seconds of ``loops`` calls in a row."""
    start = perf_counter()
    for _ in repeat(None, loops):
        call()
    return perf_counter() - start


def autorange(call: Call, min_time: float) -> int:
    """How many calls in a row take ``min_time`` seconds; warms the call up on the way."""
    call()
    loops = 1
    while (elapsed := time_loop(call, loops)) < min_time:
        loops = max(2 * loops, min(10 * loops, math.ceil(loops * min_time / max(elapsed, 1e-9))))
    return loops


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of ratios: that of x and 1/x is 1."""
    return statistics.geometric_mean(values)
