"""The nvcc part of ``make kernels``: do the CUDA kernels compile well for every architecture?

Compiles each csrc/cuda/*/*.cu to machine code with setup.py's flags, and fails on what can be told
from it: a spilled register or a load from local memory in any kernel; in 16-bit ones no tensor-core
instruction, or from Ampere on no asynchronous copy of 16 bytes. The FLOPs of tensor cores for each
instruction (`tensor_core.py`) are listed. Shared memory is the launcher's to choose; the emulator
of the tests holds each launch to the limit of its architecture.
"""

import argparse
import json
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .tensor_core import flops_per_instruction

ROOT = Path(__file__).resolve().parents[2]
QUICK_ARCHS = (75, 80, 90)
# Kernels of these names add partial results up: they multiply nothing and load nothing twice.
WITHOUT_PRODUCTS = ("combine",)
# The last argument of projections says whether their operands are aligned.
UNALIGNED = re.compile(r"^project<.*false>$")
# Turing has no bfloat16, nor the shared memory for some tiles, and GPUs before Ada no 8-bit floats:
# these kernels are empty there.
EMPTY_REGISTERS = 8
COLUMNS = (
    *("kernel", "arch", "registers", "spilled bytes"),
    *("tensor-core instructions", "asynchronous copies", "local loads"),
    "tensor-core FLOPs per instruction",
)
UNKNOWN = -1  # without a disassembler

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_INSTRUCTIONS = {
    "tensor_core": re.compile(r"\bHMMA\b"),
    "copies": re.compile(r"\bLDGSTS\.\S*128\b"),
    "local_loads": re.compile(r"\bLDL\b"),
}


@dataclass(frozen=True)
class Row:
    """A compiled kernel; spilled bytes are those stored and those loaded."""

    kernel: str
    arch: int
    registers: int
    spilled: int
    tensor_core: int = UNKNOWN
    copies: int = UNKNOWN
    local_loads: int = UNKNOWN
    flops: int = UNKNOWN

    @property
    def cells(self) -> tuple[Any, ...]:
        """The columns, as named in COLUMNS; what is not known is null."""
        counts = (self.tensor_core, self.copies, self.local_loads, self.flops)
        known = (None if n == UNKNOWN else n for n in counts)
        return (self.kernel, f"sm_{self.arch}", self.registers, self.spilled, *known)


def problems(row: Row) -> list[str]:
    """What keeps a kernel from being shipped."""
    found = []
    is_empty = row.registers <= EMPTY_REGISTERS and row.arch < (
        89 if "Float8" in row.kernel else 80
    )
    if row.spilled:
        found.append(f"spills {row.spilled} bytes")
    if row.local_loads > 0:
        found.append(f"{row.local_loads} loads from local memory")
    if (
        re.search(r"\b(?:Half|BFloat16)\b", row.kernel)
        and not row.kernel.startswith(WITHOUT_PRODUCTS)
        and not is_empty
    ):
        if row.tensor_core == 0:
            found.append("no tensor-core instruction")
        if row.copies == 0 and row.arch >= 80 and not UNALIGNED.search(row.kernel):
            found.append("no asynchronous copy of 16 bytes")
    return found


def short_name(demangled: str) -> str:
    """Function and template arguments, without namespaces, result and parameters."""
    name = re.sub(r"\(anonymous namespace\)::", "", demangled).removeprefix("void ")
    name = re.sub(r"\b[a-z]\w*::", "", name.partition("(")[0])
    return name.replace("> >", ">>")


def parse_report(report: str) -> dict[str, tuple[int, int]]:
    """Mangled name -> registers and spilled bytes, from what ``ptxas -v`` says."""
    parts = _ENTRY.split(report)
    found = {}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        registers, spills = _REGISTERS.search(text), _SPILLS.search(text)
        assert registers is not None and spills is not None, text
        found[name] = (int(registers[1]), sum(map(int, spills.groups())))
    return found


def parse_code(code: str) -> dict[str, dict[str, int]]:
    """Mangled name -> how many of each instruction, and the FLOPs of tensor cores for each of all,
    from what ``cuobjdump -sass`` says."""
    parts = re.split(r"^\s*Function : (\w+)$", code, flags=re.MULTILINE)
    found = {}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        counts = {kind: len(pattern.findall(text)) for kind, pattern in _INSTRUCTIONS.items()}
        flops = flops_per_instruction(text)
        found[name] = counts | {"flops": UNKNOWN if flops is None else round(flops)}
    return found


