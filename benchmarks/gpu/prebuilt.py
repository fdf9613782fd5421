"""``make gpu-prebuild``: what a short run on a GPU need not compile, made on a machine without one.

A folder with the CUDA kernels for one architecture, with Triton's cache for the kernels that the
cells of `make gpu` and its smoke test launch, and with what both were made by and from.
``make gpu PREBUILT=DIR`` takes from it what fits the machine, and says what it takes or why not.

To use one comes before fastfusion is installed, so this file stands alone then: the standard
library only.
"""

import argparse
import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("libfastfusion_cuda.so", "_torch_cuda_ops.so")
# What decides about the libraries, and what about the kernels in Triton's cache.
CUDA_SOURCES = ("setup.py", "csrc/*.h", "csrc/torch/*.h", "csrc/torch/cuda*.cpp", "csrc/cuda/**/*")
TRITON_SOURCES = ("kernels/**/*.py",)
FACTS = "prebuilt.json"
SECONDS = 20.0  # that the driver's own tool may take


@dataclass(frozen=True)
class Facts:
    """A machine and its sources: where pieces were made, or where they are to be used.

    Attributes:
        arch: 90 for sm_90, 0 where there is no GPU.
        cuda: that of the compiler, or the newest that the driver takes, such as "13.0".
        torch, triton: versions, "" where they are not installed.
        python: such as "3.12": Triton's own library, which its keys hold, is another for each.
        cuda_sources, triton_sources: their hashes.
    """

    arch: int
    cuda: str
    torch: str
    triton: str
    python: str
    cuda_sources: str
    triton_sources: str


def hash_of(patterns: Iterable[str]) -> str:
    """The hash of files of the checkout, their names included."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        if path.is_file():
            text = path.read_bytes()
            digest.update(f"{path.relative_to(ROOT)} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def facts(arch: int, cuda: str) -> Facts:
    """Those of this machine."""
    return Facts(
        arch=arch,
        cuda=cuda,
        torch=_version("torch"),
        triton=_version("triton"),
        python="{}.{}".format(*sys.version_info),
        cuda_sources=hash_of(CUDA_SOURCES),
        triton_sources=hash_of(TRITON_SOURCES),
    )


def here() -> Facts:
    """Those of a machine with a GPU; 0 and "" for what its driver does not say."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    found = re.match(r"(\d+)\.(\d)", said)
    number = ctypes.c_int(0)
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    cuda = f"{number.value // 1000}.{number.value % 1000 // 10}" if number.value else ""
    return facts(int(found[1] + found[2]) if found else 0, cuda)


# ---- using


def libraries_refused(made: Facts, here: Facts) -> str | None:
    """Why the CUDA libraries cannot be used, None where they can.

    torch's version is none of the reasons: they know its stable ABI alone, that of the oldest torch
    that fastfusion takes.
    """
    if made.arch != here.arch:
        return f"they are for sm_{made.arch}, and the GPU is {here.arch or 'unknown'}"
    if made.cuda_sources != here.cuda_sources:
        return "they are from other sources"
    if not here.torch:
        return "torch is not installed"
    if int(made.cuda.split(".")[0]) > int(here.cuda.split(".")[0] or 0):
        return f"they are of CUDA {made.cuda}, and the driver takes {here.cuda or 'none'}"
    return None


def cache_refused(made: Facts, here: Facts) -> str | None:
    """Why Triton would find nothing in the cache, None where it does."""
    if made.arch != here.arch:
        return f"it is for sm_{made.arch}, and the GPU is {here.arch or 'unknown'}"
    if (made.triton, made.python) != (here.triton, here.python):
        return (
            f"it is of Triton {made.triton} on Python {made.python}, and Triton's keys are others "
            f"with {here.triton or 'none'} on {here.python}"
        )
    if os.environ.get("TRITON_CACHE_DIR"):
        return "TRITON_CACHE_DIR names another one"
    return None


def settle(cache: Path) -> None:
    """Makes a cache of Triton's valid where it lies: it lists the files of a kernel by their whole
    paths, and a kernel of which one is missing is compiled again."""
    for group in cache.resolve().rglob("__grp__*.json"):
        listed = json.loads(group.read_text())
        places = {name: group.with_name(name) for name in listed["child_paths"]}
        listed["child_paths"] = {name: str(at) for name, at in places.items() if at.exists()}
        group.write_text(json.dumps(listed))


def use(folder: Path, here: Facts, package: Path) -> tuple[dict[str, str], list[str]]:
    """Puts what fits into the package; variables for what follows, and what there is to say."""
    try:
        made = Facts(**json.loads((folder / FACTS).read_text()))
    except (OSError, TypeError, ValueError) as error:
        reason = str(error) or type(error).__name__
        return {}, [f"nothing used: {folder} holds no prebuilt pieces ({reason})"]
    variables, said = {}, []
    why = libraries_refused(made, here)
    if why is None:
        for name in LIBRARIES:
            shutil.copy2(folder / "cuda" / name, package / name)
        variables["USE_CUDA"] = "0"  # setup.py: they are not to be compiled
        said.append(
            f"CUDA kernels used: sm_{made.arch}, CUDA {made.cuda}, for the stable ABI of torch "
            f"(here {here.torch}, there {made.torch})"
        )
    else:
        said.append(f"CUDA kernels refused: {why}; they are compiled here")
    why = cache_refused(made, here)
    if why is None:
        settle(folder / "triton")
        variables["TRITON_CACHE_DIR"] = str((folder / "triton").resolve())
        same = made.triton_sources == here.triton_sources
        said.append(
            f"Triton's cache used: Triton {made.triton}, Python {made.python}"
            + ("" if same else "; the kernels have changed since, and what did is compiled here")
        )
    else:
        said.append(f"Triton's cache refused: {why}; kernels are compiled as they are called")
    return variables, said


# ---- making


def nvcc_version() -> str:
    """Such as "13.0", of the compiler that setup.py takes."""
    usual = "nvcc" if shutil.which("nvcc") else "/usr/local/cuda/bin/nvcc"
    command = [*shlex.split(os.environ.get("NVCC") or usual), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None:
        raise SystemExit(f"make gpu-prebuild: {command[0]} names no release")
    return found[1]


def make(folder: Path, arch: int, jobs: int, package: Path) -> None:
    """Fills a folder: the libraries that lie in the package, built for this architecture alone, and
    Triton's cache."""
    from . import prebuilt_triton

    if not (ROOT / "setup.py").exists():
        raise SystemExit("make gpu-prebuild: fastfusion is not installed from a checkout")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "cuda").mkdir(parents=True)
    for name in LIBRARIES:
        shutil.copy2(package / name, folder / "cuda" / name)
    count = prebuilt_triton.fill(folder / "triton", arch, jobs)
    made = facts(arch, nvcc_version())
    (folder / FACTS).write_text(json.dumps(asdict(made), indent=1) + "\n")
    print(f"{folder}: CUDA kernels for sm_{arch}, {count} of Triton's")


def main(argv: list[str] | None = None) -> int:
    """`make`, or `use`, which prints what a shell is to evaluate."""
    parser = argparse.ArgumentParser(prog="prebuilt", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("make", "use"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", type=int, help="such as 90")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile, default 2")
    options = parser.parse_args(argv)
    package = ROOT / "fastfusion"
    if options.what == "make":
        if options.arch is None:
            parser.error("make needs --arch")
        make(options.folder, options.arch, options.jobs, package)
        return 0
    variables, said = use(options.folder, here(), package)
    for line in said:
        print(f"prebuilt: {line}", file=sys.stderr)
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
