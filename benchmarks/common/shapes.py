"""The shapes that are measured: real layers of multimodal models, one list per suite."""

import json
from functools import cache
from pathlib import Path
from typing import Any

Shape = dict[str, Any]


class UnknownShapeError(ValueError):
    """No shape has this name; the message lists the names there are."""


@cache
def load() -> dict[str, list[Shape]]:
    """All shapes, by group: attention, bidirectional, linear, encoder_layer, cross_attention ..."""
    return json.loads((Path(__file__).parents[1] / "shapes.json").read_text())


def select(group: str, name: str | None = None) -> list[Shape]:
    """The shapes of one group, or the one called ``name``; none if another group has it.

    Raises:
        UnknownShapeError: no group has a shape of this name.
    """
    groups = load()
    if name is None:
        return groups[group]
    known = [shape["name"] for shapes in groups.values() for shape in shapes]
    if name not in known:
        raise UnknownShapeError(f"unknown shape {name!r}; choose from {', '.join(known)}")
    return [shape for shape in groups[group] if shape["name"] == name]
