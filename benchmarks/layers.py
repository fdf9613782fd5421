"""The suite "layers": modules of ff.nn against the torch.nn modules that they replace."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fastfusion as ff

from .ops import Call, as_tuple, judge
from .results import OURS, Row
from .timing import measure

GROUPS = ("encoder_layer", "cross_attention")


def build(namespace: Any, group: str, shape: dict[str, Any]) -> nn.Module:
    """The layer of a shape from torch.nn or ff.nn, in eval mode; equal seeds, equal weights."""
    torch.manual_seed(0)
    dim, heads = shape["dim"], shape["heads"]
    if group == "encoder_layer":
        layer = namespace.TransformerEncoderLayer(
            dim, heads, shape["ffn"], activation="gelu", batch_first=True
        )
    else:
        context = shape["context_dim"]
        layer = namespace.MultiheadAttention(
            dim, heads, kdim=context, vdim=context, batch_first=True
        )
    return layer.eval()


def example(group: str, shape: dict[str, Any]) -> list[Tensor]:
    """The float32 inputs of a layer: (batch, length, dim), and the context of cross-attention."""
    generator = torch.Generator().manual_seed(0)
    sizes = (
        [(shape["batch"], shape["length"], shape["dim"])]
        if group == "encoder_layer"
        else [
            (shape["batch"], shape["q_len"], shape["dim"]),
            (shape["batch"], shape["kv_len"], shape["context_dim"]),
        ]
    )
    return [torch.randn(size, generator=generator) for size in sizes]


def forward(layer: nn.Module, inputs: list[Tensor]) -> Call:
    """The layer's forward as a call without arguments that returns one tensor."""
    if len(inputs) == 1:
        return lambda: layer(inputs[0])
    query, context = inputs
    return lambda: layer(query, context, context, need_weights=False)[0]


def backward_of(layer: nn.Module, inputs: list[Tensor]) -> Call:
    """Forward and backward: returns the gradients of inputs and weights."""
    leaves = [t.requires_grad_() for t in inputs] + list(layer.parameters())
    run = forward(layer, inputs)
    # Ones would do for the time, but a layer that ends in a norm has no gradient for them.
    generator = torch.Generator().manual_seed(1)
    incoming = torch.randn(inputs[0].shape, generator=generator).to(inputs[0].dtype)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(), leaves, incoming)

    return both


def run_shape(
    group: str,
    shape: dict[str, Any],
    dtype: torch.dtype,
    backward: bool,
    rounds: int,
    min_time: float,
) -> Row:
    """Checks one layer and times it."""
    row = Row("layers", shape, str(dtype).removeprefix("torch."), backward)
    make = backward_of if backward else forward
    stock, ours = build(nn, group, shape).to(dtype), build(ff.nn, group, shape).to(dtype)
    inputs = [t.to(dtype) for t in example(group, shape)]
    exact_layer = copy.deepcopy(stock).double()
    with torch.inference_mode(not backward):
        calls = {OURS: make(ours, inputs), "torch.nn": make(stock, inputs)}
        # The plain formula of a layer is torch's own, without its fused fast path.
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = as_tuple(make(exact_layer, [t.detach().double() for t in inputs])())
            plain = as_tuple(calls["torch.nn"]())
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        row.problems, right = judge(calls, expected, plain, backward)
        if OURS in right:
            row.add(measure(right, rounds, min_time))
    return row
