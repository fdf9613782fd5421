"""What `accelerate` did to a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fastfusion.quantization import QuantizationReport


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer.

    Attributes:
        name: of the layer in the model, "" of the model itself.
        source: the class that it had.
        target: what it is now; None where it stays what it was.
        reason: why it stays what it was, or was rolled back.
        road: what ran in it on the example inputs; None without them.
        deviation: of the model's outputs with this layer alone swapped, where it was rolled back.
    """

    name: str
    source: str
    target: str | None
    reason: str | None = None
    road: str | None = None
    deviation: float | None = None


@dataclass(frozen=True)
class AccelerationReport:
    """What `accelerate` did, to be read by people as `str(report)`.

    Attributes:
        layers: a row for each layer that was swapped, and for each that looks like attention and
            was not.
        quantization: what became of the weights, where `weights` was asked for.
        deviation: the largest difference between the model's outputs before and after; None without
            example inputs.
        bound: what `deviation` may be at most.
        largest: the largest output.
        ms_before, ms_after: medians of calls on the example inputs, in milliseconds.
        bytes_before, bytes_after: of all parameters and buffers of the model.
        notes: what else there is to know.
    """

    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int
    quantization: QuantizationReport | None = None
    deviation: float | None = None
    bound: float | None = None
    largest: float | None = None
    ms_before: float | None = None
    ms_after: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def swapped(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.target is not None)

    @property
    def kept(self) -> tuple[LayerReport, ...]:
        """Layers that look like attention and stay what they were, and those rolled back."""
        return tuple(layer for layer in self.layers if layer.target is None)

    def __str__(self) -> str:
        lines = [*_table(self.layers)]
        lines.append(f"{len(self.swapped)} layers swapped, {len(self.kept)} left as they were")
        if self.quantization is not None:
            rows = len(self.quantization.quantized)
            lines.append(f"{rows} of {len(self.quantization.layers)} weights narrower")
        lines.append(f"memory of weights: {self.bytes_before:,} -> {self.bytes_after:,} bytes")
        if self.deviation is not None:
            lines.append(
                f"largest difference of outputs: {self.deviation:.2e}, allowed {self.bound:.2e}, "
                f"largest output {self.largest:.2e}"
            )
        if self.ms_before is not None and self.ms_after:
            lines.append(
                f"example inputs: {self.ms_before:.2f} -> {self.ms_after:.2f} ms "
                f"({self.ms_before / self.ms_after:.2f} times as fast)"
            )
        return "\n".join((*lines, *self.notes))

    __repr__ = __str__


def _table(layers: Iterable[LayerReport]) -> list[str]:
    """A line for each kind of row, with how many there are and the first of them."""
    groups: dict[LayerReport, list[str]] = {}
    for layer in layers:
        groups.setdefault(replace(layer, name="", deviation=None), []).append(layer.name)
    head = ("layers", "", "from", "to", "")
    rows = [head]
    for kind, names in groups.items():
        first = names[0] or "the model"
        shown = first if len(names) == 1 else f"{first} ... {names[-1]}"
        rows.append(
            (
                shown, str(len(names)), kind.source, kind.target or "as before",
                kind.reason or kind.road or "",
            )
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
