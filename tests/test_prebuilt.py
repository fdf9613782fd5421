"""`make gpu-prebuild` and `make gpu PREBUILT=DIR`: what fits a machine is used, and it is said."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT, need

from fastfusion.benchmarks.gpu import prebuilt
from fastfusion.benchmarks.gpu.prebuilt import Facts

MADE = Facts(90, "13.0", "2.13.0+cpu", "3.6.0", "3.12", "cuda hash", "triton hash")
HERE = replace(MADE, torch="2.11.0+cu130")
NAMES = {"libfastfusion_cuda.so", "_torch_cuda_ops.so"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    made = tmp_path / "made here"
    (made / "cuda").mkdir(parents=True)
    for name in NAMES:
        (made / "cuda" / name).write_text(name)
    (made / prebuilt.FACTS).write_text(json.dumps(asdict(MADE)))
    (tmp_path / "package").mkdir()
    return made


def used(folder: Path, here: Facts) -> tuple[dict[str, str], str, set[str]]:
    """Variables, what is said, and the libraries that lie in the package then."""
    package = folder.parent / "package"
    variables, said = prebuilt.use(folder, here, package)
    return variables, "\n".join(said), {path.name for path in package.iterdir()}


def test_what_fits_is_used(folder: Path) -> None:
    variables, said, libraries = used(folder, HERE)
    assert variables == {"USE_CUDA": "0", "TRITON_CACHE_DIR": str(folder / "triton")}
    assert libraries == NAMES
    assert "CUDA kernels used: sm_90, CUDA 13.0, for the stable ABI of torch (here 2.11.0" in said
    assert "Triton's cache used: Triton 3.6.0, Python 3.12" in said
    assert "changed" not in said


@pytest.mark.parametrize(
    ("change", "libraries", "cache"),
    [
        ({"arch": 80}, "they are for sm_90, and the GPU is 80", "it is for sm_90"),
        ({"arch": 0}, "the GPU is unknown", "the GPU is unknown"),
        ({"cuda": "12.8"}, "they are of CUDA 13.0, and the driver takes 12.8", None),
        ({"cuda": ""}, "the driver takes none", None),
        ({"cuda": "13.1"}, None, None),
        ({"torch": ""}, "torch is not installed", None),
        ({"cuda_sources": "other"}, "they are from other sources", None),
        ({"triton": "3.9.0"}, None, "keys are others with 3.9.0 on 3.12"),
        ({"triton": ""}, None, "keys are others with none on 3.12"),
        ({"python": "3.11"}, None, "it is of Triton 3.6.0 on Python 3.12"),
        ({"triton_sources": "other"}, None, None),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_aloud(
    change: dict[str, Any], libraries: str | None, cache: str | None, folder: Path
) -> None:
    variables, said, placed = used(folder, replace(HERE, **change))
    assert ("USE_CUDA" in variables) == (placed == NAMES) == (libraries is None)
    assert ("TRITON_CACHE_DIR" in variables) == (cache is None)
    first, second = said.splitlines()
    assert first.startswith(f"CUDA kernels {'used' if libraries is None else 'refused'}: ")
    assert second.startswith(f"Triton's cache {'used' if cache is None else 'refused'}: ")
    assert (libraries or "") in first and (cache or "") in second
    assert ("the kernels have changed" in second) == ("triton_sources" in change)


def test_a_cache_that_the_user_named_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    variables, said, _ = used(folder, HERE)
    assert "TRITON_CACHE_DIR" not in variables and "names another one" in said


def test_a_folder_with_something_else_is_said(folder: Path) -> None:
    for text in ("{}", "no JSON", None):
        (folder / prebuilt.FACTS).unlink()
        if text is not None:
            (folder / prebuilt.FACTS).write_text(text)
        assert used(folder, HERE)[:2] == ({}, used(folder, HERE)[1])
        assert "holds no prebuilt pieces" in used(folder, HERE)[1]
        (folder / prebuilt.FACTS).touch()


def test_a_shell_can_evaluate_what_is_printed(folder: Path) -> None:
    """By the file alone, before the package is installed; here is no GPU, so nothing is taken."""
    need("benchmarks")
    command = [sys.executable, "-P", "-S", "benchmarks/gpu/prebuilt.py", "use", str(folder)]
    environment = {**os.environ, "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["prebuilt"] * 2
    assert "the GPU is unknown" in done.stderr


def test_make_says_what_it_takes(folder: Path) -> None:
    need("Makefile", "benchmarks")
    arguments = [f"GPU_PYTHON={sys.executable}", f"PREBUILT={folder}", "ARGS=--dry-run"]
    hidden = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        ["make", "gpu", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("prebuilt: ")]
    assert len(said) == 2 and all("refused" in line for line in said)
    assert "steps: smoke, tests, bench, sanitizer" in done.stdout


def test_exports_are_quoted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prebuilt, "here", lambda: HERE)
    monkeypatch.setattr(prebuilt, "ROOT", folder.parent)
    (folder.parent / "package").rename(folder.parent / "fastfusion")
    assert prebuilt.main(["use", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "export USE_CUDA=0",
        f"export TRITON_CACHE_DIR='{folder}/triton'",
    ]


def test_facts_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("setup.py", "csrc", "kernels")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 10.3\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = prebuilt.here()
    assert found.arch == 103
    assert found.torch and found.python == "{}.{}".format(*sys.version_info)
    assert len({found.cuda_sources, found.triton_sources}) == 2
    assert prebuilt.hash_of(("kernels/nothing*",)) != found.triton_sources


def test_a_folder_is_made_from_what_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need("setup.py", "benchmarks")
    triton = pytest.importorskip("fastfusion.benchmarks.gpu.prebuilt_triton")
    package, folder = tmp_path / "package", tmp_path / "made"
    package.mkdir()
    for name in NAMES:
        (package / name).write_text(name)
    monkeypatch.setenv("NVCC", "echo Cuda compilation tools, release 13.1, V13.1.2")
    monkeypatch.setattr(triton, "fill", lambda cache, arch, jobs: cache.mkdir() or 7)
    prebuilt.make(folder, 90, 2, package)
    assert "CUDA kernels for sm_90, 7 of Triton's" in capsys.readouterr().out
    made = Facts(**json.loads((folder / prebuilt.FACTS).read_text()))
    assert (made.arch, made.cuda) == (90, "13.1")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    variables, _ = prebuilt.use(folder, made, package)
    assert set(variables) == {"USE_CUDA", "TRITON_CACHE_DIR"}


FILL = """
import sys
from pathlib import Path
from fastfusion.benchmarks.gpu import cells as cuda_cells
from fastfusion.benchmarks.gpu import prebuilt_triton
if __name__ == "__main__":
    (job,) = cuda_cells.plan(["attention"], ["bfloat16"], [False], "vit_b16")
    print(prebuilt_triton.fill(Path(sys.argv[1]), 90, 1, [job]))
    if "quick" in sys.argv:
        print(len(prebuilt_triton.builds_of(prebuilt_triton.jobs_of_a_quick_run(), 90)))
"""


def test_tritons_cache_is_filled_without_a_gpu(tmp_path: Path) -> None:
    """Twice, then in another place, where Triton finds the kernel and compiles nothing."""
    pytest.importorskip("triton")
    script, cache = tmp_path / "fill.py", tmp_path / "triton"
    script.write_text(FILL)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    seen: list[dict[str, int]] = []
    for arguments in ([], ["quick"]):
        done = subprocess.run(
            [sys.executable, str(script), str(cache), *arguments],
            env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[1] == "1", done.stdout
        assert {path.suffix for path in cache.rglob("*") if path.is_file()} == {".cubin", ".json"}
        seen.append({path.name: path.stat().st_mtime_ns for path in cache.rglob("*.cubin")})
        cache = cache.rename(tmp_path / "elsewhere")
        prebuilt.settle(cache)
    assert seen[0] == seen[1] and len(seen[0]) == 1
    assert int(done.stdout.split()[-1]) > 50
