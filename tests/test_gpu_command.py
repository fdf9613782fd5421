"""The command behind `make gpu`: its options, and what it writes when."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_cells import PEAKS, cell

from fastfusion.benchmarks.gpu import cells as cuda_cells
from fastfusion.benchmarks.gpu import checks as gpu_checks
from fastfusion.benchmarks.gpu import device as cuda_device
from fastfusion.benchmarks.gpu import results as cuda_results
from fastfusion.benchmarks.gpu import run as gpu
from fastfusion.benchmarks.gpu.cells import Job, Settings
from fastfusion.benchmarks.gpu.checks import Finished, Outcome
from fastfusion.benchmarks.gpu.results import Cell


def test_a_dry_run_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--quick"]) == 0
    output = capsys.readouterr().out
    assert "steps: smoke, tests, bench, sanitizer" in output
    assert "bench: 59 cells, 7 rounds, 3.5 minutes" in output
    assert "attention bfloat16 forward: lxmert_text_to_image, " in output
    assert "peer of attention: flex (left out by --quick" in output


def test_without_a_gpu_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "make gpu needs an NVIDIA GPU; torch sees none\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "tests,everything"], "--steps: unknown everything"),
        (["--steps", ","], "--steps: unknown nothing"),
        (["--dtypes", "float64"], "--dtypes: unknown float64"),
        (["--quick", "--full"], "--quick and --full exclude each other"),
        (["--minutes", "-1"], "--minutes must not be negative"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--shape", "nowhere"], "unknown shape 'nowhere'"),
        (["--shape", "bi_vqa", "--suite", "attention"], "no suite of this run has a shape bi_vqa"),
        (["--suite", "layers"], "invalid choice: 'layers'"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_bad_command_lines(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_options_are_put_in_order() -> None:
    options = gpu.parse(["--steps", "bench,tests", "--dtypes", "float32,bfloat16"])
    assert options.steps == ["tests", "bench"]
    assert options.dtypes == ["bfloat16", "float32"]
    assert options.minutes is None
    assert gpu.settings_of(options) == Settings(20, 5e-3, False, "some")
    assert gpu.settings_of(gpu.parse(["--full"])).compiled == "all"
    quick = gpu.parse(["--quick", "--minutes", "2"])
    assert (quick.minutes, quick.dtypes) == (2, ["bfloat16"])


def test_bench_prints_writes_and_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_cells, "clean_up", lambda: None)
    options = gpu.parse(["--dtypes", "bfloat16", "--direction", "forward"])

    def run(job: Job, settings: Settings) -> Cell:
        made = cell(job.shape["name"], {"sdpa": 2.0, "two sdpa": 2.0})
        made.suite, made.shape = job.suite, job.shape
        return made

    outcome = gpu.bench(options, tmp_path, {"peaks": PEAKS}, run)
    assert outcome.status == "passed"
    assert outcome.summary.startswith("31 cells, 0 without a right result of ours, 0 left out; ")
    output = capsys.readouterr().out
    assert "[31/31] block bfloat16 forward block_32_257" in output
    assert "goals, bfloat16" in output
    names = ["attention.json", "bidirectional.json", "block.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert len(cuda_results.read(tmp_path / names[0])[1]) == 22


def test_each_cell_is_written_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All dtypes and directions of a suite in one file, whatever ends the run."""
    monkeypatch.setattr(cuda_cells, "clean_up", lambda: None)
    options = gpu.parse(["--dtypes", "bfloat16,float16", "--shape", "bi_vqa"])
    kept: list[int] = []

    def run(job: Job, settings: Settings) -> Cell:
        file = tmp_path / "bidirectional.json"
        kept.append(len(cuda_results.read(file)[1]) if file.exists() else 0)
        if len(kept) == 4:
            raise SystemExit(143)
        return Cell(job.suite, job.shape, job.dtype, job.backward)

    with pytest.raises(SystemExit):
        gpu.bench(options, tmp_path, {"peaks": PEAKS}, run)
    assert kept == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["bidirectional.json"]


def test_bench_without_time_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = gpu.parse(["--quick", "--minutes", "0", "--suite", "bidirectional"])
    outcome = gpu.bench(options, tmp_path, {"peaks": PEAKS})
    assert outcome.status == "failed"
    assert "0 cells" in outcome.summary
    output = capsys.readouterr().out
    assert "left out, no time: bidirectional bfloat16 forward bi_lxmert" in output


def test_a_failing_step_is_reported_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path, quick: bool, seconds: float) -> Outcome:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test 100")
    monkeypatch.setattr(cuda_device, "describe", lambda: {"gpu": "Test 100"})
    monkeypatch.setattr(gpu_checks, "run_tests", fail)
    monkeypatch.setattr(
        gpu_checks, "run_sanitizer", lambda *_: [Outcome("memcheck", "passed", "0 errors")]
    )
    options = gpu.parse(["--steps", "tests,sanitizer", "--output", str(tmp_path)])
    assert gpu.run(options) == 1
    output = capsys.readouterr().out
    assert "failed    tests: RuntimeError: no such thing" in output
    assert "passed    memcheck: 0 errors" in output
    document = json.loads((tmp_path / "summary.json").read_text())
    assert [step["status"] for step in document["steps"]] == ["failed", "passed"]
    assert document["machine"] == {"gpu": "Test 100"}


def test_a_run_that_is_cut_off_says_in_which_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(*_: Any) -> list[Outcome]:
        raise SystemExit(143)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test 100")
    monkeypatch.setattr(cuda_device, "describe", lambda: {"gpu": "Test 100"})
    monkeypatch.setattr(gpu_checks, "run_tests", lambda *_: Outcome("tests", "passed", "9 passed"))
    monkeypatch.setattr(gpu_checks, "run_sanitizer", end)
    options = gpu.parse(["--steps", "tests,sanitizer", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.run(options)
    assert "failed    sanitizer: cut off; what was" in capsys.readouterr().out
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert [(step["step"], step["status"]) for step in steps] == [
        ("tests", "passed"),
        ("sanitizer", "failed"),
    ]


@pytest.mark.parametrize(("code", "status"), [(0, "passed"), (1, "failed"), (None, "failed")])
def test_tuning_has_a_time_limit_and_a_file(
    code: int | None, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], log: Path, seconds: float, environment: Any = None) -> Finished:
        commands.append(command)
        return Finished(code, "the end", seconds)

    monkeypatch.setattr(gpu_checks, "run", run)
    options = gpu.parse(["--quick", "--steps", "tune", "--output", str(tmp_path)])
    (outcome,) = gpu.run_step("tune", options, tmp_path)
    assert outcome.status == status
    options.output = None
    gpu.run_step("tune", options, tmp_path)
    quick = ["--quick", "--minutes", "3.60"]
    assert commands[0][3:] == [*quick, "--output", str(tmp_path / "tuned.json")]
    assert commands[1][3:] == quick
