"""Modules on sequences in parts, inside `context_parallel`, against one process."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from accuracy import assert_accurate
from torch import Tensor, nn

import fastfusion as ff
from fastfusion.distributed import context_parallel, gather_sequence, shard_sequence

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
WIDTH, HEADS, LONG, WORDS = 16, 2, 24, 5
Case = tuple[nn.Module, Sequence[Tensor], dict[str, Any], str, bool]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks(world: int, tmp_path: Path) -> None:
    others = [check_dropout, check_explain, check_refusals, check_torchs_own] if world == 2 else []
    ranks.run(world, [check_modules, *others], tmp_path)


def cases() -> list[Case]:
    """Modules; what they are called with; masks; for each sequence whether it is in parts ("p"), or
    on every rank ("e"); whether parts are zigzag."""
    layer: dict[str, Any] = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True}
    long, other = (torch.randn(2, LONG, WIDTH) for _ in range(2))
    words = torch.randn(2, WORDS, WIDTH)
    few = torch.randn(2, 4, WIDTH)
    hidden = torch.zeros(2, LONG, dtype=torch.bool)
    hidden[0, 15:] = True
    encoder = ff.nn.TransformerEncoder(
        ff.nn.TransformerEncoderLayer(WIDTH, HEADS, **layer), 2, enable_nested_tensor=False
    )
    decoder = ff.nn.TransformerDecoder(ff.nn.TransformerDecoderLayer(WIDTH, HEADS, **layer), 1)
    cross = ff.nn.CrossAttention(WIDTH, WIDTH, HEADS)
    fusion = ff.nn.CrossModalAttention(WIDTH, WIDTH, HEADS, dim_feedforward=24, dropout=0.0)
    causal = nn.Transformer.generate_square_subsequent_mask(LONG)
    return [
        (encoder, [long], {"src_key_padding_mask": hidden}, "p", False),
        (encoder, [long], {"mask": causal, "is_causal": True}, "p", True),
        (decoder, [long, other], {"tgt_mask": causal, "tgt_is_causal": True}, "pp", True),
        (cross, [words, long], {"key_padding_mask": hidden}, "ep", False),
        (cross, [long, words], {}, "pe", False),
        (cross, [words, words.flip(1)], {}, "ee", False),
        (cross, [few, long], {}, "pp", False),  # so few that they are gathered
        (cross, [long, few], {}, "pp", False),
        (fusion, [long, words], {"visual_padding_mask": hidden}, "pe", False),
        (fusion, [words, long], {}, "ep", False),
        (fusion, [long, other], {"visual_padding_mask": hidden}, "pp", False),
        (fusion, [long, few], {}, "pp", False),
        (fusion, [few, long], {}, "pp", False),
    ]


def run(
    module: nn.Module, inputs: Sequence[Tensor], masks: dict[str, Any], given: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Results and, of a loss with these gradients of results, all gradients, by name."""
    dtype = next(module.parameters()).dtype
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    results = module(*leaves, **masks)
    results = results if isinstance(results, tuple) else (results,)
    module.zero_grad()
    torch.autograd.backward(results, [g.to(dtype) for g, _ in zip(given, results, strict=False)])
    found = {f"result {i}": r.detach() for i, r in enumerate(results)}
    found |= {f"input {i}": t.grad for i, t in enumerate(leaves)}  # type: ignore[misc]
    return found | {name: p.grad for name, p in module.named_parameters()}  # type: ignore[misc]


def check_modules(rank: int, world: int) -> None:
    rows: list[tuple[Tensor, ...]] = []
    for module, inputs, masks, places, zigzag in cases():
        given = [torch.randn(t.shape) for t in inputs]
        with ff.use_backend("reference"):
            exact = run(copy.deepcopy(module).double(), inputs, masks, given)
            plain = run(copy.deepcopy(module), inputs, masks, given)

        def part(tensor: Tensor, place: str, zigzag: bool = zigzag) -> Tensor:
            return shard_sequence(tensor, 1, zigzag=zigzag) if place == "p" else tensor

        own_inputs = list(map(part, inputs, places))
        # A loss of what is on every rank is there on each: a share of it makes the sum right.
        own_given = [
            part(t, p) / (1 if p == "p" else world) for t, p in zip(given, places, strict=True)
        ]
        own_masks = {n: part(m, "p") if n.endswith("padding_mask") else m for n, m in masks.items()}
        if zigzag:
            each = LONG // world  # the hint counts, and the mask is not looked at
            own_masks |= {n: torch.zeros(each, each) for n in ("mask", "tgt_mask") if n in masks}
        with context_parallel(lengths=[LONG] if "e" in places else None, zigzag=zigzag):
            found = run(copy.deepcopy(module), own_inputs, own_masks, own_given)
            with torch.no_grad():  # whole layers are ops of their own there
                again = module.eval()(*own_inputs, **own_masks)
        again = again if isinstance(again, tuple) else (again,)
        for i, result in enumerate(again):
            torch.testing.assert_close(result, found[f"result {i}"])
        for name, tensor in found.items():
            kind, _, number = name.partition(" ")
            if number and places[int(number)] == "p":
                tensor = gather_sequence(tensor, 1, zigzag=zigzag)
            elif kind != "result":
                dist.all_reduce(tensor)
            rows.append((tensor, exact[name], plain[name]))
    padded = [[t.flatten() for t in kind] for kind in zip(*rows, strict=True)]
    assert_accurate(*(nn.utils.rnn.pad_sequence(kind, batch_first=True) for kind in padded))


