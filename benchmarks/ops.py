"""The suites "attention" and "bidirectional": our ops against what a user would call instead."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import fastfusion as ff

from . import compiled, gate, libraries, peers, runtimes
from .results import OURS, REFERENCE, Row
from .settings import Settings
from .timing import measure

Call = Callable[[], Any]


@dataclass(frozen=True)
class Suite:
    """An op, how many results it has, and its peers.

    Attributes:
        op: its name in fastfusion and in ff.ops.ALL, and so where inputs and cost come from.
        group: its list in shapes.json.
        results: how many tensors the public function returns.
        plain: the peer whose error sets what is allowed.
        others: everything else that is timed beside it.
    """

    op: str
    group: str
    results: int
    plain: str
    others: dict[str, peers.Adapter]


ATTENTION: dict[str, peers.Adapter] = {
    "sdpa": peers.sdpa,
    "unfused": peers.unfused,
    "sdpa math": peers.sdpa_math,
    **compiled.ALL,
    **runtimes.ALL,
    **libraries.ALL,
}
SUITES = {
    "attention": Suite(
        op="scaled_dot_product_attention",
        group="attention",
        results=1,
        plain="unfused",
        others=ATTENTION,
    ),
    "lengths": Suite(
        op="scaled_dot_product_attention",
        group="lengths",
        results=1,
        plain="unfused",
        others=ATTENTION,
    ),
    "bidirectional": Suite(
        op="bidirectional_attention",
        group="bidirectional",
        results=2,
        plain="unfused",
        others={"two sdpa": peers.two_sdpa, "unfused": peers.two_unfused},
    ),
}


def spec(name: str) -> Any:
    """The specification of an op, from ff.ops.ALL."""
    return next(op for op in ff.ops.ALL if op.name == name)


def flops(suite: str, shape: dict[str, Any], dtype: torch.dtype) -> int:
    """Floating-point operations of one forward call."""
    return spec(SUITES[suite].op).cost(shape, dtype)[0]


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """The results of a call, also where there is only one."""
    return results if isinstance(results, tuple) else (results,)


def floating(call: dict[str, Any]) -> list[Tensor]:
    """The tensors of a call that have a gradient, in the order of its arguments."""
    return [t for t in call.values() if isinstance(t, Tensor) and t.is_floating_point()]


def with_gradients(call: Call, leaves: Sequence[Tensor], seeds: Sequence[Tensor]) -> Call:
    """``call`` followed by its backward pass: returns the gradients of ``leaves``."""

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(as_tuple(call()), leaves, seeds)

    return run


def double_call(call: dict[str, Any]) -> dict[str, Any]:
    """The same call in float64, on its own leaves."""
    return {
        name: value.detach().double() if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in call.items()
    }  # fmt: skip


def expected_results(op: Any, call: dict[str, Any], count: int, backward: bool) -> tuple[Any, Any]:
    """The float64 results, or gradients, of a call; and the incoming gradients, in its dtype."""
    exact = double_call(call)
    leaves = floating(exact)
    if not backward:
        with torch.no_grad():
            return as_tuple(op.reference(**exact))[:count], ()
    for leaf in leaves:
        leaf.requires_grad_()
    results = as_tuple(op.reference(**exact))[:count]
    generator = torch.Generator().manual_seed(1)
    dtype = floating(call)[0].dtype
    seeds = [
        torch.randn(t.shape, generator=generator, device="cpu").to(t.device, dtype) for t in results
    ]
    return torch.autograd.grad(results, leaves, [s.double() for s in seeds]), seeds


def left_out(name: str, shape: dict[str, Any], settings: Settings) -> str | None:
    """Why a peer is not tried on a shape, None where it is."""
    if settings.backward and name in runtimes.ALL:
        return "has no gradients"
    if name in compiled.ALL and settings.peers is None and shape["name"] not in compiled.SOME:
        return "takes seconds per shape; --peers by name takes all shapes"
    return None


def run_shape(suite: str, shape: dict[str, Any], settings: Settings) -> Row:
    """Checks one shape and times it."""
    about, backward = SUITES[suite], settings.backward
    op, public = spec(about.op), getattr(ff, about.op)
    call = op.inputs(shape, settings.dtype, "cpu", 0)
    row = Row(suite, shape, settings.dtype_name, backward, cold=settings.cold)
    if not backward:
        row.flops, row.moved = op.cost(shape, settings.dtype)

    expected, seeds = expected_results(op, call, about.results, backward)
    leaves = floating(call)
    for leaf in leaves:
        leaf.requires_grad_(backward)
    calls: dict[str, Call] = {OURS: partial(public, **call)}
    for name, adapter in about.others.items():
        if not settings.wants(name) and name != about.plain:
            continue
        reason = left_out(name, shape, settings)
        try:
            if reason is not None:
                raise peers.Skipped(reason)
            calls[name] = adapter(call)
        except peers.Skipped as why:
            row.skipped[name] = str(why)
        except Exception as error:
            row.problems[name] = crash(error)
    explanation = ff.explain(public, **call)
    row.path, row.how = explanation.chosen, explanation.path
    if row.path != REFERENCE and settings.wants(REFERENCE):
        calls[REFERENCE] = partial(public, **call, backend=REFERENCE)
    if backward:
        calls = {name: with_gradients(run, leaves, seeds) for name, run in calls.items()}

    with torch.inference_mode(not backward):
        plain = as_tuple(calls[about.plain]())
        problems, right = judge(calls, expected, plain, backward)
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
    calls: dict[str, Call], expected: Sequence[Tensor], plain: Sequence[Tensor], gradients: bool
) -> tuple[dict[str, str], dict[str, Call]]:
    """Splits calls into the problems of some and the others, which may be timed."""
    problems, right = {}, {}
    for name, run in calls.items():
        try:
            wrong = gate.verdict(as_tuple(run()), expected, plain, gradients)
        except Exception as error:
            problems[name] = crash(error)
            continue
        if wrong:
            problems[name] = f"WRONG, so not timed: {wrong}"
        else:
            right[name] = run
    return problems, right
