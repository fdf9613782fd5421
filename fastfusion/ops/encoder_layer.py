"""A Transformer encoder layer in inference, as one op (Vaswani et al., "Attention Is All You Need",
2017, section 3.1):

    norm_first                                    otherwise
    y = x + attend(norm1(x))                      y = norm1(x + attend(x))
    result = y + feed_forward(norm2(y))           result = norm2(y + feed_forward(y))

    attend(x)       = out_proj(attention(query, key, value)), the three side by side in in_proj(x),
                      or from a projection each
    feed_forward(x) = linear2(activation(linear1(x)))

What one step hands to the next is rounded to the dtype of the input, as between modules: the CPU
kernel gives the bits of `linear`, `norm` and `scaled_dot_product_attention` called one by one.
Weights may be narrower than the input, as those of `linear`. Beside tokens of float32 attention is
then in bfloat16, where query, key and value have weights of bfloat16 or of 8-bit integers: the
three, and what it gives, are rounded. Its products take half the time, and such weights left no
more digits.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fastfusion.backends import cpu
from fastfusion.core import arguments
from fastfusion.core.op import Implementation, Op, never_refuses
from fastfusion.core.torch_op import Definition
from fastfusion.ops import linear as _linear
from fastfusion.ops import norm as _norm
from fastfusion.ops._parts import (
    attend,
    attention_dtype,
    attention_path,
    check_product,
    check_separate,
    checked,
    linear_call,
    norm_call,
    normals,
    part_of,
    random_linear,
    random_norm,
)


class Arguments(NamedTuple):
    """Those of the public function, in its order."""

    input: Any
    in_proj_weight: Any
    in_proj_bias: Any
    out_proj_weight: Any
    out_proj_bias: Any
    linear1_weight: Any
    linear1_bias: Any
    linear2_weight: Any
    linear2_bias: Any
    norm1_weight: Any
    norm1_bias: Any
    norm2_weight: Any
    norm2_bias: Any
    num_heads: Any
    # By name only:
    activation: Any = "relu"
    norm_first: Any = False
    norm1_eps: Any = 1e-5
    norm2_eps: Any = 1e-5
    attn_mask: Any = None
    key_padding_mask: Any = None
    is_causal: Any = False
    in_proj_scale: Any = None
    out_proj_scale: Any = None
    linear1_scale: Any = None
    linear2_scale: Any = None
    k_proj_weight: Any = None
    k_proj_bias: Any = None
    k_proj_scale: Any = None
    v_proj_weight: Any = None
    v_proj_bias: Any = None
    v_proj_scale: Any = None
    cu_seqlens: Any = None
    backend: Any = None


_POSITIONAL = 14


class Call(NamedTuple):
    """What an implementation takes; csrc/torch has its twin."""

    input: Tensor  # (batch, length, width)
    in_proj_weight: Tensor  # (3 * width, width), or the query's alone; or packed
    in_proj_bias: Tensor | None
    k_proj_weight: Tensor | None  # (width, width), or packed
    k_proj_bias: Tensor | None
    v_proj_weight: Tensor | None
    v_proj_bias: Tensor | None
    out_proj_weight: Tensor  # (width, width), or packed
    out_proj_bias: Tensor | None
    linear1_weight: Tensor  # (hidden, width), or packed
    linear1_bias: Tensor | None
    linear2_weight: Tensor  # (width, hidden), or packed
    linear2_bias: Tensor | None
    norm1_weight: Tensor | None  # (width,)
    norm1_bias: Tensor | None
    norm2_weight: Tensor | None
    norm2_bias: Tensor | None
    attn_mask: Tensor | None  # broadcasts to (batch, num_heads, length, length)
    key_padding_mask: Tensor | None  # (batch, length)
    in_proj_scale: Tensor | None  # of packed weights
    k_proj_scale: Tensor | None
    v_proj_scale: Tensor | None
    out_proj_scale: Tensor | None
    linear1_scale: Tensor | None
    linear2_scale: Tensor | None
    num_heads: int
    activation: int  # place in fastfusion.ops.linear.ACTIVATIONS
    norm_first: bool
    is_causal: bool
    norm1_eps: float
    norm2_eps: float
    cu_seqlens: Tensor | None = None  # (sequences + 1,), of a batch of 1

    def linear(self, name: str, x: Tensor, residual: Tensor | None = None) -> _linear.Call:
        return linear_call(self, name, x, residual)

    def norm(self, name: str, x: Tensor) -> _norm.Call:
        return norm_call(self, name, x)

    @property
    def projections(self) -> tuple[str, ...]:
        """The linear layers of query, key and value."""
        return _projections(self)

    @property
    def attention_dtype(self) -> torch.dtype:
        weights = (getattr(self, f"{name}_weight") for name in self.projections)
        return attention_dtype(self.input, *weights)

    @property
    def hidden(self) -> int:
        """Features between linear1 and linear2."""
        return self.linear("linear1", self.input).features

    def conditions(self) -> Iterator[Any]:
        """What holds for every call."""
        x = self.input
        yield x.dim() == 3
        batch, length, width = x.shape
        yield self.num_heads > 0
        yield width % self.num_heads == 0
        yield (self.k_proj_weight is None) == (self.v_proj_weight is None)
        if self.k_proj_weight is None:
            yield all(getattr(self, name) is None for name in _SEPARATE)
        given = x.new_empty(batch, length, self.hidden)
        for name, features in _features(self.projections, width):
            call = self.linear(name, given if name == "linear2" else x)
            yield from call.conditions()
            yield features is None or call.features == features
        yield from self.norm("norm1", x).conditions()
        yield from self.norm("norm2", x).conditions()
        yield arguments.mask_fits(self.attn_mask, x, batch, self.num_heads, length, length)
        yield from arguments.padding_fits(self.key_padding_mask, x, batch, length)
        if self.cu_seqlens is not None:
            yield batch == 1
            yield self.attn_mask is None and self.key_padding_mask is None
            yield self.cu_seqlens.dim() == 1 and self.cu_seqlens.device == x.device
            yield self.cu_seqlens.dtype in (torch.int32, torch.int64)
            yield self.cu_seqlens.shape[0] > 0
            if arguments.is_readable(self.cu_seqlens):
                values = self.cu_seqlens.tolist()
                yield values[0] == 0 and values[-1] == length and values == sorted(values)


def encoder_layer(
    input: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    linear1_weight: Tensor,
    linear1_bias: Tensor | None,
    linear2_weight: Tensor,
    linear2_bias: Tensor | None,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    num_heads: int,
    *,
    activation: str | None = "relu",
    norm_first: bool = False,
    norm1_eps: float = 1e-5,
    norm2_eps: float = 1e-5,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    in_proj_scale: Tensor | None = None,
    out_proj_scale: Tensor | None = None,
    linear1_scale: Tensor | None = None,
    linear2_scale: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    k_proj_bias: Tensor | None = None,
    k_proj_scale: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    v_proj_bias: Tensor | None = None,
    v_proj_scale: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Self-attention and feed-forward with their residuals and norms: `nn.TransformerEncoderLayer`
    without dropout, as a function of its weights.

    The same bits for a sequence alone and among batch mates, and for any number of threads.

    Args:
        input: (batch, length, width), float32, bfloat16, float16 or float64.
        in_proj_weight, in_proj_bias: (3 * width, width) and (3 * width,): query, key and value.
            Beside `k_proj_weight` the query's alone, (width, width) and (width,).
        out_proj_weight, out_proj_bias: (width, width) and (width,).
        linear1_weight, linear1_bias: (hidden, width) and (hidden,).
        linear2_weight, linear2_bias: (width, hidden) and (width,).
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: (width,), or None.
        num_heads: of which width is a multiple.
        activation: as of `linear`: "relu", "gelu", "gelu_tanh", "silu", "quick_gelu" or None.
        norm_first: norms before attention and feed-forward, else behind the residuals.
        norm1_eps, norm2_eps: added to the variance.
        attn_mask: as of `scaled_dot_product_attention`: bool (True = attend) or float (added),
            broadcastable to (batch, num_heads, length, length).
        key_padding_mask: bool (batch, length), True = ignore the key.
        is_causal: token i sees the tokens up to i.
        in_proj_scale, out_proj_scale, linear1_scale, linear2_scale: of weights that are packed, as
            `weight_scale` of `linear`; in_proj in three parts, or in one.
        k_proj_weight, k_proj_bias, k_proj_scale, v_proj_weight, v_proj_bias, v_proj_scale: of key
            and value, where in_proj is the query's alone: weights (width, width), both or neither,
            and biases (width,), of which each may be missing. The same bits as side by side.
        cu_seqlens: int32 or int64 (sequences + 1,): the input is a batch of 1 in which these
            sequences stand one behind the other, where each begins and the last one ends, without
            masks. Each gets the bits that it has alone.
        backend: "cpu" or "reference" to insist on one; None chooses. Gradients are the reference's.

    Returns:
        (batch, length, width), contiguous.

    Raises:
        TypeError: an argument is not of the type or dtype named above.
        ValueError: shapes, devices, numbers or names that do not fit; the message names them.
        BackendUnavailableError: `backend` cannot run this call; the message says why.
    """
    given = Arguments(
        input, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, linear1_weight,
        linear1_bias, linear2_weight, linear2_bias, norm1_weight, norm1_bias, norm2_weight,
        norm2_bias, num_heads, activation, norm_first, norm1_eps, norm2_eps, attn_mask,
        key_padding_mask, is_causal, in_proj_scale, out_proj_scale, linear1_scale, linear2_scale,
        k_proj_weight, k_proj_bias, k_proj_scale, v_proj_weight, v_proj_bias, v_proj_scale,
        cu_seqlens, backend,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        tensors = (*(getattr(given, name) for name in TENSORS), cu_seqlens)
        if has_torch_function_variadic(*tensors):
            answer = arguments.ask_torch_function(encoder_layer, given, _POSITIONAL, tensors)
            if answer is not NotImplemented:
                return answer
        if _has_plain_options(given):
            result = OP.attempt(backend, _as_call(given), False)
            if result is not None:
                return result
    output: Tensor = OP.run(backend, normalize(given), False)
    return output


TENSORS = Call._fields[: Call._fields.index("num_heads")]
# Of the weights that stand beside the query's.
_SEPARATE = ("k_proj_bias", "k_proj_scale", "v_proj_bias", "v_proj_scale")


def _projections(given: Any) -> tuple[str, ...]:
    return ("in_proj",) if given.k_proj_weight is None else ("in_proj", "k_proj", "v_proj")


def _features(projections: tuple[str, ...], width: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers, and how many features each has; of linear1 any number."""
    for name in projections:
        yield name, 3 // len(projections) * width
    yield from (("out_proj", width), ("linear1", None), ("linear2", width))


def _has_plain_options(given: Arguments) -> bool:
    """Whether an eager call may be tried with these arguments as they came."""
    return (
        isinstance(given.activation, str | None)
        and given.activation in _linear.NUMBERS
        and type(given.num_heads) is int
        and type(given.norm_first) is bool
        and type(given.is_causal) is bool
        and type(given.norm1_eps) is float
        and type(given.norm2_eps) is float
        and 0.0 <= given.norm1_eps <= arguments.MAX_SCALE
        and 0.0 <= given.norm2_eps <= arguments.MAX_SCALE
    )


def _as_call(given: Arguments) -> Call:
    numbers = (
        given.num_heads, _linear.NUMBERS[given.activation], given.norm_first, given.is_causal,
        given.norm1_eps, given.norm2_eps,
    )  # fmt: skip
    return Call._make((*(getattr(given, name) for name in TENSORS), *numbers, given.cu_seqlens))


def check(given: Arguments) -> None:
    """Raise TypeError or ValueError for arguments that are not legal."""
    arguments.check_tensors(input=given.input)
    sizes = arguments.shapes(input=given.input)
    if given.input.dim() != 3 or given.input.shape[-1] == 0:
        raise ValueError(f"input must be (batch, length, width), got {sizes}")
    batch, length, width = given.input.shape
    heads = given.num_heads
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"num_heads must be an int, got {type(heads).__name__}")
    if heads < 1 or width % heads:
        raise ValueError(f"num_heads must divide the width, got {heads} and {sizes}")
    check_separate("", given)
    x = given.input
    for name, expected in _features(_projections(given), width):
        options = {"activation": given.activation} if name == "linear1" else {}
        features = check_product(name, part_of(given, name), x, expected, **options)
        x = x.new_empty(0, features if name == "linear1" else width)
    for name in ("norm1", "norm2"):
        weight, bias, eps = (getattr(given, f"{name}_{s}") for s in ("weight", "bias", "eps"))
        checked(name, _norm.check, _norm.Arguments(given.input, weight, bias, eps=eps))
    arguments.check_flag("norm_first", given.norm_first)
    arguments.check_flag("is_causal", given.is_causal)
    target = (batch, heads, length, length)
    arguments.check_attn_mask(given.attn_mask, given.input, target, sizes)
    arguments.check_padding_mask(
        "key_padding_mask", given.key_padding_mask, given.input, (batch, length), sizes
    )
    if given.cu_seqlens is not None:
        _check_packed(given, sizes)


def _check_packed(given: Arguments, sizes: str) -> None:
    total = given.input.shape[1]
    if given.input.shape[0] != 1:
        raise ValueError(f"input must be (1, total length, width) beside cu_seqlens, got {sizes}")
    for name in ("attn_mask", "key_padding_mask"):
        if getattr(given, name) is not None:
            raise ValueError(f"{name} must be None beside cu_seqlens")
    values = arguments.check_offsets(
        "cu_seqlens", given.cu_seqlens, total, given.input, "input", "the tokens of input"
    )
    if values is not None and values[-1] != total:
        raise ValueError(f"cu_seqlens must end at {total}, the tokens of input, got {values[-1]}")


def normalize(given: Arguments) -> Call:
    """Public arguments, cast as autocast asks and checked, as every implementation takes them."""
    dtype = arguments.autocast_dtype(arguments.device_type_of(given.input))
    if dtype is not None:
        names = [n for n in TENSORS if not n.endswith(("mask", "scale"))]
        values = arguments.autocast_cast(dtype, *(getattr(given, n) for n in names))
        mask = arguments.autocast_mask(dtype, given.attn_mask)
        given = given._replace(**dict(zip(names, values, strict=True)), attn_mask=mask)
    if not torch.compiler.is_compiling():
        check(given)
    padding = given.key_padding_mask
    if padding is not None:
        padding = padding.expand(given.input.shape[:2])
    return _as_call(
        given._replace(
            key_padding_mask=padding,
            norm1_eps=float(given.norm1_eps),
            norm2_eps=float(given.norm2_eps),
        )
    )


def run_reference(call: Call, lse: bool) -> Any:
    """The definition."""

    def linear(name: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        result: Tensor = _linear.run_reference(call.linear(name, x, residual), False)
        return result

    def norm(name: str, x: Tensor) -> Tensor:
        result: Tensor = _norm.run_reference(call.norm(name, x), False)
        return result

    x, attn_mask = call.input, call.attn_mask
    if call.cu_seqlens is not None:
        attn_mask = _same_sequence(call.cu_seqlens, x.shape[1])
    scored = norm("norm1", x) if call.norm_first else x
    heads = torch.cat([linear(name, scored) for name in call.projections], -1)
    query, key, value = (
        part.transpose(1, 2) for part in heads.unflatten(-1, (3, call.num_heads, -1)).unbind(2)
    )
    attended = attend(
        call.attention_dtype, 0 if call.is_causal else None, query, key, value, attn_mask,
        call.key_padding_mask,
    )  # fmt: skip
    y = linear("out_proj", attended, x)
    if call.norm_first:
        return linear("linear2", linear("linear1", norm("norm2", y)), y)
    y = norm("norm1", y)
    return norm("norm2", linear("linear2", linear("linear1", y), y))


def _same_sequence(offsets: Tensor, total: int) -> Tensor:
    """bool (total, total), True where two tokens are of one sequence."""
    tokens = torch.arange(total, device=offsets.device)
    number = torch.searchsorted(offsets[1:].to(tokens.dtype), tokens, right=True)
    return number[:, None] == number


def _fake(call: Call) -> Tensor:
    return call.input.new_empty(call.input.shape)


def _operations(batch: Any, length: Any, width: Any, hidden: Any) -> Any:
    products = 2 * batch * length * width * (4 * width + 2 * hidden)
    return products + 4 * batch * length * length * width


def _flops(call: Call, backward: bool) -> int:
    batch, length, width = call.input.shape
    operations: int = _operations(batch, length, width, call.hidden)
    return operations * (2 if backward else 1)


DEFINITION = Definition(
    "encoder_layer", Call, gradients=18, results=1, outputs=1, fake=_fake,
    reference=lambda call: (run_reference(call, False),), flops=_flops,
)  # fmt: skip
_CPU = cpu.forward_op(DEFINITION)


def _cpu_refuses(call: Call) -> Sequence[str]:
    return cpu.refuses_gradient(call, DEFINITION)


def _cpu_path(call: Call) -> str:
    names = (*call.projections, "out_proj", "linear1", "linear2")
    ways = {_linear.cpu_path(call.linear(name, call.input)) for name in names}
    ways |= attention_path(call.input, call.attention_dtype)
    return f"{cpu.isa()}, one call, {', '.join(sorted(ways))}"


def inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: Any = None, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of a legal call, normally distributed, weights as a layer's are.

    Args:
        shape: length, dim, heads and ffn, as in shapes.json; optionally batch, activation,
            norm_first and is_causal (bools), separate (a bool: weights of key and value apart), and
            padding, the fraction of hidden keys.
    """
    normal = normals(dtype, device, seed)
    batch, length, width = shape.get("batch", 1), shape["length"], shape["dim"]
    call: dict[str, Any] = {"input": normal(batch, length, width), "num_heads": shape["heads"]}
    sizes = {"in_proj": (3 * width, width), "out_proj": (width, width)}
    if shape.get("separate"):
        sizes |= dict.fromkeys(("in_proj", "k_proj", "v_proj"), (width, width))
    sizes |= {"linear1": (shape["ffn"], width), "linear2": (width, shape["ffn"])}
    for name, (features, columns) in sizes.items():
        call[f"{name}_weight"], call[f"{name}_bias"] = random_linear(normal, features, columns)
    for name in ("norm1", "norm2"):
        call[f"{name}_weight"], call[f"{name}_bias"], _ = random_norm(normal, width)
    call["activation"] = shape.get("activation", "gelu")
    call["norm_first"] = bool(shape.get("norm_first"))
    call["is_causal"] = bool(shape.get("is_causal"))
    if shape.get("padding"):
        hidden = int(length * shape["padding"])
        call["key_padding_mask"] = (
            (torch.arange(length) >= length - hidden).expand(batch, length).to(call["input"].device)
        )
    return call


def cost(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Floating-point operations of the products, and bytes read and written once."""
    batch, length, width, hidden = (
        shape.get("batch", 1), shape["length"], shape["dim"], shape["ffn"],
    )  # fmt: skip
    weights = width * (4 * width + 2 * hidden) + 9 * width + hidden
    operations: int = _operations(batch, length, width, hidden)
    return operations, (weights + 2 * batch * length * width) * dtype.itemsize


OP = Op(
    name="encoder_layer",
    arguments=Arguments,
    check=check,
    normalize=normalize,
    definition=DEFINITION,
    inputs=inputs,
    cost=cost,
    ranks=(3,),
    implementations=(
        Implementation(
            "cpu", _CPU, _cpu_refuses, differentiable=False, checks=True, path=_cpu_path
        ),
        Implementation("reference", run_reference, never_refuses),
    ),
)  # fmt: skip
