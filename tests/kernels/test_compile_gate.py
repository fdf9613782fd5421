"""`make kernels`: its rules on made-up rows, and a small set of real builds."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fastfusion.benchmarks.compile_gates import triton_builds as kernels_build  # noqa: E402
from fastfusion.benchmarks.compile_gates.triton_builds import SHARED_LIMITS, Kind, Row, problems  # noqa: E402

KIND = Kind("attention.attention", "plain", "bfloat16", 64, 86, "64x64 4w 2s", False, True)
GOOD = Row(KIND, registers=255, spilled=0, shared_kb=99.0, tensor_core=64)
DROPOUT = replace(KIND, dropout=True)
SINGLE = replace(KIND, dtype="float32")


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        replace(GOOD, kind=DROPOUT, spilled=96),
        replace(GOOD, kind=SINGLE, spilled=4096, tensor_core=0),
        replace(GOOD, kind=replace(KIND, dots=False), tensor_core=0),
        replace(GOOD, kind=replace(KIND, arch=90), shared_kb=227.0, tensor_memory=512),
    ],
    ids=["good", "dropout", "float32", "no dot", "Hopper"],
)
def test_a_good_build_passes(row: Row) -> None:
    assert problems(row) == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (replace(GOOD, spilled=4), "spills 4 bytes"),
        (replace(GOOD, kind=DROPOUT, spilled=100), "spills 100 bytes"),
        (replace(GOOD, tensor_core=0), "tensor-core"),
        (replace(GOOD, shared_kb=99.1), "99.1 KB"),
        (replace(GOOD, kind=SINGLE, shared_kb=100.0), "100.0 KB"),
        (replace(GOOD, tensor_memory=1024), "tensor memory"),
        (replace(GOOD, kind=replace(KIND, arch=90, own=64)), "no wgmma for 64 rows"),
        (replace(GOOD, faults=("a product over 16 with kWidth 8",)), "kWidth 8"),
        (Row(KIND, error="CompilationError: no"), "CompilationError"),
    ],
    ids=[
        "spill",
        "dropout",
        "no mma",
        "shared",
        "float32 shared",
        "tensor memory",
        "no wgmma",
        "layout",
        "error",
    ],
)
def test_a_bad_build_fails(row: Row, words: str) -> None:
    assert len(problems(row)) == 1
    assert words in problems(row)[0]


OPERAND = "tensor<{}xbf16, #ttg.dot_op<{{opIdx = {}, parent = #mma, kWidth = {}}}>>"


@pytest.mark.parametrize(
    ("ttgir", "faults"),
    [
        (OPERAND.format("32x16", 0, 4), ()),
        (OPERAND.format("32x16", 0, 8), ("a product over 16 with kWidth 8",)),
        (OPERAND.format("16x64", 1, 8), ("a product over 16 with kWidth 8",)),
        (OPERAND.format("32x64", 1, 8), ()),
        ("%b = ttg.memdesc_trans %k\nttng.warp_group_dot %a, %b, %c", ()),
        (
            "%a = ttg.memdesc_trans %v {order}\n%x = ttng.warp_group_dot %a, %b, %c",
            ("a transposed left operand of wgmma",),
        ),
    ],
)
def test_layouts_that_triton_gets_wrong(ttgir: str, faults: tuple[str, ...]) -> None:
    assert kernels_build.layout_faults(ttgir) == faults


def test_a_build_is_compiled_once() -> None:
    build = kernels_build.Build(KIND, "module", "function", "description")
    again = replace(build, kind=replace(KIND, variant="again"))
    other = replace(build, description="other")
    assert kernels_build.unique([build, again, other]) == [build, other]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in which Triton compiles and does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastfusion.benchmarks.compile_gates.triton", *options]
    return subprocess.run(
        command, capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"}
    )


def test_shipped_kernels_compile_well(tmp_path: Path) -> None:
    """Each kernel once for Hopper, which has instructions and kernels of its own. The rest is for
    `make kernels`: another start costs as much as eight builds."""
    path = tmp_path / "kernels.json"
    variants = "plain,few queries,long,ranges,positions,some"
    options = ("--size", "64,160,768", "--variant", variants, "--json", str(path))
    result = run("--quick", "--arch", "90", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(path.read_text())["rows"]
    assert {row[4] for row in rows} == {"sm_90"}
    kernels = {row[0].partition(".")[0] for row in rows}
    assert kernels == set(kernels_build.TABLE_NAMES.values())
    files = Path(kernels_build.tiles.__file__).parents[1].rglob("*.py")
    launched = {file for file in files if "_kernel(\n" in file.read_text()}
    assert len(launched) == len(kernels_build.TABLE_NAMES)
    assert set(SHARED_LIMITS) == {80, 86, 87, 89, 90, 100}


@pytest.mark.parametrize(
    "options",
    [["--arch", "75"], ["--dtype", "int8"], ["--jobs", "0"], ["--kernel", "softmax", "--quick"]],
)
def test_a_bad_command_line_says_why(options: list[str]) -> None:
    result = run(*options)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("make kernels: ")
