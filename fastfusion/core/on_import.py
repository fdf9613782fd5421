"""What keeps `import fastfusion` short: functions that are called behind the first import of
another module, whose users alone need them, and imports without the garbage collector."""

import gc
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class _Hook(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Wraps the loader of one module, and is gone."""

    loader: importlib.abc.Loader

    def __init__(self, name: str, call: Callable[[Any], None]) -> None:
        self.name, self.call = name, call

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.call(module)


def on_import(name: str, call: Callable[[Any], None]) -> None:
    """Call `call` with the module `name`: now if it is imported already, otherwise when it is."""
    if name in sys.modules:
        call(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Hook(name, call))


@contextmanager
def without_collection() -> Iterator[None]:
    """Put the garbage collector's passes off until the block ends."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
