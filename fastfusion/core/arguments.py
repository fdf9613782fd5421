"""Checks and shape arithmetic that the op specifications share."""

import numbers
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
# Of a scale; what is finite in float64 alone goes the long road.
MAX_SCALE = torch.finfo(torch.float32).max
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shapes(**tensors: Tensor | None) -> str:
    """`query (1, 2, 3, 4), key (1, 2, 5, 4)`: how every message prints what it was given."""
    given = [f"{name} {tuple(t.shape)}" for name, t in tensors.items() if isinstance(t, Tensor)]
    return ", ".join(given)


def check_tensors(**tensors: Any) -> None:
    """Every argument is a dense tensor of one supported floating dtype, on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}"
            )
        check_device(name, tensor, first_name, first)


def check_dense(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise TypeError(
            f"{name} is a nested tensor; ops take its values and offsets: "
            "fastfusion.varlen_attention"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def check_device(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    if tensor.device != first.device:
        raise ValueError(
            f"{name} must be on the device of {first_name}, {first.device}, got {tensor.device}"
        )


def are_plain(mask: Any, dropout_p: Any, scale: Any, causal_alignment: Any) -> bool:
    """Whether an eager call may be tried with these arguments as they came: of the types that ops
    take, which would take 1 for True and a tensor for a number, and without dropout."""
    return (
        type(mask) in PLAIN
        and type(dropout_p) is float
        and dropout_p == 0.0
        and (scale is None or type(scale) is float)
        and causal_alignment in ALIGNMENTS
    )


def is_readable(offsets: Tensor) -> bool:
    """Whether reading the values costs and breaks nothing: on the CPU, and nobody traces."""
    return (
        not torch.compiler.is_compiling()
        and offsets.is_cpu
        and type(offsets) in PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def check_offsets(
    name: str, offsets: Any, total: int, like: Tensor, liked: str, what: str
) -> list[int] | None:
    """Where packed sequences begin: int32 or int64 (sequences + 1,), on the device of `like`, which
    is the argument `liked`. The values, which are those of legal ones, where they can be read.

    Args:
        total: how many there are of `what`.
    """
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(offsets).__name__}")
    check_dense(name, offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"{name} must have shape (sequences + 1,), got {tuple(offsets.shape)}")
    check_device(name, offsets, liked, like)
    if not is_readable(offsets):
        return None
    values: list[int] = offsets.tolist()
    falls = any(b < a for a, b in zip(values, values[1:], strict=False))
    if values[0] != 0 or values[-1] > total or falls:
        raise ValueError(
            f"{name} must start at 0, never fall and end at {total} or before, {what}; got "
            f"{values if len(values) < 9 else '...'}"
        )
    return values


def are_alike(first: Tensor, *others: Tensor) -> bool:
    """Whether these are dense tensors of one floating dtype, on one device."""
    dtype, device = first.dtype, first.device
    return (
        dtype in FLOATING
        and all([t.dtype is dtype and t.device == device for t in others])
        and all([t.layout is torch.strided for t in (first, *others)])
    )


def mask_fits(mask: Tensor | None, query: Tensor, *sizes: Any) -> bool:
    """Whether kernels can read `mask`.

    Raises:
        RuntimeError: it does not broadcast to `sizes`.
    """
    if mask is None:
        return True
    mask.expand(*sizes)
    return mask.device == query.device and mask.dtype in (torch.bool, torch.float32, query.dtype)


def padding_fits(mask: Tensor | None, query: Tensor, batch: Any, length: Any) -> Iterator[Any]:
    """What holds for a padding mask of a normal call."""
    if mask is not None:
        yield mask.dtype == torch.bool and mask.device == query.device and mask.dim() == 2
        yield mask.shape[0] == batch
        yield mask.shape[1] == length


def numbers_fit(seed: Tensor | None, query: Tensor, scale: float | None) -> bool:
    return (seed is None or seed.device == query.device) and (
        scale is None or abs(scale) <= MAX_SCALE
    )


def ask_torch_function(
    function: Callable[..., Any], given: Any, positional: int, tensors: tuple[Any, ...]
) -> Any:
    """What a tensor subclass or a mode makes of a call, as with torch's functions, or
    NotImplemented where nobody has to be asked. torch's causal masks are ours.

    Args:
        function: a public function of an op.
        given: its arguments, as a NamedTuple.
        positional: how many of them may be given without a name.
        tensors: those that may be tensors.
    """
    asked = tuple(t for t in tensors if causal_bias(t) is None)
    if not has_torch_function_variadic(*asked):
        return NotImplemented
    named = dict(zip(given._fields[positional:], given[positional:], strict=True))
    return handle_torch_function(function, asked, *given[:positional], **named)


def check_attn_mask(
    mask: Any, query: Tensor, target: tuple[int, ...], given: str, name: str = "attn_mask"
) -> None:
    """`mask` is bool, or float to be added, and broadcasts to `target`."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(mask).__name__}")
    check_dense(name, mask)
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise TypeError(
            f"{name} must be bool, float32 or of the query's dtype, {query.dtype}, got {mask.dtype}"
        )
    check_device(name, mask, "query", query)
    if not broadcasts(mask, target):
        raise ValueError(
            f"{name} must broadcast to {target}, got shape {tuple(mask.shape)}; {given}"
        )


