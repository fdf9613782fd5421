"""Loading of the compiled parts: the op library and the pybind11 module with build facts.

`cpu_unavailable` is None when the C++ kernels are usable, and otherwise the reason as a sentence.
A library that is there but does not load disables itself with one warning.
"""

import json
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

_OPS = Path(__file__).parents[1].joinpath("_torch_ops.so")
_RECORD = Path(__file__).parents[1].joinpath("_build.json")
_PARTS = {"cpu": "compiled part", "cuda": "CUDA part"}

native: ModuleType | None = None
cpu_unavailable: str | None = None


def absent(part: str) -> str:
    """Why the libraries of a part are not there, by the record that setup.py leaves: a sentence.

    Args:
        part: "cpu" or "cuda".
    """
    try:
        reason = json.loads(_RECORD.read_text()).get(part, "its record does not name it")
    except OSError:
        return (
            "the package was never built: run `pip install .`, or `python setup.py build_ext "
            "--inplace`, where its source is"
        )
    if reason is None:
        return f"the {_PARTS[part]} of the package was built, but its files are gone"
    return f"the package was built without its {_PARTS[part]}: {reason}"


def _load() -> None:
    global native, cpu_unavailable
    if not _OPS.exists():
        cpu_unavailable = absent("cpu")
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
