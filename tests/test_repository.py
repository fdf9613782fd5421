"""Rules of the repository that nobody should have to remember: budgets, pins, names, tables."""

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT, need

import fastfusion as ff

need(".ci/run", "setup.py", "csrc")
FOLDERS = ("fastfusion", "kernels", "csrc", "benchmarks", "tests", "examples", ".ci")
TEXT = {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml"}
PINNED = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+)$")


def files(*folders: str, suffixes: set[str] = TEXT) -> list[Path]:
    """The text files of some folders."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(p for p in found if p.suffix in suffixes and "__pycache__" not in p.parts)


def product_files() -> list[Path]:
    """Everything that people read, the files in the root included."""
    root = [ROOT / name for name in ("setup.py", "Makefile", ".clang-format", ".gitignore")]
    return [*files(*FOLDERS), ROOT / ".ci/run", *root, *ROOT.glob("*.md"), *ROOT.glob("*.toml")]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def lines_over(budget: int, paths: list[Path]) -> dict[str, int]:
    counts = {relative(path): len(path.read_text().splitlines()) for path in paths}
    return {name: count for name, count in counts.items() if count > budget}


def test_no_file_is_longer_than_600_lines() -> None:
    assert not lines_over(600, product_files())


def test_no_kernel_file_is_longer_than_400_lines() -> None:
    assert not lines_over(400, files("kernels", "csrc/cpu", "csrc/cuda", "csrc/emulate"))


def test_there_are_two_environment_variables() -> None:
    sources = "".join(path.read_text() for path in [*files(*FOLDERS[:4]), ROOT / "setup.py"])
    names = set(re.findall(r"[\"'](FASTFUSION_\w+)[\"']", sources))
    assert names == {"FASTFUSION_BACKEND", "FASTFUSION_CPU_ISA"}


def test_the_library_reads_no_other_environment_variable() -> None:
    """But Triton's own, which says that its interpreter takes CPU tensors."""
    read = re.compile(r"(?:getenv\(|environ(?:\.get\(|\[)|in os\.environ)\s*[\"'](\w+)[\"']")
    for path in files("fastfusion", "kernels", "csrc"):
        others = set(read.findall(path.read_text())) - {
            "FASTFUSION_BACKEND",
            "FASTFUSION_CPU_ISA",
            "TRITON_INTERPRET",
        }
        assert not others, f"{relative(path)} reads {others}"


def test_no_text_names_a_path_of_one_machine() -> None:
    private = re.compile(r"(?<![\w.])/(?:work|root|home|Users)/\w")
    for path in product_files():
        found = private.search(path.read_text())
        assert found is None, f"{relative(path)}: {found and found.group()}"


def test_no_corpses() -> None:
    marker = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    for path in product_files():
        found = marker.search(path.read_text())
        assert found is None, f"{relative(path)}: {found and found.group()}"


def pins(requirements: list[Any]) -> dict[str, str]:
    """Name and version of each pinned requirement; a group included by another is no pin."""
    found = [PINNED.match(line) for line in requirements if isinstance(line, str)]
    return {match[1]: match[2] for match in found if match}


def test_pins_agree(project: dict[str, Any]) -> None:
    groups = project["dependency-groups"]
    assert project["build-system"]["requires"] == groups["build"]
    assert {"include-group": "build"} in groups["dev"]
    versions: dict[str, set[str]] = {}
    for requirements in groups.values():
        for name, version in pins(requirements).items():
            versions.setdefault(name, set()).add(version)
    assert {name for name, several in versions.items() if len(several) > 1} == set()


def test_every_requirement_of_a_group_is_pinned(project: dict[str, Any]) -> None:
    for group, requirements in project["dependency-groups"].items():
        loose = [r for r in requirements if isinstance(r, str) and not PINNED.match(r)]
        assert not loose, f"group {group}"


def test_versions_stand_in_pyproject_only(project: dict[str, Any]) -> None:
    names = "|".join(
        pins(project["dependency-groups"]["dev"] + project["build-system"]["requires"])
    )
    elsewhere = re.compile(rf"\b(?:{names})\s*==\s*[0-9]")
    for path in product_files():
        if path.name != "pyproject.toml":
            assert not elsewhere.search(path.read_text()), relative(path)


def test_development_covers_what_the_extras_need(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    groups = project["dependency-groups"]
    have = pins(groups["dev"] + groups["bench"])
    assert set(extras["demo"]) | set(extras["bench"]) <= set(have)


def test_oldest_torch_is_the_one_the_binary_is_built_for(project: dict[str, Any]) -> None:
    oldest = next(d for d in project["project"]["dependencies"] if d.startswith("torch"))
    major, minor = map(int, oldest.removeprefix("torch>=").split("."))
    assert f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}" in setup_constants()


def test_versions_of_package_and_module_agree(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == ff.__version__


def setup_constants() -> list[str]:
    """Every string constant of setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_every_isa_file_has_flags() -> None:
    known = setup_constants()
    units = [path.stem for path in (ROOT / "csrc/cpu/isa").glob("*.cpp")]
    assert units, "csrc/cpu/isa has no sources"
    assert set(units) <= set(known)


def test_fast_math_is_never_used() -> None:
    assert not [flag for flag in setup_constants() if flag.startswith(("-ffast-math", "-Ofast"))]


def readme_table() -> dict[str, str]:
    """Op and row of the README's table of ops and backends."""
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [re.match(r"\| `(\w+)` \|(.*)", line) for line in lines]
    return {row[1]: row[2] for row in rows if row}


@pytest.mark.parametrize("op", ff.ops.ALL, ids=lambda op: op.name)
def test_every_op_has_tests_and_a_row_in_the_readme(op: Any) -> None:
    tests = "".join(path.read_text() for path in files("tests/ops"))
    assert op.name in tests
    assert op.name in readme_table()


@pytest.mark.parametrize("op", ff.ops.ALL, ids=lambda op: op.name)
def test_the_readme_names_the_backends_that_exist(op: Any) -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| op |"))
    columns = [cell.strip(" `") for cell in head.strip("|").split("|")][1:]
    cells = [cell.strip() for cell in readme_table()[op.name].strip("|").split("|")]
    claimed = {column for column, cell in zip(columns, cells, strict=True) if cell == "yes"}
    assert claimed == {implementation.backend for implementation in op.implementations}


def test_the_changelog_has_a_section_for_what_is_not_released() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_license_is_complete() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "Copyright 2026 The fastfusion authors" in text


def test_typing_marker_is_there() -> None:
    assert (ROOT / "fastfusion/py.typed").exists()
