"""torch.nn with its attention and Transformer modules replaced by fused ones.

`MultiheadAttention`, `TransformerEncoderLayer`, `TransformerEncoder`, `TransformerDecoderLayer`,
`TransformerDecoder` and `Transformer` subclass the torch.nn module of the same name: the same
arguments, the same state_dict, the same weights for the same seed. `CrossAttention`,
`CrossModalAttention` and `QuantizedLinear` are new. Every other name is torch.nn's own, so that

    import fastfusion.nn as nn

is the only line that changes in a script.
"""

from typing import Any

import torch.nn as _torch_nn

from fastfusion.nn import _forwarding
from fastfusion.nn._cross_attention import CrossAttention, ProjectedContext
from fastfusion.nn._cross_modal import CrossModalAttention
from fastfusion.nn._multihead import MultiheadAttention
from fastfusion.nn._quantized import QuantizedLinear
from fastfusion.nn._transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from fastfusion.nn._transformer import _retag as _retag

__all__ = [
    "CrossAttention",
    "CrossModalAttention",
    "MultiheadAttention",
    "ProjectedContext",
    "QuantizedLinear",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
__all__ += [n for n in dir(_torch_nn) if n not in __all__ and not n.startswith("_")]


def __getattr__(name: str) -> Any:
    try:
        return getattr(_torch_nn, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch_nn)})


_forwarding.install()
