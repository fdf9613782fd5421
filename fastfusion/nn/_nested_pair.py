"""Two nested tensors that attend to each other: checked, packed, and padded where need be."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfusion.nn._checks import check_inputs
from fastfusion.nn._nested import Packed, pack
from fastfusion.nn._weights import attention_with_weights


class Padding(NamedTuple):
    """Where the rows of a packed tensor are in the padded one.

    Attributes:
        places: int64 (total length,), rows of the padded tensor seen as (batch * longest, ...).
        absent: bool (batch, longest), True behind the end of a sequence.
    """

    places: Tensor
    absent: Tensor


def is_nested(first: Any, second: Any) -> bool:
    """Whether one of two arguments is, which need not be tensors."""
    return getattr(first, "is_nested", False) or getattr(second, "is_nested", False)


def pack_pair(
    sequences: dict[str, Any], widths: Sequence[int], projections: Sequence[Any], **masks: Any
) -> tuple[Packed, Packed]:
    """Two tensors (batch, ragged length, width) packed, if they are nested alike and fit the
    modules that they go into, and no mask is given."""
    (first_name, first), (name, second) = sequences.items()
    for each, tensor in sequences.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{each} must be a Tensor, got {type(tensor).__name__}")
    if not first.is_nested or not second.is_nested or first.layout != second.layout:
        raise TypeError(
            f"{first_name} and {name} must both be nested, in one layout, or both be dense, got "
            f"{_kind(first)} and {_kind(second)}"
        )
    for each, mask in masks.items():
        if mask is not None:
            raise ValueError(
                f"{each} does not go with nested tensors; pad {first_name} and {name}, and hide "
                "what is padding by a mask"
            )
    packed = []
    for (each, tensor), width in zip(sequences.items(), widths, strict=True):
        one = pack(tensor)
        if one is None or one.values.shape[1] != width:
            got = f"{tensor.dim()} dimensions" if one is None else f"width {one.values.shape[1]}"
            raise ValueError(
                f"{each} must have shape (batch, ragged length, {width}), got a nested tensor of "
                f"{got}"
            )
        packed.append(one)
    check_inputs({n: one.values for n, one in zip(sequences, packed, strict=True)}, projections)
    batches = [one.offsets.shape[0] - 1 for one in packed]
    if batches[0] != batches[1]:
        raise ValueError(
            f"{name} must have the batch size of {first_name}, got {batches[0]} and {batches[1]}"
        )
    return packed[0], packed[1]


def _kind(tensor: Tensor) -> str:
    return f"a nested tensor of layout {tensor.layout}" if tensor.is_nested else "a dense tensor"


def padding_of(packed: Packed) -> Padding:
    """By arithmetic on the offsets, whose values are not read: it compiles."""
    offsets, longest = packed.offsets.long(), packed.longest
    rows = torch.arange(packed.values.shape[0], device=offsets.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
    places = sequence * longest + rows - offsets[sequence]
    absent = torch.arange(longest, device=offsets.device) >= offsets.diff()[:, None]
    return Padding(places, absent)


def pad(rows: Tensor, padding: Padding) -> Tensor:
    """(total length, ...) as (batch, longest, ...), 0 where absent."""
    batch, longest = padding.absent.shape
    padded = rows.new_zeros(batch * longest, *rows.shape[1:]).index_copy(0, padding.places, rows)
    return padded.unflatten(0, (batch, longest))


def unpad(padded: Tensor, padding: Padding) -> Tensor:
    """`pad` undone."""
    return padded.flatten(0, 1).index_select(0, padding.places)


def clear_absent(weights: Sequence[Tensor], paddings: Sequence[Padding]) -> list[Tensor]:
    """Weights (batch, heads, q_len, kv_len), if any, 0 in the rows of queries that are not
    there."""
    return [
        w.masked_fill(p.absent[:, None, :, None], 0.0)
        for w, p in zip(weights, paddings, strict=False)
    ]


def packed_attention_with_weights(
    query: Tensor, key: Tensor, value: Tensor, queries: Packed, keys: Packed, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """`attention_with_weights` for (total length, heads, head_dim): the output is packed, the
    weights (batch, heads, longest, longest) are padded by 0."""
    rows, columns = padding_of(queries), padding_of(keys)
    out, weights = attention_with_weights(
        pad(query, rows).transpose(1, 2),
        pad(key, columns).transpose(1, 2),
        pad(value, columns).transpose(1, 2),
        None,
        columns.absent,
        dropout_p,
    )
    (weights,) = clear_absent([weights], [rows])
    return unpad(out.transpose(1, 2), rows), weights
