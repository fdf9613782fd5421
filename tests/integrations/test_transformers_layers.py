"""Encoder layers of transformers in one call: the same numbers as theirs, and theirs wherever
calling a layer means more than its formula."""

import copy
import pickle
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from suite import DEVICE
from torch import Tensor, nn
from transformers_cases import (
    AUDIO,
    ENDLESS,
    IDS,
    IMAGE,
    LEFT,
    MEL,
    PIXELS,
    RIGHT,
    SEQ2SEQ,
    SOUND,
    TEXT,
    WHISPER,
    Lora,
    assert_same,
    build,
    one_thread,  # noqa: F401
    run,
    tr,
)

import fastfusion as ff
from fastfusion.acceleration import swaps
from fastfusion.integrations.transformers import _structures, layers
from fastfusion.integrations.transformers._structures import ENCODER_LAYERS

if DEVICE != "cpu":
    pytest.skip("whole encoder layers are ops of the CPU", allow_module_level=True)

BATCH = {"input_ids": IDS, "attention_mask": RIGHT}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a layer that comes so far, whether the op ran."""
    seen: list[bool] = []

    def spy(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        seen.append(result is not None)
        return result

    original = layers.Parts.run
    monkeypatch.setattr(layers.Parts, "run", spy)
    return seen


def bert(**more: Any) -> Any:
    return build(tr.BertModel, tr.BertConfig(**{**TEXT, **more}))


# ---- every class

# Names of sizes in configurations of encoder layers.
SIZES = dict(
    hidden_size=32, d_model=32, dim=32, num_attention_heads=4, encoder_attention_heads=4, n_heads=4,
    intermediate_size=64, encoder_ffn_dim=64, hidden_dim=64, num_hidden_layers=1,
)  # fmt: skip


def layer_of(name: str) -> tuple[nn.Module, Any]:
    """A layer of this class alone, and its configuration."""
    path, structure = ENCODER_LAYERS[name]
    modeling = import_module(path)
    configurations = import_module(path.replace("modeling_", "configuration_"))
    for kind in vars(configurations).values():
        if not (isinstance(kind, type) and kind.__module__ == configurations.__name__):
            continue
        known = {*kind.__annotations__, *getattr(kind, "attribute_map", ())}
        config: Any = kind(**{k: v for k, v in SIZES.items() if k in known})
        config._attn_implementation = "fastfusion"
        torch.manual_seed(0)
        try:
            layer = getattr(modeling, name)(config)
        except AttributeError:  # the configuration of something else in the package
            continue
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.2)
        return layer.eval(), config
    raise AssertionError(f"no configuration of {name}")


ROW = torch.ones(2, 1, 1, 7, dtype=torch.bool)
ROW[1, ..., 4:] = False


@pytest.mark.parametrize("name", ENCODER_LAYERS)
def test_every_class(name: str, ran: list[bool]) -> None:
    layer, _ = layer_of(name)
    source = type(layer)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    mask = ROW.expand(-1, -1, 7, -1)
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        expected = exact(x.double(), mask)
        plain = layer(x, mask)
        swap = swaps.swap_for(layer)
        assert swap is not None and not isinstance(swap, str)
        swaps.enter(layer, swap)
        actual = layer(x, mask)
    assert ran == [True]
    assert_accurate(actual.flatten(0, 1), expected.flatten(0, 1), plain.flatten(0, 1))
    assert type(layer) is getattr(layers, name) and issubclass(type(layer), source)
    assert type(layer).__name__ == name


# ---- models

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "BERT": (tr.BertModel, tr.BertConfig(**TEXT), BATCH),
    "RoBERTa": (tr.RobertaModel, tr.RobertaConfig(**TEXT), BATCH),
    "ALBERT": (tr.AlbertModel, tr.AlbertConfig(**TEXT, embedding_size=16), BATCH),
    "DistilBERT": (
        tr.DistilBertModel,
        tr.DistilBertConfig(vocab_size=99, dim=64, n_layers=2, n_heads=4, hidden_dim=128),
        BATCH,
    ),
    "ViT": (tr.ViTModel, tr.ViTConfig(**IMAGE), {"pixel_values": PIXELS}),
    "CLIP text": (tr.CLIPTextModel, tr.CLIPTextConfig(**TEXT, eos_token_id=2), BATCH),
    "CLIP vision": (tr.CLIPVisionModel, tr.CLIPVisionConfig(**IMAGE), {"pixel_values": PIXELS}),
    "SigLIP text": (tr.SiglipTextModel, tr.SiglipTextConfig(**TEXT), BATCH),
    "SigLIP": (tr.SiglipVisionModel, tr.SiglipVisionConfig(**IMAGE), {"pixel_values": PIXELS}),
    "Whisper": (
        tr.models.whisper.modeling_whisper.WhisperEncoder,
        tr.WhisperConfig(**{**WHISPER, **ENDLESS}),
        {"input_features": MEL},
    ),
    "wav2vec2": (tr.Wav2Vec2Model, tr.Wav2Vec2Config(**AUDIO), {"input_values": SOUND}),
    "HuBERT": (
        tr.HubertModel,
        tr.HubertConfig(**AUDIO, do_stable_layer_norm=True),
        {"input_values": SOUND},
    ),
    "BART": (
        tr.models.bart.modeling_bart.BartEncoder,
        tr.BartConfig(**SEQ2SEQ),
        BATCH,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, ran: list[bool]) -> None:
    """Both ways of padding, recorded states, and that attention weights are still to be had."""
    model_class, config, inputs = MODELS[name]
    model = build(model_class, config)
    before = [*model.state_dict()]
    other = ff.accelerate(copy.deepcopy(model))
    assert [*other.state_dict()] == before
    for mask in (RIGHT, LEFT, None) if "input_ids" in inputs else (None,):
        given = {k: v for k, v in inputs.items() if k != "attention_mask"}
        if mask is not None:
            given["attention_mask"] = mask
        assert_same(model, other, given, tokens=mask)
    assert ran and all(ran)
    calls = len(ran)
    with torch.no_grad():
        a, b = (
            m(**inputs, output_hidden_states=True, output_attentions=True) for m in (other, model)
        )
    assert not any(ran[calls:])
    for field in ("hidden_states", "attentions"):
        assert len(a[field]) == len(b[field]) > 0
        for x, y in zip(a[field], b[field], strict=True):
            if x.shape[:2] == RIGHT.shape:
                x, y = x[RIGHT.bool()], y[RIGHT.bool()]
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    del ran[:]
    with torch.no_grad():  # recorders that are there and idle are no reason to be slow
        states = other(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == len(b.hidden_states) and ran and all(ran)


@pytest.mark.parametrize("weights", ("bf16", "int8"))
def test_narrower_weights(weights: str, ran: list[bool]) -> None:
    """Quantised parts are taken by the op, to the bits of calling them."""
    model = ff.accelerate(bert(), weights=weights)
    actual = run(model, BATCH)
    assert ran == [True, True]
    report = model.fastfusion_report
    for _, module, _ in [*swaps.swapped(model)]:
        swaps.leave(module)
    parts = run(model, BATCH)
    assert len(report.quantization.quantized) == 13
    keep = RIGHT.bool()
    assert_accurate(actual[keep], parts[keep].double(), parts[keep].bfloat16())


def test_half_of_a_model(ran: list[bool]) -> None:
    """An encoder without the model around it, by any implementation of attention."""
    for attention in ("eager", "sdpa"):
        model = build(tr.BertModel, tr.BertConfig(**TEXT), attention)
        other = copy.deepcopy(model)
        ff.accelerate(other.encoder)
        assert other.config._attn_implementation == attention
        assert_same(model, other, BATCH, tokens=RIGHT)
    assert ran == [True] * 4


def test_causal_only_where_attention_would_be(ran: list[bool]) -> None:
    """No mask means the causal one to `sdpa` and to ours, none to eager code."""
    layer, config = layer_of("BertLayer")
    layer.attention.self.is_causal = True
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))
    results = []
    for attention in ("eager", "sdpa", "fastfusion", "eager"):
        config._attn_implementation = attention
        with torch.no_grad():
            expected = layer(x)
            swaps.enter(layer, swaps.swap_for(layer))
            results.append(layer(x))
            swaps.leave(layer)
        torch.testing.assert_close(results[-1], expected)
    assert ran == [True] * 4
    assert torch.equal(results[1], results[2]) and not torch.allclose(results[0], results[1])


# ---- where a layer means more than its formula


def hooked(layer: Any) -> None:
    layer.output.dense.register_forward_hook(lambda module, args, out: out + 1.0)


def watched(layer: Any) -> None:
    layer.attention.register_forward_pre_hook(lambda module, args: None)


def adapted(layer: Any) -> None:
    layer.attention.self.value = Lora(layer.attention.self.value)


def replaced(layer: Any) -> None:
    class Doubled(type(layer.intermediate)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2.0 * super().forward(hidden_states)

    layer.intermediate.__class__ = Doubled


def patched(layer: Any) -> None:
    layer.attention.self.forward = lambda x, *args, **kwargs: (x, None)


def another_activation(layer: Any) -> None:
    layer.intermediate.intermediate_act_fn = nn.Tanh()


def another_scale(layer: Any) -> None:
    layer.attention.self.scaling = 1.0


def in_chunks(layer: Any) -> None:
    layer.chunk_size_feed_forward = 3


def in_training(layer: Any) -> None:
    layer.output.dropout.train()


CHANGES: tuple[Callable[[Any], None], ...] = (
    hooked, watched, adapted, replaced, patched, another_activation, another_scale, in_chunks,
    in_training,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("late", (False, True))
def test_what_was_changed_in_a_layer_stays_in_force(
    change: Callable[[Any], None], late: bool, ran: list[bool]
) -> None:
    """Whether it was changed before the layer was swapped or afterwards."""
    model = bert()
    other = copy.deepcopy(model)
    for each in (model, other):
        if each is other and late:
            ff.accelerate(other)
        torch.manual_seed(5)
        change(each.encoder.layer[0])
    if not late:
        ff.accelerate(other)
    expected, actual = (run(each, BATCH) for each in (model, other))
    assert ran == [False, True]
    keep = RIGHT.bool()
    torch.testing.assert_close(actual[keep], expected[keep], rtol=1e-4, atol=1e-4)


@pytest.fixture
def calls_of_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    names: list[str] = []
    from torch.nn.modules import module as torch_module

    handle = torch_module.register_module_forward_hook(
        lambda module, args, out: names.append(type(module).__name__)
    )
    yield names
    handle.remove()


def test_global_hooks_see_every_part(calls_of_parts: list[str]) -> None:
    run(ff.accelerate(bert()), BATCH)
    assert calls_of_parts.count("BertSelfAttention") == 2


def test_training(ran: list[bool]) -> None:
    """Dropout and gradients as before; then evaluation again in one call."""
    model = bert()
    other = ff.accelerate(copy.deepcopy(model))
    for each in (model, other):
        each.train()
        torch.manual_seed(3)
        each(**BATCH).last_hidden_state[RIGHT.bool()].square().sum().backward()
    assert not any(ran)
    assert all(p.grad is not None for p in other.encoder.parameters())
    other.eval()
    other(**BATCH)  # gradients are wanted: by parts
    assert not any(ran)
    run(other, BATCH)
    assert ran[-2:] == [True, True]


def test_gradient_checkpointing(ran: list[bool]) -> None:
    model = bert()
    other = ff.accelerate(copy.deepcopy(model))
    grads = []
    for each in (model, other):
        each.train()
        each.gradient_checkpointing_enable()
        for part in each.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        each(**BATCH).last_hidden_state[RIGHT.bool()].sum().backward()
        grads.append(each.encoder.layer[0].intermediate.dense.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert not any(ran)


def test_an_encoder_that_decodes_or_crosses(ran: list[bool]) -> None:
    """Caches and encoder states are for the parts."""
    model = bert(is_decoder=True, add_cross_attention=True)
    other = ff.accelerate(copy.deepcopy(model))
    states = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    inputs = {**BATCH, "encoder_hidden_states": states, "use_cache": False}
    assert_same(model, other, inputs, tokens=RIGHT)
    assert ran == [False, False]
    assert_same(model, other, {**BATCH, "use_cache": False}, tokens=RIGHT)
    assert ran[2:] == [True, True]


def test_adapter_layers_of_wav2vec2(ran: list[bool]) -> None:
    config = tr.Wav2Vec2Config(**AUDIO, do_stable_layer_norm=True, adapter_attn_dim=8)
    model = build(tr.Wav2Vec2Model, config)
    assert_same(model, ff.accelerate(copy.deepcopy(model)), {"input_values": SOUND})
    assert ran == [False, False]


@pytest.mark.parametrize("name", ("WhisperEncoderLayer", "BartEncoderLayer"))
def test_float16_is_kept_finite(name: str, ran: list[bool]) -> None:
    layer, _ = layer_of(name)
    layer = layer.half()
    with torch.no_grad():
        if name == "BartEncoderLayer":  # ends with a norm
            layer.final_layer_norm.weight.fill_(6e4)
        else:
            layer.fc2.bias.fill_(65000.0)
        x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0)).half() * 100
        expected = layer(x, None)
        largest = float(expected.abs().max())
        exact = copy.deepcopy(layer).double()(x.double(), None).clamp(-largest, largest)
        swaps.enter(layer, swaps.swap_for(layer))
        actual = layer(x, None)
    assert ran == [True]
    assert largest == float(actual.abs().max()) == 64512.0  # finfo.max - 1000, rounded
    assert_accurate(actual[0], exact[0], expected[0])


# ---- copies, and the way back


def test_copies(ran: list[bool]) -> None:
    model = ff.accelerate(bert())
    expected = run(model, BATCH)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.encoder.layer[0]) is layers.BertLayer
        assert torch.equal(run(other, BATCH), expected)
        ff.restore(other)
        assert type(other.encoder.layer[0]) is tr.models.bert.modeling_bert.BertLayer
        assert other.config._attn_implementation == "eager"
    assert type(model.encoder.layer[0]) is layers.BertLayer
    assert all(ran)


def test_restore_and_twice() -> None:
    model = bert()
    before = run(model, BATCH)
    first = run(ff.accelerate(model), BATCH)
    assert torch.equal(run(ff.accelerate(model), BATCH), first)
    assert torch.equal(run(ff.restore(model), BATCH), before)


def test_report() -> None:
    model = ff.accelerate(bert(), example_inputs=BATCH)
    report = model.fastfusion_report
    rows = {row.name: row for row in report.layers}
    assert rows[""].target == 'attn_implementation="fastfusion"'
    assert rows["encoder.layer.1"].target == "fastfusion.integrations.transformers.layers.BertLayer"
    assert rows["encoder.layer.1"].road.startswith("encoder_layer: cpu")
    assert rows["encoder.layer.1.output.dense"].road == "in the call of the layer around it"
    assert not report.kept


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'GPT5Layer'"):
        layers.GPT5Layer  # noqa: B018


# ---- versions that nobody has tried


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The classes as another version of transformers would find them."""
    monkeypatch.setattr(layers, "TESTED", "4.0")
    kept = layers.__dict__.pop("BertLayer", None)
    yield
    layers.__dict__.pop("BertLayer", None)
    if kept is not None:
        layers.__dict__["BertLayer"] = kept


def test_a_layer_that_is_still_the_same(untried: None, ran: list[bool]) -> None:
    model = bert()
    other = ff.accelerate(copy.deepcopy(model))
    assert_same(model, other, BATCH, tokens=RIGHT)
    assert ran == [True, True]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_narrow_weights_are_no_change(weights: Any, untried: None, ran: list[bool]) -> None:
    model = ff.accelerate(bert(), weights=weights)
    run(model, BATCH)
    assert ran == [True, True]


def test_a_layer_that_has_changed(
    untried: None, ran: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = tr.models.bert.modeling_bert.BertLayer
    original = kind.feed_forward_chunk
    monkeypatch.setattr(kind, "feed_forward_chunk", lambda self, x: x - original(self, x))
    model = bert()
    other = ff.accelerate(copy.deepcopy(model))
    with pytest.warns(UserWarning, match="computes BertLayer otherwise than"):
        actual = run(other, BATCH)
    keep = RIGHT.bool()
    torch.testing.assert_close(actual[keep], run(model, BATCH)[keep], rtol=1e-4, atol=1e-4)
    assert len(ran) == 1
    assert _structures.TESTED in tr.__version__
