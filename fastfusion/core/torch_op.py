"""Kernels as torch ops: schema, shapes for tracing, gradients, transforms and FLOPs of a call.

A backend's kernel is three ops, or four: `<name>`, differentiable, for compiled code with gradients
and for export; `<name>_forward`, raw, for gradient-free compiled code; `<name>_backward`; and where
leaving the log-sum-exps out saves work `<name>_out`. A Python autograd kernel costs 5 us a call
even without gradients, hence the raw ops; an autograd.Function with setup_context costs 22 us more
than one of the old style, hence `Eager` beside the one that torch.func and graphs need.

Forward-mode derivatives are the reference's, and so are second derivatives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_type_hints

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import Function

from fastfusion.core import vmap
from fastfusion.core.arguments import PLAIN, is_exporting

LIBRARY = torch.library.Library("fastfusion", "FRAGMENT")
# Every op that torch knows, for those who count what ops cost.
ALL: list[Any] = []

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    bool: "bool",
    int: "SymInt",
    int | None: "SymInt?",
}
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state  # of torch.jit.trace, in which sizes are tensors
# Who watches ops (a checkpoint's policy, profilers, tracers) knows an op by its one name, and not
# by overloads: the last of `TorchOp.runs`.
_WATCHED = -1
# Of is_grads_batched, which no other question shows.
_BATCHED: Any = torch._C._parse_dispatch_key("Batched")


@dataclass(frozen=True)
class Definition:
    """What an op is to torch, the same for the kernels of every backend.

    Attributes:
        name: of the torch ops, without a backend's prefix.
        call: the NamedTuple of its arguments, in the order and with the defaults of the schema:
            first those tensors that may have a gradient, of which the last is a mask (None, bool,
            or without a gradient as well), then the other tensors, then numbers, then tensors that
            few calls have. `conditions()` gives what holds for the sizes, dtypes and devices of a
            legal one.
        gradients: how many arguments may have a gradient, of the first.
        results: how many outputs a caller gets who asks for no log-sum-exps.
        outputs: how many there are in all.
        fake: a call to empty outputs, log-sum-exps included; one alone is no tuple.
        reference: a call to all outputs, in differentiable torch.
        flops: a call, and whether it is for the backward, to floating-point operations.
        folds: whether the tensors have a batch dimension, into which another one can be folded.
        written: names of tensors that a call which has them writes to.
        last_gradients: how many of the last arguments may have a gradient, too: they are no part of
            a batch. The backward gives these last, without numbers where there are none.
    """

    name: str
    call: Any
    gradients: int
    results: int
    outputs: int
    fake: Callable[[Any], Any]
    reference: Callable[[Any], tuple[Tensor, ...]]
    flops: Callable[[Any, bool], int]
    folds: bool = True
    written: tuple[str, ...] = ()
    last_gradients: int = 0

    @cached_property
    def tensors(self) -> int:
        """How many arguments before the numbers are tensors."""
        return self._are_tensors.index(False)

    @cached_property
    def rare(self) -> int:
        """From where on the arguments are tensors again."""
        return len(self._are_tensors) - self._are_tensors[::-1].index(False)

    @cached_property
    def _are_tensors(self) -> list[bool]:
        hints = get_type_hints(self.call).values()
        return [hint in (Tensor, Tensor | None) for hint in hints]

    def tensors_of(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Those of the arguments, or the first of them, that are no numbers."""
        return (*given[: self.tensors], *given[self.rare :])

    @cached_property
    def _tail(self) -> tuple[int, int, int, tuple[Any, ...]]:
        """How many arguments have no default; from where on all numbers have one, and these."""
        fields, defaults = self.call._fields, self.call._field_defaults
        required = len(fields) - len(defaults)
        start = max(self.tensors, required)
        numbers = tuple(defaults[name] for name in fields[start : self.rare])
        return required, start, self.rare, numbers

    def given(self, call: Any) -> Any:
        """The arguments of a call without those at its end that are as the schema has them: each
        costs the dispatcher 0.1 us."""
        required, end, rare, numbers = self._tail
        for tensor in call[rare:]:  # by `==` the first would be asked for its 2 us of numbers
            if tensor is not None:
                return call
        if call[end:rare] != numbers:
            return call[:rare]
        for tensor in call[required:end]:
            if tensor is not None:
                break
        else:
            return call[:required]
        while call[end - 1] is None:
            end -= 1
        return call[:end]

    def schema(self, writes: bool = False) -> str:
        """The arguments; those of a call that writes have alias letters."""
        hints = get_type_hints(self.call).items()
        types = {name: _SCHEMA_TYPES[hint] for name, hint in hints}
        for letter, name in zip("abcd", self.written if writes else (), strict=False):
            types[name] = f"Tensor({letter}!)?"
        defaults = self.call._field_defaults
        otherwise = {name: f"={_written(defaults[name])}" for name in defaults}
        return ", ".join(f"{kind} {name}{otherwise.get(name, '')}" for name, kind in types.items())

    def define(self, name: str) -> None:
        """Give the ops of a backend their schemas."""
        grads = ", ".join(f"Tensor? grad_{i}" for i in range(self.outputs))
        results, gradients = (
            "(" + ", ".join(["Tensor"] * n) + ")"
            for n in (self.outputs, self.gradients + self.last_gradients)
        )
        LIBRARY.define(f"{name}({self.schema()}) -> {results}")
        LIBRARY.define(f"{name}_forward({self.schema()}) -> {results}")
        LIBRARY.define(
            f"{name}_backward({grads}, bool mask_gradient, {self.schema()}) -> {gradients}"
        )

    def without_lse(self, outputs: tuple[Tensor, ...]) -> Any:
        """The results as a caller gets them who asks for no log-sum-exps: one alone is no tuple."""
        return outputs[0] if self.results == 1 else outputs[: self.results]

    def checked_fake(self, *given: Any) -> Any:
        call = self.call(*given)
        for condition in call.conditions():
            torch._check(condition)
        return self.fake(call)

    def fake_backward(self, *given: Any) -> tuple[Tensor, ...]:
        """Gradients in memory as the outputs have it: (batch, length, heads, dim), or packed."""
        mask_gradient, *call = given[self.outputs :]
        *others, mask = self.call(*call)[: self.gradients]

        def like(t: Tensor) -> Tensor:
            if t.dim() == 3:
                return t.new_empty(t.shape)
            return t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2)

        wanted = mask_gradient and mask is not None and mask.is_floating_point()
        gradient = mask.new_empty(mask.shape) if wanted else others[0].new_empty(0)
        last = self.call(*call)[len(self.call._fields) - self.last_gradients :]

        def like_last(t: Tensor | None) -> Tensor:
            return others[0].new_empty((0,) if t is None else t.shape, dtype=torch.float32)

        return *map(like, others), gradient, *map(like_last, last)


