"""Random legal calls of norms and of the encoder layer: see random_ops.py."""

import random
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from random_calls import Built, Drawn, draw_common, draw_length, draw_mask, draw_padding, fitted
from suite import Target, plain_attention
from test_norm_op import plain as plain_norm
from torch import Tensor

import fastfusion as ff
from fastfusion import ops
from fastfusion.ops.linear import ACTIVATIONS

OPS = {op.name: op for op in ops.ALL}


def norm(*, return_lse: bool = False, **call: Any) -> Tensor:
    """As the other ops are called."""
    return ff.norm(**call)


def encoder_layer(*, return_lse: bool = False, **call: Any) -> Tensor:
    return ff.encoder_layer(**call)


def common_of(
    rng: random.Random, target: Target, operands: tuple[str, ...], *names: str
) -> dict[str, Any]:
    common = draw_common(rng, target, operands)
    wanted = ("seed", "dtype", "layouts", "wanted", *names)
    return {name: common[name] for name in wanted if name in common}


@dataclass(frozen=True, kw_only=True, repr=False)
class Norm(Drawn):
    """A call of norm.

    Attributes:
        lengths: of the input, before its width.
        given: which of weight, bias and residual there are.
        shift: how far from 0 the numbers lie.
    """

    return_lse: bool = False
    lengths: tuple[int, ...] = (3,)
    width: int = 5
    given: tuple[bool, bool, bool] = (False, False, False)
    rms: bool = False
    eps: float = 1e-5
    shift: float = 0.0

    op = OPS["norm"]
    function = staticmethod(norm)
    operands = ("input", "weight", "bias", "residual")

    @staticmethod
    def plain(**call: Any) -> tuple[Tensor, ...]:
        return (plain_norm(**call),)

    def build(self) -> Built:
        built = Built(self)
        del built.given["scale"], built.clean["scale"]
        built.operand("input", *self.lengths, self.width)
        built.put("input", built.clean["input"] + self.shift)
        sizes = {"weight": (self.width,), "bias": (self.width,)}
        sizes["residual"] = (*self.lengths, self.width)
        for (name, size), there in zip(sizes.items(), self.given, strict=True):
            if there:
                built.operand(name, *size)
        built.option("rms", self.rms)
        built.option("eps", self.eps)
        return built

    @classmethod
    def draw(cls, rng: random.Random, target: Target) -> Self:
        return cls(
            **common_of(rng, target, cls.operands),
            lengths=tuple(rng.choice((0, 1, 2, 5, 9)) for _ in range(rng.choice((0, 1, 2, 3)))),
            width=max(draw_length(rng, 900), 2),
            given=tuple(rng.random() < 0.6 for _ in range(3)),  # type: ignore[arg-type]
            rms=rng.random() < 0.4,
            eps=rng.choice((1e-5, 1e-5, 1e-3, 0.5)),
            shift=rng.choice((0.0, 0.0, 1.0, -3.0)),
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class EncoderLayer(Drawn):
    """A call of encoder_layer.

    Attributes:
        ffn: features between linear1 and linear2.
        separate: whether key and value have weights of their own.
        biases: whether each of the products has one.
        affine: whether the norms have weights and biases.
    """

    return_lse: bool = False
    length: int = 3
    batch: int = 1
    ffn: int = 5
    separate: bool = False
    biases: tuple[bool, ...] = (False,) * 6
    affine: bool = False
    norm_first: bool = False
    activation: str | None = None
    is_causal: bool = False
    padding: str | None = None
    narrow: bool = False

    op = OPS["encoder_layer"]
    function = staticmethod(encoder_layer)
    operands = (
        "input", *(f"{name}_{kind}" for name in ("in_proj", "k_proj", "v_proj", "out_proj",
                                                 "linear1", "linear2")
                   for kind in ("weight", "bias")),
        "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "attn_mask", "key_padding_mask",
    )  # fmt: skip

    @staticmethod
    def plain(**call: Any) -> tuple[Tensor, ...]:
        x, first = call["input"], call["norm_first"]

        def linear(name: str, x: Tensor) -> Tensor:
            return F.linear(x, call[f"{name}_weight"], call[f"{name}_bias"])

        def norm(name: str, x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], call[f"{name}_weight"], call[f"{name}_bias"])

        def attend(x: Tensor) -> Tensor:
            apart = "k_proj_weight" in call
            names = ("in_proj", "k_proj", "v_proj") if apart else ("in_proj",)
            heads = torch.cat([linear(name, x) for name in names], -1)
            heads = heads.unflatten(-1, (3, call["num_heads"], -1)).unbind(2)
            masks = {n: call[n] for n in ("attn_mask", "key_padding_mask") if n in call}
            q, k, v = (t.transpose(1, 2) for t in heads)
            out = plain_attention(q, k, v, **masks, is_causal=call["is_causal"])[0]
            return linear("out_proj", out.transpose(1, 2).flatten(2))

        def feed_forward(x: Tensor) -> Tensor:
            return linear("linear2", ACTIVATIONS[call["activation"]](linear("linear1", x)))

        if first:
            x = x + attend(norm("norm1", x))
            return (x + feed_forward(norm("norm2", x)),)
        x = norm("norm1", x + attend(x))
        return (norm("norm2", x + feed_forward(x)),)

    def build(self) -> Built:
        built = Built(self)
        del built.given["scale"], built.clean["scale"]
        width = self.kv_heads * self.head_dim
        built.operand("input", self.batch, self.length, width)
        sizes = {"in_proj": (3 * width, width), "out_proj": (width, width)}
        if self.separate:
            sizes |= dict.fromkeys(("in_proj", "k_proj", "v_proj"), (width, width))
        sizes |= {"linear1": (self.ffn, width), "linear2": (width, self.ffn)}
        for (name, (features, columns)), biased in zip(sizes.items(), self.biases, strict=False):
            power = -round(columns.bit_length() / 2)
            built.operand(f"{name}_weight", features, columns, power=power)
            built.option(f"{name}_bias", None)
            if biased:
                built.operand(f"{name}_bias", features)
        for name in ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"):
            built.option(name, None)
            if self.affine:
                built.operand(name, width)
        built.option("num_heads", self.kv_heads)
        for name in ("activation", "norm_first", "is_causal"):
            built.option(name, getattr(self, name))
        built.mask((self.batch, self.kv_heads, self.length, self.length))
        built.padding("key_padding_mask", self.padding, self.narrow, self.batch, self.length)
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
            length=lengths[0],
            ffn=rng.choice((1, 4, 33, 64, 150)),
            separate=rng.random() < 0.3,
            biases=tuple(rng.random() < 0.7 for _ in range(6)),
            affine=rng.random() < 0.7,
            norm_first=rng.random() < 0.5,
            activation=rng.choice(tuple(ACTIVATIONS)),
            is_causal=rng.random() < 0.3,
            padding=draw_padding(rng),
            narrow=rng.random() < 0.2,
        )
