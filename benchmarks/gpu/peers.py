"""What a user would call on a CUDA device instead of an op of ours.

As in `common/peers.py` an adapter takes the keyword arguments of our public op and returns a call
without arguments. A peer that does not take a call says why: it raises `Skipped` in its adapter, or
torch says it in warnings when the call first runs (`sdpa_refusal`).
"""

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..common import peers
from ..common.peers import Adapter, Arguments, Skipped
from . import block

# torch.compile and FlexAttention compile for seconds per shape; --full measures them everywhere,
# and --quick only where a goal is about them.
QUICK_COMPILED_SHAPES = frozenset(("block_20_36",))
COMPILED_SHAPES = QUICK_COMPILED_SHAPES | {
    *("lxmert_text_to_image", "vilt_joint", "gdino_decoder_text", "joint_2048", "bi_lxmert"),
    *("block_197_20", "block_32_257"),
}


@dataclass(frozen=True)
class Peer:
    """An implementation that ours is timed beside.

    Attributes:
        adapt: makes the call; raises Skipped.
        context: in which the call runs, such as the choice of an SDPA backend.
        compiled: whether it compiles anew for every shape, which takes seconds.
        package: what has to be installed, None where torch is enough.
        sdpa: the backend of torch's SDPA that it insists on, as torch's warnings call it.
    """

    adapt: Adapter
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    compiled: bool = False
    package: str | None = None
    sdpa: str | None = None

    def missing(self) -> str | None:
        """Why this peer runs nowhere on this machine, None where it may."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed"


def _unmasked(call: Arguments, who: str) -> None:
    for name in ("attn_mask", "key_padding_mask", "query_padding_mask"):
        if call.get(name) is not None:
            raise Skipped(f"{who} takes no mask in this form")


def _no_bias_gradient(call: Arguments, who: str) -> None:
    mask = call.get("attn_mask")
    if mask is not None and mask.requires_grad:
        raise Skipped(f"{who} is not asked for the gradient of a bias")


# ---- attention


def flex(call: Arguments) -> Callable[[], Tensor]:
    """FlexAttention, compiled: causal and boolean masks in its block mask, a bias in score_mod."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _no_bias_gradient(call, "FlexAttention")
    query, key, value = call["query"], call["key"], call["value"]
    padding, mask = call.get("key_padding_mask"), call.get("attn_mask")
    conditions: list[Any] = []
    if call.get("is_causal"):
        conditions.append(lambda b, h, q, k: k <= q)
    if padding is not None:
        visible = ~padding
        conditions.append(lambda b, h, q, k: visible[b, k])
    if mask is not None and mask.dtype == torch.bool:
        allowed = mask.expand(query.shape[0], query.shape[1], -1, -1)
        conditions.append(lambda b, h, q, k: allowed[b, h, q, k])
    score_mod, block_mask = None, None
    if conditions:

        def keep(b: Any, h: Any, q: Any, k: Any) -> Any:
            kept = conditions[0](b, h, q, k)
            for condition in conditions[1:]:
                kept = kept & condition(b, h, q, k)
            return kept

        batch, heads = query.shape[:2] if mask is not None else (query.shape[0], None)
        block_mask = create_block_mask(
            keep, batch, heads, query.shape[-2], key.shape[-2], device=query.device
        )
    if mask is not None and mask.dtype != torch.bool:
        bias = mask.expand(query.shape[0], query.shape[1], -1, -1)

        def score_mod(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return score + bias[b, h, q, k]

    return partial(
        torch.compile(flex_attention, dynamic=False),
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=call.get("scale"),
        enable_gqa=call.get("enable_gqa", False),
    )


def flash_attn(call: Arguments) -> Callable[[], Tensor]:
    """flash-attn's own function, on (batch, length, heads, head_dim) views of the inputs."""
    _unmasked(call, "flash_attn")
    query, key, value = (call[name].transpose(1, 2) for name in ("query", "key", "value"))
    causal = call.get("is_causal", False)
    if causal and query.shape[1] != key.shape[1]:
        raise Skipped("flash_attn aligns a causal mask bottom right")
    function = importlib.import_module("flash_attn").flash_attn_func
    scale = call.get("scale")

    def run() -> Tensor:
        return function(query, key, value, softmax_scale=scale, causal=causal).transpose(1, 2)

    return run


def xformers(call: Arguments) -> Callable[[], Tensor]:
    """xformers' memory_efficient_attention, on (batch, length, heads, head_dim) views."""
    _unmasked(call, "xformers")
    if call.get("enable_gqa"):
        raise Skipped("xformers takes grouped heads in another layout")
    ops = importlib.import_module("xformers.ops")
    query, key, value = (call[name].transpose(1, 2) for name in ("query", "key", "value"))
    bias = ops.LowerTriangularMask() if call.get("is_causal") else None
    scale = call.get("scale")

    def run() -> Tensor:
        out = ops.memory_efficient_attention(query, key, value, attn_bias=bias, scale=scale)
        return out.transpose(1, 2)

    return run


# ---- bidirectional


def grounding_dino(call: Arguments) -> Callable[[], tuple[Tensor, Tensor]]:
    """Both directions as in Grounding DINO's fusion layer: one maximum over all scores is
    subtracted, scores are clamped to +-50000, and each direction takes its own softmax."""
    query, key = call["query"], call["key"]
    value, query_value = call["value"], call["query_value"]
    scale = query.shape[-1] ** -0.5
    rows, columns = call.get("key_padding_mask"), call.get("query_padding_mask")
    hidden_keys = None if rows is None else rows[:, None, None, :]
    hidden_queries = None if columns is None else columns[:, None, None, :]

    def run() -> tuple[Tensor, Tensor]:
        scores = (query * scale) @ key.transpose(-1, -2)
        scores = (scores - scores.max()).clamp(-50000, 50000)
        transposed = scores.transpose(-1, -2)
        transposed = transposed - transposed.max(-1, keepdim=True)[0]
        transposed = transposed.clamp(-50000, 50000)
        if hidden_queries is not None:
            transposed = transposed.masked_fill(hidden_queries, -torch.inf)
        if hidden_keys is not None:
            scores = scores.masked_fill(hidden_keys, -torch.inf)
        return scores.softmax(-1) @ value, transposed.softmax(-1) @ query_value

    return run


def compiled_pair(call: Arguments) -> Callable[[], tuple[Tensor, Tensor]]:
    """torch.compile of the unfused formula of both directions."""
    return torch.compile(peers.two_unfused(call), dynamic=False)


# ---- the lists

_BACKENDS = {
    "flash": (SDPBackend.FLASH_ATTENTION, "flash attention"),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, "memory efficient"),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, "cudnn attention"),
}


