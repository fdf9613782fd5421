"""python -m fastfusion: what each command prints, and its errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastfusion as ff
from fastfusion.__main__ import _parser, main
from fastfusion.applications.checkpoint import FOLDER


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert capsys.readouterr().out.strip() == str(ff.info()).strip()
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"facts": ff.info().facts, "backends": ff.info().backends}


def test_no_command_shows_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    commands = re.findall(r"^  python -m fastfusion (.+?)  ", printed, re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        if not command.startswith("bench"):
            _parser().parse_args(command.split())  # each is one that the parser takes


@pytest.mark.parametrize(
    "op", ["scaled_dot_product_attention", "bidirectional_attention", "varlen_attention"]
)
@pytest.mark.parametrize("gradient", [False, True])
def test_explain(op: str, gradient: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--op",
        op,
        "--q",
        "20",
        "--k",
        "36",
        "--heads",
        "12",
        "--dim",
        "64",
        "--dtype",
        "bfloat16",
    ]
    assert main(["explain", *arguments, *["--gradient"] * gradient]) == 0
    printed = capsys.readouterr().out
    assert (
        printed.startswith(op)
        and "bfloat16" in printed
        and "chosen" in printed
        and "reference" in printed
    )
    assert ("requires_grad" in printed) == gradient


def test_explain_on_a_missing_device(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device, which is what must be missing here")
    assert main(["explain", "--device", "cuda"]) == 1
    assert capsys.readouterr().err.startswith("python -m fastfusion explain:")


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["explain", "--dtype", "int8"], ["explain", "--q", "0"], ["info", "--fast"]],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: python -m fastfusion")
    assert "explain" in error


@pytest.mark.parametrize("package", ["easy_vqa", "PIL", "matplotlib", "safetensors", "tqdm"])
def test_missing_extra_is_one_clear_line(
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    command = ["train", "--limit", "8"] if package == "tqdm" else ["demo"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert repr(package) in printed.err and 'pip install "fastfusion[demo]"' in printed.err
    assert printed.out == "", "nothing is computed before the packages are known to be there"


def test_a_missing_checkpoint_says_where_one_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, way in (
        (tmp_path / "none", "`python -m fastfusion train` makes one"),
        (FOLDER / "none", "pip install fastfusion-checkpoints"),
    ):
        arguments = ["--output", str(tmp_path / "out.png"), "--checkpoint", str(path)]
        assert main(["demo", *arguments]) == 1
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and way in printed.err and printed.out == ""


def test_import_loads_no_extra() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fastfusion, fastfusion.models; "
        "print({m.partition('.')[0] for m in set(sys.modules) - before})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "fastfusion" in result.stdout
    for package in ("PIL", "matplotlib", "safetensors", "easy_vqa", "tqdm"):
        assert repr(package) not in result.stdout


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, page = tmp_path / "attention.png", tmp_path / "attention.html"
    assert main(["demo", "--output", str(picture), "--page", str(page)]) == 0
    printed = capsys.readouterr().out

    def number(pattern: str) -> float:
        found = re.search(pattern, printed)
        assert found is not None, printed
        return float(found[1])

    assert number(r"accuracy on the whole test split: ([\d.]+)%") >= 99.5
    assert 60 < number(r"question-only model: ([\d.]+)%") < 70
    assert "9,673" in printed
    rows = {}
    for name in ("stock torch.nn", "fastfusion", "fastfusion bf16", "fastfusion int8"):
        time = r"([\d.]+) ms +[\d.]+x"
        found = re.search(rf"  {name} +{time} +{time} +([\d.]+)% +([\d.e+-]+) +([\d.]+)", printed)
        assert found is not None, printed
        rows[name] = [float(cell) for cell in found.groups()]
        assert rows[name][0] > 0 and rows[name][1] > 0
        assert abs(rows[name][2] - rows["stock torch.nn"][2]) <= 0.3
    assert rows["stock torch.nn"][3] == 0 < rows["fastfusion int8"][3]
    assert rows["fastfusion int8"][4] < rows["fastfusion bf16"][4] < rows["fastfusion"][4]
    cosines = re.findall(r">= ([\d.]+)", printed)
    assert len(cosines) == 2 and min(map(float, cosines)) >= 0.999
    assert number(r"what made the difference, batch 1: fused layers ([\d.]+)x") > 0
    assert printed.count("(true: ") == 6
    assert str(picture) in printed and str(page) in printed
    assert '"transformer.fusion"' in page.read_text()

    from PIL import Image

    with Image.open(picture) as image:
        assert min(image.size) > 500
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 1000
