"""ff.nn.CrossAttention and ff.nn.CrossModalAttention against plain torch, and their errors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_cases import assert_same, hidden, option_id
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastfusion as ff
import fastfusion.nn as nn

BATCH, Q_LEN, KV_LEN = 2, 3, 5


def x(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def heads(tensor: Tensor, count: int) -> Tensor:
    return tensor.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, hides: Tensor | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, dead rows 0 with gradients of 0."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if bias is not None:
        hides = bias.isinf() if hides is None else hides | bias.isinf()
        scores = scores + bias.masked_fill(bias.isinf(), 0.0)
    if hides is None:
        weights = torch.softmax(scores, -1)
    else:
        hides = hides.expand(scores.shape)
        dead = hides.all(-1, keepdim=True)
        scores = scores.masked_fill(hides & ~dead, -torch.inf)
        weights = torch.softmax(scores, -1).masked_fill(dead, 0.0)
    return (weights @ v).transpose(1, 2).flatten(2), weights


def cross_by_hand(m: Any, query: Tensor, context: Tensor, hides: Tensor | None) -> Any:
    k, v = m.kv_proj(context).chunk(2, -1)
    q, k, v = (heads(t, m.num_heads) for t in (m.q_proj(query), k, v))
    out, weights = attend(q, k, v, hides)
    return m.out_proj(out), weights


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"head_dim": 5}, {"out_dim": 7}, {"head_dim": 1, "out_dim": 1}], ids=option_id
)
def test_cross_attention(options: dict[str, int], bias: bool) -> None:
    module = ff.nn.CrossAttention(8, 6, 2, bias=bias, dtype=torch.float64, **options)
    query, context = x(BATCH, Q_LEN, 8), x(BATCH, KV_LEN, 6, seed=1)
    padding = hidden(BATCH, KV_LEN)
    for mask in (None, hidden(Q_LEN, KV_LEN), hidden(BATCH, 1, Q_LEN, KV_LEN)):
        hides = padding[:, None, None] if mask is None else padding[:, None, None] | mask
        expected, weights = cross_by_hand(module, query, context, hides)
        masks = {"key_padding_mask": padding, "attn_mask": mask}
        assert_same(module(query, context, **masks), expected, "output")
        out, given = module(query, context, **masks, need_weights=True, average_attn_weights=False)
        assert_same((out, given), (expected, weights), "with weights")
        _, averaged = module(query, context, **masks, need_weights=True)
        assert_same(averaged, weights.mean(1), "averaged")
        if mask is not None:
            added = torch.zeros(mask.shape, dtype=x(1).dtype).masked_fill(mask, -torch.inf)
            masks["attn_mask"] = added
            assert_same(module(query, context, **masks), expected, "float mask")


def test_cross_attention_as_torchs_module() -> None:
    """With equal widths it is torch.nn.MultiheadAttention."""
    ours = ff.nn.CrossAttention(8, 6, 2, dtype=torch.float64)
    theirs = torch.nn.MultiheadAttention(
        8, 2, kdim=6, vdim=6, batch_first=True, dtype=torch.float64
    )
    with torch.no_grad():
        theirs.q_proj_weight.copy_(ours.q_proj.weight)
        for mine, half in zip(
            (theirs.k_proj_weight, theirs.v_proj_weight), ours.kv_proj.weight.chunk(2), strict=True
        ):
            mine.copy_(half)
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    query, context = x(BATCH, Q_LEN, 8), x(BATCH, KV_LEN, 6, seed=1)
    expected = theirs(query, context, context)
    assert_same(ours(query, context, need_weights=True), expected, "torch.nn")


def test_initial_weights() -> None:
    module = ff.nn.CrossAttention(64, 64, 4)
    bound = (6 / 128) ** 0.5
    for weight in (module.q_proj.weight, *module.kv_proj.weight.chunk(2)):
        assert weight.abs().max() <= bound and weight.abs().max() > 0.95 * bound
    assert not any(m.bias.any() for m in (module.q_proj, module.kv_proj, module.out_proj))


@pytest.mark.parametrize("need_weights", [True, False])
def test_cross_attention_dead_row(need_weights: bool) -> None:
    module = ff.nn.CrossAttention(8, 6, 2, dtype=torch.float64)
    torch.nn.init.normal_(module.out_proj.bias)
    padding = torch.tensor([[True] * KV_LEN, [False] * KV_LEN])
    query = x(BATCH, Q_LEN, 8).requires_grad_()
    out = module(query, x(BATCH, KV_LEN, 6), padding, need_weights=need_weights)
    out = out[0] if need_weights else out
    assert_same(out[0], module.out_proj.bias.expand(Q_LEN, 8), "dead rows")
    out.sum().backward()
    assert torch.isfinite(query.grad).all() and (query.grad[0] == 0).all()


def test_cross_attention_dropout() -> None:
    module = ff.nn.CrossAttention(8, 6, 2, dropout=0.5)
    query, context = x(4, 32, 8, dtype=torch.float32), x(4, 32, 6, dtype=torch.float32)
    _, weights = module(query, context, need_weights=True, average_attn_weights=False)
    assert 0.45 < (weights == 0).double().mean() < 0.55
    assert not torch.equal(module(query, context), module(query, context))
    module.eval()
    assert torch.equal(module(query, context), module(query, context))


def fuse_by_hand(
    m: Any, visual: Tensor, text: Tensor, visual_pad: Any, text_pad: Any, mask: Any = None
) -> tuple[Tensor, ...]:
    v_in = m.visual.norm1(visual) if m.norm_first else visual
    t_in = m.text.norm1(text) if m.norm_first else text
    query, visual_value = (heads(t, m.num_heads) for t in m.visual.in_proj(v_in).chunk(2, -1))
    key, text_value = (heads(t, m.num_heads) for t in m.text.in_proj(t_in).chunk(2, -1))

    def direction(q: Tensor, k: Tensor, v: Tensor, pad: Any, mask: Any) -> tuple[Tensor, Tensor]:
        hides = None if pad is None else pad[:, None, None]
        if mask is None or mask.dtype != torch.bool:
            return attend(q, k, v, hides, mask)
        return attend(q, k, v, mask if hides is None else mask | hides)

    turned = None if mask is None else mask.transpose(-1, -2)
    to_visual, on_text = direction(query, key, text_value, text_pad, mask)
    to_text, on_visual = direction(key, query, visual_value, visual_pad, turned)
    fused = []
    for stream, tokens, gathered in ((m.visual, visual, to_visual), (m.text, text, to_text)):
        h = tokens + stream.out_proj(gathered)
        h = h if m.norm_first else stream.norm1(h)
        ff_in = stream.norm2(h) if m.norm_first else h
        out = h + stream.linear2(stream.activation(stream.linear1(ff_in)))
        fused.append(out if m.norm_first else stream.norm2(out))
    return (*fused, on_text, on_visual)


def cross_modal(**options: Any) -> Any:
    options = {"dim_feedforward": 12, "dropout": 0.0, "dtype": torch.float64, **options}
    module = ff.nn.CrossModalAttention(8, 6, 2, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("padding", ["none", "visual", "text", "both", "all of one sample"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_first": True, "activation": "gelu"},
        {"embed_dim": 10, "bias": False},
        {"embed_dim": 2, "activation": torch.tanh, "layer_norm_eps": 1e-2},
    ],
    ids=option_id,
)
def test_cross_modal_attention(options: dict[str, Any], padding: str) -> None:
    module = cross_modal(**options)
    visual_pad = hidden(BATCH, Q_LEN) if padding in ("visual", "both") else None
    text_pad = hidden(BATCH, KV_LEN) if padding in ("text", "both") else None
    if padding == "all of one sample":
        visual_pad = torch.tensor([[True] * Q_LEN, [False] * Q_LEN])
        text_pad = torch.tensor([[False] * KV_LEN, [True] * KV_LEN])
    results = []
    for run in (module, lambda *a, **_: fuse_by_hand(module, *a)):
        for need_weights in (False, True):
            module.zero_grad()
            visual = x(BATCH, Q_LEN, 8).requires_grad_()
            text = x(BATCH, KV_LEN, 6, seed=1).requires_grad_()
            out = run(
                visual, text, visual_pad, text_pad,
                need_weights=need_weights, average_attn_weights=False,
            )  # fmt: skip
            assert need_weights or run is not module or len(out) == 2
            out[0].square().sum().add(out[1].pow(3).sum()).backward()
            grads = [visual.grad, text.grad, *(p.grad for p in module.parameters())]
            results.append(([*out], grads))
    (fused, fused_grads), (weighted, weighted_grads), (expected, grads), _ = results
    assert_same(fused_grads, grads, "gradients")
    assert_same(weighted_grads, grads, "gradients with weights")
    assert_same(fused, expected[:2], "outputs")
    assert_same(weighted, expected, "outputs with weights")


def modal_mask(kind: str) -> Tensor:
    """With a visual token (1) and a word (2) that are left with nothing."""
    shape = (BATCH, 2, Q_LEN, KV_LEN)[-2 if kind == "two dimensions" else 0 :]
    mask = hidden(*shape)
    if kind == "of each query":
        return mask[:, :1, :, :1]
    mask[..., 1, :] = True
    mask[..., 2] = True
    if kind == "float":
        return x(*shape, seed=5).masked_fill(mask, -torch.inf)
    return mask


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["two dimensions", "bool", "float", "of each query"])
def test_cross_modal_attn_mask(kind: str, padded: bool) -> None:
    """One mask for both directions, and both roads, beside padding too."""
    module, mask = cross_modal(), modal_mask(kind)
    pads = (hidden(BATCH, Q_LEN), hidden(BATCH, KV_LEN)) if padded else (None, None)
    floating = mask.is_floating_point()
    results = []
    for road in ("fused", "weights", "by hand"):
        module.zero_grad()
        given = mask.clone().requires_grad_(floating)
        visual = x(BATCH, Q_LEN, 8).requires_grad_()
        text = x(BATCH, KV_LEN, 6, seed=1).requires_grad_()
        if road == "by hand":
            out = fuse_by_hand(module, visual, text, *pads, given)
        else:
            out = module(
                visual, text, *pads, need_weights=road == "weights", average_attn_weights=False,
                attn_mask=given,
            )  # fmt: skip
        out[0].square().sum().add(out[1].pow(3).sum()).backward()
        inputs = (visual, text, given) if floating else (visual, text)
        results.append((out, [t.grad for t in (*inputs, *module.parameters())]))
    (fused, fused_grads), (weighted, weighted_grads), (expected, grads) = results
    assert_same(fused, expected[:2], "outputs")
    assert_same(weighted, expected, "outputs with weights")
    assert_same(fused_grads, grads, "gradients")
    assert_same(weighted_grads, grads, "gradients with weights")


def test_cross_modal_averages_weights() -> None:
    module = cross_modal()
    arguments = (x(BATCH, Q_LEN, 8), x(BATCH, KV_LEN, 6))
    averaged = module(*arguments, need_weights=True)[2:]
    per_head = module(*arguments, need_weights=True, average_attn_weights=False)[2:]
    assert [w.shape for w in averaged] == [(BATCH, Q_LEN, KV_LEN), (BATCH, KV_LEN, Q_LEN)]
    assert_same(averaged, tuple(w.mean(1) for w in per_head), "averaged")


@pytest.mark.parametrize("need_weights", [True, False])
def test_cross_modal_nan_under_padding(need_weights: bool) -> None:
    module = cross_modal()
    visual, text = x(BATCH, Q_LEN, 8), x(BATCH, KV_LEN, 6)
    visual_pad, text_pad = hidden(BATCH, Q_LEN), hidden(BATCH, KV_LEN)
    clean = module(visual, text, visual_pad, text_pad, need_weights)
    visual[visual_pad], text[text_pad] = torch.nan, torch.nan
    got = module(visual, text, visual_pad, text_pad, need_weights)
    kept = (~visual_pad, ~text_pad)
    for result, expected, keep in zip(got, clean, kept * 2, strict=False):
        assert_same(result[keep], expected[keep], "kept tokens")


def test_cross_modal_dropout() -> None:
    module = cross_modal(dropout=0.5, dtype=torch.float32)
    visual, text = x(4, 16, 8, dtype=torch.float32), x(4, 24, 6, dtype=torch.float32)
    _, _, on_text, on_visual = module(visual, text, need_weights=True, average_attn_weights=False)
    for weights in (on_text, on_visual):
        assert 0.45 < (weights == 0).double().mean() < 0.55
    first, second = module(visual, text), module(visual, text)
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3), st.integers(0, 6), st.integers(0, 6), st.integers(1, 3),
    st.integers(1, 4), st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape(
    batch: int, q_len: int, kv_len: int, num_heads: int, head_dim: int, masked: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    cross = ff.nn.CrossAttention(5, 4, num_heads, head_dim=head_dim, dtype=torch.float64)
    both = ff.nn.CrossModalAttention(
        5, 4, num_heads, embed_dim=num_heads * head_dim, dropout=0.0, dtype=torch.float64
    )
    query, context = x(batch, q_len, 5, seed=seed), x(batch, kv_len, 4, seed=seed)
    q_pad = torch.rand(batch, q_len) < 0.4 if masked else None
    kv_pad = torch.rand(batch, kv_len) < 0.4 if masked else None
    hides = None if kv_pad is None else kv_pad[:, None, None]
    assert_same(cross(query, context, kv_pad), cross_by_hand(cross, query, context, hides)[0], "")
    expected = fuse_by_hand(both, query, context, q_pad, kv_pad)
    assert_same(both(query, context, q_pad, kv_pad), expected[:2], "")
    got = both(query, context, q_pad, kv_pad, need_weights=True, average_attn_weights=False)
    assert_same(got, expected, "with weights")


CROSS, MODAL = ff.nn.CrossAttention, ff.nn.CrossModalAttention
CONSTRUCTORS: dict[str, tuple[Any, type[Exception], str]] = {
    "float width": (lambda: CROSS(8.0, 6, 2), TypeError, "query_dim must be an int, got 8.0"),
    "bool width": (lambda: CROSS(8, True, 2), TypeError, "context_dim must be an int"),
    "no heads": (lambda: CROSS(8, 6, 0), ValueError, "num_heads must be at least 1, got 0"),
    "heads": (lambda: CROSS(8, 6, 3), ValueError, "query_dim must be a multiple of num_heads"),
    "head_dim": (lambda: CROSS(8, 6, 3, head_dim=0), ValueError, "head_dim must be at least 1"),
    "out_dim": (lambda: CROSS(8, 6, 2, out_dim=-1), ValueError, "out_dim must be at least 1"),
    "dropout": (lambda: CROSS(8, 6, 2, dropout=1.5), ValueError, "dropout must be between 0 and"),
    "NaN": (lambda: CROSS(8, 6, 2, dropout=float("nan")), ValueError, "dropout must be between"),
    "dropout type": (lambda: MODAL(8, 6, 2, dropout="a"), TypeError, "dropout must be a float"),
    "visual_dim": (lambda: MODAL(0, 6, 2), ValueError, "visual_dim must be at least 1, got 0"),
    "text_dim": (lambda: MODAL(8, "6", 2), TypeError, "text_dim must be an int, got '6'"),
    "embed_dim": (lambda: MODAL(8, 6, 3), ValueError, "embed_dim must be a multiple of num_head"),
    "hidden": (lambda: MODAL(8, 6, 2, dim_feedforward=0), ValueError, "dim_feedforward must be"),
    "activation": (lambda: MODAL(8, 6, 2, activation="tanh"), ValueError, "activation must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_bad_construction(case: str) -> None:
    build, error, text = CONSTRUCTORS[case]
    with pytest.raises(error, match=text):
        build()


Q, C = x(2, 3, 8, dtype=torch.float32), x(2, 5, 6, dtype=torch.float32)
GIVEN = r"query \(2, 3, 8\), context \(2, 5, 6\)"
CROSS_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no tensor": (([1.0], C), {}, TypeError, "query must be a Tensor, got list"),
    "rank": ((Q[0], C), {}, ValueError, r"query must have shape \(batch, length, 8\).*\(3, 8\)"),
    "width": ((C, C), {}, ValueError, r"query must have shape .*query \(2, 5, 6\)"),
    "context width": ((Q, Q), {}, ValueError, r"context must have shape \(batch, length, 6\)"),
    "batch": ((Q, C[:1]), {}, ValueError, r"context must have the batch size of query, got query"),
    "dtype": ((Q, C.double()), {}, TypeError, "context must have the dtype of query"),
    "device": ((Q, C.to("meta")), {}, ValueError, "context must be on the device of query"),
    "int": ((Q.long(), C.long()), {}, TypeError, "query must be float16, bfloat16"),
    "padding shape": (
        (Q, C, hidden(2, 4)), {}, ValueError,
        r"key_padding_mask must broadcast to \(2, 5\).*" + GIVEN,
    ),
    "padding dtype": ((Q, C, x(2, 5)), {}, TypeError, "key_padding_mask must be bool"),
    "mask shape": (
        (Q, C), {"attn_mask": hidden(5, 3)}, ValueError,
        r"attn_mask must broadcast to \(2, 2, 3, 5\), got shape \(5, 3\); " + GIVEN,
    ),
    "mask dtype": ((Q, C), {"attn_mask": hidden(3, 5).long()}, TypeError, "attn_mask must be bool"),
}  # fmt: skip


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("case", CROSS_CALLS)
def test_bad_cross_attention_input(case: str, need_weights: bool) -> None:
    args, kwargs, error, text = CROSS_CALLS[case]
    with pytest.raises(error, match=text):
        CROSS(8, 6, 2)(*args, need_weights=need_weights, **kwargs)


MODAL_CALLS: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "mask shape": (
        (Q, C, None, None, False, True, hidden(5, 3)), ValueError,
        r"attn_mask must broadcast to \(2, 2, 3, 5\), got shape \(5, 3\); visual \(2, 3, 8\)",
    ),
    "mask dtype": (
        (Q, C, None, None, True, True, hidden(3, 5).long()), TypeError, "attn_mask must be bool",
    ),
    "no tensor": ((Q, None), TypeError, "text must be a Tensor, got NoneType"),
    "rank": ((Q, C[0]), ValueError, r"text must have shape \(batch, length, 6\), got visual"),
    "width": ((C, C), ValueError, r"visual must have shape \(batch, length, 8\)"),
    "batch": ((Q, C[:1]), ValueError, "text must have the batch size of visual"),
    "visual padding": (
        (Q, C, hidden(2, 5)), ValueError, r"visual_padding_mask must broadcast to \(2, 3\)",
    ),
    "text padding": (
        (Q, C, None, hidden(2, 3)), ValueError,
        r"text_padding_mask must broadcast to \(2, 5\), got \(2, 3\); visual \(2, 3, 8\)",
    ),
    "padding dtype": ((Q, C, x(2, 3)), TypeError, "visual_padding_mask must be bool"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODAL_CALLS)
def test_bad_cross_modal_input(case: str) -> None:
    args, error, text = MODAL_CALLS[case]
    with pytest.raises(error, match=text):
        MODAL(8, 6, 2)(*args)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("corner", [causal_upper_left, causal_lower_right])
def test_causal_masks_of_torch(corner: Any, need_weights: bool) -> None:
    """Whose own memory is empty."""
    mask = corner(Q_LEN, KV_LEN)
    shift = KV_LEN - Q_LEN if corner is causal_lower_right else 0
    hides = torch.ones(Q_LEN, KV_LEN, dtype=torch.bool).triu(shift + 1)
    for module in (CROSS(8, 6, 2), MODAL(8, 6, 2, dim_feedforward=12, dropout=0.0)):
        given, expected = (
            module(Q, C, need_weights=need_weights, attn_mask=m) for m in (mask, hides)
        )
        assert_same(given, expected, "causal")
    with pytest.raises(ValueError, match="attn_mask must broadcast"):
        CROSS(8, 6, 2)(Q[:, 1:], C, attn_mask=mask)


@pytest.mark.parametrize("need_weights", [True, False])
def test_padding_masks_broadcast(need_weights: bool) -> None:
    q_pad, kv_pad = hidden(1, Q_LEN), hidden(1, KV_LEN)
    q_every, kv_every = q_pad.expand(BATCH, -1), kv_pad.expand(BATCH, -1)
    cross, both = CROSS(8, 6, 2), MODAL(8, 6, 2, dim_feedforward=12, dropout=0.0)
    for q_mask, kv_mask in ((q_pad, kv_pad), (q_pad[0], kv_pad[0])):
        options = {"need_weights": need_weights}
        assert_same(cross(Q, C, kv_mask, **options), cross(Q, C, kv_every, **options), "cross")
        got = both(Q, C, q_mask, kv_mask, **options)
        assert_same(got, both(Q, C, q_every, kv_every, **options), "both ways")
    dead = torch.tensor([[True], [False]])
    everything = dead.expand(-1, KV_LEN)
    got, expected = (cross(Q, C, m, need_weights=need_weights) for m in (dead, everything))
    assert_same(got, expected, "of each sample")


def test_repr_names_the_sizes() -> None:
    assert "query_dim=8, context_dim=6, num_heads=2, head_dim=4" in repr(CROSS(8, 6, 2))
    assert "visual_dim=8, text_dim=6, num_heads=2, embed_dim=8" in repr(MODAL(8, 6, 2))


def test_autocast_takes_mixed_dtypes() -> None:
    words, regions = torch.randn(2, 5, 16), torch.randn(2, 7, 24).bfloat16()
    mask = torch.zeros(5, 7).half()
    with torch.autocast("cpu", torch.bfloat16):
        out = nn.CrossAttention(16, 24, 4)(words, regions, attn_mask=mask)
        visual, text = nn.CrossModalAttention(24, 16, 4)(regions, words)
        attended, _ = nn.MultiheadAttention(16, 4, batch_first=True)(
            words, words, words, need_weights=False, attn_mask=torch.zeros(5, 5).half()
        )
    assert out.dtype == attended.dtype == torch.bfloat16
    assert visual.shape == regions.shape and text.shape == words.shape


def test_lowest_number_of_a_mask_is_not_minus_infinity() -> None:
    module = nn.CrossAttention(16, 16, 2).bfloat16()
    words, regions = torch.randn(1, 4, 16).bfloat16(), torch.randn(1, 6, 16).bfloat16()
    lowest = torch.full((4, 6), torch.finfo(torch.float32).min)
    mean = module.kv_proj(regions)[..., 16:].mean(1, keepdim=True)
    out = module(words, regions, attn_mask=lowest)
    torch.testing.assert_close(out, module.out_proj(mean).expand_as(out))
    _, weights = module(words, regions, attn_mask=lowest, need_weights=True)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6))


@pytest.mark.parametrize(
    ("module", "error", "name"),
    [
        (lambda: nn.CrossAttention(8, 8, 2)(*[torch.randn(1, 2, 8).double()] * 2), TypeError,
         "query"),
        (lambda: nn.CrossAttention(8, 8, 2, device="meta")(*[torch.randn(1, 2, 8)] * 2),
         ValueError, "query"),
        (lambda: nn.CrossModalAttention(8, 8, 2)(*[torch.randn(1, 2, 8).double()] * 2), TypeError,
         "visual"),
        (lambda: nn.CrossModalAttention(8, 8, 2, activation=[]), ValueError, "activation"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_weights(module: Any, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        module()


class Adapter(torch.nn.Module):
    """A layer around a layer, as libraries of adapters make them."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Linear(layer.in_features, 1, bias=False, dtype=layer.weight.dtype)
        self.up = torch.nn.Linear(1, layer.out_features, bias=False, dtype=layer.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


class Int8Linear(torch.nn.Linear):
    """Weights in int8, computed with in the dtype of the input."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
        scale = layer.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.bias = layer.bias
        rounded = (layer.weight.detach() / scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(rounded, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


def linears_replaced(module: Any, make: Any) -> Any:
    for part in list(module.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, torch.nn.Linear) and not isinstance(part, Adapter):
                setattr(part, name, make(child))
    return module


@pytest.mark.parametrize("make", [Adapter, Int8Linear])
@pytest.mark.parametrize("need_weights", [True, False])
def test_replaced_projections_count(make: Any, need_weights: bool) -> None:
    query, context = x(BATCH, Q_LEN, 8), x(BATCH, KV_LEN, 6, seed=1)
    cross = linears_replaced(CROSS(8, 6, 2, dtype=torch.float64), make)
    both = linears_replaced(cross_modal(), make)
    got = cross(query, context, need_weights=need_weights)
    expected, _ = cross_by_hand(cross, query, context, None)
    assert_same(got[0] if need_weights else got, expected, "CrossAttention")
    assert_same(cross(query, cross.project_context(context)), expected, "projected")
    got = both(query, context, need_weights=need_weights, average_attn_weights=False)
    assert_same(got, fuse_by_hand(both, query, context, None, None)[: len(got)], "both ways")


@pytest.mark.filterwarnings("ignore")  # torch.ao announces its end
def test_dynamic_quantisation() -> None:
    query, context = Q, C
    for module in (CROSS(8, 6, 2).eval(), MODAL(8, 6, 2, dim_feedforward=12).eval()):
        quantised = torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear})
        for need_weights in (True, False):
            got = quantised(query, context, need_weights=need_weights)
            wanted = module(query, context, need_weights=need_weights)
            for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, wanted)),
                            strict=True):  # fmt: skip
                assert (a - b).norm() < 0.1 * b.norm()


def test_projection_that_loads_its_weights_when_called() -> None:
    """As offloading does: on another device before, and with another forward."""
    module = CROSS(8, 6, 2)
    expected = module(Q, C)
    for part in (module.q_proj, module.kv_proj):
        weights = {k: v.detach() for k, v in part.named_parameters()}
        part.to("meta")
        part.forward = lambda x, w=weights: torch.nn.functional.linear(x, w["weight"], w["bias"])
    assert_same(module(Q, C), expected, "offloaded")


def test_attention_maps() -> None:
    cross, both = CROSS(8, 6, 2), MODAL(8, 6, 2, dim_feedforward=12, dropout=0.0)
    model = torch.nn.ModuleDict({"cross": cross, "both": both})
    for average in (True, False):
        with ff.attention_maps(model, average=average) as maps:
            out, fused = cross(Q, C), both(Q, C)
            kept = cross(Q, cross.project_context(C), need_weights=True)
        _, weights = cross(Q, C, need_weights=True, average_attn_weights=average)
        *_, on_text, on_visual = both(Q, C, need_weights=True, average_attn_weights=average)
        assert_same(maps, {"cross": weights, "both": (on_text, on_visual)}, "maps")
        assert_same((out, fused), (cross(Q, C), both(Q, C)), "outputs")
        assert_same(kept, cross(Q, C, need_weights=True), "what the caller asked for")


def test_modules_are_leaves_of_a_symbolic_trace() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross, self.both = CROSS(8, 6, 2), MODAL(8, 6, 2, dropout=0.0)

        def forward(self, query: Tensor, context: Tensor) -> Any:
            return self.both(self.cross(query, context), context)

    model = Model()
    assert_same(torch.fx.symbolic_trace(model)(Q, C), model(Q, C), "traced")
