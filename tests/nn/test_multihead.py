"""ff.nn.MultiheadAttention against torch's: outputs and gradients over a product of options."""

import itertools
import random
import warnings
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_cases import HEADS, WIDTH, assert_same, assert_same_call, bias, hidden, outputs, twin
from torch import Tensor

import fastfusion as ff

BATCH, Q_LEN, KV_LEN = 2, 3, 5
KINDS = ("self", "shared memory", "all different", "unbatched", "unbatched self")
MASKS = (None, "bool", "float", "bool per head", "float per head")
PADDINGS = (None, "bool", "float")
WEIGHTS = ({"need_weights": False}, {}, {"average_attn_weights": False})


def pair(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, dtype=dtype, **options)
    ours = ff.nn.MultiheadAttention(WIDTH, HEADS, dtype=dtype, **options)
    twin(ours, theirs)
    return ours, theirs


def make_inputs(module: Any, kind: str, dtype: torch.dtype) -> list[Tensor]:
    """One tensor for self-attention, two for a shared memory, three otherwise."""
    generator = torch.Generator().manual_seed(5)

    def tensor(length: int, width: int) -> Tensor:
        shape = (BATCH, length, width) if module.batch_first else (length, BATCH, width)
        if kind.startswith("unbatched"):
            shape = (length, width)  # type: ignore[assignment]
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    query = tensor(Q_LEN, WIDTH)
    if kind.endswith("self"):
        return [query]
    if kind == "shared memory":
        return [query, tensor(KV_LEN, module.kdim)]
    return [query, tensor(KV_LEN, module.kdim), tensor(KV_LEN, module.vdim)]


def make_masks(
    kind: str, mask: str | None, padding: str | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    batch = 1 if kind.startswith("unbatched") else BATCH
    kv_len = Q_LEN if kind.endswith("self") else KV_LEN
    made = {}
    if mask is not None:
        shape = (batch * HEADS, Q_LEN, kv_len) if mask.endswith("head") else (Q_LEN, kv_len)
        made["attn_mask"] = bias(*shape, dtype=dtype) if "float" in mask else hidden(*shape)
    if padding is not None:
        keys = (kv_len,) if kind.startswith("unbatched") else (batch, kv_len)
        made["key_padding_mask"] = (
            bias(*keys, dtype=dtype, seed=6) if padding == "float" else hidden(*keys, seed=6)
        )
    return made


def call_with(options: dict[str, Any], masks: dict[str, Tensor]) -> Any:
    """A call that takes query, key, value from the front and float masks from the rear."""
    floats = [name for name, mask in masks.items() if mask.is_floating_point()]

    def call(module: Any, tensors: list[Tensor]) -> Any:
        given = tensors[: len(tensors) - len(floats)]
        passed = {**masks, **dict(zip(floats, tensors[len(given) :], strict=True))}
        query, key, value = (given + given[-1:] * 2)[:3]
        return module(query, key, value, **passed, **options)

    return call


def compare(ours: Any, theirs: Any, kind: str, masks: dict[str, Tensor], **options: Any) -> None:
    dtype = ours.out_proj.weight.dtype
    inputs = make_inputs(ours, kind, dtype)
    floats = [mask for mask in masks.values() if mask.is_floating_point()]
    case = f"{kind}, {sorted(masks)}, {options}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")
        assert_same_call(ours, theirs, call_with(options, masks), inputs + floats, case)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 4}, {"kdim": 6, "vdim": 6}])
