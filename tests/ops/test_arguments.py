"""What callers really pass: operands that broadcast, mask objects, subclasses, other numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from suite import DEVICE, OpSuite, Target
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.flop_counter import FlopCounterMode

import fastfusion as ff
from fastfusion.ops import bidirectional_attention, scaled_dot_product_attention, varlen_attention

sdpa = ff.scaled_dot_product_attention


class Sdpa(OpSuite):
    op = scaled_dot_product_attention.OP


SDPA_TARGETS = pytest.mark.parametrize("target", Sdpa.targets(), ids=str)


def close(actual: Tensor, exact: Tensor) -> None:
    """By the rule, with the exact values rounded once as the plain result."""
    assert actual.shape == exact.shape
    rows = [t.reshape(1, -1) for t in (actual, exact.double(), exact.to(actual.dtype))]
    assert_accurate(*rows)


def qkv(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(s, dtype=dtype) for s in sizes]


BROADCASTS = {
    "query_head": ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "key_head": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 3, 7, 6)),
    "value_head": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 7, 6)),
    "both_kv_heads": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
    "query_batch": ((1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "key_batch": ((2, 3, 5, 8), (1, 3, 7, 8), (2, 3, 7, 6)),
    "all_mixed": ((1, 1, 5, 8), (2, 1, 7, 8), (1, 3, 7, 6)),
    "rank_5": ((1, 2, 1, 5, 8), (3, 1, 2, 7, 8), (1, 1, 2, 7, 6)),
    "rank_6": ((2, 1, 2, 1, 5, 8), (1, 3, 1, 2, 7, 8), (1, 1, 2, 2, 7, 6)),
}


@SDPA_TARGETS
@pytest.mark.parametrize("sizes", BROADCASTS.values(), ids=BROADCASTS)
def test_size_one_dimensions_broadcast(sizes: Any, target: Target) -> None:
    """The same as expanded operands, gradients included, in eager as in compiled code."""
    for dtype in (torch.float32, torch.float64) if target.isa is None else (torch.float32,):
        if dtype == torch.float64 and target.backend != "reference":
            continue
        leaves = [t.requires_grad_(target.differentiable) for t in qkv(*sizes, dtype=dtype)]
        leading = torch.broadcast_shapes(*(s[:-2] for s in sizes))
        wide = [t.expand(*leading, *t.shape[-2:]).contiguous() for t in leaves]
        results: list[list[Tensor]] = []
        functions = [sdpa] * 2
        if target in (Sdpa.targets()[0], Sdpa.targets()[-1]):  # the same road for every ISA
            torch._dynamo.reset()
            functions.append(torch.compile(sdpa, backend="aot_eager", fullgraph=True))
        for function, given in zip(functions, (wide, leaves, leaves), strict=False):
            (out,) = target.call(lambda f=function, g=given, **kw: f(*g, **kw))
            results.append([out])
            if out.requires_grad:
                results[-1] += torch.autograd.grad(out.sin().sum(), leaves)
        for others in results[1:]:
            assert len(others) == len(results[0])
            for expanded, narrow in zip(results[0], others, strict=True):
                close(narrow, expanded)


ALIGNED = {"upper": causal_upper_left, "lower": causal_lower_right}


@SDPA_TARGETS
@pytest.mark.parametrize("variant", ALIGNED)
@pytest.mark.parametrize("heads", [1, 2])
def test_masks_of_torch(variant: str, heads: int, target: Target) -> None:
    """torch's causal mask objects, whose own memory is empty, count as torch takes them."""
    query, key, value = qkv((2, heads, 3, 16), (2, heads, 7, 16), (2, heads, 7, 16))
    mask = ALIGNED[variant](3, 7)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), mask)
    (out,) = target.call(lambda **kw: sdpa(query, key, value, mask, **kw))
    assert type(out) is Tensor
    close(out, exact)


def test_masks_of_torch_elsewhere() -> None:
    query, key, value = qkv((2, 2, 3, 16), (2, 2, 7, 16), (2, 2, 7, 16))
    mask = causal_lower_right(3, 7)
    with_object = ff.bidirectional_attention(query, key, value, query, attn_mask=mask)
    with_words = ff.bidirectional_attention(
        query, key, value, query, is_causal=True, causal_alignment="bottom_right"
    )
    assert all(map(torch.equal, with_object, with_words))
    assert ff.explain(sdpa, query, key, value, mask).chosen is not None
    compiled = torch.compile(lambda *t: sdpa(*t, mask), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(query, key, value), sdpa(query, key, value, mask))
    with pytest.raises(ValueError, match=r"attn_mask.*\(3, 7\).*\(5, 7\)"):
        sdpa(torch.randn(2, 2, 5, 16), key, value, mask)
    with pytest.raises(ValueError, match="attn_mask.*is_causal"):
        sdpa(query, key, value, mask, is_causal=True)
    call = varlen_attention.inputs({"q_len": 3, "kv_len": 7, "head_dim": 4}, torch.float32)
    with pytest.raises(TypeError, match="attn_mask.*causal_alignment.*CausalBias"):
        ff.varlen_attention(**call, attn_mask=mask)


