"""attention_statistics against the weights themselves, in float64."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from suite import needs_native
from torch import Tensor

import fastfusion as ff
from fastfusion.backends import library
from fastfusion.ops import attention_statistics

WHAT = attention_statistics.WHAT

BACKENDS = ["reference"] + ["cpu"] * (library.native is not None)


def weights_of(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    causal_alignment: str = "top_left",
    **_: Any,
) -> Tensor:
    """The softmax, from scores of every pair; rows without keys are 0."""
    query, key = query.double(), key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    if key_padding_mask is not None:
        key = key.masked_fill(key_padding_mask[:, None, :, None], 0.0)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.zeros(scores.shape, dtype=torch.bool)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            hidden = hidden | ~attn_mask
        else:
            scores = scores + attn_mask.double()
    if is_causal:
        q_len, kv_len = scores.shape[-2:]
        offset = kv_len - q_len if causal_alignment == "bottom_right" else 0
        hidden = hidden | ~torch.ones(q_len, kv_len, dtype=torch.bool).tril(offset)
    if key_padding_mask is not None:
        hidden = hidden | key_padding_mask[:, None, None]
    scores = scores.masked_fill(hidden, -math.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0)


def entropy_of(weights: Tensor) -> Tensor:
    return -(weights * weights.clamp_min(1e-300).log()).sum(-1)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some(*shape: int, share: float = 0.3, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


Q, K = normal(2, 4, 20, 16), normal(2, 4, 36, 16, seed=1)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": -0.7},
    "scale 0": {"scale": 0.0},
    "sharp": {"scale": 6.0},
    "causal": {"is_causal": True},
    "causal bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "padding": {"key_padding_mask": some(2, 36)},
    "all padding": {"key_padding_mask": some(2, 36) | torch.tensor([[True], [False]])},
    "mask": {"attn_mask": some(2, 4, 20, 36, share=0.5)},
    "mask of heads": {"attn_mask": some(4, 20, 36, share=0.5)},
    "mask of rows": {"attn_mask": some(20, 1, share=0.5)},
    "mask of keys": {"attn_mask": some(36, share=0.5)},
    "bias": {"attn_mask": normal(1, 4, 20, 36, seed=2)},
    "hiding bias": {
        "attn_mask": normal(20, 36, seed=2).masked_fill(some(20, 36, share=0.4), -math.inf)
    },
    "mask and causal": {"attn_mask": some(20, 36, share=0.6), "is_causal": True},
    "everything": {
        "attn_mask": normal(2, 1, 20, 36, seed=4), "is_causal": True, "scale": 0.3,
        "key_padding_mask": some(2, 36), "causal_alignment": "bottom_right",
    },
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_the_weights(name: str, backend: str) -> None:
    case = CASES[name]
    found = ff.attention_statistics(
        Q, K, what=("mass", "entropy", "topk"), k=4, backend=backend, **case
    )
    weights = weights_of(Q, K, **case)
    torch.testing.assert_close(found.mass.double(), weights.sum(2), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found.entropy.double(), entropy_of(weights), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(
        found.weights.double(), weights.topk(4, -1).values, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        weights.gather(-1, found.keys), found.weights.double(), rtol=1e-5, atol=1e-6
    )
    assert found.mass.shape == (2, 4, 36) and found.entropy.shape == (2, 4, 20)


LARGE: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "padding": {"key_padding_mask": some(2, 1100), "query_padding_mask": some(2, 130, seed=3)},
    "everything": {
        "attn_mask": normal(2, 1, 130, 1100, seed=4), "is_causal": True, "scale": 0.3,
        "key_padding_mask": some(2, 1100), "causal_alignment": "bottom_right",
        "query_padding_mask": some(2, 130, seed=3),
    },
}  # fmt: skip


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LARGE)
def test_kernel_over_tiles_and_blocks(name: str, dtype: torch.dtype, isa: str) -> None:
    """More queries than a register tile and more keys than a task has, in memory as modules have
    them: heads side by side."""
    case = LARGE[name]
    query = normal(2, 130, 2, 24, dtype=dtype).transpose(1, 2)
    key = normal(2, 1100, 1, 24, seed=1, dtype=dtype).transpose(1, 2)
    found = ff.attention_statistics(query, key, enable_gqa=True, backend="cpu", **case)
    weights = weights_of(query, key, **case)
    if "query_padding_mask" in case:
        weights = weights.masked_fill(case["query_padding_mask"][:, None, :, None], 0.0)
    torch.testing.assert_close(found.mass.double(), weights.sum(2), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found.entropy.double(), entropy_of(weights), rtol=2e-5, atol=2e-5)


@needs_native
def test_same_bits_for_any_threads_and_batch_mates() -> None:
    query, key = normal(2, 2, 700, 24), normal(2, 2, 1100, 24, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = ff.attention_statistics(query, key)
    torch.set_num_threads(2)
    found = ff.attention_statistics(query, key)
    torch.set_num_threads(before)
    alone = ff.attention_statistics(query[1:, 1:], key[1:, 1:])
    for one, two, three in zip(expected[:2], found[:2], alone[:2], strict=True):
        assert torch.equal(one, two) and torch.equal(one[1:, 1:], three)


@needs_native
def test_queries_that_do_not_count_are_not_read() -> None:
    ignored = some(2, 20)
    query = Q.masked_fill(ignored[:, None, :, None], math.nan)
    found = ff.attention_statistics(query, K, query_padding_mask=ignored)
    expected = ff.attention_statistics(Q, K, query_padding_mask=ignored)
    assert torch.equal(found.mass, expected.mass) and torch.equal(found.entropy, expected.entropy)
    spoiled = ff.attention_statistics(query, K)
    assert bool(spoiled.mass.isnan().all())
    assert torch.equal(spoiled.entropy.isnan(), ignored[:, None].expand(2, 4, 20))


@needs_native
def test_op_and_explanation() -> None:
    call = attention_statistics.OP.call(
        Q, K, attn_mask=some(20, 36), key_padding_mask=some(2, 36), query_padding_mask=some(2, 20)
    )
    torch.library.opcheck(torch.ops.fastfusion.weight_statistics_forward.default, tuple(call))
    assert ff.explain(ff.attention_statistics, Q, K).chosen == "cpu"
    empty = ff.attention_statistics(Q, K[:, :, :0])
    assert empty.mass.shape == (2, 4, 0) and not empty.entropy.any()
    assert not ff.attention_statistics(Q[:, :, :0], K).mass.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    query, key = Q.to(dtype), K.to(dtype)
    found = ff.attention_statistics(query, key, what=WHAT)
    weights = weights_of(query, key)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.mass.dtype == found.entropy.dtype == found.weights.dtype == wide
    torch.testing.assert_close(found.mass.double(), weights.sum(2), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found.entropy.double(), entropy_of(weights), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "causal", "padding", "mask", "bias", "everything"])
def test_gradients(name: str, backend: str) -> None:
    case = dict(CASES[name])
    gradients = []
    for ours in (True, False):
        query, key = Q.clone().requires_grad_(), K.clone().requires_grad_()
        leaves = [query, key]
        if name in ("bias", "everything"):
            case["attn_mask"] = case["attn_mask"].detach().clone().requires_grad_()
            leaves.append(case["attn_mask"])
        if ours:
            mass, entropy, *_ = ff.attention_statistics(query, key, backend=backend, **case)
        else:
            weights = weights_of(query, key, **case)
            mass, entropy = weights.sum(2), entropy_of(weights)
        loss = (mass.square() * normal(36, seed=5)).sum() + (entropy * normal(20, seed=6)).sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for ours, exact in zip(*gradients, strict=True):
        assert float((ours - exact).norm()) <= 1e-5 * float(exact.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "causal", "mask", "bias"])
def test_padded_queries_do_not_count(name: str, backend: str) -> None:
    padding = some(2, 20, share=0.5, seed=9)
    case = CASES[name]
    found = ff.attention_statistics(
        Q, K, what=WHAT, query_padding_mask=padding, backend=backend, **case
    )
    weights = weights_of(Q, K, **case).masked_fill(padding[:, None, :, None], 0.0)
    torch.testing.assert_close(found.mass.double(), weights.sum(2), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found.entropy.double(), entropy_of(weights), rtol=2e-5, atol=2e-5)
    assert not found.weights[padding[:, None].expand(2, 4, 20)].any()


def test_hidden_keys_are_not_read() -> None:
    padding = some(2, 36)
    key = K.masked_fill(padding[:, None, :, None], float("nan")).requires_grad_()
    found = ff.attention_statistics(Q, key, what=WHAT, key_padding_mask=padding)
    assert all(bool(t.isfinite().all()) for t in found)
    assert not found.mass.detach()[padding[:, None].expand(2, 4, 36)].any()
    (gradient,) = torch.autograd.grad(found.mass.square().sum() + found.entropy.sum(), key)
    assert bool(gradient.isfinite().all())


def test_grouped_heads_and_other_ranks() -> None:
    key = K[:, :2]
    found = ff.attention_statistics(Q, key, enable_gqa=True)
    torch.testing.assert_close(found.mass.double(), weights_of(Q, key).sum(2), rtol=2e-5, atol=2e-5)
    flat = ff.attention_statistics(Q[0, 0], K[0, 0], what=WHAT)
    assert flat.mass.shape == (36,) and flat.entropy.shape == (20,) and flat.keys.shape == (20, 5)
    three = ff.attention_statistics(Q[0], K[0])
    torch.testing.assert_close(three.mass[0], flat.mass)
    five = ff.attention_statistics(Q[:, None], K[:, None])
    assert five.mass.shape == (2, 1, 4, 36)
    one = ff.attention_statistics(Q, K, what="entropy")
    assert one.mass is None and one.weights is None and one.keys is None
    torch.testing.assert_close(one.entropy, ff.attention_statistics(Q, K).entropy)


def test_many_rows_at_a_time_are_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["everything"]
    whole = ff.attention_statistics(Q, K, what=WHAT, **case)
    monkeypatch.setattr(attention_statistics, "_AT_A_TIME", 3 * 2 * 4 * 36)
    parts = ff.attention_statistics(Q, K, what=WHAT, **case)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_under_autocast_and_compile() -> None:
    expected = ff.attention_statistics(Q, K)
    with torch.autocast("cpu", torch.bfloat16):
        found = ff.attention_statistics(Q.bfloat16(), K.bfloat16())
    assert found.mass.dtype == torch.float32
    torch.testing.assert_close(found.mass, expected.mass, rtol=0.05, atol=0.05)
    compiled = torch.compile(ff.attention_statistics, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(Q, K)[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"what": ("mass", "sum")}, ValueError, "what must be some of 'mass', 'entropy', 'topk'"),
        ({"what": ()}, ValueError, "what must be some of"),
        ({"what": "topk", "k": 37}, ValueError, "k must be from 1 to the number of keys, 36"),
        ({"what": "topk", "k": 2.0}, TypeError, "k must be an int, got float"),
        ({"query_padding_mask": some(3, 20)}, ValueError, "query_padding_mask"),
        ({"query_padding_mask": Q}, TypeError, "query_padding_mask"),
        ({"attn_mask": some(3, 3)}, ValueError, "attn_mask"),
        ({"scale": math.inf}, ValueError, "scale"),
    ],
)
def test_bad_input(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ff.attention_statistics(Q, K, **options)


@pytest.mark.skipif(library.native is None, reason="the reference has an L x L tensor")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
@pytest.mark.parametrize("what", ["mass", "entropy", "topk"])
def test_scratch_memory_is_linear_in_length(what: str) -> None:
    """In a process of its own, 4 heads of 4,096 x 4,096 (268 MB of weights): 10 MB at most, most
    of it the scores of some rows."""
    script = f"""
import fastfusion as ff, torch
from pathlib import Path
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
torch.set_num_threads(1)
query, key = torch.randn(2, 1, 4, 4096, 32)
ff.attention_statistics(query[:, :, :512], key, what="{what}")
Path("/proc/self/clear_refs").write_text("5")
before = peak()
ff.attention_statistics(query, key, what="{what}")
print(peak() - before)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
    assert int(printed) <= 10e6
