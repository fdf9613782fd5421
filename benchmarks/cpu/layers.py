"""The suite "layers": modules of ff.nn against the torch.nn modules that they replace."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fastfusion as ff

from ..common.ops import Call, as_tuple
from ..common.results import OURS
from .cells import judge, timed_row
from .results import Row
from .settings import Settings

GROUPS = ("encoder_layer", "cross_attention")
Forward = Callable[[nn.Module, list[Tensor]], Call]


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


@contextmanager
def fast_path(enabled: bool) -> Iterator[None]:
    """torch's fused path of nn.TransformerEncoderLayer and nn.MultiheadAttention, on or off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def without_fast_path(call: Call) -> Call:
    """The same call off torch's fused path, which costs it a microsecond."""

    def run() -> Any:
        with fast_path(False):
            return call()

    return run


def compare_modules(
    row: Row,
    stock: nn.Module,
    ours: nn.Module,
    inputs: list[Tensor],
    forward: Forward,
    settings: Settings,
    name: str = "torch.nn",
) -> None:
    """Checks our module and its peers against `stock` in float64, and times them into `row`."""
    exact = copy.deepcopy(stock).double()
    doubles = [t.double() for t in inputs]
    incoming: list[Tensor] = []

    def make(module: nn.Module, given: list[Tensor]) -> Call:
        run = forward(module, given)
        if not settings.backward:
            return run
        leaves = [t.requires_grad_() for t in given] + list(module.parameters())

        def both() -> tuple[Tensor, ...]:
            results = as_tuple(run())
            if not incoming:
                # Ones would do for the time, but what ends in a norm has no gradient for them.
                generator = torch.Generator().manual_seed(1)
                incoming.extend(
                    torch.randn(t.shape, generator=generator).to(settings.dtype) for t in results
                )
            seeds = [t.to(r.dtype) for t, r in zip(incoming, results, strict=True)]
            return torch.autograd.grad(results, leaves, seeds)

        return both

    with torch.inference_mode(not settings.backward):
        calls = {OURS: make(ours, inputs)}
        if settings.wants(name):
            calls[name] = make(stock, inputs)
        if settings.wants("no fast path") and name == "torch.nn" and not settings.backward:
            calls["no fast path"] = without_fast_path(make(stock, inputs))
        if settings.peers is not None and "compiled" in settings.peers:
            torch.compiler.reset()
            compiled: Any = torch.compile(stock, dynamic=False)
            calls["compiled"] = make(compiled, inputs)
        # The plain formula of a layer is torch's own, without its fused fast path.
        with fast_path(False):
            expected = as_tuple(make(exact, doubles)())
            plain = as_tuple(make(stock, inputs)())
        row.problems, right = judge(calls, expected, plain, settings.backward)
        timed_row(row, right, settings)


def run_shape(group: str, shape: dict[str, Any], settings: Settings) -> Row:
    """Checks one layer and times it."""
    row = Row("layers", shape, settings.dtype_name, settings.backward, cold=settings.cold)
    stock, ours = build(nn, group, shape), build(ff.nn, group, shape)
    inputs = [t.to(settings.dtype) for t in example(group, shape)]
    compare_modules(
        row, stock.to(settings.dtype), ours.to(settings.dtype), inputs, forward, settings
    )
    return row
