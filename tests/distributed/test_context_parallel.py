"""Sequences on several ranks against the same attention in one process, with gradients."""

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

import fastfusion as ff
from fastfusion.__main__ import main

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
LENGTH = 24


@pytest.mark.parametrize("world", [2, 4])
def test_ranks(world: int, tmp_path: Path) -> None:
    checks = [check_ring, check_uneven, check_packed, check_short_side, check_sequences]
    ranks.run(world, checks + [check_lost_rank] * (world == 2), tmp_path)


def test_bytes_are_those_of_the_formulas(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.json"
    options = ["--tokens", "64", "--rounds", "2", "--output", str(output)]
    assert main(["bench", "distributed", "--ranks", "2", *options]) == 0
    assert "not what the formulas say" not in capsys.readouterr().out
    rows = json.loads(output.read_text())["rows"]
    assert [row["sent"] > 0 for row in rows] == [True, True, False]
    assert [row["reduced"] > 0 for row in rows] == [False, False, True]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def loss(out: Tensor, lse: Tensor | None = None) -> Tensor:
    """Of rows, so that losses of parts add up to that of the whole."""
    total = (out.double() * (1 + out.double())).sum()
    return total if lse is None else total + (lse.double().masked_fill(lse.isinf(), 0) * 0.3).sum()


def check_ring(rank: int, world: int) -> None:
    for dtype, causal, padded, dropout_p in (
        (torch.float32, False, False, 0.0),
        (torch.float32, True, False, 0.0),
        (torch.float32, False, True, 0.0),
        (torch.float32, True, True, 0.0),
        (torch.bfloat16, True, False, 0.0),
        (torch.float32, False, True, 0.3),  # the same scores are dropped
        (torch.float32, True, True, 0.3),
    ):
        q, k, v = (torch.randn(2, 3, LENGTH, 8).to(dtype) for _ in range(3))
        hidden = torch.zeros(2, LENGTH, dtype=torch.bool)
        if padded:
            hidden[0, 5:] = True  # some ranks have no key of this sample
            hidden[1] = True  # and none has one of that
        whole = leaves(q, k, v)
        torch.manual_seed(5)
        expected = ff.scaled_dot_product_attention(
            *whole, None, dropout_p, causal, key_padding_mask=hidden, return_lse=True
        )
        loss(*expected).backward()

        def part(tensor: Tensor, dim: int = 2, causal: bool = causal) -> Tensor:
            return ff.distributed.shard_sequence(tensor, dim, zigzag=causal)

        own = leaves(*map(part, (q, k, v)))
        torch.manual_seed(5 + rank)  # that of the first rank counts
        found = ff.distributed.ring_attention(
            *own, dropout_p=dropout_p, is_causal=causal,
            key_padding_mask=part(hidden, 1) if padded else None, return_lse=True,
        )  # fmt: skip
        torch.manual_seed(6)
        loss(*found).backward()
        close: Any = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
        assert found[0].dtype == dtype and found[1].dtype == torch.float32
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, part(other), **close)
        for one, other in zip(own, whole, strict=True):
            assert one.grad is not None and other.grad is not None
            torch.testing.assert_close(one.grad, part(other.grad), **close)


def check_uneven(rank: int, world: int) -> None:
    """Ranks with more keys, fewer and none; queries as many as they like."""
    lengths = [5, 0, 9, 3][:world]
    q = torch.randn(1, 2, 4 * world, 8)
    k, v = (torch.randn(1, 2, sum(lengths), 8) for _ in range(2))
    whole = leaves(q, k, v)
    expected = ff.scaled_dot_product_attention(*whole)
    loss(expected).backward()
    start = sum(lengths[:rank])
    keys = slice(start, start + lengths[rank])
    own = leaves(q[:, :, 4 * rank : 4 * rank + 4], k[:, :, keys], v[:, :, keys])
    found = ff.distributed.ring_attention(*own)
    loss(found).backward()
    torch.testing.assert_close(found, expected[:, :, 4 * rank : 4 * rank + 4])
    assert all(t.grad is not None for t in (*whole, *own))
    torch.testing.assert_close(own[0].grad, whole[0].grad[:, :, 4 * rank : 4 * rank + 4])
    for one, other in zip(own[1:], whole[1:], strict=True):
        torch.testing.assert_close(one.grad, other.grad[:, :, keys])


