"""Layers of transformers in one call: what `fastfusion.accelerate` makes of them.

Each is a subclass of the layer that it stands for and has its name: `layers.BertLayer` is a
`transformers.models.bert.modeling_bert.BertLayer`. They are made when they are asked for.

An encoder layer is one call of `fastfusion.encoder_layer` where calling its parts comes to that
formula and nothing else: in evaluation without gradients, without adapters, hooks or replaced
parts, and unless attention weights are wanted. Everywhere else it runs as it did. So does a decoder
layer that is given tokens behind others in a cache (_decoders.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion.integrations.transformers import _interface
from fastfusion.integrations.transformers._activations import activation_of
from fastfusion.integrations.transformers._structures import (
    DECODER_LAYERS,
    ENCODER_LAYERS,
    TESTED,
    Structure,
)
from fastfusion.nn._layers import run_encoder_layer
from fastfusion.nn._linear import LINEAR, runs_on_cpu, weights_of
from fastfusion.nn._plain import has_global_hooks

# What may stand in a call of a layer and changes nothing in it.
_NO_MATTER = frozenset(("is_causal", "output_hidden_states", "return_dict", "use_cache"))
# Of attention: under these names no mask, and a module that says it is causal, mean a causal mask;
# eager code takes no mask for none.
RESOLVING = frozenset((_interface.NAME, "sdpa"))
# Modules of a layer; those around the parts have the code that lies between them.
_LINEAR, _DROPOUT, _AROUND, _OTHER = range(4)


def __getattr__(name: str) -> type[nn.Module]:
    for table, make in ((ENCODER_LAYERS, _encoder_forward), (DECODER_LAYERS, _decoder_forward)):
        if name in table:
            path, structure = table[name]
            source: Any = getattr(import_module(path), name)
            members = {
                "forward": make(source, structure),
                "__module__": __name__,
                "__doc__": f"`{source.__module__}.{source.__qualname__}` in one call.",
            }
            made = globals()[name] = type(name, (source,), members)
            return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def swap_of(layer: nn.Module) -> type[nn.Module] | str:
    """The class that takes the place of a layer's, or why there is none."""
    name = type(layer).__name__
    if name in DECODER_LAYERS and not is_tested():
        return f"its code is known of transformers {TESTED}"
    made: type[nn.Module] = globals().get(name) or __getattr__(name)
    return made


def is_tested() -> bool:
    """Whether the structures are those of the transformers that is here."""
    import transformers

    return transformers.__version__.startswith(f"{TESTED}.")


def _decoder_forward(source: Any, structure: Structure) -> Callable[..., Any]:
    from fastfusion.integrations.transformers._decoders import forward_of

    return forward_of(source, structure)


def _encoder_forward(source: Any, structure: Structure) -> Callable[..., Any]:
    """The forward of a subclass of `source` that runs the op where it may."""
    parts = Parts(structure, source.__module__)
    proof = _Proof(source)

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not proof.failed:
            result = parts.run(self, hidden_states, attention_mask, args, kwargs)
            if result is not None:
                if proof.given:
                    return result
                theirs = source.forward(self, hidden_states, attention_mask, *args, **kwargs)
                return proof.judge(self, result, theirs)
        return source.forward(self, hidden_states, attention_mask, *args, **kwargs)

    return forward


def do_not_matter(kwargs: Mapping[str, Any]) -> bool:
    """Whether what a layer was given besides changes nothing in it."""
    for name, value in kwargs.items():
        if value is not None and value is not False and name not in _NO_MATTER:
            return False
    return True


