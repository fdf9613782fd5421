"""Nested pairs in the fusion modules: as each pair alone, in training too, and nested again."""

from typing import Any

import pytest
import torch
from nn_cases import assert_same
from torch import Tensor

import fastfusion as ff

LENGTHS, OTHERS = (3, 1, 5, 2), (2, 4, 1, 0)
LAYOUTS = (torch.strided, torch.jagged)
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def sequences(width: int, lengths: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator, dtype=torch.float64) for n in lengths]


def nest(parts: list[Tensor], layout: torch.layout) -> Any:
    return torch.nested.as_nested_tensor(parts, layout=layout)


def cross(**options: Any) -> Any:
    torch.manual_seed(1)
    return ff.nn.CrossAttention(8, 6, 2, dtype=torch.float64, **options)


def modal(**options: Any) -> Any:
    torch.manual_seed(1)
    options = {"dim_feedforward": 12, "dropout": 0.0, "dtype": torch.float64, **options}
    return ff.nn.CrossModalAttention(8, 6, 2, **options)


def parts_of(result: Any) -> list[list[Tensor]]:
    return [list(t.unbind()) for t in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "make", [cross, lambda: cross(head_dim=3, out_dim=7), modal, lambda: modal(norm_first=True)]
)
def test_as_each_pair_alone(make: Any, need_weights: bool, layout: torch.layout) -> None:
    module = make()
    count = 1 if isinstance(module, ff.nn.CrossAttention) else 2
    results = []
    for nested in (True, False):
        module.zero_grad()
        firsts = [t.requires_grad_() for t in sequences(8, LENGTHS, 0)]
        seconds = [t.requires_grad_() for t in sequences(6, OTHERS, 1)]
        options = {"need_weights": need_weights, "average_attn_weights": False}
        if nested:
            out = module(nest(firsts, layout), nest(seconds, layout), **options)
            outputs, weights = (out[:count], out[count:]) if isinstance(out, tuple) else ([out], ())
            assert all(t.is_nested and t.layout == layout for t in outputs)
            outputs = parts_of(tuple(outputs))
            weights = [list(w) for w in weights]
        else:
            alone = [module(a[None], b[None], **options)
                     for a, b in zip(firsts, seconds, strict=True)]  # fmt: skip
            alone = [t if isinstance(t, tuple) else (t,) for t in alone]
            columns = [[t[0] for t in column] for column in zip(*alone, strict=True)]
            outputs, weights = columns[:count], columns[count:]
            longest = (max(LENGTHS), max(OTHERS))
            for w, (rows, keys) in zip(weights, (longest, longest[::-1]), strict=False):
                w[:] = [
                    torch.nn.functional.pad(t, (0, keys - t.shape[2], 0, rows - t.shape[1]))
                    for t in w
                ]
        sum(t.square().sum() for column in outputs for t in column).backward()
        grads = [t.grad for t in (*firsts, *seconds, *module.parameters())]
        results.append((outputs, weights, grads))
    for got, expected, name in zip(*results, ("outputs", "weights", "gradients"), strict=True):
        assert_same(list(got), list(expected), name)


def test_averaged_weights_and_maps() -> None:
    query = nest(sequences(8, LENGTHS, 0), torch.jagged)
    context = nest(sequences(6, OTHERS, 1), torch.jagged)
    for module in (cross(), modal()):
        *_, averaged = module(query, context, need_weights=True)
        *_, per_head = module(query, context, need_weights=True, average_attn_weights=False)
        assert_same(averaged, per_head.mean(1), "averaged")
        with ff.attention_maps(module, average=False) as maps:
            module(query, context)
        last = maps[""] if isinstance(maps[""], Tensor) else maps[""][1]
        assert_same(last, per_head, "maps")


def test_residuals_add_up() -> None:
    visual = nest(sequences(8, LENGTHS, 0), torch.jagged)
    text = nest(sequences(6, OTHERS, 1), torch.jagged)
    new_visual, new_text = modal()(visual, text)
    assert (visual + new_visual).is_nested and (text + new_text).is_nested
    assert (visual + cross()(visual, text)).is_nested


def test_sequences_with_holes() -> None:
    buffer, offsets = torch.cat(sequences(8, (12,), 0)), torch.tensor([0, 4, 9, 12])
    lengths = torch.tensor([3, 5, 1])
    query = torch.nested.nested_tensor_from_jagged(buffer, offsets, lengths)
    context = nest(sequences(6, (2, 4, 1), 1), torch.jagged)
    for module in (cross(), modal()):
        out = module(query, context)
        out = out[0] if isinstance(out, tuple) else out
        for got, q, c in zip(out.unbind(), query.unbind(), context.unbind(), strict=True):
            alone = module(q[None], c[None])
            assert_same(got, (alone[0] if isinstance(alone, tuple) else alone)[0], "holes")
        assert (query + out).is_nested


def test_dropout_drops() -> None:
    query = nest(sequences(8, LENGTHS, 0), torch.jagged)
    context = nest(sequences(6, OTHERS, 1), torch.jagged)
    for module in (cross(dropout=0.5), modal(dropout=0.5)):
        results = [parts_of(module(query, context)) for _ in range(2)]
        assert not torch.equal(results[0][0][0], results[1][0][0])


@pytest.mark.parametrize(("make", "need_weights"), [(cross, True), (modal, False)])
def test_compile_jagged(make: Any, need_weights: bool) -> None:
    query = nest(sequences(8, LENGTHS, 0), torch.jagged)
    context = nest(sequences(6, OTHERS, 1), torch.jagged)
    module = make()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = compiled(query, context, need_weights=need_weights)
    expected = module(query, context, need_weights=need_weights)
    assert_same(parts_of(got), parts_of(expected), "compiled")


A, B = sequences(8, (2, 3), 0), sequences(6, (1, 4), 1)
DENSE = torch.zeros(2, 3, 6, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("case", "error", "text"),
    [
        ("dense", TypeError, "must both be nested, in one layout, or both be dense, got a nested"),
        ("layout", TypeError, "must both be nested, in one layout"),
        ("no tensor", TypeError, "must be a Tensor, got list"),
        ("batch", ValueError, "must have the batch size of (query|visual), got 2 and 4"),
        ("width", ValueError, r"must have shape \(batch, ragged length, 6\), got .* width 8"),
        ("rank", ValueError, r"must have shape \(batch, ragged length, 6\), got .* 4 dimensions"),
        ("dtype", TypeError, "must have the dtype of (query|visual)"),
        ("mask", ValueError, "attn_mask does not go with nested tensors; pad"),
        ("padding", ValueError, "padding_mask does not go with nested tensors; pad"),
    ],
)
def test_what_does_not_fit(
    case: str, error: type[Exception], text: str, layout: torch.layout
) -> None:
    second: Any = nest(B, layout)
    if case == "dense":
        second = DENSE
    elif case == "layout":
        second = nest(B, LAYOUTS[layout == torch.strided])
    elif case == "no tensor":
        second = [1.0]
    elif case == "batch":
        second = nest(B + B, layout)
    elif case == "width":
        second = nest(A, layout)
    elif case == "rank":
        second = nest([t[..., None] for t in B], layout)
    elif case == "dtype":
        second = nest([t.float() for t in B], layout)
    for module, padding in ((cross(), "key_padding_mask"), (modal(), "text_padding_mask")):
        options = {
            "mask": {"attn_mask": torch.zeros(3, 4, dtype=torch.bool)},
            "padding": {padding: torch.zeros(2, 4, dtype=torch.bool)},
        }.get(case, {})
        with pytest.raises(error, match=text):
            module(nest(A, layout), second, **options)
