"""A whole layer of attention from one sequence to another: projections, attention, projection.

    out = out_proj(concat_h(softmax(scale * Q_h K_h^T + bias) V_h)) + residual

with Q = q_proj(norm_q(query)) and K, V = kv_proj(norm_c(context)) (Vaswani et al., "Attention Is
All You Need", 2017, sections 3.2.2 and 3.2.3); norms and residual are left out where they are not
given. Weights are those of torch.nn.Linear, keys before values in `kv_weight`, or one of each. What
the masks hide is never read into a result.

On a GPU that is three launches: projections of both sequences, attention, projection; CUDA's first
one does the norms too, Triton's kernels have a launch for them, and one for a weight of values.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fastfusion.backends import cpu, cuda, triton
from fastfusion.core import arguments, layers
from fastfusion.core import reference as formulas
from fastfusion.core.layers import Norm
from fastfusion.core.op import Implementation, Op, never_refuses
from fastfusion.core.score_policy import Policy
from fastfusion.core.torch_op import Definition
from fastfusion.ops import _keys_and_values as _kv
from fastfusion.ops import linear as _linear
from fastfusion.ops import scaled_dot_product_attention as _attention
from fastfusion.ops._in_steps import cross_attention_in_steps
from fastfusion.ops._parts import (
    NARROW_WEIGHTS,
    alike_of,
    attention_dtype,
    attention_path,
    check_any_product,
    linear_call,
    normals,
    part_of,
    random_mask,
    some_padding,
)

# Rows have to fit into the shared memory of every GPU, 16 at a time, beside the weights of a norm.
_MAX_WIDTH, _MAX_NORM_WIDTH = 2048, 1792
# Of either sequence. Beyond it the tiles of a library for large matrices are better than those of
# the CUDA kernels; the choice looks at no batch size, so that batch mates change no bit.
MAX_LENGTH = 512

_is_compiling = torch.compiler.is_compiling


class Arguments(NamedTuple):
    """Those of the public function, in its order."""

    query: Any
    context: Any
    q_weight: Any
    q_bias: Any
    kv_weight: Any
    kv_bias: Any
    out_weight: Any
    out_bias: Any
    num_heads: Any
    # By name only:
    attn_mask: Any = None
    key_padding_mask: Any = None
    residual: Any = None
    query_norm: Any = None
    context_norm: Any = None
    rms_norm: Any = False
    scale: Any = None
    q_scale: Any = None
    kv_scale: Any = None
    out_scale: Any = None
    v_weight: Any = None
    v_bias: Any = None
    v_scale: Any = None
    value_context: Any = None
    backend: Any = None


_POSITIONAL = 9


class Call(NamedTuple):
    """What an implementation takes; csrc/torch has its twin."""

    query: Tensor  # (B, Lq, query_dim)
    context: Tensor | None  # (B, Lk, context_dim); None where it is projected already, as
    key: Tensor | None  # (B, H, Lk, D)
    value: Tensor | None  # (B, H, Lk, D)
    q_weight: Tensor  # (H * D, query_dim), or packed, as every weight
    q_bias: Tensor | None
    kv_weight: Tensor | None  # (2 * H * D, context_dim), keys before values; or of keys alone
    kv_bias: Tensor | None
    out_weight: Tensor  # (out_dim, H * D)
    out_bias: Tensor | None
    residual: Tensor | None  # (B, Lq, out_dim)
    query_norm_weight: Tensor | None
    query_norm_bias: Tensor | None
    context_norm_weight: Tensor | None
    context_norm_bias: Tensor | None
    attn_mask: Tensor | None  # broadcasts to (B, H, Lq, Lk)
    key_padding_mask: Tensor | None  # (B, Lk)
    num_heads: int
    scale: float | None = None
    query_norm_eps: float | None = None  # None: no norm
    context_norm_eps: float | None = None
    rms_norm: bool = False
    q_scale: Tensor | None = None  # (H * D,), of packed weights
    kv_scale: Tensor | None = None
    out_scale: Tensor | None = None
    v_scale: Tensor | None = None
    v_weight: Tensor | None = None  # (H * D, context_dim), or of value_context
    v_bias: Tensor | None = None
    value_context: Tensor | None = None  # (B, Lk, value_dim), where it is not the context

    def linear(self, name: str, x: Tensor, residual: Tensor | None = None) -> _linear.Call:
        return linear_call(self, name, x, residual)

    @property
    def inner(self) -> int:  # features of all heads
        return self.linear("q", self.query).features

    @property
    def out_dim(self) -> int:
        return self.linear("out", self.query).features

    @property
    def attention_dtype(self) -> torch.dtype:
        """Of the attention inside, as in `encoder_layer`."""
        if self.kv_weight is None:
            return self.query.dtype
        weights = (self.q_weight, self.kv_weight, self.v_weight)
        return attention_dtype(self.query, *(w for w in weights if w is not None))

    def has_narrow_weights(self) -> bool:  # than the tokens
        parts = (part_of(self, name) for name in ("q", "kv", "v", "out"))
        return any(w is not None and _linear.has_own_dtype(self.query, w, s) for w, _, s in parts)

    def head_dims(self) -> tuple[int, ...]:
        return (self.inner // self.num_heads,)

    def kv_len(self) -> int:
        given: Any = self.key if self.context is None else self.context
        kv_len: int = given.shape[-2]
        return kv_len

    def conditions(self) -> Iterator[Any]:
        """What holds for every call; a mask that does not broadcast raises."""
        query, heads = self.query, self.num_heads
        given = (
            self.context, self.key, self.value, self.residual, self.query_norm_weight,
            self.query_norm_bias, self.context_norm_weight, self.context_norm_bias,
            self.value_context,
        )  # fmt: skip
        yield arguments.are_alike(query, *[t for t in given if t is not None])
        batch, q_len, query_dim = query.shape
        inner = self.inner
        yield heads > 0 and query_dim > 0 and inner > 0
        yield inner % heads == 0
        yield from self.linear("q", query).conditions()
        yield from self.linear("out", query.new_empty(batch, q_len, inner)).conditions()
        yield from layers.vector_fits(self.query_norm_weight, query_dim)
        yield from layers.vector_fits(self.query_norm_bias, query_dim)
        yield from _kv.conditions(self, batch, inner)
        kv_len = self.kv_len()
        if self.residual is not None:
            yield from layers.sequence_fits(self.residual, batch, q_len, self.out_dim)
        yield arguments.mask_fits(self.attn_mask, query, batch, heads, q_len, kv_len)
        yield from arguments.padding_fits(self.key_padding_mask, query, batch, kv_len)
        yield arguments.numbers_fit(None, query, self.scale)


def cross_attention_layer(
    query: Tensor,
    context: Tensor | tuple[Tensor, Tensor],
    q_weight: Tensor,
    q_bias: Tensor | None,
    kv_weight: Tensor | None,
    kv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    residual: Tensor | None = None,
    query_norm: Norm | None = None,
    context_norm: Norm | None = None,
    rms_norm: bool = False,
    scale: float | None = None,
    q_scale: Tensor | None = None,
    kv_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    v_weight: Tensor | None = None,
    v_bias: Tensor | None = None,
    v_scale: Tensor | None = None,
    value_context: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """out_proj(attention(q_proj(query), kv_proj(context))) + residual.

    Args:
        query: (batch, q_len, query_dim), float32, bfloat16, float16 or float64.
        context: (batch, kv_len, context_dim), of the same dtype; or, with `kv_weight` None, its
            keys and values, each (batch, num_heads, kv_len, head_dim).
        q_weight: (inner, query_dim), as torch.nn.Linear keeps it; inner is num_heads * head_dim.
        q_bias: (inner,), or None.
        kv_weight: (2 * inner, context_dim), the keys' features before the values'; beside
            `v_weight` the keys' alone, (inner, context_dim).
        kv_bias: (2 * inner,), beside `v_weight` (inner,), or None.
        out_weight: (out_dim, inner).
        out_bias: (out_dim,), or None.
        num_heads: number of heads.
        attn_mask: broadcastable to (batch, num_heads, q_len, kv_len): bool, True = attend, or a
            float bias (of the query's dtype or float32) that is added to the scores.
        key_padding_mask: bool, broadcastable to (batch, kv_len), True = ignore this position of the
            context; what it hides is never read into a result.
        residual: (batch, q_len, out_dim), added to the output.
        query_norm, context_norm: `fastfusion.ops.Norm`, of the inputs before they are projected.
        rms_norm: whether these are RMSNorms.
        scale: factor of the scores, any finite number; 1 / sqrt(head_dim) by default.
        q_scale, kv_scale, out_scale: of weights of 8-bit integers, as `weight_scale` of `linear`,
            which also takes weights of bfloat16 or float16 beside tokens of float32, and says how
            they are multiplied. Steps hand over numbers of the dtype of the query then, and where
            no weight of queries, keys or values has more than bfloat16, attention is in bfloat16.
        v_weight, v_bias: of values, where these are no part of `kv_weight`: (inner, context_dim)
            and (inner,), or None.
        v_scale: as the other scales.
        value_context: (batch, kv_len, value_dim), what `v_weight`, (inner, value_dim), projects in
            the place of the context. It goes with no `context_norm`.
        backend: "cpu", "cuda", "triton" or "reference" to insist on one; None chooses. Gradients
            are the reference's. Triton's products stand around the attention that is chosen there.

    Returns:
        (batch, q_len, out_dim), contiguous, in the dtype of the query.

    Raises:
        TypeError: an argument is not of the type or dtype named above.
        ValueError: shapes, devices or numbers that do not fit; the message prints them.
        BackendUnavailableError: `backend` cannot run this call; the message says why.
    """
    given = Arguments(
        query, context, q_weight, q_bias, kv_weight, kv_bias, out_weight, out_bias, num_heads,
        attn_mask, key_padding_mask, residual, query_norm, context_norm, rms_norm, scale, q_scale,
        kv_scale, out_scale, v_weight, v_bias, v_scale, value_context, backend,
    )  # fmt: skip
    if not _is_compiling():
        tensors = tuple(_tensors(given).values())
        masks = (attn_mask, key_padding_mask)
        if has_torch_function_variadic(*tensors, *masks):
            answer = arguments.ask_torch_function(
                cross_attention_layer, given, _POSITIONAL, (*tensors, *masks)
            )
            if answer is not NotImplemented:
                return answer
        if _is_plain(given):
            result = OP.attempt(backend, _call(given), False)
            if result is not None:
                return result
    output: Tensor = OP.run(backend, normalize(given), False)
    return output


def _tensors(given: Arguments) -> dict[str, Any]:
    """By name, those that are given, but for the masks."""
    return layers.tensors_of(
        query=given.query, context=given.context, q_weight=given.q_weight, q_bias=given.q_bias,
        kv_weight=given.kv_weight, kv_bias=given.kv_bias, out_weight=given.out_weight,
        out_bias=given.out_bias, residual=given.residual, query_norm=given.query_norm,
        context_norm=given.context_norm, q_scale=given.q_scale, kv_scale=given.kv_scale,
        out_scale=given.out_scale, v_weight=given.v_weight, v_bias=given.v_bias,
        v_scale=given.v_scale, value_context=given.value_context,
    )  # fmt: skip


def _is_plain(given: Arguments) -> bool:
    """Whether an eager call may be tried with these arguments as they came."""
    return (
        type(given.num_heads) is int
        and given.num_heads > 0
        and type(given.rms_norm) is bool
        and type(given.attn_mask) in arguments.PLAIN
        and (given.scale is None or type(given.scale) is float)
        and all(
            n is None or layers.is_plain_norm(n) for n in (given.query_norm, given.context_norm)
        )
        and (not isinstance(given.context, tuple) or len(given.context) == 2)
    )


def _call(given: Arguments) -> Call:
    """Arguments as implementations take them."""
    projected = isinstance(given.context, tuple)
    context, key, value = (None, *given.context) if projected else (given.context, None, None)
    (q_norm, q_shift, q_eps), (k_norm, k_shift, k_eps) = (
        (None, None, None) if norm is None else norm
        for norm in (given.query_norm, given.context_norm)
    )
    values: list[Any] = [
        given.query, context, key, value, *given[2:8], given.residual, q_norm, q_shift, k_norm,
        k_shift, given.attn_mask, given.key_padding_mask, given.num_heads, given.scale, q_eps,
        k_eps, given.rms_norm, given.q_scale, given.kv_scale, given.out_scale, given.v_scale,
        given.v_weight, given.v_bias, given.value_context,
    ]  # fmt: skip
    return Call(*values)


def check(given: Arguments) -> None:
    """Raise TypeError or ValueError for arguments that are not legal."""
    for name in ("query_norm", "context_norm"):
        if getattr(given, name) is not None:
            layers.check_is_norm(name, getattr(given, name))
    tensors = _tensors(given)
    arguments.check_tensors(**alike_of(tensors, given.query))
    sizes = arguments.shapes(**tensors)
    for name in ("query", "context"):
        if getattr(given, name) is None:
            raise TypeError(f"{name} must be a Tensor, got NoneType")
    query, heads = given.query, given.num_heads
    batch = query.shape[0] if query.dim() else 0
    layers.check_sequence("query", query, batch, sizes)
    inner = check_any_product("q", part_of(given, "q"), query, None, "(inner, query_dim)", sizes)
    layers.check_heads(heads, inner, "the features of q_weight", sizes)
    gathered = query.new_empty(0, inner)
    out_dim = check_any_product(
        "out", part_of(given, "out"), gathered, None, "(out_dim, inner)", sizes
    )
    kv_len = _kv.check(given, (batch, heads), inner, sizes)
    if given.query_norm is not None:
        layers.check_norm("query_norm", given.query_norm, query.shape[2], sizes)
    expected = (batch, query.shape[1], out_dim)
    if given.residual is not None and tuple(given.residual.shape) != expected:
        raise ValueError(f"residual must have the shape of the output, {expected}, got {sizes}")
    target = (batch, heads, query.shape[1], kv_len)
    arguments.check_attn_mask(given.attn_mask, query, target, sizes)
    arguments.check_padding_mask(
        "key_padding_mask", given.key_padding_mask, query, (batch, kv_len), sizes
    )
    arguments.check_scale(given.scale, query)
    arguments.check_flag("rms_norm", given.rms_norm)


def normalize(given: Arguments) -> Call:
    """Public arguments, cast as autocast asks and checked, as every implementation takes them."""
    dtype = arguments.autocast_dtype(arguments.device_type_of(given.query))
    mask = arguments.autocast_mask(dtype, given.attn_mask)
    given = layers.cast(dtype, given)._replace(attn_mask=mask)
    if not _is_compiling():
        check(given)
    call = _call(given._replace(scale=arguments.number("scale", given.scale)))
    padding = call.key_padding_mask
    if padding is not None:
        padding = padding.expand(call.query.shape[0], call.kv_len())
    return call._replace(key_padding_mask=padding)


def run_reference(call: Call, lse: bool) -> Any:
    """The definition."""
    acc, heads = formulas.accumulation_dtype(call.query.dtype), call.num_heads
    if call.has_narrow_weights():
        return cross_attention_in_steps(call)

    def project(name: str, x: Tensor) -> Tensor:
        weight, bias, _ = part_of(call, name)
        return layers.linear(x, weight, bias)

    def normalize(name: str, x: Tensor) -> Tensor:
        weight, bias, eps = (getattr(call, f"{name}_norm_{s}") for s in ("weight", "bias", "eps"))
        result: Tensor = layers.normalized(x, weight, bias, eps, call.rms_norm)
        return result

    query = formulas.cast(call.query, acc)
    if call.query_norm_eps is not None:
        query = normalize("query", query)
    (q,) = layers.heads_of(project("q", query), 1, heads)
    k, v = _kv.keys_and_values(call, acc, project, partial(normalize, "context"))
    out, _ = formulas.attention(
        Policy(), q, k, v, call.attn_mask, call.key_padding_mask, None, 0.0, call.scale
    )
    out = project("out", layers.rows_of(out))
    if call.residual is not None:
        out = out + formulas.cast(call.residual, acc)
    return formulas.cast(out, call.query.dtype)


def _fake(call: Call) -> Tensor:
    return call.query.new_empty(*call.query.shape[:2], call.out_dim)


def _flops(call: Call, backward: bool) -> int:
    (batch, q_len, query_dim), kv_len = call.query.shape, call.kv_len()
    out_dim, inner = call.out_dim, call.inner
    products = q_len * inner * (query_dim + out_dim) + 2 * q_len * kv_len * inner
    products += sum(kv_len * parts * inner * x.shape[2] for _, x, parts in _kv.projections(call))
    return 2 * batch * products * (2 if backward else 1)


def _attend(call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Between Triton's products."""
    return _attention.scaled_dot_product_attention(
        query, key, value, call.attn_mask, scale=call.scale,
        key_padding_mask=call.key_padding_mask, backend=triton.attention_inside(),
    )  # fmt: skip


DEFINITION = Definition(
    "cross_attention_layer", Call, gradients=16, results=1, outputs=1, fake=_fake,
    reference=lambda call: (run_reference(call, False),), flops=_flops, last_gradients=3,
)  # fmt: skip
_CPU = cpu.forward_op(DEFINITION)
_CUDA = cuda.CudaOp(DEFINITION)
_TRITON = triton.layer_op(DEFINITION, "layer.fusion:cross_attention_layer", _attend)


def _norm_widths(call: Call) -> Iterator[int]:
    if call.query_norm_eps is not None:
        yield call.query.shape[2]
    if call.context_norm_eps is not None and call.context is not None:
        yield call.context.shape[2]


def _triton_refuses(call: Call) -> Sequence[str]:
    reasons = triton.refuses_layer(call, DEFINITION, _norm_widths(call))
    return reasons or ((NARROW_WEIGHTS,) if call.has_narrow_weights() else ())


def _triton_path(call: Call) -> str:
    """Which attention stands between the products."""
    query, batch = call.query, call.query.shape[0]
    (head_dim,), heads = call.head_dims(), call.num_heads
    q, k = (
        query.new_empty(1).expand(batch, heads, length, head_dim)
        for length in (query.shape[1], call.kv_len())
    )
    attention = _attention.Call(
        q, k, k, call.attn_mask, call.key_padding_mask, None, None, 0.0, False, False, call.scale,
        False,
    )  # fmt: skip
    chosen = _attention.OP.select(triton.attention_inside(), attention).backend
    return f"products in Triton, attention on {chosen}"


def _cuda_refuses(call: Call) -> Sequence[str]:
    reasons = [*cuda.refuses(call, DEFINITION)]
    query, context = call.query, call.context
    if query.is_cpu and cuda.emulated is None:
        return reasons
    if call.has_narrow_weights():
        reasons.append(NARROW_WEIGHTS)
    if query.dtype == torch.float32:
        reasons.append("float32 is left to Triton and the reference")
    if context is None:
        reasons.append("a context that is projected already is left to Triton and the reference")
        return reasons
    if call.v_weight is not None:
        reasons.append("a weight of values alone is left to Triton and the reference")
    if max(query.shape[2], context.shape[2], call.inner) > _MAX_WIDTH:
        reasons.append(f"widths above {_MAX_WIDTH} are left to Triton and the reference")
    elif any(width > _MAX_NORM_WIDTH for width in _norm_widths(call)):
        reasons.append(f"norms wider than {_MAX_NORM_WIDTH} are left to Triton and the reference")
    return reasons


def _cuda_waits(call: Call) -> bool:
    """Whether the CUDA kernels leave a call that they could run to others: to Triton's where these
    run, and long eager ones. Compiled code ignores lengths."""
    if cuda.emulates(call):
        return True
    if not _is_compiling() and max(call.query.shape[1], call.kv_len()) > MAX_LENGTH:
        return True
    return not _triton_refuses(call)


def _cpu_refuses(call: Call) -> Sequence[str]:
    return cpu.refuses_gradient(call, DEFINITION)


def _cpu_path(call: Call) -> str:
    ways = {_linear.cpu_path(call.linear(name, call.query)) for name in ("q", "out")}
    ways |= {_linear.cpu_path(call.linear(name, x)) for name, x, _ in _kv.projections(call)}
    ways |= attention_path(call.query, call.attention_dtype)
    return f"{cpu.isa()}, one call, {', '.join(sorted(ways))}"


def inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: Any = None, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of a legal call: tokens normally distributed, weights as in a trained
    layer, where no part drowns in another.

    Args:
        shape: q_len, kv_len, dim, context_dim and heads; optionally batch, head_dim, out_dim, norms
            ("layer" or "rms"), residual (a bool), projected (a bool), apart (a bool: a weight of
            values alone), value_dim (of a context of theirs), bias (False: none), and mask:
            "key_padding" (the last quarter of the context of every second entry hidden), "bool",
            "bias" (a float for each head and score) or None.
    """
    normal = normals(dtype, device, seed)
    batch, heads = shape.get("batch", 1), shape["heads"]
    q_len, kv_len = shape["q_len"], shape["kv_len"]
    dim, context_dim = shape["dim"], shape["context_dim"]
    head_dim, out_dim = shape.get("head_dim") or dim // heads, shape.get("out_dim") or dim
    inner, projected, has_bias = heads * head_dim, shape.get("projected"), shape.get("bias", True)
    call: dict[str, Any] = {
        "query": normal(batch, q_len, dim),
        "context": normal(batch, kv_len, context_dim),
    }
    value_dim = shape.get("value_dim")
    apart = shape.get("apart", value_dim is not None)
    sizes = {"q": (inner, dim), "kv": (2 * inner, context_dim), "out": (out_dim, inner)}
    if apart:
        sizes |= {"kv": (inner, context_dim), "v": (inner, value_dim or context_dim)}
    for name, (features, width) in sizes.items():
        call[f"{name}_weight"] = normal(features, width, scale=width**-0.5)
        call[f"{name}_bias"] = normal(features) if has_bias else None
    call["num_heads"] = heads
    if value_dim is not None:
        call["value_context"] = normal(batch, kv_len, value_dim)
    if projected:
        call["context"] = tuple(normal(batch, heads, kv_len, head_dim) for _ in range(2))
        call["kv_weight"] = call["kv_bias"] = None
    if shape.get("norms"):
        call["rms_norm"] = shape["norms"] == "rms"
        call["query_norm"] = Norm(normal(dim), normal(dim), 1e-5)
        if not (projected or value_dim):
            call["context_norm"] = Norm(normal(context_dim), normal(context_dim), 1e-3)
    if shape.get("residual"):
        call["residual"] = normal(batch, q_len, out_dim)
    mask = shape.get("mask")
    if mask == "key_padding":
        call["key_padding_mask"] = some_padding(batch, kv_len, device)
    elif mask is not None:
        call["attn_mask"] = random_mask(mask, normal, heads, (q_len, kv_len), "key_padding")
    return call


def cost(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Floating-point operations of the products, and bytes read and written once."""
    batch, heads = shape.get("batch", 1), shape["heads"]
    q_len, kv_len = shape["q_len"], shape["kv_len"]
    dim, context_dim = shape["dim"], shape["context_dim"]
    head_dim, out_dim = shape.get("head_dim") or dim // heads, shape.get("out_dim") or dim
    inner = heads * head_dim
    products = q_len * inner * (dim + out_dim) + 2 * q_len * kv_len * inner
    elements = inner * (dim + out_dim + 1) + out_dim
    tokens = q_len * (dim + out_dim) + (q_len * out_dim if shape.get("residual") else 0)
    if shape.get("projected"):
        tokens += 2 * kv_len * inner
    else:
        value_dim = shape.get("value_dim")
        both = context_dim + (value_dim or context_dim)  # widths of what keys and values are from
        products += kv_len * inner * both
        elements += inner * (both + 2)
        tokens += kv_len * (both if value_dim else context_dim)
    return 2 * batch * products, (elements + batch * tokens) * dtype.itemsize


OP = Op(
    name="cross_attention_layer",
    arguments=Arguments,
    check=check,
    normalize=normalize,
    definition=DEFINITION,
    inputs=inputs,
    cost=cost,
    ranks=(3,),
    implementations=(
        Implementation(
            "cuda", _CUDA, _cuda_refuses, differentiable=False, checks=True,
            on_request=_cuda_waits, path=_CUDA.path,
        ),
        Implementation(
            "triton", _TRITON, _triton_refuses, differentiable=False,
            on_request=triton.interprets, path=_triton_path,
        ),
        Implementation(
            "cpu", _CPU, _cpu_refuses, differentiable=False, checks=True, path=_cpu_path
        ),
        Implementation("reference", run_reference, never_refuses),
    ),
)  # fmt: skip