def check_padding_mask(
    name: str, mask: Any, query: Tensor, target: tuple[int, ...], given: str
) -> None:
    """`mask` is bool, True = ignore, and broadcasts to `target`."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(mask).__name__}")
    check_dense(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True = ignore), got {mask.dtype}")
    check_device(name, mask, "query", query)
    if not broadcasts(mask, target):
        raise ValueError(f"{name} must broadcast to {target}, got {tuple(mask.shape)}; {given}")


def broadcasts(mask: Tensor, target: tuple[int, ...]) -> bool:
    pairs = zip(reversed(mask.shape), reversed(target), strict=False)
    return mask.dim() <= len(target) and all(m in (1, t) for m, t in pairs)


def number(name: str, value: Any) -> Any:
    """A Python number for one of NumPy or a tensor without dimensions; anything else as it is.

    Raises:
        TypeError: a tensor that requires a gradient, which would be lost.
    """
    if isinstance(value, Tensor) and value.dim() == 0 and value.dtype != torch.bool:
        if value.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{name} must be a number here: a tensor's gradient would be lost "
                "(multiply the query by it instead)"
            )
        return value.item()
    if type(value) in (int, float, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def check_scale(scale: Any, query: Tensor) -> None:
    """`scale` is a number that is finite in the dtype of the scores."""
    if scale is None:
        if query.shape[-1] == 0:
            raise ValueError("scale must be given where head_dim is 0")
        return
    scale = number("scale", scale)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
    scores = torch.promote_types(query.dtype, torch.float32)
    if not abs(scale) <= torch.finfo(scores).max:
        raise ValueError(f"scale must be finite in {scores}, got {scale}")


def check_dropout(dropout_p: Any) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, int | float):
        raise TypeError(f"dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")


def check_flag(name: str, flag: Any) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")


ALIGNMENTS = ("top_left", "bottom_right")
BOTTOM_RIGHT = {"top_left": False, "bottom_right": True}


def check_alignment(causal_alignment: Any) -> None:
    if not isinstance(causal_alignment, str) or causal_alignment not in ALIGNMENTS:
        raise ValueError(
            f"causal_alignment must be top_left or bottom_right, got {causal_alignment!r}"
        )


def causal_bias(mask: Any) -> Any:
    """`mask` if it is one of torch's objects for a causal mask (`torch.nn.attention.bias`), whose
    own memory is empty; otherwise None."""
    if type(mask) in PLAIN:
        return None
    module = sys.modules.get("torch.nn.attention.bias")  # whoever has made one has imported it
    return mask if module is not None and isinstance(mask, module.CausalBias) else None


def resolve_causal(
    mask: Any, is_causal: Any, causal_alignment: Any, q_len: int, kv_len: int
) -> tuple[Any, Any, Any]:
    """(attn_mask, is_causal, causal_alignment), the flags in the place of a causal mask object.

    Raises:
        ValueError: the object beside is_causal=True, as in torch, or one for other lengths.
    """
    bias = causal_bias(mask)
    if bias is None:
        return mask, is_causal, causal_alignment
    if is_causal is True:
        raise ValueError("attn_mask is a causal mask already: is_causal must be False beside it")
    made_for = (bias.seq_len_q, bias.seq_len_kv)
    if made_for != (q_len, kv_len):
        raise ValueError(f"attn_mask is a causal mask for {made_for}, got lengths {q_len, kv_len}")
    return None, True, "bottom_right" if bias.variant.name == "LOWER_RIGHT" else "top_left"


def broadcast(*shapes: torch.Size) -> torch.Size:
    """To what these broadcast. torch's function takes 9 us also where they are one and the same.

    Raises:
        RuntimeError: they do not.
    """
    first = shapes[0]
    if not torch.compiler.is_compiling() and all([shape == first for shape in shapes]):
        return first
    return torch.broadcast_shapes(*shapes)


def with_a_head_dim(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries and keys as they are; where head_dim is 0, with one of zeros: scores are 0."""
    if tensors[0].shape[-1] > 0:
        return tensors
    return tuple(torch.nn.functional.pad(t, (0, 1)) for t in tensors)


def softmax_scale(scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if scale is None else scale


def device_type_of(tensor: Any) -> str:
    """Of the first argument, which the check has not seen yet and need not be a tensor."""
    return tensor.device.type if isinstance(tensor, Tensor) else "cpu"


def is_exporting() -> bool:
    """Whether torch.export traces. torch.compile of torch 2.11 takes torch.compiler.is_exporting()
    for true, but reads the flag behind it as it is."""
    return torch.compiler._is_exporting_flag


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that an enabled autocast asks for on this device, None if there is none."""
    try:
        enabled = torch.is_autocast_enabled(device_type)
    except RuntimeError:  # a device type without autocast, such as meta
        return None
    return torch.get_autocast_dtype(device_type) if enabled else None


def autocast_cast(dtype: torch.dtype | None, *tensors: Any) -> tuple[Any, ...]:
    """As torch's own autocast does: floating tensors are cast, float64 and others are not.

    Runs before the check, since under autocast dtypes may be mixed; leaves alone what is no tensor.
    """
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if _is_cast(t) else t for t in tensors)


def autocast_mask(dtype: torch.dtype | None, mask: Any) -> Any:
    """A float mask as float32: cast to 16 bits, the finfo.min of float32 would become -inf."""
    return mask.float() if dtype is not None and _is_cast(mask) else mask


def _is_cast(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
