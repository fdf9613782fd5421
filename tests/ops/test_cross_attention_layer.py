"""The shared suite on cross_attention_layer, and what is peculiar to it."""

import itertools
from typing import Any

import pytest
import torch
from layer_calls import (
    LayerSuite,
    cross_attention_layer,
    flat,
    leaves_of,
    nested,
    plain_cross_attention,
)
from suite import DEVICE, Case, Target, targets_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastfusion as ff
from fastfusion.backends import cuda, triton
from fastfusion.ops.cross_attention_layer import MAX_LENGTH, OP

SMALL = {"batch": 2, "q_len": 9, "kv_len": 7, "dim": 24, "context_dim": 40, "heads": 2}
KERNELS = [t for t in targets_of(OP) if t.backend != "reference"]


def hide_rows(call: dict[str, Any]) -> None:
    """One query sees nothing, and one sequence has no context."""
    call["attn_mask"][3] = False
    padding = torch.zeros(2, 7, dtype=torch.bool, device=DEVICE)
    padding[1] = True
    call["key_padding_mask"] = padding


CASES = [
    Case("plain", "widths that fill no tile and no register", SMALL),
    Case("key_padding", "padding read, or its queries dropped", SMALL | {"mask": "key_padding"}),
    Case("bool_mask", "the mask of another head or row", SMALL | {"mask": "bool"}),
    Case("bias", "a mask that is added before the scale", SMALL | {"mask": "bias"}),
    Case("dead", "rows without keys", SMALL | {"mask": "bool"}, edit=hide_rows),
    Case(
        "norms",
        "a norm of the wrong sequence, or of the residual",
        SMALL | {"norms": "layer", "residual": True, "mask": "key_padding"},
    ),
    Case("rms", "a mean taken where there is none", SMALL | {"norms": "rms", "out_dim": 33}),
    Case("residual", "a residual of the output's width", SMALL | {"residual": True, "out_dim": 7}),
    Case(
        "projected", "keys and values that are given", SMALL | {"projected": True, "norms": "rms"}
    ),
    Case(
        "apart",
        "values of the keys' weight, or of what the norm has not seen",
        SMALL | {"apart": True, "norms": "layer", "residual": True, "mask": "key_padding"},
    ),
    Case(
        "value_context",
        "values of the keys' context, or of its width",
        SMALL | {"value_dim": 19, "mask": "key_padding"},
    ),
    Case("no_bias", "absent biases", SMALL | {"bias": False, "head_dim": 5}),
    Case("scale", "another scale", SMALL, {"scale": -0.3}),
    Case(
        "aligned",
        "several tiles of rows, features and width",
        {"batch": 2, "q_len": 70, "kv_len": 130, "dim": 128, "context_dim": 64, "heads": 4},
    ),
    Case("single", "one token, one number", SMALL | {"q_len": 1, "kv_len": 1, "context_dim": 1}),
    Case("no_batch", "an empty batch", SMALL | {"batch": 0}),
    Case("no_queries", "no queries", SMALL | {"q_len": 0}),
    Case("no_context", "no context", SMALL | {"kv_len": 0}),
]


class TestCrossAttentionLayer(LayerSuite):
    op = OP
    function = staticmethod(cross_attention_layer)
    plain = staticmethod(plain_cross_attention)
    cases = CASES
    outputs = 1
    bool_cases = ("key_padding", "bool_mask", "dead", "value_context")


