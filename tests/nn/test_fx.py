"""torch.fx traces models with our modules as it traces torch.nn's: each is one node."""

import copy
from typing import Any

import pytest
import torch
from nn_cases import HEADS, WIDTH
from torch import Tensor, nn

import fastfusion as ff

NAMES = (
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerEncoder",
    "TransformerDecoderLayer",
    "TransformerDecoder",
    "Transformer",
)
X = torch.randn(2, 4, WIDTH)


def build(library: Any, name: str) -> Any:
    options: dict[str, Any] = {"dim_feedforward": 12, "dropout": 0.0, "batch_first": True}
    if name == "MultiheadAttention":
        return library.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    if name == "Transformer":
        return library.Transformer(WIDTH, HEADS, 1, 1, **options)
    kind = name.removesuffix("Layer")
    layer = getattr(library, kind + "Layer")(WIDTH, HEADS, **options)
    return layer if name.endswith("Layer") else getattr(library, kind)(layer, 1)


class Model(nn.Module):
    """One module between others, of our library or torch's, called in the ways it takes."""

    def __init__(self, name: str, module: Any) -> None:
        super().__init__()
        self.name = name
        self.before = nn.Linear(WIDTH, WIDTH)
        self.queries = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if self.name == "MultiheadAttention":
            queries = self.queries.expand(x.shape[0], -1, -1)
            return self.module(queries, x, value=x)[0].relu()
        if "Encoder" in self.name:
            return self.module(x, src_key_padding_mask=x[..., 0] > 9.0)
        return self.module(x, x)


class Tracer(torch.fx.Tracer):
    """As other libraries make theirs: a rule of their own in front of torch's."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return name == "before" or super().is_leaf_module(module, name)


def nodes(graph: torch.fx.Graph) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in graph.nodes]


@pytest.mark.parametrize("name", NAMES)
def test_traced_as_torchs(name: str) -> None:
    ours = Model(name, build(ff.nn, name)).eval()
    theirs = Model(name, build(torch.nn, name)).eval()
    # A hook on a leaf runs when the traced model does, and once.
    ours.module.register_forward_hook(lambda m, a, out: out if isinstance(out, tuple) else 2 * out)
    traced = torch.fx.symbolic_trace(ours)
    assert nodes(traced.graph) == nodes(torch.fx.symbolic_trace(theirs).graph)
    assert ("call_module", "module") in nodes(traced.graph)
    assert type(traced.module) is type(ours.module)
    assert torch.equal(traced(X), ours(X))
    graph = Tracer().trace(ours)
    assert torch.equal(torch.fx.GraphModule(ours, graph)(X), ours(X))


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_swapped_modules_are_traced_too(name: str) -> None:
    swapped = ff.nn._retag(build(torch.nn, name))
    for module in (swapped, copy.deepcopy(build(ff.nn, name))):
        model = Model(name, module).eval()
        assert torch.equal(torch.fx.symbolic_trace(model)(X), model(X))
        assert type(module).__module__.startswith("fastfusion.nn.")


def test_a_decoder_layer_at_the_root() -> None:
    """The only one of them that torch can trace into."""
    ours, theirs = (build(library, "TransformerDecoderLayer") for library in (ff.nn, torch.nn))
    traced = torch.fx.symbolic_trace(ours)
    assert nodes(traced.graph) == nodes(torch.fx.symbolic_trace(theirs).graph)
    assert torch.equal(traced(X, X), ours(X, X))
