"""What gets installed, with and without a compiler, and what a second build does.

The compiler of these tests is a script that notes its command lines and writes empty files: what is
tested is setup.py, and the real compiler has built the package that the other tests import.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT, build_script, need

CHECKPOINTS = {f"fastfusion/models/{p.name}" for p in ROOT.glob("fastfusion/models/*.safetensors")}

FAKE_COMPILER = """#!{python}
import os, pathlib, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("fake compiler, release 12.8")
    sys.exit()
if arguments == ["-dumpmachine"]:
    print({machine!r} + "-linux-gnu")
    sys.exit()
if arguments == ["--list-gpu-arch"]:
    print(*(f"compute_{{n}}" for n in (70, 75, 80, 86, 87, 89, 90, 100, 101, 120)), sep="\\n")
    sys.exit()
with open({log!r}, "a") as log:
    print(*arguments, file=log)
target = pathlib.Path(arguments[arguments.index("-o") + 1])
target.write_text("")
if "-c" in arguments:
    depfile = pathlib.Path(arguments[arguments.index("-MF") + 1])
    source = arguments[arguments.index("-c") + 1]
    if "FAIL" in pathlib.Path(source).read_text():
        sys.exit(source + ": error: this is no C++")
    depfile.write_text(f"{{target}}: {{source}} csrc/cpu/api.h\\n")
