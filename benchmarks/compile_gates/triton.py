"""``make kernels``: do the Triton kernels compile well for every architecture? Needs no GPU.

Compiles what the launchers launch (`triton_cases.py`) to machine code, and fails on what can be
told from it: in 16-bit kernels a spilled register or a missing tensor-core instruction (Hopper's
own, wgmma, from 64 rows on), in all of them more shared memory than a block may have, and layouts
that Triton gets wrong. float32 kernels may spill, and are listed. The FLOPs of tensor cores for
each instruction (`tensor_core.py`) are listed alike.
"""

import argparse
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Triton's launchers are compiled to machine code here, not run by its interpreter; and Triton 3.9
# warns in every process that 3.10 will no longer fuse multiplications and additions by itself.
os.environ.pop("TRITON_INTERPRET", None)
warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")

import triton  # noqa: E402

from ..common.command import Parser, UsageError  # noqa: E402
from .triton_builds import HALF, SHARED_LIMITS, Build, Row, compile_build, problems, record, unique  # noqa: E402
from .triton_cases import DTYPES, cases  # noqa: E402

ARCHS = tuple(SHARED_LIMITS)
QUICK_ARCHS = (80, 90, 100)
COLUMNS = (
    *("kernel", "variant", "dtype", "size", "arch", "tile"),
    *("registers", "spilled bytes", "shared KB", "tensor-core instructions", "wgmma"),
    "tensor-core FLOPs per instruction",
)


def _among(name: str, given: str | None, known: Iterable[Any], default: Iterable[Any]) -> list[Any]:
    """The values of a list with commas, each of which has to be known."""
    by_name = {str(value): value for value in known}
    if given is None:
        return list(default)
    unknown = [part for part in given.split(",") if part not in by_name]
    if unknown:
        raise UsageError(f"{name}: there is no {', '.join(unknown)}; known: {', '.join(by_name)}")
    return [by_name[part] for part in given.split(",")]


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, checked.

    Raises:
        UsageError: an option or a value that does not exist.
    """
    prog = "python -m fastfusion.benchmarks.compile_gates.triton"
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about 200 builds of some 3,000")
    parser.add_argument("--arch", metavar="LIST", help="such as 80,90; default all, or 3 if quick")
    parser.add_argument("--dtype", metavar="LIST", help=f"of {','.join(DTYPES)}; default all")
    parser.add_argument("--size", metavar="LIST", help="head dims or widths of rows; default all")
    parser.add_argument("--kernel", metavar="TEXT", help="only kernels with TEXT in their name")
    parser.add_argument("--variant", metavar="LIST", help="such as plain,heaviest; default all")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile, default 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to FILE")
    options = parser.parse_args(argv)
    archs = QUICK_ARCHS if options.quick else ARCHS
    options.archs = _among("--arch", options.arch, ARCHS, archs)
    options.dtypes = _among("--dtype", options.dtype, DTYPES, DTYPES)
    if options.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {options.jobs}")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise UsageError(f"--json: there is no folder {options.json.parent}")
    return options


def plan(options: argparse.Namespace) -> list[Build]:
    """The builds that the options ask for, each once.

    Raises:
        UsageError: there are none.
    """
    sizes = None if options.size is None else options.size.split(",")
    variants = None if options.variant is None else options.variant.split(",")
    builds: list[Build] = []
    for case in cases(options.quick):
        if (
            case.dtype in options.dtypes
            and (sizes is None or str(case.size) in sizes)
            and (variants is None or case.variant in variants)
        ):
            for arch in options.archs:
                builds += record(case.call, arch, case.variant, case.dtype, case.size)
    chosen = [b for b in unique(builds) if (options.kernel or "") in b.kind.kernel]
    if not chosen:
        raise UsageError("no kernel is left to compile")
    return chosen


def _ignore_interrupts() -> None:
    """In a worker: the main process answers Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")


