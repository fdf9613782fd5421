"""When Transformer layers are one call of an op, and when they call their parts."""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import fastfusion as ff
from fastfusion.backends import library

pytestmark = pytest.mark.skipif(library.native is None, reason="without the compiled part")
OURS = "fastfusion.encoder_layer_forward.default"


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the calls of the op."""
    seen: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if str(func) == OURS:
                seen.append(OURS)
            return func(*args, **(kwargs or {}))

    with Count():
        yield seen


def calls(run: Callable[[], Any]) -> int:
    with counted() as seen:
        run()
    return len(seen)


def encoder_layer(width: int = 48, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"batch_first": True, "activation": "gelu", "dim_feedforward": 70, **options}
    return ff.nn.TransformerEncoderLayer(width, 4, **options).eval()


def called_in_parts(layer: Any) -> Any:
    """The layer that calls its parts, with the same weights."""
    other = copy.deepcopy(layer)
    other.norm1.register_forward_hook(lambda module, given, result: result)
    return other


X = torch.randn(3, 20, 48, generator=torch.Generator().manual_seed(0))
HIDDEN = torch.arange(20).expand(3, 20) >= torch.tensor([[20], [13], [1]])
CAUSAL = torch.ones(20, 20, dtype=torch.bool).triu(1)
BIAS = torch.randn(12, 20, 20, generator=torch.Generator().manual_seed(1))
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"src_key_padding_mask": HIDDEN},
    "bool": {"src_mask": CAUSAL.flip(0).roll(1, 0)},
    "bool per head": {"src_mask": BIAS > 0.5},
    "float": {"src_mask": BIAS},
    "causal": {"src_mask": CAUSAL, "is_causal": True},
    "causal and padding": {
        "src_mask": CAUSAL, "is_causal": True, "src_key_padding_mask": HIDDEN
    },
    "both": {"src_mask": BIAS > 0.5, "src_key_padding_mask": HIDDEN},
}  # fmt: skip


def in_dtype(masks: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: BIAS.bfloat16().to(dtype) if v is BIAS else v for k, v in masks.items()}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_one_call(dtype: torch.dtype, masks: str) -> None:
    for norm_first, activation in itertools.product((False, True), ("relu", "gelu")):
        layer = encoder_layer(norm_first=norm_first, activation=activation)
        low, x = copy.deepcopy(layer).to(dtype), X.to(dtype)
        given, in_double = (in_dtype(MASKS[masks], d) for d in (dtype, torch.float64))
        with counted() as seen:
            result = low(x, **given)
        assert len(seen) == 1
        in_parts = called_in_parts(low)
        with counted() as seen, ff.use_backend("reference"):
            formula = in_parts(x, **given)
            exact = in_parts.double()(x.double(), **in_double)
        assert not seen
        assert_accurate(*(t.flatten(1) for t in (result, exact, formula)))


@pytest.mark.parametrize("weights", ["int8", "bf16"])
@torch.no_grad()
def test_quantised_weights(weights: str) -> None:
    for norm_first in (False, True):
        layer = encoder_layer(norm_first=norm_first)
        expected = layer(X)
        ff.quantize(layer, weights=weights)
        with counted() as seen:
            result = layer(X, src_key_padding_mask=HIDDEN)
        assert len(seen) == 1
        torch.testing.assert_close(
            result, called_in_parts(layer)(X, src_key_padding_mask=HIDDEN), rtol=0.0, atol=2e-2
        )
        cosine = torch.nn.functional.cosine_similarity(layer(X), expected, dim=-1)
        assert cosine.min() > 0.999


@torch.no_grad()
def test_stacks() -> None:
    """Layer by layer, also where torch would leave out padding."""
    stack = ff.nn.TransformerEncoder(encoder_layer(), 3, nn.LayerNorm(48)).eval()
    for masks in ({}, {"src_key_padding_mask": HIDDEN}):
        assert calls(lambda masks=masks: stack(X, **masks)) == 3
        others = copy.deepcopy(stack)
        others.layers = nn.ModuleList(map(called_in_parts, stack.layers))
        torch.testing.assert_close(stack(X, **masks), others(X, **masks))
    together = stack(X)
    assert all(torch.equal(stack(X[b : b + 1])[0], together[b]) for b in range(3))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("weights", [None, "int8"])
@torch.no_grad()
def test_padded_tokens_are_left_out(norm_first: bool, weights: str | None) -> None:
    """A sequence has the bits that it has alone; hidden tokens are 0, whatever they were."""
    stack = ff.nn.TransformerEncoder(encoder_layer(norm_first=norm_first), 3).eval()
    if norm_first:
        stack.use_nested_tensor = True  # torch would leave them out of its other kind of layer
    if weights is not None:
        ff.quantize(stack, weights)
    x = X.clone()
    x[HIDDEN] = torch.nan
    with counted() as seen:
        result = stack(x, src_key_padding_mask=HIDDEN)
    assert len(seen) == 3
    assert (result[HIDDEN] == 0.0).all()
    for b, length in enumerate((20, 13, 1)):
        assert torch.equal(result[b, :length], stack(X[b : b + 1, :length])[0])
    empty = torch.ones(3, 20, dtype=torch.bool)
    assert (stack(x, src_key_padding_mask=empty) == 0.0).all()
    turned = HIDDEN.flip(1)  # torch leaves out what is at the end
    assert stack(X, src_key_padding_mask=turned)[turned].abs().min() > 0.0


@torch.no_grad()
def test_layers_whose_calls_are_watched_see_padded_tokens() -> None:
    stack = ff.nn.TransformerEncoder(encoder_layer(), 2).eval()
    expected, shapes = stack(X, src_key_padding_mask=HIDDEN), []
    stack.layers[1].register_forward_hook(lambda m, given, result: shapes.append(result.shape))
    torch.testing.assert_close(stack(X, src_key_padding_mask=HIDDEN), expected)
    assert shapes == [X.shape]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@torch.no_grad()
def test_nested_input_is_one_call(layout: torch.layout) -> None:
    layer = encoder_layer()
    parts = [X[0], X[1, :13], X[2, :1]]
    nested = torch.nested.as_nested_tensor(parts, layout=layout)
    with counted() as seen:
        result = layer(nested)
    assert len(seen) == 1 and result.layout == layout
    for ours, part in zip(result.unbind(), parts, strict=True):
        assert torch.equal(ours, layer(part[None])[0])


@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_fusion_modules(norm_first: bool) -> None:
    """Cross-attention and fusion layers, with each kind of mask, beside their parts."""
    torch.manual_seed(0)
    image, words = torch.randn(2, 9, 24), torch.randn(2, 5, 16)
    no_word, no_pair = torch.rand(2, 5) < 0.4, torch.rand(2, 1, 9, 5) < 0.4
    attend = ff.nn.CrossAttention(24, 16, 4).eval()
    fuse = ff.nn.CrossModalAttention(24, 16, 4, dim_feedforward=40, norm_first=norm_first).eval()
    for layer, masks in (
        (attend, {}), (attend, {"key_padding_mask": no_word}), (attend, {"attn_mask": no_pair}),
        (fuse, {}), (fuse, {"text_padding_mask": no_word}), (fuse, {"attn_mask": no_pair}),
    ):  # fmt: skip
        row = ff.explain(layer, image, words, **masks).rows[0][1]
        assert row is not None and row.chosen == "cpu" and row.op.endswith("_layer")
        in_parts = copy.deepcopy(layer)
        for part in in_parts.modules():
            part.register_forward_hook(lambda module, given, result: None)
        assert "_layer" not in str(ff.explain(in_parts, image, words, **masks))
        torch.testing.assert_close(
            layer(image, words, **masks), in_parts(image, words, **masks), rtol=1e-5, atol=2e-6
        )


@torch.no_grad()
def test_negative_views() -> None:
    """torch keeps some signs beside the numbers; they count, in whatever tensor."""
    layer = encoder_layer()
    for part in ("src", "linear1.weight", "norm1.bias"):
        changed, x = copy.deepcopy(layer), X
        if part == "src":
            x = torch._neg_view(X)
        else:
            owner, name = part.split(".")
            own = getattr(changed, owner)._parameters
            own[name] = nn.Parameter(torch._neg_view(own[name].detach()), requires_grad=False)
        torch.testing.assert_close(changed(x), called_in_parts(copy.deepcopy(changed))(x))


@torch.no_grad()
def test_weights_are_read_in_place() -> None:
    layer = encoder_layer()
    layer(X)
    layer.linear1.weight.data.view(-1)[::3] = 0.1
    layer.load_state_dict({k: 0.9 * v for k, v in layer.state_dict().items()})
    torch.testing.assert_close(layer(X), called_in_parts(layer)(X))


def hook(part: str) -> Callable[[Any], Any]:
    def change(layer: Any) -> None:
        layer.get_submodule(part).register_forward_hook(lambda module, given, result: None)

    return change


def hook_before(part: str) -> Callable[[Any], Any]:
    def change(layer: Any) -> None:
        layer.get_submodule(part).register_forward_pre_hook(lambda module, given: None)

    return change


def replace(part: str) -> Callable[[Any], Any]:
    def change(layer: Any) -> None:
        old = layer.get_submodule(part)
        other = type("Other", (type(old),), {})
        old.__class__ = other

    return change


def own_forward(layer: Any) -> None:
    layer.linear2.forward = lambda x: torch.zeros(x.shape[:-1] + (48,))


def parametrized(layer: Any) -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2.0 * weight

    parametrize.register_parametrization(layer.linear1, "weight", Twice())


def parametrized_attention(layer: Any) -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2.0 * weight

    parametrize.register_parametrization(layer.self_attn, "in_proj_weight", Twice())


def dropping(layer: Any) -> None:
    layer.dropout1.train()


def dropping_weights(layer: Any) -> None:
    layer.self_attn.train()


def another_activation(layer: Any) -> None:
    layer.activation = torch.tanh


def wide_norm(layer: Any) -> None:
    layer.norm2 = nn.LayerNorm((20, 48))


def without_a_part(layer: Any) -> None:
    layer.dropout = nn.Identity()


PARTS = (
    "self_attn", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2", "dropout",
    "dropout1", "dropout2",
)  # fmt: skip
CHANGES: dict[str, Callable[[Any], Any]] = {
    **{f"{part} hooked": hook(part) for part in PARTS},
    **{f"{part} hooked before": hook_before(part) for part in PARTS},
    **{f"{part} of another class": replace(part) for part in PARTS},
    "own forward": own_forward,
    "parametrized": parametrized,
    "parametrized attention": parametrized_attention,
    "dropout in training": dropping,
    "weights dropped": dropping_weights,
    "activation": another_activation,
    "norm over two dimensions": wide_norm,
    "no dropout module": without_a_part,
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_parts_that_mean_more_are_called(name: str) -> None:
    layer = encoder_layer()
    CHANGES[name](layer)
    assert calls(lambda: layer(X)) == 0


class OfAnother(ff.nn.TransformerEncoderLayer):
    """May override what it likes."""


def run_of_a_subclass(layer: Any) -> Any:
    return OfAnother(48, 4, 70, batch_first=True).eval()(X)


def run_with_gradients(layer: Any) -> Any:
    with torch.enable_grad():
        return layer(X)


def run_training(layer: Any) -> Any:
    return layer.train()(X)


def run_autocast(layer: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(X)


def run_vmap(layer: Any) -> Any:
    return torch.vmap(layer)(X[None])


def run_forced(layer: Any) -> Any:
    with ff.use_backend("reference"):
        return layer(X)


def run_sequence_first(layer: Any) -> Any:
    return encoder_layer(batch_first=False)(X)


def run_in_double(layer: Any) -> Any:
    return layer.double()(X.double())


def run_with_maps(layer: Any) -> Any:
    with ff.attention_maps(layer) as maps:
        layer(X)
    assert len(maps) == 1


def run_global_hook(layer: Any) -> Any:
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, result: None)
    try:
        return layer(X)
    finally:
        handle.remove()


def run_of_a_subclassed_tensor(layer: Any) -> Any:
    class Own(Tensor):
        pass

    return layer(X.as_subclass(Own))


@pytest.mark.parametrize(
    "run",
    [
        run_of_a_subclass, run_with_gradients, run_training, run_autocast, run_vmap, run_forced,
        run_sequence_first, run_in_double, run_with_maps, run_global_hook,
        run_of_a_subclassed_tensor,
    ],
)  # fmt: skip
@torch.no_grad()
def test_calls_that_mean_more_are_the_parts(run: Any) -> None:
    assert calls(lambda: run(encoder_layer())) == 0


def test_compiled_and_exported_programs_have_the_parts() -> None:
    layer = encoder_layer()
    with torch.no_grad():
        expected = layer(X)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), expected)
        program = torch.export.export(layer, (X,))
        torch.testing.assert_close(program.module()(X), expected)
    assert "encoder_layer_forward" not in str(program.graph)


@torch.no_grad()
def test_errors_are_those_of_the_parts() -> None:
    layer, in_parts = encoder_layer(), called_in_parts(encoder_layer())
    for given in (
        {"src": X[..., :40]}, {"src": X.bfloat16()}, {"src": X, "is_causal": True},
        {"src": X, "src_mask": CAUSAL[:19]}, {"src": X, "src_key_padding_mask": HIDDEN[:2]},
    ):  # fmt: skip
        with pytest.raises(Exception) as ours:
            layer(**given)
        with pytest.raises(type(ours.value)) as theirs:
            in_parts(**given)
        assert str(ours.value) == str(theirs.value)
