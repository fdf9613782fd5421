"""out_proj of MultiheadAttention is called on every road, whatever stands in its place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_cases import HEADS, WIDTH, assert_same
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastfusion as ff

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
]

X = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Tagged(Tensor):
    """What the fused path does not take."""


class LowRank(nn.Module):
    """An adapter that holds the layer, and has no weight of its own name."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(WIDTH, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, WIDTH, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Quantized(nn.Module):
    """int8 numbers and a scale; `weight` is a method, as of torch's quantised layers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        scale = base.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("rounded", (base.weight.detach() / scale).round().to(torch.int8))

    def weight(self) -> Tensor:
        return self.rounded * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight())


def hooked(module: Any) -> None:
    module.out_proj.register_forward_hook(lambda part, args, out: 3.0 * out)
    module.out_proj.register_forward_pre_hook(lambda part, args: (args[0].tanh(),))


def replaced(kind: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        module.out_proj = kind(module.out_proj)

    return change


CHANGES: dict[str, Callable[[Any], Any]] = {
    "untouched": lambda m: None,
    "another layer": replaced(lambda base: nn.Sequential(base, nn.GELU())),
    "adapter": replaced(LowRank),
    "quantised": replaced(Quantized),
    "hooks": hooked,
    "pruned": lambda m: prune.random_unstructured(m.out_proj, "weight", 0.5),
    "weight norm, old": lambda m: nn.utils.weight_norm(m.out_proj),
    "weight norm": lambda m: parametrizations.weight_norm(m.out_proj),
    "parametrized": lambda m: parametrize.register_parametrization(
        m.out_proj, "weight", nn.Softsign()
    ),
    "another forward": lambda m: setattr(m.out_proj, "forward", torch.tanh),
}


def nested(layout: torch.layout, **options: Any) -> Callable[[Any, Tensor], Tensor]:
    def run(module: Any, x: Tensor) -> Tensor:
        given = torch.nested.as_nested_tensor(list(x.unbind()), layout=layout)
        return torch.stack(module(given, given, given, **options)[0].unbind())

    return run


def tagged(**options: Any) -> Callable[[Any, Tensor], Tensor]:
    def run(module: Any, x: Tensor) -> Tensor:
        given = x.as_subclass(Tagged)
        return module(given, given, given, **options)[0].as_subclass(Tensor)

    return run


ROADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "fused": lambda m, x: m(x, x, x, need_weights=False)[0],
    "weights": lambda m, x: m(x, x, x)[0],
    "unbatched": lambda m, x: torch.stack([m(s, s, s, need_weights=False)[0] for s in x]),
    "strided": nested(torch.strided, need_weights=False),
    "jagged": nested(torch.jagged, need_weights=False),
    "jagged, weights": nested(torch.jagged),
    "torch's": tagged(need_weights=False),
    "torch's, weights": tagged(),
}


def gradients(out: Tensor, module: Any) -> list[Tensor | None]:
    out.square().sum().backward()
    grads = [p.grad for p in module.out_proj.parameters()]
    module.zero_grad()
    return grads


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("change", CHANGES)
def test_counts_on_every_road(change: str, road: str) -> None:
    module = ff.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    nn.init.normal_(module.out_proj.bias)
    # torch's attention followed by the identity: what out_proj is given.
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    attention.load_state_dict(module.state_dict())
    with torch.no_grad():
        attention.out_proj.weight.copy_(torch.eye(WIDTH))
        attention.out_proj.bias.zero_()
    attended = attention(X, X, X)[0].detach()
    CHANGES[change](module)
    with torch.no_grad():
        for parameter in module.out_proj.parameters():
            parameter.mul_(1.25)
    for step in range(2):  # pruning and the old weight norm make the weight anew in each
        out = ROADS[road](module, X)
        expected = module.out_proj(attended)
        assert_same(out, expected, f"step {step}")
        if expected.requires_grad:
            actual = gradients(out, module)
            assert_same(actual, gradients(expected, module), f"step {step}, gradients")


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("training", [True, False])
def test_counts_in_the_layers(training: bool) -> None:
    options: dict[str, Any] = {"batch_first": True, "dtype": torch.float64}
    encoder = ff.nn.TransformerEncoderLayer(WIDTH, HEADS, 12, 0.0, **options).train(training)
    decoder = ff.nn.TransformerDecoderLayer(WIDTH, HEADS, 12, 0.0, **options).train(training)
    for attention in (encoder.self_attn, decoder.self_attn, decoder.multihead_attn):
        attention.out_proj = Silent()
    with torch.set_grad_enabled(training):
        x = encoder.norm1(X)
        assert_same(encoder(X), encoder.norm2(x + encoder._ff_block(x)), "encoder layer")
        x = decoder.norm2(decoder.norm1(X))
        assert_same(decoder(X, X), decoder.norm3(x + decoder._ff_block(x)), "decoder layer")
