"""Builds the package. What is static stands in pyproject.toml; here is what has to be computed.

The native part is two shared libraries, built by ninja from a build.ninja that this file writes:

    fastfusion/libfastfusion_cpu.so   the CPU kernels; knows neither torch nor Python
    fastfusion/_torch_ops.so          their registration with torch (stable ABI, torch >= 2.11)

Neither knows Python's C interface: a wheel serves every Python. Without a C++ compiler the native
part is left out and the package runs on its reference; a compiler that is there and fails is an
error. CXX, CXXFLAGS and LDFLAGS are honoured as usual; CXX may be a compiler for another machine.

Where torch is a CUDA build, or with ``build_ext --cuda``, and where nvcc is found ($NVCC first):

    fastfusion/libfastfusion_cuda.so  the CUDA kernels; no torch, CUDA's runtime linked in
    fastfusion/_torch_cuda_ops.so     their registration, loaded where torch is a CUDA build

TORCH_CUDA_ARCH_LIST names their architectures as it does for torch's own extensions ("8.0;9.0+PTX",
"Ampere", "native"); USE_CUDA=0 leaves them out. What a build left out, and why, and what it was
built with, it records in fastfusion/_build.json, for ``fastfusion.info()``.

``build_emulated`` compiles the CUDA kernels for the host, for tests: they are never installed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# GCC 12 takes the deliberately undefined operands in its own AVX-512 header for a mistake (its bug
# 105593); clang does not know this warning, and is not to complain about that.
QUIET = "-Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option"

AVX512 = f"-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c {QUIET}"

# csrc/cpu/isa/<name>.cpp is compiled with the flags of its row, slowest ISA first. A row whose file
# does not exist is left out. Scalar code is no faster at -O3, and 2.7 times as large.
ISA_FLAGS = {
    "x86_64": {
        "scalar": "-Os",
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": AVX512,
        "avx512bf16": f"{AVX512} -mavx512bf16 -mavx512vnni",
    },
    "aarch64": {
        "scalar": "-Os",
        "neon": "",
        "neonbf16": "-march=armv8.2-a+bf16+i8mm",
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
CUDA_OPS = "cuda*.cpp"  # the front ends that are not part of _torch_ops.so
OLD_LIBRARIES = "csrc/torch/old_libraries.cpp"  # for every library with torch's headers in it
TORCH_LIBRARIES = ["-ltorch", "-ltorch_cpu", "-lc10"]
TORCH_FLAGS = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]

# Binaries are not portable to Tegra (87, 110), nor from one generation to the next, of which 10 and
# 12 are two. What has no binary compiles PTX, of an old architecture: a GPU of 10.7 would not take
# that of 12.1, and no kernel uses what came after Hopper.
CUDA_ARCHS = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
PTX_ARCH = 90
# As torch.utils.cpp_extension reads them. What is older than CUDA_ARCHS is left out.
NAMED_ARCHS = {
    **{"Kepler": "3.5", "Kepler+Tesla": "3.7", "Maxwell": "5.0;5.2", "Maxwell+Tegra": "5.3"},
    **{"Pascal": "6.0;6.1", "Volta": "7.0", "Volta+Tegra": "7.2", "Turing": "7.5+PTX"},
    **{"Ampere": "8.0;8.6+PTX", "Ampere+Tegra": "8.7", "Ada": "8.9+PTX", "Hopper": "9.0+PTX"},
    **{"Blackwell": "10.0;10.3;12.0;12.1+PTX", "Blackwell+Tegra": "11.0", "Rubin": "10.7+PTX"},
}
OLDEST_NVCC = 12  # the first with C++20
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    *("-Icsrc", "--threads", "2"),
]
# Kernels see the same bytes as different types, which device code may.
EMULATED_ARCHS = (75, 90)
EMULATED_FLAGS = ["-O2", "-fno-strict-aliasing", "-DFF_CUDA_EMULATED"]
EMULATED_FLAGS += ["-Wno-unknown-pragmas", "-Wno-pass-failed"]  # loops unrolled are a GPU's matter

# Seconds of one core for a file on the average, for nvcc per architecture.
SECONDS = {"compile": 20, "nvcc": 7}

# In the package: why each part was left out.
RECORD = "_build.json"

# Folders of the repository that install below fastfusion: their own names belong to other packages.
MAPPED = ["kernels", "benchmarks"]


def find_command(variable: str, *usual: str) -> list[str] | None:
    """What an environment variable names, where it is set, otherwise the first usual command."""
    named = os.environ.get(variable)
    commands = map(shlex.split, [named] if named else usual)
    return next((command for command in commands if shutil.which(command[0])), None)


def find_compiler() -> list[str] | None:
    """The C++ compiler's command."""
    return find_command("CXX", "g++", "c++", "clang++")


