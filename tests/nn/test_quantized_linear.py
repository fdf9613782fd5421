"""QuantizedLinear: how close it is, and what it is to torch."""

import copy
import pickle
from typing import Any

import pytest
import torch
from nn_cases import cosine, normal, runs_on_cpu
from torch import nn

import fastfusion as ff
from fastfusion.nn import QuantizedLinear
from fastfusion.nn._linear import weights_of

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
KINDS = ("int8", "bf16")


class TestLayer:
    @pytest.mark.parametrize("weights", KINDS)
    @pytest.mark.parametrize("has_bias", [True, False])
    @torch.no_grad()
    def test_close(self, weights: str, has_bias: bool) -> None:
        linear = nn.Linear(96, 70, bias=has_bias)
        layer = QuantizedLinear.from_linear(linear, weights)
        assert layer.bias is linear.bias
        for x in (normal(3, 20, 96), normal(20, 96), normal(96), normal(2, 3, 4, 96)):
            assert layer(x).shape == linear(x).shape
            assert cosine(layer(x), linear(x)) > 0.999
            weight, scale, added = layer.operands()
            expected = ff.linear(x, weight, added, weight_scale=scale, backend="reference")
            torch.testing.assert_close(layer(x), expected)
        assert cosine(layer.dequantize(), linear.weight) > 0.999
        assert repr(layer) == (
            f"QuantizedLinear(in_features=96, out_features=70, bias={has_bias}, weights={weights})"
        )

    @pytest.mark.parametrize("weights", KINDS)
    @torch.no_grad()
    def test_parts(self, weights: str) -> None:
        layer = QuantizedLinear(normal(3 * 70, 96), normal(3 * 70, seed=1), weights, parts=3)
        x = normal(2, 9, 96)
        whole = layer(x)
        for first, end in ((0, 1), (1, 3), (0, 3)):
            weight, scale, bias = layer.operands(first, end)
            part = ff.linear(x, weight, bias, weight_scale=scale)
            torch.testing.assert_close(part, whole[..., 70 * first : 70 * end])

    @pytest.mark.parametrize("weights", KINDS)
    @torch.no_grad()
    def test_a_row_alone_and_among_others(self, weights: str) -> None:
        layer = QuantizedLinear(normal(70, 96), None, weights)
        x = normal(37, 96)
        torch.testing.assert_close(layer(x)[11], layer(x[11:12])[0])
        if weights == "int8" or runs_on_cpu(layer):
            assert torch.equal(layer(x)[11], layer(x[11:12])[0])

    @pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
    @pytest.mark.parametrize("weights", KINDS)
    @torch.no_grad()
    def test_nested(self, weights: str, layout: torch.layout) -> None:
        layer = QuantizedLinear(normal(70, 96), normal(70), weights)
        x = [normal(n, 96, seed=n) for n in (3, 7)]
        result = layer(torch.nested.nested_tensor(x, layout=layout)).unbind()
        for ours, alone in zip(result, x, strict=True):
            torch.testing.assert_close(ours, layer(alone))

    @pytest.mark.parametrize("weights", KINDS)
    @torch.no_grad()
    def test_moves(self, weights: str) -> None:
        """Casting and copying keep integers and scales what they are."""
        layer = QuantizedLinear(normal(70, 96), normal(70), weights)
        x = normal(2, 5, 96)
        expected = layer(x)
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(copied(x), expected)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            cast = copy.deepcopy(layer).to(dtype)
            assert cast(x.to(dtype)).dtype == dtype
            assert cosine(cast(x.to(dtype)), expected) > 0.999
            if weights == "int8":
                assert torch.equal(cast.packed, layer.packed)
                assert torch.equal(cast.weight_scale, layer.weight_scale)
        there = copy.deepcopy(layer).to("meta")
        assert all(t.is_meta for t in (*there.parameters(), *there.buffers()))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16

    @torch.no_grad()
    def test_state_dict(self) -> None:
        layer = QuantizedLinear(normal(3 * 70, 96), normal(210), parts=3)
        state = layer.state_dict()
        assert {k: (t.dtype, tuple(t.shape)) for k, t in state.items()} == {
            "weight": (torch.int8, (210, 96)),
            "weight_scale": (torch.float32, (210,)),
            "bias": (torch.float32, (210,)),
        }
        assert torch.equal(state["weight"] * state["weight_scale"][:, None], layer.dequantize())
        other = QuantizedLinear(normal(3 * 70, 96, seed=1), normal(210, seed=1), parts=3)
        other.load_state_dict(state)
        assert torch.equal(other.packed, layer.packed)
        with torch.device("meta"):
            empty = QuantizedLinear(torch.empty(210, 96), torch.empty(210), parts=1)
        empty.load_state_dict({k: t.clone() for k, t in state.items()}, assign=True)
        x = normal(2, 5, 96)
        assert torch.equal(other(x), layer(x)) and torch.equal(empty(x), layer(x))

    def test_state_dicts_that_do_not_fit(self) -> None:
        layer = QuantizedLinear(normal(8, 96), normal(8))
        state = layer.state_dict()
        for change, match in (
            ({"weight": normal(8, 96)}, "weight must be int8.*before fastfusion.quantize"),
            ({"weight": state["weight"][:7]}, "size mismatch for weight"),
            ({"other": normal(1)}, 'Unexpected key.*"other"'),
        ):
            with pytest.raises(RuntimeError, match=match):
                layer.load_state_dict({**state, **change})
        for name in state:
            with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
                layer.load_state_dict({k: t for k, t in state.items() if k != name})
        missing = layer.load_state_dict({}, strict=False).missing_keys
        assert sorted(missing) == ["bias", "weight", "weight_scale"]

    @pytest.mark.parametrize("weights", KINDS)
    def test_compile_and_export(self, weights: str) -> None:
        layer = QuantizedLinear(normal(70, 96), normal(70), weights)
        x = normal(2, 5, 96)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))
        with torch.no_grad():
            expected = layer(x)
            assert torch.equal(torch.export.export(layer, (x,)).module()(x), expected)
        # Which may need gradients, and then has the formula of bfloat16.
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)
        traced = torch.fx.symbolic_trace(nn.Sequential(layer))
        assert torch.equal(traced(x), layer(x))
        assert [node.op for node in traced.graph.nodes].count("call_module") == 1

    def test_integers_are_for_inference(self) -> None:
        model = nn.Sequential(nn.LayerNorm(96), QuantizedLinear(normal(70, 96), normal(70)))
        result = model(normal(2, 5, 96))
        with pytest.raises(RuntimeError, match="has no derivative"):
            result.sum().backward()

    @pytest.mark.parametrize(("args", "error", "match"), [
        (([1.0],), TypeError, "weight must be a floating Tensor"),
        ((torch.ones(3),), ValueError, r"weight must be \(out_features, in_features\)"),
        ((torch.ones(3, 4), torch.ones(4)), ValueError, r"bias must be \(3,\), got \(4,\)"),
        ((torch.ones(3, 4), 1.0), TypeError, "bias must be a Tensor or None, got float"),
        ((torch.ones(3, 4), None, "int4"), ValueError, "weights must be one of 'int8', 'bf16'"),
        ((torch.ones(3, 4).half(), None, "bf16"), TypeError, "weight must be float32 to become"),
        ((torch.ones(1, 65537),), ValueError, "weight may be 65536 wide at most"),
        ((torch.ones(3, 4) / 0,), ValueError, "weight must be finite"),
    ])  # fmt: skip
    def test_bad_input(self, args: Any, error: Any, match: str) -> None:
        with pytest.raises(error, match=match):
            QuantizedLinear(*args)

    def test_from_what_is_no_linear(self) -> None:
        with pytest.raises(TypeError, match="linear must be a torch.nn.Linear, got LayerNorm"):
            QuantizedLinear.from_linear(nn.LayerNorm(3))  # type: ignore[arg-type]


def test_weights_of() -> None:
    linear = nn.Linear(96, 70)
    assert weights_of(linear) == (linear.weight, None, linear.bias)
    for weights in KINDS:
        layer = QuantizedLinear.from_linear(linear, weights)
        found, expected = weights_of(layer), layer.operands()
        assert found is not None and all(a is b for a, b in zip(found, expected, strict=True))
    assert weights_of(nn.GELU()) is None and weights_of(None) is None
