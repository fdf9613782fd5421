"""`explain` of modules: which road each attention takes, by running the module once."""

from typing import Any

import pytest
import torch
from suite import needs_native
from torch import Tensor, nn

import fastfusion as ff
from fastfusion.ops.encoder_layer import OP as ENCODER_LAYER


def test_each_attention_of_a_model_is_named() -> None:
    layer = ff.nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
    decoder = ff.nn.TransformerDecoder(layer, 2).eval()
    explanation = ff.explain(decoder, torch.randn(2, 5, 16), memory=torch.randn(2, 7, 16))
    parts = ("self_attn", "multihead_attn")
    assert [name for name, _ in explanation.rows] == [
        f"layers.{i}.{part}" for i in range(2) for part in parts
    ]
    ops = [row.op for _, row in explanation.rows if row is not None]
    assert ops == ["scaled_dot_product_attention"] * 4
    assert "layers.1.multihead_attn: scaled_dot_product_attention(query=" in str(explanation)


def test_the_road_with_weights_is_told_apart() -> None:
    attention = ff.nn.MultiheadAttention(16, 2, batch_first=True)
    tokens = torch.randn(2, 5, 16)
    assert ff.explain(attention, tokens, tokens, tokens).rows == (("", None),)
    explanation = ff.explain(attention, tokens, tokens, tokens, need_weights=False)
    assert explanation.rows[0][1] is not None
    assert (
        explanation.rows[0][1].chosen
        == ff.explain(ff.scaled_dot_product_attention, *[torch.randn(2, 2, 5, 8)] * 3).chosen
    )


def test_it_describes_the_call_in_its_surroundings() -> None:
    fusion = ff.nn.CrossModalAttention(16, 8, 2)
    visual, text = torch.randn(2, 5, 16), torch.randn(2, 7, 8)
    with ff.use_backend("reference"):
        ((_, row),) = ff.explain(fusion, visual, text).rows
    assert row is not None and row.op == "bidirectional_attention" and row.chosen == "reference"
    with torch.autocast("cpu", torch.bfloat16):
        ((_, row),) = ff.explain(fusion, visual, text).rows
    assert row is not None and "bfloat16" in row.call


def test_it_takes_the_road_of_the_call() -> None:
    """A kernel that stands for a whole module is named, with the attention in it."""
    layers = {
        "cross_attention_layer": ff.nn.CrossAttention(16, 8, 2),
        "cross_modal_layer": ff.nn.CrossModalAttention(16, 8, 2),
    }
    tokens = torch.randn(2, 5, 16), torch.randn(2, 7, 8)
    for name, layer in layers.items():
        with ff.use_backend("triton"):
            ((_, row),) = ff.explain(layer.eval(), *tokens).rows
            assert row is not None and row.op.endswith("attention"), "a gradient is wanted"
            with torch.no_grad():
                ((_, row),) = ff.explain(layer, *tokens).rows
        assert row is not None and (row.op, row.chosen) == (name, "triton")
        assert row.path == "products in Triton, attention on triton" and "num_heads=2" in row.call
        with ff.use_backend("reference"), torch.no_grad():
            ((_, row),) = ff.explain(layer, *tokens).rows
        assert row is not None and row.op.endswith("attention")


def test_a_layer_op_inside_a_module_is_told() -> None:
    class Model(nn.Module):
        def forward(self, **call: object) -> object:
            return ff.cross_attention_layer(**call)

    call = ff.ops.LAYERS[0].inputs(
        {"q_len": 5, "kv_len": 7, "dim": 16, "context_dim": 8, "heads": 2}, torch.float32
    )
    ((name, row),) = ff.explain(Model(), **call).rows
    assert name == "" and row is not None and row.op == "cross_attention_layer"


@torch.no_grad()
def test_layers_of_one_call() -> None:
    """Their attentions call nothing themselves; beside them one that is plain torch says so."""
    layers = ff.nn.TransformerEncoder(ff.nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)
    model = nn.Sequential(layers, nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)).eval()
    rows = ff.explain(model, torch.randn(2, 5, 16)).rows
    whole = [(name, row and row.op) for name, row in rows]
    if ff.info().backends["cpu"] is None:
        expected = [(f"0.layers.{i}", "encoder_layer") for i in range(2)]
        assert whole == [*expected, ("1.self_attn", None)]
        assert all(row is not None and row.chosen == "cpu" for _, row in rows[:2])


def test_nothing_of_the_model_changes() -> None:
    """The module runs, but its buffers and the random state are as before."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(16)
            self.attention = ff.nn.CrossAttention(16, 16, 2, dropout=0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
            return self.attention(x, x)

    model = Model()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ((name, _),) = ff.explain(model, torch.randn(2, 5, 16, generator=torch.Generator())).rows
    assert name == "attention"
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


@needs_native
@pytest.mark.parametrize("fits", [True, False])
def test_calls_that_an_op_does_not_take_are_not_listed(fits: bool) -> None:
    shape = {"length": 5, "dim": 16, "heads": 2, "ffn": 24}
    call = ENCODER_LAYER.call(**ENCODER_LAYER.inputs(shape, torch.float32, None, 0))

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Any:
            try:
                return ENCODER_LAYER.fuse(call if fits else call._replace(norm1_bias=x))
            except RuntimeError:
                return x  # as layers go on by their parts

    names = [row.op for _, row in ff.explain(Layer(), torch.ones(3)).rows if row is not None]
    assert names == (["encoder_layer"] if fits else [])


def test_a_model_without_attention_has_nothing_to_say() -> None:
    assert str(ff.explain(nn.Linear(3, 4), torch.randn(2, 3))) == "no attention was called"
