"""`make tune`: candidates, what is accepted and what is written, with synthetic tiles and times."""

import json
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfusion.benchmarks import cuda_timing, tune

SHAPE = {"name": "small", "batch": 2, "heads": 4, "q_len": 5, "kv_len": 8, "head_dim": 4}

FakeTile = namedtuple("FakeTile", "own loop warps stages")
DEFAULT = FakeTile(64, 32, 4, 2)


class FakeLaunch:
    """The launcher's hooks around one kernel; `calls` lets a test say what a tile does."""

    def __init__(self, seconds: Callable[[Any], float], bits: Callable[[Any], float]) -> None:
        self.seconds, self.bits = seconds, bits
        self.tile: Any = DEFAULT

    @contextmanager
    def override(self, key: str, tile: Any) -> Iterator[None]:
        before, self.tile = self.tile, tile
        try:
            yield
        finally:
            self.tile = before

    @contextmanager
    def watch(self) -> Iterator[dict[str, Any]]:
        yield {"attention/16/64": DEFAULT}

    def call(self) -> tuple[Tensor, ...]:
        if self.tile.stages == 4:
            raise RuntimeError("out of resource: shared memory\nstory")
        return (torch.full((2,), self.bits(self.tile)),)


class TileClock(cuda_timing.Clock):
    """Takes the time that the tile in force says."""

    def __init__(self, launch: FakeLaunch) -> None:
        self.launch = launch

    def seconds(self, run: Callable[[], Any], loops: int) -> float:
        return loops * run()

    def capture(self, call: Callable[[], Any], copies: int) -> Callable[[], Any]:
        taken = copies * self.launch.seconds(self.launch.tile)
        return lambda: taken


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """Wherever the other tests run."""
    with torch.device("cpu"):
        yield


def tuned(
    monkeypatch: pytest.MonkeyPatch,
    seconds: Callable[[Any], float],
    bits: Callable[[Any], float] = lambda tile: 1.0,
    every: bool = True,
) -> tune.Result:
    launch = FakeLaunch(seconds, bits)
    monkeypatch.setattr(tune, "launch", lambda: launch)
    monkeypatch.setattr(tune, "make_call", lambda task, device: launch.call)
    some = [tune.Task("attention", SHAPE, "bfloat16", False)]
    return tune.tune_key("attention/16/64", DEFAULT, some, every, 2, "cpu", TileClock(launch))


def test_candidates_keep_the_loop() -> None:
    every = tune.candidates(DEFAULT, True)
    assert len(every) == 4 * 2 * 4 - 1
    assert {tile.loop for tile in every} == {32}
    assert len(tune.candidates(DEFAULT, False)) == 3 + 1 + 3


def test_the_fastest_tile_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    result = tuned(monkeypatch, lambda tile: 1e-3 * (2 - (tile.warps == 8) - (tile.own == 128) / 2))
    assert (result.chosen.own, result.chosen.warps, result.chosen.loop) == (128, 8, 32)
    assert result.gain == pytest.approx(4.0)
    assert result.rejected["own 16, 4 warps, 4 stages"] == (
        "RuntimeError: out of resource: shared memory"
    )
    text = tune.table([result])
    assert "attention/16/64" in text and "4.00x  own 64, 4 warps, 2 stages -> own 128" in text
    assert "small bfloat16" in text


def test_a_small_gain_keeps_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    result = tuned(monkeypatch, lambda tile: 1e-3 * (0.98 if tile.own == 128 else 1.0))
    assert result.chosen == DEFAULT
    assert "default stays" in tune.table([result])


def test_a_tile_that_changes_bits_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    result = tuned(
        monkeypatch,
        lambda tile: 1e-3 * (0.1 if tile.own == 16 else 0.5 if tile.own == 32 else 1.0),
        lambda tile: -0.0 if tile.own == 16 else 0.0,
    )
    assert result.chosen.own == 32
    assert result.rejected["own 16, 4 warps, 2 stages"] == "changes the bits of the result"
    assert "candidate(s) changed the bits" in tune.table([result])


def test_bits_are_compared_and_not_values() -> None:
    nan = torch.tensor([float("nan")])
    assert tune.same_bits([nan], [nan.clone()])
    assert not tune.same_bits([torch.tensor([0.0])], [torch.tensor([-0.0])])