def _sdpa_peers(adapter: Adapter, prefix: str) -> dict[str, Peer]:
    """A peer per backend of torch's SDPA; the default one lets torch choose."""
    found = {f"{prefix}sdpa": Peer(adapter)}
    for name, (backend, called) in _BACKENDS.items():
        context = partial(sdpa_kernel, backend)
        found[f"{prefix}{name}"] = Peer(adapter, context, sdpa=called)
    return found


PEERS: dict[str, dict[str, Peer]] = {
    "attention": {
        **_sdpa_peers(peers.sdpa, ""),
        "math": Peer(peers.sdpa, partial(sdpa_kernel, SDPBackend.MATH)),
        "unfused": Peer(peers.unfused),
        "compile": Peer(peers.compiled_formula, compiled=True),
        "flex": Peer(flex, compiled=True),
        "flash_attn": Peer(flash_attn, package="flash_attn"),
        "xformers": Peer(xformers, package="xformers"),
    },
    "bidirectional": {
        **_sdpa_peers(peers.two_sdpa, "two "),
        "unfused": Peer(peers.two_unfused),
        "grounding dino": Peer(grounding_dino),
        "compile": Peer(compiled_pair, compiled=True),
    },
    block.SUITE: {
        **{name: Peer(adapter) for name, adapter in block.ADAPTERS.items()},
        **{name: Peer(adapter, compiled=True) for name, adapter in block.COMPILED.items()},
    },
}


def left_out(peer: Peer, shape_name: str, compiled: str) -> str | None:
    """Why a peer is not asked for this shape; `compiled` is "none", "some" or "all"."""
    reason = peer.missing()
    if reason is None and peer.compiled and compiled != "all":
        if compiled == "none":
            if shape_name in QUICK_COMPILED_SHAPES:
                return None
            return "left out by --quick: it compiles for seconds per shape"
        if shape_name not in COMPILED_SHAPES:
            return "compiled for a few shapes only; --full takes all"
    return reason


def sdpa_refusal(warned: Iterable[str], backend: str) -> str:
    """Why torch's SDPA would not use the one backend it may, from the warnings of the call.

    torch lists the reasons of every backend, each list under a line "<name> kernel not used
    because:", and raises "No available kernel".
    """
    reasons: list[str] = []
    listening = False
    for message in warned:
        text = re.sub(r"\s*\(Triggered internally.*", "", message, flags=re.DOTALL).strip()
        if text.lower().endswith("kernel not used because:"):
            listening = text.lower().startswith(backend)
        elif listening and text:
            reasons.append(text.partition("\n")[0])
    return "; ".join(reasons) or "No available kernel"
