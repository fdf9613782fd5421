"""`info` and `explain`: what this installation can do and what a call would run."""

import inspect
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, overload

import torch
from torch.overrides import TorchFunctionMode

from fastfusion import ops
from fastfusion.backends import cuda, library, triton
from fastfusion.core.op import Explanation, Op, explain_call, explain_op, forced_backend


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
        "cuda": cuda.unavailable(),
        "triton": triton.unavailable(),
        "cpu": library.cpu_unavailable,
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
    native = library.native
    if native is not None:
        facts["cpu isa"] = f"{native.isa()} (built: {', '.join(native.isas())})"
        facts["cpu features"] = ", ".join(native.cpu_features())
        facts["built with"] = library.built_with()
    if torch.cuda.is_available():
        facts["gpu"] = ", ".join(
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        )
    else:
        facts["gpu"] = "none"
    facts["backend asked for"] = forced_backend() or "none (automatic)"
    return Info(facts, backend_reasons())


@dataclass(frozen=True)
class ModuleExplanation:
    """Which implementation each attention of a module took.

    Attributes:
        rows: the name of a part and the explanation of the op that it called, in the order of the
            calls; None behind the names of attentions that called no op.
    """

    rows: tuple[tuple[str, Explanation | None], ...]

    def __str__(self) -> str:
        lines = []
        for name, explanation in self.rows:
            text = "no op of fastfusion was called: plain torch" if explanation is None else ""
            lines.append(f"{name or 'the module itself'}: {text or explanation}")
        return "\n".join(lines) or "no attention was called"

    __repr__ = __str__


class Watching(TorchFunctionMode):
    """Explains every call of an op while it is on, beside the part of `module` that makes it."""

    def __init__(self, module: torch.nn.Module, specs: Sequence[Op]) -> None:
        super().__init__()
        self.specs = specs
        self.names = {id(part): name for name, part in module.named_modules()}
        self.rows: list[tuple[str, Explanation | None]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        fusing = getattr(func, "__self__", None)
        if isinstance(fusing, Op):
            caller, explanation = self._caller(), explain_call(fusing, *args)
            result = func(*args, **kwargs)  # raises what the kernel finds wrong
            if result is not None:  # else its parts call ops themselves
                self.rows.append((caller, explanation))
            return result
        spec = next((spec for function, spec in ops.FUNCTIONS.items() if function is func), None)
        if spec is not None and spec in self.specs:
            given = inspect.signature(func).bind(*args, **kwargs)
            told = {
                name: value
                for name, value in given.arguments.items()
                if isinstance(value, torch.Tensor)
                or value != given.signature.parameters[name].default
            }
            self.rows.append((self._caller(), explain_op(spec, (), told)))
        return func(*args, **kwargs)

    def _caller(self) -> str:
        """The innermost part that is running."""
        frame: Any = sys._getframe(2)
        while frame is not None:
            for variable in ("self", "module"):
                name = self.names.get(id(frame.f_locals.get(variable)))
                if name is not None:
                    return name
            frame = frame.f_back
        return "?"


def explain_module(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], specs: Sequence[Op]
) -> ModuleExplanation:
    """`explain` of a module, with the calls of these ops."""
    from fastfusion import nn

    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    watching = Watching(module, specs)
    devices = {t.device for t in (*module.parameters(), *module.buffers()) if t.is_cuda}
    with torch.random.fork_rng(devices):
        try:
            with watching:
                module(*args, **kwargs)
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
    called = {name for name, _ in watching.rows}
    attentions = (torch.nn.MultiheadAttention, nn.CrossAttention, nn.CrossModalAttention)

    def takes_part(name: str) -> bool:
        """Whether a part called an op, or one that it is inside of did: a layer in one call."""
        return any(name == c or c == "" or name.startswith(f"{c}.") for c in called)

    silent = [
        (name, None)
        for name, part in module.named_modules()
        if isinstance(part, attentions) and not takes_part(name)
    ]
    return ModuleExplanation((*watching.rows, *silent))


@overload
def explain(op: torch.nn.Module, *args: Any, **kwargs: Any) -> ModuleExplanation: ...
@overload
def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation: ...
def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation | ModuleExplanation:
    """Which implementation would run this call, and why each other one would not.

    Args:
        op: one of the ops, such as `fastfusion.scaled_dot_product_attention`, or a module.
        args: its arguments, positional and keyword, as for a call. Of an op nothing is computed;
            a module runs once, in the mode that it is in, and its buffers and the random state
            are then as before.

    Returns:
        An object that prints as a table. Of an op: `chosen` is the name of the backend, or None
        where the backend asked for cannot run the call, and `path` says in what way it runs, where
        there are several: on the CPU the instruction set and how queries are served. Of a module:
        `rows` with the name of each attention and such an explanation, or None where plain torch
        runs, as for attention weights.

    Raises:
        TypeError: `op` is neither an op of fastfusion nor a module, or the arguments are not legal.
        ValueError: the arguments are not legal.
    """
    if isinstance(op, torch.nn.Module):
        return explain_module(op, args, kwargs, (*ops.ATTENTION, *ops.LAYERS))
    spec = next((spec for function, spec in ops.FUNCTIONS.items() if function is op), None)
    if spec is None:
        names = ", ".join(o.name for o in ops.ALL)
        raise TypeError(f"op must be a module or one of {names}, got {op!r}")
    return explain_op(spec, args, kwargs)
