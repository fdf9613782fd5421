"""Checks and shape arithmetic that the op specifications share."""

from typing import Any

import torch
from torch import Tensor

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
            f"{name} is a nested tensor; pass its values and offsets to "
            "fastfusion.varlen_attention, or use the modules of fastfusion.nn"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def check_device(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    if tensor.device != first.device:
        raise ValueError(
            f"{name} must be on the device of {first_name}, {first.device}, got {tensor.device}"
        )


def check_one_device(first: Tensor, *others: Tensor | None) -> None:
    """For fakes: a meta tensor among real ones brings a call to them and would have no result."""
    for tensor in others:
        torch._check(tensor is None or tensor.device == first.device)


def check_attn_mask(mask: Any, query: Tensor, target: tuple[int, ...], given: str) -> None:
    """`mask` is bool, or float to be added, and broadcasts to `target`."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a Tensor or None, got {type(mask).__name__}")
    check_dense("attn_mask", mask)
    if mask.dtype not in (torch.bool, query.dtype, torch.float32) or (
        mask.dtype == torch.float32 and query.dtype == torch.float64
    ):
        raise TypeError(
            f"attn_mask must be bool, float32 or of the query's dtype, {query.dtype}, "
            f"got {mask.dtype}"
        )
    check_device("attn_mask", mask, "query", query)
    pairs = zip(reversed(mask.shape), reversed(target), strict=False)
    if mask.dim() > len(target) or any(m not in (1, t) for m, t in pairs):
        raise ValueError(
            f"attn_mask must broadcast to {target}, got shape {tuple(mask.shape)}; {given}"
        )


def check_padding_mask(
    name: str, mask: Any, query: Tensor, target: tuple[int, ...], given: str
) -> None:
    """`mask` is bool, True = ignore, of exactly the shape `target`."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(mask).__name__}")
    check_dense(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True = ignore), got {mask.dtype}")
    check_device(name, mask, "query", query)
    if tuple(mask.shape) != target:
        raise ValueError(f"{name} must have shape {target}, got {tuple(mask.shape)}; {given}")


def check_scale(scale: Any, query: Tensor) -> None:
    """`scale` is a number that is finite in the dtype of the scores."""
    if scale is None:
        return
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


def softmax_scale(scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if scale is None else scale


def device_type_of(tensor: Any) -> str:
    """Of the first argument, which the check has not seen yet and need not be a tensor."""
    return tensor.device.type if isinstance(tensor, Tensor) else "cpu"


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