def check_dropout(rank: int, world: int) -> None:
    """Of weights: the scores that one rank would drop, for every way and both kinds of parts."""
    long, other = (torch.randn(2, 3, LONG, 8) for _ in range(2))
    few, words = torch.randn(2, 3, 4, 8), torch.randn(2, 3, WORDS, 8)
    calls: list[tuple[Any, Sequence[Tensor]]] = [
        (ff.scaled_dot_product_attention, (q, k, k + 1))
        for q, k in ((long, other), (few, long), (long, few), (words, long), (long, words))
    ]
    both = ff.bidirectional_attention
    calls += [(both, (q, k, k + 1, q - 1)) for q, k in ((long, words), (words, long), (few, long))]
    for zigzag in (False, True):
        for op, tensors in calls:
            if zigzag and op is both:
                continue
            torch.manual_seed(3)
            expected = op(*tensors, dropout_p=0.4)

            def part(tensor: Tensor, zigzag: bool = zigzag) -> Tensor:
                every = tensor.shape[2] == WORDS
                return tensor if every else shard_sequence(tensor, 2, zigzag=zigzag)

            torch.manual_seed(3 + rank)
            in_parts = [n.shape[2] for n in tensors if n.shape[2] != WORDS]
            with context_parallel(lengths=in_parts, zigzag=zigzag):
                found = op(*map(part, tensors), dropout_p=0.4)
            pairs = zip(found, expected, strict=True) if op is both else [(found, expected)]
            for one, whole in pairs:
                torch.testing.assert_close(one, part(whole))
    with pytest.raises(ValueError, match="dropout_p: not for sequences in parts"), \
            context_parallel():  # fmt: skip
        both(long, long, long, long, dropout_p=0.4)


def check_explain(rank: int, world: int) -> None:
    long, few, words = (torch.randn(1, 2, n, 8) for n in (12, 4, 5))
    attend = ff.scaled_dot_product_attention
    with context_parallel():
        assert "a ring of 2 ranks" in str(ff.explain(attend, long, long, long))
        assert "few queries: gathered" in str(ff.explain(attend, few, long, long))
        cross = ff.nn.CrossAttention(16, 16, 2)
        assert "few keys: gathered" in str(
            ff.explain(cross, torch.ones(1, 12, 16), words[0].new_ones(1, 5, 16))
        )
    with context_parallel(dist.init_device_mesh("cpu", (2,)), lengths=[24]):
        assert "one sum over 2 ranks" in str(ff.explain(attend, words, long, long))
        both = ff.explain(ff.bidirectional_attention, long, words, words, long)
        assert both.ranks == "one side in parts, the other on every rank: one sum over 2 ranks"
    assert ff.explain(attend, long, long, long).ranks is None


def check_refusals(rank: int, world: int) -> None:
    x = torch.randn(2, 6, WIDTH)
    q = torch.randn(1, 2, 6, 8)
    attention = ff.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    with_bias = ff.nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, batch_first=True)
    with context_parallel():
        for options in (
            {"is_causal": True}, {"attn_mask": torch.ones(6, 6)}, {"window": (1, 1)},
            {"sinks": torch.zeros(2)},
            {"position_table": torch.zeros(2, 1), "position_index": torch.zeros(11).long()},
        ):  # fmt: skip
            with pytest.raises(ValueError, match="not for sequences in parts"):
                ff.scaled_dot_product_attention(q, q, q, **options)  # type: ignore[arg-type]
        narrow = q.to(torch.float8_e4m3fn)
        with pytest.raises(ValueError, match="keys of 8 bits: not for sequences in parts"):
            ff.scaled_dot_product_attention(q, narrow, narrow)
        with pytest.raises(ValueError, match="attention weights do not go"):
            attention(x, x, x)
        with pytest.raises(ValueError, match="add_bias_kv and add_zero_attn do not go"):
            with_bias(x, x, x, need_weights=False)
        with pytest.raises(ValueError, match="varlen_attention does not go"):
            nested = torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged)
            attention(nested, nested, nested, need_weights=False)
    with pytest.raises(ValueError, match="lengths must be multiples of the 2 ranks"), \
            context_parallel(lengths=[7]):  # fmt: skip
        pass


def check_torchs_own(rank: int, world: int) -> None:
    """Buffers that torch's context_parallel shards are parts as ours are."""
    from torch.distributed.tensor.experimental import context_parallel as torchs

    layer = ff.nn.TransformerEncoderLayer(WIDTH, HEADS, 24, 0.0, batch_first=True)
    x, mask = torch.randn(2, 8, WIDTH), nn.Transformer.generate_square_subsequent_mask(8)
    expected = layer(x, src_mask=mask, is_causal=True)
    mesh = dist.init_device_mesh("cpu", (world,))
    with torchs(mesh, buffers=[x], buffer_seq_dims=[1]), context_parallel(mesh, zigzag=True):
        assert x.shape[1] == 4
        found = layer(x, src_mask=mask[:4, :4], is_causal=True)
    assert x.shape[1] == 8
    torch.testing.assert_close(gather_sequence(found, 1, zigzag=True), expected)
