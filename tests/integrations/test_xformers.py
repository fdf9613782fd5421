"""xformers' memory_efficient_attention on our ops, against what its masks materialize to."""

import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from checkout import need_library
from torch import Tensor

import fastfusion as ff
from fastfusion.integrations.xformers import (
    memory_efficient_attention,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    masks = need_library("xformers.ops.fmha.attn_bias")

DIM, VALUE_DIM, GROUPS, HEADS = 16, 24, 2, 3
QUERIES, KEYS = 12, 17
Q_LENGTHS, K_LENGTHS = [3, 1, 8], [4, 5, 8]
PADDING, PAGE = 8, 4
TABLES = torch.tensor([[5, 0], [2, 3], [1, 4]], dtype=torch.int32)
DTYPES = (torch.float32, torch.bfloat16)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def blocks(kind: str = "BlockDiagonalMask") -> Any:
    return getattr(masks, kind).from_seqlens(Q_LENGTHS, K_LENGTHS)


def padded(kind: str) -> Any:
    return getattr(masks, kind).from_seqlens(Q_LENGTHS, PADDING, K_LENGTHS)


def gappy(kind: str) -> Any:
    return getattr(masks, kind).from_seqlens(Q_LENGTHS, [2, 8, 16, 24], K_LENGTHS)


# Of lengths QUERIES and KEYS.
WHOLE: dict[str, Callable[[], Any]] = {
    "LowerTriangularMask": lambda: masks.LowerTriangularMask(),
    "LowerTriangularMaskWithTensorBias": lambda: masks.LowerTriangularMask().add_bias(
        normal(1, GROUPS * HEADS, QUERIES, KEYS)
    ),
    "LowerTriangularFromBottomRightMask": lambda: masks.LowerTriangularFromBottomRightMask(),
    "LowerTriangularFromBottomRightLocalAttentionMask": (
        lambda: masks.LowerTriangularFromBottomRightMask().make_local_attention(4)
    ),
    "LocalAttentionFromBottomRightMask": lambda: masks.LocalAttentionFromBottomRightMask(3, 2),
}
# Of sum(Q_LENGTHS) queries.
BLOCKS: dict[str, Callable[[], Any]] = {
    "BlockDiagonalMask": blocks,
    "BlockDiagonalCausalMask": lambda: blocks().make_causal(),
    "BlockDiagonalCausalFromBottomRightMask": lambda: blocks().make_causal_from_bottomright(),
    "BlockDiagonalCausalLocalAttentionMask": lambda: blocks().make_local_attention(3),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (
        lambda: blocks().make_local_attention_from_bottomright(3)
    ),
    "BlockDiagonalPaddedKeysMask": lambda: padded("BlockDiagonalPaddedKeysMask"),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": (
        lambda: padded("BlockDiagonalCausalWithOffsetPaddedKeysMask")
    ),
    "BlockDiagonalLocalAttentionPaddedKeysMask": (
        lambda: padded("BlockDiagonalPaddedKeysMask").make_local_attention(2, 1)
    ),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": (
        lambda: masks.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(
            Q_LENGTHS, PADDING, K_LENGTHS, 3
        )
    ),
    "BlockDiagonalGappyKeysMask": lambda: gappy("BlockDiagonalGappyKeysMask"),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": (
        lambda: gappy("BlockDiagonalCausalWithOffsetGappyKeysMask")
    ),
    **{
        f"Paged{kind}": (
            lambda kind=kind: padded(kind).make_paged(TABLES, PAGE, getattr(masks, f"Paged{kind}"))
        )
        for kind in ("BlockDiagonalPaddedKeysMask", "BlockDiagonalCausalWithOffsetPaddedKeysMask")
    },
    **{
        f"Paged{kind}": (
            lambda kind=kind: gappy(kind).make_paged(
                TABLES, PAGE, PADDING, getattr(masks, f"Paged{kind}")
            )
        )
        for kind in ("BlockDiagonalGappyKeysMask", "BlockDiagonalCausalWithOffsetGappyKeysMask")
    },
}


def keys_of(name: str) -> int:
    if name in WHOLE:
        return KEYS
    return sum(K_LENGTHS) if name in list(BLOCKS)[:5] else PADDING * len(K_LENGTHS)


