"""norm: each instruction set against the formula, and what closeness cannot show."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from suite import ISAS, needs_native
from torch import Tensor

import fastfusion as ff

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 5), (7,), (2, 3, 16), (4, 33), (2, 2, 2, 100), (20, 768), (300, 64)]


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    return {
        "input": normal(*shape) * 2 + 1,
        "weight": normal(shape[-1]),
        "bias": normal(shape[-1]),
        "residual": normal(*shape),
    }


def plain(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    rms: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    x = input if residual is None else input + residual
    if not rms:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    result = F.rms_norm(x, x.shape[-1:], weight, eps)
    return result if bias is None else result + bias


def assert_right(call: dict[str, Any], **more: Any) -> None:
    result = ff.norm(**call, **more, backend="cpu")
    assert result.dtype == call["input"].dtype and result.is_contiguous()
    assert result.shape == call["input"].shape
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in (call | more).items()}
    exact, formula = plain(**double), plain(**call, **more)
    assert_accurate(*(t.reshape(1, -1) for t in (result, exact, formula)))


@needs_native
class TestKernel:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_accurate(self, isa: str, shape: Any, dtype: torch.dtype) -> None:
        call = operands(shape, dtype)
        for rms in (False, True):
            assert_right({"input": call["input"]}, rms=rms)
            assert_right(call, rms=rms, eps=0.1)

    def test_far_from_zero(self, isa: str) -> None:
        """Variance is taken around the mean: of squares it would cancel."""
        call = operands((5, 700))
        call["input"] += 3000.0
        assert_right(call)

    def test_rows_depend_on_nothing_else(self, isa: str) -> None:
        for dtype in DTYPES:
            call = operands((400, 130), dtype)
            together = ff.norm(**call, backend="cpu")
            for i in (0, 7, 399):
                alone = call | {n: call[n][i] for n in ("input", "residual")}
                assert torch.equal(ff.norm(**alone, backend="cpu"), together[i])
            call["input"][3, 7] = torch.nan
            result = ff.norm(**call, backend="cpu")
            assert result[3].isnan().all()
            assert torch.equal(result[4:], together[4:])

    def test_strides(self, isa: str) -> None:
        call = operands((3, 20, 48))
        expected = ff.norm(**call, backend="cpu")
        wide = torch.full((3, 20, 100), torch.nan)
        wide[..., 2:50] = call["input"]
        for input in (wide[..., 2:50], call["input"].transpose(0, 1).contiguous().transpose(0, 1)):
            assert torch.equal(ff.norm(**call | {"input": input}, backend="cpu"), expected)
        residual = call["residual"][:1, :1].expand(3, 20, -1)
        same = call | {"residual": residual.contiguous()}
        given = call | {"residual": residual}
        assert torch.equal(ff.norm(**given, backend="cpu"), ff.norm(**same, backend="cpu"))

    def test_empty(self, isa: str) -> None:
        for shape in ((0, 4), (3, 0), (2, 0, 4)):
            assert ff.norm(**operands(shape), backend="cpu").shape == shape


@needs_native
class TestTorch:
    def test_opcheck(self) -> None:
        call = operands((2, 5, 8))
        for weight, residual in itertools.product((None, call["weight"]), (None, call["residual"])):
            given = (call["input"], weight, weight, residual, 1e-5, residual is None)
            torch.library.opcheck(torch.ops.fastfusion.norm_forward.default, given)

    def test_compile_export_gradients_and_vmap(self) -> None:
        call = operands((2, 20, 16))
        expected = ff.norm(**call)

        class Module(torch.nn.Module):
            def forward(self, **given: Tensor) -> Tensor:
                return ff.norm(**given)

        compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(**call), expected)
            program = torch.export.export(Module(), (), call)
        assert "fastfusion.norm_forward" in str(program.graph)
        leaves = {k: t.clone().requires_grad_() for k, t in call.items()}
        assert ff.explain(ff.norm, **leaves).chosen == "reference"
        for function in (ff.norm, compiled):
            ours = torch.autograd.grad(function(**leaves).pow(2).sum(), list(leaves.values()))
            theirs = torch.autograd.grad(plain(**leaves).pow(2).sum(), list(leaves.values()))
            torch.testing.assert_close(ours, theirs)
        weight, bias = call["weight"], call["bias"]
        mapped = torch.vmap(lambda x: ff.norm(x, weight, bias))(call["input"])
        torch.testing.assert_close(mapped, plain(call["input"], weight, bias))

    def test_autocast(self) -> None:
        call = operands((20, 64))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ff.norm(**call), ff.norm(**call, backend="cpu"))
            mixed = ff.norm(call["input"].bfloat16(), call["weight"], call["bias"])
        low = {k: call[k].bfloat16() for k in ("input", "weight", "bias")}
        assert torch.equal(mixed, ff.norm(**low))


X, W = torch.ones(2, 5, 8), torch.ones(8)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [1.0]}, TypeError, "input must be a Tensor"),
    ({"input": X.int()}, TypeError, "input must be float16"),
    ({"input": torch.tensor(1.0)}, ValueError, "input must have a last dimension"),
    ({"weight": W.double()}, TypeError, "weight must have the dtype of input"),
    ({"bias": W.to("meta")}, ValueError, "bias must be on the device of input"),
    ({"weight": W[:7]}, ValueError, r"weight must be \(width,\).*weight \(7,\)"),
    ({"bias": torch.ones(1)}, ValueError, r"bias must be \(width,\)"),
    ({"residual": X[0]}, ValueError, "residual must have the shape of input"),
    ({"eps": -1.0}, ValueError, "eps must not be negative"),
    ({"eps": float("inf")}, ValueError, "eps must .* finite"),
    ({"eps": "small"}, TypeError, "eps must be a float"),
    ({"rms": 1}, TypeError, "rms must be a bool"),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=map(str, range(len(BAD))))
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input(change: dict[str, Any], error: Any, match: str, backend: str) -> None:
    if backend == "cpu" and not ISAS:
        pytest.skip("without the compiled part there is no kernel")
    with pytest.raises(error, match=match):
        ff.norm(**{"input": X, "weight": W, "backend": backend, **change})
