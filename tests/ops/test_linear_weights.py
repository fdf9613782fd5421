"""linear with weights narrower than its input: 8-bit integers, and halves beside float32."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from suite import Target, targets_of
from torch import Tensor

import fastfusion as ff
from fastfusion.backends import library
from fastfusion.ops import pack_int8, unpack_int8
from fastfusion.ops.linear import ACTIVATIONS, OP

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
# Widths and features around a step of 4 and a panel of 64; lengths around registers and rounds.
SHAPES = [
    ((40, 8), 5), ((3, 77), 97), ((2, 20, 64), 48), ((2, 37, 33), 64), ((1, 48, 130), 65),
    ((2, 3, 15, 256), 130), ((300, 96), 50), ((97,), 200), ((2, 30, 1), 3), ((4, 1, 768), 33),
]  # fmt: skip


def normal(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(size, generator=generator, device="cpu").to(torch.get_default_device())


def operands(
    shape: tuple[int, ...], features: int, dtype: torch.dtype, weights: str, parts: int = 1
) -> dict[str, Tensor]:
    call = {
        "input": normal(*shape).to(dtype),
        "weight": normal(features, shape[-1], seed=1),
        "bias": normal(features, seed=2).to(dtype),
        "residual": normal(*shape[:-1], features, seed=3).to(dtype),
    }
    if weights == "int8":
        call["weight"], call["weight_scale"] = pack_int8(call["weight"], parts)
    else:
        call["weight"] = call["weight"].to(getattr(torch, weights))
    return call


def formula(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    weight_scale: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    acc: torch.dtype = torch.float32,
) -> Tensor:
    """The definition, with sums in `acc`: what is rounded before them is rounded in float32."""
    x = input.float()
    if weight_scale is None:
        result = x.to(weight.dtype).to(acc) @ weight.to(acc).t()
    else:
        features, width = weight_scale.shape[0], x.shape[-1]
        largest = x.abs().amax(-1, keepdim=True) if width else x.new_zeros(*x.shape[:-1], 1)
        inverse = torch.full_like(largest, 127.0).div(largest).masked_fill(largest == 0, 0)
        integers = unpack_int8(weight, width, features // weight.shape[0])
        sums = (x * inverse).round().double() @ integers.double().t()
        scales = largest / torch.full_like(largest, 127.0)
        result = sums.to(acc) * (scales.to(acc) * weight_scale.to(acc))
    result = ACTIVATIONS[activation](result if bias is None else result + bias.to(acc))
    result = result if residual is None else result + residual.to(acc)
    return result if acc == torch.float64 else result.to(input.dtype)


def runnable(call: dict[str, Any]) -> list[Target]:
    """The implementations that take such a call."""
    made = OP.call(**call)
    taken = {i.backend for i in OP.implementations if not i.refuses(made)}
    return [target for target in targets_of(OP) if target.backend in taken]


def assert_right(call: dict[str, Any], **more: Any) -> None:
    call = call | more
    exact, plain = formula(**call, acc=torch.float64), formula(**call)
    for target in runnable(call):
        (result,) = target.call(ff.linear, **call)
        assert result.dtype == call["input"].dtype and result.is_contiguous()
        assert_accurate(*(t.reshape(1, -1) for t in (result, exact, plain)))


@pytest.mark.skipif(library.native is None, reason="without the compiled part there is no kernel")
def test_the_kernels_take_them() -> None:
    """Otherwise the tests below would see the reference alone."""
    for dtype, weights in itertools.product(DTYPES, ("int8", "bfloat16", "float16")):
        if weights == "int8" or dtype == torch.float32:
            call = operands((2, 8), 5, dtype, weights)
            assert ff.explain(ff.linear, **{k: t.cpu() for k, t in call.items()}).chosen == "cpu"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8(shape: Any, dtype: torch.dtype) -> None:
    call = operands(*shape, dtype, "int8")
    assert_right(call)
    assert_right({k: call[k] for k in ("input", "weight", "weight_scale")}, activation="gelu")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_halves(shape: Any, half: torch.dtype) -> None:
    call = operands(*shape, torch.float32, str(half).removeprefix("torch."))
    assert_right(call)
    assert_right({k: call[k] for k in ("input", "weight")}, activation="gelu")


@pytest.mark.parametrize("weights", ["int8", "bfloat16", "float16"])
def test_activations(weights: str) -> None:
    for activation in ACTIVATIONS:
        assert_right(operands((5, 20, 40), 60, torch.float32, weights), activation=activation)


def test_the_reference_is_the_formula() -> None:
    for weights, activation in itertools.product(("int8", "bfloat16"), ACTIVATIONS):
        call = operands((2, 20, 16), 24, torch.float32, weights)
        result = ff.linear(**call, activation=activation, backend="reference")
        torch.testing.assert_close(result, formula(**call, activation=activation))


def test_parts_alone() -> None:
    """Each as a weight of its own, with the bits that it has beside the others."""
    call = operands((2, 9, 33), 3 * 70, torch.float32, "int8", parts=3)
    for target in runnable(call):
        (whole,) = target.call(ff.linear, **call)
        for first, end in ((0, 1), (1, 2), (2, 3), (1, 3)):
            rows = slice(70 * first, 70 * end)
            alone = call | {
                "weight": call["weight"][first:end],
                "weight_scale": call["weight_scale"][rows],
                "bias": call["bias"][rows],
                "residual": call["residual"][..., rows],
            }
            assert torch.equal(target.call(ff.linear, **alone)[0], whole[..., rows])


def test_bits_of_integers_depend_on_nothing_but_the_row() -> None:
    call = operands((4, 29, 77), 100, torch.float32, "int8")
    for target in runnable(call):
        (together,) = target.call(ff.linear, **call, activation="gelu")
        for b, i in itertools.product((0, 3), (0, 17, 28)):
            alone = call | {n: call[n][b, i] for n in ("input", "residual")}
            assert torch.equal(
                target.call(ff.linear, **alone, activation="gelu")[0], together[b, i]
            )


def test_rows_of_extremes() -> None:
    """NaN and infinity stay in their row; numbers that no scale can be made of count as 0."""
    call = operands((9, 40), 70, torch.float32, "int8")
    x = call["input"]
    x[1, 7], x[2, 0], x[3, 5] = torch.nan, torch.inf, -torch.inf
    x[4], x[5], x[6] = 0.0, x[5] * 1e-38, x[6] * 1e37
    clean = call | {"input": torch.where(x.abs().amax(1, keepdim=True) < 1e-36, 0.0, x)}
    exact, plain = formula(**clean, acc=torch.float64), formula(**clean)
    for target in runnable(call):
        (result,) = target.call(ff.linear, **call)
        assert result[1:4].isnan().all()
        rows = [0, 4, 5, 6, 7, 8]
        assert_accurate(result[rows], exact[rows], plain[rows])


def test_strides() -> None:
    for weights in ("int8", "bfloat16"):
        call = operands((3, 20, 48), 33, torch.float32, weights)
        wide = torch.full((3, 20, 100), torch.nan)
        wide[..., 2:50] = call["input"]
        weight = call["weight"]
        turned = weight.transpose(0, 1).contiguous().transpose(0, 1)
        for target in runnable(call):
            (expected,) = target.call(ff.linear, **call)
            for change in ({"input": wide[..., 2:50]}, {"weight": turned}):
                assert torch.equal(target.call(ff.linear, **call | change)[0], expected)


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_empty(weights: str) -> None:
    for shape, features in (((0, 4), 3), ((2, 0, 4), 3), ((5, 4), 0)):
        assert ff.linear(**operands(shape, features, torch.float32, weights)).numel() == 0
    nothing = operands((5, 0), 3, torch.float32, weights)
    assert torch.equal(ff.linear(**nothing), nothing["bias"] + nothing["residual"])


def test_widest() -> None:
    """Sums of 65,536 products of the largest integers are exact."""
    width = 65536
    weight, scale = pack_int8(torch.ones(2, width))
    call = {"input": torch.ones(1, 1, width), "weight": weight, "weight_scale": scale}
    for target in runnable(call):
        (result,) = target.call(ff.linear, **call)
        assert_accurate(result[0], torch.full((1, 2), float(width)), formula(**call)[0])
    one_more = {**call, "input": torch.ones(1, 1, width + 1)}
    with pytest.raises(ValueError, match="width of at most 65536"):
        ff.linear(**one_more)


class TestPacking:
    @pytest.mark.parametrize(("features", "width", "parts"), [
        (64, 4, 1), (65, 5, 1), (192, 64, 3), (150, 77, 3), (1, 1, 1), (6, 0, 2), (0, 5, 1),
    ])  # fmt: skip
    def test_places(self, features: int, width: int, parts: int) -> None:
        weight = normal(features, width)
        packed, scale = pack_int8(weight, parts)
        expected = weight.abs().amax(1) / 127 if width else torch.zeros(features)
        assert torch.equal(scale, expected)
        integers = (weight / scale[:, None]).round()
        part_features = features // parts
        assert torch.equal(unpack_int8(packed, width, part_features).float(), integers)
        panels, steps = -(-part_features // 64), -(-width // 4)
        assert packed.dtype == torch.uint8 and packed.shape == (parts, panels, steps, 64, 4)
        slow = torch.full(packed.shape, 128, dtype=torch.uint8)
        for f, k in itertools.product(range(features), range(width)):
            part, feature = divmod(f, part_features)
            place = (part, feature // 64, k // 4, feature % 64, k % 4)
            slow[place] = int(integers[f, k]) + 128
        assert torch.equal(packed, slow)

    def test_zeros_and_extremes(self) -> None:
        weight = torch.stack([torch.zeros(5), torch.full((5,), 1e-44), torch.full((5,), -3e38)])
        packed, scale = pack_int8(weight.double())
        integers = unpack_int8(packed, 5, 3)
        assert scale[0] == 0 and not integers[0].any()
        assert torch.equal(integers[2], torch.full((5,), -127, dtype=torch.int8))
        assert (integers.float() * scale[:, None] - weight).isfinite().all()

    @pytest.mark.parametrize(("weight", "parts", "error", "match"), [
        ([1.0], 1, TypeError, "weight must be a floating Tensor, got list"),
        (torch.ones(3, 4).int(), 1, TypeError, "weight must be a floating Tensor, got torch.int32"),
        (torch.ones(3), 1, ValueError, r"weight must be \(features, width\), got \(3,\)"),
        (torch.ones(3, 4), 2, ValueError, r"parts must divide the features, got 2 and \(3, 4\)"),
        (torch.ones(3, 4), 0, ValueError, "parts must divide the features"),
        (torch.tensor([[torch.nan]]), 1, ValueError, "weight must be finite"),
        (torch.tensor([[torch.inf]]), 1, ValueError, "weight must be finite"),
    ])  # fmt: skip
    def test_bad_input(self, weight: Any, parts: int, error: Any, match: str) -> None:
        with pytest.raises(error, match=match):
            pack_int8(weight, parts)

    def test_bad_packed(self) -> None:
        packed, _ = pack_int8(torch.ones(3, 5))
        for given, width, features in ((packed, 9, 3), (packed, 5, 65), (packed.int(), 5, 3)):
            with pytest.raises(ValueError, match="packed must be uint8"):
                unpack_int8(given, width, features)


class TestTorch:
    def test_opcheck(self) -> None:
        for weights in ("int8", "bfloat16"):
            call = operands((2, 5, 8), 6, torch.float32, weights)
            if "cpu" in {target.backend for target in runnable(call)}:
                torch.library.opcheck(torch.ops.fastfusion.linear_forward.default, OP.call(**call))

    @pytest.mark.parametrize("weights", ["int8", "bfloat16"])
    def test_compile_and_export(self, weights: str) -> None:
        call = operands((2, 20, 16), 24, torch.float32, weights)
        expected = ff.linear(**call, activation="gelu")

        class Module(torch.nn.Module):
            def forward(self, **given: Tensor) -> Tensor:
                return ff.linear(**given, activation="gelu")

        compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**call), expected)
        # Which may need gradients, and then has the formula of halves.
        program = torch.export.export(Module(), (), call)
        torch.testing.assert_close(program.module()(**call), expected)
        with torch.no_grad():
            assert torch.equal(compiled(**call), expected)
            program = torch.export.export(Module(), (), call)
        assert torch.equal(program.module()(**call), expected)

    def test_integers_have_no_gradient(self) -> None:
        """They run where gradients are tracked; whoever asks for one is told."""
        call = operands((2, 20, 16), 24, torch.float32, "int8")
        expected = ff.linear(**call)

        def run(input: Tensor) -> Tensor:
            return ff.linear(**call | {"input": input})

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for function in (run, compiled):
            x = call["input"].clone().requires_grad_()
            result = function(x)
            assert torch.equal(result, expected)
            with pytest.raises(RuntimeError, match="8-bit integers has no derivative"):
                result.sum().backward()
            assert x.grad is None
        with pytest.raises(RuntimeError, match="8-bit integers has no derivative"):
            torch.func.grad(lambda x: run(x).sum())(call["input"])
        with pytest.raises(NotImplementedError, match="forward mode"):
            torch.func.jvp(run, (call["input"],), (call["input"],))
        assert torch.equal(torch.vmap(run)(call["input"][None])[0], expected)
        with pytest.raises(RuntimeError, match="8-bit integers has no derivative"):
            bias = call["bias"].clone().requires_grad_()
            ff.linear(**call | {"bias": bias}).sum().backward()

    def test_gradients_of_halves(self) -> None:
        call = operands((2, 5, 8), 6, torch.float32, "bfloat16")
        leaves = {k: t.requires_grad_() for k, t in call.items()}
        ours = torch.autograd.grad(ff.linear(**call).sum(), list(leaves.values()))
        plain = F.linear(call["input"].bfloat16().float(), call["weight"].float(), call["bias"])
        theirs = torch.autograd.grad((plain + call["residual"]).sum(), list(leaves.values()))
        torch.testing.assert_close(ours, theirs)

    def test_autocast(self) -> None:
        for weights in ("int8", "bfloat16"):
            call = operands((20, 64), 40, torch.float32, weights)
            with torch.autocast("cpu", torch.bfloat16):
                result = ff.linear(**call)
            low = {k: t.bfloat16() if t.dtype == torch.float32 else t for k, t in call.items()}
            if weights == "int8":
                low["weight_scale"] = call["weight_scale"]
            assert torch.equal(result, ff.linear(**low))

    def test_float64_stays_float64(self) -> None:
        call = operands((20, 64), 40, torch.float64, "int8")
        result = ff.linear(**call)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, formula(**call, acc=torch.float64))

    def test_inputs_and_cost(self) -> None:
        shape = {"length": 5, "width": 70, "features": 9}
        for weights, size in (("int8", 1), ("bfloat16", 2), (None, 4)):
            call = OP.inputs(shape | {"weights": weights}, torch.float32, None, 0)
            assert ff.linear(**call).shape == (1, 5, 9)
            _, moved = OP.cost(shape | {"weights": weights}, torch.float32)
            assert moved == 4 * (5 * 70 + 9 + 5 * 9) + size * 9 * 70


X, (W, S) = torch.ones(2, 5, 8), pack_int8(torch.ones(6, 8))
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weight": W.int()}, TypeError, "weight must be uint8 beside weight_scale.*torch.int32"),
    ({"weight": torch.ones(6, 8)}, TypeError, "weight must be uint8 beside weight_scale"),
    ({"weight_scale": None}, TypeError, "weight must be float16, bfloat16.*torch.uint8"),
    ({"weight_scale": 1.0}, TypeError, "weight_scale must be a Tensor or None, got float"),
    ({"weight_scale": S.double()}, TypeError, "weight_scale must be float32"),
    ({"weight_scale": S.to("meta")}, ValueError, "weight_scale must be on the device of input"),
    ({"weight_scale": S[None]}, ValueError, r"weight_scale must be \(features,\)"),
    ({"weight_scale": torch.ones(65)}, ValueError, r"packed by pack_int8, \(1, 2, 2, 64, 4\)"),
    ({"weight": W[:0]}, ValueError, "weight must be in parts of the same number of features"),
    ({"weight": W.repeat(4, 1, 1, 1, 1)}, ValueError, "weight must be in parts"),
    ({"weight": W[:, :, :1]}, ValueError, r"weight must be packed .*weight \(1, 1, 1, 64, 4\)"),
    ({"weight": W[0]}, ValueError, "weight must be packed"),
    ({"weight": W.to("meta")}, ValueError, "weight must be on the device of input"),
    ({"input": X[..., :3]}, ValueError, r"packed by pack_int8, \(1, 1, 1, 64, 4\)"),
    ({"bias": torch.ones(7)}, ValueError, r"bias must be \(features,\)"),
    ({"bias": torch.ones(6).double()}, TypeError, "bias must have the dtype of input"),
    ({"residual": torch.ones(2, 5, 64)}, ValueError, r"shape of the output, \(2, 5, 6\)"),
    ({"weight": torch.ones(6, 7).bfloat16(), "weight_scale": None}, ValueError,
     r"weight must be \(features, width\) with the width of input"),
    ({"input": X.bfloat16(), "weight": torch.ones(6, 8).half(), "weight_scale": None}, TypeError,
     "weight must have the dtype of input, torch.bfloat16, got torch.float16"),
    ({"weight": torch.ones(6, 8).half(), "weight_scale": None, "bias": torch.ones(6).half()},
     TypeError, "bias must have the dtype of input"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=map(str, range(len(BAD))))
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input(change: dict[str, Any], error: Any, match: str, grad: bool) -> None:
    call = {"input": X, "weight": W, "weight_scale": S, **change}
    with pytest.raises(error, match=match), torch.set_grad_enabled(grad):
        ff.linear(**call)
