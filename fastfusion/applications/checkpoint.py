"""Checkpoints of the applications: one safetensors file, weights as tensors, all else as JSON."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastfusion.core.extras import MissingExtra, require

N = TypeVar("N", bound=nn.Module)

FOLDER = Path(__file__).parent.parent / "models"  # of those that ship


@dataclass(frozen=True)
class Content:
    """What a file holds: the weights of its networks by name, and what it says of itself."""

    path: Path
    weights: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, Any]

    def fill(self, name: str, network: N) -> N:
        """Load the weights of a network into it, and put it into eval mode."""
        network.load_state_dict(self.weights[name])
        return network.eval()

    def model(self, make: Callable[[], N]) -> N | None:
        """The network ``"model"`` in eval mode; a training of the baselines writes none."""
        return self.fill("model", make()) if "model" in self.weights else None


def present(**networks: nn.Module | None) -> dict[str, nn.Module]:
    """Those that there are, by the names that they have in a file."""
    return {name: network for name, network in networks.items() if network is not None}


def save(
    path: Path,
    kind: str,
    networks: Mapping[str, nn.Module],
    metadata: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write networks under names of their own, their weights in `dtype`."""
    tensors = {
        f"{name}.{key}": tensor.detach().to(dtype).contiguous()
        for name, network in networks.items()
        for key, tensor in network.state_dict().items()
    }
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    path.write_bytes(require("safetensors.torch").save(tensors, {"format": kind, **texts}))


def load(path: Path, kind: str) -> Content:
    """Read a file that `save` has written.

    Raises:
        MissingExtra: it is one of those that ship, and they are not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind.
    """
    if not path.exists():
        if path.parent == FOLDER:
            raise MissingExtra(
                "the trained models are not installed: pip install fastfusion-checkpoints"
            )
        raise FileNotFoundError(
            f"there is no checkpoint {path}; `python -m fastfusion train` makes one"
        )
    safetensors = require("safetensors")
    try:
        file = safetensors.safe_open(path, "pt")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no file of safetensors: {error}") from None
    with file:
        texts = dict(file.metadata() or {})
        if texts.pop("format", None) != kind:
            raise ValueError(f"{path} is not a checkpoint of this demo: no format {kind!r}")
        weights: dict[str, dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118
            name, _, rest = key.partition(".")
            weights.setdefault(name, {})[rest] = file.get_tensor(key)
    return Content(path, weights, {key: json.loads(value) for key, value in texts.items()})
