"""A whole fusion layer in which two modalities attend to each other, of both streams.

One score matrix S = scale * Q_visual K_text^T + bias serves both directions, as in
`bidirectional_attention`, whose sources are named there. Each stream s has an input projection to
what its scores are made of and its values, an output projection and a feed-forward part of its own,
with residuals and LayerNorms behind them or, with `norm_first`, before them:

    x = norm1(s + out_proj(attended))        x = s + out_proj(attended of norm1(s))
    y = norm2(x + ff(x))                     y = x + ff(norm2(x))        ff = linear2(act(linear1))

(Vaswani et al., 2017; Xiong et al., "On Layer Normalization in the Transformer Architecture",
2020, for the right side).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fastfusion.backends import cpu, triton
from fastfusion.core import arguments, layers
from fastfusion.core import reference as formulas
from fastfusion.core.layers import Norm
from fastfusion.core.op import Implementation, Op, never_refuses
from fastfusion.core.torch_op import Definition
from fastfusion.ops import bidirectional_attention as _bidirectional
from fastfusion.ops import linear as _linear
from fastfusion.ops._in_steps import cross_modal_in_steps
from fastfusion.ops._parts import (
    NARROW_WEIGHTS,
    StreamWeights,
    alike_of,
    attention_dtype,
    attention_path,
    check_any_product,
    normals,
    part_of,
    random_mask,
    some_padding,
)
from fastfusion.ops.linear import ACTIVATIONS

_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
_IN_TRITON = (None, "relu", "gelu")  # kernels.layer.linear.ACTIVATIONS, without importing Triton

_is_compiling = torch.compiler.is_compiling


def number_of(activation: str | None) -> int:
    """Of a call, for an activation's name."""
    return _NUMBERS[activation]


class Arguments(NamedTuple):
    """Those of the public function, in its order."""

    visual: Any
    text: Any
    visual_weights: Any
    text_weights: Any
    num_heads: Any
    # By name only:
    activation: Any = "relu"
    norm_first: Any = False
    attn_mask: Any = None
    visual_padding_mask: Any = None
    text_padding_mask: Any = None
    backend: Any = None


_POSITIONAL = 5


PRODUCTS = ("in", "out", "linear1", "linear2")


class Stream(NamedTuple):
    """The tensors of one stream, as a call has them."""

    in_weight: Tensor  # (2 * E, W), or packed, as every weight
    in_bias: Tensor | None
    out_weight: Tensor  # (W, E)
    out_bias: Tensor | None
    linear1_weight: Tensor  # (F, W)
    linear1_bias: Tensor | None
    linear2_weight: Tensor  # (W, F)
    linear2_bias: Tensor | None
    norm1_weight: Tensor | None  # (W,)
    norm1_bias: Tensor | None
    norm2_weight: Tensor | None
    norm2_bias: Tensor | None
    in_scale: Tensor | None  # (2 * E,), of packed weights
    out_scale: Tensor | None
    linear1_scale: Tensor | None
    linear2_scale: Tensor | None

    def norms(self) -> tuple[Tensor | None, ...]:
        return self.norm1_weight, self.norm1_bias, self.norm2_weight, self.norm2_bias

    def linear(
        self, name: str, x: Tensor, residual: Tensor | None = None, activation: int = 0
    ) -> _linear.Call:
        weight, bias, scale = part_of(self, name)
        return _linear.Call(x, weight, bias, residual, scale, activation)


