"""Spoken opinions, made up: words, the sound of the voice and the speaker's face.

Everything here is synthetic, drawn from a seed: no recording, no person, no data set. A speaker has
an opinion on one of two things and says something about both, so that each modality holds a part of
the evidence, and some of it only together with another:

- the **words** are two clauses, often of opposite meaning and some negated; nothing in them says
  which of the two matters;
- the **voice** is louder and higher at the adjective that matters; its tone follows the opinion a
  little; sarcasm is slow and flat, and turns the words around; what is said it does not tell;
- the **face** shows the opinion for a while around that adjective, but some people keep a straight
  face, and some smile whatever they say.

The lengths are not aligned: a word takes several frames of the voice, more if it is long, and the
video has frames of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CLASSES = ("negative", "neutral", "positive")
MODALITIES = ("text", "audio", "video")
BANDS = 12  # of the spectrum, besides pitch, loudness and whether there is a voice
AUDIO = BANDS + 3  # numbers of a frame
FACE = 16  # pixels

THINGS = (
    "food", "service", "room", "view", "price", "music", "plot", "acting", "sound", "screen",
    "battery", "camera", "staff", "pool", "breakfast", "ending",
)  # fmt: skip
GOOD = ("great", "good", "lovely", "superb", "fine", "excellent", "charming", "nice")
BAD = ("bad", "awful", "poor", "terrible", "dull", "horrible", "weak", "nasty")
PLAIN = ("okay", "average", "usual", "normal", "ordinary", "standard")
JOINTS = ("and", "but", "while", "though")
VOCABULARY = (
    "<padding>", "<unknown>", "the", "was", "not", "really", *JOINTS, *THINGS, *GOOD, *BAD, *PLAIN
)  # fmt: skip
NUMBER = {word: number for number, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Opinions:
    """Samples; what is beyond the end of a sequence is padding, True in its mask.

    `label` numbers `CLASSES`; `sarcastic`, `straight` (a straight face) and `stressed` (the place
    of the word that matters) say how a sample was made, and no model sees them.
    """

    text: Tensor  # int64 (n, words)
    audio: Tensor  # float32 (n, frames, AUDIO)
    video: Tensor  # float32 (n, frames, FACE, FACE), from 0 to 1
    text_padding: Tensor  # bool (n, words)
    audio_padding: Tensor  # bool (n, frames)
    video_padding: Tensor  # bool (n, frames)
    label: Tensor  # int64 (n,)
    sarcastic: Tensor  # bool (n,)
    straight: Tensor  # bool (n,)
    stressed: Tensor  # int64 (n,)

    def __len__(self) -> int:
        return len(self.label)

    def take(self, numbers: Tensor) -> "Opinions":
        """Some of the samples."""
        return Opinions(**{name: value[numbers] for name, value in vars(self).items()})

    def without(self, *modalities: str) -> "Opinions":
        """The same with modalities missing: all of their tokens are padding.

        Raises:
            ValueError: another name than those of `MODALITIES`.
        """
        for name in modalities:
            if name not in MODALITIES:
                raise ValueError(f"a modality is one of {MODALITIES}, got {name!r}")
        gone = {f"{name}_padding": torch.ones_like(vars(self)[f"{name}_padding"])
                for name in modalities}  # fmt: skip
        return Opinions(**(vars(self) | gone))

    def sentence(self, number: int) -> str:
        """The words of a sample."""
        return " ".join(VOCABULARY[n] for n in self.text[number].tolist() if n)


class _Draw:
    """Random choices out of one generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, share: float) -> bool:
        return bool(torch.rand((), generator=self.generator) < share)

    def of(self, several: Sequence[str]) -> str:
        return several[int(torch.randint(len(several), (), generator=self.generator))]


def _clause(draw: _Draw, valence: int) -> list[str]:
    """A clause whose last word says what it says, or the opposite after "not"."""
    negated = valence != 0 and draw.chance(0.35)
    said = -valence if negated else valence
    words = ["the", draw.of(THINGS), "was"] + ["not"] * negated + ["really"] * draw.chance(0.2)
    return [*words, draw.of((PLAIN, GOOD, BAD)[said])]