def machine_of(compiler: list[str]) -> str:
    """What a compiler compiles for: another one of ISA_FLAGS, or this machine."""
    command = [*compiler, "-dumpmachine"]
    named = subprocess.run(command, capture_output=True, text=True).stdout.partition("-")[0]
    return named if named in ISA_FLAGS else platform.machine()


def find_nvcc() -> list[str] | None:
    """nvcc's command."""
    return find_command("NVCC", "nvcc", "/usr/local/cuda/bin/nvcc")


class LeftOut(Exception):
    """A part that is not built; the message says why."""


def visible_archs() -> str:
    """What TORCH_CUDA_ARCH_LIST=native stands for: the GPUs of this machine."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    if not found:
        raise LeftOut("TORCH_CUDA_ARCH_LIST is native, and nvidia-smi names no GPU")
    return ";".join(found)


def known_archs(nvcc: list[str]) -> list[int]:
    """Those of CUDA_ARCHS that it generates: before CUDA 12.8 none of Blackwell, 110 from 13.0."""
    listed = subprocess.run([*nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return [arch for arch in CUDA_ARCHS if f"compute_{arch}" in listed.split()]


def cuda_codes(nvcc: list[str]) -> list[str]:
    """What nvcc is to generate: sm_80 is machine code, compute_80 PTX, and so on."""
    wanted = ";".join(os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split())
    if not wanted:
        return [*(f"sm_{arch}" for arch in known_archs(nvcc)), f"compute_{PTX_ARCH}"]
    listed = visible_archs() if wanted == "native" else wanted
    names = ";".join(NAMED_ARCHS.get(name, name) for name in listed.split(";"))
    codes: dict[str, None] = {}
    for name in names.split(";"):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if found is None:
            raise SystemExit(f"fastfusion: TORCH_CUDA_ARCH_LIST: {name!r} is no architecture")
        major, minor, variant, ptx = found.groups()
        if int(major + minor) >= CUDA_ARCHS[0]:
            codes |= {f"sm_{major}{minor}{variant}": None}
            codes |= {f"compute_{major}{minor}{variant}": None} if ptx else {}
    if not codes:
        raise LeftOut(f"they need compute capability 7.5, TORCH_CUDA_ARCH_LIST is {wanted}")
    return list(codes)


def nvcc_version(nvcc: list[str]) -> int:
    """The first number of its release."""
    text = subprocess.run([*nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)", text)
    if found is None:
        raise SystemExit(f"fastfusion: {shlex.join(nvcc)} --version names no release: {text}")
    return int(found[1])


def cuda_sources() -> list[str]:
    """The launchers, each with its kernels."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").rglob("*.cu"))


