"""`make gpu` from end to end on a device that tests/rehearsal/sitecustomize.py fakes.

Every step is entered, every child process really starts, and every file is really written. A device
that an illegal access has broken, and a run that is cut off, are among it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT, need
from suite import DEVICE

import fastfusion as ff
from fastfusion.benchmarks.gpu import checks as gpu_checks
from fastfusion.benchmarks.gpu import results as cuda_results

need("benchmarks", "tests/rehearsal")
pytest.importorskip("triton")
pytest.importorskip("xdist")
pytestmark = pytest.mark.skipif(
    DEVICE != "cpu" or ff.backends.cuda.emulated is None,
    reason="rehearses on a CPU, in the emulator",
)
PATIENCE = 300.0  # seconds, many times what a busy machine takes


def start(folder: Path, tools: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command, with the device, on two rounds."""
    tools.mkdir(exist_ok=True)
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "PYTHONPATH": str(ROOT / "tests/rehearsal"),
        "REHEARSAL_TOOLS": str(tools),
        "REHEARSAL_EMULATED": str(ff.backends.cuda.emulated),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "fastfusion.benchmarks.gpu", "--quick", "--rounds", "2"]
    return subprocess.Popen(
        [*command, "--output", str(folder), *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def steps(folder: Path) -> dict[str, dict[str, Any]]:
    """What the summary says of each step."""
    found = json.loads((folder / "summary.json").read_text())["steps"]
    return {step["step"]: step for step in found}


def test_every_step_on_a_device_that_one_test_breaks(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    run = start(folder, tmp_path / "tools")
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 1, output

    found = steps(folder)
    assert {name: step["status"] for name, step in found.items()} == {
        "smoke": "passed",
        "tests": "failed",
        "bench": "passed",
        "plots": "passed",
        "sanitizer": "left out",
    }, output
    assert found["smoke"]["summary"] == "10 right, 0 wrong"
    # The worker that ran it has ended, and the tests behind it ran in another one.
    assert found["tests"]["summary"] == "16 passed, 1 failed, 0 skipped"
    (failed,) = found["tests"]["facts"]["failed"]
    assert "test_with_an_illegal_access" in failed and "crashed" in failed
    assert found["sanitizer"]["summary"] == "compute-sanitizer is not installed"
    assert "compiled what 5 cells launch" in output
    assert "5 cells, 0 without a right result of ours, 0 left out" in output
    assert "goals, bfloat16" in output

    suites = {"attention": [False, True], "bidirectional": [False, True], "block": [False]}
    for suite, directions in suites.items():
        machine, cells = cuda_results.read(folder / f"{suite}.json")
        assert machine["gpu"] == "Rehearsal 100"
        assert [cell.backward for cell in cells] == directions
        assert all("fastfusion" in cell.times["graph"] for cell in cells), output
    names = {"attention.json", "bidirectional.json", "block.json"}
    names |= {"checks.log", "summary.json", "times.png"}
    assert {path.name for path in folder.iterdir()} == names  # with tuned.json 7

    # Were the tests cut off, their log would say as much.
    log = (folder / "checks.log").read_text()
    lines = gpu_checks.read_lines(log)
    assert (lines["passed"], len(lines["failed"])) == (16, 1)
    assert "10 right, 0 wrong" in log


def test_a_run_that_is_cut_off_keeps_what_is_done_and_leaves_nothing_running(
    tmp_path: Path,
) -> None:
    folder, tools, number = tmp_path / "results", tmp_path / "tools", tmp_path / "number"
    tools.mkdir()
    tool = tools / "compute-sanitizer"
    lines = ("#!/bin/sh", "sleep 600 &", f"echo $! >{number}.new", f"mv {number}.new {number}")
    tool.write_text("\n".join([*lines, "wait"]))
    tool.chmod(0o755)
    run = start(folder, tools, "--steps", "bench,sanitizer", "--suite", "block")
    try:
        end = time.monotonic() + PATIENCE
        while not number.exists() and run.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        output, _ = run.communicate(timeout=PATIENCE)
    finally:
        run.kill()
    assert run.returncode == 143, output
    found = steps(folder)
    assert {name: step["status"] for name, step in found.items()} == {
        "bench": "passed",
        "plots": "passed",
        "sanitizer": "failed",
    }, output
    assert found["sanitizer"]["summary"].startswith("cut off")
    assert len(cuda_results.read(folder / "block.json")[1]) == 1
    names = {"block.json", "checks.log", "summary.json", "times.png"}
    assert {path.name for path in folder.iterdir()} == names
    # What the step's process had started went with it; init may take a moment to bury it.
    process = Path("/proc") / number.read_text().strip() / "stat"
    while time.monotonic() < end and process.exists() and " Z " not in process.read_text():
        time.sleep(0.05)
    assert not process.exists() or " Z " in process.read_text()
