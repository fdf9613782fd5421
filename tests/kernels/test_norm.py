"""kernels/layer/norm.py against torch.nn.functional, values and gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from suite import DEVICE, DTYPES, relayout
from torch import Tensor

from fastfusion.kernels.layer import norm

SIZES = [(0, 77), (1, 1000), (3, 6), (17, 160), (130, 97), (3, 1)]


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE, dtype)


def formula(call: dict[str, Any], rms: bool) -> tuple[Tensor, Tensor]:
    total = call["x"] if call.get("residual") is None else call["x"] + call["residual"]
    shape = total.shape[-1:]
    if rms:
        return F.rms_norm(total, shape, call.get("weight"), 1e-5), total
    return F.layer_norm(total, shape, call.get("weight"), call.get("bias")), total


def kernel(call: dict[str, Any], rms: bool) -> tuple[Tensor, Tensor]:
    if rms:
        return norm.rms_norm(**call, eps=1e-5, return_sum=True)
    return norm.layer_norm(**call, return_sum=True)


def evaluate(run: Any, call: dict[str, Any], rms: bool) -> tuple[Tensor, ...]:
    """The norm, the sum, and the gradient of every argument through both of them."""
    call = {name: t.detach().requires_grad_() for name, t in call.items()}
    outs = run(call, rms)
    weights = [values(*out.shape, seed=9 + i).bfloat16() for i, out in enumerate(outs)]
    gradients = torch.autograd.grad(
        outs, list(call.values()), [w.to(out.dtype) for w, out in zip(weights, outs, strict=True)]
    )
    return (*outs, *gradients)


def double(call: dict[str, Any]) -> dict[str, Any]:
    return {name: t.double() for name, t in call.items()}


def inputs(rows: int, columns: int, dtype: torch.dtype, rms: bool, full: bool) -> dict[str, Any]:
    call = {"x": values(rows, columns, dtype=dtype)}
    if full:
        call["residual"] = values(rows, columns, dtype=dtype, seed=1)
        call["weight"] = values(columns, dtype=dtype, seed=2)
        if not rms:
            call["bias"] = values(columns, dtype=dtype, seed=3)
    return call


def assert_like_torch(call: dict[str, Any], rms: bool, actual: tuple[Tensor, ...]) -> None:
    exact, plain = (evaluate(formula, c, rms) for c in (double(call), call))
    # The gradient of a norm of one number is 0, in float64 only almost.
    compared = 2 if call["x"].shape[-1] == 1 else len(exact)
    for a, e, p in list(zip(actual, exact, plain, strict=True))[:compared]:
        assert a.dtype == p.dtype and a.shape == p.shape
        # Rows of six numbers have an error of luck: one slice for all of them.
        columns = a.numel() if a.shape[-1] < 16 else a.shape[-1]
        assert_accurate(*(t.reshape(-1, max(1, columns)) for t in (a, e, p)))


@pytest.mark.parametrize("full", [True, False], ids=["full", "bare"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns", SIZES)
def test_accuracy(rows: int, columns: int, dtype: torch.dtype, rms: bool, full: bool) -> None:
    call = inputs(rows, columns, dtype, rms, full)
    assert_like_torch(call, rms, evaluate(kernel, call, rms))


@pytest.mark.parametrize("layout", ["transposed", "offset", "reversed_last", "expanded"])
def test_any_strides(layout: str) -> None:
    call = inputs(6, 33, torch.float32, False, True)
    for name in ("x", "residual"):
        tensor = call[name].view(2, 3, 33)
        if layout == "expanded":
            call[name] = tensor[:, :1].expand(2, 3, 33)
        else:
            call[name] = relayout(tensor, layout)
    assert_like_torch(call, False, evaluate(kernel, call, False))


def test_gradients_of_any_strides() -> None:
    x = values(4, 33).requires_grad_()
    norm.layer_norm(x, return_sum=False).sum().backward()  # an expanded gradient
    assert x.grad is not None and float(x.grad.abs().max()) < 1e-6


def test_no_memory_is_left_unwritten() -> None:
    for rms in (False, True):
        call = inputs(7, 97, torch.float32, rms, True)
        expected = evaluate(kernel, call, rms)
        torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
        try:
            actual = evaluate(kernel, call, rms)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(map(torch.equal, actual, expected))


def test_a_mean_far_from_zero() -> None:
    """E[x^2] - E[x]^2 has no digit left here, and one float32 mean an error of 1e-3."""
    call = {"x": 1e4 + values(5, 160), "weight": values(160, seed=2), "bias": values(160, seed=3)}
    exact = formula(double(call), False)[0]
    assert_accurate(kernel(call, False)[0], exact, exact.float())


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_a_row_alone_has_the_same_bits(rms: bool) -> None:
    call = inputs(17, 160, torch.float32, rms, True)
    out, total, grad_x, *_ = evaluate(kernel, call, rms)
    for row in (0, 5, 16):
        alone = {n: t[row : row + 1] if t.dim() == 2 else t for n, t in call.items()}
        assert torch.equal(kernel(alone, rms)[0], out[row : row + 1])
        assert torch.equal(kernel(alone, rms)[1], total[row : row + 1])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
def test_not_a_number_stays_in_its_row() -> None:
    x = values(9, 40)
    x[4, 7] = torch.nan
    x[5, 7] = torch.inf
    hidden = norm.layer_norm(x).isnan().all(-1)
    assert hidden.tolist() == [False] * 4 + [True] * 2 + [False] * 3


@pytest.mark.parametrize("blocks, chain", [(512, 64), (1, 64), (2, 3)])
def test_long_sums_of_weight_gradients(
    blocks: int, chain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many tiles to a program and many programs to a sum, at sizes that are quick."""
    monkeypatch.setattr(norm, "_BLOCKS", blocks)
    monkeypatch.setattr(norm, "_CHAIN", chain)
    call = inputs(530, 97, torch.float32, False, True)
    assert_like_torch(call, False, evaluate(kernel, call, False))


