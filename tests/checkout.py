"""The checkout around the tests, for those that look at more of it than the installed package.

All others also run where the tests lie alone, beside a package that pip installed.
"""

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def need(*names: str) -> None:
    """Skips the module, or the test, that reads files which are not there."""
    missing = [name for name in names if not (ROOT / name).exists()]
    if missing:
        reason = f"is about a checkout; here is no {', '.join(missing)}"
        pytest.skip(reason, allow_module_level=True)


def build_script() -> dict[str, Any]:
    """The names of setup.py; skips like `need`."""
    need("setup.py", "csrc")
    return runpy.run_path(str(ROOT / "setup.py"), run_name="flags")
