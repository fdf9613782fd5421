"""Plans: a later call of a kind computes what a first one would."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from suite import DEVICE
from torch import Tensor

from fastfusion.kernels.attention.backward import attention_backward
from fastfusion.kernels.attention.forward import attention_forward
from fastfusion.kernels.bidirectional.forward import bidirectional_forward
from fastfusion.kernels.host import plan as _plan
from fastfusion.kernels.host import tiles as _launch
from fastfusion.kernels.varlen.forward import varlen_forward
from fastfusion.ops.bidirectional_attention import Call as BidirectionalCall
from fastfusion.ops.scaled_dot_product_attention import Call as AttentionCall
from fastfusion.ops.varlen_attention import Call as VarlenCall

OPTIONS = (0.0, False, False, None)


@pytest.fixture(autouse=True)
def _no_plans() -> Iterator[None]:
    _plan.forget()
    yield
    _plan.forget()


def tensors(count: int, *size: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(size, generator=generator, device="cpu").to(DEVICE) for _ in range(count)]


def fresh(launcher: Any, *given: Any) -> tuple[Any, ...]:
    """The results without a plan."""
    _plan.forget()
    results = launcher(*given)
    _plan.forget()
    return results


def agree(results: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    return all(
        (a is None and b is None) or (torch.equal(a, b) and a.stride() == b.stride())
        for a, b in zip(results, expected, strict=True)
    )


def forward(*given: Any) -> tuple[Any, ...]:
    return attention_forward(AttentionCall(*given, *OPTIONS, False), True)


def repeatable() -> list[bool]:
    return [plan is not None for plan in _plan._plans.values()]


def test_a_second_call_takes_its_own_tensors() -> None:
    first, second = tensors(3, 1, 2, 20, 16), tensors(3, 1, 2, 20, 16, seed=1)
    expected = fresh(forward, *second, None, None, None, None)
    forward(*first, None, None, None, None)
    assert repeatable() == [True]
    assert agree(forward(*second, None, None, None, None), expected)
    assert len(_plan._plans) == 1


def test_calls_on_one_tensor_have_a_plan_of_their_own() -> None:
    """A plan that knows queries, keys and values by address must not serve three tensors."""
    x, y, z = tensors(3, 1, 2, 20, 16)
    cases = [(x, x, x), (x, y, z), (x, y, y), (x, x, z), (x, y, x)]
    expected = [fresh(forward, *case, None, None, None, None) for case in cases]
    for _ in range(2):
        for case, results in zip(cases, expected, strict=True):
            assert agree(forward(*case, None, None, None, None), results)
    assert len(_plan._plans) == len(cases)


def test_views_of_one_memory_are_told_apart() -> None:
    packed = tensors(1, 1, 20, 3, 2, 16)[0]
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    other = tensors(3, 1, 2, 20, 16, seed=2)
    for case in ((q, k, v), (k, q, v), tuple(other)):
        expected = fresh(forward, *case, None, None, None, None)
        for _ in range(2):
            assert agree(forward(*case, None, None, None, None), expected)


def test_masks_and_options_are_part_of_the_kind() -> None:
    q, k, v = tensors(3, 2, 2, 9, 16)
    bias, flags = tensors(1, 9, 9)[0], tensors(1, 9, 9)[0] > 0
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, 5:] = True
    masks = [(None, None), (bias, None), (flags, None), (bias[:1], None), (None, padding)]
    calls = [
        (AttentionCall(q, k, v, *mask, None, None, 0.0, causal, last, scale, False), lse)
        for mask in masks
        for causal, last, scale, lse in (
            (False, False, None, True),
            (True, False, 0.3, False),
            (True, True, 0.3, False),
        )
    ]
    expected = [fresh(attention_forward, *call) for call in calls]
    for _ in range(2):
        for call, results in zip(calls, expected, strict=True):
            assert agree(attention_forward(*call), results)
    assert repeatable() == [True] * len(calls)


def test_a_copied_input_has_no_plan() -> None:
    """Its copy is new memory in every call."""
    x = tensors(1, 1, 2, 20, 32)[0][..., ::2]
    y = tensors(1, 1, 2, 20, 32, seed=1)[0][..., ::2]
    for call in (x, y):
        expected = fresh(forward, call, call, call, None, None, None, None)
        for _ in range(2):
            assert agree(forward(call, call, call, None, None, None, None), expected)
    assert repeatable() == [False]


def test_an_empty_call_has_no_plan() -> None:
    q, k = tensors(1, 1, 2, 0, 16)[0], tensors(1, 1, 2, 5, 16)[0]
    out = tensors(1, 1, 2, 0, 16)[0]
    for _ in range(2):
        call = AttentionCall(q, k, k, None, None, None, None, *OPTIONS, False)
        gradients = attention_backward((out, None), call, False)
        assert all((g == 0).all() for g in gradients)
    assert repeatable() == [False]


def test_scalars_of_a_seed_are_read_when_the_kernel_runs() -> None:
    q, k, v = tensors(3, 1, 2, 20, 16)
    seeds = [torch.tensor([n], device=DEVICE) for n in (3, 2**40 + 1)]
    calls = [AttentionCall(q, k, v, None, None, None, s, 0.5, *OPTIONS[1:], False) for s in seeds]
    expected = [fresh(attention_forward, call, True) for call in calls]
    assert not torch.equal(expected[0][0], expected[1][0])
    for call, results in zip(calls, expected, strict=True):
        assert agree(attention_forward(call, True), results)


@pytest.mark.parametrize("lengths", [(20, 36), (36, 20), (1, 300)], ids=str)
def test_both_directions(lengths: tuple[int, int]) -> None:
    """Exchanged sides pass transposed views of a mask: the same memory, by another object."""
    for seed in (0, 1):
        q, w = tensors(2, 1, 2, lengths[0], 16, seed=seed)
        k, v = tensors(2, 1, 2, lengths[1], 16, seed=seed + 5)
        bias = tensors(1, *lengths, seed=seed + 9)[0]
        call = (BidirectionalCall(q, k, v, w, bias, None, None, None, None, *OPTIONS), True)
        expected = fresh(bidirectional_forward, *call)
        for _ in range(2):
            assert agree(bidirectional_forward(*call), expected)
        assert all(repeatable())


def test_offsets_are_read_when_the_kernel_runs() -> None:
    q, k, v = tensors(3, 20, 2, 16)
    splits = [torch.tensor([0, n, 20], device=DEVICE) for n in (3, 12)]
    calls = [(VarlenCall(q, k, v, None, s, s, None, None, 20, 20, *OPTIONS), True) for s in splits]
    expected = [fresh(varlen_forward, *call) for call in calls]
    assert not torch.equal(expected[0][0], expected[1][0])
    for call, results in zip(calls, expected, strict=True):
        assert agree(varlen_forward(*call), results)
    assert len(_plan._plans) == 1


def test_compiled_kernels_get_every_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton's own launch passes them: all by position, constants too, and a grid of three."""
    monkeypatch.setattr(_plan, "INTERPRETED", False)
    seen: list[Any] = []

    class Compiled:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *given: seen.append((grid[0], grid[1], grid[2], *given))

    class Kernel:
        arg_names = ("x_ptr", "out_ptr", "length", "SIZE")

        def __getitem__(self, grid: Any) -> Any:
            return lambda **given: Compiled()

    @_plan.planned
    def launcher(x: Tensor, scale: float) -> tuple[Tensor]:
        out = _plan.empty(x, x.shape)
        _plan.launch(Kernel(), 7, x, out, SIZE=16, length=x.shape[0], num_warps=4)
        return (out,)

    first, second = tensors(2, 5, 3)
    launcher(first, 0.5)
    assert seen == [] and repeatable() == [True]
    (out,) = launcher(second, 0.5)
    ((*grid, x, written, length, size),) = seen
    assert grid == [7, 1, 1] and x is second and written is out and (length, size) == (5, 16)
    launcher(second, 0.25)
    assert len(seen) == 1 and len(_plan._plans) == 2


def test_another_tile_is_another_plan() -> None:
    q, k, v = tensors(3, 1, 2, 70, 16)
    with _launch.watch() as seen:
        forward(q, k, v, None, None, None, None)
    (key, chosen), *_ = seen.items()
    assert repeatable() == []  # dropped with the block
    forward(q, k, v, None, None, None, None)
    with _launch.override(key, chosen._replace(own=16)):
        assert repeatable() == []
        forward(q, k, v, None, None, None, None)
        assert repeatable() == [True]
    assert repeatable() == []


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter runs in one thread at a time")
def test_threads_share_plans() -> None:
    cases = [tensors(3, 1, 2, 20, 16, seed=s) for s in range(4)]
    expected = [fresh(forward, *case, None, None, None, None) for case in cases]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(5):
            if not agree(forward(*cases[index], None, None, None, None), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