def _written(default: Any) -> str:
    """A default as torch prints it."""
    return "0." if isinstance(default, float) else str(default)


def _is_watched() -> bool:
    return _dispatch_modes() > 0 or _tracing() is not None


def needs_gradient(definition: Definition, call: Any) -> bool:
    if _is_grad_enabled():
        for tensor in call[: definition.gradients]:
            if tensor is not None and tensor.requires_grad:
                return True
        for tensor in call[len(call) - definition.last_gradients :]:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class TorchOp:
    """A backend's kernel with its gradient, as torch ops.

    Args:
        definition: of the op.
        name: of the torch ops, with the backend's prefix.
        traceable: whether eager calls take the tensors of torch.jit.trace, whose sizes are tensors.
    """

    # Eager calls without a gradient, by how many of the op's arguments are given: the results, and
    # all outputs. The last is the op that has all arguments.
    runs: Sequence[Callable[..., Any]]
    runs_with_lse: Sequence[Callable[..., Any]]

    def __init__(self, definition: Definition, name: str, traceable: bool) -> None:
        self.definition, self.traceable = definition, traceable
        ops = torch.ops.fastfusion
        self.graph = _op(name, definition.checked_fake)
        self.raw = _op(f"{name}_forward", definition.checked_fake)
        self.backward = _op(f"{name}_backward", definition.fake_backward)
        self.out = None
        if hasattr(ops, f"{name}_out"):
            self.out = _op(
                f"{name}_out",
                lambda *given: definition.without_lse(definition.checked_fake(*given)),
            )
            self.runs, self.runs_with_lse = _by_count(self.out), _by_count(self.raw)
        self.runs_backward = _by_count(self.backward)
        self.transformed, self.eager, self.eager_with_lse = _functions(self)
        LIBRARY.impl(name, self._autograd_kernel, "Autograd")
        torch.library.register_vmap(f"fastfusion::{name}", self.transformed.vmap)
        ALL.append(self)

    def __call__(self, call: Any, lse: bool) -> Any:
        """The results of a call, and with `lse` the log-sum-exps behind them."""
        definition = self.definition
        if _is_compiling():
            if _transforms_active():
                outputs = definition.reference(call)
            elif needs_gradient(definition, call) or is_exporting():
                outputs = self.graph(*call)
            elif lse or self.out is None:
                outputs = self.raw(*call)
            else:
                return self.out(*call)
            return outputs if lse else definition.without_lse(outputs)
        return self.run_eagerly(call, lse, _tracing() is not None)

    def run_eagerly(self, call: Any, lse: bool, traced: bool = False) -> Any:
        """The same where nothing is being compiled.

        Args:
            traced: in torch.jit.trace.
        """
        definition = self.definition
        wants_gradient = _is_grad_enabled() and needs_gradient(definition, call)  # spares a frame
        if forward_ad._current_level >= 0 or (traced and not self.traceable):
            outputs = definition.reference(call)
        elif _transforms_active():
            outputs = self.transformed.apply(*call)
        elif wants_gradient:
            return (self.eager_with_lse if lse else self.eager).apply(*definition.given(call))
        else:
            given, runs = definition.given(call), self.runs_with_lse if lse else self.runs
            return runs[_WATCHED if traced or _dispatch_modes() else len(given)](*given)
        return outputs if lse else definition.without_lse(outputs)

    def run_backward(self, *given: Any) -> tuple[Tensor, ...]:
        """The gradients, of the arguments of the backward op: those of the outputs, whether that of
        the mask is wanted, and the call; likewise."""
        count = _WATCHED if _is_watched() else len(given)
        gradients: tuple[Tensor, ...] = self.runs_backward[count](*given)
        return gradients

    def _autograd_kernel(self, *given: Any) -> tuple[Tensor, ...]:
        call = self.definition.call(*given)
        if needs_gradient(self.definition, call):
            return self.transformed.apply(*call)
        return self.raw(*given)

    def flops(self, counter: Any) -> None:
        """Say to torch.utils.flop_counter what the ops cost."""
        definition, outputs = self.definition, self.definition.outputs

        def backward(*given: Any, out_val: Any = None) -> int:
            return definition.flops(definition.call(*given[outputs + 1 :]), True)

        count_forward(counter, definition, self.graph, self.raw, self.out)
        counter.register_flop_formula(self.backward.overloadpacket, get_raw=True)(backward)


