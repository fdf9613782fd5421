"""Trainings that several processes share, against the same one in one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist

from fastfusion.__main__ import main
from fastfusion.applications.captioning.train import FORMAT, Settings, train
from fastfusion.applications.checkpoint import load
from fastfusion.applications.ranks import ONE, Ranks, joined
from fastfusion.applications.training import Training

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 8, "warmup_steps": 4, "squares": 16}


class Curve:
    """A callback that keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def epoch(self, stage: str, number: int, values: Any) -> None:
        self.losses.append(values["loss"])

    def finish(self, results: Any) -> None:
        pass


def run(output: Path, ranks: Ranks = ONE, **options: Any) -> list[float]:
    """The losses of all epochs; dropout is on."""
    curve = Curve()
    train(
        Training(
            output, Settings(**SETTINGS), limit=16, ranks=ranks,
            callbacks=[curve], say=lambda line: None, **options,
        )
    )  # fmt: skip
    return curve.losses


def share(rank: int, world: int, folder: Path) -> None:
    losses = run(folder / "shared", Ranks(rank, world))
    if rank == 0:
        (folder / "losses").write_text(json.dumps(losses))


def die_after_an_epoch(rank: int, world: int, folder: Path) -> None:
    """The first process is gone from one moment to the next; the other ends and says so."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = (folder / "port").read_text()
    dist.destroy_process_group()
    replace = os.replace

    def replace_and_die(*paths: Any) -> None:
        replace(*paths)
        os._exit(0)

    os.replace = replace_and_die
    with pytest.raises(ConnectionError, match="process 1 of 2 waits in vain"), joined(60) as ours:
        run(folder / "killed", ours)
    (folder / "told").touch()
    os._exit(0)


def test_losses_are_those_of_one_process(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", parts=2)
    ranks.run(2, [share], tmp_path, tmp_path)
    shared = json.loads((tmp_path / "losses").read_text())
    assert len(shared) == len(alone) == 3
    torch.testing.assert_close(torch.tensor(shared), torch.tensor(alone))


def test_killed_and_resumed_with_other_ranks(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    ranks.run(2, [die_after_an_epoch], tmp_path, tmp_path)
    assert (tmp_path / "told").exists()
    settings = Settings(**SETTINGS)
    more = Training(tmp_path / "killed", settings, limit=16, resume=True, ranks=Ranks(0, 4))
    assert more.parts == 4 and more.settings.batch_size == 2
    with pytest.raises(ValueError, match="must be a multiple of the 2 ranks and divide batch_size"):
        Training(tmp_path / "killed", settings, parts=3, ranks=Ranks(0, 2))
    rest = run(tmp_path / "killed", resume=True)
    torch.testing.assert_close(
        torch.tensor(rest), torch.tensor(run(tmp_path / "whole", parts=2)[1:])
    )


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "x.safetensors"
    tiny = ["train", "captioning", "--limit", "16", "--epochs", "1", "--batch-size", "8"]
    options = [*tiny, "--baseline-only", "--output", str(output), "--distributed"]
    assert main(options) == 1
    assert "torchrun --nproc-per-node 2 -m fastfusion train" in capsys.readouterr().err
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "fastfusion", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    assert load(output, FORMAT).metadata["training"]["parts"] == 2
