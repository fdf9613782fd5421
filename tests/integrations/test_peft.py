"""peft's adapters on accelerated models: in force, and added once."""

import copy
from typing import Any

import pytest
import torch
from checkout import need_library
from torch import Tensor, nn
from transformers_cases import IDS, RIGHT, TEXT, build, tr

import fastfusion as ff

peft: Any = need_library("peft")

BATCH = {"input_ids": IDS, "attention_mask": RIGHT}
X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


def adapted(model: nn.Module, *targets: str) -> Any:
    """With low-rank adapters whose numbers show."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets))
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def bert() -> Any:
    return build(tr.BertModel, tr.BertConfig(**TEXT))


def run(model: Any) -> Tensor:
    with torch.no_grad():
        states: Tensor = model(**BATCH).last_hidden_state
    return states[RIGHT.bool()]


@pytest.mark.parametrize("targets", [("query", "value"), ("key", "dense")], ids=str)
def test_transformers(targets: tuple[str, ...]) -> None:
    stock = bert()
    without, expected = run(stock), run(adapted(copy.deepcopy(stock), *targets))
    assert float((expected - without).abs().max()) > 0.1
    before = ff.accelerate(adapted(copy.deepcopy(stock), *targets))
    behind = adapted(ff.accelerate(copy.deepcopy(stock)), *targets)
    for model in (before, behind):
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(run(model), without, rtol=1e-4, atol=1e-5)
    merged = before.merge_and_unload()
    torch.testing.assert_close(run(merged), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        run(ff.accelerate(behind.merge_and_unload())), expected, rtol=1e-4, atol=1e-5
    )


def test_narrow_weights_under_adapters() -> None:
    stock = bert()
    expected = run(adapted(copy.deepcopy(stock), "query", "dense"))
    for model in (
        ff.accelerate(adapted(copy.deepcopy(stock), "query", "dense"), weights="bf16"),
        ff.accelerate(adapted(copy.deepcopy(stock), "query", "dense"), weights="int8"),
    ):
        assert torch.cosine_similarity(run(model), expected, dim=-1).min() > 0.999


def test_gradients_go_to_the_adapters_alone() -> None:
    stock = bert()
    gradients = []
    copies = (adapted(copy.deepcopy(stock), "query") for _ in range(2))
    for model in (next(copies), ff.accelerate(next(copies))):
        model(**BATCH).last_hidden_state[RIGHT.bool()].square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    theirs, ours = gradients
    assert theirs.keys() == ours.keys() and all("lora" in name for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-4)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


@pytest.fixture
def by_parts() -> Any:
    """Without torch's fast path, which reads the weights under the adapters and loses these."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(
    "targets", [("self_attn",), ("linear1", "linear2"), ("self_attn", "linear1")], ids=str
)
@torch.no_grad()
def test_layers_of_torch(targets: tuple[str, ...], by_parts: None) -> None:
    without = Encoder().eval()(X)
    expected = adapted(Encoder(), *targets)(X)
    before = ff.accelerate(adapted(Encoder(), *targets))
    behind = adapted(ff.accelerate(Encoder().eval()), *targets)
    torch.backends.mha.set_fastpath_enabled(True)
    for model in (before, behind):
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(model(X), without, rtol=1e-4, atol=1e-5)
    assert float((expected - without).abs().max()) > 0.1
