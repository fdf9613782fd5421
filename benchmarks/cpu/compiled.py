"""Peers that torch.compile makes: seconds per shape, and they need a C++ compiler.

They are timed on the shapes of SOME and in the suite "kinds"; ``--peers`` by name takes all shapes.
"""

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common import peers
from ..common.peers import Arguments, Skipped

SOME = ("lxmert_text_to_image", "lxmert_image_to_text", "vit_b16", "qformer", "self_256")


def takes(suite: str, shape: str) -> bool:
    """Whether they are timed there without being asked for."""
    return suite == "kinds" or shape in SOME


def require_compiler() -> None:
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise Skipped("needs a C++ compiler")


def compiled_formula(call: Arguments) -> Callable[[], Tensor]:
    """The unfused formula under torch.compile, once per shape."""
    require_compiler()
    torch.compiler.reset()  # every shape is another program, and they are limited in number
    return peers.compiled_formula(call)


def flex(call: Arguments) -> Callable[[], Tensor]:
    """FlexAttention under torch.compile; key padding, causality, windows, segments and prefixes as
    its block mask, soft caps and ALiBi as its score function."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    require_compiler()
    if call.get("attn_mask") is not None:
        raise Skipped("a mask tensor would be read score by score")
    if call.get("sinks") is not None:
        raise Skipped("it has no sinks")
    if call.get("position_table") is not None:
        raise Skipped("a table would be read score by score")
    query, key = call["query"], call["key"]
    padding, causal = call.get("key_padding_mask"), bool(call.get("is_causal"))
    window, softcap, slopes = (call.get(n) for n in ("window", "softcap", "alibi_slopes"))
    ranges = ("segment_ids_q", "segment_ids_k", "prefix_len")
    q_ids, k_ids, prefix = (call.get(name) for name in ranges)
    mask = shaped = None
    if not (padding is q_ids is prefix is None) or causal or window:
        left, right = window or (None, None)

        def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
            shown = q >= k if causal or prefix is not None else k >= 0
            if prefix is not None:
                shown = shown | (k < prefix[b])
            if q_ids is not None and k_ids is not None:
                shown = shown & (q_ids[b, q] == k_ids[b, k])
            if left is not None:
                shown = shown & (q - k <= left)
            if right is not None:
                shown = shown & (k - q <= right)
            return shown & ~padding[b, k] if padding is not None else shown

        mask = create_block_mask(
            visible, query.shape[0], None, query.shape[2], key.shape[2], device="cpu"
        )
    if softcap is not None or slopes is not None:

        def shaped(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            return score if slopes is None else score - slopes[h] * (q - k).abs()

    torch.compiler.reset()
    return partial(
        torch.compile(flex_attention, dynamic=False), query, key, call["value"], shaped, mask,
        scale=call.get("scale"), enable_gqa=bool(call.get("enable_gqa")),
    )  # fmt: skip


ALL = {"compiled": compiled_formula, "flex": flex}
