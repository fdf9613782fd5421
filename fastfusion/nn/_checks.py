"""Checks that the fusion modules share: of constructor arguments and of inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfusion.core import arguments

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


def check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"{name} must be an int, got {count!r}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def check_dropout(dropout: Any) -> None:
    if not isinstance(dropout, int | float) or isinstance(dropout, bool):
        raise TypeError(f"dropout must be a float, got {dropout!r}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be between 0 and 1, got {dropout}")


def check_activation(activation: Any) -> None:
    if not (callable(activation) or (isinstance(activation, str) and activation in ACTIVATIONS)):
        raise ValueError(f"activation must be relu, gelu or callable, got {activation!r}")


def check_sequences(
    sequences: dict[str, Any], widths: Sequence[int], projections: Sequence[Any]
) -> tuple[torch.dtype | None, str]:
    """Tensors (batch, length, width) of one batch, dtype and device, for one module each.

    Returns:
        The dtype of an enabled autocast, which lets dtypes differ, and the shapes for messages.
    """
    dtype = check_inputs(sequences, projections)
    given = arguments.shapes(**sequences)
    batch = None
    for (name, tensor), width in zip(sequences.items(), widths, strict=True):
        if tensor.dim() != 3 or tensor.shape[2] != width:
            raise ValueError(f"{name} must have shape (batch, length, {width}), got {given}")
        if batch is not None and tensor.shape[0] != batch:
            first = next(iter(sequences))
            raise ValueError(f"{name} must have the batch size of {first}, got {given}")
        batch = tensor.shape[0]
    return dtype, given


def check_inputs(tensors: dict[str, Any], projections: Sequence[Any]) -> torch.dtype | None:
    """Tensors of one dtype and device, those of the projection that each goes into; dtypes may
    differ under autocast, whose dtype is returned."""
    first = next(iter(tensors.values()))
    dtype = arguments.autocast_dtype(arguments.device_type_of(first))
    cast = arguments.autocast_cast(dtype, *tensors.values())
    arguments.check_tensors(**dict(zip(tensors, cast, strict=True)))
    for (name, tensor), projection in zip(tensors.items(), projections, strict=True):
        weight = _weight_of(projection)
        if weight is None:
            continue
        if dtype is None and tensor.dtype != weight.dtype:
            raise TypeError(
                f"{name} must have the dtype of the weights, {weight.dtype}, got {tensor.dtype}"
            )
        arguments.check_device(name, tensor, "the weights", weight)
    return dtype


def without_mask_object(mask: Any, like: Any) -> Any:
    """`mask`, and for one of torch's objects for a causal mask, on the device of `like`, the bool
    mask (True = hidden) that it stands for."""
    bias = arguments.causal_bias(mask)
    if bias is None:
        return mask
    _, _, alignment = arguments.resolve_causal(
        bias, False, "top_left", bias.seq_len_q, bias.seq_len_kv
    )
    shift = bias.seq_len_kv - bias.seq_len_q if alignment == "bottom_right" else 0
    whole = torch.ones(bias.seq_len_q, bias.seq_len_kv, dtype=torch.bool, device=like.device)
    return whole.triu(shift + 1)


def _weight_of(projection: Any) -> Tensor | None:
    """What tells the inputs that a module takes: the weight of a plain nn.Linear. Another (an
    adapter, a quantised or offloaded layer) is asked by calling it."""
    if type(projection) is not nn.Linear:
        return None
    own = projection.__dict__
    weight: Tensor | None = own["_parameters"].get("weight")
    if weight is None or not weight.is_floating_point():
        return None
    return None if own["_forward_pre_hooks"] or "forward" in own else weight
