"""Modules whose heads and hidden features are split over ranks, against one process."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from accuracy import assert_accurate
from torch import Tensor, nn

import fastfusion as ff

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
WIDTH, HEADS, HIDDEN = 16, 4, 24


@pytest.mark.parametrize("world", [2, 4])
def test_ranks(world: int, tmp_path: Path) -> None:
    others = [check_sums, check_dropout, check_refusals] if world == 2 else []
    ranks.run(world, [check_values, check_checkpoints, *others], tmp_path, tmp_path)


def parallel(module: nn.Module, world: int, **options: bool) -> Any:
    """A copy of a module, split over all ranks."""
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    module = copy.deepcopy(module)
    plan = ff.distributed.tensor_parallel_plan(module, **options)
    return parallelize_module(module, init_device_mesh("cpu", (world,)), plan)


def cases() -> Iterator[tuple[nn.Module, list[Tensor], dict[str, Any], bool]]:
    """Modules, what they are called with, and whether tokens may be split, too."""

    def tokens(*shape: int) -> Tensor:
        return torch.randn(2, *shape)

    layer: dict[str, Any] = {"dim_feedforward": HIDDEN, "dropout": 0.0, "batch_first": True}
    x, memory = tokens(8, WIDTH), tokens(4, WIDTH)
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[0, 5:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(8)
    of_heads = torch.randn(2 * HEADS, 8, 4)
    attention = ff.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    yield attention, [x, x, x], {"key_padding_mask": padding}, False
    bias: dict[str, Any] = {"attn_mask": of_heads.requires_grad_(), "average_attn_weights": False}
    yield attention, [x, memory, memory], bias, False
    other = ff.nn.MultiheadAttention(
        WIDTH, HEADS, kdim=8, vdim=12, add_bias_kv=True, batch_first=True
    )
    yield other, [tokens(8, WIDTH), tokens(5, 8), tokens(5, 12)], {}, False
    slopes = {"alibi_slopes": torch.rand(HEADS), "sinks": torch.rand(HEADS)}
    slopes |= {"position_table": torch.rand(HEADS, 3), "position_index": torch.arange(12) % 3}
    cross = ff.nn.CrossAttention(WIDTH, 8, HEADS)
    yield cross, [x, tokens(5, 8)], slopes | {"need_weights": True}, False
    encoder = ff.nn.TransformerEncoder(
        ff.nn.TransformerEncoderLayer(WIDTH, HEADS, **layer), 2, enable_nested_tensor=False
    )
    yield encoder, [x], {"src_key_padding_mask": padding}, True
    one = ff.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, nn.PReLU(), norm_first=True)
    yield one, [tokens(8, WIDTH).transpose(0, 1)], {"src_mask": causal}, True
    decoder = ff.nn.TransformerDecoder(
        ff.nn.TransformerDecoderLayer(WIDTH, HEADS, norm_first=True, **layer), 2,
        nn.LayerNorm(WIDTH),
    )  # fmt: skip
    yield decoder, [x, memory], {"tgt_mask": causal, "tgt_is_causal": True}, True
    fusion = ff.nn.CrossModalAttention(
        WIDTH, 8, HEADS, dim_feedforward=HIDDEN, dropout=0.0, norm_first=True
    )
    bias = {"attn_mask": torch.randn(HEADS, 8, 5).requires_grad_(), "need_weights": True}
    yield fusion, [x, tokens(5, 8)], bias, False
    vqa = ff.models.VQATransformer(WIDTH, 8, HEADS, HIDDEN, 1, 3, dropout=0.0)
    yield vqa, [x, tokens(8, 8)], {"visual_padding_mask": padding}, True


def run(module: nn.Module, inputs: Sequence[Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """Results and all gradients, by name; one tensor in several places stays one."""
    dtype = next(module.parameters()).dtype
    made: dict[int, Tensor] = {}

    def leaf(given: Any) -> Any:
        if not isinstance(given, Tensor) or not given.is_floating_point():
            return given
        if id(given) not in made:
            made[id(given)] = given.detach().to(dtype).requires_grad_()
        return made[id(given)]

    results = module(*map(leaf, inputs), **{name: leaf(value) for name, value in options.items()})
    results = results if isinstance(results, tuple) else (results,)
    results = [r for r in results if r is not None]
    module.zero_grad()
    draw = torch.Generator().manual_seed(1)
    torch.autograd.backward(results, [torch.randn(r.shape, generator=draw).to(r) for r in results])
    found = {f"result {i}": r for i, r in enumerate(results)}
    found |= {f"gradient of input {i}": t.grad for i, t in enumerate(made.values())}  # type: ignore[misc]
    for name, parameter in module.named_parameters():
        grad: Any = parameter.grad
        found[name] = whole(grad) if hasattr(grad, "full_tensor") else grad
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def whole(tensor: Any) -> Tensor:
    """`tensor.full_tensor()`, which torch 2.11 has not where ranks hold rows in several places."""
    try:
        return tensor.full_tensor()
    except ValueError:
        (placement,) = tensor.placements
        local = tensor.to_local()
        parts = [torch.empty_like(local) for _ in range(tensor.device_mesh.size())]
        torch.distributed.all_gather(parts, local, group=tensor.device_mesh.get_group())
        rows = zip(*(part.chunk(placement.split_factor) for part in parts), strict=True)
        return torch.cat([part for each in rows for part in each])


def check_values(rank: int, world: int, folder: Path) -> None:
    torch.manual_seed(0)
    rows: list[tuple[Tensor, ...]] = []
    for module, inputs, options, may_split_tokens in cases():
        exact = run(copy.deepcopy(module).double(), inputs, options)
        with ff.use_backend("reference"):
            plain = run(copy.deepcopy(module), inputs, options)
        for sequence_parallel in (False, True)[: 1 + may_split_tokens]:
            split = parallel(module, world, sequence_parallel=sequence_parallel)
            assert split.state_dict().keys() == module.state_dict().keys()
            found = run(split, inputs, options)
            assert found.keys() == exact.keys() == plain.keys()
            rows += [(found[name], exact[name], plain[name]) for name in exact]
    compare(*zip(*rows, strict=True))


def compare(*kinds: Sequence[Tensor]) -> None:
    """By the rule; a slice for each tensor, with zeros behind it."""
    padded = [[tensor.detach().flatten() for tensor in kind] for kind in kinds]
    assert_accurate(*(nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in padded))


def check_sums(rank: int, world: int, folder: Path) -> None:
    """What docs/guide/distributed.md says that a layer exchanges."""
    from torch.distributed.tensor.debug import CommDebugMode

    layer = ff.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, batch_first=True)
    split = parallel(layer, world)
    x = torch.randn(2, 8, WIDTH, requires_grad=True)
    with CommDebugMode() as forward:
        out = split(x)
    with CommDebugMode() as backward:
        out.sum().backward()
    for counted in (forward, backward):
        assert [(op.__name__, n) for op, n in counted.get_comm_counts().items()] == [
            ("all_reduce", 2)
        ]


def check_dropout(rank: int, world: int, folder: Path) -> None:
    """All ranks give the same, having dropped other features, heads and tokens."""
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    torch.manual_seed(0)
    layer = ff.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.5, batch_first=True)
    for sequence_parallel in (False, True):
        split = parallel(layer, world, sequence_parallel=sequence_parallel)
        out = split(torch.ones(2, 8, WIDTH)).detach()
        everything = gather(torch.cat([out.flatten(), torch.rand(3)]))
        assert all(torch.equal(each, everything[0]) for each in everything)
        assert not torch.equal(split(torch.ones(2, 8, WIDTH)), out)
    style = ff.distributed.tensor_parallel_plan(layer)["dropout"]
    dropout = parallelize_module(nn.Dropout(), init_device_mesh("cpu", (world,)), style)
    one, *others = gather(dropout(torch.ones(64)))
    assert not any(torch.equal(one, other) for other in others)


def gather(tensor: Tensor) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    return found


def check_checkpoints(rank: int, world: int, folder: Path) -> None:
    """Saved behind one step and loaded by other numbers of ranks, training goes on as in one
    process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    def make() -> Any:
        return ff.models.VQATransformer(WIDTH, 8, HEADS, HIDDEN, 1, 3, dropout=0.0)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        dtype = next(model.parameters()).dtype
        draw = torch.Generator().manual_seed(1)
        inputs = (
            torch.randn(2, n, width, generator=draw).to(dtype) for n, width in ((8, WIDTH), (4, 8))
        )
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        return ff.distributed.checkpointable(get_state_dict(model, optimizer))

    torch.manual_seed(0)
    start = make()
    saved = parallel(start, world)
    optimizer = sgd(saved)
    step(saved, optimizer)
    model_state, optimizer_state = state_of(saved, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "state")

    rows: list[list[Tensor]] = []
    for dtype in (torch.float64, torch.float32):
        single = copy.deepcopy(start).to(dtype)
        optimizer = sgd(single)
        for _ in range(2):
            step(single, optimizer)
        rows.append([t.detach() for t in single.state_dict().values()])
    half = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "ranks"))["ranks"]
    for number in (1, world // 2, world):
        loaded = make()
        if number > 1:
            mesh = half if number < world else init_device_mesh("cpu", (world,))
            plan = ff.distributed.tensor_parallel_plan(loaded, sequence_parallel=True)
            parallelize_module(loaded, mesh, plan)
        optimizer = sgd(loaded)
        model_state, optimizer_state = state_of(loaded, optimizer)
        dcp.load(
            {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "state"
        )
        set_state_dict(
            loaded, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
        )
        step(loaded, optimizer)
        states = loaded.state_dict().values()
        compare([whole(t) if hasattr(t, "full_tensor") else t for t in states], *rows)


def check_refusals(rank: int, world: int, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"num_heads must be a multiple of the {world} ranks, got"):
        parallel(ff.nn.MultiheadAttention(9, 3), world)
    with pytest.raises(ValueError, match="features must be a multiple"):
        parallel(ff.nn.TransformerEncoderLayer(WIDTH, HEADS, 7), world)
    attention = ff.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    quantised = copy.deepcopy(attention)
    ff.quantize(quantised, weights="bf16")
    with pytest.raises(ValueError, match="out_proj must be a linear layer to be split, got Quant"):
        parallel(quantised, world)
    nested = torch.nested.nested_tensor([torch.randn(n, WIDTH) for n in (2, 3)])
    with pytest.raises(ValueError, match="query must be a plain tensor"):
        parallel(attention, world)(nested, nested, nested)
    layer = ff.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)
    with pytest.raises(ValueError, match=f"src must have a multiple of {world} tokens"):
        parallel(layer, world, sequence_parallel=True)(torch.randn(1, 7, WIDTH))
