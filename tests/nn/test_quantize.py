"""fastfusion.quantize: what becomes of a model's layers, and how close."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nn_cases import bias, cosine, hidden, normal, runs_on_cpu
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastfusion as ff
from fastfusion.nn import QuantizedLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
]
KINDS = ("int8", "bf16")
WIDTH, HEADS = 128, 4


def encoder(layers: int = 2, **options: Any) -> Any:
    options = {"batch_first": True, "dim_feedforward": 4 * WIDTH, "activation": "gelu", **options}
    torch.manual_seed(1)
    layer = ff.nn.TransformerEncoderLayer(WIDTH, HEADS, **options)
    return ff.nn.TransformerEncoder(layer, layers).eval()


def vqa() -> Any:
    torch.manual_seed(1)
    return ff.models.VQATransformer(WIDTH, 96, HEADS, 256, 1, 100).eval()


PICTURE, QUESTION = normal(2, 36, WIDTH, seed=1), normal(2, 14, 96, seed=2)


class TestModels:
    @pytest.mark.parametrize("weights", KINDS)
    @torch.no_grad()
    def test_encoder(self, weights: str) -> None:
        model, x = encoder(), normal(2, 20, WIDTH)
        expected = model(x)
        report = ff.quantize(model, weights, example_inputs=(x,))
        assert cosine(model(x), expected) > 0.999
        assert len(report.layers) == len(report.quantized) == 8 and not report.kept
        assert all(layer.cosine > 0.999 for layer in report.layers)
        assert {layer.measured_on for layer in report.layers} == {"example inputs"}

    @pytest.mark.parametrize("weights", KINDS)
    @pytest.mark.parametrize("norm_first", [False, True])
    @torch.no_grad()
    def test_layers_with_options(self, weights: str, norm_first: bool) -> None:
        for options in ({}, {"bias": False}, {"batch_first": False}, {"activation": torch.tanh}):
            model = encoder(1, norm_first=norm_first, **options)
            x = normal(2, 20, WIDTH)
            padding = hidden(2, 20) if "batch_first" not in options else hidden(20, 2)
            expected = model(x, src_key_padding_mask=padding)
            ff.quantize(model, weights)
            assert cosine(model(x, src_key_padding_mask=padding), expected) > 0.999

    @pytest.mark.parametrize("weights", KINDS)
    @torch.no_grad()
    def test_decoder(self, weights: str) -> None:
        torch.manual_seed(1)
        model = ff.nn.Transformer(WIDTH, HEADS, 1, 1, 256, batch_first=True).eval()
        x, memory = normal(2, 9, WIDTH), normal(2, 7, WIDTH, seed=1)
        expected = model(memory, x)
        report = ff.quantize(model, weights, example_inputs={"src": memory, "tgt": x})
        assert len(report.quantized) == 4 + 6
        assert cosine(model(memory, x), expected) > 0.999

    @pytest.mark.parametrize("weights", KINDS)
    @torch.no_grad()
    def test_vqa(self, weights: str) -> None:
        model = vqa()
        expected = model(PICTURE, QUESTION)
        report = ff.quantize(model, weights, example_inputs=(PICTURE, QUESTION))
        assert not report.kept and all(layer.cosine > 0.999 for layer in report.layers)
        assert cosine(model(PICTURE, QUESTION), expected) > 0.999
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        # Compiled code runs the parts, with torch's norms: the next product rounds their last bits.
        assert cosine(compiled(PICTURE, QUESTION), model(PICTURE, QUESTION)) > 0.99999

    @pytest.mark.parametrize("weights", KINDS)
    @torch.no_grad()
    def test_cross_attention(self, weights: str) -> None:
        """One call, with the bits of its parts."""
        torch.manual_seed(1)
        model = nn.ModuleDict({"cross": ff.nn.CrossAttention(WIDTH, 96, HEADS)}).eval()
        cross, masks = model["cross"], (hidden(2, 14), None)
        expected = cross(PICTURE, QUESTION)
        assert len(ff.quantize(model, weights).quantized) == 3
        result = cross(PICTURE, QUESTION)
        assert cosine(result, expected) > 0.999
        projected, padded = cross.project_context(QUESTION), cross(PICTURE, QUESTION, *masks)
        if runs_on_cpu(cross.q_proj):
            assert "cross_attention_layer" in str(ff.explain(cross, PICTURE, QUESTION))
        cross.out_proj.register_forward_hook(lambda module, given, result: result)
        assert "cross_attention_layer" not in str(ff.explain(cross, PICTURE, QUESTION))
        assert torch.equal(cross(PICTURE, QUESTION), result)
        assert torch.equal(cross(PICTURE, QUESTION, *masks), padded)
        assert cosine(cross(PICTURE, projected), expected) > 0.999

    @pytest.mark.parametrize("weights", KINDS)
    @pytest.mark.parametrize("norm_first", [False, True])
    @torch.no_grad()
    def test_cross_modal_attention(self, weights: str, norm_first: bool) -> None:
        torch.manual_seed(1)
        fuse = ff.nn.CrossModalAttention(WIDTH, 96, HEADS, norm_first=norm_first).eval()
        expected = fuse(PICTURE, QUESTION)
        assert len(ff.quantize(fuse, weights).quantized) == 8
        result = fuse(PICTURE, QUESTION)
        if runs_on_cpu(fuse.text.linear1):
            assert "cross_modal_layer" in str(ff.explain(fuse, PICTURE, QUESTION))
        fuse.text.linear1.register_forward_hook(lambda module, given, result: result)
        assert "cross_modal_layer" not in str(ff.explain(fuse, PICTURE, QUESTION))
        for ours, theirs, parts in zip(result, expected, fuse(PICTURE, QUESTION), strict=True):
            assert cosine(ours, theirs) > 0.999 and cosine(ours, parts) > 0.9999

    @pytest.mark.parametrize("weights", KINDS)
    @torch.no_grad()
    def test_in_halves(self, weights: str) -> None:
        """Cast as a whole, or under autocast."""
        model, x = encoder(1), normal(2, 20, WIDTH)
        expected = model(x)
        ff.quantize(model, weights)
        with torch.autocast("cpu", torch.bfloat16):
            assert cosine(model(x), expected) > 0.999
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            result = copy.deepcopy(model).to(dtype)(x.to(dtype))
            assert result.dtype == dtype and cosine(result, expected) > 0.999

    def test_memory(self) -> None:
        layer = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
        report = ff.quantize(layer)
        assert report.bytes_after <= 0.27 * report.bytes_before
        assert report.bytes_after == sum(
            t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers())
        )
        assert not any(p.dim() == 2 for p in layer.parameters())
        halves = ff.quantize(nn.Sequential(nn.Linear(768, 3072, bias=False)), "bf16")
        assert 2 * halves.bytes_after == halves.bytes_before

    @pytest.mark.parametrize("weights", KINDS)
    @torch.no_grad()
    def test_saved_and_loaded(self, weights: str, tmp_path: Path) -> None:
        model = vqa()
        report = ff.quantize(model, weights)
        expected = model(PICTURE, QUESTION)
        save_model(model, str(tmp_path / "model.safetensors"))
        fresh = ff.models.VQATransformer(WIDTH, 96, HEADS, 256, 1, 100).eval()
        ff.quantize(fresh, weights, modules=[layer.name for layer in report.quantized], bound=-1)
        load_model(fresh, str(tmp_path / "model.safetensors"))
        assert torch.equal(fresh(PICTURE, QUESTION), expected)
        names = {layer.name for layer in report.layers}
        stored = load_file(tmp_path / "model.safetensors")
        dtype = torch.int8 if weights == "int8" else torch.bfloat16
        assert {n for n, t in stored.items() if t.dtype == dtype} == {f"{n}.weight" for n in names}
        with torch.device("meta"):
            empty = ff.models.VQATransformer(WIDTH, 96, HEADS, 256, 1, 100).eval()
            ff.quantize(empty, weights)
        empty.load_state_dict(stored, assign=True)
        assert torch.equal(empty(PICTURE, QUESTION), expected)
        save_file(fresh.state_dict(), tmp_path / "again.safetensors")


class Tagged(Tensor):
    """What the fused path does not take."""


Q, KV = normal(2, 5, WIDTH), normal(2, 7, WIDTH, seed=1)
ROADS: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "self": ((Q, Q, Q), {}),
    "self without weights": ((Q, Q, Q), {"need_weights": False}),
    "memory": ((Q, KV, KV), {"need_weights": False}),
    "all different": ((Q, KV, KV + 1), {"average_attn_weights": False}),
    "query is key": ((Q, Q, Q + 1), {}),
    "masks": ((Q, KV, KV), {"attn_mask": hidden(5, 7), "key_padding_mask": hidden(2, 7)}),
    "float mask": ((Q, KV, KV), {"attn_mask": bias(5, 7, dtype=torch.float32)}),
    "unbatched": ((Q[0], KV[0], KV[0]), {}),
    "torch's road": ((Q.as_subclass(Tagged), KV, KV), {"attn_mask": hidden(5, 7)}),
}


def attention(**options: Any) -> Any:
    torch.manual_seed(2)
    module = ff.nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options}).eval()
    if module.in_proj_bias is not None:
        nn.init.normal_(module.in_proj_bias)
    return module


class TestMultiheadAttention:
    @pytest.mark.parametrize("road", ROADS)
    @pytest.mark.parametrize("weights", KINDS)
    @torch.no_grad()
    def test_roads(self, road: str, weights: str) -> None:
        inputs, masks = ROADS[road]
        for options in ({}, {"bias": False}, {"add_bias_kv": True}, {"batch_first": False}):
            given, also = inputs, masks
            if not options.get("batch_first", True) and inputs[0].dim() == 3:
                first = {id(x): x.transpose(0, 1) for x in inputs}
                given = tuple(first[id(x)] for x in inputs)
            module = attention(**options)
            expected = module(*given, **also)
            report = ff.quantize(module, weights)
            assert [layer.name for layer in report.quantized] == ["in_proj", "out_proj"]
            assert module.in_proj_weight is None and module.in_proj_bias is None
            for ours, theirs in zip(module(*given, **also), expected, strict=True):
                assert (ours is None) == (theirs is None)
                assert ours is None or cosine(ours, theirs) > 0.999

    @pytest.mark.parametrize("weights", KINDS)
    @torch.no_grad()
    def test_other_widths(self, weights: str) -> None:
        module = attention(kdim=96, vdim=64)
        inputs = (Q, normal(2, 7, 96), normal(2, 7, 64))
        expected, expected_weights = module(*inputs)
        report = ff.quantize(module, weights, example_inputs=inputs)
        names = [layer.name for layer in report.quantized]
        assert names == ["q_proj", "k_proj", "v_proj", "out_proj"]
        for query in (Q, Q.as_subclass(Tagged)):  # the second on torch's road
            result, attended = module(query, *inputs[1:])
            assert cosine(result, expected) > 0.999
            assert cosine(attended, expected_weights) > 0.999
        fresh = attention(kdim=96, vdim=64)
        ff.quantize(fresh, weights)
        fresh.load_state_dict(module.state_dict())
        assert torch.equal(fresh(*inputs)[0], module(*inputs)[0])

    @pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
    @pytest.mark.parametrize("weights", KINDS)
    @torch.no_grad()
    def test_nested(self, weights: str, layout: torch.layout) -> None:
        module = attention()
        x = torch.nested.nested_tensor([normal(n, WIDTH, seed=n) for n in (3, 7)], layout=layout)
        memory = torch.nested.nested_tensor([normal(n, WIDTH) for n in (5, 2)], layout=layout)
        calls = ((x, x, x), (x, memory, memory))
        expected = [module(*given)[0] for given in calls]
        ff.quantize(module, weights, example_inputs=(x, x, x))
        for given, theirs in zip(calls, expected, strict=True):
            ours = module(*given)[0]
            assert all(cosine(*each) > 0.999 for each in zip(ours.unbind(), theirs.unbind()))  # noqa: B905

    @torch.no_grad()
    def test_errors_are_torchs(self) -> None:
        module, theirs = attention(), torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        ff.quantize(module)
        for given in ((Q, KV[:1], KV[:1]), (Q[..., :9], KV, KV), (Q[None], KV, KV)):
            with pytest.raises(Exception) as expected:  # noqa: B017
                theirs.train()(*given)
            with pytest.raises(type(expected.value)):
                module(*given)

    @torch.no_grad()
    def test_bits_of_a_layer_depend_on_the_sequence(self) -> None:
        for weights in KINDS:
            model = encoder(1)
            ff.quantize(model, weights)
            x = normal(3, 20, WIDTH)
            together = model(x)
            if runs_on_cpu(model.layers[0].linear1):
                assert all(torch.equal(model(x[b : b + 1])[0], together[b]) for b in range(3))


class Other(nn.Linear):
    pass


class Holder(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.a = nn.Linear(96, 96)
        self.b = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_an_embedding_may_keep_the_weight() -> None:
    def tied_to_words() -> nn.ModuleList:
        model = nn.ModuleList([nn.Embedding(96, 70), nn.Linear(70, 96, bias=False)])
        model[1].weight = model[0].weight
        return model

    (row,) = ff.quantize(model := tied_to_words()).layers
    assert row.reason == "0 has the same weight" and model[1].weight is model[0].weight
    (row,) = ff.quantize(model := tied_to_words(), tied=True).layers
    assert row.reason is None and isinstance(model[1], ff.nn.QuantizedLinear)
    assert model[0].weight.dtype == torch.float32
    other = nn.ModuleList([*tied_to_words(), nn.Linear(70, 96)])
    other[2].weight = other[1].weight
    assert all(row.reason is None for row in ff.quantize(other, tied=True).layers)
    assert other[1].packed is other[2].packed


def tied() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Embedding(200, 96), "b": nn.Linear(96, 200)})
    model["b"].weight = model["a"].weight
    return model


def with_hooks_of_the_state() -> nn.Module:
    linear = nn.Linear(96, 70)
    linear.register_state_dict_post_hook(lambda *args: None)
    return linear


def with_forward() -> nn.Module:
    linear = nn.Linear(96, 70)
    linear.forward = lambda x: x  # type: ignore[method-assign]
    return linear


def not_finite() -> nn.Module:
    linear = nn.Linear(96, 70)
    linear.weight.data[3, 5] = torch.nan
    return linear


class ReadsTheWeight(nn.Module):
    """Two linear layers, of which it calls one."""

    def __init__(self, kind: str = "product") -> None:
        super().__init__()
        self.called, self.read, self.kind = nn.Linear(96, 96), nn.Linear(96, 96), kind
        self.called.weight.data.mul_(2)  # as many do who make a layer

    def init_weights(self) -> None:
        self.called.weight.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x)
        if self.kind == "product":
            return torch.nn.functional.linear(x, weight=self.read.weight, bias=self.read.bias)
        return self.read((lambda t: t.to(self.read.weight.dtype))(x))


@pytest.mark.parametrize("kind", ["product", "dtype"])
@pytest.mark.parametrize("given", [{}, {"example_inputs": normal(2, 5, 96)}])
@pytest.mark.parametrize("weights", KINDS)
@torch.no_grad()
def test_a_weight_that_its_owner_reads_stays(kind: str, given: Any, weights: str) -> None:
    model = Holder(ReadsTheWeight(kind).eval())
    expected = model.b(normal(2, 5, 96))
    report = ff.quantize(model.b, weights, **given)
    assert {row.name: row.reason for row in report.layers} == {
        "called": None, "read": "ReadsTheWeight reads its weight",
    }  # fmt: skip
    assert cosine(model.b(normal(2, 5, 96)), expected) > 0.999


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "b": (lambda: Holder(Other(96, 70)), "Other is a subclass of torch.nn.Linear"),
    "b:weight norm": (
        lambda: Holder(parametrizations.weight_norm(nn.Linear(96, 70))),
        "ParametrizedLinear is a subclass",
    ),
    "b:old weight norm": (
        lambda: Holder(nn.utils.weight_norm(nn.Linear(96, 70))),
        "its weight is computed",
    ),
    "b:pruned": (
        lambda: Holder(prune.random_unstructured(nn.Linear(96, 70), "weight", 0.5)),
        "its weight is computed",
    ),
    "b:forward": (lambda: Holder(with_forward()), "its forward was replaced"),
    "b:state": (lambda: Holder(with_hooks_of_the_state()), "it has hooks of its state_dict"),
    "b:small": (lambda: Holder(nn.Linear(96, 3)), "it is too small"),
    "b:nan": (lambda: Holder(not_finite()), "its weight is not finite"),
    "b:tied": (tied, "a has the same weight"),
    "b.in_proj": (
        lambda: Holder(torch.nn.MultiheadAttention(96, 4)),
        "torch.nn's MultiheadAttention reads its weight",
    ),
    "b.out_proj": (
        lambda: Holder(torch.nn.MultiheadAttention(96, 4)),
        "torch.nn's MultiheadAttention reads its weight",
    ),
    "b.linear1": (
        lambda: Holder(torch.nn.TransformerEncoderLayer(96, 4)),
        "torch.nn's TransformerEncoderLayer reads its weight",
    ),
    "b.layers.0.linear1": (
        lambda: Holder(torch.nn.TransformerEncoder(ff.nn.TransformerEncoderLayer(96, 4), 1)),
        "torch.nn's TransformerEncoder reads its weight",
    ),
}


class TestQuantize:
    @pytest.mark.parametrize("name", LEFT)
    def test_left_alone(self, name: str) -> None:
        make, reason = LEFT[name]
        model, name = make(), name.partition(":")[0]
        before = model.get_submodule(name.removesuffix(".in_proj"))
        report = ff.quantize(model)
        (row,) = [layer for layer in report.kept if layer.name == name]
        assert reason in row.reason and row.bytes_after == row.bytes_before
        assert row.weights is None and row.cosine is None
        assert model.get_submodule(name.removesuffix(".in_proj")) is before
        assert reason in str(report)

    @torch.no_grad()
    def test_torchs_layers_still_run(self) -> None:
        for layer in (torch.nn.TransformerEncoderLayer, ff.nn.TransformerEncoderLayer):
            inner = torch.nn.TransformerEncoder(layer(96, 4, 256, batch_first=True), 2)
            model = Holder(inner).eval()
            x, padding = normal(2, 6, 96), torch.zeros(2, 6, dtype=torch.bool)
            padding[:, 4:] = True
            expected = inner(x, src_key_padding_mask=padding)
            ff.quantize(model)
            assert cosine(inner(x, src_key_padding_mask=padding), expected) > 0.99

    def test_kept_below_the_bound(self) -> None:
        model = Holder(nn.Linear(96, 70))
        with torch.no_grad():
            model.b.weight[:, 0] = 1e4  # all other numbers become 0
        x = normal(4, 20, 96)

        def quiet(module: nn.Module, args: Any) -> Any:
            return (args[0] * (torch.arange(96) > 0),)

        model.b.register_forward_pre_hook(quiet)
        with torch.no_grad():
            expected = model(x)
        report = ff.quantize(model, example_inputs=x)
        (row,) = report.kept
        assert row.name == "b" and row.cosine < 0.99 and "below 0.99" in row.reason
        assert type(model.a) is QuantizedLinear and type(model.b) is nn.Linear
        with torch.no_grad():
            assert cosine(model(x), expected) > 0.999
        assert len(ff.quantize(model, bound=-1.0).quantized) == 1

    def test_projections_go_together(self) -> None:
        module = attention(kdim=96, vdim=64)
        with torch.no_grad():
            module.k_proj_weight[:, 0] = 1e5
        inputs = (Q, normal(2, 7, 96) * (torch.arange(96) > 0), normal(2, 7, 64))
        report = ff.quantize(module, example_inputs=inputs)
        assert [row.name for row in report.quantized] == ["out_proj"]
        assert [row.name for row in report.kept] == ["q_proj", "k_proj", "v_proj"]
        assert "go together" in report.kept[0].reason
        assert module.q_proj_weight is not None

    def test_layers_that_are_not_reached(self) -> None:
        model = Holder(nn.Linear(96, 70))
        model.c = nn.Linear(96, 70)
        report = ff.quantize(model, example_inputs={"x": normal(2, 96)})
        assert [row.name for row in report.kept] == ["c"]
        assert "example inputs do not reach it" in report.kept[0].reason
        report = ff.quantize(model)
        assert [row.name for row in report.quantized] == ["c"]
        assert report.layers[0].measured_on == "random inputs"

    def test_modules(self) -> None:
        def taken(modules: Any) -> list[str]:
            model = nn.ModuleDict({"one": encoder(1), "two": nn.Linear(WIDTH, WIDTH)})
            return [row.name for row in ff.quantize(model, modules=modules).quantized]

        one = "one.layers.0"
        attention = [f"{one}.self_attn.in_proj", f"{one}.self_attn.out_proj"]
        assert taken("two") == ["two"]
        assert taken("one") == [*attention, f"{one}.linear1", f"{one}.linear2"]
        assert taken(["*.linear?", "two"]) == [f"{one}.linear1", f"{one}.linear2", "two"]
        assert taken(ff.nn.MultiheadAttention) == attention
        assert taken([ff.nn.MultiheadAttention, "two"]) == [*attention, "two"]
        assert taken(lambda name, module: name.endswith("in_proj")) == attention[:1]
        assert taken(lambda name, module: type(module) is nn.Linear)[-1] == "two"
        assert taken(lambda name, module: False) == []
        for nowhere in ("three", nn.Conv2d):
            with pytest.raises(ValueError, match="modules: no linear layer of the model is"):
                taken(nowhere)
        with pytest.raises(TypeError, match="modules must be names, classes, a function"):
            taken([3])

    @torch.no_grad()
    def test_hooks_go_along(self) -> None:
        model, seen = Holder(nn.Linear(96, 70)), []
        handle = model.b.register_forward_hook(lambda m, a, k, y: seen.append(type(m)) or 2 * y,
                                               with_kwargs=True)  # fmt: skip
        model.b.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
        x = normal(2, 5, 96)
        expected = model(x)
        ff.quantize(model)
        assert cosine(model(x), expected) > 0.999 and seen == [nn.Linear, QuantizedLinear]
        handle.remove()
        assert cosine(2 * model(x), expected) > 0.999 and len(seen) == 2

    @torch.no_grad()
    def test_shared(self) -> None:
        """One module in two places stays one, and one weight in two layers is packed once."""
        linear, twin = nn.Linear(96, 96), nn.Linear(96, 96)
        twin.weight = linear.weight
        model = nn.Sequential(linear, nn.GELU(), linear, twin)
        x = normal(2, 5, 96)
        expected = model(x)
        for weights in KINDS:
            other = copy.deepcopy(model)
            report = ff.quantize(other, weights)
            assert other[0] is other[2] and len(report.layers) == 2
            ours, twins = other[0].operands(), other[3].operands()
            assert ours[0] is twins[0] and ours[2] is not twins[2]
            assert cosine(other(x), expected) > 0.999

    def test_modes_and_generators_stay(self) -> None:
        model = nn.Sequential(nn.Linear(96, 96), nn.BatchNorm1d(96), nn.Dropout(0.5).eval())
        model.append(nn.Linear(96, 96)).train()
        model[2].eval()
        mean, state = model[1].running_mean.clone(), torch.get_rng_state()
        ff.quantize(model, example_inputs=normal(8, 96))
        assert [m.training for m in model] == [True, True, False, True]
        assert torch.equal(model[1].running_mean, mean)
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(m._forward_pre_hooks for m in model)

    def test_again(self) -> None:
        model = encoder(1)
        ff.quantize(model)
        report = ff.quantize(model, "bf16")
        assert report.layers == () and report.bytes_after == report.bytes_before

    def test_halves_of_other_dtypes(self) -> None:
        model = nn.Sequential(nn.Linear(96, 96).bfloat16())
        assert "its weight is torch.bfloat16" in ff.quantize(model, "bf16").kept[0].reason
        x = normal(2, 5, 96).bfloat16()
        expected = model(x)
        assert ff.quantize(model).quantized and cosine(model(x), expected) > 0.999

    def test_the_report_is_a_table(self) -> None:
        text = str(ff.quantize(nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 3))))
        first, *rows, last = text.splitlines()
        assert first.split() == ["layer", "weights", "cosine", "deviation", "bytes"]
        assert rows[0].startswith("0      int8") and "24,576 -> 6,400" in rows[0]
        assert rows[1].startswith("1      as before") and rows[1].endswith("padded to 64 features")
        assert last.startswith("1 of 2 layers; the model takes 7,436 of 25,612 bytes (0.290)")

    @pytest.mark.parametrize(("args", "kwargs", "error", "match"), [
        (("model",), {}, TypeError, "model must be a torch.nn.Module, got str"),
        ((nn.Linear(3, 4),), {}, TypeError, "QuantizedLinear.from_linear"),
        ((nn.GELU(), "int4"), {}, ValueError, "weights must be one of 'int8', 'bf16', got 'int4'"),
        ((nn.GELU(),), {"bound": "high"}, TypeError, "bound must be a number, got 'high'"),
        ((nn.GELU(),), {"bound": True}, TypeError, "bound must be a number"),
        ((nn.GELU(),), {"example_inputs": 3}, TypeError, "example_inputs must be a tuple"),
    ])  # fmt: skip
    def test_bad_input(self, args: Any, kwargs: Any, error: Any, match: str) -> None:
        with pytest.raises(error, match=match):
            ff.quantize(*args, **kwargs)
