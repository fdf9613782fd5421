"""timm's attentions, blocks and MLPs on our ops, for `fastfusion.accelerate`.

- An attention keeps its code, in which the attention itself is ours (`_own_code.py`).
- `Block`, of ViT, DeiT, DINO, SigLIP, MobileViT and others, is one call of `encoder_layer` where
  its parts come to nothing else: in eval mode, without layer scale, norms of queries and keys,
  gates, hooks or replaced parts, and with an activation that kernels have. Elsewhere it calls its
  parts.
- `Mlp` is two calls of `linear`.

Whether the installed version's `Block` and `Mlp` have the formulas that ours stand for is tried out
on a small one. Known: 1.0.31.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm.layers
import torch
from timm.layers import activations
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.models import vision_transformer
from torch import Tensor, nn

from fastfusion.acceleration.swaps import ClassSwap
from fastfusion.core.arguments import PLAIN
from fastfusion.integrations._own_code import Subclasses, calls
from fastfusion.nn._layers import TOGETHER, run_encoder_layer
from fastfusion.nn._linear import LINEAR, runs_on_cpu, two_layers, weights_of
from fastfusion.nn._plain import (
    ACTIVATION_MODULES,
    LAYER_NORMS,
    activation_module_name,
    are_bare,
    has_global_hooks,
    is_bare,
    is_idle,
)

_ATTENTIONS = Subclasses(__name__, "timm")
# Which may cast to a type of its own.
LAYER_NORMS[timm.layers.LayerNorm] = lambda module: not module._fast_norm
ACTIVATION_MODULES[activations.GELU] = "gelu"
ACTIVATION_MODULES[activations.GELUTanh] = "gelu_tanh"
ACTIVATION_MODULES[activations.QuickGELU] = "quick_gelu"


def __getattr__(name: str) -> Any:
    """The way to classes that `accelerate` made: `layers` to that of timm.layers.attention."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _ATTENTIONS.named(name)


@dataclass
class _SwapWithFlags(ClassSwap):
    """Of a layer that also has to be told to take a way of its own that calls its parts and torch's
    attention."""

    flags: tuple[str, ...] = ()

    def enter(self, module: nn.Module) -> None:
        super().enter(module)
        module.__dict__.update(dict.fromkeys(self.flags, True))

    def leave(self, module: nn.Module) -> str | None:
        reason = super().leave(module)
        if reason is None:
            module.__dict__.update(dict.fromkeys(self.flags, False))
        return reason


def attention(module: nn.Module) -> Any:
    """What becomes of an attention."""
    kind = type(module)
    if not calls(kind.forward):
        return f"timm {timm.__version__} computes it without torch's attention"
    flags = []
    if not getattr(module, "fused_attn", True):
        if not timm.layers.use_fused_attn():
            return "its fused_attn is off, see timm.layers.set_fused_attn"
        flags.append("fused_attn")  # Swin's, which timm holds for an experiment
    if getattr(module, "q_bias", None) is not None and not getattr(
        module, "qkv_bias_separate", True
    ):
        flags.append("qkv_bias_separate")  # else BEiT's and EVA's read the weight of qkv
    made = _ATTENTIONS.of(kind)
    return _SwapWithFlags(made, flags=tuple(flags)) if flags else made