def test_a_key_is_tuned_on_few_shapes_of_all_sizes() -> None:
    every = [task for task in tune.tasks() if task.suite == "attention" and not task.backward]
    some = [task for task in every if task.dtype == "bfloat16"]
    names = [task.shape["name"] for task in tune.representative(some)]
    assert len(names) == 3
    assert names[-1] == "joint_2048"
    assert len(tune.representative(some[:2])) == 2


def test_keys_of_forwards_are_tuned_on_forwards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = FakeLaunch(lambda tile: 1.0, lambda tile: 1.0)
    monkeypatch.setattr(tune, "launch", lambda: launch)

    def make_call(task: tune.Task, device: str) -> Any:
        if task.dtype == "float32":
            raise RuntimeError("backend 'triton' cannot run this\n  - reason")
        return launch.call

    monkeypatch.setattr(tune, "make_call", make_call)
    every = [
        tune.Task("attention", SHAPE, dtype, backward)
        for dtype in ("bfloat16", "float32")
        for backward in (True, False)
    ]
    keys = tune.find_keys(every, "cpu")
    assert [task.backward for task in keys["attention/16/64"][1]] == [False]
    assert (
        "small float32: RuntimeError: backend 'triton' cannot run this" in capsys.readouterr().out
    )


def test_the_file_holds_what_differs_and_keeps_other_keys() -> None:
    better = DEFAULT._replace(own=128)
    results = [tune.Result("a", DEFAULT, better), tune.Result("b", DEFAULT, DEFAULT)]
    old = {"tiles": {"b": {"own": 1}, "c": {"own": 2}}}
    found = tune.document(results, {"gpu": "Test 100", "secret": 1}, old)
    assert found["tiles"] == {"a": {"own": 128, "warps": 4, "stages": 2}, "c": {"own": 2}}
    assert found["gpu"] == "Test 100"
    assert "secret" not in found


def test_override_and_watch_of_the_launcher() -> None:
    launch = pytest.importorskip("fastfusion.kernels._launch")
    cpu = torch.device("cpu")

    def chosen() -> Any:
        return launch.tile("attention", torch.float16, 64, cpu)

    default = chosen()
    other = default._replace(own=2 * default.own)
    with launch.override("attention/16/64", other):
        assert chosen() == other
        assert launch.tile("attention", torch.float32, 64, cpu) != other
        with launch.override("attention/32/64", other):
            assert launch.tile("attention", torch.float32, 64, cpu) == other
        assert chosen() == other
    assert chosen() == default
    with launch.watch() as seen:
        chosen()
    assert seen == {"attention/16/64": default}
    chosen()
    assert len(seen) == 1


def test_the_whole_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = FakeLaunch(lambda tile: 1e-3 * (2 - (tile.warps == 8)), lambda tile: 1.0)
    monkeypatch.setattr(tune, "launch", lambda: launch)
    monkeypatch.setattr(tune, "make_call", lambda task, device: launch.call)
    monkeypatch.setattr(tune, "tasks", lambda: [tune.Task("attention", SHAPE, "bfloat16", False)])
    monkeypatch.setattr(cuda_timing, "Clock", lambda: TileClock(launch))
    file = tmp_path / "configs/test.json"
    argv = ["--quick", "--jobs", "1", "--output", str(file)]
    assert tune.run(tune.parse(argv), argv, "cpu") == 0
    output = capsys.readouterr().out
    assert "[1/1] attention/16/64: 2.00x with own 64, 8 warps, 2 stages" in output
    assert f"1 of 1 tiles changed; written to {file}" in output
    assert json.loads(file.read_text())["tiles"] == {
        "attention/16/64": {"own": 64, "warps": 8, "stages": 2}
    }
    assert tune.run(tune.parse([*argv, "--only", "elsewhere"]), argv, "cpu") == 1
    assert tune.run(tune.parse([*argv, "--part", "0/2"]), argv, "cpu") == 0
    assert tune.run(tune.parse([*argv, "--minutes", "0"]), argv, "cpu") == 0
    assert "left out, no time: attention/16/64" in capsys.readouterr().out
    assert json.loads(file.read_text())["tiles"] != {}


def test_tune_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--minutes", "-1"]) == 2
    assert tune.main(["--fast"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    options = tune.parse(["--part", "1/4", "--quick"])
    assert options.part == (1, 4)
    assert options.quick and options.jobs >= 1


def test_without_a_gpu_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "make tune needs an NVIDIA GPU; torch sees none\n"
