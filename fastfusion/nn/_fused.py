"""The fusion modules in few launches: inference on a GPU.

Launches of `CrossModalAttention` for both streams together, each kernel taking both at once:

    norm_first                              otherwise
    1  norm1                                1  in_proj, written as heads
    2  in_proj, written as heads            2  attention
    3  attention                            3  out_proj + bias + residual
    4  out_proj + bias + residual           4  norm1
    5  norm2                                5  linear1 + bias + activation
    6  linear1 + bias + activation          6  linear2 + bias + residual
    7  linear2 + bias + residual            7  norm2

that is 7, and one more for each further kernel of the attention op; torch needs 9 a stream and the
attention. `CrossAttention`: 3 (q_proj and kv_proj, attention, out_proj); torch needs 3 and the
attention. The kernels are Triton's; of `CrossAttention` there is a CUDA version: _cuda_block.py.

A sum is rounded once where torch rounds after every step, so results differ by rounding only. Any
circumstance in which a kernel would skip something that a user may count on (a gradient, dropout, a
hook, another class of module, autocast, a transform, a mode) leaves the call to the modules.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from fastfusion import _cuda_block
from fastfusion._info import Watching
from fastfusion.backends import triton
from fastfusion.core import arguments
from fastfusion.core.op import forced_backend
from fastfusion.nn._plain import activation_name, has_global_hooks, is_bare
from fastfusion.ops.bidirectional_attention import bidirectional_attention
from fastfusion.ops.scaled_dot_product_attention import scaled_dot_product_attention

MAX_NORM_WIDTH = 16384  # kernels.layer.norm.MAX_WIDTH, here without importing Triton
_PLAIN_TENSORS = (Tensor, nn.Parameter)
# torch.set_default_device, and `explain`, which describes what runs without it.
_HARMLESS_MODES = (DeviceContext, Watching)


def cross_modal_fits(
    module: Any, visual: Tensor, text: Tensor, attn_mask: Tensor | None = None
) -> bool:
    """Whether a `CrossModalAttention` without weights may take `cross_modal` for this call."""
    if not kernels_run_on(visual) or (module.training and module.dropout > 0.0):
        return False
    if _wants_gradient(attn_mask):
        return False
    streams = (module.visual, module.text)
    activation = streams[0].activation
    if activation is not streams[1].activation or activation_name(activation) is None:
        return False
    return _plain_call((visual, text), [m for s in streams for m in s._modules.values()])


def cross_attention_kernels(
    module: Any, query: Tensor, context: Tensor | tuple[Tensor, Tensor], attn_mask: Tensor | None
) -> Callable[..., Tensor] | None:
    """What takes the place of `CrossAttention.forward` without weights for this call: a function
    like `cross_attention`, or nothing."""
    run: Callable[..., Tensor]
    if kernels_run_on(query):
        run = cross_attention
    elif isinstance(context, Tensor) and _cuda_block.runs_on(module, query, context):
        run = _cuda_block.cross_attention
    else:
        return None
    if (module.training and module.dropout > 0.0) or _wants_gradient(attn_mask):
        return None
    inputs = (context,) if isinstance(context, Tensor) else context
    return run if _plain_call((query, *inputs), module._modules.values()) else None


def cross_modal(
    module: Any,
    visual: Tensor,
    text: Tensor,
    visual_padding_mask: Tensor | None,
    text_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`CrossModalAttention.forward` where `cross_modal_fits`; a bool `attn_mask` is True where two
    tokens attend to each other."""
    streams = (module.visual, module.text)
    both: Any = (visual, text)
    first, second = [s.norm1 for s in streams], [s.norm2 for s in streams]
    scored = _norms(first, both) if module.norm_first else both
    (query, visual_value), (key, text_value) = _heads(
        [s.in_proj for s in streams], scored, (2, 2), module.num_heads
    )
    attended: Sequence[Tensor] = bidirectional_attention(
        query, key, text_value, visual_value, attn_mask=attn_mask,
        query_padding_mask=visual_padding_mask, key_padding_mask=text_padding_mask,
    )  # fmt: skip
    attended = [a.transpose(1, 2).flatten(2) for a in attended]
    both = _linears([s.out_proj for s in streams], attended, residuals=both)
    both = both if module.norm_first else _norms(first, both)
    hidden = _norms(second, both) if module.norm_first else both
    activation = activation_name(streams[0].activation)
    hidden = _linears([s.linear1 for s in streams], hidden, activation)
    both = _linears([s.linear2 for s in streams], hidden, residuals=both)
    visual, text = both if module.norm_first else _norms(second, both)
    return visual, text


