"""Our ops on DTensors: each placement against one process, eager and compiled, with gradients."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

import fastfusion as ff

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def attention_inputs(heads: int = 4, kv_heads: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, heads, 6, 8), *(torch.randn(4, kv_heads, 10, 8) for _ in range(2))]


def agree(
    call: Callable[..., Any],
    tensors: Sequence[Tensor],
    placements: Sequence[Any],
    mesh: Any,
    gradients: bool = True,
) -> Any:
    """Results and gradients on DTensors are those on plain tensors; returns the former results."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    plain = [t.clone().requires_grad_(gradients and t.is_floating_point()) for t in tensors]
    shared = [
        distribute_tensor(t.clone(), mesh, list(p)).requires_grad_(
            gradients and t.is_floating_point()
        )
        for t, p in zip(tensors, placements, strict=True)
    ]
    expected, found = call(*plain), call(*shared)
    if isinstance(expected, Tensor):
        expected, found = (expected,), (found,)
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, DTensor)
        torch.testing.assert_close(one.full_tensor(), other)
    if gradients:
        for results in (expected, found):
            sum((i + 1) * r.square().sum() for i, r in enumerate(results)).backward()
        for one, other in zip(shared, plain, strict=True):
            if other.grad is not None:
                assert one.grad is not None
                torch.testing.assert_close(one.grad.full_tensor(), other.grad)
    return found


