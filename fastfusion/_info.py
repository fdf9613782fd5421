"""`info` and `explain`: what this installation can do and what a call would run."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastfusion import _cuda, _library, _op, _triton, ops


@dataclass(frozen=True)
class Info:
    """Facts about the installation; printing it gives the table.

    Attributes:
        facts: name and value of each fact.
        backends: name of each backend, and None where it is available or the reason why not.
    """

    facts: dict[str, str]
    backends: dict[str, str | None]

    def __str__(self) -> str:
        width = max(map(len, (*self.facts, *self.backends)))
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts.items()]
        lines.append("backends")
        for name, reason in self.backends.items():
            lines.append(f"  {name:<{width - 2}}  {'yes' if reason is None else 'no: ' + reason}")
        return "\n".join(lines)

    __repr__ = __str__


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    """Of an installed package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def backend_reasons() -> dict[str, str | None]:
    """Each backend's reason for being unavailable on this machine, None where it is available."""
    return {
        "cuda": _cuda.unavailable(),
        "triton": _triton.unavailable(),
        "cpu": _library.cpu_unavailable,
        "reference": None,
    }


def info() -> Info:
    """Versions, devices, instruction sets, and which backends are available and why not.

    Returns:
        An object that prints as a table; its `facts` and `backends` are dictionaries.
    """
    from fastfusion import __version__

    facts = {
        "fastfusion": __version__,
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": str(torch.get_num_threads()),
    }
    native = _library.native
    if native is not None:
        facts["cpu isa"] = f"{native.isa()} (built: {', '.join(native.isas())})"
        facts["cpu features"] = ", ".join(native.cpu_features())
        facts["built with"] = native.build()
    if torch.cuda.is_available():
        facts["gpu"] = ", ".join(
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        )
    else:
        facts["gpu"] = "none"
    facts["backend asked for"] = _op.forced_backend() or "none (automatic)"
    return Info(facts, backend_reasons())


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> _op.Explanation:
    """Which implementation would run this call, and why each other one would not.

    Args:
        op: one of the ops, such as `fastfusion.scaled_dot_product_attention`.
        args: its arguments, positional and keyword, as for a call. Nothing is computed.

    Returns:
        An object that prints as a table; `chosen` is the name of the backend, or None where the
        backend asked for cannot run the call, and `path` says in what way it runs, where there are
        several: on the CPU the instruction set and how queries are served.

    Raises:
        TypeError: `op` is not an op of fastfusion, or the arguments are not legal.
        ValueError: the arguments are not legal.
    """
    spec = next((spec for function, spec in ops.FUNCTIONS.items() if function is op), None)
    if spec is None:
        names = ", ".join(o.name for o in ops.ALL)
        raise TypeError(f"op must be one of {names}, got {op!r}")
    spec.check(*args, **kwargs)
    return _op.explain_op(spec, args, kwargs)
