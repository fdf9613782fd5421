"""Attention of other Python libraries as peers, where a user has installed them."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ..common.peers import Arguments, Skipped, additive, whole_mask


def _transformers(call: Arguments, module: str, function: str) -> Callable[[], Tensor]:
    """An attention function of transformers, as its models call it: with a float mask."""
    import importlib

    try:
        attention = getattr(importlib.import_module(f"transformers.{module}"), function)
    except ImportError as error:
        raise Skipped(f"not installed (pip install transformers): {error}") from None
    query, key, value = call["query"], call["key"], call["value"]
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
    mask = additive(whole_mask(call), query.dtype)
    scale = call.get("scale")
    # What the functions ask of the layer that they are called from.
    layer: Any = SimpleNamespace(training=False, is_causal=False, num_key_value_groups=1)
    run = partial(
        attention, layer, query, key, value, mask,
        scaling=query.shape[-1] ** -0.5 if scale is None else scale, dropout=0.0,
    )  # fmt: skip
    return lambda: run()[0].transpose(1, 2)


def transformers_eager(call: Arguments) -> Callable[[], Tensor]:
    """What "eager" is to the models of transformers, here CLIP's."""
    return _transformers(call, "models.clip.modeling_clip", "eager_attention_forward")


def transformers_sdpa(call: Arguments) -> Callable[[], Tensor]:
    """What "sdpa" is to the models of transformers."""
    return _transformers(call, "integrations.sdpa_attention", "sdpa_attention_forward")


ALL = {"transformers eager": transformers_eager, "transformers sdpa": transformers_sdpa}