"""


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvcc, unless a test sets $NVCC: it takes minutes."""
    for name in ("CXX", "CXXFLAGS", "LDFLAGS", "TORCH_CUDA_ARCH_LIST", "USE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NVCC", "/nonexistent/nvcc")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what is needed to install the package, without anything built."""
    need("setup.py", "csrc")
    copy = tmp_path / "source"
    copy.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for name in ("fastfusion", "kernels", "benchmarks", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


class Compiler:
    """A fake compiler and the command lines that it has seen."""

    def __init__(self, folder: Path, machine: str = platform.machine()) -> None:
        self.log = folder / "commands"
        self.path = folder / "fake-g++"
        self.path.write_text(
            FAKE_COMPILER.format(python=sys.executable, log=str(self.log), machine=machine)
        )
        self.path.chmod(0o755)

    def commands(self) -> list[str]:
        """The command lines since the last call."""
        if not self.log.exists():
            return []
        lines = self.log.read_text().splitlines()
        self.log.unlink()
        return lines

    def compiled(self) -> set[str]:
        """The sources compiled since the last call."""
        words = [line.split() for line in self.commands() if " -c " in line]
        return {line[line.index("-c") + 1] for line in words}


@pytest.fixture
def compiler(tmp_path: Path) -> Compiler:
    return Compiler(tmp_path)


def run(
    source: Path, *arguments: str, cxx: str | None, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs Python in the source tree with $CXX (unset: None) and optionally another $PATH."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if cxx is not None:
        environment["CXX"] = cxx
    if path is not None:
        environment["PATH"] = path
    return subprocess.run(
        [sys.executable, *arguments], cwd=source, env=environment, capture_output=True, text=True
    )


def build_wheel(source: Path, cxx: str, hook: str = "build_wheel") -> Path:
    """Calls the build backend as pip does without isolation, offline; returns the wheel."""
    folder = source.parent / "wheels"
    folder.mkdir()
    code = f"from setuptools import build_meta; build_meta.{hook}({str(folder)!r})"
    result = run(source, "-c", code, cxx=cxx)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_without_compiler(source: Path) -> None:
    wheel = build_wheel(source, cxx="/nonexistent/g++")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not [name for name in names if name.endswith(".so")]
    assert {
        "fastfusion/__init__.py",
        "fastfusion/py.typed",
        "fastfusion/nn/__init__.py",
        "fastfusion/ops/__init__.py",
        "fastfusion/kernels/__init__.py",
        "fastfusion/kernels/attention/forward.py",
        "fastfusion/kernels/device/scores.py",
        "fastfusion/kernels/host/tiles.py",
        "fastfusion/benchmarks/__main__.py",
        "fastfusion/benchmarks/common/shapes.py",
        "fastfusion/benchmarks/gpu/run.py",
        "fastfusion/benchmarks/shapes.json",
    } <= names
    assert names >= CHECKPOINTS
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastfusion"}
    assert any(name.endswith("licenses/LICENSE") for name in names)

    # The installed package runs on its reference and says why.
    site = source.parent / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import torch, fastfusion as ff\n"
        f"assert ff.__file__.startswith({str(site)!r}), ff.__file__\n"
        "q = torch.ones(1, 1, 2, 4)\n"
        "assert torch.equal(ff.scaled_dot_product_attention(q, q, q), q)\n"
        "print(ff.explain(ff.scaled_dot_product_attention, q, q, q).chosen)\n"
        "print(ff.info())"
    )
    result = run(source.parent, "-c", code, cxx=None)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "reference"
    reason = "without its compiled part: no C++ compiler found (/nonexistent/g++)"
    assert f"no: the package was built {reason}" in result.stdout


def record(package: Path) -> dict[str, str | None]:
    """Why a build left out each part."""
    facts = json.loads((package / "_build.json").read_text())
    return {part: facts[part] for part in ("cpu", "cuda")}


@pytest.mark.parametrize(
    ("cxx", "wanted"),
    [("/nonexistent/g++", "/nonexistent/g++"), (None, "g++, c++ or clang++")],
    ids=["named", "usual names"],
)
def test_no_compiler_is_one_line(source: Path, cxx: str | None, wanted: str) -> None:
    empty = source.parent / "empty"
    empty.mkdir()
    result = run(source, "setup.py", "-q", "build_ext", "--inplace", cxx=cxx, path=str(empty))
    assert result.returncode == 0, result.stderr
    line = f"fastfusion: native part left out: no C++ compiler found ({wanted})"
    assert result.stdout.splitlines() == [line]
    assert not list(source.rglob("*.so"))
    reason = line.partition("left out: ")[2]
    assert record(source / "fastfusion") == {"cpu": reason, "cuda": reason}


def test_wheel_with_compiler(source: Path, compiler: Compiler) -> None:
    wheel = build_wheel(source, cxx=str(compiler.path))
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl"), "for every Python"
    names = zipfile.ZipFile(wheel).namelist()
    libraries = {name for name in names if name.endswith(".so")}
    assert libraries == {"fastfusion/libfastfusion_cpu.so", "fastfusion/_torch_ops.so"}
    assert "fastfusion/_build.json" in names
    assert not list((source / "fastfusion").glob("*.so"))


def test_wheel_for_another_machine(source: Path, tmp_path: Path) -> None:
    """A compiler for it says so: kernels of its instruction sets, and no library of this torch."""
    other = "x86_64" if platform.machine() == "aarch64" else "aarch64"
    compiler = Compiler(tmp_path, other)
    wheel = build_wheel(source, cxx=str(compiler.path))
    assert wheel.name.endswith(f"-py3-none-linux_{other}.whl")
    lines = compiler.commands()
    rows = {f"csrc/cpu/isa/{isa}.cpp" for isa in build_script()["ISA_FLAGS"][other]}
    units = [line.split() for line in lines if " -c " in line]
    assert rows == {u for words in units if "/isa/" in (u := words[words.index("-c") + 1])}
    (link,) = (line for line in lines if line.endswith("_torch_ops.so"))
    assert " -L" not in link and "--no-undefined" not in link
    assert [f"/torch/lib{name}.so " in link for name in ("torch", "torch_cpu", "c10")] == [True] * 3


def test_second_build_compiles_only_what_changed(source: Path, compiler: Compiler) -> None:
    def build() -> set[str]:
        result = run(source, "setup.py", "-q", "build_ext", "--inplace", cxx=str(compiler.path))
        assert result.returncode == 0, result.stdout + result.stderr
        compiled = compiler.compiled()
        lines = [line for line in result.stdout.splitlines() if "left out" not in line]
        assert len(lines) == bool(compiled), "one line says what is compiled"
        assert all(f"compiling {len(compiled)} C++ files: about " in line for line in lines)
        return compiled

    everything = build()
    assert record(source / "fastfusion")["cpu"] is None
    assert {"csrc/torch/attention.cpp", "csrc/cpu/facts.cpp", "csrc/cpu/dispatch.cpp"} <= everything
    assert (source / "fastfusion/_torch_ops.so").exists()
    assert build() == set()
    changed = source / "csrc/cpu/facts.cpp"
    changed.write_text(changed.read_text() + "\n")
    assert build() == {"csrc/cpu/facts.cpp"}
    # The fake compiler names this header in every depfile.
    (source / "csrc/cpu/api.h").touch()
    assert build() == everything


def test_each_isa_is_compiled_with_its_own_flags(source: Path, compiler: Compiler) -> None:
    for name in ("scalar", "avx2", "avx512"):
        (source / f"csrc/cpu/isa/{name}.cpp").write_text("")
    (source / "csrc/cpu/isa/of_another_machine.cpp").write_text("")
    result = run(source, "setup.py", "build_ext", "--inplace", cxx=str(compiler.path))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = compiler.commands()
    flags = {
        line.split()[line.split().index("-c") + 1].removeprefix("csrc/cpu/"): set(line.split())
        for line in lines
        if " -c " in line
    }
    if platform.machine() == "x86_64":
        assert {"-mavx2", "-mfma"} <= flags["isa/avx2.cpp"]
        assert {"-mavx512f", "-mavx512bw"} <= flags["isa/avx512.cpp"]
        assert "-mavx512f" not in flags["isa/avx2.cpp"]
    for unit in ("isa/scalar.cpp", "dispatch.cpp", "facts.cpp", "csrc/torch/attention.cpp"):
        assert not [flag for flag in flags[unit] if flag.startswith("-m")]
    assert "isa/of_another_machine.cpp" not in flags
    assert all("-ffp-contract=off" in unit for unit in flags.values())
    links = [line for line in lines if " -shared " in f" {line} "]
    assert len(links) == 2
    assert all("-Wl,-rpath,$ORIGIN" in line for line in links)
    assert not [line for line in links if "libpython" in line or "-lpython" in line]


def build_cuda(source: Path, compiler: Compiler) -> subprocess.CompletedProcess[str]:
    command = ("setup.py", "-q", "build_ext", "--inplace", "--cuda")
    return run(source, *command, cxx=str(compiler.path))


def build_beside_cuda(source: Path, compiler: Compiler) -> subprocess.CompletedProcess[str]:
    """A build that nothing was said to, beside a CUDA build of torch."""
    setup = source / "setup.py"
    setup.write_text(setup.read_text().replace("not torch_has_cuda(torch_folder())", "False"))
    return run(source, "setup.py", "-q", "build_ext", "--inplace", cxx=str(compiler.path))


def test_cuda_kernels_on_request(
    source: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source once, for all architectures that nvcc knows, into a library that knows no torch;
    a second build compiles nothing."""
    monkeypatch.setenv("NVCC", str(compiler.path))
    result = build_cuda(source, compiler)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = compiler.commands()
    units = [line for line in lines if "-gencode" in line]
    sources = [str(p.relative_to(source)) for p in sorted((source / "csrc/cuda").rglob("*.cu"))]
    assert sources and sorted(u.split()[u.split().index("-c") + 1] for u in units) == sources
    codes = [*(f"sm_{arch}" for arch in (75, 80, 86, 87, 89, 90, 100, 120)), "compute_90"]
    for unit in units:
        assert generated(unit) == codes and "torch" not in unit
    (line,) = result.stdout.splitlines()
    assert f"{len(sources)} CUDA files for {', '.join(codes)} (TORCH_CUDA_ARCH_LIST " in line
    (link,) = (line for line in lines if "-cudart=static" in line)
    assert link.endswith("fastfusion/libfastfusion_cuda.so") and "-ltorch" not in link
    for name in ("libfastfusion_cuda.so", "_torch_cuda_ops.so", "_torch_ops.so"):
        assert (source / "fastfusion" / name).exists()
    assert record(source / "fastfusion") == {"cpu": None, "cuda": None}
    assert build_cuda(source, compiler).stdout == ""
    assert compiler.compiled() == set()
    changed = source / "csrc/torch/cuda.cpp"
    changed.write_text(changed.read_text() + "\n")
    build_cuda(source, compiler)
    assert compiler.compiled() == {"csrc/torch/cuda.cpp"}


