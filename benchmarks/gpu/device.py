"""The CUDA device that a measurement was taken on, and what it can do at best."""

import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..common import machine
from .timing import Clock

NO_GPU = "needs an NVIDIA GPU; torch sees none"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def file_name(device_name: str) -> str:
    """The stem of a device's files, as the kernels' launcher looks for them."""
    return "-".join(device_name.lower().split())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def query(*fields: str) -> dict[str, str | None]:
    """Facts that only the driver's own tool knows, None where it is absent."""
    device = str(torch.cuda.current_device())
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or device
    command = [
        *("nvidia-smi", f"--id={chosen}", f"--query-gpu={','.join(fields)}"),
        "--format=csv,noheader,nounits",
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(fields)
    values = [value.strip() for value in result.stdout.splitlines()[0].split(",")]
    return dict(zip(fields, values, strict=False))


def describe() -> dict[str, Any]:
    """What `machine.describe` says, with the device, its driver and what compiles for it."""
    properties = torch.cuda.get_device_properties()
    driver = query("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    return {
        **machine.describe(),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu memory GB": round(properties.total_memory / 1e9, 1),
        "l2 MB": round(getattr(properties, "L2_cache_size", 0) / 1e6, 1),
        "driver": driver["driver_version"],
        "max sm MHz": driver["clocks.max.sm"],
        "max memory MHz": driver["clocks.max.mem"],
        "power limit W": driver["power.limit"],
        "torch cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
        "matmul precision": torch.get_float32_matmul_precision(),
        "peers": {name: _version(name) for name in ("flash-attn", "xformers", "transformers")},
    }


def peaks(dtypes: list[str], clock: Clock | None = None) -> dict[str, float]:
    """FLOP/s of a large matrix product in each dtype, and bytes/s of a large copy ("copy").

    The best of some repeats: these are ceilings. Random data, since zeros draw less power and run
    faster.
    """
    clock = Clock() if clock is None else clock
    free, _ = torch.cuda.mem_get_info()
    found = {name: _product_rate(clock, DTYPES[name], free) for name in dtypes}
    count = min(1 << 30, free // 8)
    source = torch.randint(0, 100, (count,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    found["copy"] = 2 * count / _best(clock, lambda: target.copy_(source))
    return found


def _product_rate(clock: Clock, dtype: torch.dtype, free: int) -> float:
    size = 8192 if 4 * 8192**2 * dtype.itemsize < free else 4096
    left, right = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size**3 / _best(clock, lambda: torch.matmul(left, right, out=product))


def _best(clock: Clock, run: Any) -> float:
    for _ in range(3):
        run()
    return min(clock.seconds(run, 4) / 4 for _ in range(8))


def results_folder(device_name: str) -> Path:
    """Where the results of a device are kept."""
    return Path(__file__).parents[1] / "results" / file_name(device_name)
