"""Attention of transformers' models by name: `attn_implementation="fastfusion"`.

The interface has two halves, and both are registered: the function that computes attention, and
the one that makes its masks. Of a name that has the first alone, transformers makes no masks at
all, and padding takes part without a word.

Masks are bool, as of "sdpa", where everything in the model's package reads them through the
interface; elsewhere, where eager code may add them to scores (to which True adds 1), they are
float, as of "eager".
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastfusion.integrations.transformers._code import eager_function, package_uses_interface
from fastfusion.ops.scaled_dot_product_attention import scaled_dot_product_attention

NAME = "fastfusion"
# Beside queries of any dtype; a float mask of another than theirs is cast.
_MASKS = (torch.bool, torch.float32)

_USED = ("eager_mask", "sdpa_mask", "causal_mask_function", "bidirectional_mask_function")

_is_compiling = torch.compiler.is_compiling
_collector: Any = None  # transformers' record of what the caller wants to see
_recorder: Any = None  # the code of the hooks that fill it
_paged_cache: type | None = None
_masks: Any = None  # transformers.masking_utils
_reads_bool: dict[type, bool] = {}  # by class of configuration
_told: set[str] = set()


def register() -> None:
    """Make `attn_implementation="fastfusion"` known to transformers: its attention function and its
    mask function. Importing this package does it; again is harmless.

    Raises:
        ImportError: transformers is missing, or older than 5.0.
    """
    global _collector, _masks, _paged_cache, _recorder
    try:
        from transformers import masking_utils, modeling_utils
        from transformers.integrations import sdpa_attention

        functions = modeling_utils.AttentionInterface
        masks = masking_utils.AttentionMaskInterface
        for name in _USED:
            getattr(masking_utils, name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "fastfusion.integrations.transformers needs transformers >= 5, whose attention "
            f"interface it extends: {error}"
        ) from error
    try:
        from transformers.utils import output_capturing

        _collector = output_capturing._active_collector
        inner = output_capturing.install_output_capuring_hook.__code__.co_consts
        _recorder = {c.co_name: c for c in inner if hasattr(c, "co_name")}["output_capturing_hook"]
    except (ImportError, AttributeError, KeyError):
        _collector = _recorder = None
    _masks = masking_utils
    _paged_cache = getattr(sdpa_attention, "PagedAttentionCache", None)
    functions.register(NAME, attention)
    masks.register(NAME, attention_mask)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers' interface calls.

    As with "sdpa", attention is causal only where no mask says what is: `is_causal`, or else what
    the module says of itself. Where the caller wants the weights, the model's own eager function
    computes them.

    Args:
        module: whose attention it is.
        query: (batch, heads, q_len, head_dim).
        key, value: (batch, kv_heads, kv_len, head_dim).
        attention_mask: broadcastable to (batch, heads, q_len, kv_len): bool, True = attend, or a
            float bias.
        scaling: factor of the scores; 1 / sqrt(head_dim) by default.
        dropout: probability of dropping a score, in training.
        is_causal: query i sees keys 0..i, where there is no mask.
        position_bias: added to the scores, likewise broadcastable.
        cache: keys and values in pages are refused.
        softcap: scores become softcap * tanh(score / softcap) before masks, as Gemma 2's.
        s_aux: (heads,), one more score for each head, which has no value, as gpt-oss's sinks.
        kwargs: what else the model hands down.

    Returns:
        The output (batch, q_len, heads, head_dim), contiguous, and the weights or None.

    Raises:
        NotImplementedError: a paged cache.
    """
    if cache is not None and _paged_cache is not None and isinstance(cache, _paged_cache):
        raise NotImplementedError(
            f'attn_implementation="{NAME}" has no paged cache; use "sdpa" for continuous batching'
        )
    q_len, kv_len = query.shape[2], key.shape[2]
    causal: Any = _is_causal(module) if is_causal is None else is_causal
    causal = q_len > 1 and attention_mask is None and causal
    if type(causal) is not bool:  # tracers count lengths in tensors
        causal = bool(causal)
    if wants_weights(kwargs):
        _say_once(
            "attention weights", f"{type(module).__name__} computes attention by its eager formula"
        )
        for name, given in (("softcap", softcap), ("s_aux", s_aux)):
            if given is not None:  # eager functions of models without it may not know the name
                kwargs[name] = given
        return _eager(
            module, query, key, value, attention_mask, scaling, dropout, causal, position_bias,
            kwargs,
        )  # fmt: skip
    if causal and kv_len > q_len:  # a static cache that has just been filled
        key, value = key[:, :, :q_len], value[:, :, :q_len]
        if position_bias is not None:
            position_bias = position_bias[..., :q_len]
    if position_bias is not None:
        attention_mask = _biased(position_bias, attention_mask)
    if attention_mask is not None and attention_mask.dtype not in _MASKS:
        attention_mask = attention_mask.to(query.dtype)
    out = scaled_dot_product_attention(
        query, key, value, attention_mask, float(dropout) if module.training else 0.0, causal,
        scaling, query.shape[1] != key.shape[1], softcap=softcap, sinks=s_aux,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _is_causal(module: torch.nn.Module) -> Any:
    """What a module says of itself, of which one is known to be wrong: BridgeTower's cross-modal
    layers say that they are causal, see findings/, as only their decoder is."""
    says = getattr(module, "is_causal", True)
    if says and type(module).__name__ == "BridgeTowerSelfAttention":
        return module.is_decoder
    return says


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    *,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that transformers' interface calls.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset: of the mask.
        mask_function: says of indices (batch, head, query, key) whether they attend.
        attention_mask: bool (batch, keys), True = a token.
        config: of the model.
        kwargs: what transformers' own mask functions take besides.

    Returns:
        (batch, 1, q_length, kv_length), bool or float as the model reads it, or None: no mask, or
        the causal one of a model that leaves it to `is_causal`. Padding alone repeats one row.
    """
    is_bool = reads_bool(config)
    if mask_function is None:
        mask_function = _masks.causal_mask_function
    # Float masks are whole: eager code may write into them.
    repeats = is_bool and mask_function is _masks.bidirectional_mask_function
    mask: Tensor | None = (_masks.sdpa_mask if is_bool else _masks.eager_mask)(
        batch_size=batch_size,
        q_length=1 if repeats else q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        config=config,
        **kwargs,
    )
    return mask.expand(-1, -1, q_length, -1) if repeats and mask is not None else mask


def reads_bool(config: Any) -> bool:
    """Whether masks made for models of this configuration are read by the interface alone."""
    known = _reads_bool.get(type(config))
    if known is None:
        if torch.compiler.is_dynamo_compiling():  # which cannot read the package's files
            return False
        known = _reads_bool[type(config)] = package_uses_interface(config)
    return known


def wants_weights(kwargs: Mapping[str, Any]) -> bool:
    """Whether whoever called the model shall get attention weights."""
    if kwargs and kwargs.get("output_attentions"):
        return True
    wanted = collected()
    return bool(wanted) and any(name.endswith("attentions") for name in wanted)


def collected() -> Mapping[str, Any]:
    """What transformers records of the running call, by name."""
    if _collector is None or (_is_compiling() and not _collector.compiling):
        return {}
    return _collector.get() or {}


def recorded_by(hook: Any) -> str | None:
    """What a hook of transformers' records, None of any other hook."""
    code = getattr(hook, "__code__", None)
    if code is None or code is not _recorder:
        return None
    name: str = hook.__closure__[code.co_freevars.index("key")].cell_contents
    return name


def are_idle(hooks: Mapping[int, Any]) -> bool:
    """Whether these hooks are recorders of transformers', which stay where one was once needed, and
    nobody reads them now."""
    wanted = collected()
    names = map(recorded_by, hooks.values())
    return all(name is not None and name not in wanted for name in names)


def _eager(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    is_causal: bool,
    position_bias: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The formula of the model itself, with the masks that it reads: float ones."""
    lowest = torch.finfo(query.dtype).min
    if mask is None and is_causal:
        mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)
    function = eager_function(module)
    if function is not None:
        if position_bias is not None:
            kwargs = {**kwargs, "position_bias": position_bias}
        result: tuple[Tensor, Tensor | None] = function(
            module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return result
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for bias in (position_bias, mask):
        if bias is not None:
            scores = scores + bias
    if sinks is not None:
        sinks = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = weights[..., : key.shape[2]]
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _biased(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """Both in one mask, as transformers joins them for "sdpa"."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
    return position_bias + mask


def _say_once(what: str, then: str) -> None:
    if what not in _told and not _is_compiling():
        _told.add(what)
        warnings.warn(f"fastfusion has no {what} in its kernels: {then}", stacklevel=3)
