"""The parts of whole Transformer layers: how an op is given them, and their checks."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfusion.core import arguments, layers, reference
from fastfusion.core.export_mode import is_plain
from fastfusion.core.score_policy import causal
from fastfusion.ops import linear as _linear
from fastfusion.ops import norm as _norm

# Why a backend without such kernels refuses a call.
NARROW_WEIGHTS = "weights narrower than the tokens are left to the CPU and the reference"


class AttentionWeights(NamedTuple):
    """The projections of an attention, as `torch.nn.MultiheadAttention` or three linear layers keep
    them.

    Attributes:
        in_proj_weight, in_proj_bias: (3 * width, width) and (3 * width,): query, key and value side
            by side. Beside `k_proj_weight`, or where keys and values are projected already, the
            query's alone: (width, width) and (width,).
        out_proj_weight, out_proj_bias: (width, width) and (width,).
        k_proj_weight, k_proj_bias, v_proj_weight, v_proj_bias: of key and value, (width, the width
            of what is attended to) and (width,); both weights or neither. Any bias may be None.
        in_proj_scale, out_proj_scale, k_proj_scale, v_proj_scale: of weights of 8-bit integers, as
            `weight_scale` of `linear`; in_proj, where it is all three, in three parts.
    """

    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    k_proj_weight: Tensor | None = None
    k_proj_bias: Tensor | None = None
    v_proj_weight: Tensor | None = None
    v_proj_bias: Tensor | None = None
    in_proj_scale: Tensor | None = None
    out_proj_scale: Tensor | None = None
    k_proj_scale: Tensor | None = None
    v_proj_scale: Tensor | None = None

    def each(self) -> tuple[tuple[Tensor | None, ...], ...]:
        """Weight, bias and scale of query, key and value; views of a weight that is all three."""
        weight, bias, scale = self.in_proj_weight, self.in_proj_bias, self.in_proj_scale
        if not self.is_packed():
            key = self.k_proj_weight, self.k_proj_bias, self.k_proj_scale
            value = self.v_proj_weight, self.v_proj_bias, self.v_proj_scale
            return (weight, bias, scale), key, value
        biases, scales = ((None,) * 3 if t is None else t.chunk(3) for t in (bias, scale))
        return tuple(zip(weight.chunk(3), biases, scales, strict=True))

    def of_query(self, width: int) -> tuple[Tensor | None, ...]:
        """The same of the query, which is so wide, where nothing else is asked for."""
        if self.is_packed() and not self.is_query_alone(width):
            return self.each()[0]
        return self.in_proj_weight, self.in_proj_bias, self.in_proj_scale

    def is_packed(self) -> bool:
        """Whether there are no weights of key and value.

        Raises:
            ValueError: there is something else of theirs.
        """
        if self.k_proj_weight is None:
            check_separate("", self)
        return self.k_proj_weight is None

    def is_query_alone(self, width: int) -> bool:
        """Whether in_proj projects a query of this width and nothing else."""
        like = self.in_proj_weight if self.in_proj_scale is None else self.in_proj_scale
        return isinstance(like, Tensor) and like.dim() > 0 and like.shape[0] == width


class FeedForwardWeights(NamedTuple):
    """The two linear layers of a feed-forward network.

    Attributes:
        linear1_weight, linear1_bias: (hidden, width) and (hidden,).
        linear2_weight, linear2_bias: (width, hidden) and (width,).
        linear1_scale, linear2_scale: of weights of 8-bit integers, as `weight_scale` of `linear`.
    """

    linear1_weight: Tensor
    linear1_bias: Tensor | None
    linear2_weight: Tensor
    linear2_bias: Tensor | None
    linear1_scale: Tensor | None = None
    linear2_scale: Tensor | None = None


class StreamWeights(NamedTuple):
    """What one stream of a fusion layer owns, as torch.nn.Linear and torch.nn.LayerNorm keep it.

    Attributes:
        in_weight: (2 * embed_dim, width): what scores are made of, then values.
        in_bias: (2 * embed_dim,), or None, as every bias.
        out_weight: (width, embed_dim).
        linear1_weight: (dim_feedforward, width).
        linear2_weight: (width, dim_feedforward).
        norm1, norm2: `Norm`, LayerNorms of `width` numbers.
        in_scale, out_scale, linear1_scale, linear2_scale: of weights of 8-bit integers, as
            `weight_scale` of `linear`.
    """

    in_weight: Tensor
    in_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    linear1_weight: Tensor
    linear1_bias: Tensor | None
    linear2_weight: Tensor
    linear2_bias: Tensor | None
    norm1: layers.Norm
    norm2: layers.Norm
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    linear1_scale: Tensor | None = None
    linear2_scale: Tensor | None = None


def checked(name: str, check: Any, given: Any) -> None:
    """`check`, with a part's name before the argument's."""
    try:
        check(given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def check_product(
    name: str, weights: tuple[Any, Any, Any], x: Tensor, features: int | None, **options: Any
) -> int:
    """Weight, bias and scale for rows like those of `x`: how many features they have, which are
    `features` where these are known."""
    weight, bias, scale = weights
    x = x.new_empty(0, x.shape[-1])
    checked(name, _linear.check, _linear.Arguments(x, weight, bias, weight_scale=scale, **options))
    found: int = (weight if scale is None else scale).shape[0]
    if features is not None and found != features:
        raise ValueError(f"{name}_weight must have {features} features, got {found}")
    if found == 0:
        raise ValueError(f"{name}_weight must have a feature at least, got 0")
    return found


def check_any_product(
    name: str, weights: tuple[Any, Any, Any], x: Tensor, features: int | None, what: str, sizes: str
) -> int:
    """The same of a weight that is wide or narrow; `what` says where the sizes of a wide one come
    from."""
    weight, bias, scale = weights
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}_weight must be a Tensor, got {type(weight).__name__}")
    if _linear.has_own_dtype(x, weight, scale):
        return check_product(name, weights, x, features)
    if weight.dim() != 2:
        raise ValueError(f"{name}_weight must be {what}, got {sizes}")
    found: int = weight.shape[0] if features is None else features
    layers.check_linear(name, weight, bias, found, x.shape[-1], what, sizes)
    return found


def alike_of(tensors: dict[str, Any], x: Any) -> dict[str, Any]:
    """Of a layer's tensors by name those that are of the dtype of its tokens x: all but weights
    that are narrower, and scales."""

    def is_narrow(name: str, tensor: Any) -> bool:
        scale = tensors.get(f"{name.removesuffix('_weight')}_scale")
        given = isinstance(x, Tensor) and isinstance(tensor, Tensor)
        return given and name.endswith("_weight") and _linear.has_own_dtype(x, tensor, scale)

    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (name.endswith("_scale") or is_narrow(name, tensor))
    }


def check_separate(name: str, given: Any) -> None:
    """Key and value are projected by weights of their own, or neither is."""
    if (given.k_proj_weight is None) != (given.v_proj_weight is None):
        raise ValueError(f"{name}k_proj_weight and v_proj_weight must both be given, or neither")
    if given.k_proj_weight is None:
        for part in ("k_proj_bias", "k_proj_scale", "v_proj_bias", "v_proj_scale"):
            if getattr(given, part) is not None:
                raise ValueError(f"{name}{part} must be None without {part[:6]}_weight")


def part_of(given: Any, name: str) -> tuple[Any, Any, Any]:
    """Weight, bias and scale of a linear layer among arguments or weights."""
    weight, bias, scale = (getattr(given, f"{name}_{s}") for s in ("weight", "bias", "scale"))
    return weight, bias, scale


def check_attention(name: str, weights: Any, input: Tensor, memory: Tensor | None) -> None:
    """The projections of an attention of `input` to `memory`; None: to keys and values that are
    there."""
    if not isinstance(weights, AttentionWeights):
        kind = type(weights).__name__
        raise TypeError(f"{name} must be fastfusion.ops.AttentionWeights, got {kind}")
    width, w = input.shape[2], weights
    check_separate(f"{name}: ", w)
    apart = w.k_proj_weight is not None or (memory is None and w.is_query_alone(width))
    in_proj = part_of(w, "in_proj")
    check_product(f"{name}: in_proj", in_proj, input, width if apart else 3 * width)
    if apart and memory is not None:
        for part in ("k_proj", "v_proj"):
            check_product(f"{name}: {part}", part_of(w, part), memory, width)
    elif memory is not None and memory.shape[2] != width:
        raise ValueError(
            f"{name}: k_proj_weight and v_proj_weight must be given where memory is not as wide as "
            f"input, got {arguments.shapes(input=input, memory=memory)}"
        )
    elif not (apart or memory is input or w.in_proj_scale is None or len(w.in_proj_weight) == 3):
        raise ValueError(f"{name}: in_proj_weight must be packed in three parts")
    check_product(f"{name}: out_proj", part_of(w, "out_proj"), input, width)


def check_feed_forward(name: str, weights: Any, input: Tensor, activation: Any) -> None:
    if not isinstance(weights, FeedForwardWeights):
        kind = type(weights).__name__
        raise TypeError(f"{name} must be fastfusion.ops.FeedForwardWeights, got {kind}")
    first = part_of(weights, "linear1")
    hidden = check_product(f"{name}: linear1", first, input, None, activation=activation)
    given = input.new_empty(0, hidden)
    check_product(f"{name}: linear2", part_of(weights, "linear2"), given, input.shape[2])


def cast_weights(dtype: Any, weights: Any) -> Any:
    """All but scales, as autocast does."""
    if not isinstance(weights, AttentionWeights | FeedForwardWeights):
        return weights
    names = [name for name in weights._fields if not name.endswith("scale")]
    values = arguments.autocast_cast(dtype, *(getattr(weights, name) for name in names))
    return weights._replace(**dict(zip(names, values, strict=True)))


def check_norms(norms: Any, count: int, input: Tensor) -> None:
    if not isinstance(norms, tuple):
        raise TypeError(f"norms must be a tuple of fastfusion.ops.Norm, got {type(norms).__name__}")
    if len(norms) != count:
        raise ValueError(f"norms must be {count}, got {len(norms)}")
    for i, norm in enumerate(norms):
        layers.check_is_norm(f"norms[{i}]", norm)
        weight, bias, eps = norm
        checked(f"norms[{i}]", _norm.check, _norm.Arguments(input, weight, bias, eps=eps))


def check_memory(memory: Any, weights: Any, input: Tensor, heads: int) -> int:
    """A memory and the projections of attention to it: the length of it."""
    if (memory is None) != (weights is None):
        raise ValueError("memory and cross_attn must both be given, or neither")
    if memory is None:
        return 0
    if isinstance(memory, tuple):
        length = check_keys_and_values("memory", memory, input, heads)
        check_attention("cross_attn", weights, input, None)
        return length
    arguments.check_tensors(input=input, memory=memory)
    sizes = arguments.shapes(input=input, memory=memory)
    layers.check_sequence("memory", memory, input.shape[0], sizes)
    check_attention("cross_attn", weights, input, memory)
    return memory.shape[1]


def check_keys_and_values(name: str, pair: Any, input: Tensor, heads: int) -> int:
    """A pair for an attention of `input`: how many there are."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"{name} must be a pair of keys and values, got {type(pair).__name__}")
    keys, values = pair
    given = {f"{name}[0]": keys, f"{name}[1]": values}
    if isinstance(keys, Tensor) and _is_narrow(input, keys):
        arguments.check_tensors(**given)
        arguments.check_device(f"{name}[0]", keys, "input", input)
    else:
        arguments.check_tensors(input=input, **given)
    batch, _, width = input.shape
    shape = tuple(keys.shape)
    if len(shape) != 4 or shape != (batch, heads, shape[2], width // heads):
        raise ValueError(
            f"the keys of {name} must be {(batch, heads, 'length', width // heads)}, got {shape}"
        )
    if values.shape != keys.shape:
        raise ValueError(
            f"the values of {name} must have the shape of its keys, {shape}, got "
            f"{tuple(values.shape)}"
        )
    return shape[2]


def check_cache(cache: Any, input: Tensor, heads: int, total: int) -> None:
    """Keys and values with room for `total`, which can be written to."""
    if cache is None:
        return
    capacity = check_keys_and_values("cache", cache, input, heads)
    if capacity < total:
        raise ValueError(f"cache must have room for {total} tokens, got {capacity}")
    for i, tensor in enumerate(cache):
        if tensor.requires_grad:
            raise ValueError(f"cache[{i}] must not require a gradient: it is written to")
        if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(f"cache[{i}] must have memory for every number, got strides of 0")


def heads_fit(x: Tensor, shape: tuple[Any, ...], *given: Tensor | None) -> Iterator[Any]:
    """What holds for keys and values of this shape."""
    kept = [tensor for tensor in given if tensor is not None]
    if kept:
        yield arguments.are_alike(*kept)
        yield kept[0].device == x.device
        yield kept[0].dtype == x.dtype or _is_narrow(x, kept[0])
    for tensor in kept:
        yield tensor.dim() == 4
        for size, expected in zip(tensor.shape, shape, strict=True):
            yield size == expected


def _is_narrow(x: Tensor, keys: Tensor) -> bool:
    """Whether keys make an attention of `x` one of bfloat16."""
    return x.dtype == torch.float32 and keys.dtype == torch.bfloat16


def attention_dtype(x: Tensor, *weights: Tensor) -> torch.dtype:
    """Of an attention whose queries, keys and values these weights project from tokens like `x`:
    what weights narrower than float32 gave has no more digits than bfloat16.

    Programs for others (`export_mode`) are spared the rounding.
    """
    if x.dtype != torch.float32 or is_plain():
        return x.dtype
    narrow = all(weight.dtype in (torch.bfloat16, torch.uint8) for weight in weights)
    return torch.bfloat16 if narrow else torch.float32


def keys_dtype(call: Any, kind: str, keys: Tensor | None) -> torch.dtype:
    """Of an attention to keys that are given, or projected by weights of these names in a call."""
    if keys is not None:
        return keys.dtype
    weights = (getattr(call, f"{kind}_{part}_weight") for part in "qkv")
    return attention_dtype(call.input, *(w for w in weights if w is not None))


def attention_path(x: Tensor, *dtypes: torch.dtype) -> set[str]:
    """What there is to say of attentions in these dtypes."""
    return {f"attention in {str(d).removeprefix('torch.')}" for d in dtypes if d != x.dtype}


def attend(
    dtype: torch.dtype,
    diagonal: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    """The reference of an attention in a dtype: (batch, length, heads * head_dim) in that of the
    query."""
    q, k, v = (reference.cast(t, dtype) for t in (query, key, value))
    out, _ = reference.attention(
        causal(diagonal), q, k, v, attn_mask, key_padding_mask, None, 0.0, scale
    )
    return reference.cast(out, query.dtype).transpose(1, 2).flatten(2)


def remember(cache: Tensor, new: Tensor, past: int) -> Tensor:
    """What is in the cache and the new behind it, which goes there, too."""
    new = reference.cast(new, cache.dtype)
    together = torch.cat([cache[:, :, :past], new], 2)
    cache[:, :, past : past + new.shape[2]].copy_(new.detach())
    return together


def project_memory(
    memory: Tensor, cross_attn: AttentionWeights, num_heads: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values of a memory, for `decoder_layer` calls that share it.

    Args:
        memory: (batch, memory_length, memory_width).
        cross_attn: the projections of attention to it.
        num_heads: of the attention.
        backend: as of `linear`.

    Returns:
        Keys and values, each (batch, num_heads, memory_length, head_dim): of the dtype of the
        memory, or of bfloat16 where that is float32 and the weights of query, key and value are of
        bfloat16 or 8-bit integers.

    Raises:
        TypeError, ValueError: as of `decoder_layer`.
    """
    if not isinstance(cross_attn, AttentionWeights):
        raise TypeError(f"cross_attn must be AttentionWeights, got {type(cross_attn).__name__}")
    projections = cross_attn.each()
    key, value = (
        _linear.linear(memory, weight, bias, weight_scale=scale, backend=backend)  # type: ignore[arg-type]
        for weight, bias, scale in projections[1:]
    )
    dtype = attention_dtype(key, *(weight for weight, _, _ in projections))  # type: ignore[arg-type]
    if memory.dim() != 3 or num_heads < 1 or key.shape[-1] % num_heads:
        raise ValueError(
            "memory must be (batch, memory_length, memory_width) and num_heads divide the width, "
            f"got {num_heads} and {arguments.shapes(memory=memory)}"
        )
    # A head's rows side by side, as one that is read for every token should be.
    key, value = (
        t.to(dtype).unflatten(-1, (num_heads, -1)).transpose(1, 2).contiguous()
        for t in (key, value)
    )
    return key, value


# ---- a layer's call as those of its parts


def linear_call(call: Any, name: str, x: Tensor, residual: Tensor | None = None) -> _linear.Call:
    """Of one of the linear layers; linear1 has the activation."""
    weight, bias, scale = part_of(call, name)
    activation = call.activation if name == "linear1" else 0
    return _linear.Call(x, weight, bias, residual, scale, activation)


def norm_call(call: Any, name: str, x: Tensor) -> _norm.Call:
    """Of one of the norms."""
    weight, bias, eps = (getattr(call, f"{name}_{s}") for s in ("weight", "bias", "eps"))
    return _norm.Call(x, weight, bias, None, eps, False)


# ---- numbers for `inputs`


def normals(dtype: torch.dtype, device: Any, seed: int) -> Callable[..., Tensor]:
    """Normally distributed numbers of these sizes, times `scale`: the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device() if device is None else device

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        numbers = torch.randn(size, generator=generator, device="cpu") * scale
        return numbers.to(device=device, dtype=dtype)

    return normal


def random_mask(
    kind: Any, normal: Any, heads: int, lengths: tuple[int, int], padding: str
) -> Tensor:
    """A bool mask of which a fifth is hidden, or a float for each head and score.

    Args:
        padding: the other kind that an op's `inputs` take.
    """
    if kind == "bool":
        shown: Tensor = normal(*lengths) > -0.84
        return shown
    if kind == "bias":
        bias: Tensor = normal(1, heads, *lengths)
        return bias
    raise ValueError(f"mask must be {padding}, bool, bias or None, got {kind!r}")


def some_padding(batch: int, length: int, device: Any) -> Tensor:
    """The last quarter of every second sequence hidden."""
    hidden = torch.zeros(batch, length, dtype=torch.bool, device="cpu")
    hidden[::2, length - length // 4 :] = True
    return hidden.to(torch.get_default_device() if device is None else device)


def random_linear(normal: Any, features: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weight and bias as a layer's are."""
    return normal(features, columns, scale=columns**-0.5), normal(features, scale=0.1)


def random_norm(normal: Any, width: int) -> layers.Norm:
    return layers.Norm(1.0 + normal(width, scale=0.1), normal(width, scale=0.1))


def random_attention(normal: Any, width: int, columns: int, apart: bool) -> AttentionWeights:
    """Of an attention to what is `columns` wide."""
    query = random_linear(normal, width if apart else 3 * width, width)
    others = [random_linear(normal, width, columns) for _ in range(2 if apart else 0)]
    out = random_linear(normal, width, width)
    return AttentionWeights(*query, *out, *(t for pair in others for t in pair))


def random_feed_forward(normal: Any, width: int, hidden: int) -> FeedForwardWeights:
    first = random_linear(normal, hidden, width)
    return FeedForwardWeights(*first, *random_linear(normal, width, hidden))