class Call(NamedTuple):
    """What an implementation takes."""

    visual: Tensor  # (B, Lv, Wv)
    text: Tensor  # (B, Lt, Wt)
    visual_in_weight: Tensor  # those of a Stream
    visual_in_bias: Tensor | None
    visual_out_weight: Tensor
    visual_out_bias: Tensor | None
    visual_linear1_weight: Tensor
    visual_linear1_bias: Tensor | None
    visual_linear2_weight: Tensor
    visual_linear2_bias: Tensor | None
    visual_norm1_weight: Tensor | None
    visual_norm1_bias: Tensor | None
    visual_norm2_weight: Tensor | None
    visual_norm2_bias: Tensor | None
    text_in_weight: Tensor
    text_in_bias: Tensor | None
    text_out_weight: Tensor
    text_out_bias: Tensor | None
    text_linear1_weight: Tensor
    text_linear1_bias: Tensor | None
    text_linear2_weight: Tensor
    text_linear2_bias: Tensor | None
    text_norm1_weight: Tensor | None
    text_norm1_bias: Tensor | None
    text_norm2_weight: Tensor | None
    text_norm2_bias: Tensor | None
    attn_mask: Tensor | None  # broadcasts to (B, H, Lv, Lt)
    visual_padding_mask: Tensor | None  # (B, Lv)
    text_padding_mask: Tensor | None  # (B, Lt)
    num_heads: int
    activation: int  # place in ACTIVATIONS
    norm_first: bool
    visual_norm1_eps: float
    visual_norm2_eps: float
    text_norm1_eps: float
    text_norm2_eps: float
    visual_in_scale: Tensor | None = None
    visual_out_scale: Tensor | None = None
    visual_linear1_scale: Tensor | None = None
    visual_linear2_scale: Tensor | None = None
    text_in_scale: Tensor | None = None
    text_out_scale: Tensor | None = None
    text_linear1_scale: Tensor | None = None
    text_linear2_scale: Tensor | None = None

    def streams(self) -> tuple[Stream, Stream]:
        visual, text = (
            Stream(*(getattr(self, f"{name}_{field}") for field in Stream._fields))
            for name in ("visual", "text")
        )
        return visual, text

    @property
    def embed_dim(self) -> int:
        """What both streams are projected to."""
        return self.streams()[0].linear("in", self.visual).features // 2

    @property
    def attention_dtype(self) -> torch.dtype:
        """Of the attention inside, as in `encoder_layer`."""
        return attention_dtype(self.visual, self.visual_in_weight, self.text_in_weight)

    def has_narrow_weights(self) -> bool:
        """Whether any weight is narrower than the tokens."""
        return any(
            _linear.has_own_dtype(self.visual, weight, scale)
            for stream in self.streams()
            for weight, _, scale in (part_of(stream, name) for name in PRODUCTS)
        )

    def first_eps(self) -> tuple[float, float]:
        return self.visual_norm1_eps, self.text_norm1_eps

    def second_eps(self) -> tuple[float, float]:
        return self.visual_norm2_eps, self.text_norm2_eps

    def conditions(self) -> Iterator[Any]:
        """What holds for every call; a mask that does not broadcast raises."""
        visual, heads = self.visual, self.num_heads
        streams = self.streams()
        vectors = [t for stream in streams for t in stream.norms() if t is not None]
        yield arguments.are_alike(visual, self.text, *vectors)
        yield 0 <= self.activation < len(ACTIVATIONS)
        (batch, visual_len, _), text_len = visual.shape, self.text.shape[1]
        embed = self.embed_dim
        yield heads > 0 and embed > 0
        yield embed % heads == 0
        for tokens, stream in zip((visual, self.text), streams, strict=True):
            length, width = tokens.shape[1:]
            yield width > 0
            yield from layers.sequence_fits(tokens, batch, length, width)
            x, wanted = tokens, {"in": 2 * embed, "out": width, "linear1": None, "linear2": width}
            for name, features in wanted.items():
                product = stream.linear(name, x)
                yield from product.conditions()
                yield features is None or product.features == features
                between = {"in": embed, "out": width}.get(name, product.features)
                x = tokens.new_empty(batch, length, between)
            for vector in stream.norms():
                yield from layers.vector_fits(vector, width)
        yield arguments.mask_fits(self.attn_mask, visual, batch, heads, visual_len, text_len)
        yield from arguments.padding_fits(self.visual_padding_mask, visual, batch, visual_len)
        yield from arguments.padding_fits(self.text_padding_mask, visual, batch, text_len)


