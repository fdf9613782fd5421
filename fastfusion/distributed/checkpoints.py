"""Checkpoints of packed projections, of which a rank holds rows in several places."""

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard


def checkpointable(state: Any) -> Any:
    """Let `torch.distributed.checkpoint` know where the rows of packed projections belong::

        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        dcp.save(ff.distributed.checkpointable(state), checkpoint_id=folder)

    It takes what a rank holds of a tensor for rows in a row, and says of those of queries, keys and
    values side by side that chunks overlap. What `state_dict` of a model gives knows better by
    itself; states of optimizers do by this function.

    Args:
        state: dictionaries, lists and tuples of anything; its DTensors are marked in place.

    Returns:
        `state` itself, to be saved or loaded into.
    """
    if isinstance(state, DTensor):
        _mark(state)
    elif isinstance(state, Mapping):
        for value in state.values():
            checkpointable(value)
    elif isinstance(state, list | tuple):
        for value in state:
            checkpointable(value)
    return state


def _mark(tensor: DTensor) -> None:
    """Give its local tensor the methods that torch.distributed.checkpoint asks for."""
    dims = {p.dim for p in tensor.placements if isinstance(p, _StridedShard)}
    if not dims:
        return
    (dim,) = dims
    local: Any = tensor._local_tensor
    local._chunks = [
        ChunkStorageMetadata(
            torch.Size([start if d == dim else 0 for d in range(tensor.dim())]),
            torch.Size([rows if d == dim else n for d, n in enumerate(local.shape)]),
        )
        for start, rows in _runs(tensor, dim)
    ]
    # Bound methods, so that copies of the tensor answer for themselves.
    local.__create_write_items__ = MethodType(_write_items, local)
    local.__create_chunk_list__ = MethodType(lambda local: local._chunks, local)
    local.__get_tensor_shard__ = MethodType(_chunk, local)


def _runs(tensor: DTensor, dim: int) -> list[tuple[int, int]]:
    """First row and number of rows of each part in which this rank has its own."""
    rows = torch.arange(tensor.shape[dim])
    coordinates = tensor.device_mesh.get_coordinate()
    assert coordinates is not None
    for number, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard | _StridedShard) and placement.dim == dim:
            numbers = rows.view([-1 if d == dim else 1 for d in range(dim + 1)])
            pieces = placement._split_tensor(
                numbers, tensor.device_mesh.size(number), with_padding=False
            )
            rows = pieces[0][coordinates[number]].flatten()
    starts = [0, *((rows.diff() != 1).nonzero().flatten() + 1).tolist(), len(rows)]
    return [(int(rows[a]), b - a) for a, b in zip(starts, starts[1:], strict=False) if b > a]


def _write_items(local: Any, name: str, whole: DTensor) -> list[WriteItem]:
    properties = TensorProperties.create_from_tensor(whole.to_local())
    return [
        WriteItem(
            MetadataIndex(name, chunk.offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, properties, whole.size()),
        )
        for chunk in local._chunks
    ]


def _chunk(local: Any, index: MetadataIndex) -> Tensor:
    first = 0
    for chunk in local._chunks:
        (dim,) = [d for d, n in enumerate(chunk.sizes) if n != local.shape[d]] or [0]
        if chunk.offsets == index.offset:
            found: Tensor = local.narrow(dim, first, chunk.sizes[dim])
            return found
        first += chunk.sizes[dim]
    raise ValueError(f"{index} is no part of a tensor in {local._chunks}")
