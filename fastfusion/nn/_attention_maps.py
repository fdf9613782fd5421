"""Attention weights read out of a whole model, without hooks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion.core.arguments import is_exporting

_open_blocks: set[int] = set()


class RecordsAttention(nn.Module):
    """What a module declares whose weights `attention_maps` can read.

    Its forward asks for the weights, per head, when its caller does or `self._recorders` is not
    empty; in the latter case it hands them to `self._record`, and returns what its caller asked
    for. Everything else stays as without `attention_maps`.
    """

    _recorders: tuple["_Recorder", ...] = ()

    def _record(self, *weights: Tensor) -> None:
        """Put away the weights ([batch,] heads, q_len, kv_len) of one call, one per direction."""
        for recorder in self._recorders:
            recorder.record(weights)

    def __getstate__(self) -> dict[str, Any]:
        """A copy made during `attention_maps` is not recorded."""
        state: dict[str, Any] = dict(super().__getstate__())
        state.pop("_recorders", None)
        return state


class _Recorder:
    """Where the weights of one module go."""

    def __init__(self, maps: dict[str, Any], name: str, average: bool) -> None:
        self.maps, self.name, self.average = maps, name, average

    def record(self, weights: tuple[Tensor, ...]) -> None:
        if is_exporting():
            raise RuntimeError("attention_maps cannot read a module that is being exported")
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "attention_maps cannot read a module inside vmap or another transform of "
                "torch.func; return the weights of need_weights=True instead"
            )
        if self.average:
            weights = tuple(w.mean(-3) for w in weights)
        self.maps[self.name] = weights[0] if len(weights) == 1 else weights


@contextmanager
def attention_maps(
    model: nn.Module,
    layers: str | int | Iterable[str | int] | None = None,
    *,
    average: bool = True,
) -> Iterator[dict[str, Any]]:
    """Read the attention weights of a model's layers while it runs::

        with ff.attention_maps(model, layers="decoder.*.multihead_attn") as maps:
            output = model(image, text)
        maps["decoder.layers.0.multihead_attn"]  # (batch, q_len, kv_len)

    It reads every `MultiheadAttention`, `CrossAttention` and `CrossModalAttention` of
    `fastfusion.nn` (not torch's), wherever in the model it stands. The model's own results
    are as without, up to rounding (and another draw of dropout); the modules that are read take
    their roads with weights meanwhile, which hold (batch, heads, q_len, kv_len) in memory.

    Args:
        model: any module.
        layers: which attention modules to read; all by default. One or several of: the qualified
            name of an attention module or of a module around some ("encoder.layers.0"), a pattern
            with `*` (`"*.self_attn"`), or a place among the model's attention modules in the order
            of `model.named_modules()`, from the end where negative.
        average: average the weights over the heads.

    Yields:
        A dictionary, filled as the modules run: from a module's qualified name ("" for `model`
        itself) to the weights (batch, q_len, kv_len), or (batch, heads, q_len, kv_len) if not
        averaged, without batch for unbatched input; for `CrossModalAttention` to the pair of its
        weights, of visual tokens on text and of text on visual tokens. They are what
        `need_weights=True` returns: after dropout, 0 in a row without keys, padded for nested
        input, and part of the graph of gradients. A module that runs more than once leaves its
        last weights, so a decoding loop finds each step's by reading in the loop.

    Blocks may be nested; each fills its own dictionary. All threads that run `model` meanwhile are
    recorded. Under `torch.compile` the model is compiled anew for the block; a model behind
    `cuda_graph` runs without its graph. With activation checkpointing, call `backward` inside the
    block too.

    Raises:
        ValueError: `model` has no attention module, or `layers` names none of it; the message
            lists those there are.
        RuntimeError: from the model: it is being exported, or runs inside a `torch.func` transform.
    """
    maps: dict[str, Any] = {}
    # Names as the user wrote them, without the wrapper of torch.compile.
    model = getattr(model, "_orig_mod", model)
    chosen = [
        (module, _Recorder(maps, name, average)) for name, module in _choose(model, layers).items()
    ]
    for module, recorder in chosen:
        module._recorders = (*module._recorders, recorder)
    _open_blocks.add(id(maps))
    try:
        yield maps
    finally:
        _open_blocks.discard(id(maps))
        for module, recorder in chosen:
            left = tuple(r for r in module._recorders if r is not recorder)
            del module._recorders
            if left:
                module._recorders = left


def is_active() -> bool:
    """Whether some model is being read."""
    return bool(_open_blocks)


def _choose(
    model: nn.Module, layers: str | int | Iterable[str | int] | None
) -> dict[str, RecordsAttention]:
    """The attention modules of `model` that `layers` means, by name."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, RecordsAttention)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention module of fastfusion.nn to read")
    if layers is None:
        return found
    names = list(found)
    chosen: set[str] = set()
    for layer in (layers,) if isinstance(layers, str | int) else layers:
        if isinstance(layer, str):
            matches = [
                n for n in names
                if n == layer or n.startswith(layer + ".") or fnmatchcase(n, layer)
            ]  # fmt: skip
        else:
            matches = names[layer:][:1] if -len(names) <= layer < len(names) else []
        if not matches:
            raise ValueError(f"no attention module is meant by layer {layer!r}; there are {names}")
        chosen.update(matches)
    return {name: module for name, module in found.items() if name in chosen}
