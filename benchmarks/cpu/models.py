"""The suite "models": whole models against the same model of torch.nn with the same weights."""

from typing import Any

import torch
from torch import Tensor, nn

from fastfusion.applications.stock import stock_twin
from fastfusion.models import VQATransformer

from ..common.ops import Call
from .layers import compare_modules
from .results import Row
from .settings import Settings

GROUP = "models"
CLASSES = 1000


def build(shape: dict[str, Any]) -> VQATransformer:
    """The model of a shape in eval mode; always the same weights."""
    torch.manual_seed(0)
    model = VQATransformer(
        shape["visual_dim"], shape["text_dim"], shape["heads"], shape["ffn"], shape["layers"],
        CLASSES,
    )  # fmt: skip
    return model.eval()


def example(shape: dict[str, Any]) -> list[Tensor]:
    """Features of images (batch, regions, visual_dim) and of text (batch, words, text_dim)."""
    generator = torch.Generator().manual_seed(0)
    batch = shape["batch"]
    return [
        torch.randn(batch, shape["regions"], shape["visual_dim"], generator=generator),
        torch.randn(batch, shape["words"], shape["text_dim"], generator=generator),
    ]


def forward(model: nn.Module, inputs: list[Tensor]) -> Call:
    """The logits as a call without arguments."""
    return lambda: model(*inputs)


def run_shape(shape: dict[str, Any], settings: Settings) -> Row:
    """Checks one model and times it."""
    row = Row("models", shape, settings.dtype_name, settings.backward, cold=settings.cold)
    ours = build(shape)
    stock = stock_twin(ours)
    inputs = [t.to(settings.dtype) for t in example(shape)]
    compare_modules(
        row, stock.to(settings.dtype), ours.to(settings.dtype), inputs, forward, settings
    )
    return row
