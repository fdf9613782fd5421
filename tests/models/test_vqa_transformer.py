"""VQATransformer as a module: shapes, gradients, padding, its stock twin, compile and export."""

from typing import Any

import pytest
import torch
from accuracy import assert_accurate

import fastfusion as ff
from fastfusion.applications.stock import stock_twin
from fastfusion.models import VQATransformer

SIZES: dict[str, Any] = {
    "visual_dim": 24,
    "text_dim": 16,
    "num_heads": 4,
    "dim_feedforward": 32,
    "num_layers": 2,
    "num_classes": 5,
}
ONE_LAYER = SIZES | {"num_layers": 1}  # tracing a second layer takes twice the time


def features(
    batch: int = 3, visual: int = 7, text: int = 4, dtype: torch.dtype = torch.float32
) -> Any:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, visual, 24, generator=generator, dtype=dtype),
        torch.randn(batch, text, 16, generator=generator, dtype=dtype),
    )


def padding(batch: int = 3, visual: int = 7, text: int = 4) -> Any:
    masks = torch.zeros(batch, visual, dtype=torch.bool), torch.zeros(batch, text, dtype=torch.bool)
    masks[0][0, -2:] = True
    masks[1][1, -1:] = True
    return masks


@pytest.mark.parametrize("norm_first", [False, True])
def test_shapes_and_weights(norm_first: bool) -> None:
    model = VQATransformer(**SIZES, norm_first=norm_first).eval()
    visual, text = features()
    assert model(visual, text).shape == (3, 5)
    logits, attention = model(visual, text, *padding(), need_weights=True)
    torch.testing.assert_close(logits, model(visual, text, *padding()))
    assert attention.shape == (3, 4, 7)
    assert (attention[0, :, -2:] == 0).all(), "padding of the image gets no attention"
    torch.testing.assert_close(attention[2].sum(-1), torch.ones(4))


def test_attention_maps_of_every_layer() -> None:
    torch.manual_seed(0)
    model = VQATransformer(**SIZES).eval()
    inputs = (*features(), *padding())
    with ff.attention_maps(model) as maps:
        logits = model(*inputs)
    torch.testing.assert_close(logits, model(*inputs))
    shapes = {
        **{f"visual_encoder.layers.{i}.self_attn": (3, 7, 7) for i in range(2)},
        **{f"text_encoder.layers.{i}.self_attn": (3, 4, 4) for i in range(2)},
    }
    on_text, on_visual = maps.pop("fusion")
    assert {name: tuple(weights.shape) for name, weights in maps.items()} == shapes
    assert on_text.shape == (3, 7, 4)
    torch.testing.assert_close(on_visual, model(*inputs, need_weights=True)[1])


def test_output_layer_is_on_the_concatenation() -> None:
    model = VQATransformer(**SIZES)
    assert model.output.in_features == 24 + 16
    assert len(model.visual_encoder.layers) == len(model.text_encoder.layers) == 2


def test_every_parameter_and_input_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = VQATransformer(**SIZES)
    visual, text = (x.requires_grad_() for x in features())
    model(visual, text, *padding()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A key's bias shifts all scores of a row alike: rounding is all that its gradient holds.
        assert parameter.grad.abs().max() > 0 or "bias" in name, name
    assert (visual.grad[0, -2:] == 0).all() and (visual.grad[1] != 0).any()
    assert (text.grad[1, -1:] == 0).all() and (text.grad[0] != 0).any()


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(training: bool) -> None:
    torch.manual_seed(0)
    model = VQATransformer(**SIZES, dropout=0.0).double().train(training)
    visual, text = features(dtype=torch.float64)
    expected = model(visual, text)
    longer = torch.cat([visual, 9 * torch.randn(3, 5, 24).double()], dim=1)
    wordier = torch.cat([text, 9 * torch.randn(3, 3, 16).double()], dim=1)
    ignore_visual = (torch.arange(12) >= 7).expand(3, -1)
    ignore_text = (torch.arange(7) >= 4).expand(3, -1)
    torch.testing.assert_close(model(longer, wordier, ignore_visual, ignore_text), expected)
    assert not torch.allclose(model(longer, wordier), expected), "the masks are what makes it equal"


def test_padding_masks_broadcast() -> None:
    model = VQATransformer(**SIZES).eval()
    masks = [mask[:1] for mask in padding()]
    expected = model(*features(), *(mask.expand(3, -1) for mask in masks))
    torch.testing.assert_close(model(*features(), *masks), expected)
    torch.testing.assert_close(model(*features(), *(mask[0] for mask in masks)), expected)
    empty = torch.tensor([[True], [False], [False]])
    expected = model(*features(), empty.expand(-1, 7))
    torch.testing.assert_close(model(*features(), empty), expected)


def test_fully_padded_sample_is_finite_and_leaves_others_alone() -> None:
    torch.manual_seed(0)
    model = VQATransformer(**SIZES, dropout=0.0)
    visual, text = features()
    empty = torch.zeros(3, 7, dtype=torch.bool)
    empty[0] = True
    logits = model(visual, text, empty, None)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1:], model(visual[1:], text[1:]))