class Plain(Tensor):
    """A subclass that says nothing about functions: torch's own functions keep its type."""


class Watching(Tensor):
    asked: list[Any] = []

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        cls.asked.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


CALLS = {
    "scaled_dot_product_attention": scaled_dot_product_attention.inputs,
    "bidirectional_attention": bidirectional_attention.inputs,
    "varlen_attention": varlen_attention.inputs,
}


@pytest.mark.parametrize("name", CALLS)
def test_subclasses_are_asked(name: str) -> None:
    """As torch's functions ask them, whichever argument they are."""
    function = getattr(ff, name)
    call = CALLS[name]({"batch": 2, "q_len": 3, "kv_len": 7, "head_dim": 4}, torch.float32)
    expected = function(**call)
    for argument in [k for k, v in call.items() if isinstance(v, Tensor)]:
        for kind in (Plain, Watching):
            Watching.asked.clear()
            result = function(**{**call, argument: call[argument].as_subclass(kind)})
            first, exact = (r[0] if isinstance(r, tuple) else r for r in (result, expected))
            assert type(first) is kind
            assert torch.equal(first.as_subclass(Tensor), exact)
            assert kind is Plain or function in Watching.asked
    with torch.overrides.BaseTorchFunctionMode():
        again = function(**call)
    assert torch.equal(
        again[0] if isinstance(again, tuple) else again,
        expected[0] if isinstance(expected, tuple) else expected,
    )


@pytest.mark.parametrize(
    "scale", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), 1, np.int64(1)]
)
def test_scales_of_other_kinds(scale: Any) -> None:
    query, key, value = qkv((2, 2, 3, 16), (2, 2, 7, 16), (2, 2, 7, 16))
    number = float(scale)
    assert torch.equal(sdpa(query, key, value, scale=scale), sdpa(query, key, value, scale=number))
    a = ff.bidirectional_attention(query, key, value, query, scale=scale)
    b = ff.bidirectional_attention(query, key, value, query, scale=number)
    assert all(map(torch.equal, a, b))


def test_a_learned_scale_is_refused() -> None:
    query, key, value = qkv((2, 2, 3, 16), (2, 2, 7, 16), (2, 2, 7, 16))
    with pytest.raises(TypeError, match="scale.*gradient"):
        sdpa(query, key, value, scale=torch.tensor(0.5, requires_grad=True))


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor, lambda n: None])
def test_longest_sequences_of_other_kinds(kind: Any) -> None:
    call = varlen_attention.inputs(
        {"q_lens": [3, 5], "kv_lens": [7, 2], "head_dim": 8}, torch.float32
    )
    expected = ff.varlen_attention(**call)
    for name in ("max_seqlen_q", "max_seqlen_k"):
        assert torch.equal(ff.varlen_attention(**{**call, name: kind(call[name])}), expected)
    del call["max_seqlen_q"], call["max_seqlen_k"]
    assert torch.equal(ff.varlen_attention(**call), expected)
    compiled = torch.compile(ff.varlen_attention, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**call), expected)


def test_a_float32_mask_beside_float64() -> None:
    query, key, value = qkv((2, 2, 3, 16), (2, 2, 7, 16), (2, 2, 7, 16), dtype=torch.float64)
    mask = torch.randn(3, 7, requires_grad=True)
    exact = F.scaled_dot_product_attention(query, key, value, mask.double())
    out = sdpa(query, key, value, mask)
    close(out, exact)
    (grad,) = torch.autograd.grad(out.sin().sum(), mask)
    (exact_grad,) = torch.autograd.grad(exact.sin().sum(), mask)
    assert grad.dtype == torch.float32
    close(grad, exact_grad)


