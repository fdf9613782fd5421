"""accelerate() and restore(): what changes in a model, and all that does not."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

import fastfusion as ff
from fastfusion.acceleration import swaps
from fastfusion.nn._linear import AcceleratedFeedForward, AcceleratedLinear

X = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """An encoder, a decoder and a head of torch.nn, as people write them."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"batch_first": True, "activation": "gelu"}
        layer = nn.TransformerEncoderLayer(128, 4, 256, **options)
        self.embed = nn.Linear(64, 128)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(128, 4, 256, **options)
        self.head = nn.Sequential(
            nn.Linear(128, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 128)
        )

    def forward(self, x: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        memory = self.encoder(self.embed(x), src_key_padding_mask=padding)
        decoded = self.decoder(memory[:, :5], memory, memory_key_padding_mask=padding)
        return {"memory": memory, "answer": self.head(decoded)}


def build() -> Model:
    torch.manual_seed(1)
    return Model().eval()


def outputs(model: nn.Module, *args: Any) -> list[Tensor]:
    with torch.no_grad():
        return [*model(*args).values()]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@pytest.fixture
def registry() -> Iterator[None]:
    """A test's own swaps end with it."""
    before = dict(swaps._REGISTRY)
    yield
    swaps._REGISTRY.clear()
    swaps._REGISTRY.update(before)


# ---- what it does


def test_layers_become_ours_and_nothing_else_changes() -> None:
    model, stock = build(), build()
    parameters = dict(model.named_parameters())
    assert ff.accelerate(model) is model
    assert isinstance(model.encoder, ff.nn.TransformerEncoder)
    assert all(type(layer) is ff.nn.TransformerEncoderLayer for layer in model.encoder.layers)
    assert type(model.decoder.multihead_attn) is ff.nn.MultiheadAttention
    assert type(model.embed) is AcceleratedLinear
    assert type(model.head) is AcceleratedFeedForward
    assert isinstance(model.head, nn.Sequential) and isinstance(model.embed, nn.Linear)
    assert type(model.decoder.linear1) is nn.Linear  # the layer around it calls the op
    now = dict(model.named_parameters())
    assert list(now) == list(parameters)
    assert all(now[name] is parameters[name] for name in now)
    assert list(model.state_dict()) == list(stock.state_dict())
    padding = torch.arange(20).expand(2, 20) >= 15
    for given in ((X,), (X, padding)):
        assert_close(outputs(model, *given), outputs(stock, *given))


def test_restore_gives_back_the_same_bits_and_classes() -> None:
    model = build()
    before = outputs(model, X)
    kinds = [type(module) for module in model.modules()]
    dictionaries = [set(vars(module)) for module in model.modules()]
    ff.accelerate(model, example_inputs=X)
    assert ff.restore(model) is model
    assert all(map(torch.equal, outputs(model, X), before))
    assert [type(module) for module in model.modules()] == kinds
    assert [set(vars(module)) for module in model.modules()] == dictionaries
    assert not any(module._forward_pre_hooks for module in model.modules())
    ff.restore(model)  # nothing to do


def test_twice_is_once() -> None:
    model = ff.accelerate(build())
    kinds, hooks = [], []
    for _ in range(2):
        kinds.append([type(module) for module in model.modules()])
        hooks.append([len(module._forward_pre_hooks) for module in model.modules()])
        first = model.fastfusion_report
        ff.accelerate(model)
    assert kinds[0] == kinds[1] and hooks[0] == hooks[1]
    assert model.fastfusion_report.layers == first.layers


def test_training_goes_on_as_before() -> None:
    gradients = []
    for model in (build(), ff.accelerate(build())):
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            sum(t.square().mean() for t in model(X).values()).backward()
            optimizer.step()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert float((ours - theirs).norm()) <= 1e-4 * float(theirs.norm())


def test_a_copy_and_a_pickle_are_accelerated_and_can_be_restored() -> None:
    stock = build()
    before = outputs(stock, X)
    copied = ff.accelerate(stock, inplace=False)
    assert copied is not stock and type(stock.embed) is nn.Linear
    for other in (copy.deepcopy(copied), pickle.loads(pickle.dumps(copied))):
        assert type(other.embed) is AcceleratedLinear
        assert_close(outputs(other, X), before)
        ff.restore(other)
        assert type(other.embed) is nn.Linear
        assert all(map(torch.equal, outputs(other, X), before))
    assert type(copied.embed) is AcceleratedLinear


def test_a_layer_alone_and_shared_ones() -> None:
    layer = ff.accelerate(nn.Linear(128, 256))
    assert type(layer) is AcceleratedLinear
    shared = nn.Linear(128, 128)
    embedding = nn.Embedding(128, 128)
    tied = nn.Linear(128, 128, bias=False)
    tied.weight = embedding.weight
    model = ff.accelerate(nn.ModuleList([shared, shared, embedding, tied]))
    assert model[0] is model[1] and type(model[0]) is AcceleratedLinear
    assert model[3].weight is embedding.weight
    assert [row.name for row in model.fastfusion_report.swapped] == ["0", "3"]
    assert type(ff.restore(model)[0]) is nn.Linear


def test_hooks_count_and_parts_stay_in_force() -> None:
    model = build()
    seen = []
    model.embed.register_forward_hook(lambda *_: seen.append("embed"))
    model.head[0].register_forward_hook(lambda *_: seen.append("head.0"))
    model.encoder.layers[0].linear1.register_forward_hook(lambda *_: seen.append("linear1"))
    before = outputs(model, X)
    ff.accelerate(model)
    seen.clear()
    assert_close(outputs(model, X), before)
    assert seen == ["embed", "linear1", "head.0"]

    class Adapter(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + 1.0

    model.head[0] = Adapter(model.head[0])
    with torch.no_grad():
        y = torch.randn(2, 5, 128)
        expected = model.head[3](nn.functional.gelu(model.head[0](y)))
        torch.testing.assert_close(model.head(y), expected)


def test_compile_and_export_take_it() -> None:
    model, x = ff.accelerate(build()), X.clone()
    expected = outputs(model, x)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_close([*compiled(x).values()], expected)
        exported = torch.export.export(model, (x,))
        assert_close([*exported.module()(x).values()], expected)


def test_symbolic_trace_takes_the_same_atoms() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(128, 128), nn.Linear(128, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    model = ff.accelerate(Small())
    targets = [
        n.target for n in torch.fx.symbolic_trace(model).graph.nodes if n.op == "call_module"
    ]
    assert targets == ["first", "last"]


# ---- narrower weights


@pytest.mark.parametrize(("weights", "share"), [("bf16", 0.51), ("int8", 0.27)])
def test_narrower_weights(weights: str, share: float) -> None:
    model, stock = build(), build()
    ff.accelerate(model, weights=weights, example_inputs=(X,))
    report = model.fastfusion_report
    assert report.bytes_after <= share * report.bytes_before
    assert 0.0 < report.deviation <= report.bound
    assert isinstance(model.encoder.layers[0].linear1, ff.nn.QuantizedLinear)
    other = ff.accelerate(build(), weights=weights)
    other.load_state_dict(model.state_dict())
    assert all(map(torch.equal, outputs(other, X), outputs(model, X)))
    with pytest.raises(ValueError, match=f"{weights} now.*load the model again"):
        ff.restore(model)
    assert type(model.encoder) is nn.TransformerEncoder
    for now, before in zip(outputs(stock, X), outputs(build(), X), strict=True):
        assert torch.equal(now, before)


def test_weights_that_deviate_are_taken_back() -> None:
    before = outputs(build(), X)
    all_of_them = ff.accelerate(build(), weights="int8", example_inputs=(X,)).fastfusion_report
    for bound in (all_of_them.deviation / 2, 1e-4):
        model = build()
        ff.accelerate(model, weights="int8", example_inputs=(X,), atol=bound)
        report = model.fastfusion_report
        assert report.deviation <= bound
        reason = "rolled back: with it outputs deviate more than allowed"
        back = [row for row in report.quantization.kept if row.reason == reason]
        assert back and len(report.quantization.quantized) + len(back) == len(
            all_of_them.quantization.quantized
        )
        apart = [
            float((now - then).abs().max())
            for now, then in zip(outputs(model, X), before, strict=True)
        ]
        assert max(apart) == pytest.approx(report.deviation, rel=1e-6)
        left = report.quantization.quantized
        assert bool(left) == (bound > 1e-4)
        if not left:
            names = (sorted(dict(m.named_parameters())) for m in (model, build()))
            assert next(names) == next(names)


def test_narrow_weights_are_not_forgotten() -> None:
    model = build()
    first = ff.accelerate(model, weights="int8").fastfusion_report
    narrow = {row.name for row in first.quantization.quantized}
    again = ff.accelerate(model).fastfusion_report
    assert {row.name for row in again.quantization.quantized} == narrow
    assert again.quantization.bytes_before == first.quantization.bytes_before
    with pytest.raises(ValueError, match=f"the weights of {len(narrow)} layers are int8 now"):
        ff.restore(model)
    model = ff.accelerate(build(), weights="bf16")
    model.embed = nn.Linear(model.embed.in_features, model.embed.out_features)
    again = ff.accelerate(model, weights="int8").fastfusion_report
    kinds = {row.name: row.weights for row in again.quantization.quantized}
    assert kinds["embed"] == "int8" and {*kinds.values()} == {"int8", "bf16"}
    ff.quantize(untouched := build())  # by somebody's own hand
    assert ff.restore(ff.accelerate(untouched)) is untouched


# ---- the proof


class Off(nn.Linear):
    """Someone's layer."""


class OffSwap(Off):
    """A swap that is wrong."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.5


def test_layers_at_fault_are_found_named_and_rolled_back(registry: None) -> None:
    ff.register_swap(Off, lambda module: OffSwap if module.bias is None else None)
    model = nn.Sequential(
        *[Off(64, 64, bias=i not in (3, 7)) for i in range(9)], nn.Linear(64, 256)
    ).eval()
    with torch.no_grad():
        before = model(X)
        ff.accelerate(model, example_inputs=X)
        torch.testing.assert_close(model(X), before)
    report = model.fastfusion_report
    assert [row.name for row in report.kept] == ["3", "7"]
    assert all("rolled back" in row.reason and row.deviation > report.bound for row in report.kept)
    assert [row.name for row in report.swapped] == ["9"]
    assert type(model[3]) is Off and type(model[9]) is AcceleratedLinear
    assert report.deviation <= report.bound
    # Allowed by whoever asks for it.
    ff.accelerate(model, example_inputs=X, atol=10.0)
    assert type(model[3]) is OffSwap


def test_the_report_says_what_was_left_and_what_ran() -> None:
    class OddAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1) @ x.mT @ x

    model = nn.Sequential(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), OddAttention())
    model.eval()
    report = ff.accelerate(model, example_inputs=X).fastfusion_report
    rows = {row.name: row for row in report.layers}
    assert rows["1"].target is None and rows["1"].reason == "no swap of it is known"
    assert rows["0"].source == "torch.nn.TransformerEncoderLayer"
    assert rows["0"].target == "fastfusion.nn.TransformerEncoderLayer"
    assert rows["0"].road.startswith("encoder_layer: ")
    assert rows["0.self_attn"].road == "in the call of the layer around it"
    assert report.ms_before > 0 and report.ms_after > 0
    assert report.bytes_before == report.bytes_after
    text = str(report)
    for part in ("OddAttention", "no swap of it is known", "encoder_layer", "largest difference"):
        assert part in text
    ff.accelerate(model)
    assert model.fastfusion_report.deviation is None
    assert "largest difference" not in str(model.fastfusion_report)


def test_example_inputs_leave_no_trace() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(20), nn.Linear(64, 256)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
            cache.append(x)
            return self.drop(self.linear(self.norm(x))) + torch.rand(256) * len(cache)

    model, cache = Noisy().train(), []
    model.drop.eval()
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    ff.accelerate(model, example_inputs={"x": X, "cache": cache})
    assert torch.equal(torch.get_rng_state(), state)
    assert cache == []
    assert model.training and model.linear.training and not model.drop.training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, statistics[name])
    assert model.fastfusion_report.deviation <= model.fastfusion_report.bound
    assert type(model.linear) is AcceleratedLinear


def test_a_model_that_differs_from_call_to_call_is_named() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.calls += 1
            return x + Counting.calls

    report = ff.accelerate(Counting(), example_inputs=X).fastfusion_report
    assert "differs by 1.00e+00 from call to call" in report.notes[0]


def test_padding_does_not_count() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 256)

        def forward(self, x: Tensor, attention_mask: Tensor, decoder_x: Any = None) -> Tensor:
            wild = (1 - attention_mask)[:, :, None] * (type(self.linear) is not nn.Linear)
            return self.linear(x) + 9.0 * wild

    mask = (torch.arange(20).expand(2, 20) < 15).long()
    for given, deviates in (
        ({"attention_mask": mask}, False),
        ({"attention_mask": mask, "decoder_x": X}, True),
        ({"attention_mask": mask.float()}, True),
    ):
        report = ff.accelerate(Padded(), example_inputs={"x": X, **given}).fastfusion_report
        assert bool(report.kept) == deviates


def test_a_language_models_last_layer_gets_a_weight_of_its_own() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(1000, 128)
            self.head = nn.Linear(128, 1000, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    model, ids = Language().eval(), torch.arange(20)[None]
    wide, before = model.embed.weight, model.embed(ids)
    ff.accelerate(model, weights="int8", example_inputs=ids)
    assert model.embed.weight is wide and isinstance(model.head, ff.nn.QuantizedLinear)
    assert torch.equal(model.embed(ids), before)
    report = model.fastfusion_report
    assert report.bytes_before < report.bytes_after < 1.3 * report.bytes_before
    ff.accelerate(model := Language().eval(), weights="int8", example_inputs=ids, atol=1e-9)
    assert model.head.weight is model.embed.weight, "taken back, and tied again"


def test_nan_counts_where_it_is_new() -> None:
    from fastfusion.acceleration.verification import deviation

    nan, one = torch.tensor([float("nan"), 1.0]), torch.ones(2)
    assert deviation([nan], [one]) == 0.0  # a softmax over no key, which ours makes 0
    assert deviation([one], [nan]) == float("inf")
    assert deviation([one], [one.half().float() * 1.5]) == 0.5
    assert deviation([one], [torch.ones(3)]) == float("inf")
    assert deviation([one], [one, one]) == float("inf")
    assert deviation([torch.tensor([3])], [torch.tensor([4])]) == float("inf")
    assert deviation([one / 0], [one / 0]) == 0.0


# ---- the registry


def test_factories(registry: None) -> None:
    class Known(nn.Module):
        pass

    class Faster(Known):
        pass

    class Child(Known):
        pass

    model = nn.ModuleList([Known(), Child()])
    assert not ff.accelerate(model).fastfusion_report.layers
    ff.register_swap(Known, Faster)
    ff.accelerate(model)
    assert type(model[0]) is Faster and type(model[1]) is Child
    ff.restore(model)
    ff.register_swap(swaps.name_of(Known), lambda module: "it is too old")
    assert [row.reason for row in ff.accelerate(model).fastfusion_report.kept] == ["it is too old"]
    ff.register_swap(Known, lambda module: f"a {type(module).__name__}", subclasses=True)
    reasons = [row.reason for row in ff.accelerate(model).fastfusion_report.kept]
    assert reasons == ["a Known", "a Child"]
    ff.register_swap(Known, f"{__name__}:_nothing_to_say")
    assert not ff.accelerate(model).fastfusion_report.layers
    ff.register_swap(Known, nn.Identity)
    with pytest.raises(TypeError, match="Known must be a subclass of it, got.*Identity"):
        ff.accelerate(model)


def _nothing_to_say(module: nn.Module) -> None:
    return None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, nn.Linear), "source_class must be a subclass of torch.nn.Module"),
        ((int, nn.Linear), "source_class must be a subclass of torch.nn.Module"),
        ((nn.Linear, "somewhere"), "factory must be 'module:name'"),
        ((nn.Linear, 3), "factory must be a class, a function"),
    ],
)
def test_bad_registrations(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ff.register_swap(*arguments)


def test_layers_with_another_forward_stay() -> None:
    model = nn.ModuleList([nn.Linear(128, 128)])
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    report = ff.accelerate(model).fastfusion_report
    assert [(row.name, row.reason) for row in report.kept] == [("0", "its forward was replaced")]


def test_a_class_that_changed_since_is_named() -> None:
    model = ff.accelerate(nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)))

    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.triu() + weight.triu(1).mT

    parametrize.register_parametrization(model[0], "weight", Symmetric())
    with torch.no_grad():
        expected = nn.functional.linear(X.repeat(1, 1, 2), model[0].weight, model[0].bias)
        torch.testing.assert_close(model[0](X.repeat(1, 1, 2)), expected)
    with pytest.raises(
        ValueError, match="1 layers could not be restored, '0' first: it has become"
    ):
        ff.restore(model)
    assert type(model[2]) is nn.Linear
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(ff.restore(model)[0]) is nn.Linear


# ---- what it refuses


def _compiled() -> nn.Module:
    return torch.compile(nn.Linear(4, 4))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: 3, "model must be a torch.nn.Module, got int"),
        (_compiled, "OptimizedModule: accelerate the model first, then torch.compile it"),
        (lambda: torch.jit.script(nn.ReLU()), "its code is fixed"),
        (lambda: nn.ModuleList([torch.fx.symbolic_trace(nn.ReLU())]), "model.0 is a .*traced"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_models_that_it_refuses(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ff.accelerate(make())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": "int4"}, ValueError, "weights must be one of 'int8', 'bf16'"),
        ({"example_inputs": 3}, TypeError, "example_inputs must be a tuple"),
        ({"atol": "small"}, TypeError, "atol must be a number"),
        ({"atol": -1.0}, ValueError, "atol must not be negative"),
        ({"atol": float("nan")}, ValueError, "atol must not be negative"),
        ({"example_inputs": {3: X}}, TypeError, "example_inputs must be a tuple"),
    ],
)
def test_bad_arguments(options: Any, error: type[Exception], message: str) -> None:
    model = nn.ModuleList([nn.Linear(128, 128)])
    with pytest.raises(error, match=message):
        ff.accelerate(model, **options)
    assert type(model[0]) is nn.Linear


def test_outputs_must_be_comparable() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    with pytest.raises(TypeError, match="returns no tensors"):
        ff.accelerate(Silent(), example_inputs=X)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        ff.restore(3)  # type: ignore[arg-type]
