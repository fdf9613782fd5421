"""fastfusion: fused attention for multimodal transformers, as drop-in torch.nn modules.

    out = fastfusion.scaled_dot_product_attention(query, key, value)
    import fastfusion.nn as nn          # MultiheadAttention, Transformer* and all of torch.nn

`info()` says what this machine can run, `explain(op, ...)` what a call would run and why.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastfusion.core.on_import import without_collection

# A pass of the garbage collector falls into these imports: it looks at 170,000 objects of torch,
# finds none of them dead, and takes 80 ms, twice what the imports take.
with without_collection():
    from fastfusion._cuda_graph import CudaGraphed, cuda_graph
    from fastfusion._info import Info, explain, info
    from fastfusion.core.export_mode import export_mode
    from fastfusion.core.op import BackendUnavailableError, Explanation, use_backend
    from fastfusion.ops.attention_statistics import AttentionStatistics, attention_statistics
    from fastfusion.ops.bidirectional_attention import bidirectional_attention
    from fastfusion.ops.cross_attention_layer import cross_attention_layer
    from fastfusion.ops.cross_modal_layer import cross_modal_layer
    from fastfusion.ops.decoder_layer import decoder_layer
    from fastfusion.ops.encoder_layer import encoder_layer
    from fastfusion.ops.linear import linear
    from fastfusion.ops.norm import norm
    from fastfusion.ops.scaled_dot_product_attention import scaled_dot_product_attention
    from fastfusion.ops.varlen_attention import varlen_attention

    from fastfusion import integrations, nn, ops  # isort: skip
    from fastfusion.nn._attention_maps import attention_maps  # isort: skip

if TYPE_CHECKING:
    from fastfusion import data, distributed, mask, models, positions
    from fastfusion.acceleration import AccelerationReport, accelerate, register_swap, restore
    from fastfusion.plotting import attention_page, plot_attention
    from fastfusion.quantization import QuantizationReport, QuantizedLayer, quantize

__version__ = "0.1.0"

__all__ = [
    "AccelerationReport",
    "AttentionStatistics",
    "BackendUnavailableError",
    "CudaGraphed",
    "Explanation",
    "Info",
    "QuantizationReport",
    "QuantizedLayer",
    "accelerate",
    "attention_maps",
    "attention_page",
    "attention_statistics",
    "bidirectional_attention",
    "cross_attention_layer",
    "cross_modal_layer",
    "cuda_graph",
    "data",
    "distributed",
    "decoder_layer",
    "encoder_layer",
    "explain",
    "export_mode",
    "info",
    "integrations",
    "linear",
    "mask",
    "models",
    "nn",
    "norm",
    "ops",
    "plot_attention",
    "positions",
    "quantize",
    "register_swap",
    "restore",
    "scaled_dot_product_attention",
    "use_backend",
    "varlen_attention",
]


# What calls and layers do without is imported when it is first named.
_LATER = {
    "acceleration": ("AccelerationReport", "accelerate", "register_swap", "restore"),
    "data": (),
    "distributed": (),
    "mask": (),
    "positions": (),
    "models": (),
    "plotting": ("attention_page", "plot_attention"),
    "quantization": ("QuantizationReport", "QuantizedLayer", "quantize"),
}
_HOMES = {name: module for module, names in _LATER.items() for name in (module, *names)}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"fastfusion.{home}")
    found = module if name == home else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
