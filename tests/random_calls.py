"""Random legal calls of every op: what is drawn, and how it becomes tensors.

A drawn call is a dataclass of plain values whose defaults are the simplest, and any field may go
back to its default: that is how a failure is made small, and why its repr is all that a call needs.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from suite import DEVICE, Target, plain_attention
from test_bidirectional_attention import plain_bidirectional
from test_varlen_attention import plain_varlen
from torch import Tensor

import fastfusion as ff
from fastfusion import ops
from fastfusion._op import Op

OPS = {op.name: op for op in ops.ALL}
# How an operand lies in memory; in all but the first its neighbours are NaN, or True in masks.
LAYOUTS = ("contiguous", "swapped", "offset", "stepped", "turned", "repeated")
# What True may look like in memory: torch reads every byte but 0 as True.
TRUE_BYTES = (1, 2, 128, 255)
HALVES = ("bfloat16", "float16")
# Operations of the two products; the float64 reference pays ten times as much.
MOST_WORK = 3_000_000
MOST_WORK_INTERPRETED = 300_000


def laid_out(tensor: Tensor, layout: str, inner: int = 2) -> Tensor:
    """The same values behind other strides; `repeated`: the first of all but `inner` dimensions."""
    fill = 255 if tensor.dtype == torch.uint8 else torch.nan
    dims = tensor.dim()
    if layout == "swapped" and dims > 2:
        return tensor.transpose(-2, -3).contiguous().transpose(-2, -3)
    if layout == "turned" and dims > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "offset" and dims > 0:
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), fill)
        wide[..., 1:-2] = tensor
        return wide[..., 1:-2]
    if layout == "stepped" and dims > 0:
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), fill)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if layout == "repeated" and tensor.numel() > 0:
        return tensor[(slice(0, 1),) * (dims - inner)].expand(tensor.shape)
    return tensor


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What calls of all ops have.

    Attributes:
        powers: query, key and scale are multiplied by 2 to these powers.
        layouts: of the operands, in their order; the rest is contiguous.
        wanted: the operands that require a gradient.
        loss: the results that gradients start from: "all", "out" or "lse".
    """

    seed: int = 0
    dtype: str = "float32"
    head_dim: int = 4
    value_dim: int = 4
    kv_heads: int = 1
    scale: float | None = None
    powers: tuple[int, int, int] = (0, 0, 0)
    dropout_p: float = 0.0
    return_lse: bool = True
    layouts: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()
    loss: str = "all"
    mask: str | None = None
    mask_holes: bool = False

    op: ClassVar[Op]
    function: ClassVar[Callable[..., Any]]
    outputs: ClassVar[int] = 1
    operands: ClassVar[tuple[str, ...]] = ("query", "key", "value", "attn_mask")

    def build(self) -> "Built":
        """The tensors of the call."""
        raise NotImplementedError

    @staticmethod
    def plain(**call: Any) -> tuple[Tensor, ...]:
        """The formula as a user writes it, for what `Built.clean` holds."""
        raise NotImplementedError

    @property
    def weighed(self) -> list[int]:
        """The results that the loss is made of."""
        outs, statistics = range(self.outputs), range(self.outputs, 2 * self.outputs)
        if self.loss == "lse" and self.return_lse:
            return list(statistics)
        return [*outs, *(statistics if self.loss == "all" and self.return_lse else ())]

    def simpler(self) -> Iterator[Self]:
        """The call with one thing less."""
        for f in fields(self):
            value, simplest = getattr(self, f.name), f.default
            if value == simplest or f.name == "seed":
                continue
            yield replace(self, **{f.name: simplest})
            if isinstance(value, bool) or f.name == "rank":
                continue
            if isinstance(value, int) and value > 0:
                smaller: tuple[Any, ...] = (value // 2, value - 1)
            elif isinstance(value, tuple) and f.name in ("wanted", "ones", "lengths"):
                smaller = tuple(value[:i] + value[i + 1 :] for i in range(len(value)))
                if f.name == "lengths":
                    smaller += tuple(
                        (*value[:i], (value[i][0] // 2, value[i][1] // 2), *value[i + 1 :])
                        for i in range(len(value))
                    )
            elif f.name == "layouts":
                smaller = tuple(
                    (*value[:i], "contiguous", *value[i + 1 :])
                    for i in range(len(value))
                    if value[i] != "contiguous"
                )
            else:
                continue
            for candidate in smaller:
                if candidate != simplest and candidate != value:
                    yield replace(self, **{f.name: candidate})

    def __repr__(self) -> str:
        given = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(given)})"


class Built:
    """A call's arguments, twice.

    Attributes:
        given: as the op under test gets them: strides, bytes of bools, NaN where nobody looks.
        clean: the same contiguous, for the reference and the plain formula.
    """

    def __init__(self, drawn: Drawn) -> None:
        self.drawn = drawn
        self.dtype = getattr(torch, drawn.dtype)
        self.generator = torch.Generator("cpu").manual_seed(drawn.seed)
        self.given: dict[str, Any] = {}
        self.clean: dict[str, Any] = {}
        for name in ("dropout_p", "scale"):
            if getattr(drawn, name) not in (None, 0.0) or name == "scale":
                self.option(name, getattr(drawn, name))
        if drawn.scale is not None and drawn.powers[2]:
            self.option("scale", drawn.scale * 2.0 ** drawn.powers[2])

    def option(self, name: str, value: Any) -> None:
        self.given[name] = self.clean[name] = value

    def lay(self, name: str, values: Tensor) -> Tensor:
        """As the layout that was drawn for this operand; masks may repeat their rows too."""
        place = self.drawn.operands.index(name)
        layout = self.drawn.layouts[place] if place < len(self.drawn.layouts) else "contiguous"
        return laid_out(values, layout, 1 if "mask" in name else 2)

    def random(self, *size: int) -> Tensor:
        return torch.rand(size, generator=self.generator, device="cpu")

    def operand(self, name: str, *size: int, power: int = 0) -> None:
        values = torch.randn(size, generator=self.generator, device="cpu")
        self.put(name, (values.double() * 2.0**power).to(self.dtype).to(DEVICE))

    def put(self, name: str, values: Tensor) -> None:
        self.given[name] = self.lay(name, values)
        self.clean[name] = self.given[name].contiguous()

    def bools(self, name: str, values: Tensor) -> None:
        """A mask whose True is any byte but 0."""
        picked = torch.randint(0, len(TRUE_BYTES), values.shape, generator=self.generator)
        byte = torch.tensor(TRUE_BYTES, dtype=torch.uint8)[picked] * values
        laid = self.lay(name, byte.to(DEVICE))
        self.given[name] = laid.view(torch.bool)
        self.clean[name] = (laid != 0).contiguous()

    def mask(self, name: str, target: tuple[int, ...], rank: int, ones: tuple[bool, ...]) -> None:
        """attn_mask: the last `rank` dimensions of `target`, some of size 1."""
        kind = self.drawn.mask
        if kind is None:
            return
        size = tuple(
            1 if one else n for n, one in zip(reversed(target), ones, strict=False)
        )[: min(rank, len(target))][::-1]  # fmt: skip
        if kind == "bool":
            self.bools(name, self.random(*size) > (0.6 if self.drawn.mask_holes else 0.2))
            return
        values = torch.randn(size, generator=self.generator, device="cpu")
        if self.drawn.mask_holes:
            values = values.masked_fill(self.random(*size) < 0.4, -torch.inf)
        dtype = torch.float32 if kind == "float32" else self.dtype
        if kind == "float32" and not self.drawn.mask_holes:
            lowest = torch.finfo(torch.float32).min
            values = values.masked_fill(self.random(*size) < 0.1, lowest)
        self.put(name, values.to(dtype).to(DEVICE))

    def padding(self, name: str, kind: str | None, *size: int) -> None:
        """A padding mask (..., length): some hidden, the tail of each, whole samples, or all."""
        if kind is None:
            return
        if kind == "tail":
            kept = (self.random(*size[:-1], 1) * (size[-1] + 1)).floor()
            hidden = torch.arange(size[-1], device="cpu").expand(size) >= kept
        else:
            hidden = self.random(*size) < {"some": 0.4, "samples": 0.3, "all": 2.0}[kind]
            if kind == "samples":
                hidden = hidden | (self.random(*size[:-1], 1) < 0.5)
        self.bools(name, hidden)

    def spoil(self, padding: str, *names: str) -> None:
        """NaN in the rows of operands that a padding mask hides from every sample."""
        if padding not in self.clean:
            return
        for name in names:
            values, hidden = self.clean[name], self.clean[padding]
            if values.shape[:-3] != hidden.shape[:-1]:
                continue
            hidden = (hidden[..., None, :, None] if values.dim() > 2 else hidden[:, None]).clone()
            if self.given[name].stride()[:-2].count(0) and values.dim() > 2:
                # One memory for all of them: what every one hides.
                hidden[:] = hidden.flatten(0, -3).all(0)
            self.given[name] = self.lay(name, values.masked_fill(hidden, torch.nan))


# ---- how values are drawn


def draw_length(rng: random.Random, most: int) -> int:
    """0 and 1, few, beside multiples of registers and tiles, or any."""
    kind = rng.random()
    if kind < 0.04:
        return 0
    if kind < 0.14:
        return 1
    if kind < 0.35:
        return rng.randint(2, 9)
    if kind < 0.65:
        return max(1, min(most, 16 * rng.randint(1, max(most // 16, 1)) + rng.randint(-2, 2)))
    return rng.randint(1, most)


def draw_dim(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.08:
        return 1
    if kind < 0.6:
        return rng.randint(2, 40)
    if kind < 0.8:
        return 8 * rng.randint(1, 16) + rng.randint(-1, 1)
    return rng.randint(1, 256) if kind < 0.95 else 256


def draw_heads(rng: random.Random, target: Target) -> tuple[int, int]:
    """kv_heads, and queries for each; few for an interpreter, which takes 0.1 s for each."""
    most = 2 if target.interpreted else 3
    return rng.choice((0, 1, 1, 2, 2, most)), rng.choice((1, 1, 2, most))


def draw_common(rng: random.Random, target: Target, operands: tuple[str, ...]) -> dict[str, Any]:
    """The fields of `Drawn`, but for masks."""
    dtypes = ("float32", "float32", *HALVES)
    if target.backend == "reference":
        dtypes = (*dtypes, "float64", "float64")
    drawn: dict[str, Any] = {
        "seed": rng.randrange(1 << 16),
        "dtype": rng.choice(dtypes),
        "head_dim": draw_dim(rng),
        "value_dim": draw_dim(rng),
        "return_lse": rng.random() < 0.7,
        "loss": rng.choice(("all", "all", "out", "lse")),
    }
    if rng.random() < 0.6:
        drawn["value_dim"] = drawn["head_dim"]
    if rng.random() < 0.6:
        drawn["layouts"] = tuple(
            rng.choice(LAYOUTS) if rng.random() < 0.6 else "contiguous" for _ in operands
        )
    if rng.random() < 0.3 and target.drops:
        drawn["dropout_p"] = rng.choice((0.1, 0.5, 0.9, 1.0, rng.random()))
    if rng.random() < 0.6 and target.differentiable:
        drawn["wanted"] = tuple(n for n in operands if rng.random() < 0.7)
    half = drawn["dtype"] == "float16"
    kind = rng.random()
    if kind < 0.12:
        drawn["scale"] = rng.choice((-1, 1)) * rng.uniform(0.05, 1.0)
    elif kind < 0.2:
        drawn["scale"] = 0.0
    elif kind < 0.25:
        drawn["scale"] = rng.choice((1e-6, -1e-6, 1e-30, 1e-45))
    elif kind < 0.3:
        drawn["scale"] = rng.choice((1, -1))  # an int
    elif kind < 0.4:
        # Large where the other two are small: scores stay ordinary.
        most = 4 if half else 50
        a, b = (rng.randint(-most, most) for _ in range(2))
        drawn["scale"] = rng.choice((-1, 1)) * rng.uniform(0.1, 0.5)
        drawn["powers"] = (a, b, -a - b)
    elif kind < 0.5:
        # One score above all others. Gradients would be the rounding noise of a difference.
        drawn["scale"] = float(rng.choice((-1, 1)))
        drawn["powers"] = (0, 0, rng.randint(2, 4 if half else 112))
        drawn["wanted"] = ()
    return drawn


def fitted(lengths: list[int], others: int, target: Target) -> list[int]:
    """Lengths of queries and keys, halved until `others` products of them are few enough."""
    most = MOST_WORK_INTERPRETED if target.interpreted else MOST_WORK
    while math.prod(lengths) * others > most:
        longest = lengths.index(max(lengths))
        lengths[longest] //= 2
    return lengths


def draw_mask(rng: random.Random, drawn: dict[str, Any], odds: float) -> dict[str, Any]:
    if rng.random() > odds:
        return {}
    kind = rng.choice(("bool", "bool", "float", "float32"))
    if kind == "float32" and drawn["dtype"] == "float64":
        kind = "float"
    return {
        "mask": kind,
        "mask_holes": rng.random() < 0.4,
        "mask_rank": rng.randint(0, 5),
        "mask_ones": tuple(rng.random() < 0.3 for _ in range(5)),
    }


def draw_padding(rng: random.Random, odds: float) -> str | None:
    return rng.choice(("some", "some", "tail", "samples", "all")) if rng.random() < odds else None


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
    batch: tuple[int, int] = (1, 1)
    group: int = 1
    enable_gqa: bool = False
    ones: tuple[str, ...] = ()
    is_causal: bool = False
    mask_rank: int = 2
    mask_ones: tuple[bool, ...] = (False,) * 5
    padding: str | None = None
    nan_behind: bool = False

    op = OPS["scaled_dot_product_attention"]
    function = staticmethod(ff.scaled_dot_product_attention)
    plain = staticmethod(plain_attention)

    def build(self) -> Built:
        built = Built(self)
        grouped = (self.group > 1 or self.enable_gqa) and self.rank > 2
        built.option("is_causal", self.is_causal)
        built.option("enable_gqa", grouped)
        built.option("attn_mask", None)
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
        built.mask("attn_mask", target, self.mask_rank, self.mask_ones)
        built.padding("key_padding_mask", self.padding, *batch, self.kv_len)
        if self.nan_behind:
            built.spoil("key_padding_mask", "key", "value")
        return built

    operands = (*Drawn.operands, "key_padding_mask")

    @classmethod
    def draw(cls, rng: random.Random, target: Target) -> Self:
        drawn = draw_common(rng, target, Drawn.operands)
        small = target.interpreted
        kv_heads, group = draw_heads(rng, target)
        rank = rng.choice((2, 3, 4, 4, 4, 4, 5))
        batch = (rng.choice((0, 1, 1, 2, 2 if small else 3)), rng.choice((1, 2)))
        many = math.prod(batch[: max(rank - 3, 0)]) * kv_heads * group
        far = 0.1 if drawn["dtype"] != "float16" else 0.05
        lengths = [
            draw_length(rng, 70 if small else 140),
            draw_length(rng, 90 if small else 1400 if rng.random() < far else 320),
        ]
        width = drawn["head_dim"] + drawn["value_dim"]
        q_len, kv_len = fitted(lengths, many * width, target)
        places = [f"{n}.{d}" for n in ("query", "key", "value") for d in ("heads", "0", "1")]
        return cls(
            **drawn,
            **draw_mask(rng, drawn, 0.45),
            kv_heads=kv_heads,
            group=group,
            enable_gqa=rng.random() < 0.3,
            rank=rank,
            batch=batch,
            q_len=q_len,
            kv_len=kv_len,
            ones=tuple(p for p in places if rng.random() < 0.3) if rng.random() < 0.4 else (),
            is_causal=rng.random() < 0.35,
            padding=draw_padding(rng, 0.35),
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
    mask_rank: int = 2
    mask_ones: tuple[bool, ...] = (False,) * 5
    query_padding: str | None = None
    key_padding: str | None = None
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
        built.mask("attn_mask", target, self.mask_rank, self.mask_ones)
        built.padding("query_padding_mask", self.query_padding, *batch, self.q_len)
        built.padding("key_padding_mask", self.key_padding, *batch, self.kv_len)
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
            **draw_mask(rng, drawn, 0.45),
            kv_heads=kv_heads,
            batch=batch,
            rank=rng.choice((3, 4, 4)),
            q_len=q_len,
            kv_len=kv_len,
            query_value_dim=query_value_dim,
            query_padding=draw_padding(rng, 0.35),
            key_padding=draw_padding(rng, 0.35),
            nan_behind=rng.random() < 0.5,
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Varlen(Drawn):
    """A call of varlen_attention; `lengths` are those of queries and keys, a pair a sequence."""

    lengths: tuple[tuple[int, int], ...] = ((3, 5),)
    group: int = 1
    is_causal: bool = False
    slack: tuple[int, int] = (0, 0)
    wide: tuple[bool, bool] = (False, False)
    stepped: bool = False

    op = OPS["varlen_attention"]
    function = staticmethod(ff.varlen_attention)
    plain = staticmethod(plain_varlen)
    operands = ("query", "key", "value")

    def build(self) -> Built:
        built = Built(self)
        sides = [[pair[side] for pair in self.lengths] for side in (0, 1)]
        totals = [sum(side) for side in sides]
        built.operand(
            "query", totals[0], self.kv_heads * self.group, self.head_dim, power=self.powers[0]
        )
        built.operand("key", totals[1], self.kv_heads, self.head_dim, power=self.powers[1])
        built.operand("value", totals[1], self.kv_heads, self.value_dim)
        for name, side, slack, wide in zip("qk", sides, self.slack, self.wide, strict=True):
            offsets = torch.tensor([0, *side]).cumsum(0).to(torch.int64 if wide else torch.int32)
            if self.stepped:
                offsets = offsets.repeat_interleave(2)[::2]
            built.option(f"cu_seqlens_{name}", offsets)
            built.option(f"max_seqlen_{name}", max(side, default=0) + slack)
        built.option("is_causal", self.is_causal)
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
            lengths=tuple(lengths),
            kv_heads=kv_heads,
            group=group,
            is_causal=rng.random() < 0.35,
            slack=(rng.choice((0, 0, 13)), rng.choice((0, 0, 70))),
            wide=(rng.random() < 0.3, rng.random() < 0.3),
            stepped=rng.random() < 0.2,
        )


KINDS: dict[str, type[Attention] | type[Bidirectional] | type[Varlen]] = {
    kind.op.name: kind for kind in (Attention, Bidirectional, Varlen)
}


def draw(op: str, target: Target, index: int, name: str) -> Attention | Bidirectional | Varlen:
    """The call number `index` of an op's list for a target (`name`); always the same."""
    return KINDS[op].draw(random.Random(f"{op}:{name}:{index}"), target)
