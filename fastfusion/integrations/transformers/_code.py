"""What the code of a class calls, read from its compiled methods: nothing is run or parsed."""

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

# What a method that computes attention by itself calls.
_SOFTMAX = frozenset(("softmax", "Softmax", "scaled_dot_product_attention", "MultiheadAttention"))


def _methods(kind: type) -> Iterator[FunctionType]:
    """The methods that instances run, but those of torch and of `PreTrainedModel`."""
    seen: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module or base.__name__ == "PreTrainedModel":
            return
        for name, value in vars(base).items():
            if name in seen:
                continue
            seen.add(name)
            if callable(value):
                method = inspect.unwrap(value)
                if isinstance(method, FunctionType):
                    yield method


def uses_interface(module: nn.Module) -> bool:
    """Whether attention in this module, if not in its parts, is what transformers' interface
    names."""
    kind: type = type(module)
    return _calls_interface(kind)


def eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """What such a module calls where the interface names nothing: its formula in plain torch."""
    kind: type = type(module)
    return _eager_function(kind)


@cache
def _calls_interface(kind: type) -> bool:
    return any("get_interface" in method.__code__.co_names for method in _methods(kind))


@cache
def _eager_function(kind: type) -> Callable[..., Any] | None:
    for method in _methods(kind):
        names = method.__code__.co_names
        if "get_interface" in names:
            for name in names:
                if name.startswith("eager_") and name in method.__globals__:
                    found: Callable[..., Any] = method.__globals__[name]
                    return found
    return None


def _computes_itself(kind: type) -> bool:
    """Whether a class takes masks and comes to a softmax without the interface."""
    return not _calls_interface(kind) and any(
        _SOFTMAX.intersection(method.__code__.co_names)
        and any("mask" in name for name in method.__code__.co_varnames)
        for method in _methods(kind)
    )


def _is_layer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def package_uses_interface(config_class: type) -> bool:
    """Whether all attention in the models of a configuration's package is the interface's, so that
    nobody but the attention function reads the masks that are made for it."""
    package = config_class.__module__.rpartition(".")[0]
    if not package.startswith("transformers.models."):
        return False
    found = False
    for name, module in [*sys.modules.items()]:
        if not name.startswith(f"{package}.modeling_"):
            continue
        for kind in vars(module).values():
            if _is_layer(kind) and kind.__module__ == name:
                if _computes_itself(kind):
                    return False
                found = found or _calls_interface(kind)
    return found
