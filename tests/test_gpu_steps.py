"""The steps of `make gpu` that check, without a GPU: what is read from logs, and the smoke test."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from fastfusion.benchmarks.gpu import cells as cuda_cells
from fastfusion.benchmarks.gpu import checks as gpu_checks
from fastfusion.benchmarks.gpu import sanitize
from fastfusion.benchmarks.gpu.checks import Finished

LOG = """
[gw1] [  1%] PASSED tests/a.py::test_one[x]
[gw0] [  2%] FAILED tests/a.py::test_two
[gw1] [  2%] SKIPPED tests/a.py::test_three
tests/b.py::test_four PASSED                                [ 50%]
[gw0] [  3%] PASSED tests/b.py::test_five
"""


def test_tests_that_are_cut_off_keep_what_they_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], log: Path, seconds: float, environment: Any = None) -> Finished:
        assert environment["CUBLAS_WORKSPACE_CONFIG"] and "-vv" in command
        assert log == tmp_path / "checks.log"
        return Finished(None, LOG, seconds)

    monkeypatch.setattr(gpu_checks, "run", run)
    monkeypatch.setattr(gpu_checks, "ROOT", Path(__file__).parent.parent)
    outcome = gpu_checks.run_tests(tmp_path, True, 10.0)
    assert outcome.status == "failed"
    assert outcome.summary == "out of time after 10 s: 2 passed, 1 failed so far"
    assert outcome.facts["failed"] == ["tests/a.py::test_two"]
    assert "tests/a.py::test_two" in capsys.readouterr().out


def test_the_smoke_test_ends_with_a_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], log: Path, seconds: float, environment: Any = None) -> Finished:
        assert command[-1] == "--smoke"
        return Finished(1, "WRONG  attention\n7 right, 1 wrong\n", 9.0)

    monkeypatch.setattr(gpu_checks, "run", run)
    outcome = gpu_checks.run_smoke(tmp_path)
    assert str(outcome) == "failed    smoke: 7 right, 1 wrong (9 s)"


def test_each_call_has_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU, so on another backend; the calls and the check are the same."""
    with torch.device("cpu"):
        assert sanitize.main(["--smoke"], "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "8 right, 0 wrong"
    assert len(lines) == 9 and all(line.startswith("ok  ") for line in lines[:-1])
    monkeypatch.setattr(sanitize, "check", lambda *_: "triton: far off")
    assert sanitize.main(["--backend", "cuda"], "cpu") == 1
    output = capsys.readouterr().out
    assert "WRONG  attention torch.float16 forward {" in output
    assert output.splitlines()[-1] == "0 right, 28 wrong"


def test_compiling_beforehand_leaves_errors_to_the_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such kernel")

    job = cuda_cells.plan(["attention"], ["bfloat16"], [True], "vit_b16")[0]
    monkeypatch.setattr(cuda_cells.ff, "scaled_dot_product_attention", fail)
    inputs = cuda_cells.ops.spec("scaled_dot_product_attention").inputs

    class Spec:
        @staticmethod
        def inputs(shape: Any, dtype: Any, device: str, seed: int) -> Any:
            return inputs(shape, dtype, "cpu", seed)

    monkeypatch.setattr(cuda_cells.ops, "spec", lambda name: Spec)
    cuda_cells._launch(job)


def test_compiling_beforehand_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than a worker takes to import torch; none is left then."""
    monkeypatch.setattr(cuda_cells, "WARM_SECONDS", 0.2)
    cuda_cells.warm(cuda_cells.plan(["block"], ["bfloat16"], [False], None))
    assert multiprocessing.active_children() == []
