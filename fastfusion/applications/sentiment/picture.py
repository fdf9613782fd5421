"""The picture of the demo: faces, voice and words, and when in both the words look and listen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfusion.plotting import new_figure


@dataclass(frozen=True)
class Panel:
    """One sample: `audio` is (frames, numbers), `video` (frames, size, size), and the weights of
    each word are (words, frames)."""

    words: list[str]
    audio: Tensor
    video: Tensor
    on_audio: Tensor
    on_video: Tensor
    stressed: int
    predicted: str
    true: str
    sarcastic: bool


def draw(panels: list[Panel], path: Path) -> None:
    """Write a picture with a block per sample."""
    figure = new_figure(5.2 * len(panels), 7.4)
    figure.suptitle(
        "Cross-modal attention of three modalities (synthetic): how much of their attention the "
        "words give to each moment (mean of the heads)",
        fontsize=12,
    )
    for block, panel in zip(figure.subfigures(1, len(panels), squeeze=False)[0], panels,
                            strict=True):  # fmt: skip
        _draw_block(block, panel)
    figure.savefig(path)


def _draw_block(block: Any, panel: Panel) -> None:
    right = panel.predicted == panel.true
    block.suptitle(
        f"{panel.predicted}, true: {panel.true}{' (sarcastic)' * panel.sarcastic}",
        color="black" if right else "firebrick",
        fontsize=11,
    )
    faces, voice, listening, looking = block.subplots(4, 1, height_ratios=(1.1, 1.4, 2.6, 2.6))
    strip = torch.cat(list(panel.video), dim=1)
    faces.imshow(strip.numpy(), cmap="gray", vmin=0, vmax=1)
    faces.set_title("face", fontsize=9)
    for number, name in enumerate(("pitch", "loudness")):
        voice.plot(panel.audio[:, number].numpy(), label=name)
    voice.set_xlim(-0.5, len(panel.audio) - 0.5)
    voice.legend(fontsize=7, loc="lower left")
    voice.set_title("voice", fontsize=9)
    for axes, weights, name in (
        (listening, panel.on_audio, "words over the voice"),
        (looking, panel.on_video, "words over the face"),
    ):
        axes.imshow(weights.numpy(), aspect="auto", cmap="magma", vmin=0, interpolation="nearest")
        axes.set_yticks(range(len(panel.words)), panel.words, fontsize=8)
        axes.get_yticklabels()[panel.stressed].set_fontweight("bold")
        axes.set_title(name, fontsize=9)
        axes.set_xticks([])
    for axes in (faces, voice):
        axes.set_xticks([])
        axes.set_yticks([])