@SDPA_TARGETS
def test_heads_without_width(target: Target) -> None:
    """head_dim 0: all scores are 0, so each row is the mean of the values."""
    query, key, value = qkv((2, 2, 3, 0), (2, 2, 7, 0), (2, 2, 7, 16))
    query.requires_grad_(target.differentiable)
    (out,) = target.call(lambda **kw: sdpa(query, key, value, scale=1.0, **kw))
    close(out, value.double().mean(2, keepdim=True).expand(2, 2, 3, 16))
    if target.differentiable:
        (grad,) = torch.autograd.grad(out.sum(), query)
        assert grad.shape == query.shape
    with pytest.raises(ValueError, match="scale.*head_dim"):
        sdpa(query, key, value)


@SDPA_TARGETS
@pytest.mark.parametrize("sizes", [(7,), (1, 7), (2, 1), (1, 1), ()])
def test_padding_masks_broadcast(sizes: tuple[int, ...], target: Target) -> None:
    query, key, value = qkv((2, 2, 3, 16), (2, 2, 7, 16), (2, 2, 7, 16))
    mask = torch.zeros(sizes, dtype=torch.bool)
    if mask.dim() > 0:
        mask[..., mask.shape[-1] // 2 :] = True
    wide = mask.expand(2, 7).contiguous()
    (out,) = target.call(lambda **kw: sdpa(query, key, value, key_padding_mask=mask, **kw))
    (same,) = target.call(lambda **kw: sdpa(query, key, value, key_padding_mask=wide, **kw))
    assert torch.equal(out, same)
    both = (
        ff.bidirectional_attention(query, key, value, query, key_padding_mask=m)
        for m in (mask, wide)
    )
    assert all(map(torch.equal, *both))


def packed(**more: Any) -> dict[str, Any]:
    shape = {"q_lens": [3, 5], "kv_lens": [7, 2], "head_dim": 8, "heads": 2}
    return {**varlen_attention.inputs(shape, torch.float32), **more}


@pytest.mark.parametrize(
    "more", [{}, {"dropout_p": 0.1}, {"backend": "reference"}, {"is_causal": True}]
)
def test_packed_fakes(more: dict[str, Any]) -> None:
    """Nothing of an offset is read where it has no values, and traces do not bake them in."""
    call = packed(**more)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in call.items()}
        assert ff.varlen_attention(**fakes).shape == (8, 2, 8)
        if "backend" not in more:
            doubled = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
                       for k, v in fakes.items()}  # fmt: skip
            assert ff.varlen_attention(**doubled).dtype == torch.float64
            with torch.autocast(DEVICE, torch.bfloat16):
                assert ff.varlen_attention(**fakes).dtype == torch.bfloat16
    names = [k for k, v in call.items() if isinstance(v, Tensor)]
    options = {k: v for k, v in call.items() if k not in names}

    def run(*tensors: Tensor) -> Tensor:
        return ff.varlen_attention(**dict(zip(names, tensors, strict=True)), **options)

    for mode_name in ("fake", "symbolic"):
        traced = make_fx(run, tracing_mode=mode_name)(*(call[n] for n in names))
        torch.manual_seed(3)
        out = traced(*(call[n] for n in names))
        torch.manual_seed(3)
        close(out, run(*(call[n] for n in names)))


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_flops_of_packed_sequences_are_exact() -> None:
    call = packed()
    for name in ("query", "key", "value"):
        call[name].requires_grad_()
    forward = 2 * 2 * (3 * 7 + 5 * 2) * (8 + 8)
    assert flops(lambda: ff.varlen_attention(**call)) == forward
    both = flops(lambda: ff.varlen_attention(**call).sum().backward())
    assert both == forward + 2 * 2 * (3 * 7 + 5 * 2) * (3 * 8 + 2 * 8)
    layer = ff.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    lengths = [3, 5]
    jagged = torch.nested.nested_tensor([torch.randn(n, 16) for n in lengths], layout=torch.jagged)
    with torch.no_grad():
        counted = flops(lambda: layer(jagged))
    products = 2 * sum(lengths) * 16 * (3 * 16 + 16 + 2 * 32)
    assert counted == products + 2 * 2 * sum(n * n for n in lengths) * (8 + 8)


def test_explain_under_autocast() -> None:
    """It describes the call that runs: of the dtype that autocast casts to."""
    query, key, value = qkv((2, 2, 20, 16), (2, 2, 36, 16), (2, 2, 36, 16))
    with torch.autocast(DEVICE, torch.bfloat16):
        path = ff.explain(sdpa, query, key.bfloat16(), value).path
    assert path == ff.explain(sdpa, *(t.bfloat16() for t in (query, key, value))).path
