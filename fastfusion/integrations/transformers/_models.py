"""Models of transformers: attention by the interface, for as long as they are accelerated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastfusion.acceleration.swaps import Swap
from fastfusion.integrations.transformers import _interface
from fastfusion.integrations.transformers._code import uses_interface

# What we stand in for; whoever chose FlashAttention or pages did so for a reason.
_REPLACED = (None, "eager", "sdpa", "flex_attention")


@dataclass
class _Held:
    config: Any
    previous: str | None
    count: int = 0


# Configurations that swaps have changed, by id: several models may share one.
_held: dict[int, _Held] = {}


@dataclass
class InterfaceSwap:
    """The attention interface of a model, without the models in it.

    A configuration says what it is, and models that share a configuration share that, too, as
    everywhere in transformers.

    Attributes:
        previous: what each configuration said before, in the order of `_configs`.
        entered: whether it is in force.
    """

    previous: list[str | None] = field(default_factory=list)

    def enter(self, module: nn.Module) -> None:
        self.previous = []
        for config in _configs(module):
            held = _held.setdefault(id(config), _Held(config, config._attn_implementation))
            held.count += 1
            self.previous.append(held.previous)
            config._attn_implementation_internal = _interface.NAME
            _interface.reads_bool(config)  # compiled code could not find out

    def leave(self, module: nn.Module) -> None:
        for config, previous in zip(_configs(module), self.previous, strict=False):
            held = _held.get(id(config))
            if held is not None:
                held.count -= 1
                if held.count:
                    continue
                del _held[id(config)]
            if config._attn_implementation == _interface.NAME:  # else somebody has chosen since
                config._attn_implementation_internal = previous

    def covers(self, part: nn.Module) -> bool:
        return _is_the_interfaces(part)

    def __str__(self) -> str:
        return f'attn_implementation="{_interface.NAME}"'


def interface_swap(model: nn.Module) -> Swap | str | None:
    """What `fastfusion.accelerate` makes of a `PreTrainedModel`, apart from the layers in it."""
    parts = [part for part in _own_parts(model) if uses_interface(part)]
    if not parts:
        return None
    config: Any = model.config
    chosen = config._attn_implementation
    if chosen == _interface.NAME and id(config) not in _held:
        return None  # by hand, and to stay
    if chosen not in (*_REPLACED, _interface.NAME):
        return f"attn_implementation={chosen!r} was chosen for it"
    return InterfaceSwap()


def _own_parts(model: nn.Module) -> Iterator[nn.Module]:
    """Its modules but those of models in it."""
    for child in model.children():
        if not _is_model(child):
            yield child
            yield from _own_parts(child)


def _is_model(module: nn.Module) -> bool:
    return any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__)


def _configs(model: nn.Module) -> list[Any]:
    """The configurations that attention in this model, and whoever makes its masks, read."""
    found = [getattr(model, "config", None)]
    found += [getattr(part, "config", None) for part in _own_parts(model) if uses_interface(part)]
    return [*{id(c): c for c in found if hasattr(c, "_attn_implementation_internal")}.values()]


def _is_the_interfaces(part: nn.Module) -> bool:
    """Whether all attention in a part is the interface's."""
    attentions = [m for m in part.modules() if uses_interface(m)]
    return bool(attentions) and not any(
        isinstance(m, nn.MultiheadAttention) for m in part.modules()
    )
