"""Bad input: the drop-ins fail as torch's modules do in training mode, type and text."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastfusion as ff

Call = Callable[[Any], Any]


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def mask(*shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


# MultiheadAttention(8, 2, batch_first=True, **options) called with (query, key, value, **masks).
MULTIHEAD: dict[str, tuple[dict[str, Any], Call]] = {
    "1-D query": ({}, lambda m: m(x(8), x(8), x(8))),
    "4-D query": ({}, lambda m: m(x(1, 2, 3, 8), x(1, 2, 3, 8), x(1, 2, 3, 8))),
    "2-D key": ({}, lambda m: m(x(2, 3, 8), x(3, 8), x(3, 8))),
    "3-D key, unbatched": ({}, lambda m: m(x(3, 8), x(2, 3, 8), x(2, 3, 8))),
    "query width": ({}, lambda m: m(x(2, 3, 6), x(2, 3, 8), x(2, 3, 8))),
    "width, self-attention": ({}, lambda m: m(*[x(2, 3, 6)] * 3)),
    "key width": ({}, lambda m: m(x(2, 3, 8), x(2, 3, 6), x(2, 3, 6))),
    "key and value": ({}, lambda m: m(x(2, 3, 8), x(2, 4, 8), x(2, 5, 8))),
    "key and value batch": ({}, lambda m: m(x(2, 3, 8), x(2, 4, 8), x(1, 4, 8))),
    "batch": ({}, lambda m: m(x(2, 3, 8), x(3, 4, 8), x(3, 4, 8))),
    "kdim": ({"kdim": 6, "vdim": 4}, lambda m: m(x(2, 3, 8), x(2, 4, 5), x(2, 4, 4))),
    "kdim, self-attention": ({"kdim": 6, "vdim": 4}, lambda m: m(*[x(2, 3, 8)] * 3)),
    "vdim": ({"kdim": 6, "vdim": 4}, lambda m: m(x(2, 3, 8), x(2, 4, 6), x(2, 4, 5))),
    "kdim lengths": ({"kdim": 6, "vdim": 4}, lambda m: m(x(2, 3, 8), x(2, 4, 6), x(2, 5, 4))),
    "float64 query": ({}, lambda m: m(*[x(2, 3, 8, dtype=torch.float64)] * 3)),
    "float64 key": (
        {},
        lambda m: m(x(2, 3, 8), x(2, 3, 8, dtype=torch.float64), x(2, 3, 8, dtype=torch.float64)),
    ),
    "int query": ({}, lambda m: m(*[x(2, 3, 8, dtype=torch.int64)] * 3)),
    "list query": ({}, lambda m: m([1.0], [1.0], [1.0])),
    "list key": ({}, lambda m: m(x(2, 3, 8), [1.0], [1.0])),
    "None key": ({}, lambda m: m(x(2, 3, 8), None, None)),
    "causal without mask": ({}, lambda m: m(*[x(2, 3, 8)] * 3, is_causal=True)),
    "causal without mask or weights": (
        {},
        lambda m: m(*[x(2, 3, 8)] * 3, is_causal=True, need_weights=False),
    ),
    "causal with padding": (
        {},
        lambda m: m(*[x(2, 3, 8)] * 3, is_causal=True, key_padding_mask=mask(2, 3)),
    ),
    "int mask": ({}, lambda m: m(*[x(2, 3, 8)] * 3, attn_mask=mask(3, 3, dtype=torch.int64))),
    "int padding": (
        {},
        lambda m: m(*[x(2, 3, 8)] * 3, key_padding_mask=mask(2, 3, dtype=torch.uint8)),
    ),
    "list mask": ({}, lambda m: m(*[x(2, 3, 8)] * 3, attn_mask=[[True]])),
    "list padding": ({}, lambda m: m(*[x(2, 3, 8)] * 3, key_padding_mask=[[True]])),
    "1-D mask": ({}, lambda m: m(*[x(2, 3, 8)] * 3, attn_mask=mask(3))),
    "4-D mask": ({}, lambda m: m(*[x(2, 3, 8)] * 3, attn_mask=mask(2, 2, 3, 3))),
    "2-D mask shape": ({}, lambda m: m(*[x(2, 3, 8)] * 3, attn_mask=mask(3, 4))),
    "broadcast mask": ({}, lambda m: m(*[x(2, 3, 8)] * 3, attn_mask=mask(1, 3))),
    "3-D mask shape": ({}, lambda m: m(*[x(2, 3, 8)] * 3, attn_mask=mask(2, 3, 3))),
    "3-D mask, unbatched": ({}, lambda m: m(*[x(3, 8)] * 3, attn_mask=mask(1, 3, 3))),
    "mask of a cross-attention": (
        {},
        lambda m: m(x(2, 3, 8), x(2, 4, 8), x(2, 4, 8), attn_mask=mask(4, 3)),
    ),
    "mask beside bias_kv": (
        {"add_bias_kv": True},
        lambda m: m(*[x(2, 3, 8)] * 3, attn_mask=mask(3, 4)),
    ),
    "padding beside zero_attn": (
        {"add_zero_attn": True},
        lambda m: m(*[x(2, 3, 8)] * 3, key_padding_mask=mask(2, 4)),
    ),
    "padding rank": ({}, lambda m: m(*[x(2, 3, 8)] * 3, key_padding_mask=mask(3))),
    "padding rank, unbatched": ({}, lambda m: m(*[x(3, 8)] * 3, key_padding_mask=mask(1, 3))),
    "padding batch": ({}, lambda m: m(*[x(2, 3, 8)] * 3, key_padding_mask=mask(1, 3))),
    "padding length": ({}, lambda m: m(*[x(2, 3, 8)] * 3, key_padding_mask=mask(2, 4))),
    "float64 mask": (
        {},
        lambda m: m(*[x(2, 3, 8)] * 3, attn_mask=mask(3, 3, dtype=torch.float64)),
    ),
    "float64 mask without weights": (
        {},
        lambda m: m(
            *[x(2, 3, 8)] * 3, attn_mask=mask(3, 3, dtype=torch.float64), need_weights=False
        ),
    ),
    "float32 mask, bfloat16 module": (
        {"dtype": torch.bfloat16},
        lambda m: m(*[x(2, 3, 8, dtype=torch.bfloat16)] * 3, attn_mask=x(3, 3)),
    ),
    "query on another device": ({}, lambda m: m(*[x(2, 3, 8).to("meta")] * 3)),
}

LAYERS: dict[str, tuple[str, Call]] = {
    "encoder layer, width": ("TransformerEncoderLayer", lambda m: m(x(2, 3, 6))),
    "encoder layer, 4-D": ("TransformerEncoderLayer", lambda m: m(x(1, 2, 3, 8))),
    "encoder layer, int mask": (
        "TransformerEncoderLayer",
        lambda m: m(x(2, 3, 8), mask(3, 3, dtype=torch.int64)),
    ),
    "encoder layer, int padding": (
        "TransformerEncoderLayer",
        lambda m: m(x(2, 3, 8), None, mask(2, 3, dtype=torch.int64)),
    ),
    "encoder layer, mask shape": ("TransformerEncoderLayer", lambda m: m(x(2, 3, 8), mask(2, 3))),
    "encoder layer, list mask": ("TransformerEncoderLayer", lambda m: m(x(2, 3, 8), [[True]])),
    "encoder layer, causal": (
        "TransformerEncoderLayer",
        lambda m: m(x(2, 3, 8), is_causal=True),
    ),
    "encoder, 1-D": ("TransformerEncoder", lambda m: m(x(8))),
    "encoder, width": ("TransformerEncoder", lambda m: m(x(2, 3, 6))),
    "encoder, int mask": (
        "TransformerEncoder",
        lambda m: m(x(2, 3, 8), mask(3, 3, dtype=torch.int64)),
    ),
    "encoder, int padding": (
        "TransformerEncoder",
        lambda m: m(x(2, 3, 8), src_key_padding_mask=mask(2, 3, dtype=torch.int64)),
    ),
    "encoder, padding shape": (
        "TransformerEncoder",
        lambda m: m(x(2, 3, 8), src_key_padding_mask=mask(2, 4)),
    ),
    "encoder, causal": ("TransformerEncoder", lambda m: m(x(2, 3, 8), is_causal=True)),
    "decoder layer, memory width": (
        "TransformerDecoderLayer",
        lambda m: m(x(2, 3, 8), x(2, 3, 6)),
    ),
    "decoder layer, memory mask": (
        "TransformerDecoderLayer",
        lambda m: m(x(2, 3, 8), x(2, 4, 8), memory_mask=mask(4, 3)),
    ),
    "decoder, 1-D": ("TransformerDecoder", lambda m: m(x(8), x(2, 3, 8))),
    "decoder, batch": ("TransformerDecoder", lambda m: m(x(2, 3, 8), x(3, 3, 8))),
    "transformer, batch": ("Transformer", lambda m: m(x(2, 3, 8), x(3, 3, 8))),
    "transformer, width": ("Transformer", lambda m: m(x(2, 3, 8), x(2, 3, 6))),
    "transformer, int mask": (
        "Transformer",
        lambda m: m(x(2, 3, 8), x(2, 3, 8), src_mask=mask(3, 3, dtype=torch.int64)),
    ),
}

CONSTRUCTORS: dict[str, Call] = {
    "heads do not divide": lambda nn: nn.MultiheadAttention(8, 3),
    "no heads": lambda nn: nn.MultiheadAttention(8, 0),
    "activation": lambda nn: nn.TransformerEncoderLayer(8, 2, activation="tanh"),
    "decoder activation": lambda nn: nn.TransformerDecoderLayer(8, 2, activation="tanh"),
    "unknown argument": lambda nn: nn.MultiheadAttention(8, 2, colour="red"),
}


def build(nn: Any, name: str, mode: bool, **options: Any) -> Any:
    """The module in training (True) or eval mode, without its dropout."""
    if name == "MultiheadAttention":
        return nn.MultiheadAttention(8, 2, batch_first=True, **options).train(mode)
    if name == "Transformer":
        return nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True).train(mode)
    layer = getattr(nn, name.replace("coder", "coderLayer") if name.endswith("coder") else name)
    layer = layer(8, 2, 16, 0.0, batch_first=True)
    if name.endswith("coder"):
        return getattr(nn, name)(layer, 1).train(mode)
    return layer.train(mode)


def error_of(run: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception) as caught:  # noqa: B017
            run()
    return caught.type, str(caught.value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", MULTIHEAD)
def test_multihead(case: str, training: bool) -> None:
    options, call = MULTIHEAD[case]
    theirs = build(torch.nn, "MultiheadAttention", True, **options)
    ours = build(ff.nn, "MultiheadAttention", training, **options)
    expected = error_of(lambda: call(theirs))
    with torch.set_grad_enabled(training):
        assert error_of(lambda: call(ours)) == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", LAYERS)
def test_layers(case: str, training: bool) -> None:
    name, call = LAYERS[case]
    expected = error_of(lambda: call(build(torch.nn, name, True)))
    with torch.set_grad_enabled(training):
        assert error_of(lambda: call(build(ff.nn, name, training))) == expected


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_constructors(case: str) -> None:
    call = CONSTRUCTORS[case]
    assert error_of(lambda: call(ff.nn)) == error_of(lambda: call(torch.nn))
