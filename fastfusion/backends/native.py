"""The CPU kernels' library by ctypes: what it is, what this machine runs, which set is chosen.

Calls of kernels go through torch's ops. These facts need neither torch nor Python's C interface,
which is why one build serves every Python.
"""

import ctypes
import os
from ctypes import c_bool, c_char_p, c_double, c_int, c_int64
from pathlib import Path
from typing import Any

# csrc/cpu/facts.cpp: result, arguments.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ff_isa": (c_char_p,),
    "ff_lanes": (c_int,),
    "ff_cpu_features": (c_char_p,),
    "ff_compiled_isa": (c_char_p, c_int),
    "ff_supported_isa": (c_bool, c_int),
    "ff_select_isa": (c_char_p, c_char_p),
    "ff_attention_path": (
        c_char_p, c_char_p, c_int64, c_int64, c_bool, c_bool, ctypes.POINTER(c_int64),
    ),
    "ff_peak_operations": (c_double, c_char_p, c_int64),
}  # fmt: skip


class Native:
    """The library at a path.

    Raises:
        OSError: it does not load.
        AttributeError: it is of another version.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library: Any = library

    def isa(self) -> str:
        """The instruction set in use."""
        return self._library.ff_isa().decode()

    def lanes(self) -> int:
        """float32 values in a register of it."""
        return self._library.ff_lanes()

    def cpu_features(self) -> list[str]:
        """Instruction-set extensions of this machine."""
        return self._library.ff_cpu_features().decode().split()

    def isas(self, runnable: bool = False) -> list[str]:
        """The instruction sets that are compiled in, best first; only those that this machine runs
        if `runnable`."""
        names: list[str] = []
        index = 0
        while (name := self._library.ff_compiled_isa(index)) is not None:
            if not runnable or self._library.ff_supported_isa(index):
                names.append(name.decode())
            index += 1
        return names

    def select_isa(self, name: str = "") -> str:
        """Use an instruction set for all calls from now on; by default the one that
        FASTFUSION_CPU_ISA names, else the best. Returns its name.

        Raises:
            ValueError: it cannot be used.
        """
        wanted = name or os.environ.get("FASTFUSION_CPU_ISA", "")
        reason = self._library.ff_select_isa(os.fsencode(wanted))
        if reason is not None:
            raise ValueError(
                f"instruction set {wanted!r}: {reason.decode()}; usable here: "
                f"{' '.join(self.isas(runnable=True))}"
            )
        return self.isa()

    def attention_path(
        self, dtype: str, q_len: int, kv_len: int = 0, causal: bool = False, dropout: bool = False
    ) -> str:
        """How attention of these would run, in words."""
        pieces = c_int64()
        path = self._library.ff_attention_path(
            dtype.encode(), q_len, kv_len, causal, dropout, ctypes.byref(pieces)
        ).decode()
        return path if pieces.value == 1 else f"{path}, keys in {pieces.value} pieces"

    def peak_operations(self, dtype: str, rounds: int) -> float:
        """Multiplies and adds in the arithmetic that a dtype is computed in, and does nothing else;
        returns the number of operations."""
        return self._library.ff_peak_operations(dtype.encode(), rounds)
