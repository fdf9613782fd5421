"""Compiles what the Triton launchers launch, for GPUs that are not there.

The launchers run on CPU tensors under a driver that only names a target. Triton binds and
specialises their arguments as on a device and then asks its cache hook, which keeps the description
of the build and declines it; a description compiles later, in any process.
"""

import contextlib
import io
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from fastfusion.kernels.device.score_policy import DROPOUT
from fastfusion.kernels.host import tiles

from .tensor_core import flops_per_instruction

# Shared memory that a block may have, in KB, by architecture.
SHARED_LIMITS = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227}
# Columns of tensor memory that a block may have; Triton refuses to launch a kernel with more.
TENSOR_MEMORY_LIMIT = 512
# The ten rounds of Philox in between cost a few registers, and little beside their own time.
# Tiles of sm_90 are chosen by time, and there 20 registers that wait in local memory cost less than
# a smaller tile: forward and backward of 256 queries over 77 keys, 160 wide, take 43 us and not 52.
SPILL_LIMIT, TIMED_SPILL_LIMIT, DROPOUT_SPILL_LIMIT = 0, 80, 96
HALF = ("bfloat16", "float16")

# What the committed tables call the modules of kernels, so that a new table shows what changed and
# not where it lies.
TABLE_NAMES = {
    "attention.forward": "attention",
    "attention.backward": "attention_backward",
    "attention.backward_short_side": "attention_backward_short",
    "attention.positions": "attention_positions",
    "attention.sinks": "attention_sinks",
    "attention.tma": "attention_tma",
    "bidirectional.forward": "bidirectional",
    "bidirectional.backward": "bidirectional_backward",
    "bidirectional.backward_on_chip": "bidirectional_shared",
    "varlen.forward": "varlen",
    "varlen.backward": "varlen",
    "layer.linear": "linear",
    "layer.norm": "norm",
}

# The operand of a product in registers: its shape, which of the two it is, elements side by side.
_OPERAND = re.compile(
    r"tensor<(\d+)x(\d+)x\w+, #ttg\.dot_op<\{opIdx = ([01]), parent = #\w+, kWidth = (\d+)\}>>"
)
_TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
# What launchers call the sizes of a tile, in the order in which a table shows them.
_SIZES = ("OWN", "LOOP", "ROWS", "FEATURES", "INNER", "PARTS", "COLUMNS")


@dataclass(frozen=True)
class Kind:
    """What is built.

    Attributes:
        kernel: file and function.
        variant: the case that launched it first.
        dtype: of the tensors.
        size: head dim, or the width of a row.
        arch: 80 for sm_80, and so on.
        tile: sizes, warps, stages.
        dropout: whether it draws random numbers.
        dots: whether it multiplies matrices.
        own: rows of a program, 0 where they are not called so.
        warps: of a program.
    """

    kernel: str
    variant: str
    dtype: str
    size: int
    arch: int
    tile: str
    dropout: bool = False
    dots: bool = True
    own: int = 0
    warps: int = 4


@dataclass(frozen=True)
class Build:
    """A kernel to compile: where its function is, and Triton's own description of the call."""

    kind: Kind
    module: str
    function: str
    description: str


@dataclass(frozen=True)
class Row:
    """A compiled kernel, or why there is none. Spilled bytes are ptxas's "spill stores"; FLOPs are
    those of tensor cores for each instruction (`tensor_core.py`), None where they are not known;
    faults are what `layout_faults` found."""

    kind: Kind
    registers: int = 0
    spilled: int = 0
    shared_kb: float = 0.0
    tensor_memory: int = 0
    tensor_core: int = 0
    wgmma: bool = False
    flops: float | None = None
    faults: tuple[str, ...] = ()
    seconds: float = 0.0
    error: str = ""


def problems(row: Row) -> list[str]:
    """What keeps a kernel from being shipped; float32 may spill."""
    kind = row.kind
    if row.error:
        return [row.error]
    found = []
    allowed = TIMED_SPILL_LIMIT if kind.arch == 90 else SPILL_LIMIT
    if kind.dropout:
        allowed = DROPOUT_SPILL_LIMIT
    if kind.dtype in HALF and row.spilled > allowed:
        found.append(f"spills {row.spilled} bytes, allowed {allowed}")
    if kind.dtype in HALF and kind.dots and not row.tensor_core:
        found.append("no tensor-core instruction")
    # Its own instructions have twice the rate of the older ones on Hopper; they take 64 rows.
    if kind.dtype in HALF and kind.dots and kind.arch == 90 and kind.own >= 64 and not row.wgmma:
        found.append(f"no wgmma for {kind.own} rows")
    if row.shared_kb > SHARED_LIMITS[kind.arch]:
        found.append(f"{row.shared_kb} KB of shared memory, limit {SHARED_LIMITS[kind.arch]}")
    if row.tensor_memory > TENSOR_MEMORY_LIMIT:
        found.append(f"{row.tensor_memory} columns of tensor memory, limit {TENSOR_MEMORY_LIMIT}")
    return [*found, *row.faults]