def small(dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    return flat(OP.inputs(SMALL | more, dtype))


def dtype_of(target: Target) -> torch.dtype:
    return torch.float16 if target.backend == "cuda" else torch.float32


kernels = pytest.mark.parametrize("target", KERNELS, ids=str)


@kernels
def test_what_is_hidden_is_not_read(target: Target) -> None:
    for more in ({"norms": "layer"}, {"value_dim": 19}):
        call = small(dtype_of(target), mask="key_padding", **more)
        if target.backend == "cuda" and "v_weight" in call:
            continue  # not its
        (expected,) = target.call(cross_attention_layer, **call)
        for name in {"context", "value_context"} & call.keys():
            call[name][call["key_padding_mask"]] = torch.nan
        assert torch.equal(target.call(cross_attention_layer, **call)[0], expected)


def test_gradients_beside_what_is_hidden() -> None:
    call = small(mask="key_padding")
    call["context"][call["key_padding_mask"]] = torch.nan
    wanted = {k: v.requires_grad_() for k, v in leaves_of(call).items()}
    gradients = torch.autograd.grad(cross_attention_layer(**call).sum(), list(wanted.values()))
    assert all(g.isfinite().all() for g in gradients)


@kernels
def test_a_sample_alone_has_the_same_bits(target: Target) -> None:
    call = small(dtype_of(target), mask="key_padding", residual=True, batch=5)
    (together,) = target.call(cross_attention_layer, **call)
    for i in (0, 4):
        names = ("query", "context", "key_padding_mask", "residual")
        alone = call | {name: call[name][i : i + 1] for name in names}
        assert torch.equal(target.call(cross_attention_layer, **alone)[0][0], together[i])


def prefix(target: Target) -> str:
    """Of the names of a backend's ops."""
    return "" if target.backend == "cpu" else f"{target.backend}_"


@kernels
def test_compiled_and_exported(target: Target) -> None:
    """Without gradients the graph holds the kernel's op."""
    call = nested(small(dtype_of(target), mask="key_padding", norms="layer"))

    class Module(torch.nn.Module):
        def forward(self, query: Tensor, context: Tensor) -> Tensor:
            given = call | {"query": query, "context": context}
            return ff.cross_attention_layer(**given, backend=target.backend)

    inputs = call["query"], call["context"]
    with torch.no_grad():
        expected = Module()(*inputs)
        compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs), expected)
        program = torch.export.export(Module(), inputs)
    assert f"fastfusion.{prefix(target)}cross_attention_layer_forward" in str(program.graph)
    assert torch.equal(program.module()(*inputs), expected)


@kernels
def test_opcheck(target: Target) -> None:
    op = getattr(torch.ops.fastfusion, f"{prefix(target)}cross_attention_layer_forward").default
    options: list[dict[str, Any]] = [
        {},
        {"norms": "layer", "residual": True, "mask": "key_padding"},
    ]
    for more in options if target.backend == "cuda" else [*options, {"value_dim": 19}]:
        given = OP.call(**nested(small(dtype_of(target), **more)))
        torch.library.opcheck(op, tuple(given))


def test_compiled_with_gradients() -> None:
    call = small(mask="bias", norms="layer", residual=True)
    wanted = {k: v.requires_grad_() for k, v in leaves_of(call).items()}
    compiled = torch.compile(cross_attention_layer, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(**call).sin().sum(), list(wanted.values()))
    eager = torch.autograd.grad(cross_attention_layer(**call).sin().sum(), list(wanted.values()))
    torch.testing.assert_close(actual, eager)


@kernels
def test_transforms_are_the_references(target: Target) -> None:
    call = small(dtype_of(target), mask="key_padding")
    queries = torch.stack([call["query"]] * 3)
    with torch.no_grad():
        mapped = torch.vmap(
            lambda query: target.call(cross_attention_layer, **call | {"query": query})[0]
        )(queries)
        expected = cross_attention_layer(**call, backend="reference")
    torch.testing.assert_close(mapped, expected.expand(3, -1, -1, -1))
    with pytest.raises(ff.BackendUnavailableError, match="gradients"):
        wanted = call | {"out_weight": call["out_weight"].clone().requires_grad_()}
        cross_attention_layer(**wanted, backend=target.backend)


def test_autocast() -> None:
    call = small(norms="layer", mask="bias")
    with torch.autocast(DEVICE, torch.bfloat16):
        result = cross_attention_layer(**call)
    low = {k: v.bfloat16() if k in leaves_of(call) else v for k, v in call.items()}
    low["attn_mask"] = call["attn_mask"]
    assert torch.equal(result, cross_attention_layer(**low))


def test_flops() -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cross_attention_layer(**small(), backend="reference")
    assert counter.get_total_flops() == OP.cost(SMALL, torch.float32)[0]
    if triton.unavailable() is None:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            cross_attention_layer(**small(), backend="triton")
        assert counter.get_total_flops() == OP.cost(SMALL, torch.float32)[0]


