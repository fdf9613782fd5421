"""Builds the package. What is static stands in pyproject.toml; here is what has to be computed.

The native part is three shared libraries, built by ninja from a build.ninja that this file writes:

    fastfusion/libfastfusion_cpu.so   the CPU kernels; knows neither torch nor Python
    fastfusion/_torch_ops.so          their registration with torch (stable ABI, torch >= 2.11)
    fastfusion/_native.<abi>.so       pybind11: CPU features, kernel tables and build facts

One kernel library under two front ends, so that a process holds one copy of the ISA choice.
Without a C++ compiler the native part is left out and the package runs on its reference; a compiler
that is there and fails is an error. CXX, CXXFLAGS and LDFLAGS are honoured as usual.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata, util
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# GCC 12 takes the deliberately undefined operands in its own AVX-512 header for a mistake (its bug
# 105593); clang does not know this warning, and is not to complain about that.
QUIET = "-Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option"

AVX512 = f"-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c {QUIET}"

# csrc/cpu/isa_<name>.cpp is compiled with the flags of its row, slowest ISA first. A row whose file
# does not exist is left out.
ISA_FLAGS = {
    "x86_64": {
        "scalar": "",
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": AVX512,
        "avx512bf16": f"{AVX512} -mavx512bf16",
    },
    "aarch64": {
        "scalar": "",
        "neon": "",
        "neonbf16": "-march=armv8.2-a+bf16",
    },
}

# -ffast-math is banned: it switches the whole process to flush-to-zero. FMAs are written out, so
# that contraction cannot differ from one compiler or template instance to the next.
COMPILE_FLAGS = [
    *("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    "-Icsrc",
]
LINK_FLAGS = ["-shared", "-Wl,-rpath,$ORIGIN"]
COMPLETE = "-Wl,--no-undefined"
TORCH_FLAGS = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]

# Folders of the repository that install below fastfusion: their own names belong to other packages.
MAPPED = ["kernels", "benchmarks"]


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX alone where it is set, otherwise the first usual name."""
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["g++", "c++", "clang++"]:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    return None


def isa_flags() -> dict[str, str]:
    """The rows of ISA_FLAGS for this machine's architecture whose source exists."""
    rows = ISA_FLAGS.get(platform.machine(), {"scalar": ""})
    return {
        isa: flags for isa, flags in rows.items() if (ROOT / f"csrc/cpu/isa_{isa}.cpp").exists()
    }


def quote(arguments: list[str]) -> str:
    """Arguments as ninja wants them: quoted for the shell, with ninja's own ``$`` doubled."""
    return shlex.join(arguments).replace("$", "$$")


def escape(path: Path) -> str:
    """A path as ninja wants it in a build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaFile:
    """The text of a build.ninja, gathered one shared library at a time."""

    def __init__(self, compiler: list[str], objects: Path) -> None:
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        self.objects = objects
        self.link_extra = [*extra, *shlex.split(os.environ.get("LDFLAGS", ""))]
        self.compile_extra = extra
        self.lines = [
            f"builddir = {escape(objects)}",
            "rule compile",
            f"  command = {quote(compiler)} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            f"  command = {quote(compiler)} $flags $in -o $out $libraries",
            "  description = link $out",
        ]

    def compile(self, source: str, flags: list[str]) -> Path:
        """Adds one object file; ``source`` is relative: no absolute path enters the binary."""
        target = self.objects / Path(source).with_suffix(".o")
        self.lines += [
            f"build {escape(target)}: compile {source}",
            f"  flags = {quote([*COMPILE_FLAGS, *flags, *self.compile_extra])}",
        ]
        return target

    def link(
        self, target: Path, objects: list[Path], flags: list[str], libraries: list[str]
    ) -> Path:
        """Adds one shared library; ``objects`` may hold other shared libraries to link to."""
        inputs = " ".join(escape(item) for item in objects)
        self.lines += [
            f"build {escape(target)}: link {inputs}",
            f"  flags = {quote([*LINK_FLAGS, *flags, *self.link_extra])}",
            f"  libraries = {quote(libraries)}",
        ]
        return target

    def write(self) -> Path:
        """Writes the file beside the objects and returns its path."""
        path = self.objects / "build.ninja"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(self.lines) + "\n")
        return path


def torch_folder() -> Path:
    """Where torch is installed, without importing it (that would cost a second per build)."""
    spec = util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "fastfusion: building the native part needs torch; install it, or build with isolation"
        )
    return Path(spec.submodule_search_locations[0])


def build_facts(compiler: list[str]) -> list[str]:
    """What `ff.info()` reports on the build, as macros for csrc/python.cpp."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    if version.returncode or not version.stdout.strip():
        raise SystemExit(f"fastfusion: {shlex.join(compiler)} --version fails: {version.stderr}")
    facts = {
        "FF_BUILD_COMPILER": version.stdout.strip().splitlines()[0],
        "FF_BUILD_TORCH": metadata.version("torch"),
        "FF_BUILD_ISAS": ",".join(isa_flags()),
    }
    return [f'-D{name}="{value}"' for name, value in facts.items()]


