"""Loading of the compiled parts: the op library and, beneath it, that of the kernels.

`cpu_unavailable` is None when the C++ kernels are usable, and otherwise the reason as a sentence.
A library that is there but does not load disables itself with one warning.
"""

import json
import warnings
from pathlib import Path

import torch

from fastfusion.backends.native import Native

_FOLDER = Path(__file__).parents[1]
_OPS = _FOLDER / "_torch_ops.so"
_RECORD = _FOLDER / "_build.json"
_PARTS = {"cpu": "compiled part", "cuda": "CUDA part"}

native: Native | None = None
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


def built_with() -> str:
    """Compiler and torch version of the build, as its record has them."""
    return json.loads(_RECORD.read_text())["built with"]


def _load() -> None:
    global native, cpu_unavailable
    if not _OPS.exists():
        cpu_unavailable = absent("cpu")
        return
    try:
        kernels = Native(_FOLDER / "libfastfusion_cpu.so")
        torch.ops.load_library(_OPS)
    except (AttributeError, OSError, RuntimeError) as error:
        cpu_unavailable = f"its library does not load: {error}"
        warnings.warn(f"fastfusion: CPU kernels disabled, {cpu_unavailable}", stacklevel=2)
        return
    try:
        kernels.select_isa()
    except ValueError as error:  # asked for by name, so no silent second choice
        raise ValueError(f"environment variable FASTFUSION_CPU_ISA: {error}") from None
    native = kernels


_load()
