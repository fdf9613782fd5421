"""Decoder layers of transformers behind a cache in one call of `fastfusion.decoder_layer`.

The first tokens go by the layer's own code, which projects the memory and fills the cache; those
behind them by the op, which writes into the cache what it projects. A cache that grows by
concatenation gets room for tokens to come: its tensors are the beginning of larger ones. Beside
narrow weights the memory's keys and values are read in bfloat16, as the op makes them itself: every
token reads all of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from fastfusion.integrations.transformers import layers
from fastfusion.integrations.transformers._activations import activation_of
from fastfusion.integrations.transformers._interface import wants_weights
from fastfusion.integrations.transformers._structures import Structure
from fastfusion.nn._layers import run_decoder_layer
from fastfusion.nn._linear import runs_on_cpu, weights_of
from fastfusion.nn._plain import has_global_hooks
from fastfusion.ops._parts import attention_dtype

Pair = tuple[Tensor, Tensor]
# In the __dict__ of a layer of a cache: the larger tensors, and the beginnings that it holds.
_ROOM = "_fastfusion_room"
_SPARE = 32  # tokens
# Likewise: keys and values of a memory, and the same in bfloat16.
_NARROW = "_fastfusion_narrow"


def forward_of(source: Any, structure: Structure) -> Callable[..., Any]:
    """The forward of a subclass of `source` that runs the op where it may."""
    parts = _Parts(structure, source.__module__)

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> Any:
        if encoder_hidden_states is not None and layers.do_not_matter(kwargs):
            result = parts.decode(
                self, hidden_states, attention_mask, encoder_attention_mask, past_key_values, kwargs
            )
            if result is not None:
                return result
        return source.forward(
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
            past_key_values=past_key_values, use_cache=use_cache, **kwargs,
        )  # fmt: skip

    return forward


class _Parts(layers.Parts):
    def __init__(self, structure: Structure, module: str) -> None:
        super().__init__(structure, module)
        self.cross, self.query = map(structure.place, structure.memory[:2])
        self.keys = structure.memory_keys

    def decode(
        self,
        layer: Any,
        x: Any,
        mask: Tensor | None,
        memory_mask: Tensor | None,
        past: Any,
        kwargs: Any,
    ) -> Tensor | None:
        """The op, or None where the layer's forward may mean more; then nothing was written."""
        if type(past) is not cache_utils.EncoderDecoderCache or not runs_on_cpu(x):
            return None
        found = self.find(layer)
        if found is None or has_global_hooks() or wants_weights(kwargs):
            return None
        attention, cross = found[self.attention], found[self.cross]
        activation = activation_of(found[self.activation])
        heads = self.heads_of(attention, x)
        if heads is None or self.heads_of(cross, x) != heads or activation is None:
            return None
        known = layers.implementation_of(attention.config)
        if known != "eager" and known not in layers.RESOLVING:
            return None
        index = attention.layer_idx
        if not past.is_updated.get(index):
            return None
        own: Any = past.self_attention_cache.layers[index]
        kept = past.cross_attention_cache.layers[index]
        batch, length, width = x.shape
        shape = batch, heads, width // heads
        memory: Any = (kept.keys, kept.values)
        cache: Any = (own.keys, own.values)
        if not (own.is_initialized and _fit(memory, x, shape) and _fit(cache, x, shape)):
            return None
        is_static = type(own) is cache_utils.StaticLayer
        if is_static:
            if mask is None or mask.shape[-1] != cache[0].shape[2]:
                return None
            before = int(own.cumulative_length)
            mask = mask[..., : before + length]
        elif type(own) is cache_utils.DynamicLayer:
            # Of several tokens behind others only a mask knows what they see.
            if mask is None and length > 1:
                return None
            before = cache[0].shape[2]
            cache = _with_room(own, length)
        else:
            return None
        attn_mask, padding = layers.masks_of(mask, x)
        if padding is not None:
            attn_mask = mask
        # A cache of another kind is written to in place.
        grows = type(kept) is cache_utils.DynamicLayer
        if grows and self.reads_narrow(x, found[self.query], cross):
            memory = _in_bfloat16(kept)
        result = run_decoder_layer(
            x,
            [weights_of(found[place]) for place in self.linear],
            [found[place] for place in self.norms],
            heads, activation, self.structure.norm_first, memory,
            layers.masks_of(memory_mask, x), attn_mask, False, cache, before,
        )  # fmt: skip
        if result is not None:
            if is_static:
                own.cumulative_length.add_(length)
            else:
                _grow(own, cache, before + length)
        return result

    def reads_narrow(self, x: Tensor, query: Any, cross: Any) -> bool:
        """Whether the op would make keys and values of the memory in bfloat16."""
        of_query = weights_of(query)
        if of_query is None or of_query[0].dtype == x.dtype:
            return False
        keys = [weights_of(cross.__dict__["_modules"].get(name)) for name in self.keys]
        if not all(keys):
            return False
        return attention_dtype(x, of_query[0], *(own[0] for own in keys if own)) != x.dtype


def _fit(pair: Any, x: Tensor, shape: tuple[int, int, int]) -> bool:
    """Whether keys and values are what the op can read beside an input."""
    batch, heads, dim = shape
    return all(
        t.dim() == 4
        and t.dtype == x.dtype
        and t.device == x.device
        and (t.shape[0], t.shape[1], t.shape[3]) == (batch, heads, dim)
        for t in pair
    )


def _with_room(own: Any, length: int) -> Pair:
    """Tensors that begin with the keys and values in a layer of a cache and have room behind.

    Those of the last time, if they are still what the layer holds: whatever else was done to it
    (beams in another order, tokens taken off) has put other tensors there, which are copied.
    """
    keys, values = own.keys, own.values
    before, needed = keys.shape[2], keys.shape[2] + length
    room = own.__dict__.get(_ROOM)
    if room is not None and room[1][0] is keys and room[1][1] is values:
        pair: Pair = room[0]
        if pair[0].shape[2] >= needed:
            return pair
        capacity = needed + max(_SPARE, needed // 2)
    else:
        # Of beams, which are put in order for every token, all of it is copied every time.
        capacity = needed + (_SPARE if room is None else 0)
    made = []
    for t in (keys, values):
        larger = t.new_empty((*t.shape[:2], capacity, t.shape[3]))
        larger[:, :, :before] = t
        made.append(larger)
    return made[0], made[1]


def _in_bfloat16(kept: Any) -> Pair:
    """Keys and values of a memory, rounded once: they change with the tensors that hold them."""
    known = kept.__dict__.get(_NARROW)
    if known is None or known[0] is not kept.keys or known[1] is not kept.values:
        rounded = tuple(t.to(torch.bfloat16).contiguous() for t in (kept.keys, kept.values))
        known = kept.__dict__[_NARROW] = kept.keys, kept.values, rounded
    pair: Pair = known[2]
    return pair


def _grow(own: Any, pair: Pair, length: int) -> None:
    own.keys, own.values = (t[:, :, :length] for t in pair)
    own.__dict__[_ROOM] = pair, (own.keys, own.values)
