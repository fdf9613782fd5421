"""Runs the CPU kernels on processors that are not this one: `make emulate`.

Compiles them with tests/native/check_kernels.cpp for x86-64 and for AArch64, with the flags of
setup.py, and runs the result in QEMU. QEMU's x86-64 has AVX2 and no AVX-512, so that an instruction
of the wider set in narrower code, or before the choice, would stop it. Before come the checks of
what the kernels are made of, one program for each instruction set.
"""

import functools
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Architecture: compiler, emulator, and its processors, each beside the best set that must run.
TARGETS = {
    "x86_64": ("x86_64-linux-gnu-g++", "qemu-x86_64", {"max": "avx2", "Nehalem": "scalar"}),
    "aarch64": (
        "aarch64-linux-gnu-g++", "qemu-aarch64", {"max": "neonbf16", "cortex-a57": "neon"},
    ),
}  # fmt: skip


# tests/native/check_<name>.cpp, of one instruction set each.
CHECKS = ("vector", "parts")


@functools.cache
def flags() -> dict[str, Any]:
    """The names of setup.py."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="flags")


def build_check(name: str, compiler: list[str], architecture: str, isa: str, folder: Path) -> Path:
    """A check of what the kernels of an instruction set are made of. Not optimised: an instruction
    means the same, and it compiles in a third of the time."""
    own = [*shlex.split(flags()["ISA_FLAGS"][architecture][isa]), "-O0"]
    defines = [f'-DFF_SIMD="cpu/isa/{isa}.h"', *["-DFF_BFLOAT16"] * isa.endswith("bf16")]
    source = str(ROOT / f"tests/native/check_{name}.cpp")
    program = folder / f"check_{name}_{isa}"
    command = [*compiler, *flags()["COMPILE_FLAGS"], *own, *defines, source, "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True)
    return program


def find(*names: str) -> str:
    """The first of some commands that is there."""
    for name in names:
        if found := shutil.which(name):
            return found
    raise SystemExit(
        f"make emulate needs {names[0]} (Debian: g++-aarch64-linux-gnu and qemu-user-static)"
    )


def build(architecture: str, compiler: str) -> Path:
    """The check, linked with the kernels of every instruction set of the architecture."""
    folder = ROOT / "build/emulated" / architecture
    folder.mkdir(parents=True, exist_ok=True)
    rows = flags()["ISA_FLAGS"][architecture]
    sources = {**flags()["cpu_sources"](rows), "tests/native/check_kernels.cpp": []}

    def compile_one(item: tuple[str, list[str]]) -> Path:
        source, own = item
        target = folder / f"{Path(source).stem}.o"
        command = [compiler, *flags()["COMPILE_FLAGS"], *own, "-c", source, "-o", str(target)]
        subprocess.run(command, cwd=ROOT, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = [str(target) for target in pool.map(compile_one, sources.items())]
    program = folder / "check_kernels"
    subprocess.run([compiler, "-static", *objects, "-o", str(program)], check=True)
    return program


def sets_until(architecture: str, best: str) -> list[str]:
    """The instruction sets of a processor, of which one is the best."""
    sets = list(flags()["ISA_FLAGS"][architecture])
    return sets[: sets.index(best) + 1]


def run(command: list[str], wanted: list[str], about: str) -> bool:
    """Whether a program says what is wanted; prints what it says."""
    result = subprocess.run(command, capture_output=True, text=True)
    right = result.returncode == 0 and all(text in result.stdout for text in wanted)
    print(f"{about}: {'right' if right else 'FAILED'}")
    print("  " + result.stdout.strip().replace("\n", "\n  "), flush=True)
    if not right:
        print(result.stderr, end="")
    return right


def main() -> int:
    """1 where a kernel is wrong, or a set that a processor has was not run."""
    failed = False
    for architecture, (cross, emulator, processors) in TARGETS.items():
        native = architecture == platform.machine()
        compiler = find("g++") if native else find(cross)
        program = build(architecture, compiler)
        qemu = find(emulator, f"{emulator}-static")
        checked = {isa for best in processors.values() for isa in sets_until(architecture, best)}
        checks = {
            isa: [
                build_check(name, [compiler, "-static"], architecture, isa, program.parent)
                for name in CHECKS
            ]
            for isa in checked
        }
        for cpu, best in processors.items():
            prefix, about = [qemu, "-cpu", cpu], f"{architecture}, emulated {cpu}"
            for isa in sets_until(architecture, best):
                for check in checks[isa]:
                    failed |= not run([*prefix, str(check)], ["right"], f"{about}, {check.stem}")
            failed |= not run([*prefix, str(program)], [f"{best}: right"], about)
        if native:
            failed |= not run([str(program)], ["scalar: right"], f"{architecture}, this machine")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