def make(count: int, seed: int) -> Opinions:
    """`count` samples, the same for the same seed.

    Raises:
        ValueError: a `count` below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    draw = _Draw(seed)
    sentences: list[list[str]] = []
    stressed, label, sarcastic, straight, smiling = [], [], [], [], []
    for _ in range(count):
        opinion = int(torch.randint(-1, 2, (), generator=draw.generator))
        irony = opinion != 0 and draw.chance(0.2)
        matters = -opinion if irony else opinion
        # The other clause more often says something else than the same.
        other = (matters + 1 + int(draw.chance(0.5)) + 1) % 3 - 1 if draw.chance(0.75) else matters
        first, second = _clause(draw, matters), _clause(draw, other)
        which = draw.chance(0.5)
        if which:
            first, second = second, first
        sentences.append([*first, draw.of(JOINTS), *second])
        stressed.append(len(sentences[-1]) - 1 if which else len(first) - 1)
        label.append(opinion + 1)
        sarcastic.append(irony)
        straight.append(draw.chance(0.3))
        smiling.append(draw.chance(0.15))
    stress, mood = torch.tensor(stressed), torch.tensor(label) - 1
    irony_, still = torch.tensor(sarcastic), torch.tensor(straight)
    text, text_padding = _text(sentences)
    voice = _Voice(sentences, stress, mood, irony_, draw.generator)
    video, video_padding = _video(voice, mood, still, torch.tensor(smiling), draw.generator)
    return Opinions(
        text, voice.frames, video, text_padding, voice.padding, video_padding, mood + 1, irony_,
        still, stress,
    )  # fmt: skip


def _text(sentences: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    numbers = torch.zeros(len(sentences), max(map(len, sentences)), dtype=torch.int64)
    for row, words in zip(numbers, sentences, strict=True):
        row[: len(words)] = torch.tensor([NUMBER[word] for word in words])
    return numbers, numbers == 0


class _Voice:
    """Pitch, loudness and a coarse spectrum over time, per frame of about 80 ms."""

    def __init__(
        self,
        sentences: Sequence[Sequence[str]],
        stress: Tensor,
        mood: Tensor,
        sarcastic: Tensor,
        generator: torch.Generator,
    ) -> None:
        count = len(sentences)
        noise = torch.randn(count, 5, generator=generator)
        tempo = (1 + 0.15 * noise[:, 0] + 0.45 * sarcastic).clamp(0.7, 2.0)
        letters = torch.zeros(count, max(map(len, sentences)))
        for row, words in zip(letters, sentences, strict=True):
            row[: len(words)] = torch.tensor([len(word) for word in words])
        # The end of every word in frames, so that a frame's word is how many have ended before.
        self.ends = (letters * 0.45 * tempo.unsqueeze(1)).cumsum(dim=1)
        self.length = self.ends[:, -1].ceil().long()
        time = torch.arange(int(self.length.max())) + 0.5
        self.padding = time > self.length.unsqueeze(1)
        word = (time.view(1, -1, 1) > self.ends.unsqueeze(1)).sum(dim=2)
        self.middle = (self.ends - letters * 0.225 * tempo.unsqueeze(1)).gather(
            1, stress.unsqueeze(1)
        )
        near = torch.exp(-(((time - self.middle) / 2.5) ** 2))
        share = time / self.length.unsqueeze(1)

        lively = torch.where(sarcastic, 0.35, 1.0).unsqueeze(1)
        tone = (0.12 * mood + 0.25 * noise[:, 1]).unsqueeze(1)
        wave = 0.1 * torch.sin(2 * math.pi * (2.5 * share + noise[:, 2:3]))
        pitch = 0.5 * noise[:, 3:4] + tone + lively * (wave + 0.45 * near) - 0.3 * share
        loud = 0.3 * noise[:, 4:5] + lively * 0.5 * near - 0.2 * share
        # A word has a spectrum of its own with every speaker, else the voice alone would tell the
        # words (and be right in more than 71 of 100 samples); the end of a word is quiet.
        spectra = torch.randn(count, len(VOCABULARY), BANDS, generator=generator)
        numbers = _text(sentences)[0]
        spoken = numbers.gather(1, word.clamp(max=numbers.shape[1] - 1))
        pause = (self.ends.gather(1, word.clamp(max=numbers.shape[1] - 1)) - time) < 0.6
        voiced = (~pause).float()
        bands = 0.5 * spectra[torch.arange(count).unsqueeze(1), spoken] + loud.unsqueeze(2)
        slope = torch.linspace(0.3, -0.3, BANDS) * (1 + pitch.unsqueeze(2))
        frames = torch.cat([torch.stack([pitch, loud, voiced], dim=2), bands + slope], dim=2)
        frames = frames * (0.4 + 0.6 * voiced.unsqueeze(2))
        frames = frames + 0.15 * torch.randn(frames.shape, generator=generator)
        self.frames = frames.masked_fill(self.padding.unsqueeze(2), 0.0)

    @cached_property
    def peak(self) -> Tensor:
        """When the stressed word is spoken, as a share of the whole, (n, 1)."""
        return self.middle / self.length.unsqueeze(1)


def _video(
    voice: _Voice, mood: Tensor, still: Tensor, smiling: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A drawn face per frame of about 400 ms: mouth, brows and eyes, at a place that wanders."""
    length = (voice.length / 5 + 2).round().long()
    time = torch.arange(int(length.max())) + 0.5
    padding = time > length.unsqueeze(1)
    share = time / length.unsqueeze(1)
    shown = torch.exp(-(((share - voice.peak) / 0.18) ** 2))
    count, frames = shown.shape
    strength = torch.where(still, 0.0, 1.0).unsqueeze(1) * mood.unsqueeze(1) * shown
    strength = strength + 0.6 * smiling.unsqueeze(1) * torch.exp(
        -(((share - torch.rand(count, 1, generator=generator)) / 0.2) ** 2)
    )
    strength = strength + 0.15 * torch.randn(count, frames, generator=generator)
    place = 0.1 * torch.randn(count, frames, 2, generator=generator).cumsum(dim=1).clamp(-3, 3)
    blink = (torch.rand(count, frames, generator=generator) < 0.1).float()
    faces = draw_faces(strength, place, blink)
    faces = (faces + 0.08 * torch.randn(faces.shape, generator=generator)).clamp(0, 1)
    return faces.masked_fill(padding[:, :, None, None], 0.0), padding