def compile_all(builds: list[Build], jobs: int) -> Iterator[Row]:
    """The rows, as they are finished, compiled in `jobs` processes."""
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _ignore_interrupts)
    futures = {pool.submit(compile_build, build): build for build in builds}
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for process in list(pool._processes.values()):
            process.terminate()
        pool.shutdown(cancel_futures=True)


def table(rows: list[Row]) -> str:
    """One line per build."""
    head = (*COLUMNS[:6], "regs", "spill", "KB", "tc", "wgmma", "FLOPs", "s")
    lines = [head, *(tuple(map(str, (*cells(row), row.seconds))) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = 6  # columns of words, flush left
    return "\n".join(
        "  ".join(
            text.ljust(width) if index < words else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def cells(row: Row) -> tuple[Any, ...]:
    """The columns of a build, as named in COLUMNS; what is not known is null."""
    kind = row.kind
    return (
        *(kind.kernel, kind.variant, kind.dtype, kind.size, f"sm_{kind.arch}", kind.tile),
        *(row.registers, row.spilled, row.shared_kb, row.tensor_core, int(row.wgmma)),
        None if row.flops is None else round(row.flops),
    )


def name(row: Row) -> str:
    return " ".join(map(str, cells(row)[:6]))


def summary(rows: list[Row], seconds: float) -> str:
    """Violations first, then by kernel the worst of each number."""
    lines = [f"FAILED  {name(row)}: {'; '.join(problems(row))}" for row in rows if problems(row)]
    lines.append(f"{'kernel':<35}  builds  most registers  most spilled: 16-bit  dropout  float32")
    for kernel, group in groupby(rows, key=lambda row: row.kind.kernel):
        own = list(group)
        half = [row for row in own if row.kind.dtype in HALF]
        spills = (
            [row.spilled for row in half if not row.kind.dropout],
            [row.spilled for row in half if row.kind.dropout],
            [row.spilled for row in own if row.kind.dtype not in HALF],
        )
        worst = [str(max(some)) if some else "-" for some in spills]
        lines.append(
            f"{kernel:<35}  {len(own):6}  {max(row.registers for row in own):14}"
            f"  {worst[0]:>20}  {worst[1]:>7}  {worst[2]:>7}"
        )
    failed = sum(bool(problems(row)) for row in rows)
    lines.append(
        f"{len(rows)} builds in {seconds:.0f} s ({sum(row.seconds for row in rows):.0f} s of "
        f"compiling), {failed} failed; Triton {triton.__version__}"
    )
    return "\n".join(lines)


def write_json(path: Path, rows: list[Row]) -> None:
    """One line per build and no times, so that a difference shows what changed."""
    lines = ",\n".join(json.dumps(cells(row)) for row in rows)
    head = json.dumps({"triton": triton.__version__, "columns": COLUMNS})
    path.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')


def run(options: argparse.Namespace) -> int:
    """Compiles, prints, and returns 1 where a kernel must not be shipped."""
    start = time.perf_counter()
    builds = plan(options)
    rows: list[Row] = []
    interrupted = False
    try:
        for row in compile_all(builds, options.jobs):
            rows.append(row)
            if sys.stderr.isatty():
                print(f"\r\033[K{len(rows)}/{len(builds)} {name(row)}", end="", file=sys.stderr)
    except KeyboardInterrupt:
        interrupted = True
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    order = {build.kind: index for index, build in enumerate(builds)}
    rows.sort(key=lambda row: (row.kind.kernel, order[row.kind]))
    print(table(rows))
    print(f"\n{summary(rows, time.perf_counter() - start)}")
    if interrupted:
        print(f"interrupted: {len(builds) - len(rows)} of the builds are missing", file=sys.stderr)
        return 130
    if options.json is not None:
        write_json(options.json, rows)
    return int(any(problems(row) for row in rows))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line ``argv`` and returns the exit code."""
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        print(f"make kernels: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