def cuda_ops() -> list[str]:
    """Their front ends."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/torch").glob(CUDA_OPS))


def isa_flags(machine: str) -> dict[str, str]:
    """The rows of ISA_FLAGS for an architecture whose source exists."""
    rows = ISA_FLAGS.get(machine, {"scalar": "-Os"})
    return {
        isa: flags for isa, flags in rows.items() if (ROOT / f"csrc/cpu/isa/{isa}.cpp").exists()
    }


def cpu_sources(isas: dict[str, str]) -> dict[str, list[str]]:
    """The sources of the CPU kernels, each with its flags beside those that all have."""
    sources = {f"csrc/cpu/isa/{isa}.cpp": shlex.split(flags) for isa, flags in isas.items()}
    for path in (ROOT / "csrc/cpu").rglob("*.cpp"):
        if path.parent.name != "isa":
            sources[str(path.relative_to(ROOT))] = []
    return dict(sorted(sources.items()))


def quote(arguments: list[str]) -> str:
    """Arguments as ninja wants them: quoted for the shell, with ninja's own ``$`` doubled."""
    return shlex.join(arguments).replace("$", "$$")


def escape(path: Path) -> str:
    """A path as ninja wants it in a build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaFile:
    """The text of a build.ninja, gathered one shared library at a time."""

    def __init__(self, compiler: list[str], objects: Path, nvcc: list[str] | None = None) -> None:
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        self.objects = objects
        self.link_extra = [*extra, *shlex.split(os.environ.get("LDFLAGS", ""))]
        self.compile_extra = extra
        self.lines = [f"builddir = {escape(objects)}"]
        rules = {
            "compile": (compiler, "$flags -MMD -MF $out.d -c $in -o $out"),
            "link": (compiler, "$flags $in -o $out $libraries"),
        }
        if nvcc is not None:
            rules["nvcc"] = (nvcc, "$flags -MD -MF $out.d -c $in -o $out")
            rules["nvcc_link"] = (nvcc, "$flags $in -o $out")
        for name, (command, arguments) in rules.items():
            self.lines += [f"rule {name}", f"  command = {quote(command)} {arguments}"]
            if " -c " in arguments:
                self.lines += ["  depfile = $out.d", "  deps = gcc", f"  description = {name} $in"]
            else:
                self.lines.append("  description = link $out")

    def nvcc(self, target: Path, sources: list[str], codes: list[str], flags: list[str]) -> Path:
        """Adds one shared library of CUDA sources, each compiled by itself."""
        objects = []
        generate = [f"-gencode=arch=compute_{code.split('_')[1]},code={code}" for code in codes]
        for source in sources:
            objects.append(self.objects / Path(source).with_suffix(".o"))
            self.lines += [
                f"build {escape(objects[-1])}: nvcc {source}",
                f"  flags = {quote([*NVCC_FLAGS, *generate])}",
            ]
        self.lines += [
            f"build {escape(target)}: nvcc_link {' '.join(map(escape, objects))}",
            f"  flags = {quote(['-shared', '-cudart=static', *flags])}",
        ]
        return target

    def compile(self, source: str, flags: list[str], folder: str = "") -> Path:
        """Adds one object file; ``source`` is relative: no absolute path enters the binary.

        Sources that are compiled more than once have a folder for each.
        """
        target = self.objects / folder / Path(source).with_suffix(".o")
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


def torch_has_cuda(torch: Path) -> bool:
    """Whether this is a CUDA build, by the file that torch.version reads."""
    found = re.search(r"^cuda\b[^=\n]*=\s*(\S+)", (torch / "version.py").read_text(), re.MULTILINE)
    return found is not None and found[1] != "None"


def torch_flags(torch: Path) -> list[str]:
    """How files that include torch are compiled."""
    include = torch / "include"
    includes = ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    return [*TORCH_FLAGS, *includes]


def torch_libraries(torch: Path) -> list[str]:
    """What they are linked with."""
    return [f"-L{torch / 'lib'}", *TORCH_LIBRARIES]


def torch_elsewhere(ninja: NinjaFile) -> list[Path]:
    """Libraries that hold nothing but the names of torch's, to link with for another machine: the
    loader has to know the names, and finds the symbols in the torch that is there."""
    names = [flag.replace("-l", "lib") + ".so" for flag in TORCH_LIBRARIES]
    empty = ["-x", "c++", "/dev/null"]
    return [
        ninja.link(ninja.objects / "torch" / name, [], [f"-Wl,-soname,{name}"], empty)
        for name in names
    ]


def built_with(compiler: list[str]) -> str:
    """What `ff.info()` reports on the build."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    if version.returncode or not version.stdout.strip():
        raise SystemExit(f"fastfusion: {shlex.join(compiler)} --version fails: {version.stderr}")
    return f"{version.stdout.strip().splitlines()[0]}, torch {metadata.version('torch')}"


