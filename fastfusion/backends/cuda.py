"""The CUDA C++ kernels as torch ops: forward, without dropout.

Their library is loaded at import where torch is a CUDA build; it asks no driver before the first
call. `emulate` loads the same kernels compiled for the host, for tests.
"""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastfusion.backends import library
from fastfusion.core.arguments import is_exporting
from fastfusion.core.torch_op import Definition, ForwardOp, needs_gradient

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
MAX_DIM = 256
_OPS = Path(__file__).parents[1].joinpath("_torch_cuda_ops.so")

_is_grad_enabled = torch.is_grad_enabled

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


def _device_capability(index: int) -> int:
    if index not in _capabilities:
        with _disable_current_modes():
            _capabilities[index] = torch.ops.fastfusion.cuda_capability(index)
    return _capabilities[index]


def _device_refuses(index: int, dtype: torch.dtype) -> str | None:
    capability = _device_capability(index)
    if capability == 0:
        return "the GPU's driver is older than the CUDA runtime that they are built with"
    if capability < 75:
        return "the GPU is older than Turing (compute capability 7.5)"
    if capability < 80 and dtype == torch.bfloat16:
        return "bfloat16 needs a GPU of compute capability 8.0"
    return None


# torch.compile calls them when it traces, and takes their answers as constants.
_device_refuses._dynamo_marked_constant = True  # type: ignore[attr-defined]
_device_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuses(call: Any, definition: Definition) -> Sequence[str]:
    """Why the kernels cannot run a call, one sentence per reason."""
    query: Tensor = call[0]
    if query.is_cpu and emulated is None:
        return refuses_tensor(query)
    reasons = refuses_tensor(query, call.head_dims())
    if "dropout_p" in call._fields and call.dropout_p > 0.0:
        reasons.append("dropout is left to Triton and the reference")
    if _is_grad_enabled():
        if needs_gradient(definition, call):
            reasons.append("gradients are left to Triton and the reference")
        elif is_exporting():
            reasons.append("an exported program may need gradients (export it in torch.no_grad)")
    return reasons


def refuses_tensor(query: Tensor, head_dims: Iterable[int] = ()) -> list[str]:
    """The same of what decides first: where the query is, its dtype, and all head dims."""
    if query.is_cpu and emulated is None:
        return ["the inputs are on the CPU"]
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
    if any(dim > MAX_DIM for dim in head_dims):
        reasons.append(f"head dims above {MAX_DIM} are left to the reference")
    return reasons


def refuses_float8(query: Tensor) -> Sequence[str]:
    """The same of a call whose keys and values are of 8 bits, beside what refuses any."""
    if (
        _missing is not None
        or not (query.is_cuda or query.is_cpu)
        or query.is_cpu != bool(emulated)
    ):
        return ()
    if query.dtype == torch.float32:
        return ("keys and values of 8 bits beside queries of float32 are left to the reference",)
    if _device_capability(query.get_device()) < 89:
        return ("keys and values of 8 bits need a GPU of compute capability 8.9",)
    return ()


def emulates(call: Any) -> bool:
    """Whether the kernels would run on the host: for who asks for them by name."""
    return not call[0].is_cuda


class CudaOp:
    """The ops `cuda_<name>...` of a definition; before their library is loaded, nothing."""

    op: ForwardOp
    described: Any

    def __init__(self, definition: Definition) -> None:
        self.definition = definition
        _made.append(self)
        if _missing is None:
            self.register()

    def register(self) -> None:
        """Once the library is loaded."""
        name = f"cuda_{self.definition.name}"
        self.op = ForwardOp(self.definition, name)
        self.described = getattr(torch.ops.fastfusion, f"{name}_path").default

    def __call__(self, call: Any, lse: bool) -> Any:
        return self.op(call, lse)

    def path(self, call: Any) -> str:
        """In what way the kernels would run a call."""
        described: str = self.described(*call)
        return described


_made: list[CudaOp] = []
_missing = _load()
