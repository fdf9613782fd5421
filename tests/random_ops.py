"""Random legal calls of each op: `draw` gives the call number so and so of a list."""

import math
import random
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from random_calls import (
    Built,
    Drawn,
    draw_common,
    draw_dim,
    draw_heads,
    draw_length,
    draw_mask,
    draw_padding,
    fitted,
)
from random_decoder import DecoderLayer
from random_encoder import EncoderLayer, Norm
from random_layers import CrossAttentionLayer, CrossModalLayer
from suite import Target, plain_attention
from test_bidirectional_attention import plain_bidirectional
from test_linear_weights import formula, operands, runnable
from test_varlen_attention import plain_varlen
from torch import Tensor

import fastfusion as ff
from fastfusion import ops
from fastfusion.ops.linear import ACTIVATIONS

OPS = {op.name: op for op in ops.ALL}
# Backends that take a linear layer with narrow weights; what is compiled takes one of them.
NARROW = {t.backend for t in runnable(operands((1, 4), 3, torch.float32, "int8"))} | {"compiled"}


@dataclass(frozen=True, kw_only=True, repr=False)
class Attention(Drawn):
    """A call of scaled_dot_product_attention.

    Attributes:
        rank: of query, key and value; their batch is the first rank - 3 of `batch`.
        group: query heads for each of kv_heads.
        enable_gqa: also where there is one query head for each.
        ones: dimensions of size 1 that the other operands give a size: "key.heads", "query.0".
    """

    q_len: int = 3
    kv_len: int = 5
    rank: int = 4
    batch: tuple[int, ...] = (1, 1, 1)
    group: int = 1
    enable_gqa: bool = False
    ones: tuple[str, ...] = ()
    padding: str | None = None
    narrow: bool = False
    nan_behind: bool = False

    op = OPS["scaled_dot_product_attention"]
    function = staticmethod(ff.scaled_dot_product_attention)
    plain = staticmethod(plain_attention)

    def build(self) -> Built:
        built = Built(self)
        grouped = (self.group > 1 or self.enable_gqa) and self.rank > 2
        built.option("enable_gqa", grouped)
        sizes = {}
        for name in ("query", "key", "value"):
            batch = tuple(
                1 if f"{name}.{i}" in self.ones else n
                for i, n in enumerate(self.batch[: max(self.rank - 3, 0)])
            )
            heads = self.kv_heads * (self.group if name == "query" else 1)
            # Grouped queries are never broadcast.
            if f"{name}.heads" in self.ones and not (grouped and name == "query"):
                heads = 1
            length = self.q_len if name == "query" else self.kv_len
            dim = self.value_dim if name == "value" else self.head_dim
            sizes[name] = (*batch, *((heads,) if self.rank > 2 else ()), length, dim)
        if grouped and sizes["query"][-3] % max(sizes["key"][-3], sizes["value"][-3], 1):
            return replace(self, ones=()).build()
        for place, name in enumerate(sizes):
            built.operand(name, *sizes[name], power=(*self.powers[:2], 0)[place])
        batch = tuple(torch.broadcast_shapes(*(s[:-3] for s in sizes.values())))
        heads = torch.broadcast_shapes(*(s[-3:-2] for s in sizes.values())) if not grouped else (
            sizes["query"][-3],)  # fmt: skip
        target = (*batch, *(heads if self.rank > 2 else ()), self.q_len, self.kv_len)
        built.mask(target)
        built.causal(self.q_len, self.kv_len)
        if self.rank > 2:
            built.kinds(batch, heads[0])
            built.ranges(batch, self.q_len, self.kv_len)
            built.sinks(heads[0])
            built.positions(heads[0], self.q_len, self.kv_len)
        built.padding("key_padding_mask", self.padding, self.narrow, *batch, self.kv_len)
        if self.nan_behind:
            built.spoil("key_padding_mask", "key", "value")
        return built

    operands = (*Drawn.operands, "key_padding_mask")

    @classmethod
    def draw(cls, rng: random.Random, target: Target) -> Self:
        drawn = draw_common(rng, target, Drawn.operands)
        small = target.interpreted
        kv_heads, group = draw_heads(rng, target)
        rank = rng.choice((2, 3, 4, 4, 4, 4, 4, 5, 6))
        batch = (
            rng.choice((0, 1, 1, 2, 2 if small else 3)),
            rng.choice((1, 2)),
            rng.choice((1, 2)),
        )
        many = math.prod(batch[: max(rank - 3, 0)]) * kv_heads * group
        far = 0.1 if drawn["dtype"] != "float16" else 0.05
        lengths = [
            draw_length(rng, 70 if small else 140),
            draw_length(rng, 90 if small else 1400 if rng.random() < far else 320),
        ]
        width = drawn["head_dim"] + drawn["value_dim"]
        q_len, kv_len = fitted(lengths, many * width, target)
        places = [f"{n}.{d}" for n in ("query", "key", "value") for d in ("heads", "0", "1", "2")]
        return cls(
            **drawn,
            **draw_mask(rng),
            kv_heads=kv_heads,
            group=group,
            enable_gqa=rng.random() < 0.3,
            rank=rank,
            batch=batch,
            q_len=q_len,
            kv_len=kv_len,
            ones=tuple(p for p in places if rng.random() < 0.3) if rng.random() < 0.4 else (),
            padding=draw_padding(rng),
            narrow=rng.random() < 0.2,
            nan_behind=rng.random() < 0.5,
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Bidirectional(Drawn):
    """A call of bidirectional_attention."""

    q_len: int = 3
    kv_len: int = 5
    query_value_dim: int = 4
    rank: int = 4
    batch: int = 1
    query_padding: str | None = None
    key_padding: str | None = None
    narrow: bool = False
    nan_behind: bool = False

    op = OPS["bidirectional_attention"]
    function = staticmethod(ff.bidirectional_attention)
    outputs = 2
    operands = (
        "query", "key", "value", "query_value", "attn_mask", "query_padding_mask",
        "key_padding_mask",
    )  # fmt: skip

    @staticmethod
    def plain(**call: Any) -> tuple[Tensor, ...]:
        if call["query"].dim() == 4:
            return plain_bidirectional(**call)
        call = {k: v[None] if isinstance(v, Tensor) and k != "attn_mask" else v
                for k, v in call.items()}  # fmt: skip
        return tuple(r.squeeze(0) for r in plain_bidirectional(**call))

    def build(self) -> Built:
        built = Built(self)
        batch = (self.batch,) if self.rank == 4 else ()
        leading = (*batch, self.kv_heads)
        built.operand("query", *leading, self.q_len, self.head_dim, power=self.powers[0])
        built.operand("key", *leading, self.kv_len, self.head_dim, power=self.powers[1])
        built.operand("value", *leading, self.kv_len, self.value_dim)
        built.operand("query_value", *leading, self.q_len, self.query_value_dim)
        target = (*leading, self.q_len, self.kv_len)
        built.mask(target)
        built.causal(self.q_len, self.kv_len)
        built.kinds(batch, self.kv_heads)
        built.ranges(batch, self.q_len, self.kv_len)
        built.padding("query_padding_mask", self.query_padding, False, *batch, self.q_len)
        built.padding("key_padding_mask", self.key_padding, self.narrow, *batch, self.kv_len)
        if self.nan_behind:
            built.spoil("query_padding_mask", "query_value")
            built.spoil("key_padding_mask", "value")
        return built

    @classmethod
    def draw(cls, rng: random.Random, target: Target) -> Self:
        drawn = draw_common(rng, target, cls.operands[:5])
        small = target.interpreted
        kv_heads, batch = draw_heads(rng, target)[0], rng.choice((0, 1, 1, 2, 2 if small else 3))
        value_dims = (drawn["value_dim"], draw_dim(rng))
        query_value_dim = rng.choice(value_dims)
        width = 2 * drawn["head_dim"] + drawn["value_dim"] + query_value_dim
        lengths = [draw_length(rng, 70 if small else 300) for _ in range(2)]
        q_len, kv_len = fitted(lengths, batch * kv_heads * width, target)
        return cls(
            **drawn,
            **draw_mask(rng),
            kv_heads=kv_heads,
            batch=batch,
            rank=rng.choice((3, 4, 4)),
            q_len=q_len,
            kv_len=kv_len,
            query_value_dim=query_value_dim,
            query_padding=draw_padding(rng),
            key_padding=draw_padding(rng),
            narrow=rng.random() < 0.2,
            nan_behind=rng.random() < 0.5,
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Varlen(Drawn):
    """A call of varlen_attention.

    Attributes:
        lengths: of queries and keys, a pair for each sequence.
        slack: how much max_seqlen is above the longest.
        behind: rows behind the last sequence, which hold NaN.
        longest: whether max_seqlen is given.
        wide: whether offsets are int64.
        stepped: whether they lie in every second number.
    """

    lengths: tuple[tuple[int, int], ...] = ((3, 5),)
    group: int = 1
    slack: tuple[int, int] = (0, 0)
    behind: tuple[int, int] = (0, 0)
    longest: bool = True
    wide: tuple[bool, bool] = (False, False)
    stepped: bool = False

    op = OPS["varlen_attention"]
    function = staticmethod(ff.varlen_attention)
    packed = True

    @staticmethod
    def plain(**call: Any) -> tuple[Tensor, ...]:
        if call["query"].shape[-1] == 0:
            call |= {name: torch.nn.functional.pad(call[name], (0, 1)) for name in ("query", "key")}
        return plain_varlen(**call)

    def build(self) -> Built:
        built = Built(self)
        sides = [[pair[side] for pair in self.lengths] for side in (0, 1)]
        totals = [sum(side) + more for side, more in zip(sides, self.behind, strict=True)]
        heads = self.kv_heads * self.group
        built.operand("query", totals[0], heads, self.head_dim, power=self.powers[0])
        built.operand("key", totals[1], self.kv_heads, self.head_dim, power=self.powers[1])
        built.operand("value", totals[1], self.kv_heads, self.value_dim)
        for name, side in (("query", 0), ("key", 1), ("value", 1)):
            if self.behind[side]:
                built.given[name] = built.given[name].clone()
                built.given[name][sum(sides[side]) :] = torch.nan
        longest = []
        for name, side, slack, wide in zip("qk", sides, self.slack, self.wide, strict=True):
            offsets = torch.tensor([0, *side]).cumsum(0).to(torch.int64 if wide else torch.int32)
            if self.stepped:
                offsets = offsets.repeat_interleave(2)[::2]
            built.option(f"cu_seqlens_{name}", offsets)
            longest.append(max(side, default=0) + (slack if self.longest else 0))
            built.clean[f"max_seqlen_{name}"] = longest[-1]
            if self.longest:
                kinds = {"python": int, "numpy": np.int32, "tensor": torch.tensor}
                built.given[f"max_seqlen_{name}"] = kinds[self.number](longest[-1])
        built.mask((len(self.lengths), heads, *longest))
        built.causal(1, 1, has_objects=False)
        built.kinds((len(self.lengths),), heads)
        built.ranges((len(self.lengths),), None, longest[1])
        built.sinks(heads)
        return built

    @classmethod
    def draw(cls, rng: random.Random, target: Target) -> Self:
        drawn = draw_common(rng, target, cls.operands)
        small = target.interpreted
        kv_heads, group = draw_heads(rng, target)
        count = rng.choice((0, 1, 2, 3) if small else (0, 1, 2, 3, 5, 9))
        width = drawn["head_dim"] + drawn["value_dim"]
        lengths = []
        for _ in range(count):
            pair = [draw_length(rng, 40 if small else 140), draw_length(rng, 60 if small else 300)]
            if rng.random() < 0.2:
                pair[rng.randrange(2)] = 0
            fit = fitted(pair, count * kv_heads * group * width, target)
            lengths.append((fit[0], fit[1]))
        return cls(
            **drawn,
            **draw_mask(rng),
            lengths=tuple(lengths),
            kv_heads=kv_heads,
            group=group,
            slack=(rng.choice((0, 0, 13)), rng.choice((0, 0, 70))),
            behind=(rng.choice((0, 0, 0, 9)), rng.choice((0, 0, 0, 9))),
            longest=rng.random() < 0.8,
            wide=(rng.random() < 0.3, rng.random() < 0.3),
            stepped=rng.random() < 0.2,
        )


def linear(*, return_lse: bool, **call: Any) -> tuple[Tensor]:
    """As the other ops are called."""
    return (ff.linear(**call),)


@dataclass(frozen=True, kw_only=True, repr=False)
class Linear(Drawn):
    """A call of linear.

    Attributes:
        lengths: of the input, before its width.
        weights: "int8", "bfloat16" or "float16" where these are narrower than the input.
        parts: in which integers are packed.
        part_features: of each.
    """

    lengths: tuple[int, ...] = (3,)
    width: int = 4
    part_features: int = 5
    parts: int = 1
    weights: str | None = None
    activation: str | None = None
    has_bias: bool = False
    has_residual: bool = False

    op = OPS["linear"]
    function = staticmethod(linear)
    operands = ("input", "weight", "bias", "residual")

    @property
    def has_double(self) -> bool:
        return self.weights is None

    def plain(self, **call: Any) -> tuple[Tensor, ...]:
        """The formula; of doubles with what narrow weights round still rounded."""
        if self.weights is None:
            input, weight, bias = (call.get(n) for n in ("input", "weight", "bias"))
            result = ACTIVATIONS[call["activation"]](
                torch.nn.functional.linear(input, weight, bias)
            )
            return (result if call.get("residual") is None else result + call["residual"],)
        if self.weights != "int8":
            call["weight"] = call["weight"].to(getattr(torch, self.weights))
        acc = torch.promote_types(call["input"].dtype, torch.float32)
        return (formula(**call, acc=acc),)

    def build(self) -> Built:
        built = Built(self)
        del built.given["scale"], built.clean["scale"]
        features = self.parts * self.part_features
        built.operand("input", *self.lengths, self.width)
        built.operand("weight", features, self.width)
        if self.has_bias:
            built.operand("bias", features)
        if self.has_residual:
            built.operand("residual", *self.lengths, features)
        if self.weights == "int8":
            packed, scale = ops.pack_int8(built.clean["weight"], self.parts)
            built.option("weight", packed)
            built.option("weight_scale", scale)
        elif self.weights is not None:
            half = getattr(torch, self.weights)
            for call in (built.given, built.clean):
                call["weight"] = call["weight"].to(half)
        built.option("activation", self.activation)
        return built

    @classmethod
    def draw(cls, rng: random.Random, target: Target) -> Self:
        common = draw_common(rng, target, cls.operands)
        names = ("seed", "dtype", "layouts", "wanted")
        drawn = {name: common[name] for name in names if name in common}
        weights = rng.choice((None, "int8", "int8", "bfloat16", "float16"))
        if target.backend not in NARROW:
            weights = None
        if weights is not None:
            # Rounding to halves has torch's gradient, and integers have none.
            drawn["wanted"] = ()
            if drawn["dtype"] == "float64" or weights != "int8":
                drawn["dtype"] = "float32"
        parts = rng.choice((1, 1, 2, 3))
        outer = tuple(rng.choice((0, 1, 2, 2, 3)) for _ in range(rng.choice((0, 1, 1, 2))))
        width, part_features = draw_length(rng, 300), draw_length(rng, 200)
        work = max(math.prod(outer), 1) * max(width, 1) * parts
        length, part_features = fitted([draw_length(rng, 140), part_features], work, target)
        return cls(
            **drawn,
            lengths=(*outer, length) if rng.random() < 0.95 else (),
            width=width,
            part_features=part_features,
            parts=parts,
            weights=weights,
            activation=rng.choice((None, *ACTIVATIONS)),
            has_bias=rng.random() < 0.7,
            has_residual=rng.random() < 0.4,
        )


KINDS: dict[str, type[Drawn]] = {
    kind.op.name: kind
    for kind in (
        Attention,
        Bidirectional,
        Varlen,
        Linear,
        Norm,
        EncoderLayer,
        DecoderLayer,
        CrossAttentionLayer,
        CrossModalLayer,
    )
}


def draw(op: str, target: Target, index: int, name: str) -> Drawn:
    """The call number `index` of an op's list for a target (`name`); always the same."""
    drawn: Drawn = KINDS[op].draw(random.Random(f"{op}:{name}:{index}"), target)
    return drawn