def write_ninja(
    compiler: list[str], temp: Path, package: Path, nvcc: list[str] | None, codes: list[str]
) -> Path:
    """Writes build.ninja, which puts the libraries into ``package``; returns its path."""
    torch = torch_folder()
    ninja = NinjaFile(compiler, temp, nvcc)
    machine = machine_of(compiler)

    kernels = [ninja.compile(*source) for source in cpu_sources(isa_flags(machine)).items()]
    cpu = ninja.link(
        package / "libfastfusion_cpu.so",
        kernels,
        [COMPLETE, "-Wl,-soname,libfastfusion_cpu.so"],
        [],
    )

    torch_ops = [
        ninja.compile(f"csrc/torch/{source.name}", torch_flags(torch))
        for source in sorted((ROOT / "csrc/torch").glob("*.cpp"))
        if not source.match(CUDA_OPS)
    ]
    if machine == platform.machine():
        ninja.link(package / "_torch_ops.so", [*torch_ops, cpu], [COMPLETE], torch_libraries(torch))
    else:
        inputs = [*torch_ops, cpu, *torch_elsewhere(ninja)]
        ninja.link(package / "_torch_ops.so", inputs, ["-Wl,--no-as-needed"], [])

    if nvcc is not None:
        # Nobody else is to find the runtime that is linked in.
        linker = "-soname=libfastfusion_cuda.so,--exclude-libs=ALL,--no-undefined"
        target, flags_of_link = package / "libfastfusion_cuda.so", ["-Xlinker", linker]
        cuda = ninja.nvcc(target, cuda_sources(), codes, flags_of_link)
        # Streams are in libtorch_cuda.so, which a CPU build of torch lacks: it is not linked as
        # complete. libtorch.so, kept though it defines nothing, leads to it where there is one, so
        # that what was built beside a CPU build loads beside a CUDA build.
        sources = [*cuda_ops(), OLD_LIBRARIES]
        ops = [ninja.compile(source, torch_flags(torch), "cuda") for source in sources]
        libraries = ["-Wl,--no-as-needed", *torch_libraries(torch)]
        ninja.link(package / "_torch_cuda_ops.so", [*ops, cuda], [], libraries)

    return ninja.write()


def write_emulated_ninja(compiler: list[str], folder: Path) -> Path:
    """Writes build.ninja for ``folder``/sm<arch>/_emulated_ops.so; returns its path."""
    torch = torch_folder()
    ninja = NinjaFile(compiler, folder)
    flags = [*torch_flags(torch), *EMULATED_FLAGS]
    shared = [ninja.compile(source, flags) for source in cuda_ops()]
    for source in sorted((ROOT / "csrc/emulate").glob("*.cpp")):
        shared.append(ninja.compile(f"csrc/emulate/{source.name}", EMULATED_FLAGS))
    for arch in EMULATED_ARCHS:
        flags = [*EMULATED_FLAGS, f"-DFF_ARCH={arch}", "-x", "c++"]
        kernels = [ninja.compile(source, flags, f"sm{arch}") for source in cuda_sources()]
        target = folder / f"sm{arch}/_emulated_ops.so"
        ninja.link(target, [*kernels, *shared], [COMPLETE], [*torch_libraries(torch), "-pthread"])
    return ninja.write()


