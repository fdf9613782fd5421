"""`make tune`: candidates, what is accepted and what is written, with synthetic tiles and times."""

import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfusion.benchmarks.gpu import timing as cuda_timing
from fastfusion.benchmarks.gpu import tune
from fastfusion.benchmarks.gpu.cells import Budget

SHAPE = {"name": "small", "batch": 2, "heads": 4, "q_len": 5, "kv_len": 8, "head_dim": 4}

FakeTile = namedtuple("FakeTile", "own loop warps stages")
DEFAULT = FakeTile(64, 32, 4, 2)


class FakeLaunch:
    """The launcher's hooks around one kernel; `calls` lets a test say what a tile does."""

    def __init__(self, seconds: Callable[[Any], float], bits: Callable[[Any], float]) -> None:
        self.seconds, self.bits = seconds, bits
        self.tile: Any = DEFAULT

    @staticmethod
    def width(dim: int) -> int:
        return max(16, dim)

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
    budget: Budget | None = None,
) -> tune.Result:
    launch = FakeLaunch(seconds, bits)
    monkeypatch.setattr(tune, "launch", lambda: launch)
    monkeypatch.setattr(tune, "make_call", lambda task, device: launch.call)
    some = [tune.Task("attention", SHAPE, "bfloat16", False)]
    clock, key = TileClock(launch), "attention/16/64"
    return tune.tune_key(key, DEFAULT, some, every, 2, budget or Budget(None), "cpu", clock)


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
    keys = tune.find_keys(every, "cpu", Budget(None))
    assert [task.backward for task in keys["attention/16/64"][1]] == [False]
    assert (
        "small float32: RuntimeError: backend 'triton' cannot run this" in capsys.readouterr().out
    )


def test_candidates_without_time_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    result = tuned(monkeypatch, lambda tile: 1.0 if tile == DEFAULT else 0.1, budget=Budget(0.0))
    assert result.chosen == DEFAULT
    assert set(result.rejected.values()) == {"no time"} and len(result.rejected) == 31


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 112),
        ("attention/16/64", 38),
        ("attention", 112),
        ("bidirectional", 24),
        ("backward", 56),
        ("bidirectional_backward/32/256", 2),
        ("16/64", 38),
        ("/64", 76),
        ("/8/", 0),
    ],
)
def test_tasks_are_chosen_by_the_text_before_anything_is_launched(text: str, count: int) -> None:
    pytest.importorskip("fastfusion.kernels.host.tiles")
    chosen = [task for task in tune.tasks() if tune.may_look_up(task, text)]
    assert len(chosen) == count


def test_keys_are_found_without_running_a_kernel() -> None:
    """The real launchers, outside Triton's interpreter, for a GPU that is not there."""
    pytest.importorskip("triton")
    code = """
import torch
from fastfusion.benchmarks.compile_gates import triton_builds as kernels_build
from fastfusion.benchmarks.gpu import tune
from fastfusion.benchmarks.gpu.cells import Budget
from fastfusion.kernels.attention.forward import attention_forward
from fastfusion.ops.scaled_dot_product_attention import Call

def make_call(task, device):
    query = torch.full((1, 12, task.shape["q_len"], 64), float("nan"), dtype=torch.bfloat16)
    call = Call(query, query, query, None, None, None, None, 0.0, False, False, None, False)
    return lambda: attention_forward(call, False)

tune.make_call = make_call
some = [task for task in tune.tasks() if task.shape["name"] == "vit_b16"][:1]
with kernels_build.target(90):
    keys = tune.find_keys(some, "cpu", Budget(None))
print({key: [str(task) for task in of] for key, (_, of) in keys.items()})
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100
    )
    assert done.stdout.splitlines()[-1:] == ["{'attention/16/64': ['vit_b16 bfloat16']}"], done


def test_the_file_is_written_after_each_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "configs/test.json"
    kept: list[Any] = []

    def tune_key(key: str, *_: Any) -> tune.Result:
        kept.append(json.loads(file.read_text())["tiles"] if file.exists() else None)
        if key == "attention/16/128":
            raise SystemExit(143)
        return tune.Result(key, DEFAULT, DEFAULT._replace(own=128), 1.5)

    found = {f"attention/16/{width}": (DEFAULT, []) for width in (32, 64, 128)}
    monkeypatch.setattr(tune, "find_keys", lambda *_: found)
    monkeypatch.setattr(tune, "tune_key", tune_key)
    argv = ["--jobs", "1", "--output", str(file)]
    with pytest.raises(SystemExit):
        tune.run(tune.parse(argv), argv, "cpu")
    assert [kept[0], *(list(tiles) for tiles in kept[1:])] == [
        None,
        ["attention/16/32"],
        ["attention/16/32", "attention/16/64"],
    ]


def test_processes_that_compile_end_with_the_one_that_tunes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of time, cut off by SIGTERM, or ended in a way that it cannot see."""
    sleeper = tmp_path / "python"
    sleeper.write_text(f"#!/bin/sh\necho $$ >>{tmp_path}/pids\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))

    def cut_off(*_: Any) -> None:
        raise SystemExit(143)

    def started() -> list[int]:
        file = tmp_path / "pids"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    tune.compile_beforehand([], 2, 1.0)
    before = signal.signal(signal.SIGALRM, cut_off)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(SystemExit):
            tune.compile_beforehand([], 2, None)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(started()) == 4
    for number in started():
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)

    launched: list[Any] = []
    launch = FakeLaunch(lambda tile: 1.0, lambda tile: 1.0)
    monkeypatch.setattr(tune, "launch", lambda: launch)
    monkeypatch.setattr(tune, "make_call", lambda task, device: lambda: launched.append(task))
    parents = iter([7, 7, 7, 1, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    keys = {"attention/16/64": (DEFAULT, [tune.Task("attention", SHAPE, "bfloat16", False)])}
    tune.warm_up(keys, True, (0, 1), "cpu")
    assert len(launched) == 2


def test_the_file_holds_what_differs_and_keeps_other_keys() -> None:
    better = DEFAULT._replace(own=128)
    results = [tune.Result("a", DEFAULT, better), tune.Result("b", DEFAULT, DEFAULT)]
    old = {"tiles": {"b": {"own": 1}, "c": {"own": 2}}}
    found = tune.document(results, {"gpu": "Test 100", "secret": 1}, old)
    assert found["tiles"] == {"a": {"own": 128, "warps": 4, "stages": 2}, "c": {"own": 2}}
    assert found["gpu"] == "Test 100"
    assert "secret" not in found


def test_override_and_watch_of_the_launcher() -> None:
    launch = pytest.importorskip("fastfusion.kernels.host.tiles")
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
    assert tune.run(tune.parse([*argv, "--minutes", "0"]), argv, "cpu") == 1
    assert "make tune: no time" in capsys.readouterr().err
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
