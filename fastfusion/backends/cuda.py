"""The CUDA C++ kernels as torch ops: forward, without dropout.

Their library is loaded at import where torch is a CUDA build; it asks no driver before the first
call. `emulate` loads the same kernels compiled for the host, for tests.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastfusion.backends import library
from fastfusion.core.arguments import is_exporting

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
MAX_DIM = 256
_OPS = Path(__file__).parents[1].joinpath("_torch_cuda_ops.so")

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active

emulated: Path | None = None  # the library whose kernels run on the host
_missing: str | None = None


def _load() -> str | None:
    """Why there are no kernels, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not _OPS.exists():
        return library.absent("cuda")
    try:
        torch.ops.load_library(_OPS)
    except (OSError, RuntimeError) as error:
        reason = f"its library does not load: {error}"
        warnings.warn(f"fastfusion: CUDA kernels disabled, {reason}", stacklevel=2)
        return reason
    return None


def emulate(library: Path) -> None:
    """Run the kernels on CPU tensors, for those who ask for the backend by name.

    Args:
        library: one of those that ``setup.py build_emulated`` makes.

    Raises:
        RuntimeError: the kernels for a device are loaded, whose ops have the same names.
    """
    global emulated, _missing
    if _missing is None and emulated is None:
        raise RuntimeError("the CUDA kernels are loaded: no emulated ones can take their names")
    torch.ops.load_library(library)
    emulated, _missing = library, None
    for op in _made:
        op.register()


def unavailable() -> str | None:
    """Why no call can run here, or None."""
    if _missing is None and emulated is None and not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    return _missing


_capabilities: dict[int, int] = {}


def _device_refuses(index: int, dtype: torch.dtype) -> str | None:
    if index not in _capabilities:
        with _disable_current_modes():
            _capabilities[index] = torch.ops.fastfusion.cuda_capability(index)
    capability = _capabilities[index]
    if capability == 0:
        return "the GPU's driver is older than the CUDA runtime that they are built with"
    if capability < 75:
        return "the GPU is older than Turing (compute capability 7.5)"
    if capability < 80 and dtype == torch.bfloat16:
        return "bfloat16 needs a GPU of compute capability 8.0"
    return None


# torch.compile calls it when it traces, and takes the answer as a constant.
_device_refuses._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuses(dropout_p: float, mask: Tensor | None, query: Tensor, *others: Tensor) -> Sequence[str]:
    """Why the kernels cannot run a call on these tensors, one sentence per reason."""
    if query.is_cpu and emulated is None:
        return ("the inputs are on the CPU",)
    reasons = []
    if _missing is not None:
        reasons.append(_missing)
    elif query.is_cuda or query.is_cpu:
        by_device = _device_refuses(query.get_device(), query.dtype)
        if by_device is not None:
            reasons.append(by_device)
    if not query.is_cuda and not query.is_cpu:
        reasons.append(f"the inputs are on {query.device}")
    if query.dtype not in DTYPES:
        reasons.append(f"{str(query.dtype).removeprefix('torch.')} is left to the reference")
    if any(t.shape[-1] > MAX_DIM for t in (query, *others)):
        reasons.append(f"head dims above {MAX_DIM} are left to the reference")
    if dropout_p > 0.0:
        reasons.append("dropout is left to Triton and the reference")
    if _is_grad_enabled():
        if any(t is not None and t.requires_grad for t in (query, mask, *others)):
            reasons.append("gradients are left to Triton and the reference")
        elif is_exporting():
            reasons.append("an exported program may need gradients (export it in torch.no_grad)")
    return reasons


def emulates(query: Tensor, *others: Any) -> bool:
    """Whether the kernels would run on the host: for who asks for them by name."""
    return not query.is_cuda


class ForwardOp:
    """A kernel without a gradient, as the ops `cuda_<name>_forward`, and `_out` without lse.

    Args:
        name: of the ops.
        fake: their arguments to all outputs, as shapes for tracing.
        reference: the same in plain torch, for the transforms of torch.func.
        outputs: how many there are without log-sum-exps.
    """

    forward: Any
    out: Any
    path: Any

    def __init__(
        self,
        name: str,
        fake: Callable[..., Any],
        reference: Callable[..., tuple[Tensor, ...]],
        outputs: int,
    ) -> None:
        self.name, self.fake, self.reference, self.outputs = name, fake, reference, outputs
        _made.append(self)
        if _missing is None:
            self.register()

    def register(self) -> None:
        """Once the library is loaded."""
        self.forward, self.out, self.path = (
            getattr(torch.ops.fastfusion, f"cuda_{self.name}_{kind}").default
            for kind in ("forward", "out", "path")
        )
        torch.library.register_fake(f"fastfusion::cuda_{self.name}_forward", self.fake)
        torch.library.register_fake(
            f"fastfusion::cuda_{self.name}_out", lambda *given: self._without_lse(self.fake(*given))
        )

    def _without_lse(self, results: tuple[Tensor, ...]) -> Any:
        return results[0] if self.outputs == 1 else results[: self.outputs]

    def __call__(self, lse: bool, *given: Any) -> Any:
        """All outputs, or without `lse` those before the log-sum-exps; one alone is no tuple."""
        if _transforms_active() or (not _is_compiling() and forward_ad._current_level >= 0):
            results = self.reference(*given)
            return results if lse else self._without_lse(results)
        return (self.forward if lse else self.out)(*given)


_made: list[ForwardOp] = []
_missing = _load()
