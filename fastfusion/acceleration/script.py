"""``python -m fastfusion accelerate SCRIPT.py``: a script as it is, its models accelerated."""

import inspect
import io
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastfusion.acceleration import accelerate, restore

_is_compiling = torch.compiler.is_compiling


def run(
    script: Path, arguments: Sequence[str], *, weights: str | None = None, check: bool = False
) -> int:
    """Run a script as `python SCRIPT ARGUMENTS` does, but that each model is accelerated when it is
    called for the first time in eval mode; report on stderr what became of it.

    torch is imported before the script is run.

    Args:
        script: a file of Python.
        arguments: what the script finds in `sys.argv` behind its name.
        weights: as of :func:`fastfusion.accelerate`.
        check: whether each model proves on the inputs of that call that it is still the same, which
            calls it some more times.

    Returns:
        The exit status: 0, or 1 after an exception, which is printed as Python does.

    Raises:
        OSError, SyntaxError: no such file, or none of Python.
        SystemExit, KeyboardInterrupt: as the script raises them.
    """
    path = str(script.absolute())
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    main = ModuleType("__main__")
    main.__dict__.update(
        __file__=path,
        __builtins__=__builtins__,
        __loader__=SourceFileLoader("__main__", path),
        __package__=None,
        __cached__=None,
    )
    # It stays, for what runs behind the script: threads, functions of atexit.
    sys.modules["__main__"] = main
    sys.argv = [str(script), *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = str(script.resolve().parent)
    models = _Models(weights, check)
    try:
        with models.watched():
            exec(code, main.__dict__)
    except Exception as error:
        behind = error.__traceback__ and error.__traceback__.tb_next
        sys.excepthook(type(error), error.with_traceback(behind), behind)
        return 1
    finally:
        sys.stdout.flush()
        print(models, file=sys.stderr, flush=True)
    return 0


class _Models:
    """The models that were called, and what became of them."""

    def __init__(self, weights: str | None, check: bool) -> None:
        self.weights, self.check = weights, check
        self.known: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.rows: list[tuple[weakref.ref[nn.Module], str, str]] = []
        self.lock = threading.RLock()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at the outermost calls of modules.

        Not by a hook of torch's: kernels leave calls that something watches to the parts.
        """
        original = nn.Module.__call__
        inside = threading.local()

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if _is_compiling() or getattr(inside, "a_call", False):
                return original(self, *args, **kwargs)
            inside.a_call = True
            try:
                models.look(self, args, kwargs)
                return original(self, *args, **kwargs)
            finally:
                inside.a_call = False

        models = self
        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]

    def look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # What torch.compile returns compiles the model at its first call, which is now.
        model: nn.Module = getattr(module, "_orig_mod", module)
        if model.training or model in self.known or torch.jit.is_tracing():
            return
        with self.lock:
            if model in self.known:
                return
            self.known.add(model)
            inputs = _named(model, args, kwargs) if self.check else None
            try:
                accelerate(model, weights=self.weights, example_inputs=inputs)
                report: Any = model.fastfusion_report
                text = str(report) if report.layers or report.quantization else ""
            except Exception as error:  # the script has to go on
                restore(model)
                text = f"left as it was: {error}"
            if self.weights is None:  # what was called alone before is in this report
                parts = set(model.modules())
                self.rows = [row for row in self.rows if row[0]() not in parts]
            self.rows.append((weakref.ref(model), type(model).__name__, text))

    def __str__(self) -> str:
        texts = [f"fastfusion accelerate: {name}\n{text}" for _, name, text in self.rows if text]
        return "\n\n".join(texts) or (
            "fastfusion accelerate: no model with layers that could be faster was called in eval "
            "mode"
        )


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All arguments of a call as keyword arguments, or as positional ones where there are no
    others."""
    if not kwargs:
        return args
    signature = inspect.signature(model.forward)
    names = [*signature.bind_partial(*args).arguments]
    return dict(zip(names, args, strict=True)) | kwargs
