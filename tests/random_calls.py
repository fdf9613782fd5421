"""Random legal calls: what those of all ops have, and how it becomes tensors; random_ops.py.

A drawn call is a dataclass of plain values whose defaults are the simplest, and any field may go
back to its default: that is how a failure is made small, and why its repr is all that a call needs.
"""

import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from suite import DEVICE, Target
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from fastfusion.core.op import Op

# How an operand lies in memory; in all but the first its neighbours are NaN, or True in masks.
LAYOUTS = ("contiguous", "swapped", "offset", "stepped", "turned", "repeated")
# What True may look like in memory: torch reads every byte but 0 as True.
TRUE_BYTES = (1, 2, 128, 255)
HALVES = ("bfloat16", "float16")
# Operations of the two products; the float64 reference pays ten times as much.
MOST_WORK = 3_000_000
MOST_WORK_INTERPRETED = 300_000


def laid_out(tensor: Tensor, layout: str, shared: Iterable[int]) -> Tensor:
    """The same values behind other strides; `repeated`: the first along the `shared` dimensions."""
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
        first = tuple(slice(0, 1) if d in shared else slice(None) for d in range(dims))
        return tensor[first].expand(tensor.shape)
    return tensor


def halved(length: Any) -> Any:
    """Of a length, or of a pair of them."""
    return length // 2 if isinstance(length, int) else tuple(n // 2 for n in length)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What calls of all ops have.

    Attributes:
        powers: query, key and scale are multiplied by 2 to these powers.
        layouts: of the operands, in their order; the rest is contiguous.
        wanted: the operands that require a gradient.
        mask: "bool", "float" or "float32", with the last `mask_rank` dimensions, where `mask_ones`
            (from the last) says which are 1.
        causal: where a causal mask is aligned; "object": one of torch's own, at the bottom right.
        window, softcap: as of the op.
        slopes: of which sizes alibi_slopes are: "one", "heads" or "entries".
        segments: how their numbers lie: "sorted", "turned" or "scattered".
        prefix, sinks: whether there are any.
        positions: how a position table is indexed: "each" score, or by "offset".
        number: what the scale and the longest lengths are: of "python", "numpy" or a "tensor".
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
    mask_rank: int = 2
    mask_ones: tuple[bool, ...] = (False,) * 6
    causal: str | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    slopes: str | None = None
    segments: str | None = None
    prefix: bool = False
    sinks: bool = False
    positions: str | None = None
    number: str = "python"

    # Whether the op computes of doubles what the formula does.
    has_double: ClassVar[bool] = True

    op: ClassVar[Op]
    function: ClassVar[Callable[..., Any]]
    outputs: ClassVar[int] = 1
    packed: ClassVar[bool] = False
    operands: ClassVar[tuple[str, ...]] = ("query", "key", "value", "attn_mask")

    @classmethod
    def draw(cls, rng: random.Random, target: Target) -> Self:
        """A call of which everything is random."""
        raise NotImplementedError

    def build(self) -> "Built":
        """The tensors of the call."""
        raise NotImplementedError

    @staticmethod
    def plain(**call: Any) -> tuple[Tensor, ...]:
        """The formula as a user writes it, for what `Built.clean` holds."""
        raise NotImplementedError

    @classmethod
    def reference(cls, **call: Any) -> tuple[Tensor, ...]:
        """The op's own, for the same."""
        return cls.op.reference(**call)

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
                        (*value[:i], halved(value[i]), *value[i + 1 :]) for i in range(len(value))
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
        if drawn.dropout_p > 0.0:
            self.option("dropout_p", drawn.dropout_p)
        scale = drawn.scale
        if scale is None and drawn.head_dim == 0:
            scale = 1.0
        if drawn.powers[2] and scale is not None:
            scale *= 2.0 ** drawn.powers[2]
        self.option("scale", scale)
        if scale is not None and drawn.number != "python":
            self.given["scale"] = (
                np.float64(scale)
                if drawn.number == "numpy"
                else torch.tensor(scale, dtype=torch.float64, device="cpu")
            )

    def option(self, name: str, value: Any) -> None:
        self.given[name] = self.clean[name] = value

    def lay(self, name: str, values: Tensor) -> Tensor:
        """As the layout that was drawn for this operand; masks may repeat their rows too."""
        place = self.drawn.operands.index(name)
        layout = self.drawn.layouts[place] if place < len(self.drawn.layouts) else "contiguous"
        dims = values.dim()
        # Of operands heads and batch: equal keys would make a softmax constant, and gradients
        # rounding noise.
        shared = range(dims - 1) if "mask" in name else range(dims - 2)
        return laid_out(
            values, layout, (1,) if self.drawn.packed and "mask" not in name else shared
        )

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
        picked = torch.randint(
            0, len(TRUE_BYTES), values.shape, generator=self.generator, device="cpu"
        )
        byte = torch.tensor(TRUE_BYTES, dtype=torch.uint8, device="cpu")[picked] * values
        laid = self.lay(name, byte.to(DEVICE))
        self.given[name] = laid.view(torch.bool)
        self.clean[name] = (laid != 0).contiguous()

    def size(self, target: tuple[int, ...], rank: int, ones: tuple[bool, ...]) -> tuple[int, ...]:
        """The last `rank` dimensions of `target`; `ones`, from the last, are 1."""
        last = target[max(len(target) - rank, 0) :]
        return tuple(
            1 if one else n for n, one in zip(reversed(last), ones, strict=False)
        )[::-1]  # fmt: skip

    def mask(self, target: tuple[int, ...]) -> None:
        """attn_mask, which broadcasts to `target`."""
        kind, holes = self.drawn.mask, self.drawn.mask_holes
        if kind is None:
            return
        size = self.size(target, self.drawn.mask_rank, self.drawn.mask_ones)
        if kind == "bool":
            self.bools("attn_mask", self.random(*size) > (0.6 if holes else 0.2))
            return
        values = torch.randn(size, generator=self.generator, device="cpu")
        dtype = torch.float32 if kind == "float32" else self.dtype
        if holes:
            values = values.masked_fill(self.random(*size) < 0.4, -torch.inf)
        elif dtype == torch.float32 and max(self.drawn.powers) < 64:
            # Beside it larger scores overflow, as the formula's do.
            values = values.masked_fill(self.random(*size) < 0.1, torch.finfo(dtype).min)
        self.put("attn_mask", values.to(dtype).to(DEVICE))

    def causal(self, q_len: int, kv_len: int, has_objects: bool = True) -> None:
        """The flags of a causal mask, or an object in the place of attn_mask."""
        kind = self.drawn.causal
        if kind is None:
            return
        for call in (self.given, self.clean):
            call["is_causal"] = True
            call["causal_alignment"] = kind if kind != "object" else "bottom_right"
        if kind == "object" and has_objects and self.drawn.mask is None and min(q_len, kv_len) > 0:
            del self.given["is_causal"], self.given["causal_alignment"]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of NaN, which is not ours
                self.given["attn_mask"] = causal_lower_right(q_len, kv_len)

    def kinds(self, batch: tuple[int, ...], heads: int) -> None:
        """Window, soft cap and slopes."""
        drawn = self.drawn
        self.option("window", drawn.window)
        self.option("softcap", drawn.softcap)
        if drawn.slopes is not None:
            sizes = {"one": (1,), "heads": (heads,), "entries": (*batch, heads)}[drawn.slopes]
            self.option("alibi_slopes", (self.random(*sizes) - 0.2).to(DEVICE))

    def ranges(self, batch: tuple[int, ...], q_len: int | None, kv_len: int) -> None:
        """Segments and a prefix, of integers of some kind; no segments where there is no q_len."""
        kind, dtypes = self.drawn.segments, (torch.int64, torch.int32, torch.uint8)
        dtype = dtypes[self.drawn.seed % 3]
        for name, length in (("segment_ids_q", q_len), ("segment_ids_k", kv_len)):
            if kind is None or q_len is None:
                break
            ids = (self.random(*batch, length) * 4).floor()
            if kind != "scattered":
                ids = ids.sort(-1, descending=kind == "turned").values
            self.option(name, ids.to(DEVICE, dtype))
        if self.drawn.prefix:
            lengths = self.random(*batch) * (kv_len + 2)
            self.option("prefix_len", lengths.floor().to(DEVICE, torch.int64))

    def sinks(self, heads: int) -> None:
        if self.drawn.sinks:
            self.option("sinks", (4 * self.random(heads) - 2).to(DEVICE))

    def positions(self, heads: int, q_len: int, kv_len: int) -> None:
        """A table, of one for all heads in some calls, and an index, of integers of some kind."""
        kind, seed = self.drawn.positions, self.drawn.seed
        if kind is None:
            return
        size = (q_len, kv_len) if kind == "each" else (max(q_len + kv_len - 1, 0),)
        rows, entries = (1 if seed % 5 == 0 else heads), 1 + seed % 40
        index = (self.random(*size) * entries).floor()
        table = (2 * self.random(entries, rows) - 1).T
        self.option("position_table", table.to(DEVICE))
        self.option("position_index", index.to(DEVICE, (torch.int64, torch.int32)[seed % 2]))

    def padding(self, name: str, kind: str | None, narrow: bool, *target: int) -> None:
        """A padding mask (..., length): some hidden, the tail of each, whole samples, or all;
        `narrow`: the same for all samples, which broadcasts."""
        if kind is None:
            return
        size = target[-1:] if narrow else target
        if kind == "tail":
            kept = (self.random(*size[:-1], 1) * (size[-1] + 1)).floor()
            hidden = torch.arange(size[-1], device="cpu").expand(size) >= kept
        else:
            hidden = self.random(*size) < {"some": 0.4, "samples": 0.3, "all": 2.0}[kind]
            if kind == "samples":
                hidden = hidden | (self.random(*size[:-1], 1) < 0.5)
        self.bools(name, hidden)
        self.clean[name] = self.clean[name].expand(target).contiguous()

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
    if kind < 0.01:
        return 0
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
    if rng.random() < 0.35:
        drawn["causal"] = rng.choice(("top_left", "bottom_right", "bottom_right", "object"))
    if rng.random() < 0.25:
        drawn["window"] = rng.choice(
            (
                (None, 0),
                (0, 0),
                (rng.randint(0, 90), None),
                (rng.randint(0, 90), rng.randint(0, 90)),
            )
        )
    if rng.random() < 0.15:
        drawn["softcap"] = rng.choice((0.3, 1.0, 5.0, 50.0))
    if rng.random() < 0.15:
        drawn["slopes"] = rng.choice(("one", "heads", "entries"))
    if rng.random() < 0.15:
        drawn["segments"] = rng.choice(("sorted", "turned", "scattered"))
    if rng.random() < 0.1:
        drawn["prefix"] = True
    if rng.random() < 0.1:
        drawn["sinks"] = True
    if rng.random() < 0.15:
        drawn["positions"] = rng.choice(("each", "offset"))
    drawn["number"] = rng.choice(("python",) * 6 + ("numpy", "tensor"))
    half = drawn["dtype"] == "float16"
    kind = rng.random()
    if kind < 0.12:
        drawn["scale"] = rng.choice((-1, 1)) * rng.uniform(0.05, 1.0)
        if drawn["scale"] ** 2 * drawn["head_dim"] > 16:
            drawn["wanted"] = ()  # scores further apart than 4: as at the end
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


def draw_mask(rng: random.Random) -> dict[str, Any]:
    if rng.random() > 0.45:
        return {}
    return {
        "mask": rng.choice(("bool", "bool", "float", "float32")),
        "mask_holes": rng.random() < 0.4,
        "mask_rank": rng.randint(0, 6),
        "mask_ones": tuple(rng.random() < 0.3 for _ in range(6)),
    }


def draw_padding(rng: random.Random) -> str | None:
    return rng.choice(("some", "some", "tail", "samples", "all")) if rng.random() < 0.35 else None
