"""Nested tensors (strided and jagged) as packed values, and back.

Both layouts keep their sequences one after the other in one buffer, so going from one form to the
other copies nothing, and gradients flow through. Jagged tensors may have holes between sequences
(`torch.nested.narrow`, or offsets and lengths): their rows are gathered, and put back between
zeros.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """A nested (batch, ragged length, width) tensor as its sequences laid end to end.

    Attributes:
        values: (total length, width).
        offsets: int64 (batch + 1,), where each sequence begins in `values`.
        longest: an upper bound of the lengths.
        source: the nested tensor.
        rows: for a source with holes, where in its buffer each row of `values` is.
    """

    values: Tensor
    offsets: Tensor
    longest: int
    source: Any
    rows: Tensor | None = None


def has_holes(tensor: Any) -> bool:
    """Whether this is a jagged tensor with rows between its sequences."""
    return tensor.layout == torch.jagged and tensor.lengths() is not None


def pack(nested: Any) -> Packed | None:
    """The packed form of `nested`; None if it is not (batch, ragged length, width)."""
    if nested.dim() != 3:
        return None
    if nested.layout == torch.jagged:
        return _pack_jagged(nested) if nested._ragged_idx == 1 else None
    sizes = nested._nested_tensor_size()
    lengths, widths = sizes[:, 0], sizes[:, 1]
    if not bool((widths == widths[0]).all()):
        return None
    values = nested.contiguous().values().view(-1, int(widths[0]))
    offsets = _offsets_of(lengths).to(values.device)
    return Packed(values, offsets, int(lengths.max()), nested)


def _pack_jagged(nested: Any) -> Packed:
    rows = None
    if has_holes(nested):
        # Not contiguous(): torch's has no gradient here.
        buffer, begins, lengths = nested.values(), nested.offsets()[:-1], nested.lengths()
        offsets = _offsets_of(lengths)
        rows = torch.repeat_interleave(begins - offsets[:-1], lengths)
        rows = rows + torch.arange(rows.shape[0], device=rows.device)
        values = buffer.index_select(0, rows)
    else:
        nested = nested.contiguous()
        values, offsets = nested.values(), nested.offsets()
    longest = nested._maybe_max_seqlen
    if longest is None and torch.compiler.is_compiling():
        longest = values.shape[0]
    elif longest is None:
        # Reads the offsets once; the tensor remembers.
        longest = nested._get_max_seqlen() if offsets.shape[0] > 1 else 0
    return Packed(values, offsets, longest, nested, rows)


def _offsets_of(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def unpack(values: Tensor, packed: Packed) -> Tensor:
    """`values` (total length, any width) as a nested tensor with the sequences of the packed one;
    holes hold zeros."""
    source, lengths = packed.source, None
    if packed.rows is not None:
        buffer = values.new_zeros(source.values().shape[0], *values.shape[1:])
        values, lengths = buffer.index_copy(0, packed.rows, values), source.lengths()
    if source.layout == torch.jagged:
        # The same offsets or lengths: torch takes two jagged tensors for equally ragged by the
        # identity of these, and a residual connection adds them.
        return torch.nested.nested_tensor_from_jagged(
            values,
            source.offsets(),
            lengths,
            min_seqlen=source._maybe_min_seqlen,
            max_seqlen=source._maybe_max_seqlen,
        )
    lengths = source._nested_tensor_size()[:, :1]
    width = torch.full_like(lengths, values.shape[1])
    return torch._nested_view_from_buffer(
        values.reshape(-1),
        torch.cat((lengths, width), 1),
        torch.cat((width, torch.ones_like(width)), 1),
        ((lengths.cumsum(0) - lengths) * width).flatten(),
    )


def around_holes(nested: Any, run: Callable[[Any], Any]) -> Any:
    """`run` on the same sequences end to end, which torch's parts need, and its result (nested like
    its argument) in the layout of `nested`, a jagged tensor with holes."""
    packed = pack(nested)
    if packed is None:
        return run(nested)
    full = torch.nested.nested_tensor_from_jagged(
        packed.values, packed.offsets, max_seqlen=packed.longest
    )
    return unpack(values_of(run(full)), packed)


def values_of(nested: Any) -> Tensor:
    """The values (total length, width) of a nested tensor without holes."""
    values: Tensor = nested.contiguous().values()
    return values if nested.layout == torch.jagged else values.view(-1, nested.size(-1))


def same_lengths(first: Packed, second: Packed) -> bool:
    """Whether two nested tensors have sequences of the same lengths."""
    if first.offsets is second.offsets:
        return True
    if first.source.layout == torch.jagged and (first.rows is None) == (second.rows is None):
        return bool(first.source.shape[1] == second.source.shape[1])
    return torch.equal(first.offsets, second.offsets)
