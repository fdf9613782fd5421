"""Indices of position tables: those of the models that they are named after."""

from typing import Any

import pytest
import torch

import fastfusion as ff


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 40), (9, 20)])
@pytest.mark.parametrize("lengths", [(300, 300), (3, 400), (70, 2), (1, 1), (1, 0)])
def test_buckets_are_those_of_t5(
    lengths: tuple[int, int], num_buckets: int, max_distance: int, bidirectional: bool
) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    options: dict[str, Any] = {"num_buckets": num_buckets, "max_distance": max_distance}
    q_len, kv_len = lengths
    offset = torch.arange(kv_len) - torch.arange(q_len)[:, None]
    for alignment, diagonal in (("top_left", 0), ("bottom_right", kv_len - q_len)):
        found = ff.positions.t5_buckets(
            q_len, kv_len, bidirectional=bidirectional, alignment=alignment, **options
        )
        assert found.shape == (q_len + kv_len - 1,)
        expected = t5.T5Attention._relative_position_bucket(
            offset - diagonal, bidirectional=bidirectional, **options
        )
        assert torch.equal(found[offset + q_len - 1], expected)


@pytest.mark.parametrize("size", [(7, 7), (3, 5), (1, 1)])
def test_windows_are_those_of_swin_and_beit(size: tuple[int, int]) -> None:
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    beit = pytest.importorskip("transformers.models.beit.modeling_beit")
    # An older transformers has Swin's in the attention.
    if hasattr(swin, "SwinRelativePositionBias"):
        expected = swin.SwinRelativePositionBias(2, size).relative_position_index
    else:
        config = swin.SwinConfig()
        expected = swin.SwinSelfAttention(config, 4, 2, size).relative_position_index
    found = ff.positions.swin_window(size)
    assert torch.equal(found, expected.view(found.shape))
    whole = beit.BeitConfig(image_size=tuple(4 * n for n in size), patch_size=4)
    bias = beit.BeitRelativePositionBias(whole)
    expected = bias.generate_relative_position_index(size)
    assert torch.equal(ff.positions.beit_window(size), expected)
    assert int(expected.max()) == bias.relative_position_bias_table.shape[0] - 1


def test_windows_of_three_dimensions() -> None:
    """Two tokens have one entry if they are as far apart along each axis."""
    size = (2, 3, 4)
    index = ff.positions.swin_window(size)
    places = torch.cartesian_prod(*(torch.arange(n) for n in size))
    offsets = (places[:, None] - places).flatten(0, 1)
    entries = {}
    for offset, entry in zip(offsets.tolist(), index.flatten().tolist(), strict=True):
        assert entries.setdefault(tuple(offset), entry) == entry
    assert sorted(entries.values()) == list(range(3 * 5 * 7))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ff.positions.t5_buckets(4, 4, num_buckets=2), "num_buckets must be at least 4"),
        (lambda: ff.positions.t5_buckets(4, 4, max_distance=8), "max_distance above half"),
        (lambda: ff.positions.t5_buckets(4, 4, alignment="left"), "alignment must be one of"),
        (lambda: ff.positions.swin_window((7, 0)), r"window_size must be positive, got \(7, 0\)"),
        (lambda: ff.positions.beit_window(()), r"window_size must be positive, got \(\)"),
    ],
)
def test_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
