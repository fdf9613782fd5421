"""The checkout around the tests, for those that look at more of it than the installed package.

All others also run where the tests lie alone, beside a package that pip installed.
"""

import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# `--cxx` of pytest: what compiles the C++ checks, where that is not what setup.py finds. $CXX would
# also be torch.compile's compiler, which wants OpenMP beside it.
cxx: str | None = None


def need(*names: str) -> None:
    """Skips the module, or the test, that reads files which are not there."""
    missing = [name for name in names if not (ROOT / name).exists()]
    if missing:
        reason = f"is about a checkout; here is no {', '.join(missing)}"
        pytest.skip(reason, allow_module_level=True)


def need_library(name: str) -> Any:
    """A library that `make test` installs for the integrations; elsewhere the module is skipped
    where it is missing."""
    if (Path(sys.prefix) / "integrations.stamp").exists():
        return import_module(name)
    return pytest.importorskip(name)


def build_script() -> dict[str, Any]:
    """The names of setup.py; skips like `need`."""
    need("setup.py", "csrc")
    names = runpy.run_path(str(ROOT / "setup.py"), run_name="flags")
    if cxx is not None:
        names["find_compiler"] = lambda: shlex.split(str(cxx))
    return names
