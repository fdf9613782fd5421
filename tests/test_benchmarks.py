"""The benchmark tool: its clock, its gate, its peers, its tables and its command line."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastfusion as ff
from fastfusion.benchmarks import (
    cpu_goals,
    cpu_plot,
    gate,
    layers,
    ops,
    overhead,
    peers,
    results,
    shapes,
    timing,
)
from fastfusion.benchmarks.__main__ import main
from fastfusion.benchmarks.results import Goal, Row, Spread

SMALL = ["--shape", "lxmert_text_to_image", "--rounds", "1", "--quick"]


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    """The command sets torch's threads; other tests of this process keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- timing


def test_calls_take_turns_in_rotating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(timing, "autorange", lambda call, min_time: 1)
    calls: dict[str, Callable[[], object]] = {
        "a": lambda: order.append("a"),
        "b": lambda: order.append("b"),
        "c": lambda: order.append("c"),
    }
    measured = timing.measure(calls, rounds=4, min_time=0.0)
    assert "".join(order) == "abcbcacababc"
    assert {name: len(samples) for name, samples in measured.samples.items()} == dict.fromkeys(
        "abc", 4
    )


def test_a_ratio_is_taken_within_a_round() -> None:
    # The machine slows down by a factor of 100: the ratio does not notice.
    samples = {"ours": [1.0, 10.0, 100.0], "peer": [2.0, 20.0, 200.0]}
    measured = timing.Measurement(samples, {"ours": 1, "peer": 1})
    assert measured.ratio("peer", "ours") == Spread(2.0, 2.0, 2.0)
    assert measured.time("ours").median == 10.0


def test_fast_calls_run_in_a_loop() -> None:
    loops = timing.autorange(lambda: None, min_time=1e-3)
    assert loops > 100
    assert timing.time_loop(lambda: None, loops) > 0


def test_garbage_collection_comes_back_after_an_error() -> None:
    import gc

    def fail() -> None:
        if not gc.isenabled():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timing.measure({"fail": fail}, rounds=1, min_time=0.0)
    assert gc.isenabled()


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds"):
        timing.measure({"a": lambda: None}, rounds=0, min_time=0.0)


# ---- the gate


