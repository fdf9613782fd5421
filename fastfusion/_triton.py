"""The Triton kernels as torch ops: schemas, shapes for tracing, gradients.

Each kernel has three ops: `triton_<name>`, differentiable, for compiled code with gradients and for
export; `triton_<name>_forward`, raw, for gradient-free compiled code; `triton_<name>_backward`.
They are defined here at import and import Triton (1.5 s) when they first run. Eager calls reach the
launcher without the dispatcher, unless a dispatch mode (a profiler of operators, a checkpoint
policy, fake tensors) wants to see an op. Transforms of torch.func, forward-mode and second
derivatives are the reference's.
"""

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import Function

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
MAX_DIM = 256

_LIBRARY = torch.library.Library("fastfusion", "FRAGMENT")
_is_compiling = torch.compiler.is_compiling
_is_exporting = torch.compiler.is_exporting
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state  # of torch.jit.trace, in which sizes are tensors
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))

# Triton's own variable. Its interpreter runs the kernels on CPU tensors, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_ON_CPU = (
    "the inputs are on the CPU (Triton's interpreter takes them: set TRITON_INTERPRET=1 before "
    "Python starts)"
)


_MISSING = None if find_spec("triton") else "Triton is not installed (pip install triton)"


def unavailable() -> str | None:
    """Why no call can run here, or None."""
    if _MISSING is None and not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    return _MISSING


def _device_refuses(index: int) -> str | None:
    if torch.version.hip is not None:
        return "it is made for NVIDIA GPUs, and this torch for AMD's"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "the GPU is older than Ampere (compute capability 8.0)"
    return None


# torch.compile calls it when it traces, and takes the answer as a constant.
_device_refuses._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuses(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Sequence[str]:
    """Why the kernels cannot run a call, one sentence per reason."""
    if query.is_cpu and not INTERPRETED:
        return (_ON_CPU,)
    reasons = []
    if _MISSING is not None:
        reasons.append(_MISSING)
    if query.is_cuda:
        too_old = _device_refuses(query.get_device())
        if too_old is not None:
            reasons.append(too_old)
    elif not query.is_cpu:
        reasons.append(f"the inputs are on {query.device}")
    if query.dtype not in DTYPES:
        reasons.append(f"{str(query.dtype).removeprefix('torch.')} is left to the reference")
    if query.shape[-1] > MAX_DIM or value.shape[-1] > MAX_DIM:
        reasons.append(f"head dims above {MAX_DIM} are left to the reference")
    return reasons


def _launcher(path: str) -> Callable[..., Any]:
    """The function `module:name` of fastfusion.kernels, imported at its first call."""
    module, _, name = path.partition(":")
    found: list[Callable[..., Any]] = []

    def launch(*given: Any) -> Any:
        if not found:
            found.append(getattr(import_module(f"fastfusion.kernels.{module}"), name))
        return found[0](*given)

    return launch


def interprets(query: Tensor, *others: Any) -> bool:
    """Whether the kernels would run in Triton's interpreter: for who asks for them by name."""
    return not query.is_cuda


class KernelOp:
    """A kernel with its gradient, as torch ops.

    Args:
        name: of the ops, without the prefix.
        tensors: schemas of the leading tensor arguments; those of `gradients` come first.
        options: schemas of the arguments behind them.
        outputs: how many tensors the forward op returns.
        gradients: how many of the leading arguments have a gradient.
        masked: whether the last of them is a mask, which may be None, bool or without a gradient.
        forward, backward: the launchers, as `module:function` of fastfusion.kernels. The forward
            one takes one argument more, whether the log-sum-exps are wanted.
        fake, fake_backward: the outputs' shapes.
        reference: the forward's arguments to all outputs, in differentiable torch.
    """

    def __init__(
        self,
        name: str,
        tensors: Sequence[str],
        options: Sequence[str],
        outputs: int,
        gradients: int,
        masked: bool,
        forward: str,
        backward: str,
        fake: Callable[..., Any],
        fake_backward: Callable[..., Any],
        reference: Callable[..., tuple[Tensor, ...]],
    ) -> None:
        self.tensors, self.outputs, self.gradients = len(tensors), outputs, gradients
        self.masked, self.reference = masked, reference
        self.launch = _launcher(forward)
        launch_backward = _launcher(backward)
        given = ", ".join((*tensors, *options))
        grads = ", ".join(f"Tensor? grad_{i}" for i in range(outputs))

        def results(count: int) -> str:
            return "(" + ", ".join(["Tensor"] * count) + ")"

        name = f"triton_{name}"
        _LIBRARY.define(f"{name}({given}) -> {results(outputs)}")
        _LIBRARY.define(f"{name}_forward({given}) -> {results(outputs)}")
        _LIBRARY.define(
            f"{name}_backward({grads}, {given}, bool mask_gradient) -> {results(gradients)}"
        )
        for key in ("CPU", "CUDA"):
            for suffix in ("", "_forward"):
                _LIBRARY.impl(name + suffix, lambda *given: self.launch(*given, True), key)
            _LIBRARY.impl(f"{name}_backward", launch_backward, key)
        for suffix, function in (("", fake), ("_forward", fake), ("_backward", fake_backward)):
            torch.library.register_fake(f"fastfusion::{name}{suffix}", function)
        self.graph, self.raw, self.backward = (
            getattr(torch.ops.fastfusion, name + suffix).default
            for suffix in ("", "_forward", "_backward")
        )
        self.function = _functions(self)
        _LIBRARY.impl(name, self._autograd_kernel, "Autograd")

    def __call__(self, lse: bool, *given: Any) -> tuple[Any, ...]:
        """All outputs; without `lse`, the log-sum-exps of an eager call may be None."""
        needs_gradient = _is_grad_enabled() and any(
            t is not None and t.requires_grad for t in given[: self.gradients]
        )
        if _is_compiling():
            if _transforms_active():
                return self.reference(*given)
            return (self.graph if needs_gradient or _is_exporting() else self.raw)(*given)
        if _transforms_active() or forward_ad._current_level >= 0 or _tracing() is not None:
            return self.reference(*given)
        if needs_gradient:
            return self.function.apply(*given)
        return self.run(lse, *given)

    def run(self, lse: bool, *given: Any) -> tuple[Any, ...]:
        """Without a gradient: by the launcher, or by the op where somebody watches ops."""
        if _dispatch_modes() or not _PLAIN.issuperset(map(type, given[: self.tensors])):
            return self.raw(*given)
        return self.launch(*given, lse)

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
            # By the op: batched gradients (is_grads_batched) have no memory to launch on.
            run = Backward.apply if _is_grad_enabled() else op.backward
            found = run(*grads, *tensors, *ctx.options, mask_gradient)
            if op.masked and not mask_gradient:
                found = (*found[:-1], None)
            return (*found, *nothing)

    return Forward
