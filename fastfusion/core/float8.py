"""Keys and values of 8-bit floats (E4M3: Micikevicius et al., "FP8 Formats for Deep Learning",
2022), as caches of inference have them: each number counts times a scale of its head."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments

DTYPE = torch.float8_e4m3fn
_SCALES = ("key_scale", "value_scale")


def has(key: Any) -> bool:
    """Whether keys, and so values, are of 8 bits."""
    return isinstance(key, Tensor) and key.dtype is DTYPE


def check_tensors(query: Any, key: Any, value: Any) -> None:
    """As of any attention, but that key and value may be of 8 bits."""
    if not has(key) and not has(value):
        arguments.check_tensors(query=query, key=key, value=value)
        return
    arguments.check_tensors(query=query)
    for name, tensor in (("key", key), ("value", value)):
        if not has(tensor):
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"key and value must both be float8_e4m3fn or none, got {name} {given}")
        _check_constant(name, tensor)
        arguments.check_device(name, tensor, "query", query)


def _check_constant(name: str, tensor: Tensor) -> None:
    arguments.check_dense(name, tensor)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which 8-bit keys and values do not have")


def check_scales(given: Any, target: tuple[int, ...], sizes: str) -> None:
    """Raise TypeError or ValueError for scales that are not legal, of batch and key heads."""
    for name in _SCALES:
        scale = getattr(given, name)
        if scale is None:
            continue
        if not isinstance(scale, Tensor):
            raise TypeError(f"{name} must be a Tensor or None, got {type(scale).__name__}")
        if not has(given.key):
            raise ValueError(f"{name} needs key and value of float8_e4m3fn, got {given.key.dtype}")
        if scale.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {scale.dtype}")
        _check_constant(name, scale)
        arguments.check_device(name, scale, "query", given.query)
        if not arguments.broadcasts(scale, target):
            raise ValueError(
                f"{name} must broadcast to (batch, kv_heads), {target}, got shape "
                f"{tuple(scale.shape)} with {sizes}"
            )


def autocast(dtype: torch.dtype | None, *operands: Any) -> tuple[Any, ...]:
    """Query, key and value as autocast casts them, which leaves 8 bits alone."""
    if not has(operands[1]):
        return arguments.autocast_cast(dtype, *operands)
    return (*arguments.autocast_cast(dtype, operands[0]), *operands[1:])


def scales_of(given: Any, *sizes: Any) -> tuple[Tensor | None, Tensor | None]:
    """The scales of an op's arguments as calls have them: of these sizes, batch and heads last."""
    key, value = (
        scale if scale is None else scale.expand(sizes)
        for scale in (getattr(given, name) for name in _SCALES)
    )
    return key, value


def conditions(call: Any, batch: Any, heads: Any) -> Iterator[Any]:
    """What holds for the dtypes of a call's tensors, and for its scales."""
    query, key, value = call.query, call.key, call.value
    scales = [scale for scale in (call.key_scale, call.value_scale) if scale is not None]
    if key.dtype is not DTYPE:
        yield arguments.are_alike(query, key, value) and not scales
        return
    yield arguments.are_alike(query) and value.dtype is DTYPE
    yield all([t.device == query.device for t in (key, value, *scales)])
    yield all([t.layout is torch.strided for t in (key, value, *scales)])
    yield not (torch.is_grad_enabled() and any([t.requires_grad for t in (key, value, *scales)]))
    for scale in scales:
        yield scale.dtype == torch.float32
        yield scale.dim() == 2
        yield scale.shape[0] == batch
        yield scale.shape[1] == heads


def widened(call: Any, dtype: torch.dtype) -> Any:
    """The same call of this dtype, keys and values times their scales."""

    def times(tensor: Tensor, scale: Tensor | None) -> Tensor:
        tensor = tensor.to(dtype)
        return tensor if scale is None else tensor * scale.to(dtype)[..., None, None]

    return call._replace(
        query=call.query.to(dtype),
        key=times(call.key, call.key_scale),
        value=times(call.value, call.value_scale),
        key_scale=None,
        value_scale=None,
    )


def refuses(call: Any) -> Sequence[str]:
    """Why kernels that know no keys of 8 bits cannot run a call."""
    if call.key.dtype is not DTYPE:
        return ()
    return ("keys and values of 8 bits are left to the CUDA kernels and the reference",)
