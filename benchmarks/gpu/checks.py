"""The steps of `make gpu` that check: a smoke test, the test suite and compute-sanitizer.

Each runs in a process of its own with a time limit, so that one that hangs or crashes costs its own
result only. All that these processes say goes into one file of the results' folder.
"""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("pytest", "hypothesis")
# What runs kernels on a device, in the order in which it finds faults.
QUICK_TESTS = (
    "tests/ops/test_bidirectional_attention.py",
    "tests/ops/test_scaled_dot_product_attention.py",
    "tests/ops/test_varlen_attention.py",
    "tests/ops/test_arguments.py",
    *("tests/kernels/test_tma.py", "tests/kernels/test_ops.py", "tests/kernels/test_plan.py"),
    "tests/kernels/test_attention_backward_short.py",
    *("tests/kernels/test_linear.py", "tests/kernels/test_norm.py", "tests/nn/test_fused.py"),
    *("tests/test_cuda.py", "tests/test_cuda_block.py", "tests/test_cuda_graph_device.py"),
)
# Left out by pytest's -k: the reference, and random shapes, which build for minutes on one worker.
QUICK_ONLY = "not reference and not any_shape and not finite_scale"
# For torch.use_deterministic_algorithms beside cuBLAS; the interpreter is chosen by a variable,
# since pytest's workers do not see the command line.
TEST_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
SMOKE_SECONDS = 90.0
PROGRESS_SECONDS = 20.0
LOG = "checks.log"
TAIL_LINES = 40
SANITIZER_TOOLS = ("memcheck", "racecheck")
FOUND = 86  # what compute-sanitizer returns where it found something


@dataclass
class Outcome:
    """What became of a step.

    Attributes:
        status: "passed", "failed" or "left out".
        summary: one line.
        facts: more of it, for the JSON.
    """

    step: str
    status: str
    summary: str
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status:<9} {self.step}: {self.summary} ({self.seconds:.0f} s)"

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Finished:
    """A process that has ended: its exit code (None: out of time), and what it said."""

    code: int | None
    output: str
    seconds: float

    @property
    def tail(self) -> str:
        """The end of what it said."""
        return "".join(self.output.splitlines(keepends=True)[-TAIL_LINES:])


def run(
    command: list[str], log: Path, seconds: float, environment: dict[str, str] | None = None
) -> Finished:
    """Runs a command in the repository, its output to the end of a file, and says how far it is."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n$ {shlex.join(command)}\n".encode())
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = _wait(process, log, begin, start, seconds)
        finally:
            if process.poll() is None:
                # Its own session, so that the workers that it started go with it.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Finished(code, _since(log, begin), time.monotonic() - start)


def _wait(
    process: subprocess.Popen[bytes], log: Path, begin: int, start: float, seconds: float
) -> int | None:
    """The exit code, None where the time is up; the last line of the log now and then."""
    while (left := start + seconds - time.monotonic()) > 0:
        try:
            return process.wait(timeout=min(left, PROGRESS_SECONDS))
        except subprocess.TimeoutExpired:
            took = time.monotonic() - start
            print(f"  {took:.0f} s: {_last_line(_since(log, begin))[-100:]}", flush=True)
    return None


def _since(log: Path, begin: int) -> str:
    """What stands in a file behind so many bytes."""
    with log.open("rb") as file:
        file.seek(begin)
        return file.read().decode(errors="replace")


# ---- tests


def test_command(quick: bool, report: Path, workers: int) -> list[str]:
    """pytest on the device, a line per test; quick: what runs the kernels of the device."""
    command = [sys.executable, "-m", "pytest", "--device", "cuda", f"--junitxml={report}"]
    # Twice, against the -q of pyproject.toml: a run that is cut off has names in its log.
    command += ["-vv", "--tb=short", "--show-capture=no", "-p", "no:benchmark"]
    command += ["-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None and workers > 1:
        command += ["-n", str(workers)]
    if quick:
        command += [place for place in QUICK_TESTS if (ROOT / place).exists()]
        command += ["-k", QUICK_ONLY]
    return command


def test_workers() -> int:
    """Processes that share the device: kernels compile on the cores, and a context costs 0.6 GB."""
    return max(1, min(16, (os.cpu_count() or 1) - 1))


def read_lines(output: str) -> dict[str, Any]:
    """Counts and failures of the tests that a run which was cut off has finished."""
    found = re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED) (\S+)", output)
    outcomes = {name: outcome for outcome, name in found}
    counts = {word: list(outcomes.values()).count(word) for word in ("PASSED", "SKIPPED")}
    failed = sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
    return {"passed": counts["PASSED"], "skipped": counts["SKIPPED"], "failed": failed}


def read_junit(report: Path) -> dict[str, Any]:
    """Counts and the names of failures of a JUnit file."""
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    failed: list[str] = []
    reasons: dict[str, int] = {}
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
        for case in suite.iter("testcase"):
            for child in case:
                if child.tag in ("failure", "error"):
                    message = (child.get("message") or "").partition("\n")[0][:200]
                    failed.append(f"{case.get('classname')}::{case.get('name')}: {message}")
                elif child.tag == "skipped":
                    why = (child.get("message") or "").partition("\n")[0][:200]
                    reasons[why] = reasons.get(why, 0) + 1
    return {**counts, "failed": failed, "skip reasons": reasons}


def run_tests(folder: Path, quick: bool, seconds: float) -> Outcome:
    """The suite with `--device cuda`."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return Outcome("tests", "left out", f"{' and '.join(absent)} not installed")
    if not (ROOT / "tests/conftest.py").exists():
        return Outcome("tests", "left out", "the tests are not installed; run in a checkout")
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "tests.xml"
        command = test_command(quick, report, test_workers())
        finished = run(command, folder / LOG, seconds, TEST_ENVIRONMENT)
        facts: dict[str, Any] = {"command": " ".join(command[1:]), "exit code": finished.code}
        if report.exists():
            facts |= read_junit(report)
    if finished.code is None:
        facts |= read_lines(finished.output)
        summary = (
            f"out of time after {seconds:.0f} s: {facts['passed']} passed, "
            f"{len(facts['failed'])} failed so far"
        )
        for name in facts["failed"][:20]:
            print(f"  {name}")
    elif "tests" in facts:
        bad = facts["failures"] + facts["errors"]
        passed = facts["tests"] - bad - facts["skipped"]
        summary = f"{passed} passed, {bad} failed, {facts['skipped']} skipped"
        for line in facts["failed"][:20]:
            print(f"  {line}")
    else:
        summary = f"pytest ended with {finished.code}: {_last_line(finished.tail)}"
    status = "passed" if finished.code == 0 else "failed"
    return Outcome("tests", status, summary, finished.seconds, facts)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


