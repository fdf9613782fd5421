"""What `make gpu` makes of its measurements: tables, files, plots and goals."""

from pathlib import Path

import pytest
from gpu_cells import PEAKS, cell

from fastfusion.benchmarks.common.timing import Spread
from fastfusion.benchmarks.gpu import goals
from fastfusion.benchmarks.gpu import plots as cuda_plot
from fastfusion.benchmarks.gpu import results as cuda_results
from fastfusion.benchmarks.gpu.results import Cell

# ---- tables, files, plots


def test_lost_cells_come_first_and_wrong_ones_before_them() -> None:
    broken = Cell("attention", {"name": "broken", "q_len": 1, "kv_len": 1}, "bfloat16", False)
    broken.problems["fastfusion"] = "WRONG"
    lost = cell("lost", {"sdpa": 2.0, "flash": 0.5})
    lost.refused["cudnn"] = "no masks"
    lost.no_graph["flex"] = "RuntimeError: not permitted"
    draw = cell("draw", {"sdpa": 0.99}, spread=0.05)
    text = cuda_results.table([cell("won", {"sdpa": 2.0}), draw, lost, broken], PEAKS)
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["shape", "graph", "us", "eager"]
    assert lines[1].split()[0] == "broken"
    assert lines[2].strip() == "fastfusion: WRONG"
    assert lines[3].split()[:2] == ["LOST", "lost"]
    assert lines[4].strip() == "flex under a graph: RuntimeError: not permitted"
    assert [line.split()[0] for line in lines[5:7]] == ["draw", "won"]
    assert "best peer, graph: geometric mean 1.00, median 0.99, worst 0.50 over 3 shape(s)" in text
    assert "sdpa, graph: geometric mean 1.58 over 3 shape(s), lost 1" in text
    assert "cudnn: not for 1 shape(s): no masks" in text
    won = lines[6]
    assert "10.0 (10.0-10.0)" in won and "20.0/40.0" in won and "100.0" in won
    assert "33% bytes" in won


def test_our_other_backends_are_no_peers() -> None:
    made = cell("name", {"sdpa": 2.0, "reference": 0.1, "ff cuda": 0.2})
    assert made.best() == ("sdpa", Spread(2.0, 2.0, 2.0))


def test_the_share_of_the_peak_is_that_of_the_tighter_limit() -> None:
    made = cell("name", {"sdpa": 2.0})
    made.flops, made.moved = 5 * 10**9, 10**6
    share = made.share(PEAKS)
    assert share is not None
    assert share == (pytest.approx(0.5), "flops")
    assert made.share({"copy": 1.0}) is None
    made.flops = None
    assert made.share(PEAKS) is None


def test_files_hold_everything_and_plots_come_from_them_alone(tmp_path: Path) -> None:
    file = tmp_path / "attention-bfloat16.json"
    cells = [cell("a", {"sdpa": 2.0}, {"sdpa": 0.5}), cell("b", {"flash": 0.8})]
    about = {"gpu": "Test 100", "torch": "2", "triton": "3", "commit": "abc", "peaks": PEAKS}
    cuda_results.write(file, about, {"rounds": 3}, cells)
    machine, read = cuda_results.read(file)
    assert machine == about
    assert read == cells
    (tmp_path / "summary.json").write_text("{}")
    assert cuda_plot.missing() is None
    backward = [cell("a", {"sdpa": 2.0}, suite="block"), cell("a", {"sdpa": 0.5}, backward=True)]
    cuda_results.write(tmp_path / "block.json", about, {}, backward)
    assert cuda_plot.draw_folder(tmp_path) == tmp_path / "times.png"
    assert (tmp_path / "times.png").stat().st_size > 5000
    assert "Test 100" in cuda_plot.title(machine)
    assert cuda_plot.main([str(file)]) == 0
    assert (tmp_path / "attention-bfloat16.png").stat().st_size > 5000


def test_a_file_without_times_has_no_plot(tmp_path: Path) -> None:
    file = tmp_path / "attention-float32.json"
    broken = Cell("attention", {"name": "broken", "q_len": 1, "kv_len": 1}, "bfloat16", False)
    cuda_results.write(file, {}, {}, [broken])
    assert cuda_plot.draw([file], tmp_path / "times.png") is None
    assert list(tmp_path.iterdir()) == [file]


