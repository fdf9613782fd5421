"""Models of transformers without the attention interface, accelerated: equal, and faster roads."""

import copy
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from checkout import need_library
from torch import Tensor, nn

import fastfusion as ff
from fastfusion.acceleration import swaps
from fastfusion.acceleration.verification import tensors_of
from fastfusion.benchmarks.common import hub

transformers = need_library("transformers")

from fastfusion.integrations.transformers import _cross_modal, _deformable  # noqa: E402

MODELS = [
    "BLIP captioning", "BLIP text decoder", "BLIP-2 Q-Former", "BridgeTower", "FLAVA",
    "Grounding DINO", "LXMERT", "MM-Grounding-DINO", "Perceiver", "ViLT", "VisualBERT",
]  # fmt: skip
# Those that have layers which are one call.
WHOLE = {
    "BLIP captioning", "BLIP-2 Q-Former", "BridgeTower", "FLAVA", "LXMERT", "Perceiver", "ViLT",
    "VisualBERT",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(model: nn.Module, inputs: dict[str, Any], **more: Any) -> list[Tensor]:
    """All that a model returns, without gradients, from one random state: ViLT draws patches."""
    torch.manual_seed(0)
    with torch.no_grad():
        return [*tensors_of(model(**copy.deepcopy(inputs), **more))]


def in_double(model: nn.Module, inputs: dict[str, Any], **more: Any) -> list[Tensor]:
    wide = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    return run(copy.deepcopy(model).double(), wide, **more)


def assert_all_accurate(ours: list[Tensor], exact: list[Tensor], plain: list[Tensor]) -> None:
    assert len(ours) == len(exact) == len(plain)
    for a, e, p in zip(ours, exact, plain, strict=True):
        if a.is_floating_point():
            assert_accurate(a.flatten(1), e.flatten(1), p.flatten(1))
        else:
            assert torch.equal(a, p)


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def ops_in(model: nn.Module, inputs: dict[str, Any]) -> set[str]:
    """The ops that ran on the CPU kernels."""
    torch.manual_seed(0)
    with torch.no_grad():
        rows = ff.explain(model, **inputs).rows
    return {e.op for _, e in rows if e is not None and e.chosen == "cpu"}


@pytest.mark.parametrize("name", MODELS)
def test_equal_and_restored(name: str) -> None:
    model, inputs = hub.build(name, tiny=True, batch=2)
    before, exact = run(model, inputs), in_double(model, inputs)
    keys = [*model.state_dict()]
    kinds = [type(m) for m in model.modules()]
    assert ff.accelerate(model) is model
    assert [*model.state_dict()] == keys
    after = run(model, inputs)
    assert_all_accurate(after, exact, before)
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    ops = ops_in(model, inputs)
    assert ("encoder_layer" in ops) == (name in WHOLE)
    assert ops & {"encoder_layer", "scaled_dot_product_attention"}
    assert_same(run(copy.deepcopy(model), inputs), after)
    ff.restore(model)
    assert [type(m) for m in model.modules()] == kinds
    assert_same(run(model, inputs), before)


@pytest.mark.parametrize("name", MODELS)
def test_attention_weights_and_hidden_states(name: str) -> None:
    model, inputs = hub.build(name, tiny=True, batch=2)
    if name == "BLIP-2 Q-Former":  # "sdpa" would give none
        model.set_attn_implementation("eager")
    asked = {"output_attentions": True, "output_hidden_states": True}
    before, exact = run(model, inputs, **asked), in_double(model, inputs, **asked)
    ff.accelerate(model)
    quiet = run(model, inputs)
    assert_all_accurate(run(model, inputs, **asked), exact, before)
    # Recorders that stay behind record nothing more.
    assert_same(run(model, inputs), quiet)
    assert_all_accurate(run(model, inputs, **asked), exact, before)


def gradients(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor | None]:
    """Of all parameters, by all outputs."""
    torch.manual_seed(0)
    outputs = [*tensors_of(model(**copy.deepcopy(inputs)))]
    wanted = [t.nan_to_num().square().sum() for t in outputs if t.requires_grad]
    torch.stack(wanted).sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_training_is_as_before(name: str) -> None:
    """With dropout and gradients the layers are what they were, bit for bit; but for torch's own
    attention and the interface, which Grounding DINO has in its BERT: these train by our ops."""
    model, inputs = hub.build(name, tiny=True, batch=2)
    other = copy.deepcopy(model)
    run(ff.accelerate(other), inputs)
    others = 'attn_implementation="fastfusion"', "fastfusion.nn.MultiheadAttention"
    for _, module, swap in [*swaps.swapped(other)]:
        if str(swap) in others:
            swaps.leave(module)
    theirs, ours = gradients(model.train(), inputs), gradients(other.train(), inputs)
    assert any(g is not None for g in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_hooks_and_replaced_parts_count(name: str) -> None:
    model, inputs = hub.build(name, tiny=True, batch=2)
    ff.accelerate(model)
    quiet = run(model, inputs)
    called: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            called[name] = called.get(name, 0) + 1

        return hook

    handles = [m.register_forward_hook(count(n)) for n, m in model.named_modules() if n]
    hooked = run(model, inputs)
    for handle in handles:
        handle.remove()
    counted, called = called, {}
    ff.restore(model)
    handles = [m.register_forward_hook(count(n)) for n, m in model.named_modules() if n]
    before = run(model, inputs)
    for handle in handles:
        handle.remove()
    # torch.nn.MultiheadAttention reads the weights of its output projection; ours calls it.
    assert {k: n for k, n in counted.items() if not k.endswith(".attn.out_proj")} == called
    assert_all_accurate(hooked, in_double(model, inputs), before)
    ff.accelerate(model)
    assert_same(run(model, inputs), quiet)


class Adapter(nn.Module):
    """As adapters stand in the place of a layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + x.mean()
        return result


@pytest.mark.parametrize("name", MODELS)
def test_adapters_count(name: str) -> None:
    model, inputs = hub.build(name, tiny=True, batch=2)
    plain = run(model, inputs)
    places = [
        (parent, part)
        for parent in model.modules()
        for part, child in parent.named_children()
        if part in ("value", "values_text_proj", "qkv", "dense") and type(child) is nn.Linear
    ]
    for parent, part in places:
        setattr(parent, part, Adapter(getattr(parent, part)))
    before, exact = run(model, inputs), in_double(model, inputs)
    assert any(not torch.allclose(a, b) for a, b in zip(before, plain, strict=True))
    ff.accelerate(model)
    assert_all_accurate(run(model, inputs), exact, before)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_narrow_weights(name: str, weights: str) -> None:
    model, inputs = hub.build(name, tiny=True, batch=2)
    ff.accelerate(model, weights=weights, example_inputs=inputs)
    report = model.fastfusion_report
    assert report.quantization is not None and report.quantization.quantized
    assert report.deviation is not None and report.bound is not None
    assert report.deviation <= report.bound
    if name in WHOLE:
        assert "encoder_layer" in ops_in(model, inputs)


@pytest.mark.parametrize("name", ["BLIP captioning", "FLAVA", "LXMERT", "Perceiver", "ViLT",
                                  "VisualBERT"])  # fmt: skip
def test_the_name_alone_changes_nothing(name: str) -> None:
    """These models take `attn_implementation="fastfusion"` and never call it; masks that are made
    by that name have to be what their own code adds to scores."""
    model, inputs = hub.build(name, tiny=True, batch=2)
    before = run(model, inputs)
    config = copy.deepcopy(model.config)
    named = type(model)._from_config(config, attn_implementation="fastfusion").eval()
    named.load_state_dict(model.state_dict())
    assert_same(run(named, inputs), before)
    ff.accelerate(named)
    assert_all_accurate(run(named, inputs), in_double(model, inputs), before)


@pytest.mark.parametrize("batch", [1, 2])
def test_bridgetower_by_name_sees_both_ways(batch: int) -> None:
    """Its layers say that they are causal, where its own code never looks at that."""
    model, inputs = hub.build("BridgeTower", tiny=True, batch=batch)
    config = copy.deepcopy(model.config)
    named = type(model)._from_config(config, attn_implementation="fastfusion").eval()
    named.load_state_dict(model.state_dict())
    features = 3  # and then weights, which only eager code has
    before, exact = run(model, inputs)[:features], in_double(model, inputs)[:features]
    assert_all_accurate(run(named, inputs)[:features], exact, before)
    ff.accelerate(named)
    assert_all_accurate(run(named, inputs)[:features], exact, before)


def test_a_version_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = hub.build("LXMERT", tiny=True)
    before = run(model, inputs)
    # Which transformers replaces while it imports itself, piece by piece.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "6.0.0")
    ff.accelerate(model)
    kept = [row for row in model.fastfusion_report.kept if row.source == "transformers.LxmertLayer"]
    assert kept and all("6.0.0" in str(row.reason) for row in kept)
    assert len(run(model, inputs)) == len(before)


def test_layers_are_importable_by_name() -> None:
    """So models can be pickled, and whoever looks for a class by its name finds it."""
    model, inputs = hub.build("LXMERT", tiny=True)
    ff.accelerate(model)
    layer = model.encoder.x_layers[0]
    source = transformers.models.lxmert.modeling_lxmert.LxmertXLayer
    assert isinstance(layer, source) and type(layer).__name__ == "LxmertXLayer"
    assert_same(run(pickle.loads(pickle.dumps(model)), inputs), run(model, inputs))


# ---- BLIP: caches


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_the_same(beams: int) -> None:
    model, inputs = hub.build("BLIP captioning", tiny=True, batch=2)
    inputs = {"pixel_values": inputs["pixel_values"], "input_ids": inputs["input_ids"][:, :3]}
    asked = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False, "min_new_tokens": 12}
    before = model.generate(**inputs, **asked)
    ff.accelerate(model)
    assert torch.equal(model.generate(**inputs, **asked), before)
    without = model.generate(**inputs, **asked, use_cache=False)
    assert torch.equal(without, before)


@pytest.mark.parametrize("weights", [None, "bf16"])
@pytest.mark.parametrize("masked", [False, True])
def test_few_words_to_many_patches(masked: bool, weights: str | None) -> None:
    """Attended to as they are, without keys and values."""
    source = transformers.models.blip.modeling_blip_text
    config = transformers.BlipTextConfig(
        hidden_size=256, encoder_hidden_size=192, num_attention_heads=4, is_decoder=True
    )
    torch.manual_seed(0)
    module = source.BlipTextSelfAttention(config, is_cross_attention=True).eval()
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(2, 5, 256),
        "encoder_hidden_states": torch.randn(2, 300, 192),
    }
    if masked:
        hidden = torch.rand(2, 1, 1, 300) < 0.3
        inputs["encoder_attention_mask"] = torch.where(hidden, torch.finfo(torch.float32).min, 0.0)
    if weights is not None:  # which the products are made with
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(parameter.bfloat16())
    before, exact = run(module, inputs)[:1], in_double(module, inputs)[:1]
    ff.accelerate(module)
    if weights is not None:
        module.key = ff.nn.QuantizedLinear.from_linear(module.key, weights)
        module.value = ff.nn.QuantizedLinear.from_linear(module.value, weights)
    after = run(module, inputs)
    assert_all_accurate(after, exact, before)
    alone = run(module, {k: t[1:] for k, t in inputs.items()})
    assert torch.equal(alone[0], after[0][1:])
    assert "scaled_dot_product_attention" not in ops_in(module, inputs)


# ---- Grounding DINO


def fusion(words: int, pixels: int, batch: int = 1) -> tuple[nn.Module, list[Tensor]]:
    """The fusion attention of the published size, and its features and masks."""
    source = transformers.models.grounding_dino.modeling_grounding_dino
    torch.manual_seed(0)
    config = transformers.GroundingDinoConfig()
    module = source.GroundingDinoBiMultiHeadAttention(config).eval()
    for parameter in module.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.1)
    features = [torch.randn(batch, n, config.d_model) for n in (pixels, words)]
    masks = [torch.zeros(batch, n, dtype=torch.bool) for n in (pixels, words)]
    return module, [*features, *masks]


def unread(module: nn.Module, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """As in an encoder that nobody asked for attention weights."""
    from fastfusion.integrations.transformers import _grounding_dino

    with torch.no_grad(), _grounding_dino.weights_unread():
        (vision, no_weights), (text, none_either) = module(*tensors)
    assert no_weights is None and none_either is None
    return vision, text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("words", "pixels"), [(5, 40), (40, 20)])
def test_fusion_both_ways(words: int, pixels: int, dtype: torch.dtype) -> None:
    """On the side of the text or of the image, whichever is shorter."""
    module, tensors = fusion(words, pixels, batch=2)
    module = module.to(dtype)
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    tensors[2][1, -4:] = True
    tensors[3][1, -2:] = True
    with torch.no_grad():
        (plain_vision, a), (plain_text, b) = module(*tensors)
        wide = copy.deepcopy(module).double()(*(t.double() for t in tensors[:2]), *tensors[2:])
    ff.accelerate(module)
    with torch.no_grad():  # whoever calls it alone gets the weights
        (_, c), (_, d) = module(*tensors)
    assert_accurate(c.flatten(0, 1), wide[0][1].flatten(0, 1), a.flatten(0, 1))
    assert_accurate(d.flatten(0, 1), wide[1][1].flatten(0, 1), b.flatten(0, 1))
    vision, text = unread(module, tensors)
    for ours, exact, plain in (
        (vision, wide[0][0], plain_vision),
        (text, wide[1][0], plain_text),
    ):
        assert_accurate(ours.flatten(0, 1), exact.flatten(0, 1), plain.flatten(0, 1))
    alone = unread(module, [t[1:] for t in tensors])
    assert torch.equal(alone[0], vision[1:]) and torch.equal(alone[1], text[1:])


@pytest.mark.parametrize(("words", "pixels"), [(5, 40), (40, 20)])
def test_fusion_where_all_is_hidden(words: int, pixels: int) -> None:
    """There transformers has NaN; here nothing is gathered, and the biases of the outputs are left.
    What is hidden may be anything."""
    module, tensors = fusion(words, pixels, batch=3)
    tensors[3][0] = tensors[2][1] = True
    tensors[3][2, -1] = tensors[2][2, -1] = True
    ff.accelerate(module)
    seen = unread(module, tensors)
    tensors[0][2, -1], tensors[1][2, -1] = torch.nan, torch.inf
    vision, text = unread(module, tensors)
    assert vision[:2].isfinite().all() and text[:2].isfinite().all()
    assert torch.equal(vision[0], module.out_vision_proj.bias.expand(pixels, -1))
    torch.testing.assert_close(text[1], module.out_text_proj.bias.expand(words, -1))
    assert torch.equal(vision[2, :-1], seen[0][2, :-1])
    assert torch.equal(text[2, :-1], seen[1][2, :-1])


def test_fusion_has_no_score_matrix() -> None:
    """Nothing as large as the scores of one head is allocated."""
    words, pixels = 600, 1200
    module, tensors = fusion(words, pixels)
    ff.accelerate(module)
    with torch.profiler.profile(profile_memory=True) as profile:
        unread(module, tensors)
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    largest = max(e.nbytes() for e in events if e.name() == "[memory]")
    assert 0 < largest < words * pixels * 4


def sampling(queries: int, spread: float) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """Maps, places and weights of deformable attention; places leave the maps where they spread."""
    torch.manual_seed(0)
    shapes = [(6, 9), (3, 4), (1, 2)]
    pixels = sum(h * w for h, w in shapes)
    places = 0.5 + spread * (torch.rand(2, queries, 3, len(shapes), 4, 2) - 0.5)
    weights = torch.rand(2, queries, 3, len(shapes), 4)
    return shapes, [torch.randn(2, pixels, 3, 8), places, weights / weights.sum((-1, -2), True)]


@pytest.mark.parametrize("queries", [1, 300])
@pytest.mark.parametrize("spread", [0.9, 1.4, 4.0])
def test_sampling_of_deformable_attention(queries: int, spread: float) -> None:
    source = transformers.models.grounding_dino.modeling_grounding_dino
    shapes, tensors = sampling(queries, spread)

    def plain(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        module = source.MultiScaleDeformableAttention()
        result: Tensor = module(value, torch.tensor(shapes), shapes, None, places, weights, 64)
        return result.flatten(0, 1)

    ours = _deformable.sample(tensors[0], shapes, *tensors[1:]).flatten(0, 1)
    assert_accurate(ours, plain(*(t.double() for t in tensors)), plain(*tensors))


def test_sampling_at_no_place() -> None:
    """Places that are NaN or infinite neither crash nor reach other queries."""
    shapes, (value, places, weights) = sampling(4, 0.9)
    seen = _deformable.sample(value, shapes, places, weights)
    places[0, 1, 0, 0, 0, 0], places[0, 2, 0, 0, 0, 1] = torch.nan, torch.inf
    ours = _deformable.sample(value, shapes, places, weights)
    assert torch.equal(ours[0, [0, 3]], seen[0, [0, 3]]) and torch.equal(ours[1], seen[1])
    assert ours[0, 1, :8].isnan().all() and ours[0, 2].isfinite().all()


def test_every_class_is_there() -> None:
    for file, (_, names) in _cross_modal.LAYERS.items():
        package = f"transformers.models.{file}"
        for name in names.split():
            source = getattr(__import__(package, fromlist=[name]), name)
            target = _cross_modal.swap_of(source.__new__(source))
            assert isinstance(target, type) and issubclass(target, source)