class Block(vision_transformer.Block):
    """`timm.models.vision_transformer.Block` in one call."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        result = _in_one_call(self, x, attn_mask, is_causal)
        if result is None:
            result = super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return result


class Mlp(timm.layers.Mlp):
    """`timm.layers.Mlp` in two calls."""

    def forward(self, x: Tensor) -> Tensor:
        result = _in_two_calls(self, x)
        return super().forward(x) if result is None else result


def block(module: nn.Module) -> Any:
    """What becomes of a `Block`."""
    return Block if _has_our_formula(vision_transformer.Block) else _ANOTHER


def mlp(module: nn.Module) -> Any:
    """What becomes of an `Mlp`."""
    if type(module.fc1) is nn.Conv2d:
        return None
    return Mlp if _has_our_formula(timm.layers.Mlp) else _ANOTHER


_ANOTHER = f"timm {timm.__version__} computes it otherwise"


@cache
def _has_our_formula(kind: type) -> bool:
    """Whether our calls give what the forward of this class does."""
    with torch.random.fork_rng([]), torch.no_grad(), torch.device("cpu"):
        try:
            if kind is timm.layers.Mlp:
                small = kind(64, 256)
                ours: Callable[..., Any] = _in_two_calls
                calls: list[tuple[Any, ...]] = [()]
            else:
                small = kind(64, 2, qkv_bias=True)
                ours = _in_one_call
                calls = [(None, False), (torch.rand(5, 5) > 0.3, False), (None, True)]
            small = small.float().eval()
            for parameter in small.parameters():
                parameter.uniform_(-0.2, 0.3)
            x = torch.randn(2, 5, 64, dtype=torch.float32)
            for call in calls:
                found = ours(small, x, *call)
                expected = small(x, *call)
                if found is None or not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
                    return False
        except (AttributeError, TypeError):
            return False
    return True


def _in_one_call(module: Any, x: Any, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """`Block.forward`, or None where it may mean more than its formula."""
    if not runs_on_cpu(x) or has_global_hooks():
        return None
    parts = module.__dict__["_modules"]
    try:
        norms = parts["norm1"], parts["norm2"]
        inside, feed_forward = parts["attn"], parts["mlp"]
        idle = [parts[name] for name in ("ls1", "drop_path1", "ls2", "drop_path2")]
    except KeyError:
        return None
    if type(inside) not in _PLAIN_ATTENTIONS or type(feed_forward) not in _PLAIN_MLPS:
        return None
    own, rest = inside.__dict__["_modules"], feed_forward.__dict__["_modules"]
    idle += [own[name] for name in ("q_norm", "k_norm", "attn_drop", "norm", "proj_drop")]
    idle += [rest[name] for name in ("drop1", "norm", "drop2")]
    layers = own["qkv"], own["proj"], rest["fc1"], rest["fc2"]
    activation = activation_module_name(rest["act"])
    if (
        activation is None
        or not inside.fused_attn
        or inside.num_heads * inside.head_dim != x.shape[-1]
        or getattr(inside, "gate", None) is not None
        or not all(map(_is_idle, idle))
        or any([type(layer) not in LINEAR for layer in layers])
        or not are_bare((inside, feed_forward, rest["act"], *norms, *layers))
        or type(attn_mask) not in PLAIN
        or not (attn_mask is None or attn_mask.dtype in (torch.bool, x.dtype))
    ):
        return None
    in_proj, *others = map(weights_of, layers)
    products = in_proj, TOGETHER, TOGETHER, *others
    return run_encoder_layer(
        x, products, norms, inside.num_heads, activation, True, attn_mask, None, bool(is_causal)
    )


def _in_two_calls(module: Any, x: Any) -> Tensor | None:
    """`Mlp.forward`, likewise."""
    parts = module.__dict__["_modules"]
    activation = parts["act"]
    name = activation_module_name(activation)
    if name is None or type(parts["norm"]) is not nn.Identity or not are_bare((parts["norm"],)):
        return None
    dropouts = parts["drop1"], parts["drop2"]
    return two_layers(x, parts["fc1"], activation, name, parts["fc2"], dropouts)


def _is_idle(module: Any) -> bool:
    """Whether calling this part gives its input."""
    if type(module) is DropPath:
        return not (module.training and module.drop_prob) and is_bare(module)
    return is_idle(module)


_PLAIN_ATTENTIONS = (Attention, _ATTENTIONS.of(Attention))
_PLAIN_MLPS = (timm.layers.Mlp, Mlp)
