"""CrossAttention with keys and values that were computed once."""

import io
from typing import Any

import pytest
import torch
from nn_cases import assert_same, hidden
from torch import Tensor

import fastfusion as ff
from fastfusion.nn import ProjectedContext

BATCH, Q_LEN, KV_LEN = 3, 4, 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def module(**options: Any) -> Any:
    torch.manual_seed(2)
    made = ff.nn.CrossAttention(8, 6, 2, **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


QUERY, CONTEXT = x(BATCH, Q_LEN, 8), x(BATCH, KV_LEN, 6, seed=1)
PADDING = hidden(BATCH, KV_LEN)
MASKS: list[dict[str, Any]] = [
    {},
    {"key_padding_mask": PADDING},
    {"attn_mask": hidden(BATCH, 1, 1, KV_LEN, seed=5)},
    {"attn_mask": x(2, 1, KV_LEN, seed=6), "key_padding_mask": PADDING},
]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits(dtype: torch.dtype, need_weights: bool) -> None:
    layer = module(head_dim=3, out_dim=7).to(dtype)
    query, context = QUERY.to(dtype), CONTEXT.to(dtype)
    kept = layer.project_context(context)
    assert kept.key.shape == kept.value.shape == (BATCH, 2, KV_LEN, 3)
    for masks in MASKS:
        masks = {k: m if m.dtype == torch.bool else m.to(dtype) for k, m in masks.items()}
        for q in (query, query[:, :1], -query):
            got = layer(q, kept, **masks, need_weights=need_weights)
            expected = layer(q, context, **masks, need_weights=need_weights)
            if not need_weights:
                got, expected = (got,), (expected,)
            assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("need_weights", [True, False])
def test_one_context_for_all(need_weights: bool) -> None:
    layer = module().double()
    query, context = QUERY.double(), CONTEXT[:1].double()
    kept = layer.project_context(context)
    for padding in (None, PADDING, PADDING[:1]):
        every = None if padding is None else padding.expand(BATCH, -1)
        got = layer(query, kept, padding, need_weights=need_weights)
        expected = layer(query, context.expand(BATCH, -1, -1), every, need_weights=need_weights)
        assert_same(got, expected, "one context")


def test_what_padding_hides_spreads_nowhere() -> None:
    layer, spoiled = module(), CONTEXT.clone()
    spoiled[PADDING] = torch.nan
    for need_weights in (True, False):
        expected = layer(QUERY, CONTEXT, PADDING, need_weights=need_weights)
        got = layer(QUERY, layer.project_context(spoiled), PADDING, need_weights=need_weights)
        assert_same(got, expected, "padding")


def test_gradients_of_several_calls() -> None:
    layer = module().double()
    results = []
    for projected in (True, False):
        layer.zero_grad()
        context = CONTEXT.double().requires_grad_()
        query = QUERY.double().requires_grad_()
        given = layer.project_context(context) if projected else context
        sum(layer(query * n, given).square().sum() for n in (1, 2)).backward()
        results.append([t.grad for t in (query, context, *layer.parameters())])
    assert_same(*results, "gradients")


def test_beams() -> None:
    layer, beams = module(), torch.tensor([2, 0, 0])
    kept = ProjectedContext(*(t[beams] for t in layer.project_context(CONTEXT)))
    assert torch.equal(layer(QUERY, kept), layer(QUERY, CONTEXT[beams]))


def test_autocast() -> None:
    layer = module()
    with torch.autocast("cpu", torch.bfloat16):
        kept = layer.project_context(CONTEXT)
        assert kept.key.dtype == torch.bfloat16
        assert torch.equal(layer(QUERY, kept), layer(QUERY, CONTEXT))
        before = layer.float().project_context(CONTEXT)
    # In float32 from before autocast.
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(QUERY, ProjectedContext(*(t.float() for t in before))).isfinite().all()
    for need_weights in (True, False):
        with pytest.raises(TypeError, match="key must have the dtype of query"):
            layer(QUERY, kept, need_weights=need_weights)


def test_compile_and_export() -> None:
    layer = module().eval()

    class Projecting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, context: Tensor) -> ProjectedContext:
            return self.layer.project_context(context)

    kept, expected = layer.project_context(CONTEXT), layer(QUERY, CONTEXT)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(compiled(QUERY, kept), expected, "compiled")
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=64)
    sizes = {0: batch, 2: length}
    program = torch.export.export(
        layer, (QUERY, kept), dynamic_shapes=({0: batch}, ProjectedContext(sizes, sizes))
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    program = torch.export.load(file)
    other = (QUERY[:2], layer.project_context(CONTEXT[:2, :3]))
    assert_same(program.module()(*other), layer(*other), "exported")
    projecting = torch.export.export(Projecting(), (CONTEXT,)).module()
    assert_same(projecting(CONTEXT), kept, "exported projection")


def test_saved_and_loaded() -> None:
    kept, file = module().project_context(CONTEXT), io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    loaded = torch.load(file)
    assert isinstance(loaded, ProjectedContext) and torch.equal(loaded.key, kept.key)


HEADS = x(BATCH, 2, KV_LEN, 4)
SHAPE = r"must have shape \(batch or 1, 2, kv_len, 4\), got query \(3, 4, 8\), context.key \("
BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "batch": ((HEADS[:2], HEADS[:2]), {}, ValueError, "context.key " + SHAPE),
    "heads": ((HEADS[:, :1], HEADS), {}, ValueError, "context.key " + SHAPE),
    "head_dim": ((HEADS, HEADS[..., :3]), {}, ValueError, "context.value " + SHAPE),
    "length": ((HEADS, HEADS[:, :, 1:]), {}, ValueError, "context.value " + SHAPE),
    "rank": ((HEADS[0], HEADS[0]), {}, ValueError, "context.key " + SHAPE),
    "no tensor": (([1.0], HEADS), {}, TypeError, "context.key must be a Tensor, got list"),
    "device": ((HEADS, HEADS.to("meta")), {}, ValueError, "context.value must be on the device"),
    "padding": (
        (HEADS, HEADS), {"key_padding_mask": hidden(2, KV_LEN)}, ValueError,
        r"key_padding_mask must .* \(2, 5\); query \(3, 4, 8\), context.key \(3, 2, 5, 4\)",
    ),
    "mask": (
        (HEADS, HEADS), {"attn_mask": hidden(KV_LEN, Q_LEN)}, ValueError,
        "attn_mask must broadcast",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit(case: str) -> None:
    tensors, masks, error, text = BAD[case]
    with pytest.raises(error, match=text):
        module()(QUERY, ProjectedContext(*tensors), **masks)


def test_a_context_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"context must have shape \(batch, length, 6\)"):
        module().project_context(QUERY)
    with pytest.raises(TypeError, match="context must have the dtype of the weights"):
        module().project_context(CONTEXT.double())