def draw_faces(strength: Tensor, place: Tensor, blink: Tensor) -> Tensor:
    """Faces (..., FACE, FACE) from 0 to 1: strokes of light on dark.

    Args:
        strength: of the smile, (...); below 0 the corners of the mouth hang and the brows meet.
        place: of the middle, (..., 2), in a face that reaches from -1 to 1.
        blink: 1 where the eyes are shut, (...).
    """
    line = torch.linspace(-1.2, 1.2, FACE)
    x = line - place[..., 0, None, None]
    y = line.unsqueeze(1) - place[..., 1, None, None]
    strength, blink = strength[..., None, None], blink[..., None, None]

    def stroke(distance: Tensor, width: float = 0.11) -> Tensor:
        return torch.exp(-((distance / width) ** 2))

    outline = 0.5 * stroke((x.square() + y.square()).sqrt() - 1.0)
    mouth = stroke(y - 0.5 - strength * (0.25 - 1.6 * x.square())) * (x.abs() < 0.5)
    eyes = stroke(((x.abs() - 0.4).square() + (y + 0.15).square() * (1 + 8 * blink)).sqrt(), 0.16)
    slant = -0.5 * strength.clamp(max=0.3)
    brows = stroke(y + 0.5 + slant * (0.4 - x.abs()), 0.09) * ((x.abs() - 0.4).abs() < 0.25)
    return (outline + mouth + eyes + 0.8 * brows).clamp(0.0, 1.0)
