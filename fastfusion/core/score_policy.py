"""Kinds of masks that are numbers: causal masks, windows, soft caps, ALiBi, position tables,
segments, prefixes and sinks.

With x the scaled products of queries and keys, scores are, as FlashAttention makes them
(`flash_attn_func` of flash-attn 2.6 and later):

    S = softcap * tanh(x / softcap)               Gemma 2 (Gemma Team, 2024, section 2)
      - alibi_slopes * |i + diagonal - j|         ALiBi (Press et al., 2022), both ways
      + position_table[position_index]            T5 (Raffel et al., 2020, section 2.1), Swin (Liu
                                                  et al., 2021, equation 4)
      + attn_mask

where query i stands beside key i + diagonal, and sees the keys from i + diagonal - left to
i + diagonal + right of its window (Beltagy et al., "Longformer", 2020). The diagonal is 0, or
kv_len - q_len with causal_alignment="bottom_right", which is FlashAttention's. A causal mask is a
window whose right side is 0; beside a prefix (the prefix LM of Raffel et al., "T5", 2020, section
3.2.1) all queries see its keys, too. Of segments a query sees the keys of its own: sequences that
are packed into one (Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021).
A sink is one more score of a row, of a key whose value is 0 (OpenAI's gpt-oss; Miller, "Attention
Is Off By One", 2023, has 0 for all): P = exp(S) / (exp(sink) + sum_j exp(S)).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfusion.core.arguments import (
    broadcasts,
    check_dense,
    check_device,
    is_readable,
    number,
    shapes,
)

Window = tuple[int | None, int | None] | None

# Of a soft cap: its inverse is a number of float32, too.
_SMALLEST, _LARGEST = 2.0**-100, 2.0**100


class Policy(NamedTuple):
    """What decides about scores beside masks that are tensors.

    Attributes:
        diagonal: query i stands beside key i + diagonal; a tensor has one for each batch entry.
        left, right: how many keys a query sees before that one and behind it; None: all of them.
        softcap, alibi_slopes: as in the formula; slopes (batch, heads).
        segments: numbers (batch, q_len) and (batch, kv_len); a query sees the keys of its own.
        prefix: (batch,), how many keys all queries see, whatever is right of them.
        sinks: (heads,), the score of a key without a value.
        positions: a table (heads, entries), and the entry of each score: (q_len, kv_len), or by
            offset, (q_len + kv_len - 1,), where a score has number j - i + q_len - 1.
    """

    diagonal: int | Tensor = 0
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    segments: tuple[Tensor, Tensor] | None = None
    prefix: Tensor | None = None
    sinks: Tensor | None = None
    positions: tuple[Tensor, Tensor] | None = None

    @property
    def hides(self) -> bool:
        """Whether some scores may be -inf by it."""
        return not (self.left is self.right is self.segments is None)

    @property
    def adds(self) -> bool:
        """Whether it adds to scores, as a mask does."""
        return not (self.alibi_slopes is self.positions is None)

    def shape(self, scores: Tensor) -> Tensor:
        """The scaled products (batch, heads, q_len, kv_len) with cap, ALiBi and position table."""
        q_len, kv_len = scores.shape[-2:]
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.alibi_slopes is not None:
            slopes = self.alibi_slopes.to(scores.dtype)[:, :, None, None]
            scores = scores - slopes * self._distance(q_len, kv_len, scores.device).abs()
        if self.positions is not None:
            table, index = self.positions
            if index.dim() == 1:
                rows, columns = (torch.arange(n, device=index.device) for n in (q_len, kv_len))
                index = index[columns - rows[:, None] + (q_len - 1)]
            bias = table.to(scores.dtype).index_select(1, index.flatten())
            scores = scores + bias.reshape(table.shape[0], q_len, kv_len)
        return scores

    def hide(self, scores: Tensor) -> Tensor:
        """-inf where a query does not see a key."""
        if not self.hides:
            return scores
        q_len, kv_len = scores.shape[-2:]
        return scores.masked_fill(~self.visible(q_len, kv_len, scores.device), -torch.inf)

    def with_sinks(self, scores: Tensor) -> Tensor:
        """(batch, heads, q_len, kv_len + 1), the last of which are sinks, or the scores alone."""
        if self.sinks is None:
            return scores
        sinks = self.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        return torch.cat((scores, sinks), -1)

    def without_sinks(self, weights: Tensor) -> Tensor:
        return weights if self.sinks is None else weights[..., :-1]

    def visible(self, q_len: int, kv_len: int, device: Any) -> Tensor:
        """bool, broadcastable to (batch, heads, q_len, kv_len): True where a query sees a key."""
        distance = self._distance(q_len, kv_len, device)
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            seen = seen & (distance <= self.left)
        if self.right is not None:
            near = distance >= -self.right
            if self.prefix is not None:
                near = near | (
                    torch.arange(kv_len, device=device) < self.prefix[:, None, None, None]
                )
            seen = seen & near
        if self.segments is not None:
            of_queries, of_keys = self.segments
            seen = seen & (of_queries[:, None, :, None] == of_keys[:, None, None, :])
        return seen

    def _distance(self, q_len: int, kv_len: int, device: Any) -> Tensor:
        """By how much the place of a query is behind a key."""
        diagonal = self.diagonal
        if isinstance(diagonal, Tensor):
            diagonal = diagonal[:, None, None, None]
        rows, columns = (torch.arange(n, device=device) for n in (q_len, kv_len))
        return rows[:, None] + diagonal - columns


class Kinds(NamedTuple):
    """Those of the arguments of an op that modules hand on as they come."""

    window: Any = None
    softcap: Any = None
    alibi_slopes: Any = None
    segment_ids_q: Any = None
    segment_ids_k: Any = None
    prefix_len: Any = None
    sinks: Any = None
    position_table: Any = None
    position_index: Any = None

    def policy(self, query: Tensor, key: Tensor) -> Policy:
        """Of queries and keys (batch, heads, length, head_dim), once they are checked."""
        left, right, softcap = kinds_of(self)
        slopes = slopes_of(self.alibi_slopes, query, *query.shape[:2])
        *ids, prefix = ranges_of(self, query.shape[:1], query.shape[2], key.shape[2])
        right = right if prefix is None else 0
        sinks = sinks_of(self.sinks, query, query.shape[1])
        index, table = positions_of(self, query, query.shape[1])
        positions = _pair((table, index))
        return Policy(0, left, right, softcap, slopes, _pair(ids), prefix, sinks, positions)

    def check(self, query: Tensor, key: Tensor) -> None:
        """Raise TypeError or ValueError for what is not legal beside these queries and keys."""
        sizes = shapes(query=query, key=key)
        check_kinds(self, query, tuple(query.shape[:2]), sizes)
        check_ranges(self, query, key, tuple(query.shape[:1]), sizes)
        check_sinks(self.sinks, query, tuple(query.shape[1:2]), sizes)
        check_positions(self, query, key, tuple(query.shape[1:2]), sizes)


# Those that modules name where they do not go with something else.
KINDS = "window, softcap, alibi_slopes, segment ids, prefix_len, sinks and position tables"


def causal(diagonal: int | None) -> Policy:
    """Query i sees the keys up to i + diagonal; without one it sees all."""
    return Policy() if diagonal is None else Policy(diagonal, right=0)


def policy_of(call: Any, diagonal: Any) -> Policy:
    """That of an op's call, whose queries stand beside this diagonal."""
    left, right = sides_of(call)
    *ids, prefix = ranges_in(call)
    sinks, table, index = (getattr(call, n, None) for n in ("sinks", *POSITIONS))
    return Policy(
        diagonal, left, right, call.softcap, call.alibi_slopes, _pair(ids), prefix, sinks,
        _pair((table, index)),
    )  # fmt: skip


