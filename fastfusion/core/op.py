"""An op, its implementations, and how one of them is chosen.

An op is a list of implementations, fastest first and the reference last. Each implementation
refuses an input with sentences; the first that does not refuse runs. The same list drives the
choice, `explain`, the tests and the benchmarks.

The choice looks at devices, dtypes, which arguments are given and whether a gradient is needed,
in traced programs never at a length, a batch size, a pointer or a value: they would be recompiled.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastfusion.core.arguments import autocast_dtype

BACKENDS = ("cuda", "triton", "cpu", "reference")

# A module global and not a ContextVar: torch.compile guards on it, so a compiled function
# recompiles when the choice changes. The environment is read once, at import.
_forced: str | None = None


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run the call; the message lists its reasons."""


def _validated(backend: str | None) -> str | None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    return backend


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Run every op in the block on one backend; an op that cannot run there raises.

    Args:
        backend: "cuda", "triton", "cpu", "reference", or None for the automatic choice.
            The setting is global to the process and is restored at the end of the block.
            The environment variable ``FASTFUSION_BACKEND`` sets the initial value.

    Raises:
        ValueError: ``backend`` is not one of these names.
    """
    global _forced
    before, _forced = _forced, _validated(backend)
    try:
        yield
    finally:
        _forced = before


def forced_backend() -> str | None:
    """The backend that `use_backend` or ``FASTFUSION_BACKEND`` asks for, None if automatic."""
    return _forced


@dataclass(frozen=True)
class Implementation:
    """One row of an op's list.

    Attributes:
        backend: the name by which `backend=` and `use_backend` ask for it.
        run: called with the op's normalised arguments.
        refuses: called with the same arguments; returns one sentence per reason, or nothing.
        differentiable: False where it refuses inputs that require a gradient.
        checks: False where `run` relies on arguments as `normalize` makes them; the others raise
            for what they cannot take, so that an eager call may try them first.
        on_request: called with the same arguments; True where it could run the call but is not
            to be chosen for it, as an interpreter.
        path: called with the same arguments if the call would run here; says in what way.
    """

    backend: str
    run: Callable[..., Any]
    refuses: Callable[..., Sequence[str]]
    differentiable: bool = True
    checks: bool = True
    on_request: Callable[..., bool] | None = None
    path: Callable[..., str] | None = None


def never_refuses(*arguments: Any) -> Sequence[str]:
    """What a reference says to any legal call."""
    return ()


@dataclass(frozen=True)
class Op:
    """The specification of an op: what defines, checks, feeds, prices and runs it.

    Attributes:
        name: the public name.
        check: raises ValueError or TypeError for arguments that are not legal.
        normalize: public arguments (positional and keyword), cast as autocast asks and checked, to
            those of `Implementation.run`.
        reference: the definition, in plain differentiable torch.
        inputs: (shape, dtype, device, seed) to keyword arguments of the public function.
        cost: (shape, dtype) to (floating-point operations, bytes that must move).
        implementations: fastest first, the reference last.
    """

    name: str
    check: Callable[..., None]
    normalize: Callable[..., tuple[Any, ...]]
    reference: Callable[..., Any]
    inputs: Callable[[Mapping[str, Any], torch.dtype, Any, int], dict[str, Any]]
    cost: Callable[[Mapping[str, Any], torch.dtype], tuple[int, int]]
    implementations: tuple[Implementation, ...]

    def select(self, backend: str | None, arguments: tuple[Any, ...]) -> Implementation:
        """The first implementation that accepts `arguments`, or the one that was asked for."""
        wanted = _forced if backend is None else _validated(backend)
        if wanted is None:
            for implementation in self.implementations:
                if not implementation.refuses(*arguments) and not (
                    implementation.on_request and implementation.on_request(*arguments)
                ):
                    return implementation
        for implementation in self.implementations:
            if implementation.backend == wanted:
                reasons = implementation.refuses(*arguments)
                if not reasons:
                    return implementation
                raise BackendUnavailableError(
                    "\n  - ".join((f"backend {wanted!r} cannot run {self.name}:", *reasons))
                )
        available = ", ".join(i.backend for i in self.implementations)
        raise BackendUnavailableError(
            f"backend {wanted!r} cannot run {self.name}:"
            f"\n  - it has no implementation there; implementations: {available}"
        )

    def run(self, backend: str | None, arguments: tuple[Any, ...]) -> Any:
        """Select and run, without autocast: it would round the float32 products of the
        reference."""
        implementation = self.select(backend, arguments)
        device_type = arguments[0].device.type
        if autocast_dtype(device_type) is None:
            return implementation.run(*arguments)
        with torch.autocast(device_type, enabled=False):
            return implementation.run(*arguments)


@dataclass(frozen=True)
class Explanation:
    """Which implementation a call would take, and why each other one would not."""

    op: str
    call: str
    chosen: str | None
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    path: str | None = None

    def __str__(self) -> str:
        width = max(len(backend) for backend, _ in self.rows)
        lines = [f"{self.op}({self.call})"]
        for backend, reasons in self.rows:
            if backend == self.chosen:
                path = f": {self.path}" if self.path else ""
                lines.append(f"  {backend:<{width}}  chosen{path}")
            elif reasons:
                lines.append(f"  {backend:<{width}}  no: {reasons[0]}")
                lines.extend(f"  {'':<{width}}      {reason}" for reason in reasons[1:])
            else:
                lines.append(f"  {backend:<{width}}  could run, not chosen")
        return "\n".join(lines)

    __repr__ = __str__


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        grad = ", requires_grad" if value.requires_grad else ""
        return f"{dtype}{list(value.shape)} on {value.device}{grad}"
    return repr(value)


def explain_op(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explanation:
    """See `fastfusion.explain`."""
    backend = kwargs.get("backend")
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    # A question must not move the generators that a dropout seed is drawn from.
    with torch.random.fork_rng(devices):
        arguments = op.normalize(*args, **kwargs)
    chosen = path = None
    try:
        implementation = op.select(backend, arguments)
    except BackendUnavailableError:
        pass
    else:
        chosen = implementation.backend
        path = implementation.path and implementation.path(*arguments)
    rows = [(i.backend, tuple(i.refuses(*arguments))) for i in op.implementations]
    given = [i.backend for i in op.implementations]
    wanted = backend or _forced
    if wanted is not None and wanted not in given:
        rows.append((wanted, ("it has no implementation of this op",)))
    described = [_describe(a) for a in args] + [f"{k}={_describe(v)}" for k, v in kwargs.items()]
    return Explanation(op.name, ", ".join(described), chosen, tuple(rows), path)


if "FASTFUSION_BACKEND" in os.environ:
    try:
        _forced = _validated(os.environ["FASTFUSION_BACKEND"] or None)
    except ValueError as error:
        raise ValueError(f"environment variable FASTFUSION_BACKEND: {error}") from None
