"""What other tools need to know of the ops; a module for each, imported when the tool is.

- `onnx`: torch's exporters to ONNX.
"""

from importlib import import_module
from typing import Any

from fastfusion.core.on_import import on_import


def _onnx() -> Any:
    return import_module("fastfusion.integrations.onnx")


# Torch's own translations, imported by the first export.
on_import(
    "torch.onnx._internal.exporter._torchlib.ops", lambda exporter: _onnx().register_translations()
)
# The package of both exporters, where the TorchScript exporter keeps its symbolic functions.
on_import("torch.onnx", lambda exporter: _onnx().register_symbolics(exporter))


def __getattr__(name: str) -> Any:
    if name == "onnx":
        return _onnx()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
