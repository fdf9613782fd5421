"""An op, its implementations, and how one of them is chosen.

An op is a list of implementations, fastest first and the reference last. Each implementation
refuses an input with sentences; the first that does not refuse runs. The same list drives the
choice, `explain`, the tests and the benchmarks.

The choice looks at devices, dtypes, which arguments are given and whether a gradient is needed,
in traced programs never at a length, a batch size, a pointer or a value: they would be recompiled.
"""

import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from fastfusion.core.arguments import autocast_dtype
from fastfusion.core.export_mode import is_plain
from fastfusion.core.torch_op import Definition

_any_autocast = torch._C._is_any_autocast_enabled
_tracing = torch._C._get_tracing_state  # of torch.jit.trace
BACKENDS = ("cuda", "triton", "cpu", "reference")

# A module global and not a ContextVar: torch.compile guards on it, so a compiled function
# recompiles when the choice changes. The environment is read once, at import.
_forced: str | None = None


class Interceptor(Protocol):
    """What runs calls in the place of implementations while it is on."""

    @property
    def ops(self) -> Container[str]:
        """Their names."""
        ...

    def run(self, op: "Op", call: Any, lse: bool) -> Any:
        """As `Op.run`."""

    def describe(self, call: Any) -> str:
        """In what way, for `explain`."""
        ...


_interceptor: Interceptor | None = None  # likewise a global


@contextmanager
def intercepted_by(interceptor: Interceptor | None) -> Iterator[None]:
    """Hand the calls of its ops to an interceptor in the block; None: to implementations again."""
    global _interceptor
    before, _interceptor = _interceptor, interceptor
    try:
        yield
    finally:
        _interceptor = before


def check_not_intercepted(what: str) -> None:
    """Raise ValueError for what is not a call that an interceptor could run."""
    if _interceptor is not None:
        raise ValueError(f"{what} do not go with sequences in parts (distributed.context_parallel)")


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
    """The backend that `use_backend` or ``FASTFUSION_BACKEND`` asks for, None if automatic; in
    `export_mode` the reference."""
    return "reference" if is_plain() else _forced


@dataclass(frozen=True)
class Implementation:
    """One row of an op's list.

    Attributes:
        backend: the name by which `backend=` and `use_backend` ask for it.
        run: called with a call of the op, and whether its log-sum-exps are wanted.
        refuses: called with a call; returns one sentence per reason, or nothing.
        differentiable: False where it refuses inputs that require a gradient.
        checks: whether `run` raises for what is not as `normalize` makes it, so that an eager call
            may try it first.
        on_request: called with a call; True where it could run it but is not to be chosen for it,
            as an interpreter.
        path: called with a call if it would run here; says in what way.
    """

    backend: str
    run: Callable[[Any, bool], Any]
    refuses: Callable[[Any], Sequence[str]]
    differentiable: bool = True
    checks: bool = False
    on_request: Callable[[Any], bool] | None = None
    path: Callable[[Any], str] | None = None

    @cached_property
    def run_eagerly(self) -> Callable[[Any, bool], Any]:
        """`run` for who knows that nothing is being compiled: it costs 0.1 us to ask."""
        run: Callable[[Any, bool], Any] = getattr(self.run, "run_eagerly", self.run)
        return run


def never_refuses(call: Any) -> Sequence[str]:
    """What a reference says to any legal call."""
    return ()