def _op(name: str, fake: Callable[..., Any]) -> Any:
    """The op that takes all arguments, after each of its overloads has got its shapes."""
    packet = getattr(torch.ops.fastfusion, name)
    for overload in packet.overloads():
        torch.library.register_fake(getattr(packet, overload), fake)
    return packet.default


def _by_count(op: Any) -> tuple[Callable[..., Any], ...]:
    """What to call with 0, 1, 2, ... arguments: of the overloads that take so many the shortest.

    torch looks each argument that a call leaves out up by its name, which takes 0.06 us.
    """
    packet, found = op.overloadpacket, list[Callable[..., Any]]()
    overloads = [getattr(packet, name) for name in packet.overloads()]
    for overload in sorted(overloads, key=lambda o: len(o._schema.arguments)):
        # Without the 0.2 us of a frame around it.
        found += [overload._op] * (len(overload._schema.arguments) + 1 - len(found))
    return tuple(found)


def count_forward(counter: Any, definition: Definition, *ops: Any) -> None:
    def forward(*given: Any, out_val: Any = None) -> int:
        return definition.flops(definition.call(*given), False)

    for op in ops:
        if op is not None:
            counter.register_flop_formula(op.overloadpacket, get_raw=True)(forward)


class ForwardOp:
    """A kernel without a gradient, as the op `<name>_forward`, and `<name>_out` where log-sum-exps
    can be left out, which a library defines.

    Args:
        definition, name: as of `TorchOp`.
    """

    def __init__(self, definition: Definition, name: str) -> None:
        self.definition = definition
        fake = definition.checked_fake
        self.out = self.forward = _op(f"{name}_forward", fake)
        if definition.outputs > definition.results:
            self.out = _op(f"{name}_out", lambda *given: definition.without_lse(fake(*given)))
        _ = definition._tail  # torch.compile does not enter the lock that Python 3.11 has around it
        ALL.append(self)

    def __call__(self, call: Any, lse: bool) -> Any:
        """The results of a call, and with `lse` the log-sum-exps behind them."""
        compiling = _is_compiling()
        if _transforms_active() or (not compiling and forward_ad._current_level >= 0):
            outputs = self.definition.reference(call)
            return outputs if lse else self.definition.without_lse(outputs)
        op = self.forward if lse else self.out
        return (op if compiling else op._op)(*self.definition.given(call))  # as in `_by_count`

    def flops(self, counter: Any) -> None:
        """Say to torch.utils.flop_counter what the ops cost."""
        count_forward(counter, self.definition, *{self.forward, self.out})


