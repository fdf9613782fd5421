"""ff.attention_maps: the weights of chosen layers of whole models."""

import copy
import pickle
from typing import Any

import pytest
import torch
from nn_cases import HEADS, WIDTH, assert_same, hidden
from torch import Tensor, nn

import fastfusion as ff

BATCH, SOURCE, TARGET = 2, 5, 4
FACTORY: dict[str, Any] = {"batch_first": True, "dtype": torch.float64}
NAMES = (
    "encoder.layers.0.self_attn",
    "encoder.layers.1.self_attn",
    "decoder.layers.0.self_attn",
    "decoder.layers.0.multihead_attn",
    "decoder.layers.1.self_attn",
    "decoder.layers.1.multihead_attn",
)


def tokens(length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, length, WIDTH, generator=generator, dtype=torch.float64)


def transformer(**options: Any) -> Any:
    return ff.nn.Transformer(
        WIDTH, HEADS, 2, 2, 12, **{"dropout": 0.0, **FACTORY, **options}
    )  # fmt: skip


SRC, TGT = tokens(SOURCE), tokens(TARGET, seed=1)
CAUSAL = torch.ones(TARGET, TARGET, dtype=torch.bool).triu(1)
MASKS: dict[str, Any] = {
    "src_key_padding_mask": hidden(BATCH, SOURCE),
    "memory_key_padding_mask": hidden(BATCH, SOURCE),
    "tgt_mask": CAUSAL,
    "tgt_is_causal": True,
}