def generated(unit: str) -> list[str]:
    """What a command line of nvcc generates."""
    return [code for _, code in re.findall(r"-gencode=arch=compute_(\w+),code=(\w+_\1)\b", unit)]


FAKE_SMI = "#!/bin/sh\necho 8.6\necho 8.6\necho 12.0\n"


@pytest.mark.parametrize(
    ("wanted", "codes"),
    [
        ("8.0", ["sm_80"]),
        (" 7.0;7.5 9.0a 10.0+PTX;", ["sm_75", "sm_90a", "sm_100", "compute_100"]),
        ("Ampere;Volta;8.7", ["sm_80", "sm_86", "compute_86", "sm_87"]),
        ("native", ["sm_86", "sm_120"]),
    ],
)
def test_cuda_architectures_by_name(
    wanted: str,
    codes: list[str],
    source: Path,
    compiler: Compiler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TORCH_CUDA_ARCH_LIST as torch's own extensions read it; what is too old is left out."""
    smi = source.parent / "nvidia-smi"
    smi.write_text(FAKE_SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("NVCC", str(compiler.path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    result = build_beside_cuda(source, compiler)
    assert result.returncode == 0, result.stdout + result.stderr
    units = [line for line in compiler.commands() if "-gencode" in line]
    assert units and all(generated(unit) == codes for unit in units)
    assert f"for {', '.join(codes)} (" in result.stdout


def test_an_unknown_architecture_is_an_error(
    source: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCC", str(compiler.path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;sm_90")
    result = build_beside_cuda(source, compiler)
    assert result.returncode != 0
    message = "fastfusion: TORCH_CUDA_ARCH_LIST: 'sm_90' is no architecture"
    assert result.stderr.splitlines()[-1] == message


@pytest.mark.parametrize("reason", ["absent", "old", "not wanted", "old GPUs", "no GPU"])
def test_no_cuda_kernels(
    reason: str, source: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error where the kernels were asked for, one line where they come by themselves."""
    old = source.parent / "old-nvcc"
    old.write_text("#!/bin/sh\necho release 11.8\n")
    old.chmod(0o755)
    (source.parent / "nvidia-smi").symlink_to("/bin/false")
    monkeypatch.setenv("PATH", f"{source.parent}:{os.environ['PATH']}")
    usable = {"NVCC": str(compiler.path)}
    variables, words = {
        "absent": ({}, "no CUDA compiler found (/nonexistent/nvcc)"),
        "old": ({"NVCC": str(old)}, f"{old} is older than 12"),
        "not wanted": (usable | {"USE_CUDA": "0"}, "USE_CUDA is 0"),
        "old GPUs": (
            usable | {"TORCH_CUDA_ARCH_LIST": "6.0 7.0+PTX"},
            "they need compute capability 7.5, TORCH_CUDA_ARCH_LIST is 6.0;7.0+PTX",
        ),
        "no GPU": (
            usable | {"TORCH_CUDA_ARCH_LIST": "native"},
            "TORCH_CUDA_ARCH_LIST is native, and nvidia-smi names no GPU",
        ),
    }[reason]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = build_cuda(source, compiler)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == f"fastfusion: no CUDA kernels: {words}"
    result = build_beside_cuda(source, compiler)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"fastfusion: CUDA kernels left out: {words}"
    assert len(lines) == 2 and "CUDA" not in lines[1]
    assert record(source / "fastfusion") == {"cpu": None, "cuda": words}
    assert not list((source / "fastfusion").glob("*cuda*.so"))


def test_a_cuda_build_of_torch_is_recognised(tmp_path: Path) -> None:
    has_cuda = build_script()["torch_has_cuda"]
    for text, expected in (
        ("cuda: Optional[str] = None\nhip = None\n", False),
        ("cuda: Optional[str] = '13.0'\n", True),
        ("debug = False\ncuda = '12.6'\n", True),
        ("hip = '6.4'\ncuda = None\n", False),
        ("debug = False\n", False),
    ):
        (tmp_path / "version.py").write_text(text)
        assert has_cuda(tmp_path) == expected


def test_emulated_kernels_stay_out_of_the_package(source: Path, compiler: Compiler) -> None:
    """One library per architecture, in a folder that no wheel takes."""
    command = ("setup.py", "-q", "build_emulated")
    result = run(source, *command, cxx=str(compiler.path))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = compiler.commands()
    kernels = [line for line in lines if "csrc/cuda/attention/attention.cu " in line]
    assert ["-DFF_ARCH=75" in k for k in kernels].count(True) == 1
    assert ["-DFF_ARCH=90" in k for k in kernels].count(True) == 1
    assert all("-DFF_CUDA_EMULATED" in line for line in lines if " -c " in line)
    found = {str(p.relative_to(source)) for p in source.rglob("*.so")}
    assert found == {f"build/emulated/sm{arch}/_emulated_ops.so" for arch in (75, 90)}
    run(source, *command, cxx=str(compiler.path))
    assert compiler.commands() == []
    assert run(source, *command, cxx="/nonexistent/g++").returncode == 0


def test_flags_from_the_environment_are_used(
    source: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**os.environ, "CXX": str(compiler.path), "CXXFLAGS": "-fsanitize=address -g"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    commands = compiler.commands()
    assert commands and all("-fsanitize=address -g" in line for line in commands)


def test_compiler_that_fails_is_an_error(source: Path, compiler: Compiler) -> None:
    (source / "csrc/cpu/dispatch.cpp").write_text("FAIL")
    result = run(source, "setup.py", "-q", "build_ext", "--inplace", cxx=str(compiler.path))
    assert result.returncode != 0
    assert "csrc/cpu/dispatch.cpp: error: this is no C++" in result.stdout + result.stderr
    assert "the native part did not compile" in result.stderr


def test_editable_install_maps_the_folders(source: Path) -> None:
    wheel = build_wheel(source, cxx="/nonexistent/g++", hook="build_editable")
    site = source.parent / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # -S keeps out this environment's own editable install; torch is then found by its folder.
    torch_site = importlib.metadata.distribution("torch").locate_file("")
    code = (
        f"import site, sys; site.addsitedir({str(site)!r}); sys.path.append({str(torch_site)!r})\n"
        "import importlib.util, fastfusion.kernels, fastfusion.benchmarks\n"
        "print(fastfusion.__file__, fastfusion.kernels.__file__, fastfusion.benchmarks.__file__)\n"
        "print(importlib.util.find_spec('kernels'), importlib.util.find_spec('benchmarks'))"
    )
    result = run(source.parent, "-S", "-P", "-c", code, cxx=None)
    assert result.returncode == 0, result.stderr
    files, tops = result.stdout.splitlines()
    folders = ("fastfusion", "kernels", "benchmarks")
    assert files.split() == [str(source / folder / "__init__.py") for folder in folders]
    assert tops == "None None"


def test_this_installation_has_its_subpackages() -> None:
    code = (
        "from importlib.util import find_spec\n"
        "print(*map(bool, map(find_spec, ('fastfusion.kernels', 'fastfusion.benchmarks'))))\n"
        "print(find_spec('kernels'))"
    )
    result = run(Path(__file__).parent, "-P", "-c", code, cxx=None)
    assert result.stdout.split() == ["True", "True", "None"], result.stderr