def announce(file: Path, codes: list[str]) -> bool:
    """One line on what is about to be compiled, if anything; returns whether there is work."""
    command = [sys.executable, "-m", "ninja", "-n", "-f", str(file)]
    steps = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    cpp, cuda = (len(re.findall(rf"\] {rule} csrc/", steps)) for rule in ("compile", "nvcc"))
    seconds = cpp * SECONDS["compile"] + cuda * SECONDS["nvcc"] * len(codes)
    what = [f"{cpp} C++ files"] if cpp else []
    if cuda:
        what.append(
            f"{cuda} CUDA files for {', '.join(codes)} (TORCH_CUDA_ARCH_LIST names others, "
            "USE_CUDA=0 none)"
        )
    if what:
        minutes = f"about {-(-seconds // 60)} min of one core"
        print(f"fastfusion: compiling {' and '.join(what)}: {minutes}", flush=True)
    return "no work to do" not in steps


def write_record(package: Path, cpu: str | None, cuda: str | None, compiler: str = "") -> None:
    """Leaves why each part was left out, None where it was built, and with what, for
    ``fastfusion.info()``."""
    facts = {"cpu": cpu, "cuda": cuda, "built with": compiler}
    (package / RECORD).write_text(json.dumps(facts) + "\n")


def run_ninja(file: Path, verbose: bool, what: str) -> None:
    """Builds everything that a build.ninja names; a terminal sees how far it is."""
    quiet = [] if verbose or sys.stdout.isatty() else ["--quiet"]
    command = [sys.executable, "-m", "ninja", *quiet, "-f", str(file)]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(f"fastfusion: {what} did not compile; the compiler's messages stand above")


