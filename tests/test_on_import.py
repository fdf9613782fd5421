"""What importing the package imports, and what waits until others are imported."""

import importlib
import inspect
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from fastfusion.core.on_import import on_import


@pytest.mark.parametrize("collects", [True, False])
def test_imports_leave_the_garbage_collector_as_it_was(collects: bool) -> None:
    change = "enable" if collects else "disable"
    code = f"import gc; gc.{change}(); import fastfusion; assert gc.isenabled() is {collects}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_on_import_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fastfusion_waited_for.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    on_import("fastfusion_waited_for", lambda module: seen.append(module.answer))
    assert seen == []
    waited_for = importlib.import_module("fastfusion_waited_for")
    assert seen == [42]
    assert inspect.getsource(waited_for) == "answer = 42\n"
    assert isinstance(waited_for.__loader__, SourceFileLoader)
    on_import("fastfusion_waited_for", lambda module: seen.append(-module.answer))
    assert seen == [42, -42]
    monkeypatch.delitem(sys.modules, "fastfusion_waited_for")
    importlib.import_module("fastfusion_waited_for")
    assert seen == [42, -42]


def test_importing_the_package_imports_no_exporter() -> None:
    code = """
import sys, torch, fastfusion
print([m for m in sys.modules if m.endswith(".onnx")])
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert answer.stdout.strip() == "[]"
