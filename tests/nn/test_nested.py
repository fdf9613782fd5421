"""Nested input, strided and jagged: as each sequence alone, in training too, and nested again."""

from typing import Any

import pytest
import torch
from nn_cases import HEADS, WIDTH, assert_same, option_id, twin
from torch import Tensor

import fastfusion as ff

LENGTHS = (3, 1, 5)
LAYOUTS = (torch.strided, torch.jagged)
QUIET = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

pytestmark = QUIET


def sequences(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in lengths]


def nest(parts: list[Tensor], layout: torch.layout) -> Any:
    return torch.nested.as_nested_tensor(parts, layout=layout)


def multihead(**options: Any) -> Any:
    torch.manual_seed(1)
    return ff.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64, **options)


def assert_like_parts(nested: Any, expected: list[Tensor], layout: torch.layout) -> None:
    assert nested.is_nested and nested.layout == layout
    assert_same(list(nested.unbind()), expected, "nested output")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_self_attention(training: bool, layout: torch.layout) -> None:
    module = multihead().train(training)
    gradients = []
    for nested in (True, False):
        parts = [t.requires_grad_() for t in sequences()]
        module.zero_grad()
        if nested:
            x = nest(parts, layout)
            out, weights = module(x, x, x, need_weights=False)
            assert weights is None
            outputs = list(out.unbind())
            assert_like_parts(out, [module(p, p, p)[0] for p in parts], layout)
        else:
            outputs = [module(p, p, p, need_weights=False)[0] for p in parts]
        sum(out.square().sum() for out in outputs).backward()
        gradients.append([t.grad for t in (*parts, *module.parameters())])
    assert_same(*gradients, "gradients")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value_apart", [False, True])
def test_attention_to_another_nested_tensor(value_apart: bool, layout: torch.layout) -> None:
    module = multihead()
    queries, memories = sequences(), sequences((2, 4, 1), seed=1)
    query, memory = nest(queries, layout), nest(memories, layout)
    value, values = memory, memories
    if value_apart:
        values = [2 * t for t in memories]
        value = memory * 2
    out, _ = module(query, memory, value, need_weights=False)
    expected = [
        module(q, k, v)[0] for q, k, v in zip(queries, memories, values, strict=True)
    ]  # fmt: skip
    assert_like_parts(out, expected, layout)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_padded(layout: torch.layout, average: bool) -> None:
    module = multihead().eval()
    parts = sequences()
    x = nest(parts, layout)
    out, weights = module(x, x, x, average_attn_weights=average)
    assert_like_parts(out, [module(p, p, p)[0] for p in parts], layout)
    longest = max(LENGTHS)
    expected = torch.zeros(len(parts), HEADS, longest, longest, dtype=torch.float64)
    for i, part in enumerate(parts):
        n = len(part)
        expected[i, :, :n, :n] = module(part, part, part, average_attn_weights=False)[1]
    assert_same(weights, expected.mean(1) if average else expected, "weights")


@pytest.mark.parametrize("average", [True, False])
def test_as_torchs_fast_path(average: bool) -> None:
    ours = multihead().eval()
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64).eval()
    twin(ours, theirs)
    x = nest(sequences(), torch.strided)
    with torch.inference_mode():
        for options in ({"need_weights": False}, {"average_attn_weights": average}):
            out, weights = ours(x, x, x, **options)
            expected, expected_weights = theirs(x, x, x, **options)
            assert_same(list(out.unbind()), list(expected.unbind()), "output")
            assert_same(weights, expected_weights, "weights")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_and_transposed_sequences(layout: torch.layout) -> None:
    module = multihead()
    parts = sequences((2, 0, 3))
    x = nest(parts, layout)
    out, _ = module(x, x, x, need_weights=False)
    for got, part in zip(out.unbind(), parts, strict=True):
        if len(part):
            assert_same(got, module(part, part, part)[0], "non-empty part")
        else:
            assert got.shape == (0, WIDTH)
    parts = sequences((2, 4))
    swapped = nest([p.t().contiguous() for p in parts], layout).transpose(1, 2)
    expected = [module(p, p, p)[0] for p in parts]
    assert_like_parts(module(swapped, swapped, swapped)[0], expected, layout)


