"""Windows, soft caps, ALiBi, segments, prefixes, sinks and position tables in the modules that take
them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fastfusion as ff

SLOPES = torch.tensor([0.5, 0.1])
KINDS: list[dict[str, Any]] = [
    {"window": (2, 1)},
    {"softcap": 0.7},
    {"alibi_slopes": SLOPES},
    {"window": (3, None), "softcap": 0.9, "alibi_slopes": torch.stack((SLOPES, -SLOPES, SLOPES))},
    {
        "segment_ids_q": torch.tensor([0, 0, 1, 2, 1]),
        "prefix_len": torch.tensor([4, 0, 2]),
        "segment_ids_k": torch.tensor([[0, 0, 1, 1, 1, 2, 2]] * 3),
        "sinks": SLOPES,
    },
    {"position_table": torch.randn(2, 4), "position_index": torch.arange(35).view(5, 7) % 4},
    {"softcap": 0.9, "position_table": torch.randn(1, 4), "position_index": torch.arange(11) % 4},
]
kinds = pytest.mark.parametrize("kinds", KINDS, ids="-".join)


def scores_bias(q_len: int, kv_len: int, kinds: Any) -> Tensor:
    """What a window and slopes add to scores: (3 or 1, 2, q_len, kv_len)."""
    distance = torch.arange(q_len)[:, None] - torch.arange(kv_len)
    slopes = kinds.get("alibi_slopes", torch.zeros(2)).reshape(-1, 2, 1, 1)
    bias = -slopes * distance.abs()
    left, right = (torch.inf if n is None else n for n in kinds.get("window", (None, None)))
    hidden = (distance > left) | (distance < -right)
    if "prefix_len" in kinds:
        behind = torch.arange(kv_len) >= kinds["prefix_len"][:, None, None, None]
        hidden = hidden | ((distance < 0) & behind)
    if "segment_ids_q" in kinds:
        q_ids, k_ids = kinds["segment_ids_q"], kinds["segment_ids_k"][:, :kv_len]
        hidden = hidden | (q_ids[:, None] != k_ids[:, None, None])
    if "position_table" in kinds:
        index = kinds["position_index"]
        if index.dim() == 1:
            index = index[q_len - 1 - distance]
        bias = bias + kinds["position_table"][:, index]
    return bias.masked_fill(hidden, -torch.inf)


def formula(q: Tensor, k: Tensor, v: Tensor, kinds: Any, mask: Tensor | None) -> Any:
    """Out (batch, length, width) and weights of projected (batch, length, width) by hand."""
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if "softcap" in kinds:
        scores = kinds["softcap"] * torch.tanh(scores / kinds["softcap"])
    scores = scores + scores_bias(q.shape[2], k.shape[2], kinds)
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)
    sinks = kinds.get("sinks", torch.full((2,), -torch.inf))[:, None, None]
    scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., :-1]
    return (weights @ v).transpose(1, 2).flatten(2), weights


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
@kinds
class TestBoth:
    def test_multihead_attention(self, kinds: Any, need_weights: bool, training: bool) -> None:
        module = ff.nn.MultiheadAttention(16, 2, batch_first=True).train(training)
        query, key = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
        hidden, causal = torch.rand(3, 7) < 0.2, torch.ones(5, 7, dtype=torch.bool).triu(3)
        q, k, v = (
            nn.functional.linear(x, w, b)
            for x, w, b in zip(
                (query, key, key),
                module.in_proj_weight.chunk(3),
                module.in_proj_bias.chunk(3),
                strict=True,
            )
        )
        expected, weights = formula(q, k, v, kinds, causal | hidden[:, None, None])
        out, given = module(
            query, key, key, hidden, need_weights, causal, average_attn_weights=False, **kinds
        )
        assert_close(out, module.out_proj(expected))
        if need_weights:
            assert_close(given, weights)

    def test_cross_attention(self, kinds: Any, need_weights: bool, training: bool) -> None:
        module = ff.nn.CrossAttention(16, 12, 2).train(training)
        query, context = torch.randn(3, 5, 16), torch.randn(3, 7, 12)
        hidden = torch.rand(3, 7) < 0.2
        k, v = module.kv_proj(context).chunk(2, -1)
        expected, weights = formula(module.q_proj(query), k, v, kinds, hidden[:, None, None])
        out = module(query, context, hidden, need_weights=need_weights, **kinds)
        if need_weights:
            out, given = out
            assert_close(given, weights.mean(1))
        assert_close(out, module.out_proj(expected))


def test_one_sequence_and_lengths_first() -> None:
    module = ff.nn.MultiheadAttention(16, 2)
    x = torch.randn(5, 1, 16)
    options: dict[str, Any] = {"window": (1, 0), "alibi_slopes": SLOPES, "need_weights": False}
    out, _ = module(x, x, x, **options)
    alone, _ = module(x[:, 0], x[:, 0], x[:, 0], **options)
    assert_close(alone, out[:, 0])
    assert not torch.equal(out, module(x, x, x, need_weights=False)[0])


def test_what_does_not_go_together() -> None:
    x = torch.randn(2, 5, 16)
    for more in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        module = ff.nn.MultiheadAttention(16, 2, batch_first=True, **more)
        with pytest.raises(ValueError, match="add_bias_kv and add_zero_attn"):
            module(x, x, x, window=(1, 1))
    module = ff.nn.MultiheadAttention(16, 2, batch_first=True)
    nested = torch.nested.nested_tensor([x[0], x[1, :3]])
    with pytest.raises(ValueError, match="nested"):
        module(nested, nested, nested, softcap=1.0)
    cross = ff.nn.CrossAttention(16, 16, 2)
    with pytest.raises(ValueError, match="nested"):
        cross(nested, nested, softcap=1.0)
    for need_weights in (False, True):
        with pytest.raises(ValueError, match="alibi_slopes must broadcast"):
            module(x, x, x, need_weights=need_weights, alibi_slopes=torch.rand(3))
        with pytest.raises(ValueError, match="softcap must be between"):
            cross(x, x, need_weights=need_weights, softcap=-1.0)


@kinds
def test_compiles(kinds: Any) -> None:
    torch._dynamo.reset()
    module = ff.nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(3, 5, 16)
    if "segment_ids_k" in kinds:
        kinds = kinds | {"segment_ids_k": kinds["segment_ids_k"][:, :5]}
    if "position_index" in kinds:
        kinds = kinds | {"position_index": kinds["position_index"][..., :5]}
        if kinds["position_index"].dim() == 1:
            kinds["position_index"] = torch.arange(9) % 4
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for need_weights in (False, True):
        assert_close(
            compiled(x, x, x, need_weights=need_weights, **kinds)[0],
            module(x, x, x, need_weights=need_weights, **kinds)[0],
        )
    torch._dynamo.reset()