def check_attention(rank: int, world: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    everywhere = (Replicate(),)
    bias = torch.randn(4, 6, 10)
    hidden = torch.arange(10).expand(4, 10) >= torch.tensor([[10], [7], [4], [0]])

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, **options: Any) -> Any:
        bias, hidden = rest if rest else (None, None)
        return ff.scaled_dot_product_attention(
            q, k, v, bias, key_padding_mask=hidden, return_lse=True, **options
        )

    for dim in range(3):
        place, keys = (Shard(dim),), (Shard(dim),) if dim < 2 else everywhere
        for rest, places in (
            ((), ()),
            ((bias, hidden), ((Replicate(),), (Shard(0),) if dim == 0 else everywhere)),
            ((bias[None].expand(4, -1, -1, -1).contiguous(), hidden), (place, everywhere)),
        ):
            tensors = [*attention_inputs(), *rest]
            found = agree(attend, tensors, [place, keys, keys, *places], mesh)
            assert found[0].placements == place, "nothing is gathered that can stay"
        causal = agree(
            lambda *t: attend(*t, is_causal=True), attention_inputs(), [place, keys, keys], mesh
        )
        assert causal[0].placements == (place if dim < 2 else everywhere)
        # Where a query is counts for windows and ALiBi as well, and slopes go with their heads.
        for options, free in (
            ({"window": (2, 3)}, False),
            ({"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])}, False),
            ({"softcap": 2.0}, True),
            ({"sinks": torch.tensor([0.5, 0.25, 0.1, 0.05])}, True),
            (
                {
                    "position_table": torch.arange(12.0).view(4, 3) / 9,
                    "position_index": torch.arange(60).view(6, 10) % 3,
                },
                False,
            ),
        ):
            numbers = {k: v for k, v in options.items() if isinstance(v, Tensor)}
            kinds = list(numbers.values())

            def with_kinds(*t: Tensor, options: Any = options, numbers: Any = numbers) -> Any:
                given = {
                    k: v if k in ("sinks", "position_table") else v.detach()
                    for k, v in zip(numbers, t[3:], strict=True)
                }
                return attend(*t[:3], **options | given)

            places = [place, keys, keys] + [everywhere] * len(kinds)
            found = agree(with_kinds, [*attention_inputs(), *kinds], places, mesh)
            assert found[0].placements == (place if dim < 2 or free else everywhere)
    # Heads that share keys: two groups stay whole on two ranks; of one or three, keys are copied.
    for heads, kv_heads, stays in ((4, 2, True), (4, 1, True), (6, 3, False)):
        found = agree(
            lambda *t: attend(*t, enable_gqa=True),
            attention_inputs(heads, kv_heads),
            [(Shard(1),), (Shard(1),) if kv_heads > 1 else everywhere] + [everywhere],
            mesh,
        )
        assert (found[0].placements == (Shard(1),)) == (stays or world == 1)
    # Dropout counts batch entries and heads of the whole, so the call is made as a whole.
    for _ in range(2):

        def drop(*t: Tensor) -> Any:
            torch.manual_seed(5)
            return attend(*t, dropout_p=0.5)

        agree(drop, attention_inputs(), [(Shard(0),)] * 3, mesh)


def check_other_ops(rank: int, world: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    everywhere = (Replicate(),)
    q, k, v = attention_inputs()
    for dim in (0, 1):
        place = (Shard(dim),)

        def both(*t: Tensor) -> Any:
            return ff.bidirectional_attention(*t, return_lse=True)

        found = agree(both, [q, k, v, q + 1], [place] * 4, mesh)
        assert all(each.placements == place for each in found)

    starts = torch.tensor([0, 9, 24], dtype=torch.int32)
    packed = [t.transpose(1, 2).reshape(-1, 4, 8)[:24] for t in (k, k + 1, v)]

    def pack(a: Tensor, b: Tensor, c: Tensor, starts: Tensor) -> Any:
        return ff.varlen_attention(a, b, c, starts, starts, 15, 15)

    found = agree(pack, [*packed, starts], [(Shard(1),)] * 3 + [everywhere], mesh)
    assert found[0].placements == (Shard(1),)

    x, weight, bias = torch.randn(4, 6, 8), torch.randn(12, 8), torch.randn(12)
    for places, expected in (
        (((Shard(0),), everywhere, everywhere), Shard(0)),
        ((everywhere, (Shard(0),), (Shard(0),)), Shard(2)),
        (((Shard(1),), everywhere, everywhere), Shard(1)),
    ):
        with torch.no_grad():
            found = agree(
                lambda *t: ff.linear(*t, activation="gelu"), [x, weight, bias], places, mesh, False
            )
        assert found[0].placements == (expected,)
    with torch.no_grad():
        scale = torch.rand(8)
        found = agree(
            lambda x, w: ff.norm(x, w), [x, scale], [(Shard(0),), everywhere], mesh, False
        )
        assert found[0].placements == (Shard(0),)


def check_cross_attention_layer(rank: int, world: int) -> None:
    """By batch or by queries, with values of a sequence of their own."""
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    shape = {"q_len": 6, "kv_len": 5, "dim": 8, "context_dim": 12, "heads": 2, "batch": 4}
    call = ff.ops.LAYERS[0].inputs(shape | {"value_dim": 10}, torch.float32)
    heads = call.pop("num_heads")
    names = list(call)

    def attend(*tensors: Tensor) -> Tensor:
        return ff.cross_attention_layer(**dict(zip(names, tensors, strict=True)), num_heads=heads)

    everywhere = (Replicate(),)
    for place, keys in (((Shard(0),), (Shard(0),)), ((Shard(1),), everywhere)):
        tokens = {"query": place, "context": keys, "value_context": keys}
        places = [tokens.get(name, everywhere) for name in names]
        with torch.no_grad():
            found = agree(attend, list(call.values()), places, mesh, False)
        assert found[0].placements == place


def check_two_dimensions(rank: int, world: int) -> None:
    """Batch and heads at once, on a mesh of two by two."""
    from torch.distributed.tensor import Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    place = (Shard(0), Shard(1))
    found = agree(
        lambda *t: ff.scaled_dot_product_attention(*t), attention_inputs(), [place] * 3, mesh
    )
    assert found[0].placements == place


def check_compiled(rank: int, world: int) -> None:
    from torch.distributed.tensor import Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (world,))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ff.scaled_dot_product_attention(q, k, v)

    for dim in (0, 1):
        torch._dynamo.reset()
        agree(attend, attention_inputs(), [(Shard(dim),)] * 3, mesh)
    # Compiled once more, for any length.
    longer = [torch.cat([t, t], dim=2) for t in attention_inputs()]
    agree(attend, longer, [(Shard(1),)] * 3, mesh)


def test_two_ranks(tmp_path: Path) -> None:
    ranks.run(2, [check_attention, check_other_ops, check_cross_attention_layer], tmp_path)


def test_compiled(tmp_path: Path) -> None:
    ranks.run(2, [check_compiled], tmp_path)


def test_four_ranks(tmp_path: Path) -> None:
    ranks.run(4, [check_two_dimensions], tmp_path)
