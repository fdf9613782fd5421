"""Layers of cross-attention whose weights are narrower than their tokens."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from layer_calls import cross_attention_layer, cross_modal_layer, flat, nested
from suite import needs_native
from torch import Tensor

import fastfusion as ff
from fastfusion.ops import cross_attention_layer as cross_attention
from fastfusion.ops import cross_modal_layer as cross_modal

Call = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NARROW = (torch.uint8, torch.bfloat16)
SMALL = {"batch": 2, "q_len": 9, "kv_len": 7, "dim": 24, "context_dim": 40, "heads": 2}
LONG = {"batch": 2, "q_len": 20, "kv_len": 36, "dim": 64, "context_dim": 80, "heads": 4}
ATTENTION = [
    SMALL,
    SMALL | {"norms": "layer", "residual": True, "mask": "key_padding"},
    SMALL | {"norms": "rms", "out_dim": 33, "mask": "bias", "bias": False},
    SMALL | {"projected": True, "mask": "bool"},
    LONG | {"residual": True},
    SMALL | {"apart": True, "norms": "layer", "mask": "key_padding"},
    SMALL | {"value_dim": 19, "residual": True},
    LONG | {"value_dim": 64, "bias": False},
]
MODAL = [
    SMALL | {"ffn": 20},
    SMALL | {"ffn": 20, "norm_first": True, "mask": "both_padding", "activation": "relu"},
    LONG | {"ffn": 70, "mask": "bias", "embed_dim": 32, "bias": False},
]


def names_of(call: Call) -> list[str]:
    """Of the products of a flat call."""
    weights = [name for name in call if name.endswith("_weight")]
    return [name.removesuffix("_weight") for name in weights if call[name] is not None]


def in_int8(call: Call) -> Call:
    """The flat call with weights of 8-bit integers."""
    narrow = dict(call)
    for name in names_of(call):
        parts = 2 if name.endswith(("kv", "in")) and "v_weight" not in call else 1
        weight, scale = ff.ops.pack_int8(call[f"{name}_weight"].float(), parts)
        narrow |= {f"{name}_weight": weight, f"{name}_scale": scale}
    return narrow


def in_bfloat16(call: Call) -> Call:
    return call | {f"{name}_weight": call[f"{name}_weight"].bfloat16() for name in names_of(call)}


def partly(call: Call) -> Call:
    """One of them alone: the attention is in the dtype of the tokens."""
    narrow = in_int8(call)
    name = "v" if "v_weight" in call else names_of(call)[0]
    return call | {key: narrow[key] for key in (f"{name}_weight", f"{name}_scale")}


def in_double(call: Call) -> Call:
    """All numbers in float64 but the scales, which stay those of the integers."""
    return {
        name: value.double()
        if isinstance(value, Tensor) and value.is_floating_point() and not name.endswith("_scale")
        else value
        for name, value in call.items()
    }


def linear(of: Any, name: str, x: Tensor, **more: Any) -> Tensor:
    weight, bias = getattr(of, f"{name}_weight"), getattr(of, f"{name}_bias")
    scale = getattr(of, f"{name}_scale")
    return ff.linear(x, weight, bias, weight_scale=scale, backend="cpu", **more)


def norm(x: Tensor, of: Any, rms: bool = False) -> Tensor:
    if of is None:
        return x
    return ff.norm(x, of.weight, of.bias, eps=of.eps, rms=rms, backend="cpu")


def heads_of(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attention_dtype(x: Tensor, *weights: Tensor) -> torch.dtype:
    narrow = x.dtype == torch.float32 and all(w.dtype in NARROW for w in weights)
    return torch.bfloat16 if narrow else x.dtype


def cross_attention_by_ops(call: Call) -> tuple[Tensor, ...]:
    c = cross_attention._call(cross_attention.Arguments(**nested(call)))
    given, rms = nested(call), bool(call.get("rms_norm"))
    (q,) = heads_of(linear(c, "q", norm(c.query, given.get("query_norm"), rms)), 1, c.num_heads)
    k, v, dtype = c.key, c.value, c.query.dtype
    if c.context is not None:
        asked = norm(c.context, given.get("context_norm"), rms)
        weights = (c.q_weight, c.kv_weight)
        if c.v_weight is None:
            k, v = heads_of(linear(c, "kv", asked), 2, c.num_heads)
        else:
            values = asked if c.value_context is None else c.value_context
            (k,) = heads_of(linear(c, "kv", asked), 1, c.num_heads)
            (v,) = heads_of(linear(c, "v", values), 1, c.num_heads)
            weights += (c.v_weight,)
        dtype = attention_dtype(c.query, *weights)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    out = ff.scaled_dot_product_attention(
        q, k, v, c.attn_mask, key_padding_mask=c.key_padding_mask, backend="cpu"
    )
    rows = out.to(c.query.dtype).transpose(1, 2).flatten(2)
    return (linear(c, "out", rows, residual=c.residual),)


def cross_modal_by_ops(call: Call) -> tuple[Tensor, ...]:
    given = cross_modal.Arguments(**nested(call))
    weights, tokens = (given.visual_weights, given.text_weights), [given.visual, given.text]
    scored = [
        norm(x, w.norm1) if given.norm_first else x for x, w in zip(tokens, weights, strict=True)
    ]
    dtype = attention_dtype(tokens[0], *(w.in_weight for w in weights))
    (q, to_text), (k, to_visual) = (
        (t.to(dtype) for t in heads_of(linear(w, "in", x), 2, given.num_heads))
        for x, w in zip(scored, weights, strict=True)
    )
    attended = ff.bidirectional_attention(
        q, k, to_visual, to_text, attn_mask=given.attn_mask,
        query_padding_mask=given.visual_padding_mask, key_padding_mask=given.text_padding_mask,
        backend="cpu",
    )  # fmt: skip
    results = []
    for x, w, out in zip(tokens, weights, attended, strict=True):
        rows = out.to(x.dtype).transpose(1, 2).flatten(2)
        y = linear(w, "out", rows, residual=x)
        y = y if given.norm_first else norm(y, w.norm1)
        fed = norm(y, w.norm2) if given.norm_first else y
        hidden = linear(w, "linear1", fed, activation=given.activation)
        y = linear(w, "linear2", hidden, residual=y)
        results.append(y if given.norm_first else norm(y, w.norm2))
    return tuple(results)


def run_attention(**call: Any) -> tuple[Tensor, ...]:
    return (cross_attention_layer(**call),)


LAYERS: list[tuple[Any, Callable[..., Any], Callable[[Call], tuple[Tensor, ...]], Call]] = [
    *((cross_attention.OP, run_attention, cross_attention_by_ops, s) for s in ATTENTION),
    *((cross_modal.OP, cross_modal_layer, cross_modal_by_ops, s) for s in MODAL),
]
layers = pytest.mark.parametrize(
    ("op", "function", "by_ops", "shape"),
    LAYERS,
    ids=[f"{o.name}-{i}" for i, (o, *_) in enumerate(LAYERS)],
)


def changes(dtype: torch.dtype) -> tuple[Callable[[Call], Call], ...]:
    return (in_int8, in_bfloat16, partly) if dtype == torch.float32 else (in_int8,)


def narrow_calls(op: Any, shape: Call) -> Iterator[Call]:
    for dtype in DTYPES:
        for change in changes(dtype):
            yield change(flat(op.inputs(shape, dtype)))


@layers
@needs_native
def test_bits_of_its_ops(isa: str, op: Any, function: Any, by_ops: Any, shape: Call) -> None:
    for call in narrow_calls(op, shape):
        for ours, theirs in zip(function(**call, backend="cpu"), by_ops(call), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@layers
@needs_native
def test_accurate(isa: str, op: Any, function: Any, by_ops: Any, shape: Call) -> None:
    """Against the layer whose attention and activations round nowhere, but as 8 bits do."""
    for change in changes(torch.float32):
        call = change(flat(op.inputs(shape, torch.float32)))
        exact = function(**in_double(call), backend="reference")
        formula = function(**call, backend="reference")
        for each in zip(function(**call, backend="cpu"), exact, formula, strict=True):
            assert_accurate(*(t.reshape(1, -1) for t in each))


@layers
@needs_native
def test_a_sample_alone_has_the_same_bits(op: Any, function: Any, by_ops: Any, shape: Call) -> None:
    call = in_int8(flat(op.inputs(shape | {"batch": 3}, torch.float32)))
    together = function(**call)
    batched = ("query", "context", "context.0", "context.1", "value_context", "residual", "visual",
               "text",
               "key_padding_mask", "visual_padding_mask", "text_padding_mask")  # fmt: skip
    alone = {n: t[1:2] if n in batched and t is not None else t for n, t in call.items()}
    for one, among in zip(function(**alone), together, strict=True):
        assert torch.equal(one[0], among[1])


@needs_native
@pytest.mark.parametrize("op", [cross_attention.OP, cross_modal.OP], ids=lambda op: op.name)
class TestTorch:
    def call(self, op: Any, change: Any = in_int8) -> Call:
        return nested(change(flat(op.inputs(SMALL | {"ffn": 20}, torch.float32))))

    def run(self, op: Any, **call: Any) -> Any:
        return getattr(ff, op.name)(**call)

    def test_opcheck(self, op: Any) -> None:
        module = cross_attention if op is cross_attention.OP else cross_modal
        for change in (in_int8, in_bfloat16):
            given = module._call(module.Arguments(**self.call(op, change)))
            kernel = getattr(torch.ops.fastfusion, f"{op.name}_forward").default
            torch.library.opcheck(kernel, tuple(given))

    def test_compiled_and_exported(self, op: Any) -> None:
        call = self.call(op)
        names = list(call)[:2]

        class Module(torch.nn.Module):
            def forward(self, first: Tensor, second: Tensor) -> Any:
                return getattr(ff, op.name)(**call | dict(zip(names, (first, second), strict=True)))

        inputs = call[names[0]], call[names[1]]
        with torch.no_grad():
            expected = Module()(*inputs)
            compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
            program = torch.export.export(Module(), inputs)
            assert f"fastfusion.{op.name}_forward" in str(program.graph)
            for result in (compiled(*inputs), program.module()(*inputs)):
                torch.testing.assert_close(result, expected, rtol=0.0, atol=0.0)

    def test_integers_have_no_gradient(self, op: Any) -> None:
        """Nor a wrong one, in a layer whose residual has one."""
        call = self.call(op)
        first = next(iter(call))
        call[first].requires_grad_()
        result = self.run(op, **call)
        result = result if isinstance(result, Tensor) else result[0]
        with pytest.raises(RuntimeError, match="8-bit integers has no derivative"):
            result.sum().backward()

    def test_gradients_beside_bfloat16(self, op: Any) -> None:
        call = self.call(op, in_bfloat16)
        first = next(iter(call))
        call[first].requires_grad_()
        result = self.run(op, **call)
        result = result if isinstance(result, Tensor) else result[0]
        (gradient,) = torch.autograd.grad(result.square().sum(), call[first])
        assert gradient.isfinite().all() and gradient.abs().max() > 0

    def test_autocast_leaves_scales(self, op: Any) -> None:
        call = self.call(op)
        with torch.autocast("cpu", torch.bfloat16):
            result = self.run(op, **call)
        result = result if isinstance(result, Tensor) else result[0]
        assert result.dtype == torch.bfloat16 and result.isfinite().all()

    def test_others_refuse_by_name(self, op: Any) -> None:
        with pytest.raises(ff.BackendUnavailableError, match="weights narrower than the tokens"):
            self.run(op, **self.call(op), backend="triton")

    def test_explain(self, op: Any) -> None:
        for change, words in ((in_int8, "packed 8-bit weights"), (in_bfloat16, "in bfloat16")):
            report = str(ff.explain(getattr(ff, op.name), **self.call(op, change)))
            assert words in report and "attention in bfloat16" in report

    def test_bad_input(self, op: Any) -> None:
        call = flat(self.call(op))
        name = names_of(call)[0]
        weight, scale = call[f"{name}_weight"], call[f"{name}_scale"]
        for change, error, match in (
            ({f"{name}_scale": None}, TypeError, "weight must be float16"),
            ({f"{name}_scale": scale.double()}, TypeError, "weight_scale must be float32"),
            ({f"{name}_weight": weight.int()}, TypeError, "weight must be uint8"),
            ({f"{name}_weight": weight[:, :, :-1]}, ValueError, "weight must be packed"),
            ({f"{name}_bias": torch.ones(3)}, ValueError, r"bias must be \(features,\)"),
        ):  # fmt: skip
            for backend in ("cpu", "reference", None):
                with pytest.raises(error, match=match):
                    self.run(op, **nested(call | change), backend=backend)
