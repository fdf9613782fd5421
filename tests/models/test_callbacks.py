"""Who is told how a training goes: real TensorBoard and Weights & Biases files, offline."""

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from fastfusion.__main__ import main
from fastfusion.applications import callbacks
from fastfusion.applications.captioning import Settings, train
from fastfusion.applications.training import Training

TINY = ["train", "captioning", "--limit", "16", "--epochs", "2", "--batch-size", "8"]


def test_any_object_with_two_methods_is_told(tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []
    results: dict[str, float] = {}

    class Listener:
        def epoch(self, stage: str, number: int, values: Mapping[str, float]) -> None:
            assert set(values) == {"loss", "right", "lr"} and values["loss"] > 0
            heard.append((stage, number))

        def finish(self, found: Mapping[str, float]) -> None:
            results.update(found)

    settings = Settings(epochs=2, batch_size=8)
    output, told = tmp_path / "x", [Listener()]
    train(Training(output, settings, limit=16, callbacks=told, say=lambda line: None))
    assert heard == [("blind", 1), ("model", 1), ("model", 2)]
    assert set(results) == {"blind_exact", "exact"}


def test_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = f"tensorboard:{tmp_path / 'events'}"
    assert main([*TINY, "--output", str(tmp_path / "x"), "--log", log]) == 0
    read = events.EventAccumulator(str(tmp_path / "events"))
    read.Reload()
    assert {"blind/loss", "model/loss", "model/lr", "result/exact"} <= set(read.Tags()["scalars"])
    assert [event.step for event in read.Scalars("model/loss")] == [1, 2]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    output = ["--output", str(tmp_path / "x"), "--log", "wandb-offline:fusion"]
    assert main([*TINY, *output]) == 0
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    # Another process writes it, and may still do so.
    deadline = time.monotonic() + 30
    while b"exact" not in (content := file.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"model/loss" in content and b"exact" in content


@pytest.mark.parametrize("text", ["csv:x", "tensorboard", "wandb:", ""])
def test_bad_options(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--log takes tensorboard:FOLDER"):
        callbacks.parse(text)
    assert main([*TINY, "--output", str(tmp_path / "x"), "--log", text]) == 1
    assert "--log takes" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("package", "option"), [("tensorboard", "tensorboard:x"), ("wandb", "wandb:x")]
)
def test_a_missing_package_is_named(
    package: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        callbacks.parse(option)