def ranges_in(call: Any) -> tuple[Any, Any, Any]:
    """Segments and prefix of a call; packed sequences have no segments."""
    q_ids, k_ids, prefix = (getattr(call, name, None) for name in _RANGES)
    return q_ids, k_ids, prefix


def _has_ranges(call: Any) -> bool:
    return any([numbers is not None for numbers in ranges_in(call)])


_RANGES = ("segment_ids_q", "segment_ids_k", "prefix_len")
POSITIONS = ("position_table", "position_index")


def _pair(both: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """Of two that come together."""
    one, other = both
    return None if one is None else (one, other)


def sides_of(call: Any) -> tuple[int | None, int | None]:
    """How many keys a query sees left and right of its place, by window and causal mask."""
    return call.window_left, 0 if call.is_causal else call.window_right


def scores_seen(call: Any, q_len: int, kv_len: int) -> int:
    """How many scores a window leaves; a causal mask alone hides none here, as in torch's count,
    nor do segments and prefixes, which are numbers of tensors."""
    if call.window_left is call.window_right is None:
        return q_len * kv_len
    left, right = sides_of(call)
    diagonal = kv_len - q_len if call.bottom_right else 0

    def below(limit: int) -> int:
        """How many of kv_len keys are below 1, 2, .. up to `limit`, all added."""
        inside = min(max(limit, 0), kv_len)
        return inside * (inside + 1) // 2 + max(limit - kv_len, 0) * kv_len

    def up_to(offset: int) -> int:
        """How many scores have j <= i + offset."""
        return below(q_len + offset) - below(offset)

    seen = q_len * kv_len if right is None else up_to(diagonal + right)
    return seen - (0 if left is None else up_to(diagonal - left - 1))


def hides(call: Any) -> bool:
    """Whether a query of a call may see less than all keys, but for masks and padding."""
    return sides_of(call) != (None, None) or _has_ranges(call)


def bounds(window: Any) -> tuple[int | None, int | None]:
    """A window as calls have it."""
    left, right = (None, None) if window is None else (number("window", side) for side in window)
    return left, right


NONE = (None, None, None)  # those that `plain_kinds` gives, of calls without


def plain_kinds(window: Any, softcap: Any) -> tuple[Any, ...] | None:
    """The last fields of a call with these as they came; None where `check_kinds` is to look."""
    if window is not None and not (
        type(window) is tuple
        and len(window) == 2
        and all([side is None or (type(side) is int and side >= 0) for side in window])
    ):
        return None
    if softcap is not None:
        if type(softcap) not in (float, int) or not _SMALLEST <= softcap <= _LARGEST:
            return None
        softcap = float(softcap)
    return *bounds(window), softcap


def slopes_of_each(slopes: Any, entries: Any, more: int = 0) -> Any:
    """Slopes (heads,) of an eager call as its kernel takes them, (batch, heads): it needs no
    `normalize` then, and takes 16 us, not 100. What is wrong comes back as it was.

    Args:
        entries: a tensor with an element for each entry of the batch, and `more`.
    """
    if type(slopes) is not Tensor or slopes.dim() != 1 or not isinstance(entries, Tensor):
        return slopes
    if entries.dim() == 0 or entries.shape[0] <= more:
        return slopes
    return slopes.expand(entries.shape[0] - more, -1)


def check_kinds(given: Any, query: Tensor, leading: tuple[int, ...], sizes: str) -> None:
    """Raise TypeError or ValueError for a window, a soft cap or slopes that are not legal.

    Args:
        given: the arguments of an op.
        leading: batch and heads, to which slopes broadcast.
        sizes: what was given, for messages.
    """
    window, softcap, slopes = given.window, given.softcap, given.alibi_slopes
    if window is not None:
        if not isinstance(window, tuple | list) or len(window) != 2:
            raise TypeError(f"window must be a pair (left, right) or None, got {window!r}")
        for side in window:
            side = number("window", side)
            if side is None:
                continue
            if isinstance(side, bool) or not isinstance(side, int | torch.SymInt):
                raise TypeError(f"window must have ints or None, got {type(side).__name__}")
            if side < 0:
                raise ValueError(f"window must not be negative (None: no bound), got {window}")
    if softcap is not None:
        softcap = number("softcap", softcap)
        if isinstance(softcap, bool) or not isinstance(softcap, int | float):
            raise TypeError(f"softcap must be a float or None, got {type(softcap).__name__}")
        if not _SMALLEST <= softcap <= _LARGEST:
            raise ValueError(f"softcap must be between 2**-100 and 2**100, got {softcap}")
    _check_numbers("alibi_slopes", slopes, query, "(batch, heads)", leading, sizes)


def check_sinks(sinks: Any, query: Tensor, heads: tuple[int, ...], sizes: str) -> None:
    """Raise TypeError or ValueError for sinks that are not legal, of (heads,) or of no heads."""
    _check_numbers("sinks", sinks, query, "(heads,)", heads, sizes)


def _check_numbers(
    name: str, numbers: Any, query: Tensor, words: str, target: tuple[int, ...], sizes: str
) -> None:
    if numbers is None:
        return
    if not isinstance(numbers, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(numbers).__name__}")
    check_dense(name, numbers)
    if numbers.dtype not in (torch.float32, query.dtype):
        raise TypeError(
            f"{name} must be float32 or of the query's dtype, {query.dtype}, got {numbers.dtype}"
        )
    check_device(name, numbers, "query", query)
    if not broadcasts(numbers, target):
        raise ValueError(
            f"{name} must broadcast to {words}, {target}, got shape {tuple(numbers.shape)}; {sizes}"
        )


def check_positions(
    given: Any, query: Tensor, key: Tensor, heads: tuple[int, ...], sizes: str
) -> None:
    """Raise TypeError or ValueError for a position table or index that is not legal.

    Args:
        given: the arguments of an op.
        heads: (heads,), or of no heads.
        sizes: what was given, for messages.
    """
    table, index = given.position_table, given.position_index
    if (table is None) != (index is None):
        given_one, other = POSITIONS if index is None else POSITIONS[::-1]
        raise ValueError(f"{given_one} comes with {other}, which is None; {sizes}")
    if table is None:
        return
    entries = table.shape[-1] if isinstance(table, Tensor) and table.dim() == 2 else 0
    target = (*(heads or (1,)), entries)
    _check_numbers("position_table", table, query, "(heads, entries)", target, sizes)
    if table.dim() != 2:
        raise ValueError(f"position_table must be (heads, entries), got {tuple(table.shape)}")
    if not isinstance(index, Tensor):
        raise TypeError(f"position_index must be a Tensor or None, got {type(index).__name__}")
    check_dense("position_index", index)
    if index.dtype not in _INTEGERS:
        raise TypeError(f"position_index must be integers, got {index.dtype}")
    check_device("position_index", index, "query", query)
    q_len, kv_len = query.shape[-2], key.shape[-2]
    if tuple(index.shape) not in ((q_len, kv_len), (max(q_len + kv_len - 1, 0),)):
        raise ValueError(
            f"position_index must be (q_len, kv_len), {(q_len, kv_len)}, or by offset "
            f"(q_len + kv_len - 1,), got shape {tuple(index.shape)}; {sizes}"
        )
    smallest, largest = _ends(index, entries)
    if smallest < 0 or largest >= entries:
        raise ValueError(
            f"position_index must be from 0 to {entries - 1}, the entries of position_table "
            f"{tuple(table.shape)}, got {smallest} to {largest}"
        )


def _ends(index: Tensor, entries: int) -> tuple[int, int]:
    """The least and the largest number of an index, where one can look, or those of all entries."""
    traced = torch._C._get_tracing_state() is not None
    if traced or not is_readable(index) or index.numel() == 0:
        return 0, entries - 1
    smallest, largest = (int(number) for number in index.aminmax())
    return smallest, largest


def check_ranges(
    given: Any, query: Tensor, key: Tensor, leading: tuple[int, ...], sizes: str
) -> None:
    """Raise TypeError or ValueError for segments or a prefix that are not legal.

    Args:
        given: the arguments of an op.
        leading: batch dimensions, to which all broadcast.
        sizes: what was given, for messages.
    """
    q_ids, k_ids, prefix = ranges_in(given)
    lengths = (*leading, query.shape[-2]), (*leading, key.shape[-2])
    for name, ids, target in zip(_RANGES, (q_ids, k_ids, prefix), (*lengths, leading), strict=True):
        if ids is None:
            continue
        if not isinstance(ids, Tensor):
            raise TypeError(f"{name} must be a Tensor or None, got {type(ids).__name__}")
        check_dense(name, ids)
        if ids.dtype not in _INTEGERS:
            raise TypeError(f"{name} must be integers, got {ids.dtype}")
        check_device(name, ids, "query", query)
        if not broadcasts(ids, target):
            raise ValueError(
                f"{name} must broadcast to {target}, got shape {tuple(ids.shape)}; {sizes}"
            )
    if (q_ids is None) != (k_ids is None):
        given_one, other = _RANGES[:2] if k_ids is None else _RANGES[1::-1]
        raise ValueError(f"{given_one} comes with {other}, which is None; {sizes}")


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def ranges_of(given: Any, outer: Sequence[Any], q_len: Any, kv_len: Any) -> tuple[Any, Any, Any]:
    """Segments and prefix of an op's arguments as calls have them, of one batch dimension in the
    place of those of `outer`."""

    def whole(numbers: Any, *length: Any) -> Any:
        if numbers is None:
            return None
        return numbers.to(torch.int64).expand(*outer, *length).flatten(0, len(outer) - 1)

    q_ids, k_ids, prefix = ranges_in(given)
    return whole(q_ids, q_len), whole(k_ids, kv_len), whole(prefix)


def ranges_fit(call: Any, batch: Any) -> Iterator[Any]:
    """What holds for segments and prefix of a call of so many entries."""
    q_ids, k_ids, prefix = ranges_in(call)
    yield (q_ids is None) == (k_ids is None)
    yield prefix is None or call.is_causal
    lengths = (call.query.shape[2],), (call.key.shape[2],), ()
    for numbers, length in zip((q_ids, k_ids, prefix), lengths, strict=True):
        if numbers is not None:
            yield numbers.dtype == torch.int64 and numbers.device == call.query.device
            yield numbers.dim() == 1 + len(length)
            for size, expected in zip(numbers.shape, (batch, *length), strict=True):
                yield size == expected


def kinds_of(given: Any) -> tuple[int | None, int | None, float | None]:
    """Window and soft cap of an op's arguments, as its call has them."""
    softcap = number("softcap", given.softcap)
    return *bounds(given.window), None if softcap is None else float(softcap)


def slopes_of(slopes: Tensor | None, query: Tensor, *sizes: Any) -> Tensor | None:
    """ALiBi's slopes as a call has them: of these sizes, batch and heads last, and wide enough."""
    if slopes is None:
        return None
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return slopes.to(dtype).expand(sizes)


def sinks_of(sinks: Tensor | None, query: Tensor, heads: Any) -> Tensor | None:
    """Sinks as a call has them: (heads,), and wide enough."""
    return slopes_of(sinks, query, heads)


def sinks_fit(call: Any, heads: Any) -> Iterator[Any]:
    """What holds for the sinks of a call of so many heads."""
    sinks = call.sinks
    if sinks is not None:
        dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
        yield sinks.dtype == dtype and sinks.device == call.query.device
        yield sinks.dim() == 1
        yield sinks.shape[0] == heads


def positions_of(given: Any, query: Tensor, heads: Any) -> tuple[Any, Any]:
    """Position index and table of an op's arguments as calls have them: integers of 64 bits, and
    (heads, entries), wide enough."""
    table, index = given.position_table, given.position_index
    if table is None:
        return None, None
    return index.to(torch.int64), slopes_of(table, query, heads, table.shape[1])


def positions_fit(call: Any, heads: Any) -> Iterator[Any]:
    """What holds for the position table and index of a call of so many heads."""
    table, index, query = call.position_table, call.position_index, call.query
    yield (table is None) == (index is None)
    if table is not None:
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        yield table.dtype == dtype and table.device == query.device and table.dim() == 2
        yield table.shape[0] == heads
        yield index.dtype == torch.int64 and index.device == query.device
        q_len, kv_len = query.shape[2], call.key.shape[2]
        offsets = (torch.sym_max(q_len + kv_len - 1, 0),)
        yield index.dim() in (1, 2)
        for size, expected in zip(
            index.shape, offsets if index.dim() == 1 else (q_len, kv_len), strict=True
        ):
            yield size == expected
        smallest, largest = _ends(index, table.shape[1])
        yield smallest >= 0
        yield largest < table.shape[1]


def kinds_fit(call: Any, *leading: Any) -> Iterator[Any]:
    """What holds for the kinds of a call of so many entries and heads."""
    slopes = call.alibi_slopes
    if slopes is not None:
        yield slopes.dtype in (torch.float32, torch.float64) and slopes.device == call.query.device
        yield slopes.dim() == 2
        for size, expected in zip(slopes.shape, leading, strict=True):
            yield size == expected
    for side in (call.window_left, call.window_right):
        yield side is None or side >= 0
    yield call.softcap is None or _SMALLEST <= call.softcap <= _LARGEST


def has_rare_kinds(call: Any) -> bool:
    """Whether a call has segments, a prefix, sinks or a position table."""
    others = (getattr(call, name, None) for name in ("sinks", "position_table"))
    return _has_ranges(call) or any([tensor is not None for tensor in others])


def refuses_entries(call: Any) -> Sequence[str]:
    """Why a kernel that looks at no number of an index, but lets `check` do so where that waits for
    no device, cannot run a call."""
    index = call.position_index
    if isinstance(index, Tensor):
        entries = call.position_table.shape[-1]
        smallest, largest = _ends(index, entries)
        if smallest < 0 or largest >= entries:
            return ("position_index has numbers of no entry",)
    return ()


def refuses_gradient(call: Any) -> Sequence[str]:
    """Why kernels that have these kinds cannot run a call."""
    slopes = call.alibi_slopes
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        return ("the gradient of alibi_slopes is left to the reference",)
    return ()


def kind_inputs(
    shape: Mapping[str, Any], normal: Callable[..., Tensor], generator: Any, device: Any
) -> dict[str, Any]:
    """Arguments of an op for what a benchmark's shape has of kinds.

    Args:
        normal: makes normally distributed numbers, by sizes.
    """
    call: dict[str, Any] = {}
    batch, heads = shape.get("batch", 1), shape.get("heads", 1)
    q_len, kv_len = shape["q_len"], shape["kv_len"]
    if shape.get("window"):
        call["window"] = tuple(shape["window"])
    if shape.get("softcap"):
        call["softcap"] = shape["softcap"]
    if shape.get("alibi"):
        powers = torch.arange(1, heads + 1, device=device) * (-8.0 / heads)
        call["alibi_slopes"] = torch.exp2(powers)
    if shape.get("segments"):
        for name, length in (("segment_ids_q", q_len), ("segment_ids_k", kv_len)):
            places = torch.arange(length, device=device)
            call[name] = (places * shape["segments"] // length).expand(batch, length)
    if shape.get("prefix"):
        call["prefix_len"] = torch.full((batch,), shape["prefix"], device=device)
    if shape.get("sinks"):
        call["sinks"] = torch.linspace(-1.0, 1.0, heads, device=device)
    if shape.get("positions"):
        size = (q_len + kv_len - 1,) if shape["positions"] == "offsets" else (q_len, kv_len)
        index = torch.randint(64, size, generator=generator, device="cpu")
        call |= {"position_table": normal(heads, 64), "position_index": index.to(device)}
    return call
