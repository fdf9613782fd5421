"""Attention in other people's code: their functions as they are, in which
`torch.nn.functional.scaled_dot_product_attention` is ours.

A layer that calls torch's attention is its own specification: projections, norms, rotations, masks
and dropout stay its own, in whatever version is installed, and need no second reading here. The
function is run over its module's names, of which torch's are seen through a wrapper.
"""

import functools
from collections.abc import Mapping
from importlib import import_module
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from fastfusion.ops.scaled_dot_product_attention import scaled_dot_product_attention

_ATTENTION = "scaled_dot_product_attention"
_is_compiling = torch.compiler.is_compiling


class _Namespace(ModuleType):
    """A module in which some names mean something else."""

    def __init__(self, module: ModuleType, names: Mapping[str, Any]) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(names)
        self._fastfusion_module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fastfusion_module, name)
        self.__dict__[name] = found  # the next time without a detour
        return found


_FUNCTIONAL = _Namespace(F, {_ATTENTION: scaled_dot_product_attention})
_NN = _Namespace(torch.nn, {"functional": _FUNCTIONAL})
_TORCH = _Namespace(torch, {"nn": _NN})
# What a module may have imported, and what stands in its place.
_PLACES = (
    (torch, _TORCH),
    (torch.nn, _NN),
    (F, _FUNCTIONAL),
    (F.scaled_dot_product_attention, scaled_dot_product_attention),
)


def calls(function: Any, name: str = _ATTENTION) -> bool:
    """Whether a function names another one: torch's attention."""
    return isinstance(function, FunctionType) and name in _names_in(function.__code__)


def _names_in(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_in(constant)
    return names


def with_our_attention(function: Any, **names: Any) -> Any:
    """The function, with our attention in the place of torch's, and other names of its module with
    other meanings.

    Compiled and exported code keeps torch's attention, which tools behind it know.
    """
    places = {name: names.get(name, _ours_for(value)) for name, value in _globals_of(function)}
    ours = FunctionType(
        function.__code__,
        {**function.__globals__, **places},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    ours.__kwdefaults__ = function.__kwdefaults__

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_compiling():
            return function(*args, **kwargs)
        return ours(*args, **kwargs)

    return call


def _globals_of(function: Any) -> list[tuple[str, Any]]:
    known = function.__globals__
    return [(name, known[name]) for name in _names_in(function.__code__) if name in known]


def _ours_for(value: Any) -> Any:
    return next((ours for theirs, ours in _PLACES if value is theirs), value)


class Subclasses:
    """Subclasses of other people's classes in which one method has our attention.

    They are made when they are first asked for, also by pickle, which knows them by the name of a
    module, and in it by that of their source: "beit.Attention".

    Args:
        module: name of the module whose attributes they are.
        package: what the names of their sources begin with.
        method: the method that calls attention.
        names: as of `with_our_attention`.
    """

    def __init__(self, module: str, package: str, method: str = "forward", **names: Any) -> None:
        self._module, self._package, self._method, self._names = module, package, method, names
        self._made: dict[type, type] = {}

    def of(self, kind: type) -> type:
        """The subclass of a class."""
        made = self._made.get(kind)
        if made is None:
            method = with_our_attention(getattr(kind, self._method), **self._names)
            path = kind.__module__.removeprefix(f"{self._package}.")
            about = {"__module__": self._module, "__qualname__": f"{path}.{kind.__qualname__}"}
            made = type(kind)(kind.__name__, (kind,), {self._method: method, **about})
            self._made[kind] = made
        return made

    def named(self, name: str) -> Any:
        """What the attribute `name` of the module is: a part of the way to a subclass."""
        return _Way(self, name)


class _Way:
    """Modules on the way to a subclass."""

    def __init__(self, subclasses: Subclasses, path: str) -> None:
        self._subclasses, self._path = subclasses, path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        subclasses = self._subclasses
        try:
            module = import_module(f"{subclasses._package}.{self._path}")
        except ModuleNotFoundError as error:
            raise AttributeError(name) from error
        found = getattr(module, name, None)
        if isinstance(found, type):
            return subclasses.of(found)
        return _Way(subclasses, f"{self._path}.{name}")
