"""How torch sees the compiled ops: shapes for tracing, gradients, vmap.

`kernel_op` serves the rarer ones. For attention the C++ library defines one kernel under three
schemas and its backward:

    attention           differentiable, for compiled code with gradients and for export
    attention_forward   raw, for eager calls and gradient-free compiled code
    attention_out       raw, without lse: the eager inference call
    attention_backward

A Python autograd kernel costs 5 us a call even without gradients, hence the raw schemas; an
autograd.Function with setup_context costs 22 us more than one of the old style, hence two
Function styles: `_Eager` for plain eager calls, `_Attention` for torch.func and graphs.
Order of choice and reasons: see `attention`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import Function

from fastfusion.backends import library
from fastfusion.core.arguments import ALIGNMENTS, check_one_device, is_exporting
from fastfusion.core.op import Op
from fastfusion.core.reference import attention_backward_reference, attention_reference
from fastfusion.core.torch_op import PLAIN, Interface, KernelOp

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

_is_compiling = torch.compiler.is_compiling
_any_autocast = torch._C._is_any_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
# What follows the tensors in every schema.
_OPTIONS = ("dropout_p", "is_causal", "bottom_right", "scale")
_out: Any = None
_forward: Any = None
_backward: Any = None
_graph: Any = None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    bottom_right: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
) -> Any:
    """The compiled op on normalised arguments, by the schema that fits the moment."""
    needs_gradient = _is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (attn_mask is not None and attn_mask.requires_grad)
    )
    given = (
        query, key, value, attn_mask, key_padding_mask, seed, dropout_p, is_causal, bottom_right,
        scale, enable_gqa,
    )  # fmt: skip
    if _is_compiling():
        if _transforms_active():
            return _by_reference(return_lse, *given)
        graph = needs_gradient or is_exporting()
        result = (_graph if graph else _forward)(*given)
    elif forward_ad._current_level >= 0:
        return _by_reference(return_lse, *given)
    elif _transforms_active():
        result = _Attention.apply(*given)
    elif needs_gradient:
        return (_EagerWithLse if return_lse else _Eager).apply(*given)
    elif return_lse:
        return _forward(*given)
    else:
        return _out(*given)
    return result if return_lse else result[0]


_ON_GPU = ("the inputs are on a GPU",)


def refuses(query: Tensor, *others: Any) -> Sequence[str]:
    """Why the compiled op cannot run a call with this query, one sentence per reason."""
    if query.is_cpu and query.dtype in DTYPES and library.cpu_unavailable is None:
        return ()
    if query.is_cuda:
        return _ON_GPU  # asked before each call there
    reasons = []
    if library.cpu_unavailable is not None:
        reasons.append(library.cpu_unavailable)
    if query.device.type == "meta":
        reasons.append("meta tensors have no data")
    elif query.device.type != "cpu":
        reasons.append(f"the inputs are on {query.device}")
    if query.dtype not in DTYPES:
        reasons.append(f"{str(query.dtype).removeprefix('torch.')} is left to the reference")
    return reasons


def path(query: Tensor, q_len: int, *others: Any) -> str:
    """How compiled attention runs a query of this length: instruction set, and in what way.

    Others: length of the key, whether it is causal, and whether it has dropout.
    """
    native: Any = library.native
    dtype = str(query.dtype).removeprefix("torch.")
    return f"{native.isa()}, {native.attention_path(dtype, q_len, *others)}"


def kernel_op(name: str, interface: Interface) -> KernelOp | None:
    """The compiled ops `<name>...`; None without them. `<name>_out` leaves log-sum-exps out."""
    if library.cpu_unavailable is not None:
        return None
    ops = torch.ops.fastfusion
    forward, out = getattr(ops, f"{name}_forward").default, getattr(ops, f"{name}_out").default

    def launch(*given: Any) -> Any:
        return (forward if given[-1] else out)(*given[:-1])

    return KernelOp(name, interface, launch, traceable=True)


def run_checked(
    cpu: KernelOp | None,
    op: Op,
    backend: str | None,
    attn_mask: Any,
    scale: Any,
    dropout_p: Any,
    causal_alignment: Any,
    flags: tuple[Any, ...],
    given: tuple[Any, ...],
    fits: Callable[..., bool] | None = None,
) -> Any:
    """The result of a plain call by a compiled op, which checks its arguments: 10 us less.

    None where the general road has to be taken: under autocast and transforms, with dropout, where
    another implementation is chosen, and where anything is wrong, for whose words see `check`.
    Kernels of a GPU are called as well where `fits` says that `given` are normal.
    """
    if cpu is None or _is_compiling() or _any_autocast() or cpu.by_reference():
        return None
    # By type, since the dispatcher would take 1 for True and a tensor for a number.
    if type(dropout_p) is not float or dropout_p != 0.0:
        return None
    if scale is not None and type(scale) is not float:
        return None
    if type(attn_mask) not in PLAIN or causal_alignment not in ALIGNMENTS:
        return None
    for flag in flags:
        if flag is not False and flag is not True:
            return None
    try:
        chosen = op.select(backend, given)
        if chosen.backend == "cpu" or (fits is not None and chosen.checks and fits(*given)):
            return chosen.run(*given)
        return None
    except (
        AttributeError,
        IndexError,
        TypeError,
        ValueError,
        RuntimeError,
    ):  # of arguments; others go on
        return None


def _by_reference(return_lse: bool, *given: Any) -> Any:
    out, lse = attention_reference(*given[:-1])
    return (out, lse()) if return_lse else out


def _fold(tensors: tuple[Any, ...], in_dims: tuple[Any, ...], size: int) -> list[Any]:
    """Move the vmapped dimension into the batch; contiguous, as kernels expect of lse and out."""

    def fold(tensor: Tensor, dim: int | None) -> Tensor:
        tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.flatten(0, 1).contiguous()

    return [
        None if tensor is None else fold(tensor, dim)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]


def _folded_mask(mask: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """The mask of a folded call; one that is not vmapped and has no batch stays as it is."""
    if mask is None:
        return None
    if dim is None:
        has_batch = mask.dim() == 4 and mask.shape[0] != 1
        return mask.repeat(size, 1, 1, 1) if has_batch else mask
    mask = mask.movedim(dim, 0)
    while mask.dim() < 5:
        mask = mask.unsqueeze(1)
    return mask.expand(-1, batch, -1, -1, -1).flatten(0, 1)


def _unfold(tensor: Tensor, size: int, batch: int) -> Tensor:
    return tensor.reshape(size, batch, *tensor.shape[1:])


def _select(tensors: tuple[Any, ...], in_dims: tuple[Any, ...], index: int) -> list[Any]:
    return [
        t if t is None or d is None else t.select(d, index)
        for t, d in zip(tensors, in_dims, strict=True)
    ]


def _stacked(results: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(column) for column in zip(*results, strict=True))


class _Backward(Function):
    """The backward op, itself differentiable: its derivative is that of the formula in torch.

    torch.func always asks for a graph, so a double backward through the reference that is chosen
    by is_grad_enabled() alone would make every torch.func.grad quadratic in memory.
    """

    @staticmethod
    def forward(*given: Any) -> Any:
        return _backward(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:8])
        ctx.options, ctx.mask_gradient = inputs[8:12], inputs[12]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        grad_out, grad_lse, query, key, value, attn_mask, padding, seed = ctx.saved_tensors
        primals = {"grad_out": grad_out, "query": query, "key": key, "value": value}
        if grad_lse is not None:
            primals["grad_lse"] = grad_lse
        if ctx.mask_gradient:
            primals["attn_mask"] = attn_mask
        constants = {} if ctx.mask_gradient else {"attn_mask": attn_mask}
        if grad_lse is None:
            constants["grad_lse"] = None

        options: dict[str, Any] = dict(zip(_OPTIONS, ctx.options, strict=True))

        def formula(tensors: dict[str, Any]) -> tuple[Tensor, ...]:
            results = attention_backward_reference(
                **tensors,
                **constants,
                key_padding_mask=padding,
                seed=seed,
                **options,
            )
            return tuple(r for r in results if r is not None)[: 4 if ctx.mask_gradient else 3]

        linearized: Any = torch.func.vjp(formula, primals)
        values, pullback = linearized
        filled = tuple(
            torch.zeros_like(v) if g is None else g.to(v.dtype)
            for v, g in zip(values, gradients, strict=False)
        )
        (pulled,) = pullback(filled)
        order = ("grad_out", "grad_lse", "query", "key", "value", "attn_mask")
        return (*(pulled.get(name) for name in order), *[None] * 7)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> Any:
        tensors, dims, size = given[:8], list(in_dims[:8]), info.batch_size
        mask_gradient = given[12]
        if size > 0 and (given[7] is not None or mask_gradient):
            # A dropout mask is a function of the batch index, and a mask's gradient is reduced
            # over the batch: neither survives folding.
            results = [
                _Backward.apply(*_select(tensors, tuple(dims), i), *given[8:]) for i in range(size)
            ]
            return _stacked(results), (0, 0, 0, 0)
        batch = given[2].shape[0 if dims[2] is None or dims[2] > 0 else 1]
        folded = _folded(tensors, dims, size, batch, mask_at=5)
        grad_query, grad_key, grad_value, empty = _Backward.apply(*folded, *given[8:])
        unfolded = tuple(_unfold(t, size, batch) for t in (grad_query, grad_key, grad_value))
        return (*unfolded, empty), (0, 0, 0, None)


def _folded(
    tensors: tuple[Any, ...], dims: list[Any], size: int, batch: int, mask_at: int
) -> list[Any]:
    """All tensors with the vmapped dimension in the batch."""
    mask = _folded_mask(tensors[mask_at], dims[mask_at], size, batch)
    others = _fold(
        tensors[:mask_at] + tensors[mask_at + 1 :],
        tuple(dims[:mask_at] + dims[mask_at + 1 :]),
        size,
    )
    return [*others[:mask_at], mask, *others[mask_at:]]


class _Attention(Function):
    """Attention under torch.func transforms and as the autograd kernel of the graph op."""

    @staticmethod
    def forward(*given: Any) -> Any:
        return _forward(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.options = inputs[6:10]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        query, key, value, attn_mask, padding, seed = ctx.saved_tensors
        if grad_out is None:
            if grad_lse is None:
                return (None,) * 11
            grad_out = query.new_zeros(*query.shape[:3], value.shape[3])
        mask_gradient = attn_mask is not None and ctx.needs_input_grad[3]
        differentiable = torch.is_grad_enabled() or _transforms_active()
        run = _Backward.apply if differentiable else _backward
        gradients = run(
            grad_out, grad_lse, query, key, value, attn_mask, padding, seed, *ctx.options,
            mask_gradient,
        )  # fmt: skip
        return (*gradients[:3], gradients[3] if mask_gradient else None, *[None] * 7)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> Any:
        tensors, dims, size = given[:6], list(in_dims[:6]), info.batch_size
        if size > 0 and given[5] is not None:
            results = [
                _Attention.apply(*_select(tensors, tuple(dims), i), *given[6:]) for i in range(size)
            ]
            return _stacked(results), (0, 0)
        batch = given[0].shape[0 if dims[0] is None or dims[0] > 0 else 1]
        out, lse = _Attention.apply(*_folded(tensors, dims, size, batch, mask_at=3), *given[6:])
        return (_unfold(out, size, batch), _unfold(lse, size, batch)), (0, 0)


class _EagerWithLse(_Attention):
    """The same by the old protocol: Function.apply with setup_context inspects signatures."""

    setup_context = Function.setup_context
    vmap = Function.vmap

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        output = _forward(*given)
        _Attention.setup_context(ctx, given, output)
        return output


class _Eager(Function):
    """Without lse, which the backward does not need either: 0.7 us less a call."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        ctx.save_for_backward(*given[:6])
        ctx.options = given[6:10]
        return _out(*given)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        return _Attention.backward(ctx, grad_out, None)


def fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    check_one_device(query, key, value, attn_mask, key_padding_mask, seed)
    batch, heads, q_len, head_dim = query.shape
    torch._check(key.shape[0] == batch)
    torch._check(key.shape[3] == head_dim)
    torch._check(value.shape[0] == batch)
    torch._check(value.shape[1] == key.shape[1])
    torch._check(value.shape[2] == key.shape[2])
    if attn_mask is not None:
        attn_mask.expand(batch, heads, q_len, key.shape[2])
    if key_padding_mask is not None:
        torch._check(key_padding_mask.shape[0] == batch)
        torch._check(key_padding_mask.shape[1] == key.shape[2])
    out = query.new_empty(batch, q_len, heads, value.shape[3]).transpose(1, 2)
    return out, query.new_empty(batch, heads, q_len, dtype=torch.float32)


def _fake_out(*given: Any) -> Tensor:
    return fake_attention(*given)[0]


def fake_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def rows_outside(tensor: Tensor) -> Tensor:
        batch, heads, length, dim = tensor.shape
        return tensor.new_empty(batch, length, heads, dim).transpose(1, 2)

    if attn_mask is not None and attn_mask.dtype != torch.bool and others[-1]:
        grad_mask = attn_mask.new_empty(attn_mask.shape)
    else:
        grad_mask = query.new_empty(0)
    return rows_outside(query), rows_outside(key), rows_outside(value), grad_mask


def _autograd_kernel(*given: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given[:4]):
        return _Attention.apply(*given)
    return _forward(*given)


def _graph_vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> Any:
    return _Attention.vmap(info, in_dims, *given)


def _register() -> None:
    global _out, _forward, _backward, _graph
    ops = torch.ops.fastfusion
    _graph = ops.attention.default
    _forward = ops.attention_forward.default
    _out = ops.attention_out.default
    _backward = ops.attention_backward.default
    for name, fake in (
        ("attention", fake_attention),
        ("attention_forward", fake_attention),
        ("attention_out", _fake_out),
        ("attention_backward", fake_attention_backward),
    ):
        torch.library.register_fake(f"fastfusion::{name}", fake)
    _IMPLEMENTATIONS.impl("attention", _autograd_kernel, "Autograd")
    torch.library.register_vmap("fastfusion::attention", _graph_vmap)


_IMPLEMENTATIONS = torch.library.Library("fastfusion", "IMPL")
if library.cpu_unavailable is None:
    _register()