# ---- the smoke test


def run_smoke(folder: Path) -> Outcome:
    """A few calls on each backend, forward and backward, and one CUDA graph: is this worth more?"""
    command = [sys.executable, "-m", "fastfusion.benchmarks.gpu.sanitize", "--smoke"]
    finished = run(command, folder / LOG, SMOKE_SECONDS, {"OMP_NUM_THREADS": "1"})
    print(finished.tail, end="")
    summary = "out of time" if finished.code is None else _last_line(finished.tail)
    status = "passed" if finished.code == 0 else "failed"
    return Outcome("smoke", status, summary, finished.seconds)


# ---- compute-sanitizer


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH, or in the toolkit's usual place."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [f"{home}/{where}" for home in homes if home for where in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )


def sanitizer_verdict(finished: Finished) -> tuple[str, str]:
    """Status and summary of one tool, from its exit code and what it said."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", finished.output)
    if finished.code is None:
        if re.search(r"^=+ (?:Invalid|Error: Race)", finished.output, re.MULTILINE):
            return "failed", "errors, then out of time"
        return "left out", "out of time, nothing found before"
    if not summaries:
        unable = re.search(r".*(?:not supported|Unable to|Failed to|Error:).*", finished.tail)
        why = unable.group().strip("= ") if unable else _last_line(finished.tail)
        return "left out", f"it cannot run here: {why}"
    if finished.code == 0:
        return "passed", summaries[-1]
    if finished.code == FOUND:
        return "failed", summaries[-1]
    return "failed", f"the calls failed with {finished.code}: {_last_line(finished.tail)}"


def run_sanitizer(folder: Path, seconds: float) -> list[Outcome]:
    """Every op once under each tool, forward and backward, at sizes that no tile divides."""
    tool = find_sanitizer()
    if tool is None:
        return [Outcome("sanitizer", "left out", "compute-sanitizer is not installed")]
    outcomes = []
    runs = [(name, backend) for backend in ("cuda", "triton") for name in SANITIZER_TOOLS]
    for name, backend in runs:
        command = [
            *(tool, "--tool", name, "--error-exitcode", str(FOUND), "--print-limit", "20"),
            *(sys.executable, "-m", "fastfusion.benchmarks.gpu.sanitize", "--backend", backend),
        ]
        # Without torch's cache every tensor is an allocation of its own, so that an access past
        # the end of one is seen.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
        step = f"{name} {backend}"
        finished = run(command, folder / LOG, seconds / len(runs), environment)
        status, summary = sanitizer_verdict(finished)
        outcomes.append(Outcome(step, status, summary, finished.seconds))
        print(outcomes[-1], flush=True)
    return outcomes
