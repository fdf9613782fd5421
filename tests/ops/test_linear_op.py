"""linear: each way of each instruction set against the formula, and what closeness cannot show."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from suite import ISAS, needs_native
from torch import Tensor

import fastfusion as ff
from fastfusion.ops.linear import ACTIVATIONS, OP

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Lengths on both sides of a register, of a panel and of the ways' border; widths that fill no pair
# and no register; features that fill no task.
SHAPES = [
    ((1, 8), 5), ((3, 77), 97), ((2, 20, 64), 48), ((2, 37, 33), 17), ((1, 48, 130), 70),
    ((2, 3, 15, 256), 130), ((1, 300, 96), 50), ((97,), 200), ((4, 1, 768), 33),
    ((20, 2048), 61),  # rows of W whose addresses compete in the first cache
]  # fmt: skip


def operands(
    shape: tuple[int, ...], features: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    return {
        "input": normal(*shape),
        "weight": normal(features, shape[-1]),
        "bias": normal(features),
        "residual": normal(*shape[:-1], features),
    }


def plain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    result = ACTIVATIONS[activation](F.linear(input, weight, bias))
    return result if residual is None else result + residual


def assert_right(call: dict[str, Any], **more: Any) -> None:
    result = ff.linear(**call, **more, backend="cpu")
    assert result.dtype == call["input"].dtype and result.is_contiguous()
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in (call | more).items()}
    exact, formula = plain(**double), plain(**call, **more)
    assert_accurate(*(t.reshape(1, -1) for t in (result, exact, formula)))


@needs_native
class TestKernel:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_accurate(self, isa: str, shape: Any, dtype: torch.dtype) -> None:
        call = operands(*shape, dtype)
        assert_right({"input": call["input"], "weight": call["weight"]})
        assert_right(call, activation="gelu")

    @pytest.mark.parametrize("activation", list(ACTIVATIONS), ids=str)
    def test_activations(self, isa: str, activation: str | None) -> None:
        call = operands((5, 20, 40), 60)
        call["weight"] *= 3  # far into both tails
        assert_right(call, activation=activation)
        extreme = torch.tensor([[0.0], [-0.0], [1e-30], [-120.0], [120.0], [3e30], [-3e30]])
        one = torch.ones(1, 1)
        result = ff.linear(extreme, one, activation=activation, backend="cpu")
        torch.testing.assert_close(result, plain(extreme, one, activation=activation))

    def test_long_sums_of_one_sign(self, isa: str) -> None:
        for rows in (2, 20, 64):
            call = {k: t.abs() for k, t in operands((rows, 5000), 20).items()}
            assert_right(call)

    def test_bits_depend_on_nothing_but_the_sequence(self, isa: str) -> None:
        """Not on batch mates, threads, or how long the batch is."""
        for dtype, length in itertools.product((torch.float32, torch.bfloat16), (1, 5, 20, 49, 77)):
            call = operands((9, length, 72), 100, dtype)
            together = ff.linear(**call, activation="gelu", backend="cpu")
            threads = torch.get_num_threads()
            torch.set_num_threads(3)
            try:
                assert torch.equal(ff.linear(**call, activation="gelu", backend="cpu"), together)
            finally:
                torch.set_num_threads(threads)
            for b in (0, 4, 8):
                alone = call | {n: call[n][b] for n in ("input", "residual")}
                result = ff.linear(**alone, activation="gelu", backend="cpu")
                assert torch.equal(result, together[b])

    def test_nan_stays_in_its_row(self, isa: str) -> None:
        for dtype in DTYPES:
            call = operands((50, 40), 30, dtype)
            call["input"][3, 7], call["input"][49, 0] = torch.nan, torch.inf
            for activation in ACTIVATIONS:
                result = ff.linear(**call, activation=activation, backend="cpu")
                assert result.isnan().all(1).nonzero()[0] == 3
                assert result[[*range(3), *range(4, 49)]].isfinite().all()
                assert not result[49].isfinite().all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_strides(self, isa: str, dtype: torch.dtype) -> None:
        call = operands((3, 20, 48), 33, dtype)
        expected = ff.linear(**call, backend="cpu")
        x, w = call["input"], call["weight"]
        wide = torch.full((3, 20, 100), torch.nan, dtype=dtype)
        wide[..., 2:50] = x
        for input in (wide[..., 2:50], x.transpose(0, 1).contiguous().transpose(0, 1)):
            assert torch.equal(ff.linear(**call | {"input": input}, backend="cpu"), expected)
        turned = {"weight": w.t().contiguous().t(), "bias": call["bias"].repeat(2)[::2]}
        turned["bias"] = torch.stack([call["bias"]] * 2, 1)[:, 0]
        assert torch.equal(ff.linear(**call | turned, backend="cpu"), expected)
        residual = call["residual"][:1, :1].expand(3, 20, -1)
        given = call | {"residual": residual}
        same = call | {"residual": residual.contiguous()}
        assert torch.equal(ff.linear(**given, backend="cpu"), ff.linear(**same, backend="cpu"))

    def test_weights_are_read_in_place(self, isa: str) -> None:
        """The next call sees an update, however it was made."""
        call = operands((20, 64), 40)
        ff.linear(**call, backend="cpu")
        call["weight"].data.view(-1)[::3] = 0.5
        torch.testing.assert_close(ff.linear(**call, backend="cpu"), plain(**call))

    def test_empty(self, isa: str) -> None:
        for shape, features in (((0, 4), 3), ((2, 0, 4), 3), ((5, 4), 0)):
            assert ff.linear(**operands(shape, features), backend="cpu").numel() == 0
        nothing = operands((5, 0), 3)
        assert torch.equal(
            ff.linear(**nothing, backend="cpu"), nothing["bias"] + nothing["residual"]
        )


@needs_native
class TestTorch:
    def test_opcheck(self) -> None:
        call = operands((2, 5, 8), 6)
        for bias, residual in itertools.product((None, call["bias"]), (None, call["residual"])):
            given = (call["input"], call["weight"], bias, residual, None, 2)
            torch.library.opcheck(torch.ops.fastfusion.linear_forward.default, given)

    def test_compile_and_export(self) -> None:
        call = operands((2, 20, 16), 24)
        expected = ff.linear(**call, activation="gelu")

        class Module(torch.nn.Module):
            def forward(self, **given: Tensor) -> Tensor:
                return ff.linear(**given, activation="gelu")

        compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(**call), expected)
            program = torch.export.export(Module(), (), call)
        assert "fastfusion.linear_forward" in str(program.graph)
        assert torch.equal(program.module()(**call), expected)
        call["weight"].requires_grad_()
        (gradient,) = torch.autograd.grad(compiled(**call).sum(), call["weight"])
        (plainly,) = torch.autograd.grad(plain(**call, activation="gelu").sum(), call["weight"])
        torch.testing.assert_close(gradient, plainly)

    def test_gradients_and_transforms_are_the_references(self) -> None:
        call = {k: t.requires_grad_() for k, t in operands((2, 5, 8), 6).items()}
        assert ff.explain(ff.linear, **call).chosen == "reference"
        ours = torch.autograd.grad(ff.linear(**call, activation="silu").sum(), list(call.values()))
        theirs = torch.autograd.grad(plain(**call, activation="silu").sum(), list(call.values()))
        torch.testing.assert_close(ours, theirs)
        with pytest.raises(ff.BackendUnavailableError, match="gradients"):
            ff.linear(**call, backend="cpu")
        frozen = operands((4, 5, 8), 6)
        mapped = torch.vmap(lambda x: ff.linear(x, frozen["weight"]))(frozen["input"])
        torch.testing.assert_close(mapped, F.linear(frozen["input"], frozen["weight"]))

    def test_autocast(self) -> None:
        call = operands((20, 64), 40)
        with torch.autocast("cpu", torch.bfloat16):
            result = ff.linear(**call)
        low = {k: t.bfloat16() for k, t in call.items()}
        assert torch.equal(result, ff.linear(**low))

    def test_a_subclass_is_asked(self) -> None:
        class Asked(Tensor):
            @classmethod
            def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):
                return func, len(args), sorted(kwargs or {})

        call = operands((4, 8), 3)
        call["weight"] = call["weight"].as_subclass(Asked)
        named = ["activation", "backend", "residual", "weight_scale"]
        assert ff.linear(**call) == (ff.linear, 3, named)

    def test_flops(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            ff.linear(**operands((2, 20, 16), 24))
        assert counter.get_total_flops() == 2 * 40 * 16 * 24


X, W = torch.ones(2, 5, 8), torch.ones(6, 8)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [1.0]}, TypeError, "input must be a Tensor"),
    ({"input": X.int()}, TypeError, "input must be float16"),
    ({"input": torch.tensor(1.0)}, ValueError, "input must have a last dimension"),
    ({"weight": W.double()}, TypeError, "weight must have the dtype of input"),
    ({"weight": W.to("meta")}, ValueError, "weight must be on the device of input"),
    ({"weight": W[0]}, ValueError, r"weight must be \(features, width\).*weight \(8,\)"),
    ({"weight": W[:, :7]}, ValueError, r"width of input, got input \(2, 5, 8\), weight \(6, 7\)"),
    ({"weight": W.to_sparse()}, TypeError, "weight must be a dense tensor"),
    ({"bias": torch.randn(7)}, ValueError, r"bias must be \(features,\)"),
    ({"bias": torch.randn(1)}, ValueError, r"bias must be \(features,\)"),
    ({"bias": 1.0}, TypeError, "bias must be a Tensor"),
    ({"residual": torch.randn(5, 6)}, ValueError, r"residual must have .* \(2, 5, 6\)"),
    ({"activation": "tanh"}, ValueError, "activation must be one of None, 'relu'"),
    ({"activation": 1}, ValueError, "activation must be one of"),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=map(str, range(len(BAD))))
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input(change: dict[str, Any], error: Any, match: str, backend: str) -> None:
    if backend == "cpu" and not ISAS:
        pytest.skip("without the compiled part there is no kernel")
    with pytest.raises(error, match=match):
        ff.linear(**{"input": X, "weight": W, "backend": backend, **change})


def test_the_reference_is_the_formula() -> None:
    call = operands((2, 20, 16), 24)
    for activation in ACTIVATIONS:
        result = ff.linear(**call, activation=activation, backend="reference")
        torch.testing.assert_close(result, plain(**call, activation=activation))
    assert OP.implementations[-1].backend == "reference"
