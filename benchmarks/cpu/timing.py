"""Timing of calls on the CPU against each other."""

from collections.abc import Mapping
from functools import partial
from itertools import repeat
from time import perf_counter

from ..common.timing import Call, Measurement, in_turns, loops_for


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

    def sample(name: str) -> float:
        if before is not None:
            before()
        return time_loop(calls[name], loops[name]) / loops[name]

    return Measurement(in_turns({name: partial(sample, name) for name in calls}, rounds), loops)


def time_loop(call: Call, loops: int) -> float:
    """Seconds of ``loops`` calls in a row."""
    start = perf_counter()
    for _ in repeat(None, loops):
        call()
    return perf_counter() - start


def autorange(call: Call, min_time: float) -> int:
    """How many calls in a row take ``min_time`` seconds; warms the call up on the way."""
    call()
    return loops_for(partial(time_loop, call), min_time)