class BuildNative(build_ext):
    """``build_ext`` by way of ninja: recompiles only what changed, headers included."""

    user_options = [
        *build_ext.user_options,
        ("cuda", None, "with the CUDA kernels, also where torch is a CPU build"),
    ]
    boolean_options = [*build_ext.boolean_options, "cuda"]

    def initialize_options(self) -> None:
        """The CUDA kernels where torch can use them."""
        super().initialize_options()
        self.cuda = False

    def plan_cuda(self) -> tuple[list[str], list[str]]:
        """nvcc and what it is to generate. Raises LeftOut."""
        if os.environ.get("USE_CUDA", "").upper() in ("0", "OFF", "NO", "N", "FALSE"):
            raise LeftOut(f"USE_CUDA is {os.environ['USE_CUDA']}")
        nvcc = find_nvcc()
        if nvcc is None:
            wanted = os.environ.get("NVCC") or "nvcc, /usr/local/cuda/bin/nvcc"
            raise LeftOut(f"no CUDA compiler found ({wanted})")
        if nvcc_version(nvcc) < OLDEST_NVCC:
            raise LeftOut(f"{shlex.join(nvcc)} is older than {OLDEST_NVCC}")
        return nvcc, cuda_codes(nvcc)

    def run(self) -> None:
        """Builds into the source tree (editable, ``--inplace``) or into the build folder."""
        package = self.package_folder().resolve()
        compiler, missing = find_compiler(), native_left_out()
        if compiler is None or missing is not None:
            write_record(package, missing, missing)
            return
        nvcc, codes, no_cuda = None, list[str](), None
        if not self.cuda and not torch_has_cuda(torch_folder()):
            no_cuda = "torch was a CPU build"
        else:
            try:
                nvcc, codes = self.plan_cuda()
            except LeftOut as reason:
                if self.cuda:
                    raise SystemExit(f"fastfusion: no CUDA kernels: {reason}") from None
                print(f"fastfusion: CUDA kernels left out: {reason}")
                no_cuda = str(reason)
        # Not build_temp: pip gives every editable build a new one, and all would be compiled again.
        temp = ROOT / self.get_finalized_command("build").build_base / "native"
        file = write_ninja(compiler, temp, package, nvcc, codes)
        if announce(file, codes):
            run_ninja(file, self.distribution.verbose, "the native part")
        write_record(package, None, no_cuda, built_with(compiler))

    def package_folder(self) -> Path:
        """The folder that receives the libraries."""
        editable = self.inplace or self.editable_mode
        return (ROOT if editable else Path(self.build_lib)) / "fastfusion"

    def get_outputs(self) -> list[str]:
        """The libraries and the record."""
        names = ["libfastfusion_cpu.so", "_torch_ops.so", RECORD]
        cuda = ["libfastfusion_cuda.so", "_torch_cuda_ops.so"]
        folder = self.package_folder()
        names += [name for name in cuda if (folder / name).exists()]
        return [str(folder / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is copied: ninja writes the libraries where they belong."""
        return {}


class BuildPython(build_py):
    """``build_py``, with the record of a build that has no native part to leave it."""

    def run(self) -> None:
        """Copies the Python files."""
        super().run()
        missing = native_left_out()
        if missing is not None:
            folder = ROOT if self.editable_mode else Path(self.build_lib)
            write_record(folder / "fastfusion", missing, missing)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """The Python files and the record."""
        record = [] if native_left_out() is None else [f"{self.build_lib}/fastfusion/{RECORD}"]
        return [*super().get_outputs(include_bytecode), *record]


class Wheel(bdist_wheel):
    """``bdist_wheel`` of libraries that know no Python, for the machine of the compiler."""

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3; a platform where there is a native part."""
        python, abi, platform_tag = super().get_tag()
        compiler = find_compiler()
        if self.root_is_pure or compiler is None:
            return python, abi, platform_tag
        return "py3", "none", f"linux_{machine_of(compiler)}"


class BuildEmulated(Command):
    """``build_emulated``: the CUDA kernels for the host, one library per architecture."""

    user_options = [("folder=", None, "where they are built, default build/emulated")]

    def initialize_options(self) -> None:
        """The usual folder."""
        self.folder = "build/emulated"

    def finalize_options(self) -> None:
        """Nothing depends on other commands."""

    def run(self) -> None:
        """Compiles what changed; without a compiler nothing."""
        compiler = find_compiler()
        if sys.platform == "linux" and compiler is not None and cuda_sources():
            file = write_emulated_ninja(compiler, (ROOT / self.folder).resolve())
            run_ninja(file, self.distribution.verbose, "the emulated CUDA kernels")


def native_left_out() -> str | None:
    """Why there is no native part, None where it is built."""
    if sys.platform != "linux":
        return f"it is built on Linux only, this is {sys.platform}"
    if find_compiler() is None:
        return f"no C++ compiler found ({os.environ.get('CXX') or 'g++, c++ or clang++'})"
    return None


def native_extensions() -> list[Extension]:
    """One entry that stands for the native part, or none, with a line that says why."""
    missing = native_left_out()
    if missing is not None:
        print(f"fastfusion: native part left out: {missing}")
        return []
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    return [Extension("fastfusion._torch_ops", sources)]


if __name__ == "__main__":
    setup(
        packages=[
            *find_packages(include=["fastfusion", "fastfusion.*"]),
            *(
                f"fastfusion.{name}"
                for top in MAPPED
                for name in (top, *(f"{top}.{room}" for room in find_packages(top)))
            ),
        ],
        package_dir={f"fastfusion.{name}": name for name in MAPPED},
        package_data={
            "fastfusion": ["py.typed", "*.html"],
            "": ["*.safetensors", "*.png"],
            "fastfusion.benchmarks": ["*.json"],
            "fastfusion.kernels.host": ["configs/*.json"],
        },
        include_package_data=False,
        ext_modules=native_extensions(),
        cmdclass={
            "bdist_wheel": Wheel,
            "build_py": BuildPython,
            "build_ext": BuildNative,
            "build_emulated": BuildEmulated,
        },
    )
