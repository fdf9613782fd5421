"""The random bits of dropout: Philox4x32-10, counter-based, the same on every backend.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The bit of score (i, j) of
head h in batch entry b is a function of (seed, b, h, i, j) alone: key = seed, counter =
(j // 4, i, b * heads + h, stream), word j % 4; the score is kept iff word >= round(p * 2**32).
i and j count inside the own sequence. A call that is a part of a larger one has a seed with its
place in that (`placed`), by which the numbers are those of the larger one. Stream 0 is the softmax
over keys, 1 the one over queries.
"""

from typing import Any

import torch
from torch import Tensor

ROW_STREAM = 0
COLUMN_STREAM = 1

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator: reproducible by `torch.manual_seed`, traceable."""
    return torch.randint(0, 2**62, (1,), device=device)


def placed(seed: Tensor, query: int, key: int, head: int, heads: int) -> Tensor:
    """A seed for a part of a call: int64 (5,), with the numbers of its first query, key and head in
    the whole, and how many heads that has."""
    place = torch.tensor([query, key, head, heads], device=seed.device)
    return torch.cat([seed[:1], place])


def threshold(dropout_p: float) -> int:
    """The integer that a random word must reach for its score to be kept."""
    return round(dropout_p * 2**32)


def _multiply(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32x32-bit product; int64 alone would overflow its sign."""
    low = a * (multiplier & 0xFFFF)
    high = a * (multiplier >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, ...], seed: Tensor, rounds: int = 10) -> tuple[Tensor, ...]:
    """Four random 32-bit words (int64 tensors) for each counter (four int64 tensors)."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(rounds):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def keep_mask(
    seed: Tensor, dropout_p: float, batch: int, heads: int, q_len: int, kv_len: int, stream: int
) -> Tensor:
    """Which scores dropout keeps: bool (batch, heads, q_len, kv_len)."""
    device = seed.device
    first_row: Any = 0
    first_column: Any = 0
    first_head: Any = 0
    all_heads: Any = heads
    if seed.numel() > 1:
        first_row, first_column, first_head, all_heads = seed[1:].unbind()
    # Three more, for a first column in the middle of a group.
    groups = torch.arange((kv_len + 6) // 4, device=device) + first_column // 4
    rows = (torch.arange(q_len, device=device) + first_row)[:, None]
    entries = torch.arange(batch, device=device)[:, None] * all_heads
    slices = (entries + torch.arange(heads, device=device) + first_head).view(-1, 1, 1)
    words = philox((groups, rows, slices, torch.full_like(groups, stream)), seed[:1])
    shape = (batch * heads, q_len, groups.shape[0])
    stacked = torch.stack([w.expand(shape) for w in words], dim=-1).flatten(-2)
    if seed.numel() > 1:
        stacked = stacked[..., torch.arange(kv_len, device=device) + first_column % 4]
    kept = stacked[..., :kv_len] >= threshold(dropout_p)
    return kept.unflatten(0, (batch, heads))