def test_jagged_without_a_known_maximum() -> None:
    module = multihead()
    parts = sequences()
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    x = torch.nested.nested_tensor_from_jagged(torch.cat(parts), offsets)
    assert x._maybe_max_seqlen is None
    out = module(x, x, x, need_weights=False)[0]
    assert_like_parts(out, [module(p, p, p)[0] for p in parts], torch.jagged)


def with_holes(source: Tensor, how: str) -> tuple[Any, list[Tensor]]:
    """A jagged view of (batch, length, WIDTH) that leaves rows out, and its sequences."""
    begins, lengths = torch.tensor([0, 1, 3, 2]), torch.tensor([3, 2, 0, 4])
    pairs = list(zip(begins.tolist(), lengths.tolist(), strict=True))
    parts = [row[b : b + n] for row, (b, n) in zip(source, pairs, strict=True)]
    if how == "narrow":
        return torch.nested.narrow(source, 1, begins, lengths, layout=torch.jagged), parts
    rows, offsets = source.flatten(0, 1), torch.arange(5) * source.shape[1]
    offsets[:-1] += begins
    if how == "transposed":
        rows = rows.t().contiguous()
        holed = torch.nested.nested_tensor_from_jagged(rows, offsets, lengths, jagged_dim=2)
        return holed.transpose(1, 2), parts
    return torch.nested.nested_tensor_from_jagged(rows, offsets, lengths), parts


HOLED: dict[str, Any] = {
    "attention": lambda m, x: m["attention"](x, x, x, need_weights=False)[0],
    "attention, weights": lambda m, x: m["attention"](x, x, x)[0],
    "encoder layer": lambda m, x: m["encoder"].layers[0](x),
    "encoder": lambda m, x: m["encoder"](x),
    "decoder layer": lambda m, x: m["decoder"].layers[0](x, x),
    "decoder": lambda m, x: m["decoder"](x, x),
}


@pytest.mark.parametrize("how", ["lengths", "narrow", "transposed"])
@pytest.mark.parametrize("case", HOLED)
def test_holes_stay_where_they_are(case: str, how: str) -> None:
    options: dict[str, Any] = {"batch_first": True, "dtype": torch.float64}
    norm = torch.nn.LayerNorm(WIDTH, dtype=torch.float64)
    modules = torch.nn.ModuleDict({
        "attention": multihead(),
        "encoder": ff.nn.TransformerEncoder(
            ff.nn.TransformerEncoderLayer(WIDTH, HEADS, 12, 0.0, **options), 2, norm,
            enable_nested_tensor=False,
        ),
        "decoder": ff.nn.TransformerDecoder(
            ff.nn.TransformerDecoderLayer(WIDTH, HEADS, 12, 0.0, **options), 2, norm
        ),
    })  # fmt: skip
    run = HOLED[case]
    gradients, sums = [], []
    for nested in (True, False):
        generator = torch.Generator().manual_seed(5)
        source = torch.randn(4, 6, WIDTH, generator=generator, dtype=torch.float64)
        source.requires_grad_()
        x, parts = with_holes(source, how)
        if nested:
            sums.append(list((x + run(modules, x)).unbind()))
        else:
            sums.append([p if not len(p) else p + run(modules, p[None])[0] for p in parts])
        sum(t.square().sum() for t in sums[-1]).backward()
        gradients.append([source.grad, *(p.grad for p in modules.parameters())])
        modules.zero_grad()
    assert_same(*sums, "the sum")
    assert_same(*gradients, "gradients")


def test_attention_between_holes() -> None:
    module = multihead()
    source = torch.randn(4, 6, WIDTH, dtype=torch.float64)
    query, queries = with_holes(source, "narrow")
    memory, memories = nest(list(source), torch.jagged), list(source)
    for q, k, given in ((query, memory, (queries, memories)), (memory, query, (memories, queries))):
        value = k * 2
        out, _ = module(q, k, value, need_weights=False)
        for got, a, b in zip(out.unbind(), *given, strict=True):
            if len(a) and len(b):
                assert_same(got, module(a, b, 2 * b)[0], "sequence")


