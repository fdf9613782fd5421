"""Random legal calls of the decoder layer: see random_ops.py."""

import random
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from layer_calls import nested
from random_calls import Built, Drawn, draw_length, draw_mask, draw_padding, fitted
from random_encoder import common_of
from suite import Target, plain_attention
from torch import Tensor

import fastfusion as ff
from fastfusion import ops
from fastfusion.ops.linear import ACTIVATIONS

OP = next(op for op in ops.ALL if op.name == "decoder_layer")
LINEARS = ("in_proj", "k_proj", "v_proj", "out_proj")


def decoder_layer(*, return_lse: bool = False, **call: Any) -> Tensor:
    """As the other ops are called, and to a cache of its own."""
    return ff.decoder_layer(**with_own_cache(call))


def with_own_cache(call: dict[str, Any]) -> dict[str, Any]:
    given = nested(call)
    if given.get("cache") is not None:
        given["cache"] = tuple(t.clone() for t in given["cache"])
    return given


@dataclass(frozen=True, kw_only=True, repr=False)
class DecoderLayer(Drawn):
    """A call of decoder_layer.

    Attributes:
        asked: length of the memory; None: there is none.
        asked_width: of the memory.
        past: tokens in a cache, with room for `room` more than there will be; None: there is none.
        ffn: features between linear1 and linear2.
        separate: whether key and value have weights of their own.
        biases: whether each of the products has one.
        affine: whether the norms have weights and biases.
    """

    return_lse: bool = False
    length: int = 3
    batch: int = 1
    asked: int | None = None
    asked_width: int = 4
    projected: bool = False
    past: int | None = None
    room: int = 0
    ffn: int = 5
    separate: bool = False
    biases: tuple[bool, ...] = (False,) * 10
    affine: bool = False
    norm_first: bool = False
    activation: str | None = None
    is_causal: bool = False
    padding: str | None = None
    memory_padding: str | None = None
    narrow: bool = False

    op = OP
    function = staticmethod(decoder_layer)
    operands = (
        "input", "memory", "memory.0", "memory.1",
        *(f"{attention}.{name}_{kind}" for attention in ("self_attn", "cross_attn")
          for name in LINEARS for kind in ("weight", "bias")),
        *(f"feed_forward.{name}_{kind}" for name in ("linear1", "linear2")
          for kind in ("weight", "bias")),
        *(f"norms.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")),
        "attn_mask", "key_padding_mask", "memory_padding_mask",
    )  # fmt: skip

    @classmethod
    def reference(cls, **call: Any) -> tuple[Tensor, ...]:
        return cls.op.reference(**with_own_cache(call))

    @staticmethod
    def plain(**call: Any) -> tuple[Tensor, ...]:
        given = nested(call)
        x, heads, first = given["input"], given["num_heads"], given["norm_first"]
        *before, last = given["norms"]

        def norm(x: Tensor, norm: Any, wanted: bool) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], *norm) if wanted else x

        def split(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)

        def attend(weights: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            out = plain_attention(q, k, v, **options)[0].transpose(1, 2).flatten(2)
            return F.linear(out, weights.out_proj_weight, weights.out_proj_bias)

        own, past = given["self_attn"], given.get("past_length", 0)
        scored = norm(x, before[0], first)
        q, k, v = (split(scored, weight, bias) for weight, bias, _ in own.each())
        if given.get("cache") is not None:
            k, v = (
                torch.cat([old[:, :, :past], new], 2)
                for old, new in zip(given["cache"], (k, v), strict=True)
            )
        options = {n: given[n] for n in ("attn_mask", "key_padding_mask") if n in given}
        if given["is_causal"]:
            options |= {"is_causal": True, "causal_alignment": "bottom_right"}
        x = norm(x + attend(own, q, k, v, **options), before[0], not first)
        memory, weights = given.get("memory"), given.get("cross_attn")
        if memory is not None:
            (weight, bias, _), *others = weights.each()
            q = split(norm(x, before[1], first), weight, bias)
            if isinstance(memory, Tensor):
                memory = tuple(split(memory, weight, bias) for weight, bias, _ in others)
            padding = given.get("memory_padding_mask")
            out = attend(weights, q, *memory, key_padding_mask=padding)
            x = norm(x + out, before[1], not first)
        feed = given["feed_forward"]
        hidden = F.linear(norm(x, last, first), feed.linear1_weight, feed.linear1_bias)
        hidden = ACTIVATIONS[given["activation"]](hidden)
        x = x + F.linear(hidden, feed.linear2_weight, feed.linear2_bias)
        return (norm(x, last, not first),)

    def build(self) -> Built:
        built = Built(self)
        del built.given["scale"], built.clean["scale"]
        heads, width, biases = self.kv_heads, self.kv_heads * self.head_dim, iter(self.biases)

        def linear(name: str, features: int, columns: int) -> None:
            power = -round(columns.bit_length() / 2)
            built.operand(f"{name}_weight", features, columns, power=power)
            built.option(f"{name}_bias", None)
            if next(biases):
                built.operand(f"{name}_bias", features)

        def attention(name: str, columns: int, apart: bool) -> None:
            linear(f"{name}.in_proj", width if apart else 3 * width, width)
            linear(f"{name}.out_proj", width, width)
            if apart:
                linear(f"{name}.k_proj", width, columns)
                linear(f"{name}.v_proj", width, columns)

        built.operand("input", self.batch, self.length, width)
        attention("self_attn", width, self.separate)
        linear("feed_forward.linear1", self.ffn, width)
        linear("feed_forward.linear2", width, self.ffn)
        if self.asked is not None:
            attention("cross_attn", self.asked_width, True)
            if self.projected:
                for part in ("memory.0", "memory.1"):
                    built.operand(part, self.batch, heads, self.asked, self.head_dim)
            else:
                built.operand("memory", self.batch, self.asked, self.asked_width)
            built.padding(
                "memory_padding_mask", self.memory_padding, self.narrow, self.batch, self.asked
            )
        for i in range(2 if self.asked is None else 3):
            for kind in ("weight", "bias"):
                built.option(f"norms.{i}.{kind}", None)
                if self.affine:
                    built.operand(f"norms.{i}.{kind}", width)
        total = self.length + (self.past or 0)
        if self.past is not None:
            size = (self.batch, heads, total + self.room, self.head_dim)
            for part in ("cache.0", "cache.1"):
                values = torch.randn(size, generator=built.generator, device="cpu")
                values[:, :, self.past :] = torch.nan
                built.option(part, values.to(built.dtype))
            built.option("past_length", self.past)
        built.option("num_heads", heads)
        for name in ("activation", "norm_first", "is_causal"):
            built.option(name, getattr(self, name))
        built.mask((self.batch, heads, self.length, total))
        built.padding("key_padding_mask", self.padding, self.narrow, self.batch, total)
        return built

    @classmethod
    def draw(cls, rng: random.Random, target: Target) -> Self:
        heads, head_dim = rng.choice((1, 2, 3)), rng.choice((4, 5, 8, 16, 33))
        batch = rng.choice((0, 1, 1, 2, 3))
        lengths = fitted([draw_length(rng, 140)], max(batch, 1) * heads * head_dim * 8, target)
        return cls(
            **common_of(rng, target, cls.operands) | draw_mask(rng),
            kv_heads=heads,
            head_dim=head_dim,
            batch=batch,
            length=rng.choice((1, lengths[0])),
            asked=rng.choice((None, draw_length(rng, 50), draw_length(rng, 50))),
            asked_width=rng.choice((1, 8, 17, 40)),
            projected=rng.random() < 0.4,
            past=rng.choice((None, 0, draw_length(rng, 60), draw_length(rng, 60))),
            room=rng.choice((0, 0, 1, 9)),
            ffn=rng.choice((1, 4, 33, 64, 150)),
            separate=rng.random() < 0.4,
            biases=tuple(rng.random() < 0.7 for _ in range(10)),
            affine=rng.random() < 0.7,
            norm_first=rng.random() < 0.5,
            activation=rng.choice(tuple(ACTIVATIONS)),
            is_causal=rng.random() < 0.3,
            padding=draw_padding(rng),
            memory_padding=draw_padding(rng),
            narrow=rng.random() < 0.2,
        )
