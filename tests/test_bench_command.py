"""The benchmark tool's command line, its comparisons, reports and pictures."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastfusion.backends import library
from fastfusion.benchmarks.__main__ import main
from fastfusion.benchmarks.common.results import Goal
from fastfusion.benchmarks.common.timing import Spread
from fastfusion.benchmarks.cpu import cells as ops
from fastfusion.benchmarks.cpu import check, compare, plots, report, results
from fastfusion.benchmarks.cpu.command import only_suite, parse
from fastfusion.benchmarks.cpu.results import Row

SMALL = ["--shape", "lxmert_text_to_image", "--rounds", "1", "--quick", "--peers", "sdpa,unfused"]


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    """The command sets torch's threads; other tests of this process keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def row(name: str, ratio: float, spread: float = 0.0) -> Row:
    made = Row("attention", {"name": name}, "float32", False)
    made.times["fastfusion"] = Spread(1e-5, 1e-5, 1e-5)
    made.ratios["sdpa"] = Spread(ratio, ratio - spread, ratio + spread)
    return made


# ---- the command


def test_nothing_is_written_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(SMALL) == 0
    assert not list(tmp_path.iterdir())
    assert "lxmert_text_to_image" in capsys.readouterr().out


def test_a_picture_is_drawn_from_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, picture = tmp_path / "a.json", tmp_path / "a.png"
    assert main([*SMALL, "--json", str(source)]) == 0
    assert plots.main([str(picture), str(source), str(source)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plots.main([str(tmp_path), str(source)]) == 0
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "a.png", "attention-float32.png", "roofline.png",
    }  # fmt: skip
    assert plots.main([str(picture), str(tmp_path / "none.json")]) == 2
    assert "no file" in capsys.readouterr().err


def test_json_holds_everything(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    assert main([*SMALL, "--dtype", "bfloat16", "--backward", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["machine"]["torch"] == str(torch.__version__)
    assert document["machine"]["threads"] == 1
    assert {"cpu", "cores", "commit", "taken"} <= set(document["machine"])
    assert document["settings"]["suites"] == ["attention"]
    (only,) = document["rows"]
    assert only["dtype"] == "bfloat16"
    assert only["backward"]
    assert only["shape"]["heads"] == 12
    assert len(only["samples"]["fastfusion"]) == 1
    assert only["times"]["sdpa"]["median"] == only["samples"]["sdpa"][0]
    assert only["ratios"]["sdpa"]["median"] > 0


def test_the_last_line_says_all_in_one(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--q", "5", "--k", "7", "--heads", "2", "--rounds", "1", "--quick"]
    assert main([*own, "--peers", "sdpa"]) == 0
    printed = capsys.readouterr().out.splitlines()
    share = r", \d+ % of this machine's peak" * (library.native is not None)
    assert re.fullmatch(rf"your shape: \d+\.\dx torch's SDPA{share}", printed[-1])

    first, second, stock = row("a", 2.0), row("b", 8.0), row("c", 4.0)
    stock.ratios = {"torch.nn": stock.ratios["sdpa"]}
    first.share, second.share, stock.share = 0.5, 0.7, None
    line = results.summary([first, second], "2 shapes")
    assert line == (
        "2 shapes: 4.0x torch's SDPA (geometric mean), 60 % of this machine's peak (median)"
    )
    assert results.summary([first, stock], "2 shapes") == (
        "2 shapes: 2.8x stock torch (geometric mean), 50 % of this machine's peak"
    )
    stock.ratios = {"mine": stock.ratios["torch.nn"]}
    assert results.summary([stock], "your module") == "your module: 4.0x mine"
    stock.times = {}
    assert results.summary([stock], "your module") is None, "ours was wrong"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "nowhere"], "unknown shape 'nowhere'; choose from lxmert_text_to_image, "),
        (["--peers", "sdpa,cudnn"], "unknown peer 'cudnn'; choose from sdpa, unfused, "),
        (["--q", "3"], "a shape of your own needs --q and --k"),
        (["--q", "3", "--k", "0"], "kv_len must be at least 1, got 0"),
        (["--q", "3", "--k", "5", "--mask", "odd"], "--mask must be one of key_padding, bool, "),
        (["--q", "3", "--k", "5", "--heads", "3", "--kv-heads", "2"], "a multiple of --kv-heads=2"),
        (["layers", "--q", "3", "--k", "5"], "suite layers takes no shape of your own"),
        (["bidirectional", "--q", "3", "--k", "5", "--causal"], "takes neither --causal nor"),
        (["--shape", "vit_b16", "--q", "3", "--k", "5"], "exclude each other"),
        (["--model", "a:b"], "--model, --against and --inputs belong together"),
        (["--model", "a", "--against", "b", "--inputs", "1x2"], "'a' is not MODULE:FACTORY"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU; leave it out to time"),
        (["--plots", "/nonexistent"], "--plots: there is no folder /nonexistent"),
        (["layers", "--shape", "vit_b16"], "suite layers has no shape vit_b16"),
        (["overhead", "--shape", "vit_b16"], "suite overhead has no shape vit_b16"),
        (["--dtype", "float8"], "'float32', 'bfloat16', 'float16', 'float64'"),
        (
            ["everything"],
            "'overhead', 'attention', 'bidirectional', 'lengths', 'kinds', 'linear', ",
        ),
        (["attention", "--dtype", "int8"], "--dtype int8 is for linear, layers, models, not for"),
        (["--dtype", "bf16w", "--q", "3", "--k", "5"], "for linear, layers, models, not for atten"),
        (["layers", "--dtype", "int8", "--backward"], "is for inference, without --backward"),
        (["layers", "--dtype", "int8", "--device", "cuda"], "--dtype int8 is for the CPU"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--threads", "1,two"], "--threads must be at least 1, got 1,two"),
        (["--json", "/nonexistent/file.json"], "there is no folder /nonexistent"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_bad_command_lines(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("dtype", ["int8", "bf16w"])
def test_narrow_weights_say_how_they_are_judged(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse(["--dtype", dtype]).suites == ["linear", "layers", "models"]
    file = tmp_path / "result.json"
    tiny = ["--shape", "fusion_64", "--rounds", "1", "--quick", "--peers", "torch.nn"]
    outputs = ["--json", str(file), "--plots", str(tmp_path)]
    assert main(["layers", "--dtype", dtype, *tiny, *outputs]) == 0
    printed = capsys.readouterr().out
    assert f"layers, {dtype}, forward, inputs float32" in printed
    assert "a cosine of 0.999 of each token" in printed
    assert "4/4 " in printed and ", cosine >= 0.9999" in printed
    (only,) = json.loads(file.read_text())["rows"]
    assert only["dtype"] == dtype and only["share"] > 0
    assert only["cosines"]["fastfusion"] >= 0.999
    assert (tmp_path / "roofline.png").is_file()


def test_goals_of_layers_are_asked_for_by_name() -> None:
    assert "layer-goals" not in parse([]).suites
    assert parse(["layer-goals"]).suites == ["layer-goals"]


def test_more_threads_run_pinned_in_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[list[str], dict[str, str]]] = []

    class Process:
        """Leaves the results of a run with one row."""

        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            seen.append((command, env))
            made = row("a", 2.0)
            made.threads = int(env["OMP_NUM_THREADS"])
            document = results.document({"cpu": "x"}, {}, {}, [made], {})
            results.write(Path(command[-1]), document)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    file = tmp_path / "all.json"
    assert main([*SMALL, "--threads", "1,2", "--json", str(file)]) == 0
    assert [command[3:-3] for command, _ in seen] == [[*SMALL, "--threads"]] * 2
    expected = {"OMP_NUM_THREADS": "2", "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    assert expected.items() <= seen[1][1].items()
    assert [made["threads"] for made in results.read(file)["rows"]] == [1, 2]


def test_interrupt_keeps_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, calls = ops.measure, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(ops, "measure", interrupted)
    file = tmp_path / "result.json"
    quick = ["attention", "--quick", "--rounds", "1", "--peers", "sdpa"]
    assert main([*quick, "--json", str(file)]) == 130
    assert "lxmert_text_to_image" in capsys.readouterr().out
    assert len(json.loads(file.read_text())["rows"]) == 1


def test_the_command_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fastfusion", "bench", *SMALL]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "lxmert_text_to_image" in result.stdout


# ---- shapes and modules of one's own


def test_a_shape_of_your_own(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--q", "5", "--k", "7", "--heads", "4", "--kv-heads", "2", "--dim", "8", "--causal"]
    options = parse(["attention", *own])
    assert options.own == {
        "name": "5x7", "batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "value_dim": 8,
        "q_len": 5, "kv_len": 7, "mask": None, "causal": True,
    }  # fmt: skip
    assert main([*own, "--rounds", "1", "--quick", "--peers", "sdpa"]) == 0
    assert "5x7" in capsys.readouterr().out


MODULES = """
from torch import nn
import fastfusion.nn

def linear(): return nn.Linear(16, 16)
def stock(): return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
def ours(): return fastfusion.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
def wrong(): return nn.Sequential(stock(), nn.LayerNorm(16, elementwise_affine=False), nn.ReLU())
def number(): return 3
"""


@pytest.mark.parametrize("backward", [[], ["--backward"]], ids=["forward", "backward"])
def test_modules_of_your_own(
    backward: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "my_modules.py").write_text(MODULES)
    monkeypatch.chdir(tmp_path)
    common = ["--inputs", "2x4x16", "--rounds", "1", "--quick", *backward]
    names = ["--model", "my_modules:ours", "--against"]
    assert main([*names, "my_modules:stock", *common]) == 0
    assert "my_modules:stock: geometric mean" in capsys.readouterr().out
    if not backward:
        assert main([*names, "my_modules:wrong", *common]) == 1
        assert "WRONG" in capsys.readouterr().out
        assert main([*names, "my_modules:stock", *common, "--dtype", "int8"]) == 0
        assert "cosine >= 0.99" in capsys.readouterr().out
        linear = ["--model", "my_modules:linear", "--against", "my_modules:linear"]
        assert main([*linear, *common, "--dtype", "int8"]) == 2
        assert "torch.nn.Linear, which is not quantised in place" in capsys.readouterr().err
    assert main([*names, "my_modules:number", *common]) == 2
    assert "my_modules:number returned int, not a module" in capsys.readouterr().err
    assert main([*names, "my_modules:nothing", *common]) == 2
    assert main([*names, "my_modules:stock", "--inputs", "2xx"]) == 2


# ---- comparisons and reports


def document_of(*rows: Row) -> dict[str, Any]:
    machine = {"cpu": "x", "commit": "abc", "torch": "2", "fastfusion": "0"}
    made = results.document(machine, {"dtype": "float32"}, {}, list(rows), {"g": [Goal("n", 1, 2)]})
    return json.loads(json.dumps(made))


def test_only_what_is_beyond_noise_has_moved() -> None:
    before = document_of(row("same", 2.0, 0.1), row("slower", 2.0, 0.1), row("gone", 1.0))
    now = document_of(row("same", 2.05, 0.1), row("slower", 1.0, 0.1), row("new", 1.0))
    found = {change.cell: change for change in compare.changes(before, now)}
    assert {cell: change.moved for cell, change in found.items()} == {
        "attention, same, float32": False,
        "attention, slower, float32": True,
    }
    text = compare.report(before, now)
    assert "2 cell(s), 1 moved beyond noise" in text
    assert "attention, slower, float32: 0.50x as fast as before, slower; sdpa 2.00 -> 1.00" in text
    assert check.worst(list(found.values())) == (2.0, "attention, slower, float32")


def test_compare_with_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "before.json"
    assert main([*SMALL, "--json", str(file)]) == 0
    assert main([*SMALL, "--compare", str(file)]) == 0
    assert "1 cell(s), " in capsys.readouterr().out
    file.write_text("[]")
    assert main([*SMALL, "--compare", str(file)]) == 2
    assert "holds no results of this tool" in capsys.readouterr().err
    assert main([*SMALL, "--compare", "no-such-revision"]) == 2
    assert "--compare no-such-revision: " in capsys.readouterr().err


def test_a_compared_revision_runs_the_same_suite() -> None:
    argv = ["attention", "--json", "a", "--compare", "HEAD", "--quick", "--threads=2", "--html=x"]
    assert only_suite(argv) == ["attention", "--quick"]


def test_a_report_stands_alone(tmp_path: Path) -> None:
    file, page = tmp_path / "r.json", tmp_path / "r.html"
    arguments = ["--json", str(file), "--html", str(page), "--plots", str(tmp_path)]
    assert main([*SMALL, *arguments]) == 0
    text = page.read_text()
    assert "lxmert_text_to_image" in text and "data:image/png;base64," in text
    assert "http" not in text and "<script" not in text
    made = {path.name for path in tmp_path.glob("*.png")}
    assert made == {"attention-float32.png", "roofline.png"}


def test_a_report_escapes_names_and_shows_losses() -> None:
    made = row("<b>", 0.5)
    made.problems["openvino"] = "ERROR: <oops>"
    text = report.page(document_of(made))
    assert "<b>" not in text and "&lt;b&gt;" in text and "&lt;oops&gt;" in text
    assert 'class="lost"' in text and "1 lost" in text


def test_pictures_of_lengths_and_threads() -> None:
    rows = []
    for suite, threads in (("lengths", 1), ("attention", 1), ("attention", 2)):
        made = row("a", 2.0)
        made.suite, made.threads = suite, threads
        made.shape["q_len"] = 16
        made.times["sdpa"] = Spread(2e-5, 2e-5, 2e-5)
        rows.append(made)
    found = plots.pictures(document_of(*rows))
    assert set(found) == {
        "lengths-float32", "attention-float32", "attention-float32-2-threads", "threads",
    }  # fmt: skip
    from matplotlib import pyplot

    for draw, some, _ in found.values():
        _, axes = pyplot.subplots()
        draw(axes, document_of(*rows), some)
        pyplot.close()