class CachingOp(ForwardOp):
    """A kernel that comes twice: as `<name>_forward`, and as `<name>_cached`, which writes to what
    the definition names. In graphs an op that may write means more than one that does not.

    Args:
        definition, name: as of `TorchOp`; there are no log-sum-exps.
    """

    def __init__(self, definition: Definition, name: str) -> None:
        super().__init__(definition, name)
        self.cached = _op(f"{name}_cached", definition.checked_fake)

    def __call__(self, call: Any, lse: bool) -> Any:
        writes = getattr(call, self.definition.written[0]) is not None
        watched = _transforms_active() or (not _is_compiling() and forward_ad._current_level >= 0)
        if writes and not watched:
            return self.cached(*self.definition.given(call))
        return super().__call__(call, lse)

    def flops(self, counter: Any) -> None:
        """Say to torch.utils.flop_counter what the ops cost."""
        count_forward(counter, self.definition, self.forward, self.cached)


class LaunchedOp(TorchOp):
    """A kernel whose launcher is Python: eager calls reach it without the dispatcher, unless a
    dispatch mode (a profiler of operators, a checkpoint policy, fake tensors) wants to see an op.

    Args:
        definition, name: as of `TorchOp`.
        launch: called with a call, and whether the log-sum-exps are wanted; gives all outputs.
        launch_backward: called with the gradients of all outputs (each may be None), the call, and
            whether the gradient of the mask is wanted; gives all gradients, the last one as well.
    """

    def __init__(
        self,
        definition: Definition,
        name: str,
        launch: Callable[..., Any],
        launch_backward: Callable[..., Any],
    ) -> None:
        self.launch, self.launch_backward = launch, launch_backward
        definition.define(name)
        for key in ("CPU", "CUDA"):
            for suffix in ("", "_forward"):
                LIBRARY.impl(name + suffix, lambda *g: launch(definition.call(*g), True), key)
            LIBRARY.impl(f"{name}_backward", self._launch_backward, key)
        arguments = len(definition.call._fields) + 1
        self.runs, self.runs_with_lse = (self._results,) * arguments, (self._outputs,) * arguments
        super().__init__(definition, name, traceable=False)

    def _results(self, *given: Any) -> Any:
        return self.definition.without_lse(self._run(given, False))

    def _outputs(self, *given: Any) -> tuple[Tensor, ...]:
        return self._run(given, True)

    def _run(self, given: tuple[Any, ...], lse: bool) -> tuple[Tensor, ...]:
        definition = self.definition
        watched = _dispatch_modes() or not PLAIN.issuperset(map(type, definition.tensors_of(given)))
        outputs: tuple[Tensor, ...]
        outputs = self.raw(*given) if watched else self.launch(definition.call(*given), lse)
        return outputs

    def run_backward(self, *given: Any) -> tuple[Tensor, ...]:
        outputs = self.definition.outputs
        if (
            _is_compiling()
            or _dispatch_modes()
            or _transforms_active()
            or not PLAIN.issuperset(map(type, self._tensors(given)))
            # Gradients of is_grads_batched have no memory to launch on.
            or any(
                g is not None and torch._C._dispatch_keys(g).has(_BATCHED) for g in given[:outputs]
            )
        ):
            return self.backward(*given)
        return self._launch_backward(*given)

    def _launch_backward(self, *given: Any) -> tuple[Tensor, ...]:
        outputs = self.definition.outputs
        grads, mask_gradient, call = given[:outputs], given[outputs], given[outputs + 1 :]
        gradients: tuple[Tensor, ...]
        gradients = self.launch_backward(grads, self.definition.call(*call), mask_gradient)
        return gradients

    def _tensors(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Those of the arguments of the backward op."""
        first = self.definition.outputs
        return given[:first] + self.definition.tensors_of(given[first + 1 :])


class LaunchedForwardOp(ForwardOp):
    """A kernel without a gradient whose launcher is Python: eager calls reach it without the
    dispatcher, as those of a `LaunchedOp`.

    Args:
        definition, name: as of `TorchOp`; there are no log-sum-exps.
        launch: called with a call; gives the results.
    """

    def __init__(self, definition: Definition, name: str, launch: Callable[[Any], Any]) -> None:
        self.launch = launch
        returns = ", ".join(["Tensor"] * definition.outputs)
        LIBRARY.define(f"{name}_forward({definition.schema()}) -> ({returns})")
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(f"{name}_forward", lambda *g: launch(definition.call(*g)), key)
        super().__init__(definition, name)

    def __call__(self, call: Any, lse: bool) -> Any:
        if _is_compiling() or _transforms_active() or forward_ad._current_level >= 0:
            return super().__call__(call, lse)
        definition = self.definition
        if _tracing() is not None:
            return definition.without_lse(definition.reference(call))
        if _dispatch_modes() or not PLAIN.issuperset(map(type, definition.tensors_of(call))):
            return self.forward(*self.definition.given(call))
        return self.launch(call)


def _functions(op: TorchOp) -> tuple[Any, Any, Any]:
    """The autograd functions of an op: for torch.func and graphs, for eager calls, and for eager
    calls with log-sum-exps."""
    definition, leading, rare = op.definition, op.definition.tensors, op.definition.rare
    outputs, gradients = definition.outputs, definition.gradients
    fields = len(definition.call._fields)
    last_places = range(fields - definition.last_gradients, fields)
    without_gradient = (None,) * (last_places.start - gradients)
    first = outputs + 1  # argument of the backward op that is one of the forward's
    absent = (None,) * (outputs - definition.results)  # gradients of log-sum-exps

    class Backward(Function):
        """The backward op, itself differentiable: its derivative is that of the reference's own
        gradient.

        torch.func always asks for a graph, so a gradient through the reference that is chosen by
        is_grad_enabled() alone would make every torch.func.grad quadratic in memory.
        """

        @staticmethod
        def forward(*given: Any) -> Any:
            return op.run_backward(*given)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            call = inputs[first:]
            ctx.save_for_backward(*inputs[:outputs], *definition.tensors_of(call))
            ctx.mask_gradient, ctx.options = inputs[outputs], call[leading:rare]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *second: Tensor | None) -> Any:
            grads, saved = ctx.saved_tensors[:outputs], ctx.saved_tensors[outputs:]
            call = (*saved[:leading], *ctx.options, *saved[leading:])
            # Of the call, and of what this function gives.
            places = list(range(gradients if ctx.mask_gradient else gradients - 1))
            results_of = list(places)
            for result, place in enumerate(last_places, gradients):
                if call[place] is not None:
                    places.append(place)
                    results_of.append(result)
            given = [i for i, g in enumerate(grads) if g is not None]

            def gradient(*primals: Tensor) -> tuple[Tensor, ...]:
                def reference(*inputs: Tensor) -> tuple[Tensor, ...]:
                    changed = dict(zip(places, inputs, strict=True))
                    arguments = [changed.get(i, value) for i, value in enumerate(call)]
                    found = definition.reference(definition.call(*arguments))
                    return tuple(found[i] for i in given)

                linearized: Any = torch.func.vjp(reference, *primals[len(given) :])
                results, pullback = linearized
                pairs = zip(primals, results, strict=False)
                return pullback(tuple(g.to(r.dtype) for g, r in pairs))

            linearized: Any = torch.func.vjp(
                gradient, *(grads[i] for i in given), *(call[i] for i in places)
            )
            results, pullback = linearized
            pulled = pullback(
                tuple(
                    torch.zeros_like(r) if s is None else s.to(r.dtype)
                    for r, s in zip(results, (second[i] for i in results_of), strict=True)
                )
            )
            found: list[Any] = [None] * (first + len(call))
            for i, value in zip((*given, *(first + i for i in places)), pulled, strict=True):
                found[i] = value
            return tuple(found)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> Any:
            return vmap.backward(definition, Backward.apply, info.batch_size, in_dims, given)

    def save(ctx: Any, inputs: Any) -> None:
        ctx.save_for_backward(*definition.tensors_of(inputs))
        ctx.options = inputs[leading:rare]
        ctx.set_materialize_grads(False)

    class Transformed(Function):
        @staticmethod
        def forward(*given: Any) -> Any:
            return op.raw(*given)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            save(ctx, inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            needed = ctx.needs_input_grad
            if all([g is None for g in grads]):
                return (None,) * len(needed)
            mask_gradient = len(needed) >= gradients and needed[gradients - 1]
            grads = grads if len(grads) == outputs else grads + absent
            saved = ctx.saved_tensors
            given = (*saved[:leading], *ctx.options, *saved[leading:])
            if _is_grad_enabled() or _transforms_active():
                found = Backward.apply(*grads, mask_gradient, *definition.call(*given))
            else:
                found = op.run_backward(*grads, mask_gradient, *given)
            mask = found[gradients - 1] if mask_gradient else None
            last = found[gradients:] if len(needed) == fields else ()
            last = [g if needed[i] else None for g, i in zip(last, last_places, strict=False)]
            return (*found[: gradients - 1], mask, *without_gradient, *last)[: len(needed)]

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> Any:
            return vmap.forward(definition, Transformed.apply, info.batch_size, in_dims, given)

    def eager(runs: Sequence[Callable[..., Any]]) -> Any:
        class Eager(Function):
            @staticmethod
            def forward(ctx: Any, *given: Any) -> Any:
                save(ctx, given)
                return runs[_WATCHED if _is_watched() else len(given)](*given)

            backward = Transformed.backward

        return Eager

    return Transformed, eager(op.runs), eager(op.runs_with_lse)
