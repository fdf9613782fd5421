"""Activations of transformers under the kernels' names."""

from typing import Any

import torch.nn.functional as F

from fastfusion.nn._plain import activation_module_name

_NAMES: dict[type, str] = {}


def _fill() -> None:
    from transformers import activations

    for kind, name in (
        ("AccurateGELUActivation", "gelu_tanh"),
        ("FastGELUActivation", "gelu_tanh"),
        ("GELUTanh", "gelu_tanh"),
        ("NewGELUActivation", "gelu_tanh"),
        ("QuickGELUActivation", "quick_gelu"),
        ("SiLUActivation", "silu"),
    ):
        if hasattr(activations, kind):
            _NAMES[getattr(activations, kind)] = name
    _NAMES[activations.GELUActivation] = "gelu"


def activation_of(module: Any) -> str | None:
    """The kernels' name for an activation that they have."""
    if not _NAMES:
        _fill()
    name = _NAMES.get(type(module))
    if name is None:
        return activation_module_name(module)
    if name == "gelu" and module.__dict__["act"] is not F.gelu:
        return None
    return name