def cross_modal_layer(
    visual: Tensor,
    text: Tensor,
    visual_weights: StreamWeights,
    text_weights: StreamWeights,
    num_heads: int,
    *,
    activation: str | None = "relu",
    norm_first: bool = False,
    attn_mask: Tensor | None = None,
    visual_padding_mask: Tensor | None = None,
    text_padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The layer of `fastfusion.nn.CrossModalAttention`, without dropout.

    Args:
        visual: (batch, visual_len, visual_dim), float32, bfloat16, float16 or float64.
        text: (batch, text_len, text_dim), of the same dtype.
        visual_weights, text_weights: `fastfusion.ops.StreamWeights`, of one embed_dim. Weights may
            be narrower than tokens of float32, as those of `cross_attention_layer`; where both
            in_weight are, attention is in bfloat16.
        num_heads: number of heads, a divisor of embed_dim.
        activation: of the feed-forward parts: "relu", "gelu", "gelu_tanh", "silu", "quick_gelu" or
            None.
        norm_first: norm before attention and feed-forward instead of after them.
        attn_mask: broadcastable to (batch, num_heads, visual_len, text_len): bool, True = these two
            attend to each other, or a float bias of the scores that both directions share.
        visual_padding_mask: bool, broadcastable to (batch, visual_len), True = text ignores this
            token; its own output means nothing.
        text_padding_mask: bool, broadcastable to (batch, text_len), True = the image ignores it.
        backend: "cpu", "triton" or "reference" to insist on one; None chooses. Gradients are the
            reference's. Triton's products stand around the attention that is chosen on that device.

    Returns:
        The new visual and text tokens, contiguous, in the shapes of the old.

    Raises:
        TypeError: an argument is not of the type or dtype named above.
        ValueError: shapes, devices or names that do not fit; the message prints them.
        BackendUnavailableError: `backend` cannot run this call; the message says why.
    """
    given = Arguments(
        visual, text, visual_weights, text_weights, num_heads, activation, norm_first, attn_mask,
        visual_padding_mask, text_padding_mask, backend,
    )  # fmt: skip
    if not _is_compiling():
        tensors = tuple(_tensors(given).values())
        masks = (attn_mask, visual_padding_mask, text_padding_mask)
        if has_torch_function_variadic(*tensors, *masks):
            answer = arguments.ask_torch_function(
                cross_modal_layer, given, _POSITIONAL, (*tensors, *masks)
            )
            if answer is not NotImplemented:
                return answer
        if _is_plain(given):
            result = OP.attempt(backend, _call(given), False)
            if result is not None:
                return tuple(result)
    visual, text = OP.run(backend, normalize(given), False)
    return visual, text


def _tensors(given: Arguments) -> dict[str, Any]:
    """By name, those that are given, but for the masks."""
    return layers.tensors_of(
        visual=given.visual, text=given.text, visual_weights=given.visual_weights,
        text_weights=given.text_weights,
    )  # fmt: skip


def _is_plain(given: Arguments) -> bool:
    """Whether an eager call may be tried with these arguments as they came."""
    return (
        type(given.num_heads) is int
        and given.num_heads > 0
        and type(given.norm_first) is bool
        and isinstance(given.activation, str | None)
        and given.activation in _NUMBERS
        and type(given.attn_mask) in arguments.PLAIN
        and all(
            type(weights) is StreamWeights
            and all(map(layers.is_plain_norm, (weights.norm1, weights.norm2)))
            for weights in (given.visual_weights, given.text_weights)
        )
    )


def _call(given: Arguments) -> Call:
    """Arguments as implementations take them."""
    visual, text = given.visual_weights, given.text_weights
    values: list[Any] = [
        given.visual, given.text, *visual[:8], *visual.norm1[:2], *visual.norm2[:2], *text[:8],
        *text.norm1[:2], *text.norm2[:2], given.attn_mask, given.visual_padding_mask,
        given.text_padding_mask, given.num_heads, _NUMBERS[given.activation], given.norm_first,
        visual.norm1.eps, visual.norm2.eps, text.norm1.eps, text.norm2.eps, *visual[10:],
        *text[10:],
    ]  # fmt: skip
    return Call(*values)


def check(given: Arguments) -> None:
    """Raise TypeError or ValueError for arguments that are not legal."""
    for name in ("visual_weights", "text_weights"):
        weights = getattr(given, name)
        if not isinstance(weights, StreamWeights):
            raise TypeError(
                f"{name} must be a fastfusion.ops.StreamWeights, got {type(weights).__name__}"
            )
        for part in ("norm1", "norm2"):
            layers.check_is_norm(f"{name}.{part}", getattr(weights, part))
    for name in ("visual", "text"):
        if getattr(given, name) is None:
            raise TypeError(f"{name} must be a Tensor, got NoneType")
    tensors = _tensors(given)
    arguments.check_tensors(**alike_of(tensors, given.visual))
    sizes = arguments.shapes(**tensors)
    batch = given.visual.shape[0] if given.visual.dim() else 0
    for name in ("visual", "text"):
        layers.check_sequence(name, getattr(given, name), batch, sizes)
    first = part_of(given.visual_weights, "in")
    features = check_any_product("visual_weights.in", first, given.visual, None, _IN, sizes)
    if features % 2:
        raise ValueError(f"visual_weights.in_weight must be {_IN}, got {sizes}")
    layers.check_heads(given.num_heads, features // 2, "embed_dim", sizes)
    for name in ("visual", "text"):
        weights = getattr(given, f"{name}_weights")
        _check_weights(f"{name}_weights", weights, getattr(given, name), features // 2, sizes)
    if not isinstance(given.activation, str | None) or given.activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"activation must be one of {names}, got {given.activation!r}")
    arguments.check_flag("norm_first", given.norm_first)
    lengths = given.visual.shape[1], given.text.shape[1]
    target = (batch, given.num_heads, *lengths)
    arguments.check_attn_mask(given.attn_mask, given.visual, target, sizes)
    for name, length in zip(("visual", "text"), lengths, strict=True):
        padding = getattr(given, f"{name}_padding_mask")
        arguments.check_padding_mask(
            f"{name}_padding_mask", padding, given.visual, (batch, length), sizes
        )


_IN = "(2 * embed_dim, width)"


def _check_weights(name: str, weights: Any, tokens: Tensor, embed: int, sizes: str) -> None:
    width = tokens.shape[2]

    def check_part(part: str, inputs: int, features: int | None, what: str) -> int:
        x = tokens.new_empty(0, inputs)
        of_part = part_of(weights, part)
        return check_any_product(f"{name}.{part}", of_part, x, features, what, sizes)

    check_part("in", width, 2 * embed, _IN)
    check_part("out", embed, width, "(width, embed_dim)")
    hidden = check_part("linear1", width, None, "(dim_feedforward, width)")
    check_part("linear2", hidden, width, "(width, dim_feedforward)")
    for part in ("norm1", "norm2"):
        layers.check_norm(f"{name}.{part}", getattr(weights, part), width, sizes)


def normalize(given: Arguments) -> Call:
    """Public arguments, cast as autocast asks and checked, as every implementation takes them."""
    dtype = arguments.autocast_dtype(arguments.device_type_of(given.visual))
    mask = arguments.autocast_mask(dtype, given.attn_mask)
    given = layers.cast(dtype, given)._replace(attn_mask=mask)
    if not _is_compiling():
        check(given)
    call = _call(given)
    paddings = (
        None if padding is None else padding.expand(call.visual.shape[0], tokens.shape[1])
        for padding, tokens in (
            (call.visual_padding_mask, call.visual), (call.text_padding_mask, call.text),
        )
    )  # fmt: skip
    visual_padding, text_padding = paddings
    return call._replace(visual_padding_mask=visual_padding, text_padding_mask=text_padding)


def run_reference(call: Call, lse: bool) -> tuple[Tensor, ...]:
    """The definition."""
    if call.has_narrow_weights():
        return cross_modal_in_steps(call, _attend_by_formula)
    dtype = call.visual.dtype
    acc = formulas.accumulation_dtype(dtype)
    streams = call.streams()
    activate = tuple(ACTIVATIONS.values())[call.activation]
    tokens = [formulas.cast(call.visual, acc), formulas.cast(call.text, acc)]

    def norm(place: int, of: Sequence[Tensor], epsilons: tuple[float, float]) -> list[Tensor]:
        return [
            layers.normalized(x, s[place], s[place + 1], eps, False)
            for x, s, eps in zip(of, streams, epsilons, strict=True)
        ]

    scored = norm(8, tokens, call.first_eps()) if call.norm_first else tokens
    (query, visual_value), (key, text_value) = (
        layers.heads_of(layers.linear(x, s.in_weight, s.in_bias), 2, call.num_heads)
        for x, s in zip(scored, streams, strict=True)
    )
    attended = _attend_by_formula(call, query, key, text_value, visual_value)
    for i, (s, found) in enumerate(zip(streams, attended, strict=True)):
        tokens[i] = tokens[i] + layers.linear(layers.rows_of(found), s.out_weight, s.out_bias)
    tokens = tokens if call.norm_first else norm(8, tokens, call.first_eps())
    hidden = norm(10, tokens, call.second_eps()) if call.norm_first else tokens
    for i, (s, x) in enumerate(zip(streams, hidden, strict=True)):
        inner = activate(layers.linear(x, s.linear1_weight, s.linear1_bias))
        tokens[i] = tokens[i] + layers.linear(inner, s.linear2_weight, s.linear2_bias)
    tokens = tokens if call.norm_first else norm(10, tokens, call.second_eps())
    return formulas.cast(tokens[0], dtype), formulas.cast(tokens[1], dtype)


def _attend_by_formula(
    call: Call, query: Tensor, key: Tensor, value: Tensor, query_value: Tensor
) -> tuple[Tensor, ...]:
    inside = _attention(call, query, key, value, query_value)
    return _bidirectional.run_reference(inside, False)


def _attention(
    call: Call, query: Tensor, key: Tensor, value: Tensor, query_value: Tensor
) -> _bidirectional.Call:
    """The call of `bidirectional_attention` inside."""
    return _bidirectional.Call(
        query, key, value, query_value, call.attn_mask, call.visual_padding_mask,
        call.text_padding_mask, None, None, 0.0, False, False, None,
    )  # fmt: skip


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    return call.visual.new_empty(call.visual.shape), call.text.new_empty(call.text.shape)


def _flops(call: Call, backward: bool) -> int:
    embed, pairs = call.embed_dim, call.visual.shape[1] * call.text.shape[1]
    products = 3 * call.visual.shape[0] * pairs * embed
    for tokens, stream in zip((call.visual, call.text), call.streams(), strict=True):
        products += tokens.numel() * (3 * embed + 2 * stream.linear("linear1", tokens).features)
    return 2 * products * (2 if backward else 1)


def _attend(
    call: Call, query: Tensor, key: Tensor, value: Tensor, query_value: Tensor
) -> tuple[Tensor, Tensor]:
    """Between Triton's products."""
    return _bidirectional.bidirectional_attention(
        query, key, value, query_value, attn_mask=call.attn_mask,
        query_padding_mask=call.visual_padding_mask, key_padding_mask=call.text_padding_mask,
        backend=triton.attention_inside(),
    )  # fmt: skip


DEFINITION = Definition(
    "cross_modal_layer", Call, gradients=27, results=2, outputs=2, fake=_fake,
    reference=lambda call: run_reference(call, False), flops=_flops,
)  # fmt: skip
_CPU = cpu.forward_op(DEFINITION)
_TRITON = triton.layer_op(DEFINITION, "layer.fusion:cross_modal_layer", _attend)


def _triton_refuses(call: Call) -> Sequence[str]:
    widths = call.visual.shape[2], call.text.shape[2]
    reasons = triton.refuses_layer(call, DEFINITION, widths)
    name = tuple(ACTIVATIONS)[call.activation]
    if name not in _IN_TRITON:
        reasons = (*reasons, f"{name} is left to the reference")
    if not reasons and call.has_narrow_weights():
        reasons = (NARROW_WEIGHTS,)
    return reasons


def _triton_path(call: Call) -> str:
    """Which attention stands between the products."""
    visual, embed = call.visual, call.embed_dim
    query, key = (
        visual.new_empty(1).expand(
            visual.shape[0], call.num_heads, tokens.shape[1], embed // call.num_heads
        )
        for tokens in (visual, call.text)
    )
    attention = _attention(call, query, key, key, query)
    chosen = _bidirectional.OP.select(triton.attention_inside(), attention).backend
    return f"products in Triton, attention on {chosen}"


def _cpu_refuses(call: Call) -> Sequence[str]:
    return cpu.refuses_gradient(call, DEFINITION)


def _cpu_path(call: Call) -> str:
    ways = {
        _linear.cpu_path(stream.linear(name, call.visual))
        for stream in call.streams()
        for name in PRODUCTS
    }
    ways |= attention_path(call.visual, call.attention_dtype)
    return f"{cpu.isa()}, one call, {', '.join(sorted(ways))}"


def inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: Any = None, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of a legal call: tokens normally distributed, weights as in a trained
    layer, where no part drowns in another.

    Args:
        shape: q_len (visual), kv_len (text), dim, context_dim (of the text), heads and ffn;
            optionally batch, embed_dim, activation, norm_first, bias (False: none) and mask:
            "both_padding" (the last quarter of both sequences of every second entry hidden),
            "bool", "bias" (a float for each head and score) or None.
    """
    normal = normals(dtype, device, seed)
    batch, heads, mask = shape.get("batch", 1), shape["heads"], shape.get("mask")
    lengths, widths = (shape["q_len"], shape["kv_len"]), (shape["dim"], shape["context_dim"])
    embed, has_bias = shape.get("embed_dim") or max(widths), shape.get("bias", True)

    def stream(width: int) -> StreamWeights:
        parts: list[Any] = []
        for features, inputs in (
            (2 * embed, width), (width, embed), (shape["ffn"], width), (width, shape["ffn"]),
        ):  # fmt: skip
            parts.append(normal(features, inputs, scale=inputs**-0.5))
            parts.append(normal(features) if has_bias else None)
        norms = [Norm(normal(width), normal(width) if has_bias else None, e) for e in (1e-5, 1e-3)]
        return StreamWeights(*parts, *norms)

    visual, text = (normal(batch, n, w) for n, w in zip(lengths, widths, strict=True))
    call: dict[str, Any] = {
        "visual": visual,
        "text": text,
        "visual_weights": stream(widths[0]),
        "text_weights": stream(widths[1]),
        "num_heads": heads,
        "activation": shape.get("activation", "gelu"),
        "norm_first": bool(shape.get("norm_first")),
    }
    if mask == "both_padding":
        for name, length in zip(("visual", "text"), lengths, strict=True):
            call[f"{name}_padding_mask"] = some_padding(batch, length, device)
    elif mask is not None:
        call["attn_mask"] = random_mask(mask, normal, heads, lengths, "both_padding")
    return call


def cost(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Floating-point operations of the products, and bytes read and written once."""
    batch, ffn = shape.get("batch", 1), shape["ffn"]
    q_len, kv_len, widths = shape["q_len"], shape["kv_len"], (shape["dim"], shape["context_dim"])
    embed = shape.get("embed_dim") or max(widths)
    products, elements = 3 * batch * q_len * kv_len * embed, 0
    for length, width in zip((q_len, kv_len), widths, strict=True):
        weights = width * (3 * embed + 2 * ffn)
        products += batch * length * weights
        elements += weights + 2 * embed + ffn + 6 * width + 2 * batch * length * width
    return 2 * products, elements * dtype.itemsize


OP = Op(
    name="cross_modal_layer",
    arguments=Arguments,
    check=check,
    normalize=normalize,
    definition=DEFINITION,
    inputs=inputs,
    cost=cost,
    ranks=(3,),
    implementations=(
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
