"""encoder_layer: against its definition, against its ops one by one, and what else it promises."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from suite import ISAS, needs_native
from torch import Tensor

import fastfusion as ff
from fastfusion.ops.encoder_layer import OP, TENSORS, run_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = ("in_proj", "out_proj", "linear1", "linear2")
SEPARATE = ("in_proj", "k_proj", "v_proj")
NARROW = {torch.bfloat16, torch.uint8}  # weights beside which attention is in bfloat16
SHAPES = [
    {"length": 1, "dim": 1, "heads": 1, "ffn": 1},
    {"batch": 2, "length": 5, "dim": 12, "heads": 3, "ffn": 7},
    {"batch": 3, "length": 20, "dim": 64, "heads": 4, "ffn": 150, "activation": "relu"},
    {"length": 37, "dim": 48, "heads": 1, "ffn": 96, "activation": "silu"},
    {"batch": 2, "length": 50, "dim": 80, "heads": 2, "ffn": 33, "activation": None},
    {"batch": 2, "length": 21, "dim": 72, "heads": 2, "ffn": 60, "activation": "quick_gelu",
     "separate": True},
]  # fmt: skip


def in_int8(call: dict[str, Any]) -> dict[str, Any]:
    """The call with weights of 8-bit integers."""
    packed = dict(call)
    for name in products(call):
        parts = 3 if name == "in_proj" and "k_proj_weight" not in call else 1
        weight, scale = ff.ops.pack_int8(call[f"{name}_weight"].float(), parts)
        packed |= {f"{name}_weight": weight, f"{name}_scale": scale}
    return packed


def products(call: dict[str, Any]) -> tuple[str, ...]:
    return (*PRODUCTS, "k_proj", "v_proj") if "k_proj_weight" in call else PRODUCTS


def in_bfloat16(call: dict[str, Any]) -> dict[str, Any]:
    """The call with weights of bfloat16."""
    weights = {f"{name}_weight": call[f"{name}_weight"].bfloat16() for name in products(call)}
    return call | weights


def in_double(call: dict[str, Any]) -> dict[str, Any]:
    """The call with all numbers in float64 but the scales, which stay those of the integers."""
    return {
        name: value.double()
        if isinstance(value, Tensor) and value.is_floating_point() and not name.endswith("_scale")
        else value
        for name, value in call.items()
    }


def separate(call: dict[str, Any]) -> dict[str, Any]:
    """The call with weights of key and value apart from the query's."""
    apart = dict(call)
    for kind in ("weight", "bias"):
        parts = call[f"in_proj_{kind}"].chunk(3)
        apart |= {f"{n}_{kind}": p for n, p in zip(SEPARATE, parts, strict=True)}
    return apart


