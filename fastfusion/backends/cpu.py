"""The C++ kernels for CPUs as torch ops, which the library defines."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfusion.backends import library
from fastfusion.core.arguments import is_exporting
from fastfusion.core.torch_op import CachingOp, Definition, ForwardOp, TorchOp, needs_gradient

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_is_grad_enabled = torch.is_grad_enabled
_ON_GPU = ("the inputs are on a GPU",)


def unavailable() -> str | None:
    """Why no call can run here, or None."""
    return library.cpu_unavailable


def refuses(call: Any) -> Sequence[str]:
    """Why the kernels cannot run a call, one sentence per reason."""
    query: Tensor = call[0]
    if query.is_cpu and query.dtype in DTYPES and library.cpu_unavailable is None:
        return ()
    if query.is_cuda:
        return _ON_GPU  # asked before each call there
    reasons = []
    if library.cpu_unavailable is not None:
        reasons.append(library.cpu_unavailable)
    if query.device.type == "meta":
        reasons.append("meta tensors have no data")
    elif query.device.type != "cpu":
        reasons.append(f"the inputs are on {query.device}")
    if query.dtype not in DTYPES:
        reasons.append(f"{str(query.dtype).removeprefix('torch.')} is left to the reference")
    return reasons


def refuses_gradient(call: Any, definition: Definition) -> Sequence[str]:
    """The same of kernels that have no gradient."""
    reasons = refuses(call)
    if _is_grad_enabled() and not reasons:
        if needs_gradient(definition, call):
            return ("gradients are left to the reference, whose products are torch's own",)
        if is_exporting():
            return ("an exported program may need gradients (export it in torch.no_grad)",)
    return reasons


def isa() -> str:
    """The instruction set whose kernels run."""
    native: Any = library.native
    name: str = native.isa()
    return name


def products(dtype: torch.dtype) -> str:
    """ ", bfloat16 products" where the kernels have them for a dtype, else nothing."""
    return ", bfloat16 products" if dtype == torch.bfloat16 and isa().endswith("bf16") else ""


def path(query: Tensor, q_len: int, *others: Any) -> str:
    """How the kernels run a query of this length: instruction set, and in what way.

    Others: length of the key, whether it is causal, and whether it has dropout.
    """
    native: Any = library.native
    dtype = str(query.dtype).removeprefix("torch.")
    return f"{isa()}, {native.attention_path(dtype, q_len, *others)}"


def torch_op(definition: Definition) -> Any:
    """The ops `<name>...`; None where there are no kernels, which then refuse every call."""
    if library.cpu_unavailable is not None:
        return None
    return TorchOp(definition, definition.name, traceable=True)


def forward_op(definition: Definition) -> Any:
    """The op `<name>_forward` of kernels that have no gradient; None where there are none."""
    if library.cpu_unavailable is not None:
        return None
    return (CachingOp if definition.written else ForwardOp)(definition, definition.name)