def check_packed(rank: int, world: int) -> None:
    """Packed sequences, some of which lie on several ranks; causal ones with as many keys."""
    starts = torch.tensor([0, 3, 3, 16, 24], dtype=torch.int32)
    keys = torch.tensor([0, 5, 9, 9, 32], dtype=torch.int32)  # one sequence has none
    for causal, starts_k, dropout_p in (
        (False, starts, 0.0),
        (True, starts, 0.0),
        (False, keys, 0.0),
        (False, starts, 0.4),  # the same scores are dropped
        (True, starts, 0.4),
        (False, keys, 0.4),
    ):
        q, k, v = (torch.randn(n, 2, 8) for n in (24, *[int(starts_k[-1])] * 2))
        whole = leaves(q, k, v)
        torch.manual_seed(5)
        expected = ff.varlen_attention(
            *whole, starts, starts_k, is_causal=causal, dropout_p=dropout_p, return_lse=True
        )
        loss(*expected).backward()
        own = leaves(*(ff.distributed.shard_sequence(t, 0) for t in (q, k, v)))
        torch.manual_seed(5 + rank)  # that of the first rank counts
        found = ff.distributed.ring_varlen_attention(
            *own, starts, starts_k, dropout_p=dropout_p, is_causal=causal, return_lse=True
        )
        torch.manual_seed(6)
        loss(*found).backward()
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, ff.distributed.shard_sequence(other, 0))
        for one, other in zip(own, whole, strict=True):
            assert one.grad is not None and other.grad is not None
            torch.testing.assert_close(one.grad, ff.distributed.shard_sequence(other.grad, 0))


def check_short_side(rank: int, world: int) -> None:
    """A long side in parts, and a short one that all have."""
    image, image_value = (torch.randn(2, 3, LENGTH, 8) for _ in range(2))
    words, words_value = (torch.randn(2, 3, 5, 8) for _ in range(2))
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    hidden = torch.zeros(2, LENGTH, dtype=torch.bool)
    hidden[0, : LENGTH // 2] = True
    hidden[1] = True  # nothing is left for this text to look at

    def part(tensor: Tensor, dim: int = 2) -> Tensor:
        return ff.distributed.shard_sequence(tensor, dim)

    whole = leaves(image, words, words_value, image_value)
    masks = {"query_padding_mask": hidden, "key_padding_mask": padding}
    expected = ff.bidirectional_attention(*whole, **masks)
    (loss(expected[0]) + loss(expected[1])).backward()
    own = leaves(part(image), words, words_value, part(image_value))
    masks["query_padding_mask"] = part(hidden, 1)
    found = ff.distributed.sharded_bidirectional_attention(*own, **masks)
    (loss(found[0]) + loss(found[1])).backward()
    torch.testing.assert_close(found[0], part(expected[0]))
    torch.testing.assert_close(found[1], expected[1])
    assert not found[1][1].any(), "a row without keys anywhere is 0"
    for one, other, sharded in zip(own, whole, (True, False, False, True), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, part(other.grad) if sharded else other.grad)

    whole, own = leaves(words, image, image_value), leaves(words, part(image), part(image_value))
    expected = ff.scaled_dot_product_attention(*whole, key_padding_mask=hidden, return_lse=True)
    found = ff.distributed.sharded_keys_attention(
        *own, key_padding_mask=part(hidden, 1), return_lse=True
    )
    for pair in (expected, found):
        loss(*pair).backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(own[0].grad, whole[0].grad)
    for one, other in zip(own[1:], whole[1:], strict=True):
        torch.testing.assert_close(one.grad, part(other.grad))


def check_sequences(rank: int, world: int) -> None:
    whole = torch.arange(2 * world * 3.0).view(1, -1)
    for zigzag in (False, True):
        own = ff.distributed.shard_sequence(whole, 1, zigzag=zigzag)
        assert own.shape == (1, 6)
        assert torch.equal(ff.distributed.gather_sequence(own, 1, zigzag=zigzag), whole)
    with pytest.raises(ValueError, match="must be a multiple of"):
        ff.distributed.shard_sequence(whole[:, 1:], 1)
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="as long for queries as for keys, got 4 and 2"):
        ff.distributed.ring_attention(q, q[:, :, :2], q[:, :, :2], is_causal=True)
    with pytest.raises(ValueError, match="query must be"):
        ff.distributed.ring_attention(q[0], q, q)
    with pytest.raises(TypeError, match="key_padding_mask must be bool"):
        ff.distributed.ring_attention(q, q, q, key_padding_mask=torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"key_padding_mask must be \(1, 4\)"):
        ff.distributed.ring_attention(q, q, q, key_padding_mask=torch.zeros(1, 3).bool())


def check_lost_rank(rank: int, world: int) -> None:
    """A rank that does not come, and one that is gone, are errors within the group's timeout."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    q = torch.randn(1, 1, 4, 8)
    if rank == 0:
        with pytest.raises(RuntimeError, match="Timed out waiting 1000ms"):
            ff.distributed.ring_attention(q, q, q, group=group)
    dist.barrier()
    if rank == 1:
        os._exit(0)
    with pytest.raises(RuntimeError, match="by peer"):
        ff.distributed.ring_attention(q, q, q)
    os._exit(0)