@pytest.mark.parametrize("add_zero_attn", [True, False])
@pytest.mark.parametrize("add_bias_kv", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_every_forward_option(
    has_bias: bool,
    add_bias_kv: bool,
    add_zero_attn: bool,
    widths: dict[str, int],
    batch_first: bool,
) -> None:
    ours, theirs = pair(
        bias=has_bias,
        add_bias_kv=add_bias_kv,
        add_zero_attn=add_zero_attn,
        batch_first=batch_first,
        **widths,
    )
    # A third of the calls for each module, others for another: all of them take 30 s.
    constructed = (has_bias, add_bias_kv, add_zero_attn, *widths.values(), batch_first)
    chosen = random.Random(repr(constructed))
    for kind, mask, padding, weights in itertools.product(KINDS, MASKS, PADDINGS, WEIGHTS):
        if chosen.random() > 1 / 3:
            continue
        if widths and (
            kind.endswith("self") or (kind == "shared memory" and ours.kdim != ours.vdim)
        ):
            continue
        compare(ours, theirs, kind, make_masks(kind, mask, padding, torch.float64), **weights)


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind: str) -> None:
    ours, theirs = pair(torch.float32, batch_first=True)
    for mask, weights in itertools.product((None, "bool", "float"), WEIGHTS):
        compare(ours, theirs, kind, make_masks(kind, mask, None, torch.float32), **weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("mask", "need_weights"),
    # With weights torch refuses a float32 mask beside half-precision inputs.
    [*itertools.product((None, "bool", "float"), (True, False)), ("float32", False)],
)
def test_half_precision(mask: str | None, need_weights: bool, dtype: torch.dtype) -> None:
    ours, theirs = pair(dtype)
    exact = torch.nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    inputs = make_inputs(ours, "shared memory", dtype)
    mask_dtype = torch.float32 if mask == "float32" else dtype
    masks = make_masks("shared memory", mask and mask.removesuffix("32"), None, mask_dtype)

    def run(module: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
        given = [t.to(dtype) for t in inputs]
        floats = [m.to(dtype) for m in masks.values() if m.is_floating_point()]
        return outputs(call_with({"need_weights": need_weights}, masks)(module, given + floats))

    for actual, baseline, expected in zip(
        run(ours), run(theirs), run(exact, torch.float64), strict=True
    ):
        assert actual.dtype == dtype
        assert_accurate(*(t.reshape(1, -1) for t in (actual, expected, baseline)))


@pytest.mark.parametrize("as_float", [True, False])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_is_causal_is_a_hint(
    options: dict[str, Any], weights: dict[str, bool], padding: str | None, as_float: bool
) -> None:
    ours, theirs = pair(**options)
    masks = make_masks("self", None, padding, torch.float64)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(Q_LEN, dtype=torch.float64)
    # A second mask that is not causal shows which of the two, hint or mask, is used.
    for mask in (causal, torch.flip(causal, (1,)).masked_fill(torch.eye(Q_LEN) > 0, 0.0)):
        masks["attn_mask"] = mask if as_float else mask == -torch.inf
        compare_hint(ours, theirs, masks, weights)


def compare_hint(
    ours: Any, theirs: Any, masks: dict[str, Tensor], weights: dict[str, bool]
) -> None:
    """Without the gradients of masks: a mask that the hint replaces has none."""
    x = make_inputs(ours, "self", torch.float64)

    def call(module: Any, tensors: list[Tensor]) -> Any:
        return module(*tensors * 3, **masks, **weights, is_causal=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")
        assert_same_call(ours, theirs, call, x, f"is_causal, {sorted(masks)}, {weights}")


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", [None, "bool", "bool per head"])
@pytest.mark.parametrize("padding", [None, "bool"])
def test_eval_agrees_with_torchs_fast_path(
    padding: str | None, mask: str | None, need_weights: bool
) -> None:
    ours, theirs = pair(torch.float32, batch_first=True)
    masks = make_masks("self", mask, padding, torch.float32)
    call = call_with({"need_weights": need_weights}, masks)
    inputs = make_inputs(ours, "self", torch.float32)
    with torch.no_grad():
        assert_same_call(
            ours.eval(), theirs.eval(), call, inputs, f"{sorted(masks)}", gradients=False
        )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3), st.integers(0, 7), st.integers(0, 7), st.integers(1, 4), st.integers(1, 5),
    st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape(
    batch: int, q_len: int, kv_len: int, heads: int, head_dim: int, batch_first: bool,
    with_mask: bool, with_padding: bool, need_weights: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    width = heads * head_dim
    theirs = torch.nn.MultiheadAttention(width, heads, batch_first=batch_first, dtype=torch.float64)
    ours = ff.nn.MultiheadAttention(width, heads, batch_first=batch_first, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())

    def tensor(length: int) -> Tensor:
        shape = (batch, length, width) if batch_first else (length, batch, width)
        return torch.randn(shape, dtype=torch.float64)

    masks = {}
    if with_mask and kv_len:
        masks["attn_mask"] = hidden(q_len, kv_len, seed=seed)
    if with_padding and kv_len:
        # The first key stays, so that no row is empty.
        masks["key_padding_mask"] = hidden(batch, kv_len, seed=seed)

    def call(module: Any, tensors: list[Tensor]) -> Any:
        return module(tensors[0], tensors[1], tensors[1], need_weights=need_weights, **masks)

    inputs = [tensor(q_len), tensor(kv_len)]
    try:
        call(theirs, inputs)
    except RuntimeError:
        # torch reshapes some empty inputs in a way that has no answer; ours has none to match.
        assert 0 in (batch, q_len, kv_len)
        return
    both_hide_all = with_mask and with_padding and kv_len
    if (
        both_hide_all
        and (masks["attn_mask"][None] | masks["key_padding_mask"][:, None]).all(-1).any()
    ):
        return
    assert_same_call(ours, theirs, call, inputs, f"{batch} {q_len} {kv_len} {heads}")


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("how", ["padding", "float padding", "mask", "float mask", "both"])
def test_row_with_no_key_left(how: str, need_weights: bool) -> None:
    ours, _ = pair(batch_first=True)
    x = torch.randn(BATCH, Q_LEN, WIDTH, dtype=torch.float64, requires_grad=True)
    masks = {}
    if "padding" in how:
        masks["key_padding_mask"] = torch.tensor([[True] * Q_LEN, [False] * Q_LEN])
    elif how == "both":
        masks["attn_mask"] = torch.tensor([[False, True, True]] + [[False] * Q_LEN] * 2)
        masks["key_padding_mask"] = torch.tensor([[True, False, False], [False] * Q_LEN])
    else:
        masks["attn_mask"] = torch.tensor([[True] * Q_LEN] + [[False] * Q_LEN] * 2)
    dead = torch.zeros(BATCH, Q_LEN, dtype=torch.bool)
    dead[0] = "padding" in how
    dead[:, 0] |= "mask" in how
    dead[0, 0] |= how == "both"
    if "float" in how:
        masks = {
            name: torch.zeros(m.shape, dtype=x.dtype).masked_fill(m, -torch.inf)
            for name, m in masks.items()
        }
    out, weights = ours(x, x, x, need_weights=need_weights, **masks)
    alone = ours.out_proj.bias.expand(int(dead.sum()), WIDTH)
    torch.testing.assert_close(out[dead], alone)
    assert not (out[~dead] == ours.out_proj.bias).all(-1).any()
    if need_weights:
        assert (weights[dead] == 0).all()
        torch.testing.assert_close(weights[~dead].sum(-1), torch.ones(int((~dead).sum())).double())
        (out.sum() + weights.square().sum()).backward()
    else:
        out.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, *ours.parameters()))