def python_includes() -> list[str]:
    """Include flags of the pybind11 module."""
    import pybind11

    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        raise SystemExit(
            "fastfusion: Python.h not found; install Python's headers (package python3-dev)"
        )
    return ["-isystem", include, "-isystem", pybind11.get_include()]


def write_ninja(compiler: list[str], temp: Path, package: Path) -> Path:
    """Writes build.ninja, which puts the three libraries into ``package``; returns its path."""
    torch = torch_folder()
    ninja = NinjaFile(compiler, temp)

    flags = {f"isa_{isa}": shlex.split(line) for isa, line in isa_flags().items()}
    for source in (ROOT / "csrc/cpu").glob("*.cpp"):
        if not source.stem.startswith("isa_"):
            flags[source.stem] = []
    kernels = [ninja.compile(f"csrc/cpu/{stem}.cpp", flags[stem]) for stem in sorted(flags)]
    cpu = ninja.link(
        package / "libfastfusion_cpu.so",
        kernels,
        [COMPLETE, "-Wl,-soname,libfastfusion_cpu.so"],
        [],
    )

    include = torch / "include"
    torch_includes = ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    torch_ops = [
        ninja.compile(f"csrc/{source.name}", [*TORCH_FLAGS, *torch_includes])
        for source in sorted((ROOT / "csrc").glob("torch_*.cpp"))
    ]
    torch_libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    ninja.link(package / "_torch_ops.so", [*torch_ops, cpu], [COMPLETE], torch_libraries)

    # An extension module takes Python's symbols from the interpreter that loads it.
    module = ninja.compile("csrc/python.cpp", [*python_includes(), *build_facts(compiler)])
    name = "_native" + sysconfig.get_config_var("EXT_SUFFIX")
    ninja.link(package / name, [module, cpu], [], [])

    return ninja.write()


class BuildNative(build_ext):
    """``build_ext`` by way of ninja: recompiles only what changed, headers included."""

    def run(self) -> None:
        """Builds into the source tree (editable, ``--inplace``) or into the build folder."""
        compiler = find_compiler()
        if compiler is None or not self.extensions:
            return
        editable = self.inplace or self.editable_mode
        # pip gives every editable build a new temporary folder, which would recompile everything.
        temp = (
            ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}"
            if editable
            else Path(self.build_temp)
        )
        ninja_file = write_ninja(compiler, temp.resolve(), self.package_folder().resolve())
        quiet = [] if self.distribution.verbose else ["--quiet"]
        command = [sys.executable, "-m", "ninja", *quiet, "-f", str(ninja_file)]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise SystemExit(
                "fastfusion: the native part did not compile; the compiler's messages stand above"
            )

    def package_folder(self) -> Path:
        """The folder that receives the libraries."""
        editable = self.inplace or self.editable_mode
        return (ROOT if editable else Path(self.build_lib)) / "fastfusion"

    def get_outputs(self) -> list[str]:
        """The three libraries."""
        names = [
            "libfastfusion_cpu.so",
            "_torch_ops.so",
            "_native" + sysconfig.get_config_var("EXT_SUFFIX"),
        ]
        return [str(self.package_folder() / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is copied: ninja writes the libraries where they belong."""
        return {}


def native_extensions() -> list[Extension]:
    """One entry that stands for the native part, or none, with a line that says why."""
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    if sys.platform != "linux":
        print(
            f"fastfusion: native part left out: it is built on Linux only, this is {sys.platform}"
        )
    elif find_compiler() is None:
        wanted = os.environ.get("CXX") or "g++, c++ or clang++"
        print(f"fastfusion: native part left out: no C++ compiler found ({wanted})")
    else:
        return [Extension("fastfusion._native", sources)]
    return []


if __name__ == "__main__":
    setup(
        packages=[
            *find_packages(include=["fastfusion", "fastfusion.*"]),
            *(f"fastfusion.{name}" for name in MAPPED),
        ],
        package_dir={f"fastfusion.{name}": name for name in MAPPED},
        package_data={
            "fastfusion": ["py.typed"],
            "fastfusion.models": ["*.safetensors"],
            "fastfusion.benchmarks": ["*.json"],
            "fastfusion.kernels": ["configs/*.json"],
        },
        include_package_data=False,
        ext_modules=native_extensions(),
        cmdclass={"build_ext": BuildNative},
    )
