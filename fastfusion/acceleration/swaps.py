"""Which layers of other people's become which of ours, and how they become themselves again.

A swap gives a layer another class, a subclass of its own: parameters, buffers, parts, hooks and the
names in a state_dict stay what they are, nothing is copied, and whoever holds the layer (an
optimiser, an adapter, a recorder) holds it still. Its `forward` runs kernels where every part of
the layer comes to its formula, and `super().forward` everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from torch import nn

from fastfusion.integrations.swaps import DIFFUSERS, TIMM
from fastfusion.nn._linear import AcceleratedLinear, feed_forward_of
from fastfusion.nn._multihead import move_out, settle_in
from fastfusion.nn._transformer import REPLACEMENTS

# The swap of a layer, in its __dict__ while it is in force: copies and pickles take it along.
_IN_FORCE = "_fastfusion_swap"


class Swap(Protocol):
    """What a factory may return: how to change a layer and to change it back.

    It is copied and pickled with the layer.
    """

    def enter(self, module: nn.Module) -> None:
        """Change the layer."""

    def leave(self, module: nn.Module) -> str | None:
        """Change it back, or say why that cannot be done."""

    def covers(self, part: nn.Module) -> bool:
        """Whether attention in this part of the layer is thereby swapped."""

    def __str__(self) -> str:
        """What the layer is now, for a report."""


Factory = Callable[[nn.Module], "type[nn.Module] | Swap | str | None"] | type[nn.Module]


@dataclass
class ClassSwap:
    """Another class for the layer.

    Attributes:
        target: a subclass of the class that the layer has.
        source: the class that it had.
    """

    target: type[nn.Module]
    source: type[nn.Module] | None = None

    def enter(self, module: nn.Module) -> None:
        self.source = type(module)
        module.__class__ = self.target

    def leave(self, module: nn.Module) -> str | None:
        if type(module) is not self.target or self.source is None:
            return f"it has become a {type(module).__name__} since"
        module.__class__ = self.source
        return None

    def covers(self, part: nn.Module) -> bool:
        return True

    def __str__(self) -> str:
        return short_name_of(self.target)


class _TorchSwap(ClassSwap):
    """Ours for a module of torch.nn, which tracers take for an atom as they take torch's."""

    def enter(self, module: nn.Module) -> None:
        super().enter(module)
        settle_in(module)

    def leave(self, module: nn.Module) -> str | None:
        reason = super().leave(module)
        if reason is None:
            move_out(module)
        return reason


@dataclass(frozen=True)
class _Entry:
    factory: Factory | str
    subclasses: bool

    def make(self, module: nn.Module) -> Swap | str | None:
        """The swap of this layer, why it stays what it is, or None: nothing to say about it."""
        factory = self.factory
        if isinstance(factory, str):  # "package.module:name", imported by the first layer
            path, _, name = factory.partition(":")
            factory = getattr(import_module(path), name)
        made = factory if isinstance(factory, type) else factory(module)
        if not isinstance(made, type):
            return made
        if not issubclass(made, type(module)):
            raise TypeError(
                f"the swap of {name_of(type(module))} must be a subclass of it, got {made!r}"
            )
        return ClassSwap(made)


_REGISTRY: dict[str, _Entry] = {}


def name_of(kind: type) -> str:
    """The qualified name of a class, as `register_swap` takes it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def short_name_of(kind: type) -> str:
    """A class as its users write it, more or less."""
    names = kind.__module__.split(".")
    if names[0] == "fastfusion":
        public = [name for name in names if not name.startswith("_")]
    else:
        public = ["torch", "nn"] if names[0] == "torch" else names[:1]
    return ".".join((*public, kind.__qualname__))


def register_swap(
    source_class: type[nn.Module] | str,
    factory: Factory | str,
    *,
    subclasses: bool = False,
) -> None:
    """Tell `accelerate` what to make of a class of layers; the last word about a class counts.

    Args:
        source_class: the class, or its qualified name, so that nothing is imported for its sake:
            "transformers.models.bert.modeling_bert.BertLayer".
        factory: the subclass of `source_class` that its layers become; or a function that is given
            a layer and returns such a class, a :class:`Swap`, a str that says why this layer stays
            what it is, or None, where there is nothing to say about it; or "module:name" of either.
        subclasses: whether it is asked about subclasses as well, which have no entry themselves.
            By default not: they may compute something else.

    Raises:
        TypeError: arguments that are none of these.
    """
    if isinstance(source_class, type) and issubclass(source_class, nn.Module):
        source_class = name_of(source_class)
    if not isinstance(source_class, str):
        raise TypeError(
            "source_class must be a subclass of torch.nn.Module or the qualified name of one, got "
            f"{source_class!r}"
        )
    if isinstance(factory, str):
        if ":" not in factory:
            raise TypeError(f"factory must be 'module:name' where it is a str, got {factory!r}")
    elif not callable(factory):
        raise TypeError(f"factory must be a class, a function or 'module:name', got {factory!r}")
    _REGISTRY[source_class] = _Entry(factory, bool(subclasses))


def swap_for(module: nn.Module) -> Swap | str | None:
    """What is registered for a layer: a swap, why there is none, or None: nobody knows it."""
    kind = type(module)
    for base in kind.__mro__:
        entry = _REGISTRY.get(name_of(base))
        if entry is not None and (base is kind or entry.subclasses):
            return "its forward was replaced" if "forward" in vars(module) else entry.make(module)
    return None


def in_force(module: nn.Module) -> Swap | None:
    """The swap that a layer is under."""
    swap: Swap | None = module.__dict__.get(_IN_FORCE)
    return swap


def enter(module: nn.Module, swap: Swap) -> None:
    swap.enter(module)
    module.__dict__[_IN_FORCE] = swap


def leave(module: nn.Module) -> str | None:
    """Undo the swap that a layer is under, if any, or say why that cannot be done."""
    swap = in_force(module)
    reason = None if swap is None else swap.leave(module)
    if reason is None:
        module.__dict__.pop(_IN_FORCE, None)
    return reason


def swapped(model: nn.Module) -> Iterator[tuple[str, nn.Module, Swap]]:
    """All layers that are under a swap."""
    for name, module in model.named_modules():
        swap = in_force(module)
        if swap is not None:
            yield name, module, swap


def _torch_swap(module: nn.Module) -> Swap | None:
    kind = type(module)
    target = feed_forward_of(module) if kind is nn.Sequential else _TORCH[kind]
    return None if target is None else _TorchSwap(target)


_TORCH = {**REPLACEMENTS, nn.Linear: AcceleratedLinear}
for _source in (*_TORCH, nn.Sequential):
    register_swap(_source, _torch_swap)
for _name, _factory in TIMM.items():
    register_swap(_name, _factory)
for _name, _factory in DIFFUSERS.items():
    register_swap(_name, _factory, subclasses=True)
