"""diffusers' attention processors on our attention, for `fastfusion.accelerate`.

An attention of diffusers hands its call to its processor, an object. Its place takes one of a
subclass, which has the processor's own code, in which the attention itself is ours
(`_own_code.py`): torch's, as classic UNets, VAEs and PixArt call it, and `dispatch_attention_fn`,
as newer transformers do, with their masks of all shapes. A backend that was asked for, by
`set_attention_backend` or `attention_backend(...)`, is asked, and so are several devices.

Other processors may be set afterwards, as they may be at any time; `accelerate` again takes them
in, and `restore` gives back those that were there. `set_default_attn_processor` knows its own
classes alone: restore first.
"""

import functools
import inspect
from typing import Any

from diffusers import __version__
from diffusers.models import attention_dispatch
from torch import Tensor, nn

from fastfusion.integrations._own_code import Subclasses, calls
from fastfusion.ops.scaled_dot_product_attention import scaled_dot_product_attention

_DISPATCH = "dispatch_attention_fn"
_ATTENTION = "scaled_dot_product_attention"
# What we can stand for; another version may have more.
_PARAMETERS = (
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    "attention_kwargs", "backend", "parallel_config",
)  # fmt: skip
_original = getattr(attention_dispatch, _DISPATCH)


@functools.wraps(_original)
def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Any:
    """diffusers' function of (batch, length, heads, dim), where it would call torch's attention."""
    if attention_kwargs or parallel_config is not None or not _is_torchs(backend):
        return _original(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            attention_kwargs, backend=backend, parallel_config=parallel_config,
        )  # fmt: skip
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]  # of keys
    out = scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask, dropout_p,
        is_causal, scale, enable_gqa,
    )  # fmt: skip
    return out.transpose(1, 2)


def _is_torchs(backend: Any) -> bool:
    if backend is None:
        backend, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    return bool(backend == attention_dispatch.AttentionBackendName.NATIVE)


_PROCESSORS = Subclasses(__name__, "diffusers", "__call__", **{_DISPATCH: _dispatch})


def __getattr__(name: str) -> Any:
    """The way to classes that `accelerate` made: `models` to that of a processor of diffusers."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _PROCESSORS.named(name)


class ProcessorSwap:
    """Another processor for an attention."""

    original: Any = None
    source: Any = None
    ours: Any = None

    def enter(self, module: nn.Module) -> None:
        self.original = processor = module.processor
        self.source = type(processor)
        kind = _PROCESSORS.of(self.source)
        if isinstance(processor, nn.Module):  # its name in the state_dict is that of its place
            processor.__class__ = kind
            self.ours = processor
            return
        # One of its own, since attentions may share theirs; what is set on either is on both.
        self.ours = object.__new__(kind)
        self.ours.__dict__ = processor.__dict__
        module.processor = self.ours

    def leave(self, module: nn.Module) -> str | None:
        if isinstance(self.original, nn.Module):
            self.original.__class__ = self.source
        elif module.processor is self.ours:
            module.processor = self.original
        return None  # also where another processor was set since, which stays

    def covers(self, part: nn.Module) -> bool:
        return part is self.ours

    def __str__(self) -> str:
        return f"with {type(self.ours).__module__}.{type(self.ours).__qualname__}"


def attention(module: nn.Module) -> Any:
    """What becomes of an attention."""
    processor = getattr(module, "processor", None)
    if processor is None:
        return "it has no processor"
    kind = type(processor)
    function = getattr(kind, "__call__", None)  # noqa: B004
    if calls(function, _DISPATCH):
        if tuple(inspect.signature(_original).parameters) != _PARAMETERS:
            return f"diffusers {__version__} dispatches attention otherwise"
    elif not calls(function, _ATTENTION):
        return f"its processor, {kind.__name__}, does not call torch's attention"
    return ProcessorSwap()
