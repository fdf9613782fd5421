"""Decoder layers that are one call, and decoding token by token with a cache."""

import copy
import itertools
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastfusion as ff
from fastfusion.backends import library

needs_native = pytest.mark.skipif(library.native is None, reason="without the compiled part")
OURS = {f"fastfusion.decoder_layer_{kind}.default" for kind in ("forward", "cached")}


def calls(run: Any) -> int:
    """How often the op is called."""
    seen = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if str(func) in OURS:
                seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Count():
        run()
    return len(seen)


def decoder_layer(**options: Any) -> Any:
    torch.manual_seed(0)
    options = {"batch_first": True, "activation": "gelu", "dim_feedforward": 70, **options}
    return ff.nn.TransformerDecoderLayer(48, 4, **options).eval()


def decoder(count: int = 3, norm: bool = True, **options: Any) -> Any:
    final = nn.LayerNorm(48) if norm else None
    made = ff.nn.TransformerDecoder(decoder_layer(**options), count, final).eval()
    for parameter in made.parameters():  # biases of 0 and norms of 1 hide mistakes
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return made


def called_in_parts(module: Any) -> Any:
    """The layer or the stack that calls its parts, with the same weights."""
    other = copy.deepcopy(module)
    for part in other.modules():
        if isinstance(part, nn.TransformerDecoderLayer):
            part.norm1.register_forward_hook(lambda module, given, result: result)
    return other


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


X, MEMORY = random(3, 20, 48), random(3, 9, 48, seed=1)
HIDDEN = torch.arange(20).expand(3, 20) >= torch.tensor([[20], [13], [1]])
NO_MEMORY = torch.arange(9).expand(3, 9) >= torch.tensor([[9], [4], [1]])
CAUSAL = torch.ones(20, 20, dtype=torch.bool).triu(1)
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"tgt_mask": CAUSAL, "tgt_is_causal": True},
    "paddings": {"tgt_key_padding_mask": HIDDEN, "memory_key_padding_mask": NO_MEMORY},
    "float": {"tgt_mask": random(12, 20, 20), "memory_mask": random(20, 9)},
    "bool": {"tgt_mask": CAUSAL, "memory_mask": random(12, 20, 9) > 0.7},
    "causal and padding": {
        "tgt_mask": CAUSAL, "tgt_is_causal": True, "tgt_key_padding_mask": HIDDEN
    },
}  # fmt: skip


