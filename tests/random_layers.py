"""Random legal calls of the ops of cross-attention layers: see random_ops.py."""

import math
import random
from dataclasses import dataclass
from typing import Any, Self

import layer_calls
from layer_calls import nested, plain_cross_attention, plain_cross_modal
from random_calls import Built, Drawn, draw_common, draw_length, draw_mask, draw_padding, fitted
from suite import Target
from torch import Tensor

from fastfusion import ops
from fastfusion.ops.linear import ACTIVATIONS

OPS = {op.name: op for op in ops.LAYERS}


def cross_attention_layer(*, return_lse: bool = False, **call: Any) -> Tensor:
    return layer_calls.cross_attention_layer(**call)


def cross_modal_layer(*, return_lse: bool = False, **call: Any) -> tuple[Tensor, Tensor]:
    return layer_calls.cross_modal_layer(**call)


@dataclass(frozen=True, kw_only=True, repr=False)
class Layer(Drawn):
    """What calls of both layers have; their operands have the names of flat calls.

    Attributes:
        dims: widths of the two sequences.
        biases: whether each product has one.
    """

    return_lse: bool = False
    q_len: int = 3
    kv_len: int = 5
    batch: int = 1
    dims: tuple[int, int] = (8, 8)
    biases: tuple[bool, ...] = (False,) * 8

    @classmethod
    def reference(cls, **call: Any) -> tuple[Tensor, ...]:
        return cls.op.reference(**nested(call))

    @property
    def inner(self) -> int:
        return self.kv_heads * self.head_dim

    def product(self, built: Built, name: str, features: int, width: int, place: int) -> None:
        """Weights of a size that keeps numbers as large as they were."""
        built.operand(f"{name}_weight", features, width, power=-round(math.log2(width) / 2))
        built.option(f"{name}_bias", None)
        if self.biases[place]:
            built.operand(f"{name}_bias", features)

    def norm(self, built: Built, name: str, width: int, eps: float) -> None:
        built.operand(f"{name}.weight", width)
        built.operand(f"{name}.bias", width)
        built.option(f"{name}.eps", eps)

    @classmethod
    def draw_layer(cls, rng: random.Random, target: Target) -> dict[str, Any]:
        """Heads that are not wide: products are most of the work."""
        common = draw_common(rng, target, cls.operands)
        drawn = {name: common[name] for name in ("seed", "dtype")}
        drawn |= {name: common[name] for name in ("layouts", "wanted") if name in common}
        small = target.interpreted
        heads, head_dim = rng.choice((1, 2, 3)), rng.choice((1, 5, 8, 16, 33))
        dims = (rng.choice((8, 17, 24, 32, 70)), rng.choice((8, 17, 24, 32, 70)))
        batch = rng.choice((0, 1, 1, 2, 2 if small else 3))
        lengths = [draw_length(rng, 40 if small else 140), draw_length(rng, 40 if small else 140)]
        q_len, kv_len = fitted(lengths, max(batch, 1) * heads * head_dim, target)
        biases = tuple(rng.random() < 0.7 for _ in range(8))
        return drawn | draw_mask(rng) | {
            "kv_heads": heads, "head_dim": head_dim, "dims": dims, "batch": batch, "q_len": q_len,
            "kv_len": kv_len, "biases": biases,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class CrossAttentionLayer(Layer):
    """A call of cross_attention_layer."""

    out_dim: int = 4
    norms: str | None = None
    projected: bool = False
    apart: bool = False
    value_dim: int | None = None
    residual: bool = False
    padding: str | None = None
    narrow: bool = False
    nan_behind: bool = False

    op = OPS["cross_attention_layer"]
    function = staticmethod(cross_attention_layer)
    plain = staticmethod(plain_cross_attention)
    operands = (
        "query", "context", "context.0", "context.1", "q_weight", "q_bias", "kv_weight", "kv_bias",
        "out_weight", "out_bias", "residual", "query_norm.weight", "query_norm.bias",
        "context_norm.weight", "context_norm.bias", "attn_mask", "key_padding_mask", "v_weight",
        "v_bias", "value_context",
    )  # fmt: skip

    def build(self) -> Built:
        built = Built(self)
        dim, context_dim = self.dims
        built.option("num_heads", self.kv_heads)
        built.operand("query", self.batch, self.q_len, dim)
        self.product(built, "q", self.inner, dim, 0)
        self.product(built, "out", self.out_dim, self.inner, 1)
        if self.projected:
            for part in ("context.0", "context.1"):
                built.operand(part, self.batch, self.kv_heads, self.kv_len, self.head_dim)
            built.option("kv_weight", None)
            built.option("kv_bias", None)
        else:
            built.operand("context", self.batch, self.kv_len, context_dim)
            parts = 1 if self.apart else 2
            self.product(built, "kv", parts * self.inner, context_dim, 2)
            if self.apart:
                self.product(built, "v", self.inner, self.value_dim or context_dim, 3)
            if self.apart and self.value_dim:
                built.operand("value_context", self.batch, self.kv_len, self.value_dim)
        if self.norms is not None:
            built.option("rms_norm", self.norms == "rms")
            self.norm(built, "query_norm", dim, 1e-3)
            if not (self.projected or (self.apart and self.value_dim)):
                self.norm(built, "context_norm", context_dim, 1e-5)
        if self.residual:
            built.operand("residual", self.batch, self.q_len, self.out_dim)
        built.mask((self.batch, self.kv_heads, self.q_len, self.kv_len))
        built.padding("key_padding_mask", self.padding, self.narrow, self.batch, self.kv_len)
        if self.nan_behind and self.projected:
            built.spoil("key_padding_mask", "context.0", "context.1")
        return built

    @classmethod
    def draw(cls, rng: random.Random, target: Target) -> Self:
        return cls(
            **cls.draw_layer(rng, target),
            scale=rng.choice((None, None, rng.uniform(-0.7, 0.7))),
            out_dim=rng.choice((1, 4, 24, 33)),
            norms=rng.choice((None, "layer", "rms")),
            projected=rng.random() < 0.2,
            apart=target.backend != "cuda" and rng.random() < 0.3,
            value_dim=rng.choice((None, None, 7, 24)),
            residual=rng.random() < 0.4,
            padding=draw_padding(rng),
            narrow=rng.random() < 0.2,
            nan_behind=rng.random() < 0.5,
        )


STREAM = (
    *(f"{part}_{kind}" for part in ("in", "out", "linear1", "linear2") for kind in
      ("weight", "bias")),
    "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class CrossModalLayer(Layer):
    """A call of cross_modal_layer."""

    ffn: int = 4
    norm_first: bool = False
    activation: str | None = None
    visual_padding: str | None = None
    text_padding: str | None = None
    narrow: bool = False

    op = OPS["cross_modal_layer"]
    function = staticmethod(cross_modal_layer)
    plain = staticmethod(plain_cross_modal)
    outputs = 2
    operands = (
        "visual", "text", *(f"{name}_weights.{part}" for name in ("visual", "text") for part in
                            STREAM),
        "attn_mask", "visual_padding_mask", "text_padding_mask",
    )  # fmt: skip

    def build(self) -> Built:
        built = Built(self)
        del built.given["scale"], built.clean["scale"]
        for name in ("num_heads", "activation", "norm_first"):
            built.option(name, getattr(self, {"num_heads": "kv_heads"}.get(name, name)))
        lengths = (self.q_len, self.kv_len)
        for place, (name, length) in enumerate(zip(("visual", "text"), lengths, strict=True)):
            width, stream = self.dims[place], f"{name}_weights"
            built.operand(name, self.batch, length, width)
            for part, features, inputs in (
                ("in", 2 * self.inner, width), ("out", width, self.inner),
                ("linear1", self.ffn, width), ("linear2", width, self.ffn),
            ):  # fmt: skip
                self.product(built, f"{stream}.{part}", features, inputs, place)
            for part, eps in (("norm1", 1e-5), ("norm2", 1e-3)):
                self.norm(built, f"{stream}.{part}", width, eps)
        built.mask((self.batch, self.kv_heads, *lengths))
        paddings = (self.visual_padding, self.text_padding)
        for name, length, kind in zip(("visual", "text"), lengths, paddings, strict=True):
            built.padding(f"{name}_padding_mask", kind, self.narrow, self.batch, length)
        return built

    @classmethod
    def draw(cls, rng: random.Random, target: Target) -> Self:
        activations = ("relu", "gelu") if target.interpreted else tuple(ACTIVATIONS)
        return cls(
            **cls.draw_layer(rng, target),
            ffn=rng.choice((1, 4, 24, 33, 64)),
            norm_first=rng.random() < 0.5,
            activation=rng.choice(activations),
            visual_padding=draw_padding(rng),
            text_padding=draw_padding(rng),
            narrow=rng.random() < 0.2,
        )
