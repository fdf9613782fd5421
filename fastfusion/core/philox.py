"""The random bits of dropout: Philox4x32-10, counter-based, the same on every backend.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The bit of score (i, j) of
head h in batch entry b is a function of (seed, b, h, i, j) alone: key = seed, counter =
(j // 4, i, b * heads + h, stream), word j % 4; the score is kept iff word >= round(p * 2**32).
i and j count inside the own sequence. Stream 0 is the softmax over keys, 1 the one over queries.
"""

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
    groups = torch.arange((kv_len + 3) // 4, device=device)
    rows = torch.arange(q_len, device=device)[:, None]
    slices = torch.arange(batch * heads, device=device)[:, None, None]
    words = philox((groups, rows, slices, torch.full_like(groups, stream)), seed)
    shape = (batch * heads, q_len, groups.shape[0])
    stacked = torch.stack([w.expand(shape) for w in words], dim=-1)
    kept = stacked.flatten(-2)[..., :kv_len] >= threshold(dropout_p)
    return kept.unflatten(0, (batch, heads))
