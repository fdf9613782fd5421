"""`make gpu` and `make tune`, as far as a machine without a GPU can test them.

A clock of the CPU stands in for CUDA events and graphs; plans, gates, tables, files, plots, goals
and the choice of tiles are the real ones, on synthetic or tiny measurements.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkout import need
from gpu_cells import PEAKS, cell

import fastfusion as ff
from fastfusion.benchmarks.common import ops
from fastfusion.benchmarks.gpu import cells as cuda_cells
from fastfusion.benchmarks.gpu import checks as gpu_checks
from fastfusion.benchmarks.gpu import device as cuda_device
from fastfusion.benchmarks.gpu import peers as cuda_peers
from fastfusion.benchmarks.gpu import results as cuda_results
from fastfusion.benchmarks.gpu import sanitize
from fastfusion.benchmarks.gpu import timing as cuda_timing
from fastfusion.benchmarks.gpu.cells import Budget, Job, Settings
from fastfusion.benchmarks.gpu.checks import Finished
from fastfusion.benchmarks.gpu.results import Cell
from fastfusion.benchmarks.gpu.timing import Timed

BASE = {"name": "small", "batch": 2, "heads": 4, "q_len": 5, "kv_len": 8, "head_dim": 4}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wherever the other tests run; and without Triton's interpreter, which takes seconds."""
    ours = cuda_cells.ours

    def quick(public: Callable[..., Any], call: dict[str, Any], cell: Cell) -> dict[str, Timed]:
        found = ours(public, call, cell)
        return {name: timed for name, timed in found.items() if name != "ff triton"}

    monkeypatch.setattr(cuda_cells, "ours", quick)
    with torch.device("cpu"):
        yield


class CpuClock(cuda_timing.Clock):
    """perf_counter in place of events, and a loop in place of a graph."""

    def __init__(self) -> None:
        self.captured: list[int] = []

    def seconds(self, run: Callable[[], object], loops: int) -> float:
        start = time.perf_counter()
        for _ in repeat(None, loops):
            run()
        return time.perf_counter() - start

    cold_seconds = seconds

    def capture(self, call: Callable[[], object], copies: int) -> Callable[[], object]:
        self.captured.append(copies)

        def replay() -> None:
            for _ in repeat(None, copies):
                call()

        return replay


class ModelClock(CpuClock):
    """Every call takes the time that it names; nothing waits."""

    def seconds(self, run: Callable[[], Any], loops: int) -> float:
        return sum(float(run()) for _ in range(loops))

    cold_seconds = seconds

    def capture(self, call: Callable[[], Any], copies: int) -> Callable[[], Any]:
        self.captured.append(copies)
        taken = 0.5 * sum(call() for _ in range(copies))
        return lambda: taken


# ---- timing


def test_every_mode_is_timed_in_every_round() -> None:
    calls = {"a": Timed(lambda: 1e-3), "b": Timed(lambda: 2e-3)}
    clock = ModelClock()
    times = cuda_timing.measure(calls, 3, 1e-9, cuda_timing.MODES, clock)
    assert set(times.modes) == {"graph", "eager", "cold"}
    assert {len(s) for m in times.modes.values() for s in m.samples.values()} == {3}
    assert times.modes["eager"].time("a").median == pytest.approx(1e-3)
    assert times.modes["graph"].time("b").median == pytest.approx(1e-3)
    assert times.modes["graph"].ratio("b", "a").median == pytest.approx(2.0)
    assert times.no_graph == {}


def test_short_calls_share_one_graph() -> None:
    clock = ModelClock()
    times = cuda_timing.measure({"a": Timed(lambda: 2e-5)}, 1, 1e-9, ("graph",), clock)
    assert clock.captured == [1, 10]
    assert times.modes["graph"].time("a").median == pytest.approx(1e-5)
    assert set(times.modes) == {"graph"}
    clock = ModelClock()
    cuda_timing.measure({"a": Timed(lambda: 1e-7)}, 1, 1e-9, ("graph",), clock)
    assert clock.captured == [1, cuda_timing.MOST_COPIES]


