"""What other tools need to know of the ops; a module for each, imported when the tool is.

- `diffusers`: attention processors of its models.
- `onnx`: torch's exporters to ONNX.
- `timm`: blocks and attention of its models.
- `transformers`: attention and layers of its models.
- `xformers`: its `memory_efficient_attention`; works without xformers, too.
"""

import warnings
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


def _transformers(modeling_utils: Any) -> None:
    """A version that cannot be served says so, and is as it would be without us."""
    try:
        import_module("fastfusion.integrations.transformers")
    except ImportError as error:
        warnings.warn(str(error), stacklevel=2)


on_import("transformers.modeling_utils", _transformers)


def _sharding(tensor: Any) -> None:
    """DTensor asks for each op how it may be sharded, by ways that are not all public."""
    try:
        import_module("fastfusion.distributed.sharding").register()
    except (AttributeError, ImportError) as error:
        warnings.warn(f"this torch cannot shard fastfusion's ops: {error}", stacklevel=2)


on_import("torch.distributed.tensor", _sharding)


def __getattr__(name: str) -> Any:
    if name in ("diffusers", "onnx", "timm", "transformers", "xformers"):
        return import_module(f"fastfusion.integrations.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
