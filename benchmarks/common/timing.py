"""Times of calls against each other, in one process and in turns.

A machine's speed drifts (clocks, neighbours, caches), so times taken one after the other are not
comparable. Here every round times each call once, in rotating order, and what is compared are the
times of the same round.
"""

import gc
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


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


def in_turns(samples: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """What each of some calls gives in each round, in rotating order; no garbage is collected."""
    found: dict[Key, list[float]] = {key: [] for key in samples}
    keys = list(samples)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(rounds):
            first = index % len(keys) if keys else 0
            for key in keys[first:] + keys[:first]:
                found[key].append(samples[key]())
    finally:
        if collecting:
            gc.enable()
    return found


def loops_for(seconds: Callable[[int], float], min_time: float, most: float = math.inf) -> int:
    """How many calls in a row take `min_time`, or `most`; `seconds` times so many of them."""
    loops = 1
    while (elapsed := seconds(loops)) < min_time and loops < most:
        loops = max(2 * loops, min(10 * loops, math.ceil(loops * min_time / max(elapsed, 1e-9))))
    return loops


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of ratios: that of x and 1/x is 1."""
    return statistics.geometric_mean(values)