def find_disassembler() -> str | None:
    """cuobjdump of the PATH, of CUDA's usual folder, or the one that Triton brings along."""
    spec = find_spec("triton")
    folders = ["/usr/local/cuda/bin"]
    if spec is not None and spec.submodule_search_locations:
        folders.append(f"{spec.submodule_search_locations[0]}/backends/nvidia/bin")
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=":".join(folders))


def output_of(command: list[str]) -> str:
    """What a command says; its error where it fails.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def demangle(names: list[str]) -> list[str]:
    """By c++filt, which comes with every linker; the names as they are without it."""
    if not names or shutil.which("c++filt") is None:
        return names
    return output_of(["c++filt", *names]).splitlines()


def compile_source(nvcc: list[str], source: str, arch: int, disassembler: str | None) -> list[Row]:
    """The kernels of a file for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/kernels.cubin"
        command = [*nvcc, f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", source, "-o", cubin]
        report = parse_report(output_of(command))
        code = parse_code(output_of([disassembler, "-sass", cubin])) if disassembler else {}
    rows = []
    for mangled, demangled in zip(report, demangle(list(report)), strict=True):
        rows.append(Row(short_name(demangled), arch, *report[mangled], **code.get(mangled, {})))
    return rows


def compile_all(
    nvcc: list[str], sources: list[str], archs: list[int], disassembler: str | None, jobs: int
) -> Iterator[list[Row]]:
    """The rows of each source and architecture, in order; `jobs` at a time."""
    pairs = [(source, arch) for source in sources for arch in archs]
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda p: compile_source(nvcc, p[0], p[1], disassembler), pairs)


def table(rows: list[Row]) -> str:
    """One line per kernel and architecture."""
    head = ("kernel", "arch", "regs", "spill", "HMMA", "LDGSTS", "LDL", "FLOPs")
    lines = [head, *(tuple("-" if c is None else str(c) for c in row.cells) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if index < 2 else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def summary(rows: list[Row], seconds: float, nvcc: str) -> str:
    """Violations first."""
    failed = [row for row in rows if problems(row)]
    lines = [f"FAILED  {row.kernel} sm_{row.arch}: {'; '.join(problems(row))}" for row in failed]
    most = max(row.registers for row in rows)
    lines.append(
        f"{len(rows)} builds of {len({row.kernel for row in rows})} CUDA kernels in {seconds:.0f} s"
        f", at most {most} registers, {len(failed)} failed; nvcc {nvcc}"
    )
    return "\n".join(lines)


def write_json(path: Path, rows: list[Row], nvcc: str) -> None:
    """One line per build and no times, so that a difference shows what changed."""
    lines = ",\n".join(json.dumps(row.cells) for row in rows)
    head = json.dumps({"nvcc": nvcc, "columns": COLUMNS})
    path.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')


def main(argv: list[str] | None = None) -> int:
    """Compiles, prints, and returns 1 where a kernel must not be shipped."""
    parser = argparse.ArgumentParser(prog="python -m fastfusion.benchmarks.compile_gates.cuda")
    parser.add_argument("--quick", action="store_true", help="three architectures of eleven")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only files with TEXT in them")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time, default 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to FILE")
    options = parser.parse_args(argv)
    if not (ROOT / "csrc/cuda").is_dir():
        print("CUDA kernels left out: their sources are not installed; run in a checkout")
        return 0
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="flags")
    nvcc = build["find_nvcc"]()
    if nvcc is None:
        print("CUDA kernels left out: nvcc was not found")
        return 0
    sources = [source for source in build["cuda_sources"]() if options.kernel in source]
    archs = [a for a in build["known_archs"](nvcc) if not options.quick or a in QUICK_ARCHS]
    disassembler = find_disassembler()
    start = time.perf_counter()
    version = re.search(r"release [\d.]+, V([\d.]+)", output_of([*nvcc, "--version"]))
    command = [*nvcc, *build["NVCC_FLAGS"]]
    rows: list[Row] = []
    for found in compile_all(command, sources, archs, disassembler, options.jobs):
        rows += found
    if not rows:
        print(f"no CUDA kernel in a file with {options.kernel!r} in its name", file=sys.stderr)
        return 2
    rows.sort(key=lambda row: (row.kernel, row.arch))
    print(table(rows))
    if disassembler is None:
        print("instructions are not counted: cuobjdump was not found")
    seconds, name = time.perf_counter() - start, version[1] if version else "unknown"
    print(f"\n{summary(rows, seconds, name)}")
    if options.json is not None:
        write_json(options.json, rows, name)
    return int(any(problems(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