class Parts:
    """Reads the parts of a layer, and runs the op on them."""

    def __init__(self, structure: Structure, module: str) -> None:
        place = structure.place
        self.structure = structure
        self.tree = structure.tree
        first, activation, second = structure.feed_forward
        linear = (*structure.projections, *structure.memory[1:], first, second)
        self.linear = [place(name) for name in linear]
        self.norms = [place(name) for name in structure.norms]
        self.activation, self.attention = place(activation), place(structure.attention)
        kinds = dict.fromkeys(self.linear, _LINEAR)
        kinds |= dict.fromkeys((*self.norms, self.activation), _OTHER)
        kinds |= {place(name): _DROPOUT for name in structure.dropouts}
        self.kinds = [kinds.get(i, _AROUND) for i in range(1, len(structure.names))]
        self.unset = [(place(name), attribute) for name, attribute in structure.unset]
        self.modules = (module, __name__)

    def run(
        self,
        layer: Any,
        x: Any,
        mask: Tensor | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Tensor | None:
        """The op, or None where the layer's forward may mean more."""
        if not runs_on_cpu(x):
            return None
        if any([value is not None for value in args]) or not do_not_matter(kwargs):
            return None
        found = self.find(layer)
        if found is None or has_global_hooks():
            return None
        attention = found[self.attention]
        activation = activation_of(found[self.activation])
        if activation is None or _interface.wants_weights(kwargs):
            return None
        heads = self.heads_of(attention, x)
        if heads is None:
            return None
        causal: Any = False
        if mask is None:
            causal = kwargs.get("is_causal")
            if causal is None:
                causal = getattr(attention, "is_causal", True)
            implementation = implementation_of(attention.__dict__["config"])
            if implementation not in RESOLVING:
                if implementation != "eager":
                    return None
                causal = False
            causal = bool(causal) and x.shape[1] > 1
        mask, padding = masks_of(mask, x)
        products = [weights_of(found[place]) for place in self.linear]
        norms = [found[place] for place in self.norms]
        result = run_encoder_layer(
            x, products, norms, heads, activation, self.structure.norm_first, mask, padding, causal
        )
        if result is not None and x.dtype == torch.float16 and self.structure.clamp is not None:
            result = _clamped(result, self.structure.clamp == "always")
        return result

    def heads_of(self, attention: Any, x: Tensor) -> int | None:
        """How many heads an attention has; None where they have another scale than the op's."""
        own, width = attention.__dict__, x.shape[2]
        count: int = own[self.structure.heads]
        if width % count or own[self.structure.scaling] != (width // count) ** -0.5:
            return None
        return count

    def find(self, layer: Any) -> list[Any] | None:
        """The modules of `Structure.names`, if calling each comes to what the formula takes it for:
        nobody watches but transformers' recorders that are to record nothing."""
        own = layer.__dict__
        if own["training"]:
            return None
        found = [layer]
        try:
            for (parent, name), kind in zip(self.tree, self.kinds, strict=True):
                module = found[parent].__dict__["_modules"][name]
                its = module.__dict__
                if (
                    its["_forward_pre_hooks"]
                    or its["_backward_pre_hooks"]
                    or its["_backward_hooks"]
                    or "forward" in its
                    or (its["_forward_hooks"] and not _interface.are_idle(its["_forward_hooks"]))
                ):
                    return None
                if kind == _LINEAR:
                    if type(module) not in LINEAR:
                        return None
                elif kind == _AROUND:
                    if its["training"] or type(module).__module__ not in self.modules:
                        return None
                elif kind == _DROPOUT and (
                    type(module) is not nn.Dropout or (its["training"] and its["p"])
                ):
                    return None
                found.append(module)
        except (AttributeError, KeyError):
            return None
        for place, attribute in self.unset:
            if found[place].__dict__[attribute]:
                return None
        for name in self.structure.absent:
            if own["_modules"].get(name) is not None:
                return None
        return found


def implementation_of(config: Any) -> str | None:
    """`config._attn_implementation`, for which configurations walk through Python three times."""
    own = object.__getattribute__(config, "__dict__")
    name: str | None = own["_attn_implementation_internal"]
    return name


def masks_of(mask: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """attn_mask and key_padding_mask of the op."""
    if mask is None:
        return None, None
    if mask.dtype == torch.bool and mask.dim() == 4:
        batch, heads, length, _ = mask.shape
        if heads == 1 and (length == 1 or mask.stride(2) == 0) and batch == x.shape[0]:
            return None, ~mask[:, 0, 0]
    elif mask.dtype not in (torch.bool, torch.float32):
        mask = mask.to(x.dtype)
    return mask, None


def _clamped(x: Tensor, always: bool) -> Tensor:
    """As encoder layers keep float16 finite."""
    if not always and torch.isfinite(x).all():
        return x
    largest = torch.finfo(torch.float16).max - 1000
    return torch.clamp(x, min=-largest, max=largest)


class _Proof:
    """Whether a class computes what the op does: known of the version that was tested; of others
    the first result is compared with the class's own."""

    def __init__(self, source: type) -> None:
        self.source, self.given, self.failed = source, is_tested(), False

    def judge(self, layer: Any, ours: Tensor, theirs: Any) -> Any:
        """The result to return."""
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
            self.failed = True
        elif theirs.numel() and bool(theirs.isfinite().all()) and bool(ours.isfinite().all()):
            # Twice what bfloat16 rounds to; another formula is further away.
            weights = [own[0] for own in map(weights_of, layer.modules()) if own is not None]
            is_exact = all(t.dtype == torch.float32 for t in (theirs, *weights))
            share = 1e-3 if is_exact else 2e-2
            apart = float((ours.float() - theirs.float()).abs().max())
            self.failed = apart > share * float(theirs.float().abs().max())
            self.given = not self.failed
        if self.failed:
            warnings.warn(
                f"{self.source.__module__} computes {self.source.__qualname__} otherwise than in "
                f"transformers {TESTED}, after which fastfusion was written: it runs as it did",
                stacklevel=4,
            )
        return theirs
