"""Batching rules: a vmapped call is one call of a larger batch, or one call after the other."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Dims = tuple[int | None, ...]


def forward(
    definition: Any, apply: Callable[..., Any], size: int, dims: Dims, given: tuple[Any, ...]
) -> tuple[Any, Any]:
    """All outputs of the forward op `apply`, vmapped along their first dimension."""
    out_dims = (0,) * definition.outputs
    if size == 0:
        fake = definition.fake(definition.call(*_without(given, dims)))
        return tuple(t.new_empty(0, *t.shape) for t in fake), out_dims
    if not _folds(definition, given):
        return _one_by_one(apply, size, dims, given), out_dims
    batch = _batch(given[0], dims[0])
    outputs = apply(*_folded(given, dims, size, batch, definition.gradients - 1))
    return tuple(_unfold(t, size, batch) for t in outputs), out_dims


def backward(
    definition: Any, apply: Callable[..., Any], size: int, dims: Dims, given: tuple[Any, ...]
) -> tuple[Any, Any]:
    """All gradients of the backward op `apply`; an empty one of the mask is not vmapped."""
    mask_gradient, first = given[definition.outputs], definition.outputs + 1
    count = definition.gradients + definition.last_gradients
    if size == 0:
        fake = definition.fake_backward(*_without(given, dims))
        return tuple(t.new_empty(0, *t.shape) for t in fake), (0,) * count
    if not _folds(definition, given[first:]) or mask_gradient:
        # A mask's gradient is a sum over the batch, which does not survive folding.
        return _one_by_one(apply, size, dims, given), (0,) * count
    batch = _batch(given[first], dims[first])
    mask_at = first + definition.gradients - 1
    found = apply(*_folded(given, dims, size, batch, mask_at))
    last = definition.gradients - 1  # from there on they are empty
    dims = (*(0,) * last, *(None,) * (count - last))
    return (*(_unfold(t, size, batch) for t in found[:last]), *found[last:]), dims


def _folds(definition: Any, call: tuple[Any, ...]) -> bool:
    """Whether a vmapped dimension may become a part of the batch: not beside a seed, as dropout is
    a function of the batch index, nor beside what is no part of a batch."""
    seed, last = call[definition.tensors - 1], call[len(call) - definition.last_gradients :]
    return definition.folds and seed is None and all([t is None for t in last])


def _batch(query: Tensor, dim: int | None) -> int:
    return query.shape[0 if dim is None or dim > 0 else 1]


def _without(given: tuple[Any, ...], dims: Dims) -> list[Any]:
    """Arguments of the same kind as one entry of a vmapped dimension, which may have none."""
    return [
        t if t is None or d is None else t.new_empty(t.shape[:d] + t.shape[d + 1 :])
        for t, d in zip(given, dims, strict=True)
    ]


def _one_by_one(
    apply: Callable[..., Any], size: int, dims: Dims, given: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    results = [
        apply(
            *(
                t if t is None or d is None else t.select(d, index)
                for t, d in zip(given, dims, strict=True)
            )
        )
        for index in range(size)
    ]
    return tuple(torch.stack(column) for column in zip(*results, strict=True))


def _folded(given: tuple[Any, ...], dims: Dims, size: int, batch: int, mask_at: int) -> list[Any]:
    """All tensors with the vmapped dimension in the batch, contiguous; what is none as it is."""

    def fold(tensor: Tensor, dim: int | None) -> Tensor:
        tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.flatten(0, 1).contiguous()

    return [
        tensor
        if not isinstance(tensor, Tensor)
        else _folded_mask(tensor, dim, size, batch)
        if index == mask_at
        else fold(tensor, dim)
        for index, (tensor, dim) in enumerate(zip(given, dims, strict=True))
    ]


def _folded_mask(mask: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """The mask of a folded call; one that is not vmapped and has no batch stays as it is."""
    if dim is None:
        has_batch = mask.dim() == 4 and mask.shape[0] != 1
        return mask.repeat(size, 1, 1, 1) if has_batch else mask
    mask = mask.movedim(dim, 0)
    while mask.dim() < 5:
        mask = mask.unsqueeze(1)
    return mask.expand(-1, batch, -1, -1, -1).flatten(0, 1)


def _unfold(tensor: Tensor, size: int, batch: int) -> Tensor:
    return tensor.reshape(size, batch, *tensor.shape[1:])
