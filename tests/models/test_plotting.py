"""Pictures of attention, and the page with sliders, in a real browser where there is one."""

import base64
import importlib
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fastfusion as ff
from fastfusion.applications import TRAINED
from fastfusion.models import VQATransformer

IMAGE = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
WORDS = ["what", "</script>", "is", "it"]


def weights(words: int = 4, tokens: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(words, tokens, generator=generator).softmax(dim=-1)


@pytest.mark.parametrize(
    "image",
    [IMAGE, IMAGE.permute(1, 2, 0), (IMAGE * 255).to(torch.uint8), IMAGE[:1], IMAGE[0]],
    ids=["channels first", "channels last", "uint8", "one channel", "plain"],
)
def test_picture(image: torch.Tensor, tmp_path: Path) -> None:
    figure = ff.plot_attention(image, WORDS, weights())
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:5] == ["image", *(f'"{word}"' for word in WORDS)]
    figure.savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_picture_shows_where_a_word_looks() -> None:
    row = torch.zeros(1, 6)
    row[0, 5] = 1.0
    figure = ff.plot_attention(torch.zeros(20, 30), ["here"], row, grid=(2, 3))
    heat = figure.axes[1].images[1].get_array()
    assert heat.shape == (2, 3) and heat[1, 2] == 1.0 and heat.sum() == 1.0
    assert tuple(figure.axes[1].images[1].get_extent()) == (0, 30, 20, 0)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"weights must have shape \(4 words, tokens\)"):
        ff.plot_attention(IMAGE, WORDS, weights(3))
    with pytest.raises(ValueError, match="grid must have as many cells as there are tokens, 15"):
        ff.plot_attention(IMAGE, WORDS, weights(tokens=15))
    with pytest.raises(ValueError, match="image must be"):
        ff.plot_attention(IMAGE[None], WORDS, weights())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = VQATransformer(16, 16, 2, 32, 1, 5).eval()
    path = tmp_path_factory.mktemp("page") / "attention.html"
    inputs = (torch.randn(1, 9, 16), torch.randn(1, 4, 16))
    assert ff.attention_page(path, model, inputs, IMAGE, WORDS, title="A <b> title") == ["fusion"]
    with pytest.raises(ValueError, match="no layer attends from 5 words"):
        ff.attention_page(path.with_name("y"), model, inputs, IMAGE, [*WORDS, "more"])
    return path


def test_page_holds_the_maps(page: Path) -> None:
    text = page.read_text()
    found = re.search(r"const content = (\{.*\});", text)
    assert found is not None
    content = json.loads(found[1])
    assert content["words"] == WORDS and (content["rows"], content["columns"]) == (3, 3)
    maps = torch.tensor(content["layers"]["fusion"])
    assert maps.shape == (2, 4, 9)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 4), rtol=0, atol=2e-3)
    from PIL import Image

    data = base64.b64decode(content["image"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (48, 32)
    assert text.count("</script>") == 1, "no word ends the script"
    assert "http" not in text, "one file that loads nothing"


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_page_in_a_browser(page: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    result = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path}", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>A &lt;b&gt; title</title>" in result.stdout
    assert re.search(r'<p id="strongest">.*looks most at row \d, column \d', result.stdout)
    assert 'aria-pressed="true">what</button>' in result.stdout


@pytest.mark.parametrize("name", TRAINED)
def test_page_of_each_model_that_ships(name: str, tmp_path: Path) -> None:
    application = importlib.import_module(f"fastfusion.applications.{name}")
    layers = ff.attention_page(tmp_path / "page.html", *application.example())
    assert layers
