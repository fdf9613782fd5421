"""Peers that torch.compile makes: seconds per shape, and they need a C++ compiler.

They are timed on the shapes of SOME; ``--peers`` by name takes all shapes.
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


def require_compiler() -> None:
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise Skipped("needs a C++ compiler")


def compiled_formula(call: Arguments) -> Callable[[], Tensor]:
    """The unfused formula under torch.compile, once per shape."""
    require_compiler()
    torch.compiler.reset()  # every shape is another program, and they are limited in number
    return peers.compiled_formula(call)


def flex(call: Arguments) -> Callable[[], Tensor]:
    """FlexAttention under torch.compile; key padding and causality as its block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    require_compiler()
    if call.get("attn_mask") is not None:
        raise Skipped("a mask tensor would be read score by score")
    query, key = call["query"], call["key"]
    padding, causal = call.get("key_padding_mask"), bool(call.get("is_causal"))
    mask = None
    if padding is not None or causal:

        def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
            shown = q >= k if causal else k >= 0
            return shown & ~padding[b, k] if padding is not None else shown

        mask = create_block_mask(
            visible, query.shape[0], None, query.shape[2], key.shape[2], device="cpu"
        )
    torch.compiler.reset()
    return partial(
        torch.compile(flex_attention, dynamic=False), query, key, call["value"], block_mask=mask,
        scale=call.get("scale"), enable_gqa=bool(call.get("enable_gqa")),
    )  # fmt: skip


ALL = {"compiled": compiled_formula, "flex": flex}