def results_with_error(relative: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact values, and values with this relative error in the last head only."""
    exact = torch.randn(2, 3, 8, 4, dtype=torch.float64)
    wrong = exact.clone()
    wrong[1, 2] += relative * exact[1, 2].norm() / exact[1, 2].numel() ** 0.5
    return exact, wrong.float()


def test_gate_allows_twice_the_error_of_the_plain_formula() -> None:
    exact, plain = results_with_error(1e-3)
    _, close = exact, exact + 1.9 * (plain.double() - exact)
    _, far = exact, exact + 2.1 * (plain.double() - exact)
    assert gate.verdict([close.float()], [exact], [plain]) is None
    assert "relative error 2.1e-03, allowed 2.0e-03" in str(
        gate.verdict([far.float()], [exact], [plain])
    )


def test_gate_grants_epsilon() -> None:
    exact, nearly = results_with_error(0.9 * torch.finfo(torch.float32).eps)
    assert gate.verdict([nearly], [exact], [exact]) is None


def test_gate_takes_the_largest_error_of_plain_gradients() -> None:
    exact, plain = results_with_error(1e-3)
    elsewhere = exact.clone()
    elsewhere[0, 0] *= 1 + 1e-3
    assert gate.verdict([elsewhere.float()], [exact], [plain]) is not None
    assert gate.verdict([elsewhere.float()], [exact], [plain], gradients=True) is None
    far = exact + 2.1 * (plain.double() - exact)
    assert gate.verdict([far.float()], [exact], [plain], gradients=True) is not None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_gate_refuses_what_is_no_number(poison: float) -> None:
    exact, plain = results_with_error(1e-6)
    broken = plain.clone()
    broken[0, 0, 0, 0] = poison
    assert gate.verdict([broken], [exact], [plain]) is not None


def test_gate_refuses_other_shapes_and_counts() -> None:
    exact, plain = results_with_error(1e-6)
    assert "shape" in str(gate.verdict([plain[:1]], [exact], [plain]))
    assert "1 results instead of 2" in str(gate.verdict([plain], [exact, exact], [plain, plain]))


def test_gate_takes_zero_for_zero() -> None:
    zero = torch.zeros(1, 1, 2, 2)
    assert gate.verdict([zero], [zero.double()], [zero]) is None
    assert gate.verdict([zero + 1e-6], [zero.double()], [zero]) is not None


# ---- shapes and peers


@pytest.mark.parametrize("suite", ops.SUITES)
def test_every_shape_has_inputs_and_a_cost(suite: str) -> None:
    op = ops.spec(ops.SUITES[suite].op)
    for shape in shapes.select(ops.SUITES[suite].group):
        flops, moved = op.cost(shape, torch.float32)
        assert flops > 0
        assert moved > 0
        small = {**shape, "q_len": 3, "kv_len": 5}
        op.check(**op.inputs(small, torch.float32, "cpu", 0))


def test_names_of_shapes_are_unique() -> None:
    names = [shape["name"] for group in shapes.load().values() for shape in group]
    assert len(names) == len(set(names))


BASE = {"name": "small", "batch": 2, "heads": 4, "q_len": 5, "kv_len": 8, "head_dim": 4}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mask": "key_padding"},
        {"mask": "bool"},
        {"mask": "bias"},
        {"causal": True},
        {"causal": True, "mask": "key_padding"},
        {"kv_heads": 2, "value_dim": 6},
    ],
    ids=lambda change: "-".join(map(str, change.values())) or "plain",
)
def test_every_implementation_agrees(change: dict[str, Any], backward: bool) -> None:
    row = ops.run_shape("attention", BASE | change, torch.float32, backward, 1, 0.0)
    assert row.problems == {}
    assert {"fastfusion", "sdpa", "unfused"} <= set(row.times)
    assert set(row.ratios) == set(row.times) - {"fastfusion"}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mask", [None, "both_padding"])
def test_both_directions_agree(mask: str | None, backward: bool) -> None:
    shape = BASE | {"mask": mask}
    row = ops.run_shape("bidirectional", shape, torch.float32, backward, 1, 0.0)
    assert row.problems == {}
    assert {"fastfusion", "two sdpa", "unfused"} <= set(row.times)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("group", layers.GROUPS)
def test_layers_agree(group: str, backward: bool) -> None:
    shape = {
        "name": "small", "batch": 2, "length": 4, "q_len": 4, "kv_len": 6, "dim": 16,
        "context_dim": 24, "heads": 2, "ffn": 32,
    }  # fmt: skip
    row = layers.run_shape(group, shape, torch.float32, backward, 1, 0.0)
    assert row.problems == {}
    assert set(row.times) == {"fastfusion", "torch.nn"}


def test_mask_and_padding_combine() -> None:
    padding = torch.tensor([[False, True]])
    allowed = torch.tensor([[True, True], [False, True]])
    both = peers.attend_mask({"attn_mask": allowed, "key_padding_mask": padding})
    assert both is not None
    assert both.tolist() == [[[[True, False], [False, False]]]]
    added = peers.attend_mask({"attn_mask": torch.ones(2, 2), "key_padding_mask": padding})
    assert added is not None
    assert added.tolist() == [[[[1.0, -torch.inf]] * 2]]


# ---- wrong and broken implementations


def test_a_wrong_result_prints_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ff.scaled_dot_product_attention

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return right(*args, **kwargs) * 1.001

    monkeypatch.setattr(ff, "scaled_dot_product_attention", wrong)
    monkeypatch.setitem(ff.ops.FUNCTIONS, wrong, ops.spec("scaled_dot_product_attention"))
    assert main(["attention", *SMALL]) == 1
    output = capsys.readouterr().out
    assert "fastfusion: WRONG, so not timed: result 0 has relative error" in output
    assert "no time" in output


def test_a_peer_that_crashes_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> None:
        raise RuntimeError("no kernel image\nand a long story")

    suite = ops.SUITES["attention"]
    monkeypatch.setitem(suite.others, "broken", lambda call: crash)
    row = ops.run_shape("attention", BASE, torch.float32, False, 1, 0.0)
    assert row.problems == {"broken": "ERROR: RuntimeError: no kernel image"}
    assert "sdpa" in row.times


# ---- tables


def row(name: str, ratio: float, spread: float = 0.0) -> Row:
    made = Row("attention", {"name": name}, "float32", False)
    made.times["fastfusion"] = Spread(1e-5, 1e-5, 1e-5)
    made.ratios["sdpa"] = Spread(ratio, ratio - spread, ratio + spread)
    return made


def test_lost_cells_come_first_and_wrong_ones_before_them() -> None:
    broken = Row("attention", {"name": "broken"}, "float32", False)
    broken.problems["fastfusion"] = "WRONG"
    rows = [row("won", 2.0), row("lost", 0.5), broken, row("draw", 0.99, 0.05)]
    lines = results.table(rows).splitlines()
    assert "broken" in lines[1]
    assert "WRONG" in lines[2]
    assert [line.split()[0] for line in lines[3:6]] == ["LOST", "draw", "won"]
    assert "geometric mean 1.00 over 3 shape(s), lost 1" in lines[6]


def test_our_reference_is_no_peer() -> None:
    made = row("name", 2.0)
    made.ratios["reference"] = Spread(0.1, 0.1, 0.1)
    assert made.hardest().median == 2.0


def test_a_goal_says_whether_it_is_met() -> None:
    reached = Goal("call", 5.0, 6.0, at_most=True, unit=" us")
    assert str(reached) == "met           call: 5.00 us (goal <= 6 us)"
    missed = Goal("SDPA", 1.25, 2.0, detail="3 shapes")
    assert str(missed) == "MISSED        SDPA: 1.25x (goal >= 2x); 3 shapes"
    assert missed.met is False and Goal("SDPA", None, 2.0).met is None


# ---- goals


def test_goals_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every section, on the shapes of next to no work."""
    monkeypatch.setattr(cpu_goals, "memory", lambda: [])
    sections = dict(cpu_goals.run(rounds=1, min_time=0.0, most=1e7))
    assert len(sections) == 13
    for about, goals in sections.items():
        assert goals, about
        assert all(goal.value is None or goal.value > 0 for goal in goals), about
    unmeasured = [g.name for goals in sections.values() for g in goals if g.value is None]
    assert len([name for name in unmeasured if "OpenVINO" not in name]) == 6


# ---- overhead


def test_overhead_measures_every_number() -> None:
    goals = overhead.run(rounds=1, min_time=0.0)
    assert len(goals) == 5
    assert all(goal.value and goal.value > 0 for goal in goals[:4])


def test_import_stays_light() -> None:
    seconds, modules = overhead.time_import(repeats=1)
    assert seconds > 0
    assert "fastfusion.ops" in modules
    assert overhead.heavy(modules) == []


def test_heavy_packages_are_found() -> None:
    assert overhead.heavy({"fastfusion", "triton", "onnx"}) == ["triton", "onnx"]


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
    assert cpu_plot.main([str(picture), str(source), str(source)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cpu_plot.main([str(picture), str(tmp_path / "none.json")]) == 2
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "nowhere"], "unknown shape 'nowhere'; choose from lxmert_text_to_image, "),
        (["layers", "--shape", "vit_b16"], "suite layers has no shape vit_b16"),
        (["overhead", "--shape", "vit_b16"], "suite overhead has no shape vit_b16"),
        (["--dtype", "float8"], "'float32', 'bfloat16', 'float16', 'float64'"),
        (["everything"], "'overhead', 'attention', 'bidirectional', 'layers', 'goals'"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
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


def test_more_threads_run_pinned_in_a_process_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}

    def run(command: list[str], env: dict[str, str]) -> Any:
        seen.update(command=command, env=env)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    assert main([*SMALL, "--threads", "2"]) == 0
    assert seen["command"][1:3] == ["-m", "fastfusion.benchmarks"]
    assert seen["command"][3:] == [*SMALL, "--threads", "2"]
    expected = {"OMP_NUM_THREADS": "2", "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    assert expected.items() <= seen["env"].items()


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
    assert main(["attention", "--quick", "--rounds", "1", "--json", str(file)]) == 130
    assert "lxmert_text_to_image" in capsys.readouterr().out
    assert len(json.loads(file.read_text())["rows"]) == 1


def test_the_command_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fastfusion", "bench", *SMALL]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "lxmert_text_to_image" in result.stdout
