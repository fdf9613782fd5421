"""RetrievalTransformer and SentimentTransformer as modules: shapes, masks, gradients, twins, and
bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastfusion.applications.stock import stock_twin
from fastfusion.models import RetrievalTransformer, SentimentTransformer

KINDS: dict[str, Any] = {
    "retrieval": (
        RetrievalTransformer,
        {
            "visual_dim": 24,
            "text_dim": 16,
            "num_heads": 4,
            "dim_feedforward": 32,
            "num_layers": 1,
            "embedding_dim": 12,
        },
        {"visual": (7, 24), "text": (5, 16)},
    ),
    "sentiment": (
        SentimentTransformer,
        {
            "text_dim": 16,
            "audio_dim": 24,
            "video_dim": 8,
            "num_heads": 4,
            "dim_feedforward": 32,
            "num_layers": 1,
            "num_classes": 3,
        },
        {"text": (5, 16), "audio": (9, 24), "video": (6, 8)},
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, **change: Any) -> Any:
    torch.manual_seed(0)
    model, sizes, _ = KINDS[kind]
    return model(**(sizes | {"dropout": 0.0} | change))


def inputs(kind: str, batch: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(batch, length, width, generator=generator).to(dtype)
        for name, (length, width) in KINDS[kind][2].items()
    }


def masks(kind: str, batch: int = 3) -> dict[str, Tensor]:
    """Every sample lacks the ends of its sequences, another number of tokens each."""
    return {
        f"{name}_padding_mask": torch.arange(length) >= length - torch.arange(batch).unsqueeze(1)
        for name, (length, _) in KINDS[kind][2].items()
    }


@kinds
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_stock_twin(kind: str, norm_first: bool, training: bool) -> None:
    model = build(kind, norm_first=norm_first).train(training)
    stock = stock_twin(model)
    for name, module in stock.named_modules():
        assert not type(module).__module__.startswith("fastfusion.nn"), name
    with torch.no_grad():
        given = inputs(kind) | masks(kind)
        torch.testing.assert_close(model(**given), stock(**given))
    results = []
    for network in (model.double(), stock.double()):
        given = {n: x.requires_grad_() for n, x in inputs(kind, dtype=torch.float64).items()}
        scores = network(**given, **masks(kind))
        scores.square().sum().backward()
        gradients = {n: p.grad for n, p in network.named_parameters()}
        results.append((scores, [x.grad for x in given.values()], gradients))
    torch.testing.assert_close(*results)


@kinds
def test_every_parameter_and_input_gets_a_gradient(kind: str) -> None:
    model = build(kind)
    given = {name: x.requires_grad_() for name, x in inputs(kind).items()}
    model(**given, **masks(kind)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A key's bias shifts all scores of a row alike: rounding is all that its gradient holds.
        assert parameter.grad.abs().max() > 0 or "bias" in name, name
    for name, x in given.items():
        assert (x.grad[2, -2:] == 0).all() and (x.grad[0] != 0).any(), name


@kinds
def test_padding_changes_nothing(kind: str) -> None:
    model = build(kind).double().eval()
    given = inputs(kind, dtype=torch.float64)
    longer, hidden = {}, {}
    for name, x in given.items():
        longer[name] = torch.cat([x, 9 * torch.randn(3, 4, x.shape[2]).double()], dim=1)
        hidden[f"{name}_padding_mask"] = torch.arange(x.shape[1] + 4) >= x.shape[1]
    torch.testing.assert_close(model(**longer, **hidden), model(**given))
    assert not torch.allclose(model(**longer), model(**given)), "the masks make it equal"


@kinds
@pytest.mark.parametrize("gradient", [False, True])
def test_compile_fullgraph(kind: str, gradient: bool) -> None:
    torch._dynamo.reset()
    model = build(kind).train(gradient)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(gradient):
        arguments = inputs(kind) | masks(kind)
        torch.testing.assert_close(compiled(**arguments), model(**arguments))


@kinds
def test_bad_constructor(kind: str) -> None:
    for change, error, text in (
        ({"num_heads": 5}, ValueError, "must be a multiple of num_heads=5"),
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"dim_feedforward": 2.0}, TypeError, "dim_feedforward must be an int, got 2.0"),
        ({"dropout": 1.5}, ValueError, "dropout must be between 0 and 1, got 1.5"),
        ({"activation": "foo"}, ValueError, "activation"),
    ):
        with pytest.raises(error, match=text):
            build(kind, **change)


@kinds
def test_bad_forward(kind: str) -> None:
    model = build(kind)
    names = list(KINDS[kind][2])
    for name in names:
        length, width = KINDS[kind][2][name]
        for wrong, error, text in (
            (torch.zeros(length, width), ValueError, rf"{name} must have shape \(batch, length"),
            (torch.zeros(3, length, 7), ValueError, rf"{name} must have shape"),
            (torch.zeros(3, length, width).int(), TypeError, "must"),
        ):
            with pytest.raises(error, match=text):
                model(**(inputs(kind) | {name: wrong}))
        mask = f"{name}_padding_mask"
        with pytest.raises(TypeError, match=f"{mask} must be bool"):
            model(**inputs(kind), **{mask: torch.zeros(3, length)})
        with pytest.raises(ValueError, match=f"{mask} must broadcast"):
            model(**inputs(kind), **{mask: torch.zeros(3, length + 1, dtype=torch.bool)})
    other = torch.zeros(2, *KINDS[kind][2][names[1]])
    with pytest.raises(ValueError, match=f"{names[1]} must have the batch size of {names[0]}"):
        model(**(inputs(kind) | {names[1]: other}))


def test_retrieval_score_is_the_sum_of_search_and_match() -> None:
    model = build("retrieval").eval()
    given, hidden = inputs("retrieval"), masks("retrieval")
    visual = model.encode_visual(given["visual"], hidden["visual_padding_mask"])
    text = model.encode_text(given["text"], hidden["text_padding_mask"])
    vectors = (
        model.embed_visual(visual, hidden["visual_padding_mask"]),
        model.embed_text(text, hidden["text_padding_mask"]),
    )
    for each in vectors:
        torch.testing.assert_close(each.norm(dim=1), torch.ones(3))
    table = model.similarity(*vectors)
    assert table.shape == (3, 3)
    found = table.diagonal() + model.match(visual, text, *hidden.values())
    torch.testing.assert_close(model(**given, **hidden), found)


def test_pictures_of_one_length_keep_their_places() -> None:
    model = build("retrieval", visual_len=7).eval()
    given = inputs("retrieval")
    tokens = model.encode_visual(given["visual"])
    turned = model.embed_visual(tokens.flip(1))
    assert not torch.allclose(turned, model.embed_visual(tokens), atol=0.1)
    torch.testing.assert_close(
        build("retrieval").embed_visual(tokens.flip(1)), build("retrieval").embed_visual(tokens)
    )
    hidden = torch.arange(7) >= 5
    broken = tokens.clone()
    broken[:, 5:] = torch.nan
    assert model.embed_visual(broken, hidden.expand(3, -1)).isfinite().all()
    with pytest.raises(ValueError, match="visual must have 7 tokens, got 4"):
        model.embed_visual(tokens[:, :4])
    with pytest.raises(ValueError, match="visual_len must be at least 1, got 0"):
        build("retrieval", visual_len=0)


def test_temperature_is_bounded() -> None:
    model = build("retrieval")
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    assert model.scale() == 100.0


@pytest.mark.parametrize("missing", ["text", "audio", "video"])
def test_a_missing_modality_is_not_read(missing: str) -> None:
    model = build("sentiment").eval()
    given = inputs("sentiment")
    hidden = {f"{missing}_padding_mask": torch.tensor([[True], [False], [False]])}
    expected = model(**given, **hidden)
    assert expected.isfinite().all()
    torch.testing.assert_close(expected[1:], model(**given)[1:])
    assert not torch.allclose(expected[0], model(**given)[0])
    broken = {name: x.clone() for name, x in given.items()}
    broken[missing][0] = torch.nan
    torch.testing.assert_close(model(**broken, **hidden), expected)


def test_a_missing_modality_has_no_value_in_stock_torch() -> None:
    model = build("sentiment").eval()
    hidden = {"video_padding_mask": torch.tensor([[True], [False], [False]])}
    with torch.no_grad():
        assert stock_twin(model)(**inputs("sentiment"), **hidden)[0].isnan().all()


def test_nothing_at_all_is_finite() -> None:
    model = build("sentiment").eval()
    none = {f"{name}_padding_mask": torch.ones(3, 1, dtype=torch.bool) for name in
            ("text", "audio", "video")}  # fmt: skip
    logits = model(**inputs("sentiment"), **none)
    torch.testing.assert_close(logits, model.output.bias.expand(3, -1))
    assert isinstance(model.output, nn.Linear)
