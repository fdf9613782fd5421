"""need_weights=True changes no output: scores are float32 on both roads."""

import copy
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

import fastfusion as ff

HALVES = (torch.float16, torch.bfloat16)
Q_LEN, KV_LEN, WIDTH = 6, 7, 12


def integers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float()


def build(name: str, query_scale: float, key_scale: float) -> Any:
    """With whole numbers times a scale where scores come from: 16 bits hold queries and keys
    without rounding, so that the scores are exact and only what they are kept in matters. All keys
    have a large part in common, which a rounded score keeps instead of what differs."""
    torch.manual_seed(0)
    if name == "MultiheadAttention":
        module = ff.nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        query, key = module.in_proj_weight[: 2 * WIDTH].chunk(2)
    elif name == "CrossAttention":
        module = ff.nn.CrossAttention(WIDTH, WIDTH, 2)
        query, key = module.q_proj.weight, module.kv_proj.weight[:WIDTH]
    else:
        module = ff.nn.CrossModalAttention(WIDTH, WIDTH, 2, dim_feedforward=12, dropout=0.0)
        query, key = (m.in_proj.weight[:WIDTH] for m in (module.visual, module.text))
    with torch.no_grad():
        query.copy_(integers(*query.shape, seed=1) * query_scale)
        key.copy_(integers(*key.shape, seed=2) * key_scale)
        key[:, 0] = 192 * key_scale
    return module


def tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    query, context = integers(2, Q_LEN, WIDTH, seed=8), integers(2, KV_LEN, WIDTH, seed=9)
    context[..., 0] = 1
    return query.to(dtype), context.to(dtype)


def call(name: str, module: Any, dtype: torch.dtype, need_weights: bool) -> list[Tensor]:
    query, context = tokens(dtype)
    inputs = (query, context, context) if name == "MultiheadAttention" else (query, context)
    out = module(*inputs, need_weights=need_weights, average_attn_weights=False)
    return [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]


@pytest.mark.parametrize("scales", [(1 / 32, 0.5), (16.0, 16.0)], ids=["small", "beyond float16"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["MultiheadAttention", "CrossAttention", "CrossModalAttention"])
def test_16_bits(name: str, dtype: torch.dtype, scales: tuple[float, float]) -> None:
    module = build(name, *scales)
    exact = call(name, copy.deepcopy(module).to(dtype).double(), torch.float64, True)
    half = copy.deepcopy(module).to(dtype)
    with ff.use_backend("reference"):
        plain = call(name, half, dtype, False)
    got = call(name, half, dtype, True)
    outputs = len(plain)
    plain += [w.to(dtype) for w in exact[outputs:]]
    for actual, wanted, baseline in zip(got, exact, plain, strict=True):
        assert actual.dtype == dtype
        assert_accurate(*(t.flatten(1) for t in (actual, wanted, baseline)))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["MultiheadAttention", "CrossAttention", "CrossModalAttention"])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    module = build(name, 16.0, 16.0)
    with torch.autocast("cpu", dtype):
        plain = call(name, module, torch.float32, False)
        got = call(name, module, torch.float32, True)
    exact = call(name, module.double(), torch.float64, True)
    outputs = len(plain)
    for actual, wanted, baseline in zip(got[:outputs], exact, plain, strict=False):
        assert actual.dtype == baseline.dtype
        assert_accurate(*(t.flatten(1) for t in (actual, wanted, baseline)))
    for actual, wanted in zip(got[outputs:], exact[outputs:], strict=True):
        assert actual.dtype == dtype
        assert_accurate(*(t.flatten(1) for t in (actual, wanted, wanted.to(dtype))))


def test_scores_are_beyond_float16() -> None:
    module = build("CrossAttention", 16.0, 16.0)
    query, context = tokens()
    q, k = module.q_proj(query), module.kv_proj(context)[..., :WIDTH]
    q, k = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    assert scores.abs().max() > torch.finfo(torch.float16).max
    for dtype in HALVES:
        assert torch.equal(q.to(dtype).float(), q) and torch.equal(k.to(dtype).float(), k)