def test_a_call_that_no_graph_takes_keeps_its_eager_time() -> None:
    class Refusing(ModelClock):
        def capture(self, call: Callable[[], Any], copies: int) -> Callable[[], Any]:
            raise RuntimeError("operation not permitted\nlong story")

    times = cuda_timing.measure({"a": Timed(lambda: 1e-3)}, 1, 1e-9, clock=Refusing())
    assert times.no_graph == {"a": "RuntimeError: operation not permitted"}
    assert set(times.modes) == {"eager"}


def test_contexts_are_entered_around_the_clock() -> None:
    active: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        active.append("in")
        yield
        active.clear()

    def call() -> float:
        assert active == ["in"]
        return 1e-3

    cuda_timing.measure({"a": Timed(call, context)}, 2, 1e-9, ("eager",), ModelClock())
    assert active == []


class FakeEvent:
    """2 ms from any event to any other."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    synchronize = record

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 2.0


def test_the_clock_reads_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls: list[int] = []
    clock = cuda_timing.Clock()
    assert clock.seconds(lambda: calls.append(1), 3) == pytest.approx(2e-3)
    clock.flush = torch.ones(8, dtype=torch.int8)
    assert clock.cold_seconds(lambda: calls.append(1), 3) == pytest.approx(6e-3)
    assert len(calls) == 6
    assert not clock.flush.any()


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds"):
        cuda_timing.measure({}, 0, 1e-3, clock=ModelClock())


# ---- peers


def test_the_reasons_of_one_backend_are_read_from_the_warnings() -> None:
    where = " (Triggered internally at sdp_utils.cpp:1.)"
    warned = [
        "Memory efficient kernel not used because:" + where,
        "Memory Efficient attention has been runtime disabled." + where,
        "Flash attention kernel not used because:" + where,
        "Flash Attention does not support non-null attn_mask." + where,
        "Expected query, key and value to be Half or BFloat16" + where + "\nmore",
        "CuDNN attention kernel not used because:" + where,
        "cuDNN attention has been runtime disabled." + where,
    ]
    assert cuda_peers.sdpa_refusal(warned, "flash attention") == (
        "Flash Attention does not support non-null attn_mask.; "
        "Expected query, key and value to be Half or BFloat16"
    )
    assert "runtime disabled" in cuda_peers.sdpa_refusal(warned, "cudnn attention")
    assert cuda_peers.sdpa_refusal([], "flash attention") == "No available kernel"


def test_peers_that_compile_are_left_out_where_time_is_short() -> None:
    peer = cuda_peers.PEERS["attention"]["flex"]
    assert "left out by --quick" in str(cuda_peers.left_out(peer, "vilt_joint", "none"))
    assert cuda_peers.left_out(peer, "vilt_joint", "some") is None
    assert "--full takes all" in str(cuda_peers.left_out(peer, "vit_b16", "some"))
    assert cuda_peers.left_out(peer, "vit_b16", "all") is None


def test_what_is_not_installed_is_said() -> None:
    peer = cuda_peers.Peer(cuda_peers.flash_attn, package="no_such_package_anywhere")
    assert (
        cuda_peers.left_out(peer, "vit_b16", "all") == "no_such_package_anywhere is not installed"
    )


def test_refusals_of_adapters_are_data() -> None:
    masked = ops.spec("scaled_dot_product_attention").inputs(
        BASE | {"mask": "key_padding"}, torch.float32, "cpu", 0
    )
    for adapter in (cuda_peers.flash_attn, cuda_peers.xformers):
        with pytest.raises(cuda_peers.Skipped, match="takes no mask in this form"):
            adapter(masked)
    causal = {**masked, "key_padding_mask": None, "is_causal": True}
    with pytest.raises(cuda_peers.Skipped, match="bottom right"):
        cuda_peers.flash_attn(causal)
    biased = {**causal, "attn_mask": torch.zeros(5, 8, requires_grad=True)}
    with pytest.raises(cuda_peers.Skipped, match="gradient of a bias"):
        cuda_peers.flex(biased)


def test_shapes_that_are_compiled_exist() -> None:
    jobs = cuda_cells.plan(list(cuda_peers.PEERS), ["bfloat16"], [False], None)
    assert {job.shape["name"] for job in jobs} >= cuda_peers.COMPILED_SHAPES


# ---- cells


def cell_of(change: dict[str, Any], suite: str = "attention", **options: Any) -> Cell:
    job = Job(suite, BASE | change, options.pop("dtype", "float32"), options.pop("backward", False))
    return cuda_cells.run_cell(job, Settings(2, 1e-6, compiled="none"), "cpu", CpuClock())


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "change",
    [{"mask": "key_padding"}, {"mask": "bias"}, {"causal": True, "kv_heads": 2}],
    ids=["key_padding", "bias", "causal_gqa"],
)
def test_a_cell_of_attention(change: dict[str, Any], backward: bool) -> None:
    cell = cell_of(change, backward=backward)
    assert "fastfusion" not in cell.problems
    assert {"fastfusion", "sdpa", "math", "unfused"} <= set(cell.times["graph"])
    assert set(cell.times["graph"]) == set(cell.times["eager"])
    assert cell.path is not None
    assert (cell.flops is None) == backward
    # The CPU has no such kernels: refusals, not problems.
    assert {"efficient", "cudnn", "flex"} <= set(cell.refused)
    best = cell.best()
    assert best is not None and cuda_results.is_peer(best[0])


SMALL_BLOCK = {"name": "small", "batch": 2, "dim": 32, "context_dim": 32, "heads": 4}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", [{"mask": "key_padding"}, {"context_dim": 24}], ids=str)
def test_a_cell_of_a_block(change: dict[str, Any], dtype: str) -> None:
    shape = {**SMALL_BLOCK, "q_len": 5, "kv_len": 8, **change}
    job = Job("block", shape, dtype, False)
    cell = cuda_cells.run_cell(job, Settings(2, 1e-6, compiled="none"), "cpu", CpuClock())
    assert cell.problems == {} and cell.path is not None
    assert {"fastfusion", "linear + sdpa", "torch.nn", "formula"} <= set(cell.times["graph"])
    assert set(cell.refused) == {"compile", "compile formula"}
    assert cell.flops is not None and cell.moved is not None


def test_the_block_that_is_a_goal_is_compiled_by_every_run() -> None:
    peer = cuda_peers.PEERS["block"]["compile"]
    assert cuda_peers.left_out(peer, "block_20_36", "none") is None
    assert cuda_peers.left_out(peer, "block_32_257", "none") is not None
    jobs = cuda_cells.plan(["block"], ["bfloat16"], [False, True], None)
    assert [job.shape["name"] for job in jobs] == ["block_20_36", "block_197_20", "block_32_257"]


@pytest.mark.parametrize("mask", [None, "both_padding"])
def test_a_cell_of_bidirectional_attention(mask: str | None) -> None:
    cell = cell_of({"mask": mask}, "bidirectional")
    assert cell.problems == {}
    assert {"fastfusion", "two sdpa", "unfused", "grounding dino"} <= set(cell.times["graph"])


def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ff.scaled_dot_product_attention

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return right(*args, **kwargs) * 1.001

    monkeypatch.setattr(ff, "scaled_dot_product_attention", wrong)
    monkeypatch.setitem(ff.ops.FUNCTIONS, wrong, ops.spec("scaled_dot_product_attention"))
    cell = cell_of({})
    assert "WRONG, so not timed" in cell.problems["fastfusion"]
    assert cell.times == {}
    assert "WRONG" in cuda_results.table([cell], PEAKS)


def test_the_plan_begins_with_what_matters() -> None:
    jobs = cuda_cells.plan(["attention", "bidirectional"], ["bfloat16", "float32"], [False], None)
    assert str(jobs[0]) == "attention bfloat16 forward lxmert_text_to_image"
    assert [job.group for job in jobs] == sorted((job.group for job in jobs), key=lambda g: g[1])
    assert len(jobs) == 2 * 28


def test_the_time_budget_stops_new_shapes_and_names_them() -> None:
    now = [0.0]
    budget = Budget(1.0, clock=lambda: now[0])
    assert budget.allows("first")
    now[0] = 61.0
    assert not budget.allows("second")
    assert budget.left_out == ["second"]
    assert Budget(None).allows("anything")


def jobs_of(*names: str) -> list[Job]:
    return [Job("attention", BASE | {"name": name}, "bfloat16", False) for name in names]


def test_a_cell_that_crashes_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(job: Job, settings: Settings) -> Cell:
        if job.shape["name"] == "bad":
            raise RuntimeError("out of memory\nstory")
        return cell(job.shape["name"], {"sdpa": 2.0})

    monkeypatch.setattr(cuda_cells, "device_works", lambda: True)
    settings = Settings(compiled="none")
    found = list(cuda_cells.run_jobs(jobs_of("bad", "good"), settings, Budget(None), run))
    assert [cell.name for _, cell in found] == ["bad", "good"]
    assert found[0][1].problems == {"fastfusion": "ERROR: RuntimeError: out of memory"}
    output = capsys.readouterr().out
    assert "[1/2] attention bfloat16 forward bad: ERROR: RuntimeError: out of memory" in output
    assert "good: 10.0 us graph, 20.0 us eager, sdpa 2.00x" in output

    monkeypatch.setattr(cuda_cells, "device_works", lambda: False)
    budget = Budget(None)
    found = list(cuda_cells.run_jobs(jobs_of("bad", "good"), settings, budget, run))
    assert len(found) == 1
    assert budget.left_out == ["attention bfloat16 forward good"]


# ---- the steps


def test_the_tests_run_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    command = gpu_checks.test_command(False, Path("out.xml"), 4)
    assert command[1:5] == ["-m", "pytest", "--device", "cuda"]
    assert command[-2:] == ["-n", "4"]
    quick = gpu_checks.test_command(True, Path("out.xml"), 1)
    assert quick[-2:] == ["-k", gpu_checks.QUICK_ONLY]
    assert set(gpu_checks.QUICK_TESTS) <= set(quick)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = gpu_checks.run_tests(Path("nowhere"), False, 1.0)
    assert (outcome.status, outcome.summary) == (
        "left out",
        "pytest and hypothesis not installed",
    )


JUNIT = """<?xml version="1.0"?><testsuites>
<testsuite tests="4" failures="1" errors="0" skipped="1">
<testcase classname="tests.a" name="one"/><testcase classname="tests.a" name="two"/>
<testcase classname="tests.a" name="bad"><failure message="assert 1 == 2&#10;more"/></testcase>
<testcase classname="tests.a" name="no"><skipped message="needs a CPU"/></testcase>
</testsuite></testsuites>"""


def test_the_summary_of_the_tests_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need("benchmarks")

    def run(command: list[str], log: Path, seconds: float, environment: Any = None) -> Finished:
        (report,) = [word for word in command if word.startswith("--junitxml=")]
        Path(report.partition("=")[2]).write_text(JUNIT)
        return Finished(1, "1 failed", 2.0)

    monkeypatch.setattr(gpu_checks, "run", run)
    outcome = gpu_checks.run_tests(tmp_path, True, 10.0)
    assert str(outcome) == "failed    tests: 2 passed, 1 failed, 1 skipped (2 s)"
    assert outcome.facts["failed"] == ["tests.a::bad: assert 1 == 2"]
    assert outcome.facts["skip reasons"] == {"needs a CPU": 1}
    assert "tests.a::bad" in capsys.readouterr().out
    json.dumps(outcome.as_json())


def test_a_process_has_a_time_limit_and_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_checks, "PROGRESS_SECONDS", 0.2)
    code = "import time; print('half way', flush=True); time.sleep(60)"
    finished = gpu_checks.run([sys.executable, "-c", code], tmp_path / "a/log", 1.0)
    assert finished.code is None
    assert finished.output == finished.tail == "half way\n"
    assert finished.seconds < 20
    assert "half way" in capsys.readouterr().out
    code = "print('x\\n' * 60); raise SystemExit(3)"
    finished = gpu_checks.run([sys.executable, "-c", code], tmp_path / "a/log", 60)
    assert finished.code == 3
    assert len(finished.output.splitlines()) == 61 and len(finished.tail.splitlines()) == 40
    log = (tmp_path / "a/log").read_text()
    assert log.count("$ ") == 2 and log.index("half way") < log.index("x\nx\n")


@pytest.mark.parametrize(
    ("code", "tail", "status", "summary"),
    [
        (0, "========= ERROR SUMMARY: 0 errors\n", "passed", "0 errors"),
        (86, "========= ERROR SUMMARY: 2 errors\n", "failed", "2 errors"),
        (86, "= RACECHECK SUMMARY: 1 hazard\n", "failed", "1 hazard"),
        (1, "wrong\n= ERROR SUMMARY: 0 errors\n", "failed", "the calls failed with 1"),
        (1, "========= Error: Device not supported\n", "left out", "Device not supported"),
        (None, "nothing", "left out", "out of time"),
        (None, "ok\n========= Invalid __shared__ read\n", "failed", "errors, then out of time"),
    ],
    ids=["clean", "errors", "hazard", "wrong", "unsupported", "time", "errors and time"],
)
def test_what_the_sanitizer_says(code: int | None, tail: str, status: str, summary: str) -> None:
    found = gpu_checks.sanitizer_verdict(Finished(code, tail, 1.0))
    assert found[0] == status
    assert summary in found[1]


def test_no_sanitizer_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_checks, "find_sanitizer", lambda: None)
    (outcome,) = gpu_checks.run_sanitizer(tmp_path, 1.0)
    assert outcome.status == "left out"
    assert outcome.summary == "compute-sanitizer is not installed"


def test_what_the_sanitizer_watches_is_right() -> None:
    """On the CPU, so on another backend; the calls and the check are the same."""
    suites = [suite for suite, *_ in sanitize.cases()]
    assert set(suites) | {"block"} == set(cuda_peers.PEERS)
    for suite, shapes in sanitize.SHAPES.items():
        assert sanitize.check(suite, shapes[0], torch.float32, False, "cpu") is None
    assert (
        sanitize.check("attention", sanitize.SHAPES["attention"][3], torch.float32, True, "cpu")
        is None
    )


# ---- the device


def test_what_is_said_about_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="Test 100", major=9, minor=0, multi_processor_count=132, total_memory=80e9
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("PATH", "")
    about = cuda_device.describe()
    assert (about["gpu"], about["capability"], about["driver"]) == ("Test 100", "9.0", None)
    assert {"torch", "triton", "commit", "taken", "cudnn"} <= set(about)
    json.dumps(about)


def test_what_the_driver_says_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '580.1, 1980'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = cuda_device.query("driver_version", "clocks.max.sm")
    assert found == {"driver_version": "580.1", "clocks.max.sm": "1980"}


def test_device_names_become_file_names() -> None:
    launch = pytest.importorskip("fastfusion.kernels.host.tiles")
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"):
        assert cuda_device.file_name(name) == launch.device_file(name)
    assert cuda_device.results_folder("NVIDIA H100").name == "nvidia-h100"