@pytest.mark.parametrize("need_weights", [True, False])
def test_nan_under_padding_spreads_nowhere(need_weights: bool) -> None:
    ours, _ = pair(batch_first=True)
    memory = torch.randn(BATCH, KV_LEN, WIDTH, dtype=torch.float64)
    query = torch.randn(BATCH, Q_LEN, WIDTH, dtype=torch.float64)
    padding = torch.zeros(BATCH, KV_LEN, dtype=torch.bool)
    padding[1, 3:] = True
    expected = ours(query, memory, memory, key_padding_mask=padding, need_weights=need_weights)
    memory[1, 3:] = torch.nan
    actual = ours(query, memory, memory, key_padding_mask=padding, need_weights=need_weights)
    assert_same(actual, expected, "NaN in hidden keys")


def test_dropout_has_torchs_distribution() -> None:
    torch.manual_seed(0)
    p, length = 0.3, 64
    ours = ff.nn.MultiheadAttention(WIDTH, HEADS, dropout=p, batch_first=True)
    x = torch.randn(8, length, WIDTH)
    clean, clean_weights = ours.eval()(x, x, x, average_attn_weights=False)
    out, weights = ours.train()(x, x, x, average_attn_weights=False)
    kept = weights != 0
    assert abs(kept.double().mean().item() - (1 - p)) < 0.01
    torch.testing.assert_close(weights[kept], clean_weights[kept] / (1 - p))
    # The weights returned are those that made the output.
    v = torch.nn.functional.linear(
        x, ours.in_proj_weight[2 * WIDTH :], ours.in_proj_bias[2 * WIDTH :]
    )
    v = v.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    expected = ours.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected)
    # Without weights, the fused op drops: unbiased, and drawn anew at each call.
    draws = torch.stack([ours(x, x, x, need_weights=False)[0] for _ in range(200)])
    error = draws.mean(0) - clean
    assert (error.abs() < 6 * draws.std(0) / 200**0.5 + 1e-6).all()
    assert not torch.equal(draws[0], draws[1])


def test_weights_have_the_querys_dtype() -> None:
    ours, _ = pair(torch.bfloat16)
    x = torch.randn(Q_LEN, BATCH, WIDTH, dtype=torch.bfloat16)
    out, weights = ours(x, x, x)
    assert out.dtype == weights.dtype == torch.bfloat16


@pytest.mark.parametrize("batch_first", [True, False])
def test_output_is_contiguous(batch_first: bool) -> None:
    ours, _ = pair(batch_first=batch_first)
    query, memory = make_inputs(ours, "shared memory", torch.float64)
    assert ours(query, memory, memory, need_weights=False)[0].is_contiguous()


def test_mixed_masks_warn_as_torch_does() -> None:
    ours, theirs = pair()
    x = make_inputs(ours, "self", torch.float64)[0]
    masks = make_masks("self", "float", "bool", torch.float64)
    texts = []
    for module in (ours, theirs):
        with pytest.warns(UserWarning) as caught:
            module(x, x, x, **masks)
        texts.append([str(w.message) for w in caught])
    assert texts[0] == texts[1][:1]
