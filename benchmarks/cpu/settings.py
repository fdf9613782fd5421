"""How a run measures: what every suite takes beside its shapes."""

from dataclasses import dataclass

import torch

# What --dtype calls weights that are narrower than float32 inputs, and what ff.quantize does.
NARROW = {"bf16w": "bf16", "int8": "int8"}


@dataclass(frozen=True)
class Settings:
    """How cells are timed.

    Attributes:
        dtype: of the inputs.
        backward: time forward and backward together.
        rounds: how many times everything is timed.
        min_time: seconds that one timing should take; faster calls run in a loop.
        cold: single calls, each after the caches were overwritten.
        peers: the names to time, None for those that take no minutes.
        weights: of our linear layers where they are narrower: "int8" or "bf16".
    """

    dtype: torch.dtype = torch.float32
    backward: bool = False
    rounds: int = 20
    min_time: float = 5e-3
    cold: bool = False
    peers: tuple[str, ...] | None = None
    weights: str | None = None

    def wants(self, peer: str) -> bool:
        """Whether a peer is to be timed."""
        return self.peers is None or peer in self.peers

    @property
    def dtype_name(self) -> str:
        """The dtype without "torch."; of narrow weights what --dtype calls them."""
        for name, weights in NARROW.items():
            if weights == self.weights:
                return name
        return str(self.dtype).removeprefix("torch.")