def test_pairs_share_encodings() -> None:
    torch.manual_seed(0)
    model = VQATransformer(**SIZES).eval()
    visual, text = features()
    images, texts = torch.tensor([0, 0, 2, 1]), torch.tensor([2, 1, 0, 0])
    shared = model.fuse(model.encode_visual(visual)[images], model.encode_text(text)[texts])
    torch.testing.assert_close(shared, model(visual[images], text[texts]))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_stock_twin(norm_first: bool, training: bool) -> None:
    torch.manual_seed(0)
    model = VQATransformer(**SIZES, dropout=0.0, norm_first=norm_first).train(training)
    stock = stock_twin(model)
    for name, module in stock.named_modules():
        assert not type(module).__module__.startswith("fastfusion.nn"), name
    results = []
    for network in (model, stock):
        visual, text = (x.requires_grad_() for x in features())
        logits, attention = network(visual, text, *padding(), need_weights=True)
        logits.square().sum().backward()
        gradients = {n: p.grad for n, p in network.named_parameters()}
        words = attention[~padding()[1]]  # where padding itself looks means nothing
        results.append((logits, words, visual.grad, text.grad, gradients))
    torch.testing.assert_close(*results)

    back = VQATransformer(**SIZES, dropout=0.0, norm_first=norm_first)
    back.load_state_dict(stock.state_dict(), strict=True)
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


def test_dropout_is_random_in_training_and_reproducible() -> None:
    model = VQATransformer(**SIZES, dropout=0.5)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(*features()))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_factory_arguments_reach_every_part() -> None:
    model = VQATransformer(**SIZES, norm_first=True, bias=False, dtype=torch.float64, device="meta")
    assert all(p.dtype == torch.float64 and p.is_meta for p in model.parameters())
    biases = {name for name, _ in model.named_parameters() if "bias" in name}
    assert biases == {"output.bias"}


def test_autocast_is_as_accurate_as_stock_torch() -> None:
    torch.manual_seed(0)
    model = VQATransformer(**SIZES).eval()
    stock = stock_twin(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = (m(*features(), *padding()).reshape(1, -1) for m in (model, stock))
    exact = stock.double()(*features(dtype=torch.float64), *padding()).reshape(1, -1)
    assert ours.dtype == torch.bfloat16
    assert_accurate(ours, exact, plain)


@pytest.mark.parametrize("gradient", [False, True])
def test_compile_fullgraph(gradient: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = VQATransformer(**ONE_LAYER, dropout=0.0).train(gradient)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    arguments = (*features(), *padding())
    with torch.set_grad_enabled(gradient):
        result = compiled(*arguments)
        torch.testing.assert_close(result, model(*arguments))
    if gradient:
        result.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_export_with_dynamic_sizes() -> None:
    torch.manual_seed(0)
    model = VQATransformer(**ONE_LAYER).eval()
    batch, visual, text = (torch.export.Dim(n, min=2, max=64) for n in ("batch", "visual", "text"))
    shapes = (
        {0: batch, 1: visual},
        {0: batch, 1: text},
        {0: batch, 1: visual},
        {0: batch, 1: text},
    )
    with torch.no_grad():
        program = torch.export.export(model, (*features(), *padding()), dynamic_shapes=shapes)
        other = (*features(5, 9, 6), *padding(5, 9, 6))
        torch.testing.assert_close(program.module()(*other), model(*other))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"num_heads": 5}, ValueError, "visual_dim must be a multiple of num_heads=5, got 24"),
        ({"text_dim": 18}, ValueError, "text_dim must be a multiple of num_heads=4, got 18"),
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"num_classes": -1}, ValueError, "num_classes must be at least 1, got -1"),
        ({"dim_feedforward": 32.0}, TypeError, "dim_feedforward must be an int, got 32.0"),
        ({"dropout": 1.5}, ValueError, r"dropout must be between 0 and 1, got 1.5"),
        ({"dropout": float("nan")}, ValueError, r"dropout must be between 0 and 1, got nan"),
    ],
)
def test_bad_constructor(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        VQATransformer(**(SIZES | change))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"visual": torch.zeros(7, 24)},
            ValueError,
            r"visual must have shape \(batch, length, 24\), got visual.*7, 24",
        ),
        (
            {"text": torch.zeros(3, 4, 24)},
            ValueError,
            r"text must have shape .*16\), got .*text.*3, 4, 24",
        ),
        (
            {"text": torch.zeros(2, 4, 16)},
            ValueError,
            r"text must have the batch size of visual.*3, 7, 24.*2, 4, 16",
        ),
        (
            {"visual_padding_mask": torch.zeros(3, 4, dtype=torch.bool)},
            ValueError,
            r"visual_padding_mask must broadcast to \(3, 7\), got \(3, 4\)",
        ),
        ({"text_padding_mask": torch.zeros(3, 4)}, TypeError, "text_padding_mask must be bool"),
        ({"text": torch.zeros(3, 4, 16).double()}, TypeError, "text must have the dtype of visual"),
        ({"visual": torch.zeros(3, 7, 24).int()}, TypeError, "visual must be float"),
        (
            {"visual": torch.zeros(3, 7, 24).double(), "text": torch.zeros(3, 4, 16).double()},
            TypeError,
            "visual must have the dtype of the weights",
        ),
    ],
)
def test_bad_forward(change: dict[str, Any], error: type[Exception], text: str) -> None:
    model = VQATransformer(**SIZES)
    visual, words = features()
    with pytest.raises(error, match=text):
        model(**({"visual": visual, "text": words} | change))


def test_an_empty_modality_has_mean_zero() -> None:
    model = VQATransformer(8, 8, 2, 16, 1, 3)
    assert model(torch.randn(1, 2, 8), torch.randn(1, 0, 8)).isfinite().all()


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="activation"):
        VQATransformer(8, 8, 2, 16, 1, 3, activation="foo")
