"""examples/: short, and each prints what its docstring promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT, need

need("examples")
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
PROMISES = {
    "accelerate_a_model": ["layers swapped, 0 left", "restored, the same bits: True"],
    "attention_maps": [r"regions on words \(1, 36, 12\)", r"in all 2000", "looks most at"],
    "drop_in": ["All keys matched", r"largest difference [0-9.]+e-0[67]"],
    "int8_deployment": ["16 of 16 layers", r"worst (0.99|1.00)", "after loading: True"],
    "onnx_export": [r"regions \(1, 50, 96\): largest difference [0-9.]+e-0[67]"],
    "packed_pairs": [r"packed tokens \(38, 8, 64\)", r"alone, largest difference 0.0e\+00"],
    "train_fusion": [r"epoch 1: loss \d\.\d+, test accuracy 0\.\d+"],
}
ARGUMENTS = {"train_fusion": ["40", "1"]}


def test_every_script_is_here() -> None:
    assert [script.stem for script in SCRIPTS] == sorted(PROMISES)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script(script: Path, tmp_path: Path) -> None:
    assert len(script.read_text().splitlines()) <= 80
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, str(script), *ARGUMENTS.get(script.stem, [])],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for promise in PROMISES[script.stem]:
        assert re.search(promise, result.stdout), result.stdout