def test_dropout_drops() -> None:
    module = multihead(dropout=0.5)
    x = nest(sequences(), torch.jagged)
    first, second = (module(x, x, x, need_weights=False)[0].values() for _ in range(2))
    assert not torch.equal(first, second)
    out, weights = module(x, x, x)
    assert (weights == 0).double().mean() > 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"norm_first": True, "activation": "gelu"}, {"bias": False}, {"activation": torch.tanh}],
    ids=option_id,
)
def test_encoder(options: dict[str, Any], layout: torch.layout) -> None:
    torch.manual_seed(2)
    layer = ff.nn.TransformerEncoderLayer(
        WIDTH, HEADS, 12, 0.0, batch_first=True, dtype=torch.float64, **options
    )
    norm = torch.nn.LayerNorm(WIDTH, dtype=torch.float64)
    encoder = ff.nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
    for module in (layer, encoder):
        gradients = []
        for nested in (True, False):
            module.zero_grad()
            parts = [t.requires_grad_() for t in sequences()]
            alone = [module(p[None])[0] for p in parts]
            if nested:
                out = module(nest(parts, layout))
                assert_like_parts(out, alone, layout)
                alone = list(out.unbind())
            sum(t.square().sum() for t in alone).backward()
            gradients.append([t.grad for t in (*parts, *module.parameters())])
        assert_same(*gradients, f"{type(module).__name__}, gradients")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoder(layout: torch.layout) -> None:
    torch.manual_seed(3)
    layer = ff.nn.TransformerDecoderLayer(
        WIDTH, HEADS, 12, 0.0, batch_first=True, dtype=torch.float64
    )
    decoder = ff.nn.TransformerDecoder(layer, 2)
    targets, memories = sequences(), sequences((2, 4, 1), seed=1)
    out = decoder(nest(targets, layout), nest(memories, layout))
    expected = [decoder(t[None], m[None])[0] for t, m in zip(targets, memories, strict=True)]
    assert_like_parts(out, expected, layout)


def test_a_stock_encoder_hands_ours_nested_tensors() -> None:
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 12, batch_first=True)
    stock = torch.nn.TransformerEncoder(layer, 2).eval()
    mixed = torch.nn.TransformerEncoder(ff.nn._retag(layer), 2).eval()
    mixed.load_state_dict(stock.state_dict())
    seen = []
    mixed.layers[1].self_attn.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].is_nested)
    )
    src = torch.randn(2, 4, WIDTH)
    padding = torch.tensor([[False, False, True, True], [False, False, False, True]])
    with torch.inference_mode():
        actual, expected = (m(src, src_key_padding_mask=padding) for m in (mixed, stock))
    assert_same(actual, expected, "stock encoder")
    assert seen == [True]


X = [torch.zeros(2, WIDTH, dtype=torch.float64), torch.zeros(3, WIDTH, dtype=torch.float64)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case", ["mask", "padding", "bias_kv", "zero_attn", "dense key", "batch", "lengths", "rank"]
)
def test_what_does_not_fit(case: str, layout: torch.layout) -> None:
    module = multihead(add_bias_kv=case == "bias_kv", add_zero_attn=case == "zero_attn")
    query = key = value = nest(X, layout)
    options = {}
    if case == "mask":
        options["attn_mask"] = torch.zeros(3, 3, dtype=torch.float64)
    elif case == "padding":
        options["key_padding_mask"] = torch.zeros(2, 3, dtype=torch.bool)
    elif case == "dense key":
        key = value = torch.zeros(2, 3, WIDTH, dtype=torch.float64)
    elif case == "batch":
        key = value = nest(X + X, layout)
    elif case == "lengths":
        value = nest(X[::-1], layout)
    elif case == "rank":
        query = key = value = nest([t.unsqueeze(-1) for t in X], layout)
    with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast"):
        module(query, key, value, **options)


def test_causal_without_mask_and_batch_second() -> None:
    x = nest(X, torch.jagged)
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        multihead()(x, x, x, is_causal=True)
    second = ff.nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64)
    with pytest.raises(AssertionError, match="batch_first was not True"):
        second(x, x, x)
