"""Pairs of sequences of any length, side by side without padding: captions that attend to audio."""

import torch

import fastfusion as ff

torch.manual_seed(0)
words, frames = [5, 20, 1, 12], [40, 300, 7, 88]  # of four pairs
heads, width = 8, 64


def ends(lengths: list[int]) -> torch.Tensor:
    """Where each sequence ends, a 0 in front: int32 (pairs + 1,)."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


query = torch.randn(sum(words), heads, width)  # (all tokens, heads, head_dim)
key, value = torch.randn(2, sum(frames), heads, width)
out = ff.varlen_attention(
    query, key, value, ends(words), ends(frames), max_seqlen_q=max(words), max_seqlen_k=max(frames)
)

# The third pair by itself: the same bits.
q, k = sum(words[:2]), sum(frames[:2])
alone = ff.scaled_dot_product_attention(
    query[q : q + 1].transpose(0, 1), *(t[k : k + 7].transpose(0, 1) for t in (key, value))
)
print("packed tokens", tuple(out.shape))
print("padded they would be", len(words) * max(words), "and", len(frames) * max(frames))
print("the third pair alone, largest difference", f"{(out[q] - alone[:, 0]).abs().max():.1e}")
