"""The drawn cases, the measures, and the application that ships."""

import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fastfusion.__main__ import main
from fastfusion.applications.diagnosis import CHECKPOINT, Settings, data, evaluate
from fastfusion.applications.diagnosis.data import Cases
from fastfusion.applications.diagnosis.model import Checkpoint, Config, Diagnoser
from fastfusion.applications.diagnosis.train import test_cases as shared_cases
from fastfusion.applications.stock import stock_twin


@pytest.fixture(scope="module")
def cases() -> Cases:
    return data.draw(300, torch.Generator().manual_seed(3))


def test_cases_follow_from_the_generator(cases: Cases) -> None:
    again = data.draw(300, torch.Generator().manual_seed(3))
    assert torch.equal(again.images, cases.images) and again.reports == cases.reports
    assert torch.equal(again.tokens, cases.tokens) and torch.equal(again.new, cases.new)
    other = data.draw(300, torch.Generator().manual_seed(4))
    assert other.reports != cases.reports
    assert torch.bincount(cases.diagnosis, minlength=6).min() > 25
    assert not (cases.tokens == 1).any(), "every word has a number"
    assert len(cases[5:9]) == 4 and cases[5:9].reports == cases.reports[5:9]


def test_both_modalities_hold_a_part_of_the_evidence(cases: Cases) -> None:
    kind, slow = cases.diagnosis // 2, cases.diagnosis % 2
    there = cases.new.flatten(1).any(dim=1)
    assert torch.equal(there, kind > 0)
    unclear = 0
    for number, report in enumerate(cases.reports):
        said = [any(text in report for text in texts) for texts in (data.SUDDEN, data.SLOW)]
        unclear += not any(said)
        assert not any(said) or said[int(slow[number])] > said[1 - int(slow[number])]
        columns = cases.new[number].any(dim=0).nonzero().flatten()
        for side, name in enumerate(data.SIDES):
            if name in report.split() and there[number]:
                # What is known is in the other lung than the new finding.
                assert (columns >= 32).all() if side == 0 else (columns < 32).all()
    assert 10 < unclear < 60


def test_calibration_error_by_hand() -> None:
    # Four answers at a probability of 0.75 of which two are right, four at 0.95, all right.
    cases = data.draw(8, torch.Generator().manual_seed(0))
    wrong = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    probability = torch.tensor([0.75] * 4 + [0.95] * 4)
    chosen = torch.where(wrong, (cases.diagnosis + 1) % 6, cases.diagnosis)
    rows = ((1 - probability) / 5).unsqueeze(1).repeat(1, 6)
    rows[torch.arange(8), chosen] = probability
    error = evaluate.calibration_error(rows.log(), cases)
    assert error == pytest.approx((4 * 0.25 + 4 * 0.05) / 8, abs=1e-6)
    assert evaluate.accuracy(rows.log(), cases) == 0.75


def test_temperature_undoes_overconfidence() -> None:
    cases = data.draw(2000, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    logits = 1.5 * torch.randn(2000, 6, generator=generator)
    drawn = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).flatten()
    cases = replace(cases, diagnosis=drawn)
    temperature = evaluate.fit_temperature(3 * logits, cases)
    assert 2.6 < temperature < 3.4
    before = evaluate.calibration_error(3 * logits, cases)
    assert evaluate.calibration_error(3 * logits / temperature, cases) < 0.2 * before


def test_finding_tokens() -> None:
    new = torch.zeros(1, 64, 64, dtype=torch.bool)
    new[0, 8:16, 16:24] = True  # a token, and a little of another one
    new[0, 16, 16:23] = True
    assert evaluate.finding_tokens(new).nonzero().tolist() == [[0, 8 + 2]]


def test_temperature_counts_in_evaluation_only() -> None:
    torch.manual_seed(0)
    model = Diagnoser(Config(words=len(data.vocabulary()), width=16, dim_feedforward=16, dropout=0))
    cases = data.draw(2, torch.Generator().manual_seed(0))
    plain = model(cases.images, cases.tokens)
    model.eval().temperature.fill_(2.0)
    torch.testing.assert_close(model(cases.images, cases.tokens), plain / 2)


def test_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.safetensors"
    tiny = ["train", "diagnosis", "--limit", "32", "--epochs", "1", "--batch-size", "16"]
    assert main([*tiny, "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "report only" in printed and "calibration error" in printed
    assert Checkpoint.load(path).model is not None
    assert main([*tiny, "--baseline-only", "--output", str(path)]) == 0
    assert Checkpoint.load(path).model is None
    picture = str(tmp_path / "x.png")
    assert main(["demo", "diagnosis", "--checkpoint", str(path), "--output", picture]) == 1
    assert "only the baselines" in capsys.readouterr().err


def test_shipped_checkpoint() -> None:
    shipped = Checkpoint.load()
    assert CHECKPOINT.stat().st_size <= 3_000_000
    settings = dict(shipped.training["settings"])
    assert settings.pop("limit") is None and settings.pop("baseline_only") is False
    assert replace(Settings(), **settings) == Settings()
    assert shipped.model is not None
    cases = shared_cases(shipped.vocabulary, 600)
    found = {
        name: evaluate.accuracy(evaluate.logits_of(network, cases), cases)
        for name, network in shipped.networks().items()
    }
    assert found["model"] > max(found["image_only"], found["report_only"]) + 0.2
    logits = evaluate.logits_of(shipped.model, cases)
    assert evaluate.calibration_error(logits, cases) < 0.06
    assert evaluate.region_iou(shipped.model, cases) > 0.4
    twin = stock_twin(shipped.model)
    torch.testing.assert_close(evaluate.logits_of(twin, cases), logits, rtol=1e-4, atol=1e-4)


def test_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    show = import_module("fastfusion.applications.diagnosis.show")
    monkeypatch.setattr(show, "test_cases", lambda words: shared_cases(words, 600))
    monkeypatch.setattr(show, "SOME_CASES", 64)
    picture = tmp_path / "diagnosis.png"
    assert main(["demo", "diagnosis", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "Not for clinical use" in printed and str(picture) in printed
    shares = [
        float(re.search(rf"([\d.]+)% from {of}", printed)[1])  # type: ignore[index]
        for of in ("picture and report", "the picture alone", "the report alone")
    ]
    assert shares[0] > max(shares[1:]) + 20
    error = re.search(r"calibration error: ([\d.]+) ", printed)
    assert error is not None and float(error[1]) < 0.06
    assert len(re.findall(r"\(true: ", printed)) == 3

    from PIL import Image

    with Image.open(picture) as image:
        assert min(image.size) > 500
