"""The Triton kernels as torch ops.

They are defined at import and import Triton (1.5 s) when they first run. Eager calls reach the
launcher without the dispatcher, unless a dispatch mode (a profiler of operators, a checkpoint
policy, fake tensors) wants to see an op.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastfusion.core.arguments import is_exporting
from fastfusion.core.op import forced_backend
from fastfusion.core.torch_op import Definition, LaunchedForwardOp, LaunchedOp, needs_gradient

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
MAX_DIM = 256
MAX_NORM_WIDTH = 16384  # kernels.layer.norm.MAX_WIDTH, here without importing Triton

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


def refuses(call: Any) -> Sequence[str]:
    """Why the kernels cannot run a call, one sentence per reason."""
    reasons = refuses_tensor(call[0], call.head_dims())
    if call.seed is not None and call.seed.numel() > 1:
        reasons = (*reasons, "dropout of a part of a larger call is left to the CPU and reference")
    return reasons


def refuses_tensor(query: Tensor, head_dims: Iterable[int] = ()) -> Sequence[str]:
    """The same of what decides about it: where the query is, its dtype, and all head dims."""
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
    if any(dim > MAX_DIM for dim in head_dims):
        reasons.append(f"head dims above {MAX_DIM} are left to the reference")
    return reasons


def refuses_layer(call: Any, definition: Definition, norm_widths: Iterable[int]) -> Sequence[str]:
    """The same of the kernels of a whole layer, which have no gradient.

    Heads are the business of the attention inside.
    """
    reasons = [*refuses_tensor(call[0])]
    if any(width > MAX_NORM_WIDTH for width in norm_widths):
        reasons.append(f"norms wider than {MAX_NORM_WIDTH} are left to the reference")
    if torch.is_grad_enabled() and not reasons:
        if needs_gradient(definition, call):
            reasons.append("gradients are left to the reference, whose products are torch's own")
        elif is_exporting():
            reasons.append("an exported program may need gradients (export it in torch.no_grad)")
    return reasons


def attention_inside() -> str | None:
    """The `backend` of the attention between a layer's products: the one that is chosen, but where
    a block asks for another than the call of the layer does."""
    return None if forced_backend() in (None, "triton") else "triton"


def _launcher(path: str) -> Callable[..., Any]:
    """The function `module:name` of fastfusion.kernels, imported at its first call."""
    module, _, name = path.partition(":")
    found: list[Callable[..., Any]] = []

    def launch(*given: Any) -> Any:
        if not found:
            found.append(getattr(import_module(f"fastfusion.kernels.{module}"), name))
        return found[0](*given)

    return launch


def interprets(call: Any) -> bool:
    """Whether the kernels would run in Triton's interpreter: for who asks for them by name."""
    return not call[0].is_cuda


def torch_op(definition: Definition, forward: str, backward: str) -> LaunchedOp:
    """The ops `triton_<name>...` over launchers.

    Args:
        definition: of the op.
        forward, backward: the launchers, as `module:function` of fastfusion.kernels: they take what
            `LaunchedOp` says.
    """
    name = f"triton_{definition.name}"
    return LaunchedOp(definition, name, _launcher(forward), _launcher(backward))


def layer_op(definition: Definition, launch: str, attend: Callable[..., Any]) -> LaunchedForwardOp:
    """The op `triton_<name>_forward` of a whole layer, whose kernels have no gradient.

    Args:
        definition: of the op.
        launch: `module:function` of fastfusion.kernels: takes a call and `attend`.
        attend: takes a call and what the attention inside is to be called with.
    """
    run = _launcher(launch)
    name = f"triton_{definition.name}"
    return LaunchedForwardOp(definition, name, lambda call: run(call, attend))