def test_two_tensors_in_one_launch() -> None:
    for first, second in (((2, 3, 97), (5, 260)), ((0, 97), (5, 33)), ((0, 97), (0, 33))):
        given = [
            norm.Rows(values(*s), values(s[-1], seed=2), values(s[-1], seed=3), 10.0 ** -(i + 2))
            for i, s in enumerate((first, second))
        ]
        for rows, out in zip(given, norm.norms(*given), strict=True):
            exact, plain = (
                F.layer_norm(*(t.to(d) for t in rows[:1]), rows.x.shape[-1:],
                             *(t.to(d) for t in rows[1:3]), rows.eps)
                for d in (torch.float64, torch.float32)
            )  # fmt: skip
            assert_accurate(*(t.reshape(-1, t.shape[-1]) for t in (out, exact, plain)))


def test_mixed_dtypes() -> None:
    """Parameters in float32 for 16-bit rows, as mixed-precision training has them."""
    x, weight = values(3, 40, dtype=torch.bfloat16), values(40, seed=2).requires_grad_()
    out = norm.layer_norm(x, weight)
    (gradient,) = torch.autograd.grad(out.float().sum(), weight)
    exact = F.layer_norm(x.double(), (40,))
    assert out.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    plain = (exact * weight).to(torch.bfloat16)
    assert_accurate(out.detach(), (exact * weight).detach(), plain.detach())
    assert_accurate(gradient[None], exact.sum(0)[None], exact.float().sum(0)[None])


def test_which_gradients() -> None:
    x, residual, weight = values(3, 40), values(3, 40, seed=1), values(40, seed=2)
    residual.requires_grad_()
    out, total = norm.layer_norm(x, weight, residual=residual, return_sum=True)
    (gradient,) = torch.autograd.grad(total.sum(), residual, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(gradient))  # the sum alone
    (first,) = torch.autograd.grad(out.sum(), residual, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        first.sum().backward()
    assert not norm.layer_norm(x, weight).requires_grad


def test_errors() -> None:
    with pytest.raises(ValueError, match="rows of 1 to 16384 elements, got 20000"):
        norm.layer_norm(values(1, 20000))
    with pytest.raises(ValueError, match="at most 8192 elements, got 9000"):
        norm.layer_norm(values(1, 9000).requires_grad_())
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 8\), got \(1, 8\)"):
        norm.layer_norm(values(2, 8), residual=values(1, 8))
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\), got \(7,\)"):
        norm.rms_norm(values(2, 8), values(7))
    with pytest.raises(TypeError, match="float64"):
        norm.layer_norm(values(2, 8).double())
