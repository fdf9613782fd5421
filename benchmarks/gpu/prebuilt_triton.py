"""Triton's cache for a GPU that is not there: the kernels that `make gpu` launches.

The calls run on CPU tensors with launches recorded (`triton_builds.py`), and what they would launch
is compiled into the cache, under the keys that Triton computes on the device too. The launchers in
C that Triton before 3.8 compiles for each signature need a driver, and are not among them.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import triton

from fastfusion.backends import triton as triton_backend

from ..compile_gates.triton_builds import Build, record, target, unique
from . import peers, sanitize
from .cells import Job, call_once, plan
from .prebuilt import settle

# What Triton loads of a kernel; what it wrote on the way is nine tenths of 65 MB.
LOADED = (".cubin", ".json")
QUICK_DTYPES = ("bfloat16",)
# What the smoke test puts into a CUDA graph.
GRAPH_SHAPE = {
    "name": "smoke test",
    "batch": 1,
    "heads": 12,
    "q_len": 20,
    "kv_len": 36,
    "head_dim": 64,
}


@contextmanager
def takes_cpu_tensors() -> Iterator[None]:
    """The Triton backend refuses CPU tensors outside its interpreter; recorded launches may have
    them."""
    before = triton_backend.INTERPRETED
    setattr(triton_backend, "INTERPRETED", True)  # noqa: B010
    try:
        yield
    finally:
        setattr(triton_backend, "INTERPRETED", before)  # noqa: B010


def jobs_of_a_quick_run() -> list[Job]:
    """The cells of `make gpu ARGS=--quick`, and the smoke test."""
    cells = plan(list(peers.PEERS), QUICK_DTYPES, (False, True), None)
    smoke = [
        Job(suite, {**shape, "name": "smoke test"}, str(dtype).removeprefix("torch."), backward)
        for suite, shape, dtype, backward in sanitize.cases()
        if shape is sanitize.SHAPES[suite][0]
    ]
    return [*cells, *smoke, Job("attention", GRAPH_SHAPE, "bfloat16", False)]


def builds_of(jobs: list[Job], arch: int) -> list[Build]:
    """What they launch on an architecture, each once."""
    builds: list[Build] = []
    with takes_cpu_tensors():
        for job in jobs:
            call = partial(call_once, job, "cpu")
            builds += record(call, arch, str(job), job.dtype, 0)
    return unique(builds)


def compile_into_cache(build: Build) -> None:
    """Compiles one kernel as a call on the device would, which leaves it in TRITON_CACHE_DIR."""
    function = getattr(import_module(build.module), build.function)
    with target(build.kind.arch):
        function.preload(build.description)
    function.device_caches.clear()  # where `record` would find the kernel and launch it


def fill(folder: Path, arch: int, processes: int, jobs: list[Job] | None = None) -> int:
    """Compiles what some jobs launch, by default a quick run's; how many kernels that is."""
    if triton.knobs.runtime.interpret:
        raise SystemExit("make gpu-prebuild: TRITON_INTERPRET is set, which compiles nothing")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())  # for the processes too
    builds = builds_of(jobs_of_a_quick_run() if jobs is None else jobs, arch)
    print(f"{len(builds)} Triton kernels to compile in {processes} processes", flush=True)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(compile_into_cache, builds))
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in LOADED:
            path.unlink()
    settle(folder)
    return len(builds)