def cross_attention(
    module: Any,
    query: Tensor,
    context: Tensor | tuple[Tensor, Tensor],
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> Tensor:
    """`CrossAttention.forward` in Triton's kernels, for a context or its keys and values; a bool
    `attn_mask` is True where a query attends."""
    if isinstance(context, tuple):
        k, v = context
        ((q,),) = _heads([module.q_proj], (query,), (1,), module.num_heads)
    else:
        (q,), (k, v) = _heads(
            [module.q_proj, module.kv_proj], (query, context), (1, 2), module.num_heads
        )
    out = scaled_dot_product_attention(q, k, v, attn_mask, key_padding_mask=key_padding_mask)
    return _linears([module.out_proj], [out.transpose(1, 2).flatten(2)])[0]


def kernels_run_on(tensor: Tensor) -> bool:
    """Whether the Triton kernels are what runs on the device of `tensor`: always on a GPU that can
    run them, on the CPU where they are asked for and interpreted."""
    if torch.compiler.is_compiling():  # inductor fuses by itself
        return False
    # First what costs nothing: calls on a CPU end here.
    forced = forced_backend()
    if forced != "triton" and (forced is not None or triton.INTERPRETED or not tensor.is_cuda):
        return False
    return not triton.refuses_tensor(tensor)


def _wants_gradient(mask: Tensor | None) -> bool:
    return mask is not None and mask.requires_grad and torch.is_grad_enabled()


def _plain_call(inputs: tuple[Tensor, ...], modules: Iterable[Any]) -> bool:
    """Whether calling these modules on plain tensors comes to nothing but their formulas."""
    if (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or arguments.autocast_dtype(inputs[0].device.type) is not None
        or has_global_hooks()
    ):
        return False
    if torch._C._len_torch_function_stack() > 0 and any(
        type(mode) not in _HARMLESS_MODES
        for mode in torch.overrides._get_current_function_mode_stack()
    ):
        return False
    tensors: list[Any] = [*inputs]
    for module in modules:
        own = module.__dict__
        if not is_bare(module):
            return False
        kind = type(module)
        if kind is nn.Dropout:
            if own["training"] and own["p"] > 0.0:
                return False
        elif kind is nn.Linear or (
            kind is nn.LayerNorm
            and len(own["normalized_shape"]) == 1
            and own["normalized_shape"][0] <= MAX_NORM_WIDTH
        ):
            tensors += own["_parameters"].values()
        else:
            return False
    dtype, device, tracked = inputs[0].dtype, inputs[0].device, torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            (tracked and tensor.requires_grad)
            or type(tensor) not in _PLAIN_TENSORS
            or tensor.dtype is not dtype
            or tensor.device != device
            or tensor.layout is not torch.strided
            or tensor.is_neg()
        ):
            return False
    return True


def _linears(
    modules: Sequence[Any],
    inputs: Sequence[Tensor],
    activation: str | None = None,
    residuals: Sequence[Tensor | None] = (None, None),
) -> Sequence[Tensor]:
    from fastfusion.kernels.layer.linear import Product, linears

    given = zip(modules, inputs, residuals, strict=False)
    return linears(tuple(Product(x, m.weight, m.bias, r) for m, x, r in given), activation)


def _heads(
    modules: Sequence[Any], inputs: Sequence[Tensor], parts: tuple[int, ...], heads: int
) -> Sequence[tuple[Tensor, ...]]:
    from fastfusion.kernels.layer.linear import Product, project_heads

    given = zip(modules, inputs, strict=True)
    return project_heads(tuple(Product(x, m.weight, m.bias) for m, x in given), parts, heads)


def _norms(modules: Sequence[Any], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    from fastfusion.kernels.layer.norm import Rows, layer_norms

    first, second = (Rows(x, m.weight, m.bias, m.eps) for m, x in zip(modules, inputs, strict=True))
    return layer_norms(first, second)
