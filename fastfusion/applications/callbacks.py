"""Who is told how a training goes: TensorBoard, Weights & Biases, or anything with two methods."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fastfusion.core.extras import require

FORMS = "tensorboard:FOLDER, wandb:PROJECT or wandb-offline:PROJECT"


class Callback(Protocol):
    """What `fastfusion.applications.training` calls."""

    def epoch(self, stage: str, number: int, values: Mapping[str, float]) -> None:
        """Epoch `number` of a stage, from 1, is over."""

    def finish(self, results: Mapping[str, float]) -> None:
        """The checkpoint is written; no call follows."""


class TensorBoard:
    """Writes event files; needs the package ``tensorboard``."""

    def __init__(self, folder: Path) -> None:
        require("tensorboard", "pip install tensorboard")
        self.writer: Any = require("torch.utils.tensorboard").SummaryWriter(str(folder))

    def epoch(self, stage: str, number: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{stage}/{name}", value, number)

    def finish(self, results: Mapping[str, float]) -> None:
        for name, value in results.items():
            self.writer.add_scalar(f"result/{name}", value)
        self.writer.close()


class WeightsAndBiases:
    """A run of a project; needs the package ``wandb``.

    Args:
        offline: keep the run in the folder ``wandb`` here, to be sent by ``wandb sync`` or never.
    """

    def __init__(self, project: str, offline: bool = False) -> None:
        wandb = require("wandb", "pip install wandb")
        self.run: Any = wandb.init(project=project, mode="offline" if offline else "online")

    def epoch(self, stage: str, number: int, values: Mapping[str, float]) -> None:
        # Stages count their epochs each from 1, and the steps of a run never fall.
        self.run.log({f"{stage}/epoch": number} | {f"{stage}/{k}": v for k, v in values.items()})

    def finish(self, results: Mapping[str, float]) -> None:
        self.run.summary.update(dict(results))
        self.run.finish()


def parse(text: str) -> Callback:
    """The callback that an option names: `FORMS`.

    Raises:
        ValueError: another form.
        MissingExtra: its package is not there.
    """
    kind, _, place = text.partition(":")
    if place and kind == "tensorboard":
        return TensorBoard(Path(place))
    if place and kind in ("wandb", "wandb-offline"):
        return WeightsAndBiases(place, offline=kind == "wandb-offline")
    raise ValueError(f"--log takes {FORMS}, got {text!r}")