@dataclass(frozen=True)
class Op:
    """The specification of an op: what defines, checks, feeds, prices and runs it.

    Attributes:
        name: the public name.
        arguments: the NamedTuple of the public function's arguments, in its order.
        check: raises ValueError or TypeError for arguments that are not legal.
        normalize: arguments to the call, cast as autocast asks and checked.
        definition: the call, and what it is to torch.
        inputs: (shape, dtype, device, seed) to keyword arguments of the public function.
        ranks: of the first tensor of a call; another one is for `normalize` to change.
        cost: (shape, dtype) to (floating-point operations, bytes that must move).
        implementations: fastest first, the reference last.
    """

    name: str
    arguments: Callable[..., Any]
    check: Callable[[Any], None]
    normalize: Callable[[Any], Any]
    definition: Definition
    inputs: Callable[[Mapping[str, Any], torch.dtype, Any, int], dict[str, Any]]
    cost: Callable[[Mapping[str, Any], torch.dtype], tuple[int, int]]
    implementations: tuple[Implementation, ...]
    ranks: Container[int]

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The call that the public function would make of its arguments."""
        return self.normalize(self.arguments(*args, **kwargs))

    def reference(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The results of a call with public arguments and its log-sum-exps, in plain torch."""
        return self.definition.reference(self.call(*args, **kwargs))

    def select(self, backend: str | None, call: Any) -> Implementation:
        """The first implementation that accepts a call, or the one that was asked for."""
        wanted = _forced if backend is None else _validated(backend)
        if is_plain():
            wanted = "reference"
        if wanted is None:
            for implementation in self.implementations:
                if not implementation.refuses(call) and not (
                    implementation.on_request and implementation.on_request(call)
                ):
                    return implementation
        for implementation in self.implementations:
            if implementation.backend == wanted:
                reasons = implementation.refuses(call)
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

    def attempt(self, backend: str | None, call: Any, lse: bool) -> Any:
        """The results of an eager call with arguments as they came, 10 us sooner than through
        `check` and `normalize`, or None where it has to take that road.

        That is: where anything is wrong, for whose words see `check`; where normalisation would
        change a tensor; under autocast; and in torch.jit.trace, which a kernel that refuses a call
        by an error leaves in a state that ends in a crash of the process.
        """
        if _any_autocast() or _tracing() is not None:
            return None
        if _interceptor is not None and self._own_interceptor() is not None:
            return None
        try:
            if call[0].dim() not in self.ranks:
                return None
            chosen = self.select(backend, call)
            if chosen.checks or all(call.conditions()):
                return chosen.run_eagerly(call, lse)
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
            pass  # what is not about arguments will be raised again
        return None

    def _own_interceptor(self) -> Interceptor | None:
        """What runs the calls of this op, where that is no implementation."""
        if _interceptor is None or self.name not in _interceptor.ops:
            return None
        return _interceptor

    @cached_property
    def _kernels(self) -> frozenset[str]:
        return frozenset([i.backend for i in self.implementations]) - {"reference"}

    def may_fuse(self, tensor: Tensor) -> bool:
        """Whether `fuse` is worth asking of calls on the device of a tensor: at no cost, where a
        module would make a call for nothing."""
        if self._own_interceptor() is not None:
            return False
        if _forced is not None:
            return _forced in self._kernels
        return not tensor.is_cpu or "cpu" in self._kernels

    def fuse(self, call: Any) -> Any:
        """The results of an eager call that stands for a module's parts, or None where these are to
        run: where the reference is chosen, or nothing runs the call on the backend asked for, which
        they say themselves.

        The module has checked the call and knows that its parts come to nothing but their formulas
        (nn/_plain.py).
        """
        if torch._C._len_torch_function_stack() > 0:  # for `explain`, which watches
            tensors = tuple([t for t in call if isinstance(t, Tensor)])
            return handle_torch_function(self.fuse, tensors, call)
        if self._own_interceptor() is not None:
            return None
        try:
            chosen = self.select(None, call)
        except BackendUnavailableError:
            return None
        return None if chosen is self.implementations[-1] else chosen.run(call, False)

    def run(self, backend: str | None, call: Any, lse: bool) -> Any:
        """Select and run, without autocast: it would round the float32 products of the
        reference."""
        interceptor = self._own_interceptor()
        if interceptor is not None:
            return interceptor.run(self, call, lse)
        implementation = self.select(backend, call)
        device_type = call[0].device.type
        if autocast_dtype(device_type) is None:
            return implementation.run(call, lse)
        with torch.autocast(device_type, enabled=False):
            return implementation.run(call, lse)


@dataclass(frozen=True)
class Explanation:
    """Which implementation a call would take, and why each other one would not.

    `ranks` says what several ranks do together, where sequences lie on them in parts: the rows are
    then of the call on this rank's.
    """

    op: str
    call: str
    chosen: str | None
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    path: str | None = None
    ranks: str | None = None

    def __str__(self) -> str:
        width = max(len(backend) for backend, _ in self.rows)
        lines = [f"{self.op}({self.call})"]
        lines += [] if self.ranks is None else [f"  {self.ranks}"]
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
    if isinstance(value, tuple):
        names = getattr(value, "_fields", None)
        parts = list(map(_describe, value))
        if names is not None:
            parts = [f"{name}={part}" for name, part in zip(names, parts, strict=True)]
        return f"({', '.join(parts)})"
    return repr(value)


def explain_op(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explanation:
    """See `fastfusion.explain`."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    # A question must not move the generators that a dropout seed is drawn from.
    with torch.random.fork_rng(devices):
        call = op.call(*args, **kwargs)
    described = [_describe(a) for a in args] + [f"{k}={_describe(v)}" for k, v in kwargs.items()]
    return _explain(op, call, described, kwargs.get("backend"))


def explain_call(op: Op, call: Any) -> Explanation:
    """The same of a call that is made already."""
    given = {k: v for k, v in call._asdict().items() if v is not None and v is not False}
    return _explain(op, call, [f"{k}={_describe(v)}" for k, v in given.items()], None)


def _explain(op: Op, call: Any, described: Sequence[str], backend: str | None) -> Explanation:
    chosen = path = None
    try:
        implementation = op.select(backend, call)
    except BackendUnavailableError:
        pass
    else:
        chosen = implementation.backend
        path = implementation.path and implementation.path(call)
    rows = [(i.backend, tuple(i.refuses(call))) for i in op.implementations]
    given = [i.backend for i in op.implementations]
    wanted = backend or _forced
    if wanted is not None and wanted not in given:
        rows.append((wanted, ("it has no implementation of this op",)))
    interceptor = op._own_interceptor()
    ranks = None if interceptor is None else interceptor.describe(call)
    return Explanation(op.name, ", ".join(described), chosen, tuple(rows), path, ranks)


if "FASTFUSION_BACKEND" in os.environ:
    try:
        _forced = _validated(os.environ["FASTFUSION_BACKEND"] or None)
    except ValueError as error:
        raise ValueError(f"environment variable FASTFUSION_BACKEND: {error}") from None
