"""What a measurement was taken on: a time without its machine says nothing."""

import ctypes
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fastfusion as ff


def commit() -> str | None:
    """The commit that is measured, with "+" where files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(ff.__file__).parent.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy below somebody else's checkout must not report that checkout's commit.
        git("ls-files", "--error-unmatch", ff.__file__)
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def pinned(threads: int) -> dict[str, str]:
    """The environment of a process whose threads stay on their cores.

    OpenMP reads its settings when the process starts, and without them times of more than one
    thread are random.
    """
    openmp = {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    return {**os.environ, **openmp}


def keep_memory() -> None:
    """Lets the process keep what it frees, up to the largest sizes that glibc's heap takes.

    glibc comes to that by itself after some large blocks, sooner or later: until then each of them
    is fresh pages, and the same formula takes twice as long in one process as in another.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def describe() -> dict[str, Any]:
    """What `ff.info()` says, threads and commit, ready for JSON."""
    return {
        **ff.info().facts,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "torch isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "threads pinned": os.environ.get("OMP_PROC_BIND") == "true",
        "commit": commit(),
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
    }
