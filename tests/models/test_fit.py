"""A model that fits a latency: the search, its table, and the configuration that it writes."""

import json
import re
from pathlib import Path

import pytest
import torch

import fastfusion as ff
from fastfusion import fitting
from fastfusion.__main__ import FITTED, main
from fastfusion.fitting import Candidate, Fit, Shape
from fastfusion.models import BUILDERS

SHAPE = Shape(visual_len=4, text_len=3, classes=8)
TINY = {"widths": (32, 64), "layers": (1, 2), "rounds": 2}


def test_every_model_can_be_fitted() -> None:
    assert tuple(BUILDERS) == FITTED
    for kind in BUILDERS:
        for precision in fitting.PRECISIONS:
            candidate = Candidate(32, 1, 64, 2, precision)
            model, call = fitting.build(kind, candidate, SHAPE)
            assert type(model) is BUILDERS[kind].model
            assert torch.equal(call(), call())


@pytest.mark.parametrize("kind", FITTED)
def test_the_front_grows_with_time(kind: str) -> None:
    fits = fitting.search(kind, SHAPE, 1000.0, **TINY)
    sizes = [fit.parameters for fit in fits]
    assert sizes == sorted(set(sizes)) and len(fits) >= 2
    assert [f.predicted_ms for f in fits] == sorted(f.predicted_ms for f in fits)
    largest = fits[-1]
    assert largest.candidate.width == 64 and largest.candidate.num_layers == 2
    assert largest.flops > fits[0].flops > 0
    model, _ = fitting.build(kind, largest.candidate, SHAPE)
    if largest.candidate.precision == "float32":
        assert sum(p.numel() for p in model.parameters()) == largest.parameters


def test_the_best_is_the_largest_within_the_budget() -> None:
    def fit(parameters: int, measured: float) -> Fit:
        return Fit(Candidate(32, 1, 64, 1, "int8"), parameters, 1, 1.0, measured)

    fits = [fit(10, 1.0), fit(30, 2.5), fit(20, 2.0), fit(40, 3.1)]
    assert fitting.best(fits, 3.0) is fits[1]
    assert fitting.best(fits, 0.5) is None
    assert fits[1].error == pytest.approx(0.6)


def test_command_writes_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fitting, "WIDTHS", (32, 64))
    path = tmp_path / "fit.json"
    short = ["--visual-len", "4", "--text-len", "3", "--classes", "8", "--precision", "int8"]
    assert main(["fit", "--budget-ms", "1000", *short, "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^> +int8 .* ms .*%$", printed, re.MULTILINE), printed
    content = json.loads(path.read_text())
    assert content["precision"] == "int8" and content["arguments"]["num_classes"] == 8
    for given in (path, str(path), content):
        model = ff.models.from_config(given)
        assert isinstance(model, ff.models.VQATransformer)
        assert model.output.out_features == 8


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no model fits: the smallest takes"):
        fitting.search("vqa", SHAPE, 1e-6, **TINY)
    with pytest.raises(ValueError, match="budget_ms must be a positive number, got nan"):
        fitting.search("vqa", SHAPE, float("nan"))
    with pytest.raises(ValueError, match="model must be one of vqa"):
        fitting.search("gpt", SHAPE, 1.0)
    with pytest.raises(ValueError, match="precisions are float32, bf16, int8, got"):
        fitting.search("vqa", SHAPE, 1.0, precisions=["fp4"])
    with pytest.raises(ValueError, match="a configuration has"):
        ff.models.from_config({"model": "vqa"})
    with pytest.raises(ValueError, match="model must be one of vqa"):
        ff.models.from_config({"model": "gpt", "arguments": {}})
    assert main(["fit", "--budget-ms", "-1", "--output", str(tmp_path / "x")]) == 1
    assert "budget_ms" in capsys.readouterr().err