def by_hooks(model: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The weights of every attention, per head, each recomputed from what the module was given."""
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, result: Any) -> None:
            options = {**kwargs, "need_weights": True, "average_attn_weights": False}
            seen[name] = type(module).forward(module, *args, **options)[1]

        return hook

    handles = [
        module.register_forward_hook(remember(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, ff.nn.MultiheadAttention)
    ]
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("training", [True, False])
def test_every_layer_of_a_transformer(training: bool) -> None:
    model = transformer().train(training)
    plain = model(SRC, TGT, **MASKS)
    expected = by_hooks(model, SRC, TGT, **MASKS)
    with torch.set_grad_enabled(training):
        with ff.attention_maps(model, average=False) as maps:
            output = model(SRC, TGT, **MASKS)
        with ff.attention_maps(model) as averaged:
            model(SRC, TGT, **MASKS)
    assert tuple(maps) == tuple(averaged) == NAMES
    assert_same(maps, expected, "per head")
    assert_same(averaged, {name: w.mean(1) for name, w in expected.items()}, "averaged")
    assert_same(output, plain, "output")
    assert (maps["decoder.layers.1.self_attn"][..., CAUSAL] == 0).all()
    # And nothing is left behind.
    assert torch.equal(model(SRC, TGT, **MASKS), plain)
    assert all("_recorders" not in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("encoder.layers.1.self_attn", NAMES[1:2]),
        ("encoder", NAMES[:2]),
        ("decoder.layers.0", NAMES[2:4]),
        ("*.multihead_attn", NAMES[3::2]),
        (1, NAMES[1:2]),
        (-1, NAMES[5:]),
        (["decoder.*.self_attn", 0], (NAMES[0], NAMES[2], NAMES[4])),
        ([], ()),
    ],
)
def test_chosen_layers(layers: Any, expected: tuple[str, ...]) -> None:
    model = transformer()
    with ff.attention_maps(model, layers) as maps:
        model(SRC, TGT)
    assert tuple(maps) == expected


@pytest.mark.parametrize("layers", ["encoder.layers.7", "encode", 6, -7, [0, "self_attn"]])
def test_unknown_layers_are_named(layers: Any) -> None:
    model = transformer()
    wrong = layers[-1] if isinstance(layers, list) else layers
    with pytest.raises(ValueError, match="no attention module") as caught:
        ff.attention_maps(model, layers).__enter__()
    assert repr(wrong) in str(caught.value) and NAMES[-1] in str(caught.value)
    assert all("_recorders" not in vars(module) for module in model.modules())


def test_a_model_without_attention() -> None:
    with pytest.raises(ValueError, match="Linear has no attention module of fastfusion"):
        ff.attention_maps(nn.Linear(2, 2)).__enter__()


def test_gradients_flow_through_the_weights() -> None:
    model = transformer()
    with ff.attention_maps(model, "decoder.layers.1.multihead_attn") as maps:
        model(SRC, TGT)
    (weights,) = maps.values()
    (weights * torch.arange(SOURCE)).sum().backward()
    # The last attention's weights depend on its queries and keys, and on all that is before.
    assert model.decoder.layers[1].multihead_attn.in_proj_weight.grad[: 2 * WIDTH].any()
    assert model.encoder.layers[0].linear1.weight.grad.any()
    assert model.decoder.layers[1].linear1.weight.grad is None


def test_the_caller_gets_what_it_asked_for() -> None:
    attention = ff.nn.MultiheadAttention(WIDTH, HEADS, **FACTORY)
    for options in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        plain = attention(TGT, SRC, SRC, **options)
        with ff.attention_maps(attention, average=False) as maps:
            result = attention(TGT, SRC, SRC, **options)
        assert_same(result, plain, f"{options}")
        assert maps[""].shape == (BATCH, HEADS, TARGET, SOURCE)
    with ff.attention_maps(attention, average=False) as maps:
        attention(TGT[0], SRC[0], SRC[0], need_weights=False)
    assert maps[""].shape == (HEADS, TARGET, SOURCE)


def test_what_only_runs_without_weights_is_read_too() -> None:
    """torch takes a float32 mask in bfloat16 without weights only; the hint replaces the mask."""
    attention = ff.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.bfloat16)
    x = TGT.bfloat16()
    mask = torch.zeros(TARGET, TARGET).masked_fill(CAUSAL, -torch.inf)
    for given in (mask, torch.zeros(TARGET, TARGET)):
        with ff.attention_maps(attention) as maps:
            attention(x, x, x, attn_mask=given, is_causal=True, need_weights=False)
        assert (maps[""][:, CAUSAL] == 0).all() and (maps[""][:, ~CAUSAL] > 0).all()


def test_a_tensor_subclass() -> None:
    class Tagged(Tensor):
        pass

    attention = ff.nn.MultiheadAttention(WIDTH, HEADS, **FACTORY)
    tagged = SRC.as_subclass(Tagged)
    with ff.attention_maps(attention) as maps:
        result = attention(tagged, tagged, tagged, need_weights=False)
    assert result[1] is None
    assert_same(maps[""].as_subclass(Tensor), attention(SRC, SRC, SRC)[1], "weights")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout: torch.layout) -> None:
    layer = ff.nn.TransformerEncoderLayer(WIDTH, HEADS, 12, 0.0, **FACTORY)
    encoder = ff.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    parts = [SRC[0], SRC[1, :3]]
    with ff.attention_maps(encoder, -1) as maps:
        encoder(torch.nested.as_nested_tensor(parts, layout=layout))
    padded = maps["layers.1.self_attn"]
    for i, part in enumerate(parts):
        with ff.attention_maps(encoder, -1) as alone:
            encoder(part[None])
        n = len(part)
        assert_same(padded[i, :n, :n], alone["layers.1.self_attn"][0], f"sequence {i}")
    assert (padded[1, 3:] == 0).all() and (padded[1, :, 3:] == 0).all()


def test_dropout_has_gone_over_the_weights() -> None:
    model = transformer(dropout=0.5)
    with ff.attention_maps(model, 0, average=False) as maps:
        model(SRC, TGT)
    assert 0.2 < (maps[NAMES[0]] == 0).double().mean() < 0.8


def test_blocks_within_blocks_and_errors() -> None:
    model = transformer()
    with ff.attention_maps(model) as outer:
        model(SRC, TGT)
        first = dict(outer)
        with pytest.raises(RuntimeError, match="mine"), ff.attention_maps(model, 0) as inner:
            model(2 * SRC, TGT)
            raise RuntimeError("mine")
        assert tuple(inner) == NAMES[:1] and tuple(outer) == NAMES
        assert_same(inner[NAMES[0]], outer[NAMES[0]], "both read")
        assert not torch.equal(outer[NAMES[0]], first[NAMES[0]])
        seen = inner[NAMES[0]]
        # The inner block is closed; the outer still reads.
        model(SRC, TGT)
        assert inner[NAMES[0]] is seen
        assert_same(outer, first, "the last call")
    # Blocks closed in another order than they were opened.
    one, two = ff.attention_maps(model, 0), ff.attention_maps(model, 0)
    maps = [one.__enter__(), two.__enter__()]
    one.__exit__(None, None, None)
    model(SRC, TGT)
    two.__exit__(None, None, None)
    model(SRC, TGT)
    assert [len(m) for m in maps] == [0, 1]
    assert all("_recorders" not in vars(module) for module in model.modules())


def test_copies_made_meanwhile_are_not_read() -> None:
    model = transformer()
    with ff.attention_maps(model) as maps:
        model(SRC, TGT)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all("_recorders" not in vars(module) for module in copied.modules())
            before = dict(maps)
            copied(2 * SRC, TGT)
            assert all(maps[name] is weights for name, weights in before.items())


def test_compiled() -> None:
    model = transformer().eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = compiled(SRC, TGT, **MASKS)
    expected = by_hooks(model, SRC, TGT, **MASKS)
    for scale in (2.0, 1.0):  # a second block has a dictionary of its own
        with ff.attention_maps(compiled, average=False) as maps:
            compiled(SRC, scale * TGT, **MASKS)
    assert_same(maps, expected, "compiled")
    assert_same(compiled(SRC, TGT, **MASKS), plain, "afterwards")


def test_where_it_cannot_read() -> None:
    model = transformer()
    with ff.attention_maps(model):
        with pytest.raises(RuntimeError, match="being exported"):
            torch.export.export(model, (SRC, TGT), strict=False)
        with pytest.raises(RuntimeError, match="transform of torch.func"):
            torch.func.vmap(lambda src: model(src, TGT))(torch.stack([SRC, SRC]))


def test_checkpointing() -> None:
    layer = ff.nn.TransformerEncoderLayer(WIDTH, HEADS, 12, 0.0, **FACTORY)
    src = SRC.clone().requires_grad_()
    with ff.attention_maps(layer) as maps:
        out = torch.utils.checkpoint.checkpoint(layer, src, use_reentrant=False)
        out.square().sum().backward()
    assert_same(maps["self_attn"], layer.self_attn(SRC, SRC, SRC)[1], "weights")
    expected = torch.autograd.grad(layer(src).square().sum(), src)[0]
    assert_same(src.grad, expected, "gradient")
