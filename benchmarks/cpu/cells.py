"""The suites "attention" and "bidirectional": our ops against what a user would call instead."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import fastfusion as ff

from ..common import gate, ops, peers
from ..common.ops import Call, as_tuple, expected_results, floating, spec, with_gradients
from ..common.results import OURS, REFERENCE
from . import compiled, libraries, narrow, runtimes
from .results import Row
from .settings import Settings
from .timing import measure

ATTENTION: dict[str, peers.Adapter] = {
    **ops.ATTENTION,
    **compiled.ALL,
    **runtimes.ALL,
    **libraries.ALL,
}
SUITES = {
    **ops.SUITES,
    **{name: replace(ops.SUITES[name], others=ATTENTION) for name in ("attention", "lengths")},
    "kinds": replace(ops.SUITES["kinds"], others={**ops.SUITES["kinds"].others, **compiled.ALL}),
}
# Of ops that take narrow weights, the peers beside these.
NARROW = {
    "linear": {
        weights: {**ops.SUITES["linear"].others, **more} for weights, more in narrow.LINEAR.items()
    }
}


def left_out(suite: str, name: str, shape: dict[str, Any], settings: Settings) -> str | None:
    """Why a peer is not tried on a shape, None where it is."""
    if settings.backward and name in runtimes.ALL:
        return "has no gradients"
    if name in compiled.ALL and settings.peers is None and not compiled.takes(suite, shape["name"]):
        return "takes seconds per shape; --peers by name takes all shapes"
    return None


def run_shape(suite: str, shape: dict[str, Any], settings: Settings) -> Row:
    """Checks one shape and times it."""
    about, backward = SUITES[suite], settings.backward
    op, public = spec(about.op), getattr(ff, about.op)
    call = op.inputs(shape, settings.dtype, "cpu", 0)
    ours, cosines = call, None
    row = Row(suite, shape, settings.dtype_name, backward, cold=settings.cold)
    if settings.weights is not None:
        about = replace(about, others=NARROW[suite][settings.weights])
        shape = {**shape, "weights": narrow.NAMES[settings.weights]}
        ours, cosines = op.inputs(shape, settings.dtype, "cpu", 0), row.cosines
    if not backward:
        row.flops, row.moved = op.cost(shape, settings.dtype)

    expected, seeds = expected_results(op, call, about.results, backward)
    leaves = floating(call)
    for leaf in leaves:
        leaf.requires_grad_(backward)
    calls: dict[str, Call] = {OURS: partial(public, **ours)}
    for name, adapter in about.others.items():
        if not settings.wants(name) and name != about.plain:
            continue
        reason = left_out(suite, name, shape, settings)
        try:
            if reason is not None:
                raise peers.Skipped(reason)
            calls[name] = adapter(call)
        except peers.Skipped as why:
            row.skipped[name] = str(why)
        except Exception as error:
            row.problems[name] = crash(error)
    explanation = ff.explain(public, **ours)
    row.path, row.how = explanation.chosen, explanation.path
    if row.path != REFERENCE and settings.wants(REFERENCE):
        calls[REFERENCE] = partial(public, **ours, backend=REFERENCE)
    if backward:
        calls = {name: with_gradients(run, leaves, seeds) for name, run in calls.items()}

    with torch.inference_mode(not backward):
        plain = as_tuple(calls[about.plain]())
        problems, right = judge(calls, expected, plain, backward, cosines)
        row.problems |= problems
        if not settings.wants(about.plain):
            right.pop(about.plain, None)
        timed_row(row, right, settings)
    return row


@cache
def _evicted() -> Tensor:
    return torch.zeros(1 << 25)  # 128 MB, more than the caches of most machines hold


def evict() -> None:
    """Overwrites the caches."""
    _evicted().add_(1.0)


def timed_row(row: Row, calls: dict[str, Call], settings: Settings) -> None:
    """Times what is right, if our own result is."""
    row.threads = torch.get_num_threads()
    if OURS in calls:
        before = evict if settings.cold else None
        row.add(measure(calls, settings.rounds, settings.min_time, before))


def crash(error: Exception) -> str:
    """An error in one line."""
    line = (str(error).splitlines() or [""])[0]
    return f"ERROR: {type(error).__name__}: {line if len(line) < 120 else line[:117] + '...'}"


def judge(
    calls: dict[str, Call],
    expected: Sequence[Tensor],
    plain: Sequence[Tensor],
    gradients: bool,
    cosines: dict[str, float] | None = None,
) -> tuple[dict[str, str], dict[str, Call]]:
    """Splits calls into the problems of some and the others, which may be timed.

    Given `cosines`, to be filled, the rule of narrow weights holds.
    """
    problems, right = {}, {}
    for name, run in calls.items():
        try:
            found = as_tuple(run())
            if cosines is None:
                wrong = gate.verdict(found, expected, plain, gradients)
            else:
                wrong = gate.verdict_of_cosine(found, expected)
                if wrong is None:
                    cosines[name] = gate.least_cosine(found, expected)
        except Exception as error:
            problems[name] = crash(error)
            continue
        if wrong:
            problems[name] = f"WRONG, so not timed: {wrong}"
        else:
            right[name] = run
    return problems, right
