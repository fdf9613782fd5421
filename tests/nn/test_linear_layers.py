"""When the modules take the op `linear` for their linear layers, and when they call them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn_cases import cosine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastfusion as ff
from fastfusion.backends import library

OURS, ATTENTION = (f"fastfusion.{n}_forward.default" for n in ("linear", "cross_attention_layer"))
pytestmark = pytest.mark.skipif(library.native is None, reason="without the compiled part")


def calls_of_the_op(run: Callable[[], Any], name: str = OURS) -> int:
    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.seen += str(func) == name
            return func(*args, **(kwargs or {}))

    with Count() as count:
        run()
    return count.seen


def encoder_layer(width: int = 128, **options: Any) -> Any:
    options = {"batch_first": True, "activation": "gelu", "dim_feedforward": 4 * width, **options}
    return ff.nn.TransformerEncoderLayer(width, 4, **options).eval()


X, MEMORY = torch.randn(2, 20, 128), torch.randn(2, 9, 128)


@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_layers_take_it(norm_first: bool) -> None:
    layer = encoder_layer(norm_first=norm_first)
    layer.norm1.register_forward_hook(lambda module, given, result: result)  # or it is one call
    assert calls_of_the_op(lambda: layer(X)) == 2  # feed-forward
    assert calls_of_the_op(lambda: layer(X), ATTENTION) == 1
    decoder = ff.nn.TransformerDecoderLayer(
        128, 4, 512, activation="relu", batch_first=True, norm_first=norm_first
    ).eval()
    decoder.norm1.register_forward_hook(lambda module, given, result: result)
    assert calls_of_the_op(lambda: decoder(X, MEMORY)) == 2
    assert calls_of_the_op(lambda: decoder(X, MEMORY), ATTENTION) == 2
    # Where out_proj has to be called: in_proj; of cross-attention that of queries, and of the rest.
    for attention in (decoder.self_attn, decoder.multihead_attn):
        attention.out_proj.register_forward_hook(lambda module, given, result: result)
    assert calls_of_the_op(lambda: decoder(X, MEMORY)) == 2 + 1 + 2
    for ours, given in ((layer, (X,)), (decoder, (X, MEMORY))):
        with ff.use_backend("reference"):
            expected = ours(*given)
        torch.testing.assert_close(ours(*given), expected)


@pytest.mark.parametrize("weights", ["int8", "bf16"])
@torch.no_grad()
def test_quantised_layers_take_it(weights: str) -> None:
    layer, decoder = encoder_layer(), ff.nn.TransformerDecoderLayer(128, 4, 512, batch_first=True)
    for one in (layer, decoder):  # or each is one call
        one.norm1.register_forward_hook(lambda module, given, result: result)
    for model, given, calls in ((layer, (X,), 1), (decoder.eval(), (X, MEMORY), 2)):
        ff.quantize(model, weights)
        assert calls_of_the_op(lambda run=model, given=given: run(*given)) == 2
        assert calls_of_the_op(lambda run=model, given=given: run(*given), ATTENTION) == calls
        with ff.use_backend("reference"):
            expected = model(*given)
        # Integers of the next layer may be others after a difference in the last bit.
        assert cosine(model(*given), expected) > 0.999


@torch.no_grad()
def test_bits_of_a_layer_depend_on_the_sequence() -> None:
    layer = encoder_layer()
    together = layer(X)
    assert all(torch.equal(layer(X[b : b + 1])[0], together[b]) for b in range(2))


def hooked(layer: Any) -> None:
    for part in (layer.linear1, layer.self_attn.out_proj):
        part.register_forward_hook(lambda module, given, result: result)


def replaced(layer: Any) -> None:
    class Other(nn.Linear):
        pass

    layer.linear2 = Other(512, 128)
    layer.self_attn.out_proj = Other(128, 128)


# How many of the four layers are left to the op.
LEFT = {"hooked": (hooked, 1), "replaced": (replaced, 1)}


@pytest.mark.parametrize("name", LEFT)
@torch.no_grad()
def test_parts_that_mean_more_are_called(name: str) -> None:
    change, left = LEFT[name]
    layer, called = encoder_layer(), []
    change(layer)
    for part in (layer.linear1, layer.linear2, layer.self_attn.out_proj):
        part.register_forward_pre_hook(lambda module, given: called.append(module) or None)
    assert calls_of_the_op(lambda: layer(X)) == left
    assert called == [layer.self_attn.out_proj, layer.linear1, layer.linear2]


def run_training(layer: Any, x: Tensor) -> Tensor:
    return layer.train()(x)


def run_autocast(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return layer(x)


def run_vmap(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.vmap(layer)(x[None])


def run_forced(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), ff.use_backend("reference"):
        return layer(x)


def run_sequence_first(layer: Any, x: Tensor) -> Tensor:
    """Its lengths are behind the batch, where the op would take the batch for them."""
    with torch.no_grad():
        return encoder_layer(batch_first=False)(x)


def run_small(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return encoder_layer(32)(x[..., :32])


@pytest.mark.parametrize(
    "run", [run_training, run_autocast, run_vmap, run_forced, run_sequence_first, run_small]
)
def test_calls_that_mean_more_are_the_modules(run: Any) -> None:
    assert calls_of_the_op(lambda: run(encoder_layer(), X)) == 0
