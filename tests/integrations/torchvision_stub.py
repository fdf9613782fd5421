"""timm without torchvision, whose wheels on PyPI need a torch for CUDA and fail to import beside
another one. timm's layers and models use none of it; what it imports by name becomes empty here.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from checkout import need_library


class _Stub(ModuleType):
    """A module that has every class that it is asked for."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = type(name, (torch.nn.Module,), {})
        # Transforms list their modes of interpolation when they are imported.
        for mode in ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS"):
            setattr(found, mode, mode)
        setattr(self, name, found)
        return found


class _Finder:
    """Finds such a module for each of torchvision's."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name.partition(".")[0] != "torchvision":
            return None
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _stubbed() -> Iterator[None]:
    finder = _Finder()
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def import_timm() -> Any:
    """timm and its models; skips the calling module as `need_library` does."""
    with _stubbed():
        timm = need_library("timm")
        need_library("timm.models")
    return timm