def layout_faults(ttgir: str) -> tuple[str, ...]:
    """Layouts that Triton compiles to wrong code.

    Before 3.8 its kWidth follows the narrowest load that an operand comes from, a mask's byte among
    them, and may ask for more elements than a product sums over. And wgmma with a left operand that
    lies transposed in shared memory reads past its end (256 rows; 3.6 on an H200).
    """
    found: dict[str, None] = {}
    for rows, columns, index, k_width in _OPERAND.findall(ttgir):
        inner = int(rows if index == "1" else columns)
        if inner < 4 * int(k_width):
            found[f"a product over {inner} with kWidth {k_width}"] = None
    transposed = set(re.findall(r"(%\w+) = ttg\.memdesc_trans", ttgir))
    if transposed.intersection(re.findall(r"ttng\.warp_group_dot (%\w+),", ttgir)):
        found["a transposed left operand of wgmma"] = None
    return tuple(found)


class _Driver:
    """A driver without a device; the index of a device is its architecture, which parts caches."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def target(arch: int) -> Iterator[None]:
    """In it Triton and the choice of tiles believe in a GPU; Triton goes on to do so afterwards."""
    capability = tiles.capability
    setattr(tiles, "capability", lambda device: divmod(arch, 10))  # noqa: B010
    tiles.forget()
    triton.runtime.driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        setattr(tiles, "capability", capability)  # noqa: B010
        tiles.forget()


@contextlib.contextmanager
def declined(keep: Callable[..., bool] = lambda **_: True) -> Iterator[None]:
    """In it Triton compiles and runs no kernel that it has not compiled before; `keep` is Triton's
    cache hook, which is told of each and says True."""
    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = keep
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def record(call: Callable[[], Any], arch: int, variant: str, dtype: str, size: int) -> list[Build]:
    """The kernels that `call` launches on an architecture; none of them runs."""
    builds: list[Build] = []

    def keep(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        names = fn.jit_function.arg_names
        constants = {names[at[0]]: v for at, v in compile["constants"].items() if len(at) == 1}
        sizes = [str(constants[name]) for name in _SIZES if name in constants]
        warps, stages = compile["num_warps"], compile["num_stages"]
        file = TABLE_NAMES[fn.module.removeprefix("fastfusion.kernels.")]
        kind = Kind(
            kernel=f"{file}.{fn.name.removesuffix('_kernel').lstrip('_')}",
            variant=variant,
            dtype=dtype,
            size=size,
            arch=arch,
            tile=f"{'x'.join(sizes) or '-'} {warps}w {stages}s",
            dropout=bool(constants.get("KINDS", 0) & DROPOUT.value),
            dots="PRECISION" in constants,
            own=constants.get("OWN", 0),
            warps=warps,
        )
        builds.append(Build(kind, fn.module, fn.name, compile["specialization_data"]))
        return True

    with declined(keep), target(arch):
        call()
    return builds


def unique(builds: list[Build]) -> list[Build]:
    """Each build once, as what asked for it first."""
    first: dict[tuple[str, str], Build] = {}
    for build in builds:
        first.setdefault((build.module, build.description), build)
    return list(first.values())


def disassembled(cubin: bytes) -> str:
    """What the cuobjdump that Triton brings along says of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_build(build: Build) -> Row:
    """Compiles to machine code with the ptxas that Triton brings along, and reads its report."""
    function = getattr(import_module(build.module), build.function)
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # from a cache there would be no report
    report = io.StringIO()
    start = time.perf_counter()
    try:
        with (
            tempfile.TemporaryDirectory() as cache,
            target(build.kind.arch),
            contextlib.redirect_stdout(report),
        ):
            triton.knobs.cache.dir = cache
            compiled = function.preload(build.description)
    except Exception as error:
        return Row(build.kind, error=f"{type(error).__name__}: {error}".partition("\n")[0][:200])
    finally:
        function.device_caches.clear()  # where `record` would find the kernel and launch it
    text = report.getvalue()
    return Row(
        build.kind,
        registers=max(map(int, re.findall(r"Used (\d+) registers", text))),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill stores", text))),
        shared_kb=round(compiled.metadata.shared / 1024, 1),
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        tensor_core=len(_TENSOR_CORE.findall(compiled.asm["ptx"])),
        wgmma="wgmma.mma_async" in compiled.asm["ptx"],
        flops=flops_per_instruction(disassembled(compiled.asm["cubin"]), build.kind.warps),
        faults=layout_faults(compiled.asm["ttgir"]),
        seconds=round(time.perf_counter() - start, 2),
    )
