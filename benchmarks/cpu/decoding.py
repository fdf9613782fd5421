"""A decoder that writes a token behind 64 others: Whisper base's, of transformers, and ours with
the same weights.
"""

import copy
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastfusion as ff

from ..common.peers import Skipped
from ..common.results import OURS, Goal
from . import layers
from .goals import Effort
from .settings import NARROW
from .timing import measure

PEER = "transformers"
WIDTH, HEADS, HIDDEN, LAYERS, PAST = 512, 8, 2048, 6, 64
# Whisper's 30 s of sound, and a sentence to translate.
MEMORIES = (1500, 64)
# Over transformers in eager float32.
AGAINST = {"float32": 2.0, "int8": 5.0}
LEAST_COSINE = {"float32": 1.0 - 1e-6, "int8": 0.999}


def run(effort: Effort) -> Iterator[Goal]:
    """Times of a step, over ours; both read the same numbers and give the same."""
    for length in MEMORIES:
        stock = None
        for precision, limit in AGAINST.items():
            name = f"behind {PAST} tokens, {length} to attend to, {precision}"
            try:
                stock = stock or whisper(length)
            except Skipped as why:
                yield Goal(name, None, limit, detail=str(why))
                continue
            yield step(name, stock, precision, length, effort)


def whisper(memory_length: int) -> nn.Module:
    """transformers' decoder of Whisper base, with random weights and no positions.

    Raises:
        Skipped: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    from transformers import WhisperConfig  # type: ignore[import-not-found, unused-ignore]
    from transformers.models.whisper import (  # type: ignore[import-not-found, unused-ignore]
        modeling_whisper,
    )

    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=WIDTH,
        decoder_layers=LAYERS,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=HIDDEN,
        max_source_positions=memory_length,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    decoder: nn.Module = modeling_whisper.WhisperDecoder(config).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name == "embed_positions.weight":
                parameter.zero_()
            elif parameter.dim() == 1:  # biases of 0 and norms of 1 would hide mistakes
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return decoder


def of_ours(stock: Any) -> ff.nn.TransformerDecoder:
    """Our decoder with the weights of transformers'."""
    layer = ff.nn.TransformerDecoderLayer(
        WIDTH, HEADS, HIDDEN, activation="gelu", batch_first=True, norm_first=True
    )
    made = ff.nn.TransformerDecoder(layer, LAYERS, nn.LayerNorm(WIDTH)).eval()
    with torch.no_grad():
        for ours, theirs in zip(made.layers, stock.layers, strict=True):
            to: Any = ours
            for attention, given in (
                (to.self_attn, theirs.self_attn),
                (to.multihead_attn, theirs.encoder_attn),
            ):
                parts = given.q_proj, given.k_proj, given.v_proj
                attention.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
                none = torch.zeros(WIDTH)  # the key has no bias
                biases = [none if part.bias is None else part.bias for part in parts]
                attention.in_proj_bias.copy_(torch.cat(biases))
                attention.out_proj.load_state_dict(given.out_proj.state_dict())
            for part, given in (
                (to.linear1, theirs.fc1),
                (to.linear2, theirs.fc2),
                (to.norm1, theirs.self_attn_layer_norm),
                (to.norm2, theirs.encoder_attn_layer_norm),
                (to.norm3, theirs.final_layer_norm),
            ):
                part.load_state_dict(given.state_dict())
        final: Any = made.norm
        final.load_state_dict(stock.layer_norm.state_dict())
    return made


def step(name: str, stock: nn.Module, precision: str, length: int, effort: Effort) -> Goal:
    from transformers.cache_utils import (  # type: ignore[import-not-found, unused-ignore]
        DynamicCache,
        EncoderDecoderCache,
    )

    generator = torch.Generator().manual_seed(0)
    memory, past, token = (
        torch.randn(1, count, WIDTH, generator=generator) for count in (length, PAST, 1)
    )
    decoder = of_ours(copy.deepcopy(stock))
    if precision in NARROW:
        layers.narrow(decoder, NARROW[precision])
    own = decoder.new_cache(memory, PAST + 1)
    kept = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def ours(x: Tensor) -> Tensor:
        result: Tensor = decoder(x, None, cache=own)
        own.length = PAST
        return result

    def theirs(x: Tensor) -> Tensor:
        given = {"encoder_hidden_states": memory, "past_key_values": kept, "use_cache": True}
        result: Tensor = stock(inputs_embeds=x, **given).last_hidden_state
        if kept.get_seq_length() > PAST:
            kept.crop(-1)
        return result

    with torch.inference_mode():
        ours(past)
        theirs(past)
        cosine = torch.nn.functional.cosine_similarity(
            ours(token).flatten().double(), theirs(token).flatten().double(), dim=0
        ).item()
        if not cosine >= LEAST_COSINE[precision]:
            return Goal(name, 0.0, AGAINST[precision], detail=f"WRONG: cosine {cosine:.6f}")
        timed = measure(
            {OURS: partial(ours, token), PEER: partial(theirs, token)},
            effort.rounds,
            effort.min_time,
        )
    found = [f"{who} {1e6 * timed.time(who).median:.0f} us" for who in (OURS, PEER)]
    detail = f"{', '.join(found)}; cosine {cosine:.6f}"
    return Goal(name, timed.ratio(PEER, OURS).median, AGAINST[precision], detail=detail)
