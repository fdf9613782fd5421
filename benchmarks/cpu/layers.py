"""The suite "layers": modules of ff.nn against the torch.nn modules that they replace.

With narrow weights ours are quantised and inputs stay float32; the peers are the float32 layer and
what others make of it in the same precision.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fastfusion as ff

from ..common.ops import Call, as_tuple
from ..common.peers import Skipped
from ..common.results import OURS
from . import exported
from .cells import crash, judge, timed_row
from .results import Row
from .settings import Settings

GROUPS = ("encoder_layer", "cross_attention")
FROZEN = "compiled frozen"
OTHERS = ("torch.nn", "torch.nn bfloat16", "no fast path", "compiled", FROZEN, *exported.RUNTIMES)
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


def narrow(module: nn.Module, weights: str) -> str:
    """Quantises a module in place; how many of its linear layers took part.

    Raises:
        ValueError: none did.
    """
    report = ff.quantize(module, weights)
    if not report.quantized:
        raise ValueError(f"no layer takes {weights} weights: {report.layers}")
    return f"{len(report.quantized)}/{len(report.layers)} {weights}"


def left_out(peer: str, shape: dict[str, Any], settings: Settings) -> str | None:
    """Why a peer that has to be made for a shape is not, None where it is."""
    if peer == FROZEN and settings.peers is None:
        return "takes seconds per shape; --peers by name takes it"
    if settings.backward:
        return "has no gradients"
    if peer != FROZEN and settings.dtype != torch.float32:
        return "takes float32 inputs here"
    if settings.peers is None and shape["name"] not in exported.SOME:
        return "takes seconds per shape; --peers by name takes all shapes"
    return None


def add_made(
    row: Row,
    calls: dict[str, Call],
    stock: nn.Module,
    inputs: list[Tensor],
    forward: Forward,
    settings: Settings,
) -> None:
    """Adds the peers that are exported or compiled from the stock module."""
    layer = exported.Layer(stock, forward, inputs)
    for name in (*exported.RUNTIMES, FROZEN):
        if not settings.wants(name):
            continue
        try:
            reason = left_out(name, row.shape, settings)
            if reason is not None:
                raise Skipped(reason)
            with fast_path(False):
                if name == FROZEN:
                    calls[name] = without_fast_path(exported.frozen(layer, settings.weights))
                else:
                    calls[name] = exported.RUNTIMES[name](layer, settings.weights)
        except Skipped as why:
            row.skipped[name] = str(why)
        except Exception as error:
            row.problems[name] = crash(error)


def compare_modules(
    row: Row,
    stock: nn.Module,
    ours: nn.Module,
    inputs: list[Tensor],
    forward: Forward,
    settings: Settings,
    name: str = "torch.nn",
) -> None:
    """Checks our module and its peers against `stock` in float64, and times them into `row`.

    Where the settings name weights, our module is quantised.
    """
    if settings.weights is not None:
        row.path = narrow(ours, settings.weights)
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
        bfloat16 = f"{name} bfloat16"
        if settings.weights == "bf16" and settings.wants(bfloat16):
            calls[bfloat16] = make(*exported.in_bfloat16(stock, inputs))
        off = settings.weights is None or settings.peers is not None
        off = off and name == "torch.nn" and not settings.backward
        if off and settings.wants("no fast path"):
            calls["no fast path"] = without_fast_path(make(stock, inputs))
        if settings.peers is not None and "compiled" in settings.peers:
            torch.compiler.reset()
            compiled: Any = torch.compile(stock, dynamic=False)
            calls["compiled"] = make(compiled, inputs)
        add_made(row, calls, stock, inputs, forward, settings)
        # The plain formula of a layer is torch's own, without its fused fast path.
        with fast_path(False):
            expected = as_tuple(make(exact, doubles)())
            plain = as_tuple(make(stock, inputs)())
        cosines = None if settings.weights is None else row.cosines
        problems, right = judge(calls, expected, plain, settings.backward, cosines)
        row.problems |= problems
        timed_row(row, right, settings)


def cost(group: str, shape: dict[str, Any]) -> tuple[int, int, int, int]:
    """Operations of the products with weights and of attention's own; numbers of the weights and of
    inputs and output."""
    batch, dim = shape["batch"], shape["dim"]
    if group == "encoder_layer":
        queries = keys = shape["length"]
        weights = dim * (4 * dim + 2 * shape["ffn"])
        products = 2 * batch * queries * weights
        numbers = 2 * batch * queries * dim
    else:
        queries, keys, context = shape["q_len"], shape["kv_len"], shape["context_dim"]
        weights = 2 * dim * (dim + context)
        products = 4 * batch * dim * (queries * dim + keys * context)
        numbers = batch * (2 * queries * dim + keys * context)
    return products, 4 * batch * queries * keys * dim, weights, numbers


def run_shape(group: str, shape: dict[str, Any], settings: Settings) -> Row:
    """Checks one layer and times it."""
    row = Row("layers", shape, settings.dtype_name, settings.backward, cold=settings.cold)
    if not settings.backward:
        products, attention, weights, numbers = cost(group, shape)
        size = {"int8": 1, "bf16": 2}.get(settings.weights or "", settings.dtype.itemsize)
        row.flops = products + attention
        row.moved = weights * size + numbers * settings.dtype.itemsize
        row.float_flops = 0 if settings.weights is None else attention
    stock, ours = build(nn, group, shape), build(ff.nn, group, shape)
    inputs = [t.to(settings.dtype) for t in example(group, shape)]
    compare_modules(
        row, stock.to(settings.dtype), ours.to(settings.dtype), inputs, forward, settings
    )
    return row
