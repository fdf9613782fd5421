"""A Transformer decoder layer in inference, as one op (Vaswani et al., "Attention Is All You Need",
2017, section 3.1):

    norm_first                                    otherwise
    y = x + attend(norm1(x))                      y = norm1(x + attend(x))
    z = y + attend_to_memory(norm2(y))            z = norm2(y + attend_to_memory(y))
    result = z + feed_forward(norm3(z))           result = norm3(z + feed_forward(z))

    attend(x)           = out_proj(attention(query(x), key(x), value(x)))
    attend_to_memory(y) = out_proj(attention(query(y), key(memory), value(memory)))
    feed_forward(z)     = linear2(activation(linear1(z)))

Without a memory z = y. Decoding token by token, the layer is given a cache of the keys and values
of the tokens before, writes those of x behind them, and attends to all of them; a memory's may be
projected once, by `project_memory`.

What one step hands to the next is rounded to the dtype of the input, as between modules: the CPU
kernel gives the bits of `linear`, `norm` and `scaled_dot_product_attention` called one by one.
Attention is in the dtype of its keys: that of a cache or of a projected memory, which may be of
bfloat16 beside tokens of float32, and else as in `encoder_layer`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fastfusion.backends import cpu
from fastfusion.core import arguments, layers, reference
from fastfusion.core.layers import Norm
from fastfusion.core.op import Implementation, Op, never_refuses
from fastfusion.core.torch_op import Definition
from fastfusion.ops import linear as _linear
from fastfusion.ops import norm as _norm
from fastfusion.ops._parts import (
    AttentionWeights,
    FeedForwardWeights,
    attend,
    attention_path,
    cast_weights,
    check_attention,
    check_cache,
    check_feed_forward,
    check_memory,
    check_norms,
    heads_fit,
    keys_dtype,
    linear_call,
    norm_call,
    normals,
    random_attention,
    random_feed_forward,
    random_norm,
    remember,
)


class Arguments(NamedTuple):
    """Those of the public function, in its order."""

    input: Any
    self_attn: Any
    feed_forward: Any
    norms: Any
    num_heads: Any
    # By name only:
    memory: Any = None
    cross_attn: Any = None
    activation: Any = "relu"
    norm_first: Any = False
    attn_mask: Any = None
    key_padding_mask: Any = None
    is_causal: Any = False
    memory_mask: Any = None
    memory_padding_mask: Any = None
    cache: Any = None
    past_length: Any = 0
    backend: Any = None


_POSITIONAL = 5


class Call(NamedTuple):
    """What an implementation takes; csrc/torch has its twin."""

    input: Tensor  # (batch, length, width)
    self_q_weight: Tensor  # (3 * width, width), or the query's alone; or packed
    self_q_bias: Tensor | None
    self_k_weight: Tensor | None  # (width, width), or packed
    self_k_bias: Tensor | None
    self_v_weight: Tensor | None
    self_v_bias: Tensor | None
    self_out_weight: Tensor
    self_out_bias: Tensor | None
    cross_q_weight: Tensor | None  # where there is a memory
    cross_q_bias: Tensor | None
    cross_k_weight: Tensor | None  # (width, memory's width), where it is not projected already
    cross_k_bias: Tensor | None
    cross_v_weight: Tensor | None
    cross_v_bias: Tensor | None
    cross_out_weight: Tensor | None
    cross_out_bias: Tensor | None
    linear1_weight: Tensor  # (hidden, width), or packed
    linear1_bias: Tensor | None
    linear2_weight: Tensor  # (width, hidden), or packed
    linear2_bias: Tensor | None
    norm1_weight: Tensor | None  # (width,)
    norm1_bias: Tensor | None
    norm2_weight: Tensor | None  # where there is a memory
    norm2_bias: Tensor | None
    norm3_weight: Tensor | None
    norm3_bias: Tensor | None
    memory: Tensor | None  # (batch, memory_length, memory's width)
    memory_key: Tensor | None  # (batch, num_heads, memory_length, head_dim)
    memory_value: Tensor | None
    memory_mask: Tensor | None  # broadcasts to (batch, num_heads, length, memory_length)
    attn_mask: Tensor | None  # broadcasts to (batch, num_heads, length, past_length + length)
    key_padding_mask: Tensor | None  # (batch, past_length + length)
    memory_padding_mask: Tensor | None  # (batch, memory_length)
    self_q_scale: Tensor | None  # of packed weights
    self_k_scale: Tensor | None
    self_v_scale: Tensor | None
    self_out_scale: Tensor | None
    cross_q_scale: Tensor | None
    cross_k_scale: Tensor | None
    cross_v_scale: Tensor | None
    cross_out_scale: Tensor | None
    linear1_scale: Tensor | None
    linear2_scale: Tensor | None
    key_cache: Tensor | None  # (batch, num_heads, capacity, head_dim)
    value_cache: Tensor | None
    num_heads: int
    past_length: int
    activation: int  # place in fastfusion.ops.linear.ACTIVATIONS
    norm_first: bool
    is_causal: bool
    norm1_eps: float
    norm2_eps: float
    norm3_eps: float

    def linear(self, name: str, x: Tensor, residual: Tensor | None = None) -> _linear.Call:
        return linear_call(self, name, x, residual)

    def norm(self, name: str, x: Tensor) -> _norm.Call:
        return norm_call(self, name, x)

    @property
    def has_memory(self) -> bool:
        return self.memory is not None or self.memory_key is not None

    @property
    def attention_dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of self-attention, and of that to the memory."""
        own = keys_dtype(self, "self", self.key_cache)
        return own, keys_dtype(self, "cross", self.memory_key) if self.has_memory else own

    @property
    def hidden(self) -> int:
        """Features between linear1 and linear2."""
        return self.linear("linear1", self.input).features

    @property
    def memory_length(self) -> int:
        if self.memory is not None:
            return self.memory.shape[1]
        return 0 if self.memory_key is None else self.memory_key.shape[2]

    def projections(self) -> list[tuple[str, Tensor, Any]]:
        """The linear layers but for linear2: names, what is like their input, and how many
        features each has; of linear1 any number."""
        x, width = self.input, self.input.shape[2]
        found: list[tuple[str, Tensor, Any]] = [("self_q", x, 3 * width)]
        if self.self_k_weight is not None:
            found = [(name, x, width) for name in ("self_q", "self_k", "self_v")]
        found.append(("self_out", x, width))
        if self.has_memory:
            found += [("cross_q", x, width), ("cross_out", x, width)]
        if self.memory is not None:
            found += [("cross_k", self.memory, width), ("cross_v", self.memory, width)]
        return [*found, ("linear1", x, None)]

    def conditions(self) -> Iterator[Any]:
        """What holds for every call."""
        x, heads, memory = self.input, self.num_heads, self.memory
        yield x.dim() == 3
        batch, length, width = x.shape
        yield heads > 0
        yield width % heads == 0
        yield (self.self_k_weight is None) == (self.self_v_weight is None)
        yield memory is None or self.memory_key is None
        yield (self.memory_key is None) == (self.memory_value is None)
        if memory is not None:
            yield memory.dim() == 3 and memory.shape[2] > 0
            yield memory.shape[0] == batch
            yield arguments.are_alike(x, memory)
        for name, given, features in self.projections():
            yield getattr(self, f"{name}_weight") is not None
            call = self.linear(name, given)
            yield from call.conditions()
            yield features is None or call.features == features
        call = self.linear("linear2", x.new_empty(batch, length, self.hidden))
        yield from call.conditions()
        yield call.features == width
        for name in ("norm1", "norm2", "norm3"):
            yield from self.norm(name, x).conditions()
        kept = (batch, heads, self.memory_length, width // heads)
        yield from heads_fit(x, kept, self.memory_key, self.memory_value)
        yield self.past_length >= 0
        total = self.past_length + length
        yield (self.key_cache is None) == (self.value_cache is None)
        if self.key_cache is None:
            yield self.past_length == 0
        else:
            capacity = self.key_cache.shape[2]
            yield capacity >= total
            kept = (batch, heads, capacity, width // heads)
            yield from heads_fit(x, kept, self.key_cache, self.value_cache)
        yield arguments.mask_fits(self.attn_mask, x, batch, heads, length, total)
        yield from arguments.padding_fits(self.key_padding_mask, x, batch, total)
        asked = self.memory_length
        yield arguments.mask_fits(self.memory_mask, x, batch, heads, length, asked)
        yield from arguments.padding_fits(self.memory_padding_mask, x, batch, asked)


def decoder_layer(
    input: Tensor,
    self_attn: AttentionWeights,
    feed_forward: FeedForwardWeights,
    norms: tuple[Norm, ...],
    num_heads: int,
    *,
    memory: Tensor | tuple[Tensor, Tensor] | None = None,
    cross_attn: AttentionWeights | None = None,
    activation: str | None = "relu",
    norm_first: bool = False,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    memory_mask: Tensor | None = None,
    memory_padding_mask: Tensor | None = None,
    cache: tuple[Tensor, Tensor] | None = None,
    past_length: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Self-attention, attention to a memory and feed-forward with their residuals and norms:
    `nn.TransformerDecoderLayer` without dropout, as a function of its weights. Without a memory it
    is a layer of a model that is a decoder alone.

    The same bits for a sequence alone and among batch mates, and for any number of threads.

    Args:
        input: (batch, length, width), float32, bfloat16, float16 or float64: the tokens behind
            those in the cache.
        self_attn: the projections of self-attention, `fastfusion.ops.AttentionWeights`.
        feed_forward: `fastfusion.ops.FeedForwardWeights`.
        norms: `fastfusion.ops.Norm` of self-attention, of attention to the memory, which is left
            out where there is none, and of the feed-forward network.
        num_heads: of which width is a multiple, in both attentions.
        memory: (batch, memory_length, memory_width), or its keys and values from `project_memory`,
            each (batch, num_heads, memory_length, head_dim); None: no attention to a memory.
        cross_attn: the projections of attention to the memory. Where keys and values are given,
            in_proj may be the query's alone.
        activation: as of `linear`: "relu", "gelu", "gelu_tanh", "silu", "quick_gelu" or None.
        norm_first: norms before each part, else behind its residual.
        attn_mask: of self-attention, as of `scaled_dot_product_attention`: bool (True = attend) or
            float (added), broadcastable to (batch, num_heads, length, past_length + length).
        key_padding_mask: bool (batch, past_length + length), True = ignore the key.
        is_causal: token i sees all tokens in the cache, and of the input those up to i.
        memory_mask, memory_padding_mask: likewise of the memory.
        cache: keys and values, each (batch, num_heads, capacity, head_dim), of any strides but 0
            and of the dtype of the input, or of bfloat16 beside float32. The first `past_length`
            are read; those of the input are written behind them, into the tensors that are given.
        past_length: how many tokens are in the cache.
        backend: "cpu" or "reference" to insist on one; None chooses. Gradients are the reference's,
            and do not reach into the cache.

    Returns:
        (batch, length, width), contiguous.

    Raises:
        TypeError: an argument is not of the type or dtype named above.
        ValueError: shapes, devices, numbers or names that do not fit; the message names them.
        BackendUnavailableError: `backend` cannot run this call; the message says why.
    """
    given = Arguments(
        input, self_attn, feed_forward, norms, num_heads, memory, cross_attn, activation,
        norm_first, attn_mask, key_padding_mask, is_causal, memory_mask, memory_padding_mask, cache,
        past_length, backend,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        tensors = _tensors(given)
        if has_torch_function_variadic(*tensors):
            answer = arguments.ask_torch_function(decoder_layer, given, _POSITIONAL, tensors)
            if answer is not NotImplemented:
                return answer
        call = _plain_call(given)
        if call is not None:
            result = OP.attempt(backend, call, False)
            if result is not None:
                return result
    output: Tensor = OP.run(backend, normalize(given), False)
    return output


TENSORS = Call._fields[: Call._fields.index("num_heads")]


def _tensors(given: Arguments) -> tuple[Any, ...]:
    """Whatever may be a tensor."""
    found = [given.input, given.attn_mask, given.key_padding_mask, given.memory_mask]
    norms = given.norms if isinstance(given.norms, tuple) else ()
    for part in (*given[1:3], *norms, given.memory, given.cross_attn, given.cache):
        found += part if isinstance(part, tuple) else (part,)
    return (*found, given.memory_padding_mask)


def _plain_call(given: Arguments) -> Call | None:
    """The call of these arguments as they came, or None of such as an eager call may not be tried
    with."""
    plain = (
        isinstance(given.activation, str | None)
        and given.activation in _linear.NUMBERS
        and type(given.num_heads) is int
        and type(given.norm_first) is bool
        and type(given.is_causal) is bool
        and type(given.past_length) is int
        and type(given.self_attn) is AttentionWeights
        and type(given.feed_forward) is FeedForwardWeights
        and type(given.norms) is tuple
        and len(given.norms) == (2 if given.memory is None else 3)
        and all(map(layers.is_plain_norm, given.norms))
        and (given.cross_attn is None) == (given.memory is None)
        and (given.cache is None or type(given.cache) is tuple)
    )
    try:
        if plain and not any([t.requires_grad for t in given.cache or ()]):
            return _as_call(given)
    except (AttributeError, IndexError, TypeError, ValueError):
        pass  # `check` has the words for it
    return None


def _as_call(given: Arguments) -> Call:
    own, feed, nothing = given.self_attn, given.feed_forward, (None, None, None)
    query, key, value, out = nothing, nothing, nothing, nothing
    norms, projected = given.norms, isinstance(given.memory, tuple)
    if given.memory is None:
        norms = (norms[0], Norm(), norms[1])
    else:
        cross = given.cross_attn
        if projected:
            query = cross.of_query(given.input.shape[-1])
        else:
            query, key, value = cross.each()
        out = cross.out_proj_weight, cross.out_proj_bias, cross.out_proj_scale
    memory = (None, *given.memory) if projected else (given.memory, None, None)
    values: list[Any] = [
        given.input, own.in_proj_weight, own.in_proj_bias, own.k_proj_weight, own.k_proj_bias,
        own.v_proj_weight, own.v_proj_bias, own.out_proj_weight, own.out_proj_bias, *query[:2],
        *key[:2], *value[:2], *out[:2], *feed[:4], *norms[0][:2], *norms[1][:2], *norms[2][:2],
        *memory, given.memory_mask, given.attn_mask, given.key_padding_mask,
        given.memory_padding_mask, own.in_proj_scale, own.k_proj_scale, own.v_proj_scale,
        own.out_proj_scale, query[2], key[2], value[2], out[2], *feed[4:],
        *((None, None) if given.cache is None else given.cache), given.num_heads, given.past_length,
        _linear.NUMBERS[given.activation], given.norm_first, given.is_causal,
        *(norm.eps for norm in norms),
    ]  # fmt: skip
    return Call(*values)


def check(given: Arguments) -> None:
    """Raise TypeError or ValueError for arguments that are not legal."""
    arguments.check_tensors(input=given.input)
    sizes = arguments.shapes(input=given.input)
    if given.input.dim() != 3 or given.input.shape[-1] == 0:
        raise ValueError(f"input must be (batch, length, width), got {sizes}")
    batch, length, width = given.input.shape
    heads, past = given.num_heads, given.past_length
    layers.check_heads(heads, width, "the width", sizes)
    if isinstance(past, bool) or not isinstance(past, int | torch.SymInt):
        raise TypeError(f"past_length must be an int, got {type(past).__name__}")
    if past < 0:
        raise ValueError(f"past_length must not be negative, got {past}")
    if past and given.cache is None:
        raise ValueError(f"past_length must be 0 without a cache, got {past}")
    asked = check_memory(given.memory, given.cross_attn, given.input, heads)
    check_norms(given.norms, 2 if given.memory is None else 3, given.input)
    check_attention("self_attn", given.self_attn, given.input, given.input)
    check_feed_forward("feed_forward", given.feed_forward, given.input, given.activation)
    total = past + length
    check_cache(given.cache, given.input, heads, total)
    target, input = (batch, heads, length), given.input
    arguments.check_attn_mask(given.attn_mask, input, (*target, total), sizes)
    padding = given.key_padding_mask
    arguments.check_padding_mask("key_padding_mask", padding, input, (batch, total), sizes)
    mask, padding = given.memory_mask, given.memory_padding_mask
    if given.memory is None and not (mask is None and padding is None):
        raise ValueError("memory_mask and memory_padding_mask must be None without a memory")
    arguments.check_attn_mask(mask, input, (*target, asked), sizes, name="memory_mask")
    arguments.check_padding_mask("memory_padding_mask", padding, input, (batch, asked), sizes)
    arguments.check_flag("norm_first", given.norm_first)
    arguments.check_flag("is_causal", given.is_causal)


def normalize(given: Arguments) -> Call:
    """Public arguments, cast as autocast asks and checked, as every implementation takes them."""
    dtype = arguments.autocast_dtype(arguments.device_type_of(given.input))
    if dtype is not None:
        given = given._replace(
            input=arguments.autocast_cast(dtype, given.input)[0],
            memory=layers.cast(dtype, given.memory),
            self_attn=cast_weights(dtype, given.self_attn),
            cross_attn=cast_weights(dtype, given.cross_attn),
            feed_forward=cast_weights(dtype, given.feed_forward),
            norms=layers.cast(dtype, given.norms),
            attn_mask=arguments.autocast_mask(dtype, given.attn_mask),
            memory_mask=arguments.autocast_mask(dtype, given.memory_mask),
        )
    if not torch.compiler.is_compiling():
        check(given)
    norms = tuple(norm._replace(eps=float(norm.eps)) for norm in given.norms)
    call = _as_call(given._replace(norms=norms))
    batch, length, _ = call.input.shape
    paddings = {
        "key_padding_mask": (batch, call.past_length + length),
        "memory_padding_mask": (batch, call.memory_length),
    }
    changed: dict[str, Any] = {
        name: getattr(call, name).expand(size)
        for name, size in paddings.items()
        if getattr(call, name) is not None
    }
    return call._replace(**changed)


def run_reference(call: Call, lse: bool) -> Any:
    """The definition."""
    first, past = call.norm_first, call.past_length

    def linear(name: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        result: Tensor = _linear.run_reference(call.linear(name, x, residual), False)
        return result

    def norm(name: str, x: Tensor, wanted: bool) -> Tensor:
        result: Tensor = _norm.run_reference(call.norm(name, x), False) if wanted else x
        return result

    def split(x: Tensor, parts: int) -> tuple[Tensor, ...]:
        heads = x.unflatten(-1, (parts, call.num_heads, -1)).unbind(2)
        return tuple(part.transpose(1, 2) for part in heads)

    x = call.input
    names = [name for name, *_ in call.projections() if name in ("self_q", "self_k", "self_v")]
    scored = norm("norm1", x, first)
    query, key, value = split(torch.cat([linear(name, scored) for name in names], -1), 3)
    if call.key_cache is not None and call.value_cache is not None:
        key = remember(call.key_cache, key, past)
        value = remember(call.value_cache, value, past)
    diagonal = past if call.is_causal else None
    masks = call.attn_mask, call.key_padding_mask
    own, others = call.attention_dtypes
    y = linear("self_out", attend(own, diagonal, query, key, value, *masks), x)
    y = norm("norm1", y, not first)
    if call.has_memory:
        (query,) = split(linear("cross_q", norm("norm2", y, first)), 1)
        if call.memory is not None:
            asked = reference.hide(call.memory[:, None], call.memory_padding_mask)[:, 0]
            (key,), (value,) = (split(linear(name, asked), 1) for name in ("cross_k", "cross_v"))
        else:
            assert call.memory_key is not None and call.memory_value is not None
            key, value = call.memory_key, call.memory_value
        masks = call.memory_mask, call.memory_padding_mask
        y = linear("cross_out", attend(others, None, query, key, value, *masks), y)
        y = norm("norm2", y, not first)
    y = linear("linear2", linear("linear1", norm("norm3", y, first)), y)
    return norm("norm3", y, not first)


def _fake(call: Call) -> Tensor:
    return call.input.new_empty(call.input.shape)


def _operations(
    batch: Any, length: Any, past: Any, width: Any, hidden: Any, asked: Any, memory_width: Any
) -> Any:
    """Of a layer that attends to `asked` tokens of a memory, `memory_width` wide where they have to
    be projected; None: there is none."""
    products = length * width * (4 * width + 2 * hidden) + 2 * length * (past + length) * width
    if asked is not None:
        products += 2 * length * width * width + 2 * length * asked * width
        products += 2 * asked * width * memory_width
    return 2 * batch * products


def _flops(call: Call, backward: bool) -> int:
    batch, length, width = call.input.shape
    asked = call.memory_length if call.has_memory else None
    memory_width = 0 if call.memory is None else call.memory.shape[2]
    operations: int = _operations(
        batch, length, call.past_length, width, call.hidden, asked, memory_width
    )
    return operations * (2 if backward else 1)


DEFINITION = Definition(
    "decoder_layer", Call, gradients=TENSORS.index("attn_mask") + 1, results=1, outputs=1,
    fake=_fake, reference=lambda call: (run_reference(call, False),), flops=_flops,
    written=("key_cache", "value_cache"),
)  # fmt: skip
_CPU = cpu.forward_op(DEFINITION)


def _cpu_refuses(call: Call) -> Sequence[str]:
    return cpu.refuses_gradient(call, DEFINITION)


def _cpu_path(call: Call) -> str:
    ways = {_linear.cpu_path(call.linear(name, x)) for name, x, _ in call.projections()}
    ways.add(_linear.cpu_path(call.linear("linear2", call.input)))
    ways |= attention_path(call.input, *call.attention_dtypes)
    return f"{cpu.isa()}, one call, {', '.join(sorted(ways))}"


def inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: Any = None, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of a legal call, normally distributed, weights as a layer's are.

    Args:
        shape: length, dim, heads and ffn; optionally batch, activation, norm_first and is_causal
            (bools), memory (its length), memory_dim, projected (a bool: its keys and values),
            separate (a bool: weights of key and value apart), past (tokens in a cache), capacity.
    """
    batch, length, width = shape.get("batch", 1), shape["length"], shape["dim"]
    asked, apart, heads = shape.get("memory"), bool(shape.get("separate")), shape["heads"]
    normal = normals(dtype, device, seed)

    def pair(count: int) -> tuple[Tensor, Tensor]:
        size = (batch, heads, count, width // heads)
        return normal(*size), normal(*size)

    call: dict[str, Any] = {
        "input": normal(batch, length, width),
        "self_attn": random_attention(normal, width, width, apart),
        "feed_forward": random_feed_forward(normal, width, shape["ffn"]),
        "norms": tuple(random_norm(normal, width) for _ in range(2 if asked is None else 3)),
        "num_heads": heads,
        "activation": shape.get("activation", "gelu"),
        "norm_first": bool(shape.get("norm_first")),
        "is_causal": bool(shape.get("is_causal")),
    }
    if asked is not None:
        columns = shape.get("memory_dim", width)
        apart = apart or columns != width
        call["cross_attn"] = random_attention(normal, width, columns, apart)
        call["memory"] = pair(asked) if shape.get("projected") else normal(batch, asked, columns)
    if "past" in shape:
        call["cache"] = pair(shape.get("capacity", shape["past"] + length))
        call["past_length"] = shape["past"]
    return call


def cost(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Floating-point operations of the products, and bytes read and written once."""
    length, width, hidden = shape["length"], shape["dim"], shape["ffn"]
    batch, asked, past = shape.get("batch", 1), shape.get("memory"), shape.get("past", 0)
    memory_width = 0 if shape.get("projected") else shape.get("memory_dim", width)
    elements = width * (4 * width + 2 * hidden) + 9 * width + hidden
    tokens = 2 * (2 * length + past)
    if asked is not None:
        elements += 2 * width * (width + memory_width + 2)
        tokens += 2 * asked if shape.get("projected") else 0
        elements += 0 if shape.get("projected") else batch * asked * memory_width
    operations: int = _operations(batch, length, past, width, hidden, asked, memory_width)
    return operations, (elements + batch * tokens * width) * dtype.itemsize


OP = Op(
    name="decoder_layer",
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
