"""The shared suite on cross_modal_layer, and what is peculiar to it."""

import itertools
from typing import Any

import pytest
import torch
from layer_calls import (
    LayerSuite,
    cross_modal_layer,
    flat,
    leaves_of,
    nested,
    plain_cross_modal,
)
from suite import DEVICE, Case, Target, targets_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastfusion as ff
from fastfusion.backends import triton
from fastfusion.ops.cross_modal_layer import OP
from fastfusion.ops.linear import ACTIVATIONS

SMALL = {
    "batch": 2, "q_len": 9, "kv_len": 7, "dim": 24, "context_dim": 40, "heads": 2, "ffn": 20,
    "activation": "relu",
}  # fmt: skip
KERNELS = [t for t in targets_of(OP) if t.backend != "reference"]


def hide_rows(call: dict[str, Any]) -> None:
    """One image token sees nothing, one word is seen by none, and one image is nothing but
    padding."""
    call["attn_mask"][3] = False
    call["attn_mask"][:, 2] = False
    padding = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    padding[1] = True
    call["visual_padding_mask"] = padding


CASES = [
    Case("plain", "widths that fill no tile and no register", SMALL),
    Case("norm_first", "norms at the other places", SMALL | {"norm_first": True}),
    Case("padding", "padding of the other stream", SMALL | {"mask": "both_padding"}),
    Case("bool_mask", "the mask of the other direction", SMALL | {"mask": "bool"}),
    Case("bias", "a mask that is added once", SMALL | {"mask": "bias", "norm_first": True}),
    Case("dead", "tokens with nothing to attend to", SMALL | {"mask": "bool"}, edit=hide_rows),
    Case("gelu", "another activation", SMALL | {"activation": "gelu", "embed_dim": 36}),
    Case("no_bias", "absent biases", SMALL | {"bias": False, "embed_dim": 10}),
    Case(
        "aligned",
        "several tiles of rows, features and width",
        {"batch": 2, "q_len": 70, "kv_len": 50, "dim": 64, "context_dim": 128, "heads": 4}
        | {"ffn": 96},
    ),
    Case("single", "one token each", SMALL | {"q_len": 1, "kv_len": 1}),
    Case("no_batch", "an empty batch", SMALL | {"batch": 0}),
    Case("no_image", "an empty stream", SMALL | {"q_len": 0}),
]


class TestCrossModalLayer(LayerSuite):
    op = OP
    function = staticmethod(cross_modal_layer)
    plain = staticmethod(plain_cross_modal)
    cases = CASES
    outputs = 2
    bool_cases = ("padding", "bool_mask", "dead")


