"""Masks that compose, against the same masks written out."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastfusion as ff
from fastfusion import mask

B, H, LQ, LK, D = 2, 3, 5, 8, 4


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, LQ, D), *(torch.randn(B, H, LK, D) for _ in range(2))]


HIDDEN = torch.arange(LK).expand(B, LK) >= torch.tensor([[6], [3]])
SEEN = torch.rand(H, LQ, LK, generator=torch.Generator().manual_seed(1)) < 0.7
ADDED = torch.randn(LQ, LK, generator=torch.Generator().manual_seed(2))
ROWS, COLUMNS = torch.arange(LQ)[:, None], torch.arange(LK)
CAUSAL = COLUMNS <= ROWS
LATE = COLUMNS <= ROWS + LK - LQ
NEAR = (ROWS - COLUMNS <= 2) & (COLUMNS - ROWS <= 1)
Q_PARTS, K_PARTS = torch.tensor([[0, 0, 1, 1, 2]] * B), torch.tensor([[0, 0, 0, 1, 1, 1, 2, 3]] * B)
SAME = (Q_PARTS[:, None, :, None] == K_PARTS[:, None, None]).expand(B, 1, LQ, LK)

# A mask, which of it is a bool mask written out, and the arguments it becomes besides.
CASES: dict[str, tuple[Any, Tensor, set[str]]] = {
    "causal": (mask.causal(), CAUSAL, {"is_causal"}),
    "late": (mask.causal("bottom_right"), LATE, {"is_causal", "causal_alignment"}),
    "window": (mask.window(2, 1), NEAR, {"window"}),
    "late window": (
        mask.window(2, 1, "bottom_right"),
        (ROWS + LK - LQ - COLUMNS <= 2) & (COLUMNS - ROWS - LK + LQ <= 1),
        {"window", "causal_alignment"},
    ),
    "both": (mask.causal() & mask.window(2, 1), CAUSAL & NEAR, {"is_causal", "window"}),
    "padding": (mask.padding(HIDDEN), ~HIDDEN[:, None, None], {"key_padding_mask"}),
    "paddings": (
        mask.padding(HIDDEN) & mask.padding(HIDDEN.flip(0)),
        ~(HIDDEN | HIDDEN.flip(0))[:, None, None],
        {"key_padding_mask"},
    ),
    "boolean": (mask.boolean(SEEN), SEEN, {"attn_mask"}),
    "all": (
        mask.causal() & mask.padding(HIDDEN) & mask.boolean(SEEN),
        CAUSAL & ~HIDDEN[:, None, None] & SEEN,
        {"is_causal", "key_padding_mask", "attn_mask"},
    ),
    "two places": (
        mask.causal() & mask.causal("bottom_right"), CAUSAL & LATE, {"is_causal", "attn_mask"}
    ),
    "not": (~mask.causal(), ~CAUSAL, {"attn_mask"}),
    "prefix": (mask.causal() | mask.prefix(3), CAUSAL | (COLUMNS < 3), {"prefix_len"}),
    "prefix alone": (mask.prefix(3), COLUMNS < 3, {"attn_mask"}),
    "prefix and window": (
        mask.window(2, None) & (mask.prefix(3) | mask.causal()),
        (CAUSAL | (COLUMNS < 3)) & (ROWS - COLUMNS <= 2),
        {"prefix_len", "window"},
    ),
    "late prefix": (
        mask.causal("bottom_right") | mask.prefix(7),
        LATE | (COLUMNS < 7),
        {"prefix_len", "causal_alignment"},
    ),
    "prefix and more": (  # another right side counts for keys of the prefix, too
        (mask.causal() | mask.prefix(4)) & mask.window(None, 1),
        (CAUSAL | (COLUMNS < 4)) & (COLUMNS - ROWS <= 1),
        {"prefix_len", "attn_mask"},
    ),
    "prefixes": (
        (mask.causal() | mask.prefix(torch.tensor([1, 4]))) & mask.padding(HIDDEN),
        (CAUSAL | (torch.tensor([1, 4])[:, None, None, None] > COLUMNS)) & ~HIDDEN[:, None, None],
        {"prefix_len", "key_padding_mask"},
    ),
    "segments": (mask.segments(Q_PARTS, K_PARTS), SAME, {"segment_ids_q", "segment_ids_k"}),
    "segments twice": (
        mask.segments(Q_PARTS, K_PARTS) & mask.segments(Q_PARTS // 2, K_PARTS),
        SAME & ((Q_PARTS // 2)[:, None, :, None] == K_PARTS[:, None, None]),
        {"segment_ids_q", "segment_ids_k", "attn_mask"},
    ),
    "mod": (
        mask.from_mask_mod(lambda b, h, q, k: (q + k + b) % 2 == 0, batch=B) & mask.causal(),
        ((ROWS + COLUMNS + torch.arange(B)[:, None, None, None]) % 2 == 0) & CAUSAL,
        {"attn_mask", "is_causal"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_arguments_mean_what_the_mask_means(name: str) -> None:
    made, seen, expected = CASES[name]
    q, k, v = tensors()
    arguments = made.arguments(q, k)
    assert set(arguments) == expected
    found = ff.scaled_dot_product_attention(q, k, v, **arguments)
    torch.testing.assert_close(found, ff.scaled_dot_product_attention(q, k, v, seen))
    written = made.visible(LQ, LK)
    assert torch.equal(written.expand(B, H, LQ, LK), seen.expand(B, H, LQ, LK))


def test_a_bias_is_added_beside_other_masks() -> None:
    q, k, v = tensors()
    made = mask.bias(ADDED) & mask.boolean(SEEN) & mask.causal()
    arguments = made.arguments(q, k)
    assert set(arguments) == {"attn_mask", "is_causal"}
    found = ff.scaled_dot_product_attention(q, k, v, **arguments)
    bias = ADDED.masked_fill(~(SEEN & CAUSAL), -torch.inf)
    torch.testing.assert_close(found, ff.scaled_dot_product_attention(q, k, v, bias))
    with pytest.raises(ValueError, match="a call has one bias"):
        (made & mask.bias(ADDED)).arguments(q, k)
    with pytest.raises(ValueError, match="combines with `&` alone"):
        (mask.bias(ADDED) | mask.causal()).arguments(q, k)


def test_a_block_mask_of_torch() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    block = create_block_mask(rule, None, None, 128, 128, device="cpu")
    made = mask.from_mask_mod(block)
    assert torch.equal(made.visible(LQ, LK)[0, 0], CAUSAL)


def test_explain_says_what_becomes_of_each_part() -> None:
    said = (mask.causal() & mask.padding(HIDDEN) & (mask.window(1, 1) | mask.prefix(2))).explain()
    lines = said.splitlines()
    assert lines[0] == "causal('top_left'): is_causal"
    assert lines[1] == "padding(bool[2, 8]): key_padding_mask, whose keys are left out"
    assert lines[2].endswith("| prefix(2)): a part of attn_mask, written out")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mask.causal("left"), ValueError, "alignment must be one of"),
        (lambda: mask.window(-1, 0), ValueError, "left must be at least 0, got -1"),
        (lambda: mask.window(1, 1.5), TypeError, "right must be an int or None, got float"),
        (lambda: mask.padding(torch.zeros(2, 3)), TypeError, "padding takes a bool tensor"),
        (lambda: mask.padding(torch.zeros(3).bool()), ValueError, "padding must be"),
        (lambda: mask.boolean(torch.zeros(3)), TypeError, "boolean takes a bool tensor"),
        (lambda: mask.bias(torch.zeros(3).bool()), TypeError, "bias takes a float tensor"),
        (lambda: mask.segments(torch.zeros(2, 3)), ValueError, "of_queries must be int"),
        (lambda: mask.causal() & torch.ones(3), TypeError, "masks combine with masks"),
        (lambda: mask.segments(Q_PARTS).visible(4, 4), ValueError, "of 4 queries and 4 keys"),
        (lambda: mask.padding(HIDDEN).visible(4, 4), ValueError, "there are 4 keys"),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