@needs_native
class TestOneCall:
    @pytest.mark.parametrize("masks", MASKS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @torch.no_grad()
    def test_accurate(self, dtype: torch.dtype, masks: str) -> None:
        given = {
            n: m.bfloat16() if isinstance(m, Tensor) and m.is_floating_point() else m
            for n, m in MASKS[masks].items()
        }

        def of(dtype: torch.dtype) -> dict[str, Any]:
            floats = {
                n for n, m in given.items() if isinstance(m, Tensor) and m.dtype != torch.bool
            }
            return given | {n: given[n].to(dtype) for n in floats}

        for norm_first, activation in itertools.product((False, True), ("relu", "gelu")):
            layer = decoder_layer(norm_first=norm_first, activation=activation).to(dtype)
            x, memory = X.to(dtype), MEMORY.to(dtype)
            result = layer(x, memory, **of(dtype))
            assert calls(lambda: layer(x, memory, **of(dtype))) == 1  # noqa: B023
            in_parts = called_in_parts(layer)
            with ff.use_backend("reference"):
                formula = in_parts(x, memory, **of(dtype))
                exact = in_parts.double()(x.double(), memory.double(), **of(torch.float64))
            assert_accurate(*(t.flatten(1) for t in (result, exact, formula)))

    @pytest.mark.parametrize("weights", ["int8", "bf16"])
    @torch.no_grad()
    def test_quantised_weights(self, weights: str) -> None:
        for norm_first in (False, True):
            layer = decoder_layer(norm_first=norm_first)
            expected = layer(X, MEMORY)
            ff.quantize(layer, weights=weights)
            assert calls(lambda: layer(X, MEMORY)) == 1  # noqa: B023
            result = layer(X, MEMORY, **MASKS["paddings"])
            in_parts = called_in_parts(layer)(X, MEMORY, **MASKS["paddings"])
            torch.testing.assert_close(result, in_parts, rtol=0.0, atol=2e-2)
            cosine = torch.nn.functional.cosine_similarity(layer(X, MEMORY), expected, dim=-1)
            assert cosine.min() > 0.999

    @torch.no_grad()
    def test_parts_that_mean_more_are_called(self) -> None:
        def hook(part: str) -> Any:
            return lambda layer: layer.get_submodule(part).register_forward_hook(lambda *_: None)

        def another_activation(layer: Any) -> None:
            layer.activation = torch.tanh

        changes = {part: hook(part) for part in (
            "self_attn", "multihead_attn", "self_attn.out_proj", "multihead_attn.out_proj",
            "linear1", "linear2", "norm1", "norm2", "norm3", "dropout", "dropout1", "dropout2",
            "dropout3",
        )}  # fmt: skip
        changes |= {
            "training": lambda layer: layer.train(),
            "dropout in training": lambda layer: layer.dropout3.train(),
            "activation": another_activation,
            "in double": lambda layer: layer.double(),
        }
        for change in changes.values():
            layer = decoder_layer()
            change(layer)
            like = next(layer.parameters())
            assert calls(lambda: layer(X.to(like), MEMORY.to(like))) == 0  # noqa: B023

        class Own(ff.nn.TransformerDecoderLayer):
            pass

        assert calls(lambda: Own(48, 4, 70, batch_first=True).eval()(X, MEMORY)) == 0
        causal = {"memory_mask": torch.ones(20, 9).triu(1) > 0, "memory_is_causal": True}
        assert calls(lambda: decoder_layer()(X, MEMORY, **causal)) == 0
        assert calls(lambda: decoder_layer(batch_first=False)(X, X)) == 0
        with torch.enable_grad():
            assert calls(lambda: decoder_layer()(X, MEMORY)) == 0

    @torch.no_grad()
    def test_errors_are_those_of_the_parts(self) -> None:
        layer, in_parts = decoder_layer(), called_in_parts(decoder_layer())
        for given in (
            {"tgt": X[..., :40]}, {"tgt": X.bfloat16()}, {"memory": MEMORY[:2]},
            {"memory": MEMORY[..., :40]}, {"tgt_is_causal": True}, {"tgt_mask": CAUSAL[:19]},
            {"memory_key_padding_mask": HIDDEN}, {"memory": None},
        ):  # fmt: skip
            with pytest.raises(Exception) as ours:
                layer(**{"tgt": X, "memory": MEMORY, **given})
            with pytest.raises(type(ours.value)) as theirs:
                in_parts(**{"tgt": X, "memory": MEMORY, **given})
            assert str(ours.value) == str(theirs.value)

    @torch.no_grad()
    def test_explain(self) -> None:
        row = ff.explain(decoder_layer(), X, MEMORY).rows[0][1]
        assert row is not None and row.op == "decoder_layer" and row.chosen == "cpu"


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@torch.no_grad()
def test_token_by_token(norm_first: bool, batch_first: bool) -> None:
    """With a cache a decoder computes what the causal call does, whatever it is cut into."""
    model = decoder(norm_first=norm_first, batch_first=batch_first)
    turned = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    x, memory = turned(X), turned(MEMORY)
    masks = {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": NO_MEMORY}
    whole = model(x, memory, **masks)
    exact = copy.deepcopy(model).double()(x.double(), memory.double(), **masks)
    with ff.use_backend("reference"):
        formula = called_in_parts(model)(x, memory, **masks)
    for sizes in ((1,) * 20, (7, 1, 12), (20,)):
        cache = model.new_cache(memory, 24, memory_key_padding_mask=NO_MEMORY)
        steps = [model(turned(t), None, cache=cache) for t in X.split(sizes, 1)]
        assert cache.length == 20 and cache.capacity == 24
        together = torch.cat([turned(t) for t in steps], 1)
        assert_accurate(*(t.flatten(1) for t in (together, turned(exact), turned(formula))))
        torch.testing.assert_close(together, turned(whole))


@needs_native
@torch.no_grad()
def test_steps_are_one_call_a_layer() -> None:
    for weights in (None, "int8", "bf16"):
        model = decoder()
        whole = model(X, MEMORY, tgt_mask=CAUSAL, tgt_is_causal=True)
        if weights is not None:
            ff.quantize(model, weights=weights)
        cache = model.new_cache(MEMORY, 20)
        model(X[:, :4], None, cache=cache)
        assert calls(lambda: model(X[:, 4:5], None, cache=cache)) == 3  # noqa: B023
        steps = [model(t, None, cache=cache) for t in X[:, 5:].split(1, 1)]
        cosine = torch.nn.functional.cosine_similarity(torch.cat(steps, 1), whole[:, 5:], dim=-1)
        assert cosine.min() > (0.999 if weights else 0.99999)


@torch.no_grad()
def test_padding_and_shorter() -> None:
    """Padding of the tokens so far; tokens that are taken back."""
    model = decoder()
    masks = {"tgt_mask": CAUSAL, "tgt_key_padding_mask": HIDDEN.flip(1)}
    whole = model(X, MEMORY, **masks)
    cache, steps = model.new_cache(MEMORY, 20), []
    for end in (6, 7, 20):
        model(random(3, 20 - cache.length, 48, seed=5), None, cache=cache)
        cache.length -= 20 - sum(t.shape[1] for t in steps)
        x, hidden = X[:, cache.length : end], HIDDEN.flip(1)[:, :end]
        steps.append(model(x, None, tgt_key_padding_mask=hidden, cache=cache))
    torch.testing.assert_close(torch.cat(steps, 1), whole)


@torch.no_grad()
def test_beams() -> None:
    """Other entries of the batch go on."""
    model, order = decoder(), torch.tensor([2, 0, 2])
    cache = model.new_cache(MEMORY, 20, memory_key_padding_mask=NO_MEMORY)
    model(X[:, :5], None, cache=cache)
    cache.reorder(order)
    result = model(X[:, 5:9], None, cache=cache)
    given = {"tgt_mask": CAUSAL[:9, :9], "memory_key_padding_mask": NO_MEMORY[order]}
    together = torch.cat([X[order, :5], X[:, 5:9]], 1)
    expected = model(together, MEMORY[order], **given)[:, 5:]
    torch.testing.assert_close(result, expected)


def test_other_dtypes_autocast_and_gradients() -> None:
    model = decoder().double()
    x, memory = X.double().requires_grad_(), MEMORY.double()
    cache = model.new_cache(memory, 20)
    result = model(x, None, cache=cache)
    whole = model(x, memory, tgt_mask=CAUSAL)
    torch.testing.assert_close(result, whole)
    leaves = [x, *model.parameters()]
    ours, theirs = (torch.autograd.grad(t.pow(3).sum(), leaves) for t in (result, whole))
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model = decoder()
        cache = model.new_cache(MEMORY, 20)
        result = model(X, None, cache=cache)
        assert cache.memories[0][0].dtype == torch.bfloat16
        whole = model(X, MEMORY, tgt_mask=CAUSAL)
    torch.testing.assert_close(result.float(), whole.float(), rtol=0.0, atol=0.1)


@torch.no_grad()
def test_refused() -> None:
    model = decoder()
    cache = model.new_cache(MEMORY, 4)
    for x, given, match in (
        (X[:, :5], {}, "cache has room for 3 sequences of 4 tokens and holds 0; tgt is"),
        (X[:2, :4], {}, "cache has room for 3 sequences"),
        (X[0, :4], {}, "tgt must have a batch dimension"),
        (X[:, :4], {"memory": MEMORY}, "with a cache, memory and masks"),
        (X[:, :4], {"tgt_mask": CAUSAL}, "with a cache, memory and masks"),
        (X[:, :4], {"tgt_key_padding_mask": HIDDEN}, "key_padding_mask must"),
    ):
        with pytest.raises(ValueError, match=match):
            model(x, **{"memory": None, "cache": cache, **given})
    assert cache.length == 0
    for memory, capacity, padding, error, match in (
        (MEMORY, 0, None, ValueError, "capacity must be at least 1, got 0"),
        (MEMORY, 2.0, None, TypeError, "capacity must be an int, got float"),
        (MEMORY[0], 2, None, ValueError, "memory must have a batch dimension"),
        (MEMORY, 2, HIDDEN, ValueError, r"memory_key_padding_mask must be \(3, 9\)"),
        (MEMORY, 2, HIDDEN.float(), TypeError, "memory_key_padding_mask must be bool"),
    ):
        with pytest.raises(error, match=match):
            model.new_cache(memory, capacity, padding)
    for change, match in (
        (lambda m: m.train(), "drops out in training"),
        (lambda m: m.layers[1].norm2.register_forward_hook(lambda *_: None), "is hooked"),
        (lambda m: setattr(m.layers[2], "activation", torch.tanh), "another activation"),
        (lambda m: setattr(m.layers[0], "__class__", nn.TransformerDecoderLayer), "must be of"),
    ):
        model = decoder()
        cache = model.new_cache(MEMORY, 4)
        change(model)
        with pytest.raises(ValueError, match=match):
            model(X[:, :1], None, cache=cache)
        assert cache.length == 0
    model = decoder().train()
    with pytest.raises(ValueError, match="multihead_attn is replaced or hooked"):
        model.new_cache(MEMORY, 4)
