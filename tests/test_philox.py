"""The random bits of dropout against published answers, big-integer arithmetic and statistics."""

import math
import random
from typing import Any

import pytest
import torch
from suite import OpSuite, Target
from torch import Tensor

import fastfusion as ff
from fastfusion import ops
from fastfusion.core import philox
from fastfusion.ops import bidirectional_attention, scaled_dot_product_attention, varlen_attention

MASK = 0xFFFFFFFF

# Random123 1.14, examples/kat_vectors: philox4x32 with 10 rounds.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def hexadecimal(words: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in words.split())


def as_seed(low: int, high: int) -> Tensor:
    """The key's two words as the signed 64-bit number that a seed is."""
    number = low | high << 32
    return torch.tensor([number - 2**64 if number >= 2**63 else number])


def twin(counter: tuple[int, ...], key: tuple[int, ...], rounds: int = 10) -> tuple[int, ...]:
    """Philox4x32 as in the paper, in integers of any size."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [right >> 32 ^ c[1] ^ k[0], right & MASK, left >> 32 ^ c[3] ^ k[1], left & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return tuple(c)


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers(counter: str, key: str, words: str) -> None:
    expected = hexadecimal(words)
    assert twin(hexadecimal(counter), hexadecimal(key)) == expected
    seed = as_seed(*hexadecimal(key))
    result = philox.philox(tuple(torch.tensor([c]) for c in hexadecimal(counter)), seed)
    assert tuple(w.item() for w in result) == expected


@pytest.mark.parametrize("rounds", [1, 7, 10])
def test_equals_its_twin(rounds: int) -> None:
    """Random counters and keys; the extremes of a word come up often."""
    source = random.Random(rounds)

    def word() -> int:
        return source.choice([0, 1, 2**31, MASK, *(source.getrandbits(32) for _ in range(6))])

    for _ in range(20):
        key = (word(), word())
        counters = [tuple(word() for _ in range(4)) for _ in range(100)]
        columns = tuple(torch.tensor(column) for column in zip(*counters, strict=True))
        results = philox.philox(columns, as_seed(*key), rounds)
        for index, counter in enumerate(counters):
            assert tuple(int(r[index]) for r in results) == twin(counter, key, rounds)


def test_a_score_keeps_its_bit() -> None:
    """counter = (j // 4, i, batch * heads + head, stream), word j % 4, kept iff >= threshold."""
    sizes, p, seed = (3, 2, 5, 11), 0.37, as_seed(0xDEADBEEF, 0x12345678)
    for stream in (0, 1):
        keep = philox.keep_mask(seed, p, *sizes, stream=stream)
        assert keep.shape == sizes and keep.dtype == torch.bool
        for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in sizes)).tolist():
            words = twin((j // 4, i, b * sizes[1] + h, stream), (0xDEADBEEF, 0x12345678))
            assert keep[b, h, i, j] == (words[j % 4] >= round(p * 2**32))


def test_a_bit_does_not_depend_on_the_lengths() -> None:
    seed = as_seed(3, 4)
    whole = philox.keep_mask(seed, 0.5, 2, 3, 20, 37, stream=0)
    assert torch.equal(philox.keep_mask(seed, 0.5, 2, 3, 7, 10, stream=0), whole[:, :, :7, :10])
    assert torch.equal(philox.keep_mask(seed, 0.5, 1, 3, 20, 37, stream=0), whole[:1])
    for first in (0, 4, 6, 7):  # in the middle of a counter's four keys, too
        part = philox.keep_mask(philox.placed(seed, 5, first, 1, 3), 0.5, 2, 2, 9, 11, stream=0)
        assert torch.equal(part, whole[:, 1:, 5:14, first : first + 11])
    for empty in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)):
        assert philox.keep_mask(seed, 0.5, *empty, stream=0).shape == empty


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_threshold(p: float) -> None:
    assert philox.threshold(p) == round(p * 2**32)
    keep = philox.keep_mask(as_seed(1, 2), p, 1, 2, 30, 41, stream=0)
    if p in (0.0, 1.0):
        assert bool((keep == (p == 0.0)).all())


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("stream", [0, 1])
def test_keep_rate(p: float, stream: int) -> None:
    """The whole, every row, column, head and position keep a binomial share.

    Bernstein's inequality: each bound is overstepped by chance once in a million tests.
    """
    sizes = (4, 4, 64, 64)
    keep = philox.keep_mask(as_seed(11, 12), p, *sizes, stream=stream).double()
    for dims in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (2, 3), (1, 2, 3), (0, 2, 3)):
        share = keep.mean(dims)
        unit = math.log(2e6 * share.numel()) / (keep.numel() // share.numel())
        bound = unit / 3 + math.sqrt((unit / 3) ** 2 + 2 * p * (1 - p) * unit)
        assert (share - (1 - p)).abs().max() < bound


def test_bits_are_independent() -> None:
    """Neighbours along every dimension agree as often as fair coins: within 5 deviations."""
    keep = philox.keep_mask(as_seed(5, 6), 0.5, 4, 4, 64, 64, stream=0)
    others = {
        "stream": (keep, philox.keep_mask(as_seed(5, 6), 0.5, 4, 4, 64, 64, stream=1)),
        "seed": (keep, philox.keep_mask(as_seed(6, 6), 0.5, 4, 4, 64, 64, stream=0)),
        "high half of the seed": (keep, philox.keep_mask(
            as_seed(5, 7), 0.5, 4, 4, 64, 64, stream=0)),
        "transposed": (keep, keep.transpose(-1, -2)),
    }  # fmt: skip
    for dim, name in enumerate(("batch", "head", "row", "column")):
        n = keep.shape[dim]
        others[name] = (keep.narrow(dim, 0, n - 1), keep.narrow(dim, 1, n - 1))
    for name, (a, b) in others.items():
        share = (a == b).double().mean().item()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(a.numel()), name


def test_seeds_come_from_torch() -> None:
    torch.manual_seed(7)
    seeds = [philox.draw_seed(torch.device("cpu")) for _ in range(50)]
    assert all(s.shape == (1,) and s.dtype == torch.int64 and s >= 0 for s in seeds)
    assert len({int(s) for s in seeds}) == 50
    assert max(int(s) for s in seeds) > 2**56, "the upper half of the key is in use"
    torch.manual_seed(7)
    assert [int(philox.draw_seed(torch.device("cpu"))) for _ in range(50)] == list(map(int, seeds))


def identities(batch: int, heads: int, q_len: int, kv_len: int) -> dict[str, Tensor]:
    """Calls whose values are identities: their outputs are the dropped weights themselves."""
    return {
        "query": torch.randn(batch, heads, q_len, 8),
        "key": torch.randn(batch, heads, kv_len, 8),
        "value": torch.eye(kv_len).expand(batch, heads, -1, -1),
        "query_value": torch.eye(q_len).expand(batch, heads, -1, -1),
    }


def targets(op: Any) -> list[Target]:
    """The implementations of an op that drop, the CPU kernels once per instruction set."""
    return type("Suite", (OpSuite,), {"op": op}).dropout_targets()


def expected_keep(p: float, *sizes: int, stream: int = 0) -> Tensor:
    torch.manual_seed(21)
    return philox.keep_mask(philox.draw_seed(torch.device("cpu")), p, *sizes, stream=stream)


SIZES = [(2, 3, 20, 36), (1, 1, 1, 1), (3, 2, 49, 133), (1, 5, 7, 250)]


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("target", targets(scaled_dot_product_attention.OP), ids=str)
def test_attention_drops_these_bits(target: Target, sizes: Any, p: float) -> None:
    call = identities(*sizes)
    del call["query_value"]
    torch.manual_seed(21)
    (weights,) = target.call(ff.scaled_dot_product_attention, **call, dropout_p=p)
    assert torch.equal(weights != 0, expected_keep(p, *sizes))


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("target", targets(bidirectional_attention.OP), ids=str)
def test_bidirectional_drops_these_bits(target: Target, sizes: Any, p: float) -> None:
    call = identities(*sizes)
    torch.manual_seed(21)
    to_keys, to_queries = target.call(ff.bidirectional_attention, **call, dropout_p=p)
    assert torch.equal(to_keys != 0, expected_keep(p, *sizes, stream=0))
    assert torch.equal(to_queries.transpose(-1, -2) != 0, expected_keep(p, *sizes, stream=1))


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("target", targets(varlen_attention.OP), ids=str)
def test_varlen_drops_these_bits(target: Target, p: float) -> None:
    q_lens, kv_lens = [20, 1, 0, 49], [36, 1, 5, 133]
    call = varlen_attention.inputs(
        {"heads": 3, "q_lens": q_lens, "kv_lens": kv_lens, "head_dim": 8}, torch.float32
    )
    call["value"] = torch.cat([torch.eye(n, 133) for n in kv_lens])[:, None].expand(-1, 3, -1)
    torch.manual_seed(21)
    (weights,) = target.call(ff.varlen_attention, **call, dropout_p=p)
    keep = expected_keep(p, 4, 3, 49, 133)
    for b, part in enumerate(weights.split(q_lens)):
        kept = part.transpose(0, 1)[..., : kv_lens[b]] != 0
        assert torch.equal(kept, keep[b, :, : q_lens[b], : kv_lens[b]])


@pytest.mark.parametrize("target", targets(scaled_dot_product_attention.OP), ids=str)
def test_grouped_heads_count_as_query_heads(target: Target) -> None:
    call = identities(2, 6, 9, 14)
    del call["query_value"]
    call["key"], call["value"] = call["key"][:, :2], call["value"][:, :2]
    torch.manual_seed(21)
    (weights,) = target.call(
        ff.scaled_dot_product_attention, **call, dropout_p=0.5, enable_gqa=True
    )
    assert torch.equal(weights != 0, expected_keep(0.5, 2, 6, 9, 14))


@pytest.mark.parametrize("target", targets(scaled_dot_product_attention.OP), ids=str)
def test_backward_drops_the_same_bits(target: Target) -> None:
    """d value = (weights * kept)^T d out: with an identity it is the forward's own weights."""
    call = identities(2, 3, 20, 36)
    del call["query_value"]
    call["value"] = call["value"].contiguous().requires_grad_()
    (weights,) = target.call(ff.scaled_dot_product_attention, **call, dropout_p=0.5)
    (gradient,) = torch.autograd.grad(
        weights, call["value"], torch.eye(20, 36).expand(2, 3, -1, -1)
    )
    torch.testing.assert_close(gradient[..., :20], weights.transpose(-1, -2))


@pytest.mark.parametrize("op", ops.ATTENTION, ids=lambda op: op.name)
def test_dropout_probabilities_0_and_1(op: Any) -> None:
    function = {o: f for f, o in ops.FUNCTIONS.items()}[op]
    call = op.inputs({"heads": 2, "q_len": 6, "kv_len": 9, "head_dim": 8}, torch.float32, "cpu", 0)

    def outputs(**more: Any) -> tuple[Tensor, ...]:
        result = function(**call, **more)
        return result if isinstance(result, tuple) else (result,)

    for target in targets(op):
        state = torch.get_rng_state()
        plain = outputs(backend=target.backend)
        none = outputs(backend=target.backend, dropout_p=0.0)
        assert all(map(torch.equal, plain, none))
        assert torch.equal(torch.get_rng_state(), state), "p = 0 draws no seed"
        dropped = outputs(backend=target.backend, dropout_p=1.0)
        assert all(bool((o == 0).all()) for o in dropped)


@pytest.mark.parametrize("op", ops.ATTENTION, ids=lambda op: op.name)
def test_equal_seeds_equal_results(op: Any) -> None:
    function = {o: f for f, o in ops.FUNCTIONS.items()}[op]
    shape = {"batch": 2, "heads": 2, "q_len": 20, "kv_len": 36, "head_dim": 8}
    call = op.inputs(shape, torch.float32, "cpu", 0)
    for target in targets(op):
        runs = []
        for seed in (5, 5, 6, None):
            if seed is not None:
                torch.manual_seed(seed)
            runs.append(target.call(function, **call, dropout_p=0.5))
        assert all(map(torch.equal, runs[0], runs[1]))
        for other in runs[2:]:
            assert not any(
                torch.allclose(a, b, atol=0.1) for a, b in zip(runs[0], other, strict=True)
            )