def small(dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    return flat(OP.inputs(SMALL | more, dtype))


kernels = pytest.mark.parametrize("target", KERNELS, ids=str)


@kernels
def test_what_is_hidden_is_not_read(target: Target) -> None:
    """Padded tokens get an output of their own, and are read by nobody else."""
    call = small(mask="both_padding", norm_first=True)
    expected = target.call(cross_modal_layer, **call)
    masks = [call[f"{name}_padding_mask"] for name in ("visual", "text")]
    for name, mask in zip(("visual", "text"), masks, strict=True):
        call[name][mask] = torch.nan
    for result, other, mask in zip(
        target.call(cross_modal_layer, **call), expected, masks, strict=True
    ):
        assert torch.equal(result[~mask], other[~mask]) and result[mask].isnan().all()


@kernels
def test_a_sample_alone_has_the_same_bits(target: Target) -> None:
    call = small(mask="both_padding", batch=5)
    together = target.call(cross_modal_layer, **call)
    for i in (0, 4):
        names = ("visual", "text", "visual_padding_mask", "text_padding_mask")
        alone = call | {name: call[name][i : i + 1] for name in names}
        for result, other in zip(target.call(cross_modal_layer, **alone), together, strict=True):
            assert torch.equal(result[0], other[i])


def prefix(target: Target) -> str:
    """Of the names of a backend's ops."""
    return "" if target.backend == "cpu" else f"{target.backend}_"


@kernels
def test_compiled_and_exported(target: Target) -> None:
    """Without gradients the graph holds the kernel's op."""
    call = nested(small(mask="both_padding"))

    class Module(torch.nn.Module):
        def forward(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            given = call | {"visual": visual, "text": text}
            return ff.cross_modal_layer(**given, backend=target.backend)

    inputs = call["visual"], call["text"]
    with torch.no_grad():
        expected = Module()(*inputs)
        compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
        program = torch.export.export(Module(), inputs)
        for run in (compiled, program.module()):
            assert all(map(torch.equal, run(*inputs), expected))
    assert f"fastfusion.{prefix(target)}cross_modal_layer_forward" in str(program.graph)


@kernels
def test_opcheck(target: Target) -> None:
    op = getattr(torch.ops.fastfusion, f"{prefix(target)}cross_modal_layer_forward").default
    for more in ({}, {"mask": "both_padding", "norm_first": True, "bias": False}):
        torch.library.opcheck(op, tuple(OP.call(**nested(small(**more)))))


def total(results: tuple[Tensor, ...]) -> Tensor:
    return results[0].sin().sum() + results[1].cos().sum()


def test_compiled_with_gradients() -> None:
    call = small(mask="bias", activation="gelu")
    wanted = {k: v.requires_grad_() for k, v in leaves_of(call).items()}
    compiled = torch.compile(cross_modal_layer, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(total(compiled(**call)), list(wanted.values()))
    eager = torch.autograd.grad(total(cross_modal_layer(**call)), list(wanted.values()))
    torch.testing.assert_close(actual, eager)


@kernels
def test_transforms_are_the_references(target: Target) -> None:
    call = small(mask="both_padding")
    images = torch.stack([call["visual"]] * 3)
    with torch.no_grad():
        mapped = torch.vmap(
            lambda visual: target.call(cross_modal_layer, **call | {"visual": visual})
        )(images)
        expected = cross_modal_layer(**call, backend="reference")
    torch.testing.assert_close(mapped, tuple(t.expand(3, -1, -1, -1) for t in expected))
    wanted = call | {"text_weights.in_bias": call["text_weights.in_bias"].clone().requires_grad_()}
    with pytest.raises(ff.BackendUnavailableError, match="gradients"):
        cross_modal_layer(**wanted, backend=target.backend)


def test_autocast() -> None:
    call = small(mask="bias")
    with torch.autocast(DEVICE, torch.bfloat16):
        results = cross_modal_layer(**call)
    low = {k: v.bfloat16() if k in leaves_of(call) else v for k, v in call.items()}
    low["attn_mask"] = call["attn_mask"]
    assert all(map(torch.equal, results, cross_modal_layer(**low)))


def test_flops() -> None:
    backends = ("reference", "triton") if triton.unavailable() is None else ("reference",)
    for backend in backends:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            cross_modal_layer(**small(), backend=backend)
        assert counter.get_total_flops() == OP.cost(SMALL, torch.float32)[0]


def test_a_subclass_is_asked() -> None:
    class Asked(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            return func, len(args), sorted(kwargs or {})

    call = small()
    name = "text_weights.norm2.weight"
    call[name] = call[name].as_subclass(Asked)
    func, count, names = cross_modal_layer(**call)
    assert func is ff.cross_modal_layer and count == 5 and "norm_first" in names


def test_attention_inside_follows_the_argument_and_the_block() -> None:
    call = nested(small())
    explained = ff.explain(ff.cross_modal_layer, **call, backend="triton")
    inside = ff.explain(ff.bidirectional_attention, *(torch.randn(1, 2, 5, 12),) * 4).chosen
    assert explained.path == f"products in Triton, attention on {inside}"
    with ff.use_backend("reference"):
        explained = ff.explain(ff.cross_modal_layer, **call, backend="triton")
        assert str(explained.path).endswith("on triton")


def test_what_triton_refuses() -> None:
    for change, reason in (
        ({"activation": "silu"}, "silu is left to the reference"),
        ({"dim": 16400, "embed_dim": 4, "ffn": 2}, "norms wider than 16384"),
    ):
        call = OP.inputs(SMALL | change, torch.float32)
        with pytest.raises(ff.BackendUnavailableError, match=reason):
            ff.cross_modal_layer(**call, backend="triton")


LEGAL = OP.inputs(SMALL, torch.float32, DEVICE)
V, T, W = LEGAL["visual"], LEGAL["text"], LEGAL["visual_weights"]
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"visual": [1.0]}, TypeError, "visual must be a Tensor"),
    ({"visual": None}, TypeError, "visual must be a Tensor"),
    ({"visual": V.int()}, TypeError, "visual must be float16"),
    ({"visual": V[0]}, ValueError, r"visual must be \(batch, length, width\)"),
    ({"visual": V[..., :0]}, ValueError, "visual must be .*width above 0"),
    ({"text": T.double()}, TypeError, "text must have the dtype of visual"),
    ({"text": T.to("meta")}, ValueError, "text must be on the device of visual"),
    ({"text": T[:1]}, ValueError, "text must have the batch size"),
    ({"text": T[..., :5]}, ValueError, r"text_weights.in_weight must be \(2 \* embed_dim, width"),
    ({"visual_weights": tuple(W)}, TypeError, "visual_weights must be a fastfusion.ops.Stream"),
    ({"visual_weights": W._replace(norm1=None)}, TypeError, "visual_weights.norm1 must be a"),
    ({"visual_weights": W._replace(in_weight=None)}, TypeError, "in_weight must be a Tensor"),
    ({"visual_weights": W._replace(out_weight=None)}, TypeError, "out_weight must be a Tensor"),
    ({"visual_weights": W._replace(out_weight=V[0, 0])}, ValueError, r"\(width, embed_dim\)"),
    ({"visual_weights": W._replace(in_bias=V[0, 0])}, ValueError, r"in_bias must be \(80,\)"),
    ({"visual_weights": W._replace(linear1_weight=V[0, 0])}, ValueError, "linear1_weight must be"),
    ({"visual_weights": W._replace(linear2_weight=V[0])}, ValueError, "linear2_weight must be"),
    (
        {"visual_weights": W._replace(norm2=ff.ops.Norm(V[0, 0, :5]))},
        ValueError,
        r"visual_weights.norm2.weight must be \(24,\)",
    ),
    ({"num_heads": 3}, ValueError, "num_heads must divide embed_dim, 40, got 3"),
    ({"num_heads": 0}, ValueError, "num_heads must divide"),
    ({"num_heads": "2"}, TypeError, "num_heads must be an int"),
    ({"activation": "tanh"}, ValueError, "activation must be one of None, 'relu'"),
    ({"activation": 1}, ValueError, "activation must be one of"),
    ({"norm_first": 1}, TypeError, "norm_first must be a bool"),
    ({"attn_mask": V.new_ones(9, 8)}, ValueError, "attn_mask must broadcast"),
    ({"visual_padding_mask": V.new_ones(2, 9)}, TypeError, "visual_padding_mask must be bool"),
    ({"text_padding_mask": V.new_ones(2, 9).bool()}, ValueError, "text_padding_mask must broad"),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=map(str, range(len(BAD))))
@pytest.mark.parametrize("backend", ["triton", "reference", None])
def test_bad_input(change: dict[str, Any], error: Any, match: str, backend: str | None) -> None:
    with pytest.raises(error, match=match):
        ff.cross_modal_layer(**{**LEGAL, "backend": backend, **change})


def test_the_reference_is_the_formula() -> None:
    for activation, norm_first in itertools.product(ACTIVATIONS, (False, True)):
        shape = SMALL | {"activation": activation, "norm_first": norm_first, "mask": "bias"}
        call = flat(OP.inputs(shape, torch.float64))
        results = cross_modal_layer(**call, backend="reference")
        torch.testing.assert_close(results, plain_cross_modal(**call))
