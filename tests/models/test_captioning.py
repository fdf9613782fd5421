"""CaptioningTransformer, its search for words, and the application that ships."""

import itertools
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastfusion.__main__ import main
from fastfusion.applications.captioning import CHECKPOINT, Settings, data
from fastfusion.applications.captioning.model import Checkpoint
from fastfusion.applications.captioning.train import exact_matches
from fastfusion.applications.stock import stock_twin
from fastfusion.models import CaptioningTransformer
from fastfusion.models.captioning import END, START

SIZES = {
    "width": 16, "num_heads": 2, "dim_feedforward": 24, "num_encoder_layers": 1,
    "num_decoder_layers": 2, "words": 7, "max_length": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> CaptioningTransformer:
    torch.manual_seed(0)
    model = CaptioningTransformer(**SIZES).eval()
    with torch.no_grad():
        model.output.weight.mul_(1.5)  # words that differ in probability
        model.output.bias[END] -= 1.0  # texts of several words
    return model


@pytest.fixture(scope="module")
def visual() -> Tensor:
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


TEXT = torch.tensor([[2, 4, 5, 6, 4], [2, 6, 6, 3, 0], [2, 5, 3, 0, 0]])
HIDDEN = torch.tensor([[False] * 5, [False, True, False, True, True], [False] * 4 + [True]])


def test_a_word_depends_on_the_image_and_on_those_before_it(
    model: CaptioningTransformer, visual: Tensor
) -> None:
    logits = model(visual, TEXT)
    assert logits.shape == (3, 5, 7)
    later = TEXT.clone()
    later[:, 3:] = 5
    torch.testing.assert_close(model(visual, later)[:, :3], logits[:, :3])
    assert not torch.allclose(model(visual, later)[:, 3:], logits[:, 3:])
    assert not torch.allclose(model(-visual, TEXT)[:, 0], logits[:, 0])


def test_hidden_tokens_do_not_count(model: CaptioningTransformer, visual: Tensor) -> None:
    expected = model(visual, TEXT, HIDDEN)
    other = visual.masked_fill(HIDDEN.unsqueeze(-1), 100.0)
    torch.testing.assert_close(model(other, TEXT, HIDDEN), expected)
    assert not torch.allclose(model(visual, TEXT), expected)
    everything = torch.ones_like(HIDDEN)
    blind = model(visual, TEXT, everything)
    assert blind.isfinite().all()
    torch.testing.assert_close(model(visual * 3, TEXT, everything), blind)


def test_stock_twin(model: CaptioningTransformer, visual: Tensor) -> None:
    twin = stock_twin(model)
    kinds = {type(m).__module__.partition(".")[0] for m in twin.decoder.modules()}
    assert kinds == {"torch"}
    torch.testing.assert_close(twin(visual, TEXT, HIDDEN), model(visual, TEXT, HIDDEN))
    assert torch.equal(
        twin.generate(visual, HIDDEN, use_cache=False), model.generate(visual, HIDDEN)
    )
    assert list(twin.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("hidden", [None, HIDDEN], ids=["all", "some hidden"])
def test_greedy_takes_the_most_probable_word(
    hidden: Tensor | None, model: CaptioningTransformer, visual: Tensor
) -> None:
    written = model.generate(visual, hidden)
    for row, image in enumerate(visual):
        mask = None if hidden is None else hidden[row : row + 1]
        text = [START]
        while text[-1] != END and len(text) < 9:
            scores = model(image[None], torch.tensor([text]), mask)[0, -1]
            scores[0] = -torch.inf
            text.append(int(scores.argmax()))
        assert written[row, : len(text)].tolist() == text
        assert not written[row, len(text) :].any()


@pytest.mark.parametrize("num_beams", [1, 3, 20])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_cache_changes_nothing(
    num_beams: int, length_penalty: float, model: CaptioningTransformer, visual: Tensor
) -> None:
    options = {"num_beams": num_beams, "length_penalty": length_penalty}
    kept = model.generate(visual, HIDDEN, **options)
    assert torch.equal(kept, model.generate(visual, HIDDEN, use_cache=False, **options))
    for row in range(3):
        alone = model.generate(visual[row : row + 1], HIDDEN[row : row + 1], **options)
        assert torch.equal(kept[row : row + 1, : alone.shape[1]], alone)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_wide_beam_search_is_exhaustive(
    length_penalty: float, model: CaptioningTransformer, visual: Tensor
) -> None:
    best: tuple[float, list[int]] = (-torch.inf, [])
    for words in itertools.product(range(1, 7), repeat=3):
        end = words.index(END) + 1 if END in words else 3
        if any(word != 1 for word in words[end:]):
            continue  # one of several names for the same text
        text = [START, *words[:end]]
        rows = functional.log_softmax(model(visual[:1], torch.tensor([text]))[0], dim=-1)
        score = sum(rows[i, word].item() for i, word in enumerate(text[1:]))
        best = max(best, (score / end**length_penalty, text))
    found = model.generate(visual[:1], max_length=3, num_beams=300, length_penalty=length_penalty)
    assert found[0].tolist() == best[1]


def test_beams_find_a_text_at_least_as_probable(
    model: CaptioningTransformer, visual: Tensor
) -> None:
    def score(text: Tensor) -> Tensor:
        rows = functional.log_softmax(model(visual, text[:, :-1]), dim=-1)
        chosen = rows.gather(2, text[:, 1:].unsqueeze(2)).squeeze(2)
        return chosen.masked_fill(text[:, 1:] == 0, 0.0).sum(dim=1)

    greedy = score(model.generate(visual))
    wide = score(model.generate(visual, num_beams=400, length_penalty=0.0))
    assert (wide >= greedy - 1e-5).all() and (wide > greedy + 1e-3).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"width": 15}, ValueError, "width must be a multiple of num_heads=2, got 15"),
        ({"words": 0}, ValueError, "words must be at least 1"),
        ({"max_length": 2.5}, TypeError, "max_length must be an int"),
        ({"dropout": -1}, ValueError, "dropout must be between 0 and 1"),
        ({"activation": "tanh"}, ValueError, "activation must be"),
    ],
)
def test_bad_sizes(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CaptioningTransformer(**SIZES | change)


def test_bad_inputs(model: CaptioningTransformer, visual: Tensor) -> None:
    with pytest.raises(TypeError, match="text must be int64"):
        model(visual, TEXT.float())
    with pytest.raises(ValueError, match="text must have shape"):
        model(visual, TEXT[:2])
    with pytest.raises(ValueError, match="at most 9 words, got 10"):
        model(visual, TEXT.repeat(1, 2))
    with pytest.raises(ValueError, match="visual must have shape"):
        model(visual[..., :8], TEXT)
    with pytest.raises(ValueError, match="max_length must be from 1 to 8, got 9"):
        model.generate(visual, max_length=9)
    with pytest.raises(ValueError, match="num_beams must be at least 1"):
        model.generate(visual, num_beams=0)


def test_compile_and_export(model: CaptioningTransformer, visual: Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(visual, TEXT), model(visual, TEXT))
    exported = torch.export.export(model, (visual, TEXT)).module()
    torch.testing.assert_close(exported(visual, TEXT), model(visual, TEXT))


# ---- the application


@pytest.fixture(scope="module")
def pictures() -> data.Pictures:
    return data.load("test", 60)


def test_captions_say_what_there_is() -> None:
    red, blue = ("red", "circle"), ("blue", "triangle")
    assert data.caption([red, blue, blue, blue]) == (
        "a red circle beside a blue triangle above two blue triangles"
    )
    words = data.vocabulary()
    texts = [data.caption(list(things)) for things in itertools.product((red, blue), repeat=4)]
    tokens = data.encode(words, texts)
    assert tokens.shape == (16, data.LONGEST) and not (tokens == 1).any()
    assert (tokens[:, 0] == START).all() and ((tokens == END).sum(dim=1) == 1).all()
    assert data.decode(words, tokens) == texts
    assert len(set(texts)) == 16, "a caption leaves no doubt"


def test_ground_truth_is_what_is_drawn(pictures: data.Pictures) -> None:
    rgb = {"red": 0, "green": 1, "blue": 2}
    seen = set()
    for image, (colour, shape) in zip(pictures.images, pictures.things, strict=True):
        assert shape in data.SHAPES
        if colour in rgb:
            inside = data.easy_vqa.drawn(image[None])[0]
            mean = image[:, inside].float().mean(dim=1)
            assert int(mean.argmax()) == rgb[colour]
            seen.add(colour)
    assert seen == set(rgb)


def test_squares_hold_the_pictures_in_order() -> None:
    images = torch.arange(1.0, 5.0).view(1, 4, 1, 1, 1).expand(2, 4, 3, 64, 64)
    square = data.square(images)
    assert square.shape == (2, 3, 64, 64)
    for number, (top, left) in enumerate(((0, 0), (0, 32), (32, 0), (32, 32))):
        assert (square[:, :, top : top + 32, left : left + 32] == number + 1).all()


def test_twins(pictures: data.Pictures) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(len(pictures.things), (200, 4), generator=generator)

    def alike(numbers: Tensor) -> float:
        texts = [data.caption([pictures.things[i] for i in row]) for row in numbers.tolist()]
        return sum("two" in text for text in texts) / len(texts)

    before = alike(numbers)
    after = alike(data.with_twins(pictures, numbers, 0.5, generator))
    assert before < 0.15 and 0.4 < after < 0.65


def test_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.safetensors"
    tiny = ["train", "captioning", "--limit", "16", "--epochs", "1", "--batch-size", "8"]
    assert main([*tiny, "--output", str(path)]) == 0
    assert "right, word for word" in capsys.readouterr().out
    assert Checkpoint.load(path).model is not None
    assert main([*tiny, "--baseline-only", "--output", str(path)]) == 0
    assert Checkpoint.load(path).model is None
    picture = str(tmp_path / "x.png")
    assert main(["demo", "captioning", "--checkpoint", str(path), "--output", picture]) == 1
    assert "only the baseline" in capsys.readouterr().err


def test_shipped_checkpoint(pictures: data.Pictures) -> None:
    shipped = Checkpoint.load()
    assert CHECKPOINT.stat().st_size <= 3_000_000
    assert shipped.training["exact"] >= 0.99 and shipped.training["blind_exact"] < 0.01
    settings = dict(shipped.training["settings"])
    assert settings.pop("limit") is None and settings.pop("baseline_only") is False
    assert replace(Settings(), **settings) == Settings()
    assert shipped.model is not None
    for options in ({}, {"num_beams": 3}):
        assert exact_matches(shipped.model, pictures, shipped.vocabulary, 40, **options) >= 0.95
    images, _, texts = data.pairs(pictures, data.test_squares(pictures, 8), shipped.vocabulary)
    twin = stock_twin(shipped.model)
    assert data.decode(shipped.vocabulary, twin.generate(images, use_cache=False)) == texts


def test_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    show = import_module("fastfusion.applications.captioning.show")
    monkeypatch.setattr(show, "TEST_SQUARES", 100)
    monkeypatch.setattr(show, "SOME_SQUARES", 20)
    picture = tmp_path / "captions.png"
    assert main(["demo", "captioning", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    right = re.search(r"word for word: ([\d.]+)% of 100; of the first 20 ([\d.]+)%", printed)
    assert right is not None and float(right[1]) >= 98 and float(right[2]) >= 95
    blind = re.search(r"without the image: ([\d.]+)%", printed)
    assert blind is not None and float(blind[1]) < 5
    assert re.search(r"with the cache [\d.]+ times as many", printed) and str(picture) in printed

    from PIL import Image

    with Image.open(picture) as image:
        assert min(image.size) > 500
