"""Loading of the compiled parts: the op library and the pybind11 module with build facts.

`cpu_unavailable` is None when the C++ kernels are usable, and otherwise the reason as a sentence.
A library that is there but does not load disables itself with one warning.
"""

import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

_OPS = Path(__file__).with_name("_torch_ops.so")

native: ModuleType | None = None
cpu_unavailable: str | None = None


def _load() -> None:
    global native, cpu_unavailable
    if not _OPS.exists():
        cpu_unavailable = "the package was installed without its compiled part (no C++ compiler)"
        return
    try:
        module = import_module("fastfusion._native")
        torch.ops.load_library(_OPS)
    except (ImportError, OSError, RuntimeError) as error:
        cpu_unavailable = f"its library does not load: {error}"
        warnings.warn(f"fastfusion: CPU kernels disabled, {cpu_unavailable}", stacklevel=2)
        return
    try:
        module.select_isa()
    except ValueError as error:  # asked for by name, so no silent second choice
        raise ValueError(f"environment variable FASTFUSION_CPU_ISA: {error}") from None
    native = module


_load()
