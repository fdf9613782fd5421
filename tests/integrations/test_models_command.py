"""``python -m fastfusion models``: what it measures and writes, on small models."""

from pathlib import Path
from typing import Any

import pytest
from checkout import need_library

from fastfusion.__main__ import main
from fastfusion.benchmarks.common import hub
from fastfusion.benchmarks.cpu import accelerated

need_library("transformers")


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    return accelerated.measure("BridgeTower", True, 1)


def test_a_row(row: dict[str, Any]) -> None:
    assert row["swapped"] > 10 and row["linear"] > 50 and row["parameters"] > 100_000
    assert set(row["speed"]) == set(row["deviation"]) == {"float32", "bf16", "int8"}
    assert all(value > 0 for value in (*row["speed"].values(), *row["ms"].values()))
    assert 0 < row["deviation"]["float32"] < 1e-4 * row["largest"]
    assert row["deviation"]["float32"] < row["deviation"]["bf16"] < row["largest"]
    assert all(0.0 <= megabytes < 50.0 for megabytes in row["peak"].values())
    assert any(kept.startswith("transformers.BridgeTowerCrossAttention") for kept in row["kept"])


def test_the_page(row: dict[str, Any]) -> None:
    """What failed comes first, then the smallest gain; nothing that is not swapped is left out."""
    rows: list[dict[str, Any]] = []
    for name, speed in (("quick", 2.0), ("slow", 0.5)):
        made = {**row, "name": name, "speed": dict.fromkeys(row["speed"], speed), "compiled": 4.0}
        rows.append(made)
    rows.append({"name": "broken", "error": "took longer than 1 s"})
    page = accelerated.document(rows, {"cpu": "some", "threads": 1})
    lines = page.splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table[1:]] == ["| broken", "| slow", "| quick"]
    assert len({line.count("|") for line in table}) == 1
    assert "float32 1.00x" in page and "torch.compile (2) 4.00x" in page
    assert "- broken, all of it: took longer than 1 s" in lines
    assert all(f"- slow: {kept}" in lines for kept in row["kept"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "docs" / "models.md"
    options = ["--tiny", "--rounds", "1", "--timeout", "300", "--output", str(output)]
    assert main(["models", "VisualBERT", *options]) == 0
    assert "| VisualBERT | " in output.read_text() and "VisualBERT" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["models", "nobody's", *options])


def test_models_are_the_same_each_time() -> None:
    (one, inputs), (other, again) = (hub.build("ViLT", tiny=True) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert all(inputs[name].equal(again[name]) for name in inputs)
