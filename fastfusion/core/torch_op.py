"""Kernels as torch ops: shapes for tracing, gradients, and the schema that fits the moment.

Each kernel has three ops: `<name>`, differentiable, for compiled code with gradients and for
export; `<name>_forward`, raw, for gradient-free compiled code; `<name>_backward`. Transforms of
torch.func, forward-mode and second derivatives are the reference's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import Function

from fastfusion.core.arguments import is_exporting

LIBRARY = torch.library.Library("fastfusion", "FRAGMENT")
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state  # of torch.jit.trace, in which sizes are tensors
# Of is_grads_batched, which no other question shows.
_BATCHED: Any = torch._C._parse_dispatch_key("Batched")
PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


@dataclass(frozen=True)
class Interface:
    """What the ops of every backend share.

    Attributes:
        tensors: schemas of the leading tensor arguments; those of `gradients` come first.
        options: schemas of the arguments behind them.
        outputs: how many tensors the forward op returns.
        gradients: how many of the leading arguments have a gradient.
        masked: whether the last of them is a mask, which may be None, bool or without a gradient.
        fake, fake_backward: the outputs' shapes.
        reference: the forward's arguments to all outputs, in differentiable torch.
    """

    tensors: Sequence[str]
    options: Sequence[str]
    outputs: int
    gradients: int
    masked: bool
    fake: Callable[..., Any]
    fake_backward: Callable[..., Any]
    reference: Callable[..., tuple[Tensor, ...]]

    def define(self, name: str) -> None:
        """Give the three ops their schemas."""
        given = ", ".join((*self.tensors, *self.options))
        grads = ", ".join(f"Tensor? grad_{i}" for i in range(self.outputs))

        def results(count: int) -> str:
            return "(" + ", ".join(["Tensor"] * count) + ")"

        LIBRARY.define(f"{name}({given}) -> {results(self.outputs)}")
        LIBRARY.define(f"{name}_forward({given}) -> {results(self.outputs)}")
        LIBRARY.define(
            f"{name}_backward({grads}, {given}, bool mask_gradient) -> {results(self.gradients)}"
        )


class KernelOp:
    """A kernel with its gradient, as torch ops.

    Args:
        name: of the ops, without the prefix.
        interface: their arguments, outputs and definition.
        launch: called instead of the raw op where nobody watches ops, with the op's arguments and
            whether the log-sum-exps are wanted.
        traceable: whether `launch` takes the tensors of torch.jit.trace, whose sizes are tensors.
        launch_backward: called likewise instead of the backward op, with its arguments; None where
            the op itself is not slower.
    """

    def __init__(
        self,
        name: str,
        interface: Interface,
        launch: Callable[..., Any],
        traceable: bool,
        launch_backward: Callable[..., Any] | None = None,
    ) -> None:
        self.tensors, self.outputs = len(interface.tensors), interface.outputs
        self.gradients, self.masked = interface.gradients, interface.masked
        self.reference, self.launch, self.traceable = interface.reference, launch, traceable
        self.launch_backward = launch_backward
        fake, fake_backward = interface.fake, interface.fake_backward
        for suffix, function in (("", fake), ("_forward", fake), ("_backward", fake_backward)):
            torch.library.register_fake(f"fastfusion::{name}{suffix}", function)
        self.graph, self.raw, self.backward = (
            getattr(torch.ops.fastfusion, name + suffix).default
            for suffix in ("", "_forward", "_backward")
        )
        self.function = _functions(self)
        LIBRARY.impl(name, self._autograd_kernel, "Autograd")

    def __call__(self, lse: bool, *given: Any) -> tuple[Any, ...]:
        """All outputs; without `lse`, the log-sum-exps of an eager call may be None."""
        needs_gradient = _is_grad_enabled() and any(
            t is not None and t.requires_grad for t in given[: self.gradients]
        )
        if _is_compiling():
            if _transforms_active():
                return self.reference(*given)
            return (self.graph if needs_gradient or is_exporting() else self.raw)(*given)
        if self.by_reference():
            return self.reference(*given)
        if needs_gradient:
            return self.function.apply(*given)
        return self.run(lse, *given)

    def by_reference(self) -> bool:
        """Whether an eager call would be the reference's."""
        traced = not self.traceable and _tracing() is not None
        return traced or _transforms_active() or forward_ad._current_level >= 0

    def run(self, lse: bool, *given: Any) -> tuple[Any, ...]:
        """Without a gradient: by the launcher, or by the op where somebody watches ops."""
        if _dispatch_modes() or not PLAIN.issuperset(map(type, given[: self.tensors])):
            return self.raw(*given)
        return self.launch(*given, lse)

    def run_backward(self, *given: Any) -> tuple[Any, ...]:
        """The gradients, by the launcher, or by the op where somebody watches ops or gradients are
        batched (is_grads_batched), which have no memory to launch on."""
        tensors = given[: self.outputs + self.tensors]
        if (
            self.launch_backward is None
            or _is_compiling()
            or _dispatch_modes()
            or _transforms_active()
            or not PLAIN.issuperset(map(type, tensors))
            or any(
                g is not None and torch._C._dispatch_keys(g).has(_BATCHED)
                for g in tensors[: self.outputs]
            )
        ):
            return self.backward(*given)
        return self.launch_backward(*given)

    def _autograd_kernel(self, *given: Any) -> tuple[Tensor, ...]:
        leading = given[: self.gradients]
        if _is_grad_enabled() and any(t is not None and t.requires_grad for t in leading):
            return self.function.apply(*given)
        with torch._C._AutoDispatchBelowAutograd():
            return self.raw(*given)