def test_plots_without_matplotlib_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cuda_plot.main(["folder"]) == 2
    assert capsys.readouterr().err == "plots: matplotlib is not installed\n"


# ---- goals


def goal(cells: list[Cell], name: str) -> goals.Goal:
    (found,) = [g for g in goals.judge(cells) if g.name == name]
    return found


def test_goals_are_met_or_missed_or_not_measured() -> None:
    cells = [cell("a", {"sdpa": 1.6}), cell("b", {"sdpa": 1.4}, q_len=32, kv_len=257)]
    short = goal(cells, "short cross attention")
    assert short.met is False
    detail = "b 1.40x, 1 of 2 under, geometric mean 1.50x"
    assert str(short) == f"MISSED        short cross attention: 1.40x (goal >= 1.5x); {detail}"
    mean = goal(cells, "attention forward, all shapes")
    assert mean.met and mean.value == pytest.approx(1.4967, rel=1e-3)
    missing = goal(cells, "attention forward and backward, all shapes")
    assert missing.met is None
    assert str(missing).startswith("not measured  attention forward and backward, all shapes (goal")


def test_long_shapes_have_goals_of_their_own() -> None:
    cells = [
        cell("long", {"sdpa": 0.75}, q_len=2048, kv_len=2048),
        cell("long", {"sdpa": 0.61}, q_len=1, kv_len=1500, backward=True),
        cell("short", {"sdpa": 0.85}, q_len=1024, kv_len=1024),
    ]
    assert goal(cells, "forward, each longer shape").met
    assert goal(cells, "forward and backward, each longer shape").met
    assert goal(cells, "forward, each shape up to 1024").met is False
    assert goal(cells, "forward and backward, each shape up to 1024").met is None


def test_bidirectional_goals() -> None:
    peers = {"two sdpa": 3.0, "two flash": 1.3, "unfused": 0.5, "grounding dino": 2.9}
    shared = cell("bi_bixt", peers, suite="bidirectional", kv_len=196, value_dim=32)
    full = cell("bi_gdino_full", peers, suite="bidirectional", kv_len=256, value_dim=256)
    cells = [shared, full]
    assert goal(cells, "bidirectional beside two SDPA, S shared").value == pytest.approx(1.3)
    assert goal(cells, "bidirectional beside two SDPA, S twice").met
    assert goal(cells, "bidirectional beside Grounding DINO").met is False


def test_the_block_is_held_to_torch_compile() -> None:
    name = "block of 20 x 36, 768 wide, beside torch.compile"
    peers = {"compile": 4.0, "compile formula": 2.9, "linear + sdpa": 1.0}
    cells = [cell("block_20_36", peers, {"compile formula": 5.0}, "block")]
    found = goal(cells, name)
    assert found.met is False and found.value == pytest.approx(2.9)
    assert "compile formula is its fastest, both called eagerly 5.00x, its call" in str(found)
    assert "over our graph 10.00x" in str(found)
    assert goal([cell("block_20_36", {"linear + sdpa": 1.0}, suite="block")], name).met is None
    assert goal([cell("block_197_20", peers, suite="block")], name).met is None


def test_our_cost_beside_sdpa() -> None:
    cells = [cell("a", {"sdpa": 1.0, "flash": 0.1}, {"sdpa": 0.5})]
    eager = goal(cells, "our eager call beside SDPA's, lengths up to 512")
    assert eager.met and eager.value == pytest.approx(2.0)
    assert "<= 2.5x" in str(eager)
    assert goal(cells, "the same under a graph").met


def test_wrong_results_are_among_the_goals() -> None:
    broken = Cell("attention", {"name": "broken", "q_len": 1, "kv_len": 1}, "float32", False)
    broken.problems["fastfusion"] = "WRONG"
    text = goals.report([cell("a", {"sdpa": 2.0}), broken])
    assert "goals, bfloat16" in text
    assert "MISSED        right results: no time for broken" in text
