"""Masks that compose: `ff.mask.causal() & ff.mask.padding(mask)`::

    mask = ff.mask.causal() & ff.mask.window(256, 0) & ff.mask.padding(padding)
    out = ff.scaled_dot_product_attention(query, key, value, **mask.arguments(query, key))

`&` lets two tokens see each other where both masks do, `|` where one of them does, `~` where the
mask does not. What has an argument of the op becomes that argument, which kernels know how to skip;
the rest becomes one bool mask. `mask.explain()` says which is which.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastfusion.core.score_policy import Policy

__all__ = [
    "Mask", "bias", "boolean", "causal", "from_mask_mod", "padding", "prefix", "segments", "window",
]  # fmt: skip
_ALIGNMENTS = ("top_left", "bottom_right")


class Mask:
    """Which keys each query sees. Made by the functions of this module and by `&`, `|` and `~`."""

    def __and__(self, other: "Mask") -> "Mask":
        return _all((self, _checked(other)))

    def __or__(self, other: "Mask") -> "Mask":
        return _Any((self, _checked(other)))

    def __invert__(self) -> "Mask":
        return _Not(self)

    def visible(self, q_len: int, kv_len: int, device: Any = None) -> Tensor:
        """bool, broadcastable to (batch, heads, q_len, kv_len): True where a query sees a key."""
        raise NotImplementedError

    def arguments(self, query: Tensor, key: Tensor) -> dict[str, Any]:
        """Keyword arguments of `ff.scaled_dot_product_attention` and `ff.bidirectional_attention`.

        Args:
            query, key: (batch, heads, length, head_dim); only lengths and device count.

        Raises:
            ValueError: two biases, or a mask that does not fit the lengths.
        """
        return _Plan.of(self).arguments(query.shape[-2], key.shape[-2], query.device)

    def explain(self) -> str:
        """Which parts become arguments that kernels skip keys by, and which one bool mask."""
        plan = _Plan.of(self)
        lines = [f"{part!r}: {argument}" for part, argument in plan.said]
        return "\n".join(lines) or "everything is visible"


def _checked(other: Any) -> Mask:
    if not isinstance(other, Mask):
        raise TypeError(f"masks combine with masks, got {type(other).__name__}")
    return other


@dataclass(frozen=True, eq=False, repr=False)
class _Band(Mask):
    """Queries see the keys from `left` before their own place to `right` behind it."""

    left: int | None
    right: int | None
    alignment: str

    def __repr__(self) -> str:
        if self.right == 0 and self.left is None:
            return f"causal({self.alignment!r})"
        return f"window({self.left}, {self.right}, {self.alignment!r})"

    def visible(self, q_len: int, kv_len: int, device: Any = None) -> Tensor:
        diagonal = kv_len - q_len if self.alignment == "bottom_right" else 0
        return Policy(diagonal, self.left, self.right).visible(q_len, kv_len, device)


@dataclass(frozen=True, eq=False, repr=False)
class _Padding(Mask):
    hidden: Tensor

    def __repr__(self) -> str:
        return f"padding({_form(self.hidden)})"

    def visible(self, q_len: int, kv_len: int, device: Any = None) -> Tensor:
        if self.hidden.shape[-1] not in (1, kv_len):
            raise ValueError(f"padding is {_form(self.hidden)}, and there are {kv_len} keys")
        return ~self.hidden.to(device)[:, None, None, :]


@dataclass(frozen=True, eq=False, repr=False)
class _Boolean(Mask):
    seen: Tensor

    def __repr__(self) -> str:
        return f"boolean({_form(self.seen)})"

    def visible(self, q_len: int, kv_len: int, device: Any = None) -> Tensor:
        return self.seen.to(device)


@dataclass(frozen=True, eq=False, repr=False)
class _Bias(Mask):
    added: Tensor

    def __repr__(self) -> str:
        return f"bias({_form(self.added)})"

    def visible(self, q_len: int, kv_len: int, device: Any = None) -> Tensor:
        raise ValueError("a bias is added to scores and combines with `&` alone")


@dataclass(frozen=True, eq=False, repr=False)
class _Prefix(Mask):
    length: int | Tensor

    def __repr__(self) -> str:
        return f"prefix({_form(self.length) if isinstance(self.length, Tensor) else self.length})"

    def visible(self, q_len: int, kv_len: int, device: Any = None) -> Tensor:
        places = torch.arange(kv_len, device=device)
        return places < self.lengths(device)[:, None, None, None]

    def lengths(self, device: Any) -> Tensor:
        """int (batch,), or of 1."""
        return torch.as_tensor(self.length, device=device).reshape(-1)


@dataclass(frozen=True, eq=False, repr=False)
class _Segments(Mask):
    of_queries: Tensor
    of_keys: Tensor

    def __repr__(self) -> str:
        return f"segments({_form(self.of_queries)})"

    def visible(self, q_len: int, kv_len: int, device: Any = None) -> Tensor:
        if (self.of_queries.shape[1], self.of_keys.shape[1]) != (q_len, kv_len):
            raise ValueError(
                f"segments are {_form(self.of_queries)} and {_form(self.of_keys)}, of {q_len} "
                f"queries and {kv_len} keys"
            )
        keys = self.of_keys.to(device)[:, None, None, :]
        return self.of_queries.to(device)[:, None, :, None] == keys


@dataclass(frozen=True, eq=False, repr=False)
class _Rule(Mask):
    """A mask that is written out for given lengths."""

    name: str
    rule: Callable[[int, int, Any], Tensor]

    def __repr__(self) -> str:
        return self.name

    def visible(self, q_len: int, kv_len: int, device: Any = None) -> Tensor:
        return self.rule(q_len, kv_len, device)


@dataclass(frozen=True, eq=False, repr=False)
class _Not(Mask):
    mask: Mask

    def __repr__(self) -> str:
        return f"~{self.mask!r}"

    def visible(self, q_len: int, kv_len: int, device: Any = None) -> Tensor:
        return ~self.mask.visible(q_len, kv_len, device)


@dataclass(frozen=True, eq=False, repr=False)
class _Any(Mask):
    masks: tuple[Mask, ...]

    def __repr__(self) -> str:
        return f"({' | '.join(map(repr, self.masks))})"

    def visible(self, q_len: int, kv_len: int, device: Any = None) -> Tensor:
        first, *others = (mask.visible(q_len, kv_len, device) for mask in self.masks)
        for other in others:
            first = first | other
        return first


@dataclass(frozen=True, eq=False, repr=False)
class _All(Mask):
    masks: tuple[Mask, ...]

    def __repr__(self) -> str:
        return f"({' & '.join(map(repr, self.masks))})"

    def visible(self, q_len: int, kv_len: int, device: Any = None) -> Tensor:
        first, *others = (mask.visible(q_len, kv_len, device) for mask in self.masks)
        for other in others:
            first = first & other
        return first


def _all(masks: tuple[Mask, ...]) -> Mask:
    flat: list[Mask] = []
    for mask in masks:
        flat += mask.masks if isinstance(mask, _All) else (mask,)
    return _All(tuple(flat))


@dataclass
class _Plan:
    """What of a mask goes into which argument, and the sentences that say so."""

    band: _Band | None = None
    prefix: _Prefix | None = None  # of keys that are seen right of a causal band, too
    segments: _Segments | None = None
    hidden: Tensor | None = None
    added: Tensor | None = None
    others: list[Mask] = field(default_factory=list)
    said: list[tuple[Mask, str]] = field(default_factory=list)

    @classmethod
    def of(cls, mask: Mask) -> "_Plan":
        plan = cls()
        for part in mask.masks if isinstance(mask, _All) else (mask,):
            plan.said.append((part, plan.take(part)))
        return plan

    def take(self, part: Mask) -> str:
        """Put a part where it belongs; returns what to say of it."""
        if isinstance(part, _Band) and self._takes(part):
            one = self.band or part
            left = [n for n in (one.left, part.left) if n is not None]
            right = [n for n in (one.right, part.right) if n is not None]
            self.band = replace(part, left=min(left, default=None), right=min(right, default=None))
            causal = part.left is None and part.right == 0
            return "is_causal" if causal else "window, whose keys alone are read"
        band, prefix = _causal_and_prefix(part)
        bounded = self.band is not None and self.band.right is not None
        if prefix is not None and not bounded and self._takes(band):
            self.band, self.prefix = replace(self.band or band, right=None), prefix
            return "prefix_len, beside which a call is causal"
        if isinstance(part, _Segments) and self.segments is None:
            self.segments = part
            return "segment_ids_q and segment_ids_k, whose keys alone are read"
        if isinstance(part, _Padding) and (
            self.hidden is None or self.hidden.shape == part.hidden.shape
        ):
            self.hidden = part.hidden if self.hidden is None else self.hidden | part.hidden
            return "key_padding_mask, whose keys are left out"
        if isinstance(part, _Bias):
            if self.added is not None:
                raise ValueError("a call has one bias; add them up before")
            self.added = part.added
            return "attn_mask, added to the scores"
        self.others.append(part)
        return "a part of attn_mask, written out"

    def _takes(self, band: "_Band") -> bool:
        """Whether a band combines with what is there: of one alignment, and none of its own right
        side beside a prefix."""
        if self.prefix is not None and band.right is not None:
            return False
        return self.band is None or self.band.alignment == band.alignment

    def arguments(self, q_len: int, kv_len: int, device: Any) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if self.band is not None:
            left, right = self.band.left, self.band.right
            if self.band.alignment != "top_left":
                given["causal_alignment"] = self.band.alignment
            if right == 0:
                given["is_causal"] = True
            if left is not None or right not in (0, None):
                given["window"] = (left, right)
        if self.prefix is not None:
            given["prefix_len"] = self.prefix.lengths(device)
        if self.segments is not None:
            self.segments.visible(q_len, kv_len, "meta")  # checks the lengths
            given["segment_ids_q"] = self.segments.of_queries.to(device)
            given["segment_ids_k"] = self.segments.of_keys.to(device)
        if self.hidden is not None:
            given["key_padding_mask"] = self.hidden
        if self.others:
            seen = _all(tuple(self.others)).visible(q_len, kv_len, device)
            if self.added is None:
                given["attn_mask"] = seen
            else:
                given["attn_mask"] = torch.where(seen, self.added, -torch.inf)
        elif self.added is not None:
            given["attn_mask"] = self.added
        return given


def _causal_and_prefix(mask: Mask) -> tuple[Any, Any]:
    """The two of `causal() | prefix(n)`; None and None of other masks."""
    parts = mask.masks if isinstance(mask, _Any) else ()
    bands = [p for p in parts if isinstance(p, _Band) and p.left is None and p.right == 0]
    prefixes = [p for p in parts if isinstance(p, _Prefix)]
    one_of_each = len(parts) == 2 and len(bands) == len(prefixes) == 1
    return (bands[0], prefixes[0]) if one_of_each else (None, None)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


# ---- what users write


def _alignment(alignment: Any) -> str:
    if alignment not in _ALIGNMENTS:
        raise ValueError(f"alignment must be one of {_ALIGNMENTS}, got {alignment!r}")
    return str(alignment)


def causal(alignment: str = "top_left") -> Mask:
    """A query sees the keys up to its own place.

    Args:
        alignment: where that is if there are more keys than queries: key i for query i, or with
            "bottom_right" the last key for the last query, as in FlashAttention.
    """
    return _Band(None, 0, _alignment(alignment))


def window(left: int | None, right: int | None, alignment: str = "top_left") -> Mask:
    """A query sees `left` keys before its own place and `right` behind it; None: all of them."""
    for name, side in {"left": left, "right": right}.items():
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise TypeError(f"{name} must be an int or None, got {type(side).__name__}")
        if side is not None and side < 0:
            raise ValueError(f"{name} must be at least 0, got {side}")
    return _Band(left, right, _alignment(alignment))


def padding(hidden: Tensor) -> Mask:
    """Keys that nobody sees: bool (batch, kv_len), True = ignore, as `key_padding_mask`."""
    _bool("padding", hidden, 2)
    return _Padding(hidden)


def boolean(seen: Tensor) -> Mask:
    """A mask written out: bool, broadcastable to (batch, heads, q_len, kv_len), True = sees."""
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
        raise TypeError(f"boolean takes a bool tensor, got {getattr(seen, 'dtype', type(seen))}")
    return _Boolean(seen)


def bias(added: Tensor) -> Mask:
    """Numbers that are added to the scores: float, broadcastable to (batch, heads, q_len,
    kv_len)."""
    if not isinstance(added, Tensor) or not added.is_floating_point():
        raise TypeError(f"bias takes a float tensor, got {getattr(added, 'dtype', type(added))}")
    return _Bias(added)


def prefix(length: int | Tensor) -> Mask:
    """Everybody sees the first keys: `causal() | prefix(n)` is a picture of n tokens, whose tokens
    see each other, before a text that is causal.

    Args:
        length: an int, or int (batch,) for each batch entry.
    """
    return _Prefix(length)


def segments(of_queries: Tensor, of_keys: Tensor | None = None) -> Mask:
    """Tokens see those of their own segment: sequences that are packed into one.

    Args:
        of_queries, of_keys: int (batch, q_len) and (batch, kv_len), the number of each token's
            segment; one for both where they are the same.
    """
    keys = of_queries if of_keys is None else of_keys
    for name, each in {"of_queries": of_queries, "of_keys": keys}.items():
        if each.dim() != 2 or each.is_floating_point() or each.dtype == torch.bool:
            raise ValueError(f"{name} must be int (batch, length), got {_form(each)}")
    return _Segments(of_queries, keys)


def from_mask_mod(mask_mod: Callable[..., Tensor], batch: int = 1, heads: int = 1) -> Mask:
    """A `mask_mod` of `torch.nn.attention.flex_attention`, or the one of a BlockMask, written out.

    Args:
        mask_mod: from tensors batch, head, q_idx and kv_idx to whether they see each other; or a
            BlockMask.
        batch, heads: for how many of them it is asked; 1 where it does not depend on them.
    """
    rule_of = getattr(mask_mod, "mask_mod", mask_mod)

    def rule(q_len: int, kv_len: int, device: Any) -> Tensor:
        sizes = (batch, heads, q_len, kv_len)
        indices: Iterator[Tensor] = (
            torch.arange(size, device=device).view([-1 if d == n else 1 for d in range(4)])
            for n, size in enumerate(sizes)
        )
        return rule_of(*indices).expand(sizes)

    return _Rule(f"from_mask_mod({getattr(rule_of, '__name__', 'mask_mod')})", rule)


def _bool(name: str, tensor: Any, rank: int) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
        raise TypeError(f"{name} takes a bool tensor, got {getattr(tensor, 'dtype', type(tensor))}")
    if tensor.dim() != rank:
        raise ValueError(f"{name} must be (batch, length), got {tuple(tensor.shape)}")
