"""Nested tensors (strided and jagged) as packed values, and back.

Both layouts keep their sequences one after the other in one buffer, so going from one form to the
other copies nothing, and gradients flow through.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """A nested (batch, ragged length, width) tensor as its sequences laid end to end.

    Attributes:
        values: (total length, width).
        offsets: int64 (batch + 1,), where each sequence begins in `values`.
        longest: an upper bound of the lengths.
    """

    values: Tensor
    offsets: Tensor
    longest: int


def pack(nested: Any) -> Packed | None:
    """The packed form of `nested`; None if it is not (batch, ragged length, width)."""
    if nested.dim() != 3:
        return None
    if nested.layout == torch.jagged:
        if nested._ragged_idx != 1:
            return None
        nested = nested.contiguous()
        values, offsets = nested.values(), nested.offsets()
        longest = nested._maybe_max_seqlen
        if longest is None and torch.compiler.is_compiling():
            longest = values.shape[0]
        elif longest is None:
            # Reads the offsets once; the tensor remembers.
            longest = nested._get_max_seqlen() if offsets.shape[0] > 1 else 0
        return Packed(values, offsets, longest)
    sizes = nested._nested_tensor_size()
    lengths, widths = sizes[:, 0], sizes[:, 1]
    if not bool((widths == widths[0]).all()):
        return None
    values = nested.contiguous().values().view(-1, int(widths[0]))
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(values.device)
    return Packed(values, offsets, int(lengths.max()))


def unpack(values: Tensor, like: Any) -> Tensor:
    """`values` (total length, width of `like`) as a nested tensor with the sequences of `like`."""
    like = like.contiguous()
    if like.layout == torch.jagged:
        # The same offsets tensor: torch takes two jagged tensors for equally ragged by its
        # identity, and a residual connection adds them.
        return torch.nested.nested_tensor_from_jagged(
            values,
            like.offsets(),
            min_seqlen=like._maybe_min_seqlen,
            max_seqlen=like._maybe_max_seqlen,
        )
    return torch._nested_view_from_buffer(
        values.reshape(-1),
        like._nested_tensor_size(),
        like._nested_tensor_strides(),
        like._nested_tensor_storage_offsets(),
    )


def values_of(nested: Any) -> Tensor:
    """The values (total length, width) of a nested tensor that `unpack` has made or could make."""
    values: Tensor = nested.contiguous().values()
    return values if nested.layout == torch.jagged else values.view(-1, nested.size(-1))


def same_lengths(first: Packed, second: Packed, nested_first: Any, nested_second: Any) -> bool:
    """Whether two nested tensors have sequences of the same lengths."""
    if first.offsets is second.offsets:
        return True
    if nested_first.layout == torch.jagged:
        return bool(nested_first.shape[1] == nested_second.shape[1])
    return torch.equal(first.offsets, second.offsets)
