"""Long calls whose tiles come by TMA: the choice, the results and the plans.

The interpreter takes descriptors too; there the tests say that the device is a Hopper one.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from suite import DEVICE, plain_attention
from torch import Tensor

pytest.importorskip("triton")

import fastfusion as ff  # noqa: E402
from fastfusion.kernels.attention import (  # noqa: E402
    backward_short_side as attention_backward_short,
)
from fastfusion.kernels.attention import tma as attention_tma  # noqa: E402
from fastfusion.kernels.host import default_tiles as _tiles  # noqa: E402
from fastfusion.kernels.host import plan as _plan  # noqa: E402
from fastfusion.kernels.host import tiles as _launch  # noqa: E402

CAUSAL = {"is_causal": True}
LAST = {"is_causal": True, "causal_alignment": "bottom_right"}


@pytest.fixture(autouse=True)
def _short_calls_are_long(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lengths that the interpreter gets through."""
    if DEVICE == "cpu":
        monkeypatch.setattr(_launch, "capability", lambda device: (9, 0))
    elif torch.cuda.get_device_capability()[0] not in (9, 10, 11):
        pytest.skip("this GPU has no TMA")
    monkeypatch.setattr(attention_tma, "LONG", {64: 64, 128: 64})
    monkeypatch.setattr(attention_backward_short, "chosen", lambda *given: None)
    _launch.forget()
    yield
    _launch.forget()


def operands(
    q_len: int, kv_len: int, dim: int, value_dim: int, kv_heads: int = 2
) -> tuple[Tensor, ...]:
    sizes = ((2, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, value_dim))
    return tuple(
        torch.randn(2, n, h, d, device=DEVICE).transpose(1, 2).bfloat16().requires_grad_()
        for h, n, d in sizes
    )


def gradients(function: Any, tensors: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    """Both outputs, and the gradients of a loss that uses them."""
    outputs = function(*tensors, **options)
    torch.manual_seed(1)
    weights = [torch.randn(o.shape, device=DEVICE).to(o.dtype) for o in outputs]
    return (*outputs, *torch.autograd.grad(outputs, tensors, weights))


def attention(*tensors: Tensor, **options: Any) -> Any:
    return ff.scaled_dot_product_attention(
        *tensors, **options, enable_gqa=True, return_lse=True, backend="triton"
    )


def descriptors(run: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many operands a call describes."""
    made = []
    original = attention_tma.describe
    monkeypatch.setattr(
        attention_tma, "describe", lambda *given: made.append(given) or original(*given)
    )
    run()
    monkeypatch.setattr(attention_tma, "describe", original)
    return len(made)


@pytest.mark.parametrize("options", [{}, CAUSAL, LAST, {"scale": -0.3}], ids=str)
@pytest.mark.parametrize(
    "sizes", [(70, 150, 64, 64, 1), (150, 70, 40, 48), (65, 64, 128, 72)], ids=str
)
def test_accuracy(
    sizes: tuple[int, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = operands(*sizes)
    actual: list[Any] = []
    run = lambda: actual.append(gradients(attention, tensors, **options))  # noqa: E731
    assert descriptors(run, monkeypatch) == 3 + 2 * 4
    run()  # by the plans of the first call
    assert all(map(torch.equal, *actual))
    exact = gradients(
        lambda *t, **kw: ff.scaled_dot_product_attention(
            *t, **kw, enable_gqa=True, return_lse=True, backend="reference"
        ),
        tuple(t.detach().double().requires_grad_() for t in tensors),
        **options,
    )
    plain = gradients(
        lambda *t, **kw: plain_attention(*t, enable_gqa=True, **kw), tensors, **options
    )
    for index, (a, e, p) in enumerate(zip(actual[0], exact, plain, strict=True)):
        if index == 1:  # lse, in float32, of the plain formula in 16 bits
            torch.testing.assert_close(a.double(), e.double(), atol=1e-5, rtol=1e-5)
        else:
            assert_accurate(*(t.flatten(0, 1).flatten(1) for t in (a, e, p)))


def test_same_bits_as_from_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = operands(130, 200, 64, 64)
    by_tma = gradients(attention, tensors)
    monkeypatch.setattr(attention_tma, "LONG", {64: 4096, 128: 4096})
    _launch.forget()
    assert all(map(torch.equal, by_tma, gradients(attention, tensors)))


def test_plans_keep_no_memory() -> None:
    def call() -> Any:
        tensors = operands(70, 70, 64, 64)
        attention(*tensors)
        return [weakref.ref(t) for t in tensors]

    kept = call()
    assert any(plan is not None for plan in _plan._plans.values())
    assert all(reference() is None for reference in kept)


def test_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (t.detach() for t in operands(70, 70, 64, 64))
    hidden = torch.zeros(2, 70, dtype=torch.bool, device=DEVICE)
    shifted = torch.empty(key.numel() + 1, dtype=key.dtype, device=DEVICE)[1:].view(2, 2, 70, 64)
    shifted.copy_(key)

    def count(*given: Tensor, **options: Any) -> int:
        return descriptors(lambda: attention(*given, **options), monkeypatch)

    assert count(query, key, value) == 3
    assert count(query, key[:1, :1].expand(2, 2, 70, 64), value) == 0
    assert count(query, shifted, value) == 0
    assert count(query, key, value, key_padding_mask=hidden) == 0
    assert count(query, key, value, attn_mask=torch.zeros(70, 70, device=DEVICE)) == 0
    assert count(query, key, value, dropout_p=0.5) == 0
    assert count(query.float(), key.float(), value.float()) == 0
    assert count(query[:, :, :63], key, value) == 0
    assert count(query[..., :40], key[..., :40], value[:, :, :, :40]) == 3
    assert count(query[:, :, :5, :40], key[..., :40], value[..., :40]) == 3
    for capability in ((8, 0), (12, 0)):
        if DEVICE == "cpu":
            monkeypatch.setattr(_launch, "capability", lambda _, found=capability: found)
            _launch.forget()
            assert count(query, key, value) == 0


def test_rows_of_a_program_do_not_follow_the_call() -> None:
    """In 16 bits: the layout of a tile decides in which order a row's weights are added up."""
    for rows in (1, 20, 300):
        assert _launch.owned(_launch.Tile(64, 64, 4, 3), rows, torch.bfloat16) == 64
    assert _launch.owned(_launch.Tile(32, 32, 4, 2), 5, torch.float32) == 16
    for (kernel, _, _), (own, _, warps, _) in _tiles._HOPPER.items():
        assert not kernel.startswith("attention") or own >= 64 and own // warps in (8, 16, 32)
