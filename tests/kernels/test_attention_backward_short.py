"""The backward of few keys or few queries: which calls take it, and its results.

The interpreter runs it with the tiles of an A100 and with those of an H100.
"""

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
from fastfusion.kernels.host import tiles as _launch  # noqa: E402

CAPABILITIES = ((8, 0), (9, 0)) if DEVICE == "cpu" else (None,)


@pytest.fixture(params=CAPABILITIES, ids=str)
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tiles of a compute capability; on a GPU its own."""
    if request.param is not None:
        monkeypatch.setattr(_launch, "capability", lambda device: request.param)
    _launch.forget()
    yield
    _launch.forget()


def operands(
    heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int, value_dim: int
) -> tuple[Tensor, ...]:
    sizes = ((heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, value_dim))
    return tuple(
        torch.randn(2, n, h, d, device=DEVICE).transpose(1, 2).bfloat16().requires_grad_()
        for h, n, d in sizes
    )


def gradients(
    function: Any, tensors: tuple[Tensor, ...], lse: bool, **options: Any
) -> tuple[Tensor, ...]:
    outputs = function(*tensors, enable_gqa=True, **options)[: 1 + lse]
    torch.manual_seed(1)
    weights = [torch.randn(o.shape, device=DEVICE).to(o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, tensors, weights)


def attention(*tensors: Tensor, **options: Any) -> Any:
    return ff.scaled_dot_product_attention(*tensors, **options, return_lse=True, backend="triton")


def reference(*tensors: Tensor, **options: Any) -> Any:
    return ff.scaled_dot_product_attention(
        *tensors, **options, return_lse=True, backend="reference"
    )


def taken(run: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a backward goes this way."""
    found = []
    original = attention_backward_short.chosen

    def chosen(*given: Any) -> Any:
        found.append(original(*given))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(attention_backward_short, "chosen", chosen)
        _launch.forget()  # with the plans
        run()
    return found[-1] is not None


SHAPES = [
    (2, 2, 20, 30, 64, 64),  # one tile
    (2, 1, 70, 50, 32, 48),  # heads that share keys; several tiles of an A100's
    (1, 1, 600, 20, 16, 16),  # splits of the queries
    (1, 1, 1, 300, 64, 64),  # one query
    (2, 1, 70, 260, 32, 32),  # ranges of keys
    (1, 1, 5, 260, 6, 6),  # rows of single elements
]


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("kind", ["padding", "scale", "lse"])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_accuracy(sizes: tuple[int, ...], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = operands(*sizes)
    options: dict[str, Any] = {}
    if kind == "scale":
        options["scale"] = -0.3
    if kind == "padding":
        hidden = torch.rand(2, sizes[3], device=DEVICE) < 0.4
        hidden[0] = True  # nothing to look at
        hidden[1, -1] = False
        options["key_padding_mask"] = hidden
    lse = kind == "lse"
    actual: list[Any] = []
    run = lambda: actual.append(gradients(attention, tensors, lse, **options))  # noqa: E731
    assert taken(run, monkeypatch)
    run()  # by the plans of the first call
    assert all(map(torch.equal, *actual))
    exact = gradients(
        reference, tuple(t.detach().double().requires_grad_() for t in tensors), lse, **options
    )
    plain = gradients(plain_attention, tensors, lse, **options)
    for a, e, p in zip(actual[0], exact, plain, strict=True):
        assert_accurate(*(t.flatten(0, 1).flatten(1) for t in (a, e, p)))


@pytest.mark.usefixtures("_tiles")
def test_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def takes(sizes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, **options: Any) -> bool:
        tensors = tuple(t.detach().to(dtype).requires_grad_() for t in operands(*sizes))
        run = lambda: gradients(attention, tensors, False, **options)  # noqa: E731
        return taken(run, monkeypatch)

    small = (1, 1, 20, 30, 64, 64)
    assert takes(small)
    assert takes(small, torch.float16)
    assert not takes(small, torch.float32)
    assert not takes(small, dropout_p=0.5)
    assert not takes(small, is_causal=True)
    assert not takes(small, attn_mask=torch.zeros(20, 30, device=DEVICE))
    assert not takes((1, 1, 20, 30, 96, 64))
    assert not takes((1, 1, 130, 200, 64, 64))
    assert not takes((1, 1, 128, 255, 64, 64))
    assert takes((1, 1, 128, 256, 64, 64))


@pytest.mark.usefixtures("_tiles")
def test_one_key_has_no_gradient() -> None:
    """A softmax over one key is constant: exactly, by either way of the statistics."""
    for kv_len in (1, 300):
        tensors = operands(1, 1, 4, kv_len, 64, 64)
        hidden = torch.ones(2, kv_len, dtype=torch.bool, device=DEVICE)
        hidden[:, kv_len // 2] = False
        of_query, of_key, _ = gradients(attention, tensors, False, key_padding_mask=hidden)
        assert not of_query.any() and not of_key.any()