def test_a_subclass_is_asked() -> None:
    class Asked(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            return func, len(args), sorted(kwargs or {})

    call = small(norms="layer")
    call["query_norm.weight"] = call["query_norm.weight"].as_subclass(Asked)
    func, count, names = cross_attention_layer(**call)
    assert func is ff.cross_attention_layer and count == 9 and "context_norm" in names


def test_attention_inside_follows_the_argument_and_the_block() -> None:
    call = nested(small())
    explained = ff.explain(ff.cross_attention_layer, **call, backend="triton")
    inside = ff.explain(ff.scaled_dot_product_attention, *(torch.randn(1, 2, 5, 12),) * 3).chosen
    assert explained.path == f"products in Triton, attention on {inside}"
    with ff.use_backend("triton"):
        assert str(ff.explain(ff.cross_attention_layer, **call).path).endswith("on triton")
    with ff.use_backend("reference"):
        explained = ff.explain(ff.cross_attention_layer, **call, backend="triton")
        assert str(explained.path).endswith("on triton")
        result = ff.cross_attention_layer(**call, backend="triton")
    torch.testing.assert_close(result, ff.cross_attention_layer(**call, backend="reference"))


@pytest.mark.skipif(cuda.unavailable() is not None, reason=f"no kernels: {cuda.unavailable()}")
def test_what_the_cuda_kernels_refuse() -> None:
    half = torch.float16

    def reasons(dtype: torch.dtype = half, **more: Any) -> str:
        with torch.no_grad():
            rows = dict(ff.explain(ff.cross_attention_layer, **nested(small(dtype, **more))).rows)
        return " ".join(rows["cuda"])

    assert reasons() == "" and reasons(norms="rms", residual=True, mask="bias") == ""
    assert reasons(kv_len=MAX_LENGTH + 1) == ""  # that is waiting, not refusing
    assert "float32" in reasons(torch.float32)
    assert "projected" in reasons(projected=True)
    assert "values alone" in reasons(apart=True) and "values alone" in reasons(value_dim=8)
    assert "widths above 2048" in reasons(context_dim=2049)
    assert reasons(context_dim=2048) == "" and reasons(context_dim=1792, norms="layer") == ""
    assert "norms wider than 1792" in reasons(context_dim=1793, norms="layer")
    assert "head dims above 256" in reasons(head_dim=257)


def test_wide_norms_are_left_to_the_reference() -> None:
    wide = nested(small(norms="layer", dim=16400, heads=1, head_dim=4, out_dim=4))
    with pytest.raises(ff.BackendUnavailableError, match="norms wider than 16384"):
        ff.cross_attention_layer(**wide, backend="triton")


X, C = torch.ones(2, 5, 8, device=DEVICE), torch.ones(2, 7, 6, device=DEVICE)
KV = torch.ones(2, 2, 7, 4, device=DEVICE)
LEGAL = {
    "query": X, "context": C, "q_weight": X.new_ones(8, 8), "q_bias": None,
    "kv_weight": X.new_ones(16, 6), "kv_bias": None, "out_weight": X.new_ones(3, 8),
    "out_bias": None, "num_heads": 2,
}  # fmt: skip
APART = {"kv_weight": X.new_ones(8, 6), "v_weight": X.new_ones(8, 6)}
Norm = ff.ops.Norm
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, "query must be a Tensor"),
    ({"query": None}, TypeError, "query must be a Tensor|context must have"),
    ({"query": X.int()}, TypeError, "query must be float16"),
    ({"query": X[0]}, ValueError, r"query must be \(batch, length, width\).*query \(5, 8\)"),
    ({"query": X[..., :0]}, ValueError, "query must be .*width above 0"),
    ({"context": C.double()}, TypeError, "context must have the dtype of query"),
    ({"context": C.to("meta")}, ValueError, "context must be on the device of query"),
    ({"context": C[:1]}, ValueError, "context must have the batch size"),
    ({"context": None}, TypeError, "context must be a Tensor"),
    ({"context": C[..., :5]}, ValueError, r"kv_weight must be \(2 \* inner, context_dim\)"),
    ({"q_weight": X[0, 0]}, ValueError, r"q_weight must be \(inner, query_dim\)"),
    ({"q_weight": X.new_ones(8, 7)}, ValueError, r"q_weight must be \(inner, query_dim\)"),
    ({"q_bias": X.new_ones(7)}, ValueError, r"q_bias must be \(8,\)"),
    ({"kv_weight": X.new_ones(15, 6)}, ValueError, "kv_weight must be"),
    ({"kv_weight": None}, TypeError, "kv_weight must be a Tensor"),
    ({"kv_bias": X.new_ones(8)}, ValueError, r"kv_bias must be \(16,\)"),
    ({"out_weight": X.new_ones(3, 7)}, ValueError, r"out_weight must be \(out_dim, inner\)"),
    ({"out_bias": X.new_ones(1)}, ValueError, r"out_bias must be \(3,\)"),
    ({"num_heads": 3}, ValueError, "num_heads must divide the features of q_weight, 8, got 3"),
    ({"num_heads": 0}, ValueError, "num_heads must divide"),
    ({"num_heads": 2.0}, TypeError, "num_heads must be an int"),
    ({"num_heads": True}, TypeError, "num_heads must be an int"),
    ({"residual": X}, ValueError, r"residual must have .*\(2, 5, 3\)"),
    ({"query_norm": (None, None, 1e-5)}, TypeError, "query_norm must be a fastfusion.ops.Norm"),
    ({"query_norm": Norm(X.new_ones(7))}, ValueError, r"query_norm.weight must be \(8,\)"),
    ({"context_norm": Norm(None, X.new_ones(8))}, ValueError, r"context_norm.bias .*\(6,\)"),
    ({"query_norm": Norm(eps="small")}, TypeError, "query_norm.eps must be a float"),
    ({"query_norm": Norm(eps=-1.0)}, ValueError, "query_norm.eps must not be negative"),
    ({"rms_norm": 1}, TypeError, "rms_norm must be a bool"),
    ({"scale": float("inf")}, ValueError, "scale must be finite"),
    ({"attn_mask": X.new_ones(5, 8)}, ValueError, "attn_mask must broadcast"),
    ({"attn_mask": 1.0}, TypeError, "attn_mask must be a Tensor"),
    ({"key_padding_mask": X.new_ones(2, 7)}, TypeError, "key_padding_mask must be bool"),
    ({"key_padding_mask": X.new_ones(2, 6).bool()}, ValueError, "key_padding_mask must broadcast"),
    ({"context": (KV, KV)}, ValueError, "kv_weight must be None where context is projected"),
    ({"context": (KV[:, :1], KV), "kv_weight": None}, ValueError, "the keys of context must be"),
    ({"context": (KV, KV[:, :, :3]), "kv_weight": None}, ValueError, "the values of context"),
    ({"context": (KV,), "kv_weight": None}, TypeError, "or a pair of keys and values"),
    ({"v_weight": X}, ValueError, r"kv_weight must be \(inner, context_dim\)"),
    (APART | {"v_weight": [1.0]}, TypeError, "v_weight must be a Tensor"),
    (APART | {"v_weight": X.new_ones(8, 5)}, ValueError, r"v_weight must be \(inner, value_dim\)"),
    (APART | {"v_weight": X.new_ones(7, 6)}, ValueError, r"v_weight must be .*\(8, 6\)"),
    (APART | {"v_weight": None}, ValueError, r"kv_weight must be \(2 \* inner, context_dim\)"),
    (APART | {"v_bias": X.new_ones(16)}, ValueError, r"v_bias must be \(8,\)"),
    (APART | {"v_scale": X.new_ones(8)}, TypeError, "v: weight must be uint8"),
    (APART | {"value_context": C[0]}, ValueError, "value_context must be"),
    (APART | {"value_context": C[:1]}, ValueError, "value_context must have the batch size"),
    (APART | {"value_context": C[:, :6]}, ValueError, "value_context must be as long as context"),
    (APART | {"value_context": C[..., :5]}, ValueError, r"v_weight must be \(inner, value_dim\)"),
    (APART | {"value_context": C.double()}, TypeError, "value_context must have the dtype"),
    (
        APART | {"value_context": C, "context_norm": Norm()},
        ValueError,
        "context_norm must be None beside value_context",
    ),
    ({"v_bias": X.new_ones(8)}, ValueError, "v_bias must be None without v_weight"),
    ({"v_scale": X.new_ones(8)}, ValueError, "v_scale must be None without v_weight"),
    ({"value_context": C}, ValueError, "value_context must be None without v_weight"),
    (
        {"context": (KV, KV), "kv_weight": None, "v_weight": X},
        ValueError,
        "v_weight must be None where context is projected",
    ),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=map(str, range(len(BAD))))
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference", None])
def test_bad_input(change: dict[str, Any], error: Any, match: str, backend: str | None) -> None:
    with pytest.raises(error, match=match):
        ff.cross_attention_layer(**{**LEGAL, "backend": backend, **change})


def test_the_reference_is_the_formula() -> None:
    kinds = ({}, {"projected": True}, {"apart": True}, {"value_dim": 19})
    for norms, kind in itertools.product((None, "layer", "rms"), kinds):
        call = flat(OP.inputs(SMALL | {"norms": norms, "mask": "bias"} | kind, torch.float64))
        result = cross_attention_layer(**call, backend="reference")
        torch.testing.assert_close(result, plain_cross_attention(**call)[0])
