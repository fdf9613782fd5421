"""What a `TransformerDecoder` keeps between the tokens that it decodes."""

from typing import Any

import torch
from torch import Tensor

from fastfusion.nn._layers import attention_dtype_of, cached_decoder_layer, project_memory

Pair = tuple[Tensor, Tensor]


class DecoderCache:
    """Keys and values of the tokens so far and of the memory, for each layer of a decoder; made by
    :meth:`TransformerDecoder.new_cache`.

    Attributes:
        length: how many tokens it holds. Fewer are as if the last ones had not been.
        keys_and_values: for each layer (batch, nhead, capacity, head_dim) twice.
        memories: for each layer (batch, nhead, src_len, head_dim) twice.
        memory_key_padding_mask: bool (batch, src_len), True = ignore, or None.

    Beside tokens of float32, layers with weights of bfloat16 or 8-bit integers keep bfloat16.
    """

    def __init__(
        self, keys_and_values: list[Pair], memories: list[Pair], padding: Tensor | None
    ) -> None:
        self.keys_and_values, self.memories = keys_and_values, memories
        self.memory_key_padding_mask = padding
        self.length = 0

    @property
    def batch_size(self) -> int:
        return self.keys_and_values[0][0].shape[0]

    @property
    def capacity(self) -> int:
        return self.keys_and_values[0][0].shape[2]

    def reorder(self, indices: Tensor) -> None:
        """Go on with these entries of the batch, as a beam search does: int64 (batch,)."""
        padding = self.memory_key_padding_mask
        if padding is not None:
            self.memory_key_padding_mask = padding.index_select(0, indices)

        def chosen(pairs: list[Pair]) -> list[Pair]:
            return [(k.index_select(0, indices), v.index_select(0, indices)) for k, v in pairs]

        self.keys_and_values, self.memories = chosen(self.keys_and_values), chosen(self.memories)


def make_cache(
    layers: Any, memory: Tensor, capacity: int, padding: Tensor | None, batch_first: bool
) -> DecoderCache:
    """See `TransformerDecoder.new_cache`."""
    if isinstance(capacity, bool) or not isinstance(capacity, int):
        raise TypeError(f"capacity must be an int, got {type(capacity).__name__}")
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    if memory.dim() != 3:
        raise ValueError(f"memory must have a batch dimension, got {tuple(memory.shape)}")
    memory = memory if batch_first else memory.transpose(0, 1)
    if padding is not None:
        if padding.dtype != torch.bool:
            raise TypeError(f"memory_key_padding_mask must be bool, got {padding.dtype}")
        if padding.shape != memory.shape[:2]:
            raise ValueError(
                f"memory_key_padding_mask must be {tuple(memory.shape[:2])}, got "
                f"{tuple(padding.shape)}"
            )
    memories = [project_memory(layer, memory) for layer in layers]
    sizes = [(*key.shape[:2], capacity, key.shape[3]) for key, _ in memories]
    dtypes = [attention_dtype_of(layer, memory) for layer in layers]
    kept: list[Pair] = [
        (memory.new_empty(size, dtype=dtype), memory.new_empty(size, dtype=dtype))
        for size, dtype in zip(sizes, dtypes, strict=True)
    ]
    return DecoderCache(kept, memories, padding)


def decode(
    layers: Any, tgt: Tensor, padding: Tensor | None, cache: DecoderCache, batch_first: bool
) -> Tensor:
    """`tgt` behind the tokens in the cache through all layers."""
    if tgt.dim() != 3:
        raise ValueError(f"tgt must have a batch dimension, got {tuple(tgt.shape)}")
    output = tgt if batch_first else tgt.transpose(0, 1)
    batch, length, _ = output.shape
    if batch != cache.batch_size or cache.length + length > cache.capacity:
        raise ValueError(
            f"cache has room for {cache.batch_size} sequences of {cache.capacity} tokens and holds "
            f"{cache.length}; tgt is {tuple(tgt.shape)}"
        )
    hidden = cache.memory_key_padding_mask
    pairs = zip(layers, cache.memories, cache.keys_and_values, strict=True)
    for layer, memory, own in pairs:
        output = cached_decoder_layer(layer, output, memory, hidden, own, cache.length, padding)
    cache.length += length
    return output if batch_first else output.transpose(0, 1)