def _functions(op: KernelOp) -> type[Function]:
    """The autograd function of an op; its backward is a function too, for second derivatives."""

    class Backward(Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            ctx.save_for_backward(*given[: op.outputs + op.tensors])
            ctx.options = given[op.outputs + op.tensors :]
            ctx.set_materialize_grads(False)
            return op.backward(*given)

        @staticmethod
        def backward(ctx: Any, *second: Tensor | None) -> Any:
            """The derivative of the reference's own gradient, itself differentiable."""
            *options, mask_gradient = ctx.options
            grads, tensors = ctx.saved_tensors[: op.outputs], ctx.saved_tensors[op.outputs :]
            last = op.gradients - (op.masked and not mask_gradient)
            given = [i for i, g in enumerate(grads) if g is not None]

            def gradient(*primals: Tensor) -> tuple[Tensor, ...]:
                def outputs(*leading: Tensor) -> tuple[Tensor, ...]:
                    results = op.reference(*leading, *tensors[last:], *options)
                    return tuple(results[i] for i in given)

                linearized: Any = torch.func.vjp(outputs, *primals[len(given) :])
                results, pullback = linearized
                pairs = zip(primals, results, strict=False)
                return pullback(tuple(g.to(r.dtype) for g, r in pairs))

            linearized: Any = torch.func.vjp(gradient, *(grads[i] for i in given), *tensors[:last])
            first, pullback = linearized
            pulled = pullback(
                tuple(
                    torch.zeros_like(f) if s is None else s.to(f.dtype)
                    for f, s in zip(first, second, strict=False)
                )
            )
            found: list[Any] = [None] * (op.outputs + op.tensors + len(ctx.options))
            for i, value in zip(
                (*given, *range(op.outputs, op.outputs + last)), pulled, strict=True
            ):
                found[i] = value
            return tuple(found)

    class Forward(Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            ctx.save_for_backward(*given[: op.tensors])
            ctx.options = given[op.tensors :]
            ctx.set_materialize_grads(False)
            return op.run(True, *given)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            tensors = ctx.saved_tensors
            count, nothing = op.gradients, [None] * (op.tensors + len(ctx.options) - op.gradients)
            if all(g is None for g in grads):
                return (*[None] * count, *nothing)
            mask_gradient = op.masked and ctx.needs_input_grad[count - 1]
            run = Backward.apply if _is_grad_enabled() else op.run_backward
            found = run(*grads, *tensors, *ctx.options, mask_gradient)
            if op.masked and not mask_gradient:
                found = (*found[:-1], None)
            return (*found, *nothing)

    return Forward