def by_ops(call: dict[str, Any]) -> Tensor:
    """The layer by the ops that it is made of."""
    c = OP.call(**call)

    def linear(name: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, bias, scale = (getattr(c, f"{name}_{s}") for s in ("weight", "bias", "scale"))
        activation = call["activation"] if name == "linear1" else None
        return ff.linear(
            x, weight, bias, weight_scale=scale, activation=activation, residual=residual,
            backend="cpu",
        )  # fmt: skip

    def norm(name: str, x: Tensor) -> Tensor:
        return ff.norm(x, getattr(c, f"{name}_weight"), getattr(c, f"{name}_bias"), backend="cpu")

    x, first = c.input, c.norm_first
    scored = norm("norm1", x) if first else x
    heads = torch.cat([linear(name, scored) for name in c.projections], -1)
    narrow = {getattr(c, f"{name}_weight").dtype for name in c.projections} <= NARROW
    if x.dtype == torch.float32 and narrow:
        heads = heads.bfloat16()
    q, k, v = (t.transpose(1, 2) for t in heads.unflatten(-1, (3, c.num_heads, -1)).unbind(2))
    out = ff.scaled_dot_product_attention(
        q, k, v, c.attn_mask, is_causal=c.is_causal, key_padding_mask=c.key_padding_mask,
        backend="cpu",
    ).to(x.dtype)  # fmt: skip
    y = linear("out_proj", out.transpose(1, 2).flatten(2), x)
    if first:
        return linear("linear2", linear("linear1", norm("norm2", y)), y)
    y = norm("norm1", y)
    return norm("norm2", linear("linear2", linear("linear1", y), y))


def masks(call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The call with each kind of mask."""
    batch, length, _ = call["input"].shape
    generator = torch.Generator().manual_seed(1)
    hidden = torch.rand(batch, length, generator=generator) < 0.4
    some = torch.rand(length, length, generator=generator) < 0.7
    bias = torch.randn(batch, call["num_heads"], length, length, generator=generator)
    yield call
    yield call | {"is_causal": True}
    yield call | {"key_padding_mask": hidden}
    yield call | {"attn_mask": some}
    yield call | {"attn_mask": bias.to(call["input"].dtype), "key_padding_mask": hidden}


@needs_native
class TestKernel:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_accurate(self, isa: str, shape: Any, dtype: torch.dtype) -> None:
        for norm_first in (False, True):
            call = OP.inputs(shape | {"norm_first": norm_first}, dtype)
            for given in masks(call):
                result = ff.encoder_layer(**given, backend="cpu")
                assert result.dtype == dtype and result.is_contiguous()
                exact = run_reference(OP.call(**in_double(given)), False)
                formula = run_reference(OP.call(**given), False)
                assert_accurate(*(t.reshape(1, -1) for t in (result, exact, formula)))

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_accurate_with_narrow_weights(self, isa: str, shape: Any) -> None:
        """Against the layer whose attention and activations round nowhere, but as 8 bits do."""
        for norm_first, change in itertools.product((False, True), (in_int8, in_bfloat16)):
            call = change(OP.inputs(shape | {"norm_first": norm_first}, torch.float32))
            for given in masks(call):
                result = ff.encoder_layer(**given, backend="cpu")
                exact = run_reference(OP.call(**in_double(given)), False)
                formula = run_reference(OP.call(**given), False)
                assert_accurate(*(t.reshape(1, -1) for t in (result, exact, formula)))

    @pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
    def test_bits_of_its_ops(self, isa: str, shape: Any) -> None:
        for dtype, norm_first in itertools.product(DTYPES, (False, True)):
            call = OP.inputs(shape | {"norm_first": norm_first}, dtype)
            changes = (dict, in_int8, in_bfloat16) if dtype == torch.float32 else (dict, in_int8)
            for given in itertools.chain.from_iterable(masks(change(call)) for change in changes):
                assert torch.equal(ff.encoder_layer(**given, backend="cpu"), by_ops(given))

    def test_separate_projections(self, isa: str) -> None:
        """The bits of one weight, whatever each of the three is, and views without a copy."""
        for dtype, shape in itertools.product(DTYPES, SHAPES[1:4]):
            call = OP.inputs(shape, dtype)
            expected = ff.encoder_layer(**call, backend="cpu")
            assert torch.equal(ff.encoder_layer(**separate(call), backend="cpu"), expected)
            apart, whole = in_int8(separate(call)), in_int8(call)
            expected = ff.encoder_layer(**whole, backend="cpu")
            assert torch.equal(ff.encoder_layer(**apart, backend="cpu"), expected)
            apart["k_proj_bias"] = None
            whole["in_proj_bias"] = call["in_proj_bias"].clone()
            whole["in_proj_bias"].chunk(3)[1].zero_()
            expected = ff.encoder_layer(**whole, backend="cpu")
            assert torch.equal(ff.encoder_layer(**apart, backend="cpu"), expected)
            apart["v_proj_weight"] = call["in_proj_weight"].chunk(3)[2]
            apart["v_proj_scale"] = None
            if dtype == torch.float32:
                apart["in_proj_weight"] = call["in_proj_weight"].chunk(3)[0].half()
                apart["in_proj_scale"] = None
            assert torch.equal(ff.encoder_layer(**apart, backend="cpu"), by_ops(apart))

    def test_bits_depend_on_nothing_but_the_sequence(self, isa: str) -> None:
        shape = {"batch": 9, "dim": 48, "heads": 2, "ffn": 200}
        for dtype, length in itertools.product((torch.float32, torch.bfloat16), (1, 5, 20, 50)):
            for change in (dict, in_int8):
                call = change(OP.inputs(shape | {"length": length}, dtype))
                together = ff.encoder_layer(**call, backend="cpu")
                threads = torch.get_num_threads()
                torch.set_num_threads(3)
                try:
                    assert torch.equal(ff.encoder_layer(**call, backend="cpu"), together)
                finally:
                    torch.set_num_threads(threads)
                for b in (0, 4, 8):
                    alone = call | {"input": call["input"][b : b + 1]}
                    assert torch.equal(ff.encoder_layer(**alone, backend="cpu")[0], together[b])

    def test_packed_sequences_have_the_bits_that_they_have_alone(self, isa: str) -> None:
        """Lengths with and without a rest of rows, and none; all kinds of weights."""
        lengths = (20, 0, 1, 50, 16, 5)
        offsets = torch.tensor((0, *lengths)).cumsum(0)
        shape = {"length": sum(lengths), "dim": 48, "heads": 2, "ffn": 70}
        for dtype, change in itertools.product(DTYPES[:2], (dict, in_int8, in_bfloat16)):
            if change is in_bfloat16 and dtype != torch.float32:
                continue
            for causal, kind in ((False, torch.int64), (True, torch.int32)):
                call = change(OP.inputs(shape | {"is_causal": causal, "norm_first": causal}, dtype))
                packed = call | {"cu_seqlens": offsets.to(kind)}
                result = ff.encoder_layer(**packed, backend="cpu")
                parts = call["input"].split(lengths, 1)
                alone = [
                    ff.encoder_layer(**call | {"input": part}, backend="cpu") for part in parts
                ]
                assert torch.equal(result, torch.cat(alone, 1))
                exact = run_reference(OP.call(**in_double(packed)), False)
                formula = run_reference(OP.call(**packed), False)
                if change is not in_int8:
                    assert_accurate(*(t.reshape(1, -1) for t in (result, exact, formula)))
                parts = [run_reference(OP.call(**call | {"input": part}), False) for part in parts]
                torch.testing.assert_close(formula, torch.cat(parts, 1))

    def test_strides_and_empty(self, isa: str) -> None:
        call = OP.inputs(SHAPES[2], torch.float32)
        expected = ff.encoder_layer(**call, backend="cpu")
        wide = torch.full((3, 20, 70), torch.nan)
        wide[..., 3:67] = call["input"]
        turned = {n: call[n].t().contiguous().t() for n in ("in_proj_weight", "linear2_weight")}
        for change in ({"input": wide[..., 3:67]}, turned):
            assert torch.equal(ff.encoder_layer(**call | change, backend="cpu"), expected)
        for nothing in (call["input"][:0], call["input"][:, :0]):
            result = ff.encoder_layer(**call | {"input": nothing}, backend="cpu")
            assert result.shape == nothing.shape


@needs_native
class TestTorch:
    def test_opcheck(self) -> None:
        call = OP.inputs({"length": 5, "dim": 8, "heads": 2, "ffn": 12}, torch.float32)
        packed = call | {"cu_seqlens": torch.tensor([0, 3, 5])}
        narrow = in_int8(call), in_int8(separate(call))
        for given in (call, *narrow, separate(call), packed, *masks(call)):
            op = torch.ops.fastfusion.encoder_layer_forward.default
            torch.library.opcheck(op, tuple(OP.call(**given)))

    @pytest.mark.parametrize("apart", [False, True])
    def test_compile_export_gradients_and_vmap(self, apart: bool) -> None:
        call = OP.inputs({"length": 20, "dim": 16, "heads": 2, "ffn": 24}, torch.float32)
        call = separate(call) if apart else call
        tensors = {n: call[n] for n in TENSORS if n in call}
        options = {n: v for n, v in call.items() if n not in tensors}
        expected = ff.encoder_layer(**call)

        class Module(torch.nn.Module):
            def forward(self, **given: Tensor) -> Tensor:
                return ff.encoder_layer(**given, **options)

        compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(**tensors), expected)
            program = torch.export.export(Module(), (), tensors)
        assert "fastfusion.encoder_layer_forward" in str(program.graph)
        assert torch.equal(program.module()(**tensors), expected)
        leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
        assert ff.explain(ff.encoder_layer, **leaves, **options).chosen == "reference"
        theirs = torch.autograd.grad(
            run_reference(OP.call(**leaves, **options), False).pow(2).sum(), list(leaves.values())
        )
        for function in (lambda **k: ff.encoder_layer(**k, **options), compiled):
            ours = torch.autograd.grad(function(**leaves).pow(2).sum(), list(leaves.values()))
            torch.testing.assert_close(ours, theirs)
        with pytest.raises(ff.BackendUnavailableError, match="gradients"):
            ff.encoder_layer(**leaves, **options, backend="cpu")
        batch = torch.stack([call["input"]] * 2)
        mapped = torch.vmap(lambda x: ff.encoder_layer(**call | {"input": x}))(batch)
        torch.testing.assert_close(mapped[1], expected)

    def test_autocast(self) -> None:
        call = OP.inputs({"length": 20, "dim": 16, "heads": 2, "ffn": 24}, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            result = ff.encoder_layer(**call)
        low = {k: t.bfloat16() if isinstance(t, Tensor) else t for k, t in call.items()}
        assert torch.equal(result, ff.encoder_layer(**low))

    def test_flops(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        shape = {"batch": 2, "length": 20, "dim": 16, "heads": 2, "ffn": 24}
        with FlopCounterMode(display=False) as counter:
            ff.encoder_layer(**OP.inputs(shape, torch.float32))
        assert counter.get_total_flops() == OP.cost(shape, torch.float32)[0]


CALL = OP.inputs({"batch": 2, "length": 5, "dim": 8, "heads": 2, "ffn": 12}, torch.float32)
X = CALL["input"]
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [1.0]}, TypeError, "input must be a Tensor"),
    ({"input": X[0]}, ValueError, r"input must be \(batch, length, width\), got input \(5, 8\)"),
    ({"num_heads": 3}, ValueError, "num_heads must divide the width"),
    ({"num_heads": 2.0}, TypeError, "num_heads must be an int"),
    ({"in_proj_weight": CALL["in_proj_weight"][:23]}, ValueError, "in_proj: bias must be"),
    (
        {"out_proj_weight": torch.ones(9, 8), "out_proj_bias": None},
        ValueError,
        "out_proj_weight must have 8 features, got 9",
    ),
    ({"linear1_weight": CALL["linear1_weight"].double()}, TypeError, "linear1: weight must have"),
    ({"linear2_weight": torch.ones(8, 11)}, ValueError, "linear2: weight must be"),
    ({"norm2_bias": torch.ones(7)}, ValueError, r"norm2: bias must be \(width,\)"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"input must be \(1, total length, width\)"),
    ({"norm1_eps": -1.0}, ValueError, "norm1: eps must not be negative"),
    ({"activation": "tanh"}, ValueError, "linear1: activation must be one of"),
    ({"norm_first": 1}, TypeError, "norm_first must be a bool"),
    ({"is_causal": None}, TypeError, "is_causal must be a bool"),
    ({"attn_mask": torch.ones(4, 5)}, ValueError, "attn_mask must broadcast"),
    ({"key_padding_mask": torch.ones(2, 5)}, TypeError, "key_padding_mask must be bool"),
    ({"k_proj_weight": torch.ones(8, 8)}, ValueError, "k_proj_weight and v_proj_weight must both"),
    ({"v_proj_bias": torch.ones(8)}, ValueError, "v_proj_bias must be None without v_proj_weight"),
    (
        {"k_proj_weight": torch.ones(8, 8), "v_proj_weight": torch.ones(8, 8)},
        ValueError,
        "in_proj_weight must have 8 features, got 24",
    ),
    (
        separate(CALL) | {"v_proj_weight": torch.ones(8, 7)},
        ValueError,
        r"v_proj: weight must be \(features, width\)",
    ),
    (
        separate(CALL) | {"k_proj_weight": torch.ones(9, 8), "k_proj_bias": None},
        ValueError,
        "k_proj_weight must have 8 features, got 9",
    ),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
]
ONE = {"input": X[:1]}
BAD += [
    (ONE | {"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens must be a Tensor"),
    (ONE | {"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens must be int32 or"),
    (ONE | {"cu_seqlens": torch.tensor([[0, 5]])}, ValueError, r"shape \(sequences \+ 1,\)"),
    (ONE | {"cu_seqlens": torch.tensor([0, 4])}, ValueError, "must end at 5, the tokens of input"),
    (ONE | {"cu_seqlens": torch.tensor([0, 3, 2, 5])}, ValueError, "never fall and end at 5"),
    (ONE | {"cu_seqlens": torch.tensor([1, 5])}, ValueError, "cu_seqlens must start at 0"),
    (
        ONE | {"cu_seqlens": torch.tensor([0, 5]), "attn_mask": torch.ones(5, 5).bool()},
        ValueError,
        "attn_mask must be None beside cu_seqlens",
    ),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=map(str, range(len(BAD))))
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input(change: dict[str, Any], error: Any, match: str, backend: str) -> None:
    if backend == "cpu" and not ISAS:
        pytest.skip("without the compiled part there is no kernel")
    with pytest.raises(error, match=match):
        ff.encoder_layer(**{**CALL, "backend": backend, **change})