def formula(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Attention over (batch, length, heads, dim) and the log-sum-exp, with 0 and -inf for a query
    without keys."""
    query, key, value = (t.to(dtype).transpose(1, 2) for t in (query, key, value))
    scores = query @ key.transpose(-2, -1) * DIM**-0.5 + bias.to(dtype)
    out = scores.softmax(-1).nan_to_num(0.0) @ value
    return out.transpose(1, 2), scores.logsumexp(-1)


def check(actual: Tensor, inputs: tuple[Tensor, ...], bias: Tensor) -> None:
    exact, plain = (formula(*inputs, bias, t)[0] for t in (torch.float64, inputs[0].dtype))
    slices = [
        t.reshape(t.shape[0], t.shape[1], -1, t.shape[-1]).transpose(1, 2).flatten(0, 1).flatten(1)
        for t in (actual, exact, plain)
    ]
    assert_accurate(*slices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["BMHK", "BMGHK", "BMGHK shared"])
@pytest.mark.parametrize("name", [*WHOLE, *BLOCKS])
@pytest.mark.filterwarnings("error")  # that a class is not known
def test_every_mask_is_what_it_materializes_to(name: str, form: str, dtype: torch.dtype) -> None:
    mask = (WHOLE | BLOCKS)[name]()
    kv_len, heads = keys_of(name), GROUPS * HEADS
    query = normal(1, QUERIES, heads, DIM, dtype=dtype)
    key, value = (normal(1, kv_len, heads, dim, dtype=dtype) for dim in (DIM, VALUE_DIM))
    if form == "BMGHK shared":
        key, value = (t[:, :, ::HEADS].repeat_interleave(HEADS, 2) for t in (key, value))
    bias = mask.materialize((1, heads, QUERIES, kv_len))
    given = query, key, value
    if form != "BMHK":
        given = tuple(t.unflatten(2, (GROUPS, HEADS)) for t in given)  # type: ignore[assignment]
        if name == "LowerTriangularMaskWithTensorBias":
            mask._bias = mask._bias.unflatten(1, (GROUPS, HEADS))
    if form == "BMGHK shared":
        key, value = (t[:, :, :, :1].expand(-1, -1, -1, HEADS, -1) for t in given[1:])
        given = given[0], key, value
    if name == "LowerTriangularMaskWithTensorBias":
        mask._bias = mask._bias.to(dtype)
        bias = bias.to(dtype)
    actual = memory_efficient_attention(*given, mask)
    assert actual.shape == (*given[0].shape[:-1], VALUE_DIM)
    assert actual.dtype == dtype and actual.is_contiguous()
    if form == "BMGHK shared":
        given = given[0], *(t[:, :, :, :1].expand(-1, -1, -1, HEADS, -1) for t in given[1:])
    check(actual, tuple(t.reshape(1, -1, heads, t.shape[-1]) for t in given), bias)


@pytest.mark.parametrize("name", [*WHOLE, *BLOCKS])
def test_log_sum_exp_of_every_mask(name: str) -> None:
    mask = (WHOLE | BLOCKS)[name]()
    kv_len, heads = keys_of(name), GROUPS * HEADS
    given = (normal(1, QUERIES, heads, DIM), *(normal(1, kv_len, heads, DIM) for _ in "kv"))
    bias = mask.materialize((1, heads, QUERIES, kv_len))
    out, lse = memory_efficient_attention_forward_requires_grad(*given, mask)
    _, exact = formula(*given, bias, torch.float64)
    _, plain = formula(*given, bias, torch.float32)
    assert lse.shape == (1, heads, QUERIES) and lse.dtype == torch.float32
    assert_accurate(lse.flatten(0, 1), exact.flatten(0, 1), plain.flatten(0, 1))
    assert torch.equal(out, memory_efficient_attention_forward(*given, mask))


def test_every_class_of_masks_is_known() -> None:
    """Of the installed xformers; a new one would be materialized."""
    classes = {
        name
        for name, found in vars(masks).items()
        if isinstance(found, type) and issubclass(found, masks.AttentionBias)
    }
    assert classes - {"AttentionBias"} == {*WHOLE, *BLOCKS}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["aligned", "transposed", "expanded", "float32"])
def test_a_tensor_is_added(layout: str, dtype: torch.dtype) -> None:
    given = tuple(normal(2, n, HEADS, DIM, dtype=dtype) for n in (QUERIES, KEYS, KEYS))
    bias = normal(2, HEADS, QUERIES, KEYS, dtype=dtype)
    bias[0, 0, :-1, :-1] = -math.inf
    bias[1, 1, 3] = -math.inf  # a row without keys
    if layout == "aligned":  # as xformers' kernels ask for
        bias = torch.nn.functional.pad(bias, (0, 7))[..., :KEYS]
    elif layout == "transposed":
        bias = bias.mT.contiguous().mT
    elif layout == "expanded":
        bias = bias[:, :1].expand(-1, HEADS, -1, -1)
    else:
        bias = bias.float()
    check(memory_efficient_attention(*given, bias), given, bias)
    out = memory_efficient_attention(*given, bias)
    assert not out[1, 3, 0 if layout == "expanded" else 1].any() or layout == "expanded"


def test_inputs_without_heads_and_in_groups() -> None:
    query, key, value = (normal(2, n, DIM) for n in (QUERIES, KEYS, KEYS))
    bias = normal(2, QUERIES, KEYS)
    given = tuple(t.unsqueeze(2) for t in (query, key, value))
    actual = memory_efficient_attention(query, key, value, bias)
    assert actual.shape == (2, QUERIES, DIM)
    check(actual.unsqueeze(2), given, bias.unsqueeze(1))
    check(memory_efficient_attention(query, key, value)[:, :, None], given, torch.zeros(()))
    grouped = tuple(normal(2, n, GROUPS, HEADS, DIM) for n in (QUERIES, KEYS, KEYS))
    bias = normal(2, GROUPS, HEADS, QUERIES, KEYS)
    flat = tuple(t.flatten(2, 3) for t in grouped)
    actual = memory_efficient_attention(*grouped, bias)
    check(actual.flatten(2, 3), flat, bias.flatten(1, 2))
    _, lse = memory_efficient_attention_forward_requires_grad(*grouped, bias)
    assert lse.shape == (2, GROUPS, HEADS, QUERIES)
    _, lse = memory_efficient_attention_forward_requires_grad(query, key, value)
    assert lse.shape == (2, 1, QUERIES)


def test_a_shared_key_is_not_copied() -> None:
    """The memory of a group's expanded keys, which are HEADS times as large, is not needed."""
    query = normal(1, 8, 1, 64, 64)
    key, value = (normal(1, 4096, 1, 1, 64).expand(-1, -1, -1, 64, -1) for _ in "kv")
    with torch.profiler.profile(profile_memory=True) as profile:
        memory_efficient_attention(query, key, value)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < key.numel() * key.itemsize / 8


@pytest.mark.parametrize("name", ["none", "tensor", *WHOLE, *list(BLOCKS)[:7]])
def test_gradients_reach_inputs_and_biases(name: str) -> None:
    kv_len = KEYS if name in ("none", "tensor") else keys_of(name)
    heads = GROUPS * HEADS
    leaves = [normal(1, QUERIES, heads, DIM), *(normal(1, kv_len, heads, DIM) for _ in "kv")]
    mask: Any = None
    if name == "tensor":
        mask = normal(1, heads, QUERIES, kv_len)
        leaves.append(mask)
    elif name != "none":
        mask = (WHOLE | BLOCKS)[name]()
    if name == "LowerTriangularMaskWithTensorBias":
        leaves.append(mask._bias)
    for leaf in leaves:
        leaf.requires_grad_()
    grad = normal(1, QUERIES, heads, DIM)
    bias = torch.zeros(()) if mask is None else mask
    if not isinstance(bias, Tensor):
        bias = bias.materialize((1, heads, QUERIES, kv_len))
    actual = torch.autograd.grad(memory_efficient_attention(*leaves[:3], mask), leaves, grad)
    results = []
    for dtype in (torch.float64, torch.float32):
        out, _ = formula(*leaves[:3], bias, dtype)
        results.append(torch.autograd.grad(out, leaves, grad.to(dtype), retain_graph=True))
    for found, exact, plain in zip(actual, *results, strict=True):
        assert_accurate(*(t.flatten(0, 1).flatten(1) for t in (found, exact, plain)))


def test_each_expanded_key_has_its_gradient() -> None:
    """Also of a leaf that is expanded: its slots are gradients of their own."""
    query = normal(2, 5, GROUPS, HEADS, DIM)
    key, value = (normal(2, 6, GROUPS, 1, DIM).expand(-1, -1, -1, HEADS, -1) for _ in "kv")
    key.requires_grad_()
    (actual,) = torch.autograd.grad(memory_efficient_attention(query, key, value).sum(), key)
    flat = [t.flatten(2, 3) for t in (query, key, value)]
    results = []
    for dtype in (torch.float64, torch.float32):
        out, _ = formula(*flat, torch.zeros(()), dtype)
        results += torch.autograd.grad(out.sum(), key, retain_graph=True)
    assert_accurate(*(t.flatten(0, 2).flatten(1) for t in (actual, *results)))


def test_dropout_drops_and_scale_scales() -> None:
    query, key, value = (normal(1, 64, 2, DIM) for _ in "qkv")
    ones = torch.ones_like(value)
    weights = memory_efficient_attention(query, key, ones, p=0.5)
    assert weights.std() > 0.01  # some scores are gone, others doubled
    assert torch.equal(
        memory_efficient_attention(query, key, value, scale=0.5),
        memory_efficient_attention(query * 2, key, value, scale=0.25),
    )
    with pytest.raises(NotImplementedError, match="p must be 0"):
        memory_efficient_attention_forward_requires_grad(query, key, value, p=0.5)


def test_results_in_another_dtype() -> None:
    given = [normal(1, 4, 2, DIM, dtype=torch.bfloat16) for _ in "qkv"]
    out = memory_efficient_attention(*given, output_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert torch.equal(out.bfloat16(), memory_efficient_attention(*given))


def test_no_gradient_is_tracked_by_the_forward() -> None:
    given = [normal(1, 4, 2, DIM).requires_grad_() for _ in "qkv"]
    assert not memory_efficient_attention_forward(*given).requires_grad
    assert memory_efficient_attention(*given).requires_grad


class OfTheUser(masks.LowerTriangularMask):
    """A class that nobody knows, which hides the first key from all but the first query."""

    def materialize(self, shape: Any, dtype: Any = torch.float32, device: Any = "cpu") -> Tensor:
        bias = super().materialize(shape, dtype, device)
        bias[..., 1:, 0] = -math.inf
        return bias


def test_an_unknown_class_is_materialized_and_named() -> None:
    given = tuple(normal(2, QUERIES, HEADS, DIM) for _ in "qkv")
    with pytest.warns(RuntimeWarning, match="does not know .*OfTheUser"):
        actual = memory_efficient_attention(*given, OfTheUser())
    check(actual, given, OfTheUser().materialize((2, HEADS, QUERIES, QUERIES)))


def test_a_class_of_another_version_is_materialized(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose attributes have other names."""
    mask = masks.LocalAttentionFromBottomRightMask(3, 2)
    bias = mask.materialize((1, HEADS, QUERIES, KEYS))
    monkeypatch.setattr(
        masks.LocalAttentionFromBottomRightMask, "materialize", lambda *a, **k: bias
    )
    del mask.window_left
    given = tuple(normal(1, n, HEADS, DIM) for n in (QUERIES, KEYS, KEYS))
    with pytest.warns(RuntimeWarning, match="does not know"):
        actual = memory_efficient_attention(*given, mask)
    check(actual, given, bias)


def test_bad_input_is_named() -> None:
    query, key, value = (normal(2, n, HEADS, DIM) for n in (QUERIES, KEYS, KEYS))
    attend: Any = memory_efficient_attention
    with pytest.raises(ValueError, match="op must be None"):
        attend(query, key, value, op=(object, None))
    with pytest.raises(ValueError, match="must all be"):
        attend(query, key[:, :, 0], value)
    with pytest.raises(ValueError, match="key must have the batch.*expand"):
        attend(query, key[:, :, :1], value)
    with pytest.raises(ValueError, match="value must have"):
        attend(query, key, value[:, 1:])
    with pytest.raises(TypeError, match=r"key must be a floating Tensor, got torch.int32"):
        attend(query, key.int(), value.int())
    with pytest.raises(ValueError, match=r"attn_bias must be \(2, 3, 12, 17\), got \(3, 12, 17\)"):
        attend(query, key, value, normal(HEADS, QUERIES, KEYS))
    with pytest.raises(TypeError, match="attn_bias must be float"):
        attend(query, key, value, torch.ones(2, HEADS, QUERIES, KEYS, dtype=torch.bool))
    with pytest.raises(TypeError, match="attn_bias must be None"):
        attend(query, key, value, "causal")
    with pytest.raises(ValueError, match="batch 1 beside BlockDiagonalMask"):
        attend(query, key, value, blocks())
    with pytest.raises(ValueError, match="key must have the 17 rows of attn_bias, got 16"):
        attend(query[:1], key[:1, 1:], value[:1, 1:], blocks())
    with pytest.raises(ValueError, match="rows that attn_bias names"):
        attend(query[:1], key[:1], value[:1], gappy("BlockDiagonalGappyKeysMask"))
    with pytest.raises(ValueError, match="dropout_p must be between 0 and 1"):
        attend(query, key, value, p=1.5)


def test_it_needs_no_xformers() -> None:
    code = (
        "import sys, torch, fastfusion as ff\n"
        "sys.modules['xformers'] = None\n"
        "attend = ff.integrations.xformers.memory_efficient_attention\n"
        "q = torch.randn(1, 4, 2, 8)\n"
        "print(attend(q, q, q, torch.zeros(1, 2, 4, 4)).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch.Size([1, 4, 2, 8])" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["none", "tensor", "LowerTriangularMask"])
def test_it_compiles_into_one_graph(name: str) -> None:
    given = tuple(normal(2, QUERIES, HEADS, DIM) for _ in "qkv")
    mask = {"none": None, "tensor": normal(2, HEADS, QUERIES, QUERIES)}.get(name)
    if name in WHOLE:
        mask = WHOLE[name]()
    compiled = torch.compile(memory_efficient_attention, backend="aot_eager", fullgraph=True)
    assert torch.equal(
        compiled(*given, mask), ff.integrations.xformers.memory_efficient_attention(*given, mask)
    )
