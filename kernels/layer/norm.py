"""LayerNorm and RMSNorm over the last dimension, of a sum with a residual where one is given.

    h = x + residual, rounded to the dtype of x
    LayerNorm: n = (h - mean(h)) / sqrt(var(h) + eps)     RMSNorm: n = h / sqrt(mean(h^2) + eps)
    out = n * weight + bias

A program holds whole rows in registers, so the variance is that of differences from the mean and
each row is read once. The gradient, with g = grad_out * weight, r = 1 / sqrt(...) and means over a
row (the first is left out of RMSNorm):

    dh = r * (g - mean(g) - n * mean(g * n)) + grad_sum
    d weight = sum over rows of grad_out * n     d bias = sum over rows of grad_out

It computes the statistics again, from a row that it reads anyway, and keeps nothing but h from the
forward pass. Its programs add up blocks of rows, and a second kernel adds the blocks in order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastfusion.kernels.host.arguments import rows_readable
from fastfusion.kernels.host.plan import FUSION, on
from fastfusion.kernels.host.tiles import cdiv, width

# Float32 values that the 512 threads of a row hold without spilling: 32 each, or 16 where the
# backward pass has a gradient and the sums of two more to hold.
MAX_WIDTH, MAX_GRADIENT_WIDTH = 16384, 8192
# Row blocks of a backward pass: enough programs for any GPU, few enough that their sums are a small
# part of the memory traffic; and the tiles that a program adds in a chain, which limits the error.
_BLOCKS, _CHAIN = 512, 64


class Rows(NamedTuple):
    """What is normalised together in one launch: rows of one width."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    residual: Tensor | None = None


@triton.jit
def _normalized(h, inside, count, eps, RMS: tl.constexpr):
    """(n, r): rows of h, 0 outside, as in the formula, and the factor of each row."""
    if not RMS:
        h = tl.where(inside, h - tl.div_rn(tl.sum(h, 1), count)[:, None], 0.0)
        # The first mean is rounded, by 1e-3 where it is 1e4; the mean of what is left is not.
        h = tl.where(inside, h - tl.div_rn(tl.sum(h, 1), count)[:, None], 0.0)
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(h * h, 1), count) + eps))[:, None]
    return h * r, r


@triton.jit
def _load(ptr, row, column, stride, inside):
    return tl.load(ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _forward_block(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, rows, columns, x_stride,
    residual_stride, eps, block, RMS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows; `sum_ptr` and `out_ptr` are contiguous."""
    row = (tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < columns)
    h = _load(x_ptr, row, column, x_stride, inside)
    if residual_ptr is not None:
        h += _load(residual_ptr, row, column, residual_stride, inside)
        h = h.to(out_ptr.dtype.element_ty)
        if sum_ptr is not None:
            tl.store(sum_ptr + row * columns + column, h, mask=inside)
        h = h.to(tl.float32)
    n, _ = _normalized(h, inside, tl.cast(columns, tl.float32), eps, RMS)
    if weight_ptr is not None:
        n *= tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        n += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * columns + column, n.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_2"])
def norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr,
    rows, columns, x_stride, residual_stride, eps,
    x_2_ptr, residual_2_ptr, weight_2_ptr, bias_2_ptr, sum_2_ptr, out_2_ptr,
    rows_2, columns_2, x_2_stride, residual_2_stride, eps_2,
    RMS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS_2: tl.constexpr, WIDTH_2: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of rows of the first tensor, then of the second where WIDTH_2 is not 0."""
    block = tl.program_id(0)
    blocks = tl.cdiv(rows, ROWS)
    if WIDTH_2 == 0 or block < blocks:
        _forward_block(
            x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, rows, columns, x_stride,
            residual_stride, eps, block, RMS, ROWS, WIDTH,
        )  # fmt: skip
    else:
        _forward_block(
            x_2_ptr, residual_2_ptr, weight_2_ptr, bias_2_ptr, sum_2_ptr, out_2_ptr, rows_2,
            columns_2, x_2_stride, residual_2_stride, eps_2, block - blocks, RMS, ROWS_2, WIDTH_2,
        )  # fmt: skip


@triton.jit
def _backward_block(
    grad_ptr, grad_sum_ptr, h_ptr, weight_ptr, grad_h_ptr, rows, columns, grad_stride,
    grad_sum_stride, h_stride, eps, block, RMS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes grad_h of ROWS rows; the terms of the gradients of weight and bias (ROWS, WIDTH)."""
    row = (block * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < columns)
    count = tl.cast(columns, tl.float32)
    n, r = _normalized(_load(h_ptr, row, column, h_stride, inside), inside, count, eps, RMS)
    grad = _load(grad_ptr, row, column, grad_stride, inside)
    g = grad
    if weight_ptr is not None:
        g *= tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    grad_h = g - n * tl.div_rn(tl.sum(g * n, 1), count)[:, None]
    if not RMS:
        grad_h -= tl.div_rn(tl.sum(g, 1), count)[:, None]
    grad_h *= r
    if grad_sum_ptr is not None:
        grad_h += _load(grad_sum_ptr, row, column, grad_sum_stride, inside)
    grad_h = grad_h.to(grad_h_ptr.dtype.element_ty)
    tl.store(grad_h_ptr + row * columns + column, grad_h, mask=inside)
    return grad * n, grad


@triton.jit(do_not_specialize=["rows", "steps"])
def norm_backward_kernel(
    grad_ptr, grad_sum_ptr, h_ptr, weight_ptr, grad_h_ptr, weight_parts_ptr, bias_parts_ptr,
    rows, columns, grad_stride, grad_sum_stride, h_stride, eps, steps,
    RMS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of steps * ROWS rows. `grad_h_ptr` is contiguous, the parts are float32
    (programs, columns)."""
    block = tl.cast(tl.program_id(0), tl.int64)
    weight_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    bias_sum = tl.zeros([ROWS, WIDTH], tl.float32)
    for step in range(steps):
        weight_term, bias_term = _backward_block(
            grad_ptr, grad_sum_ptr, h_ptr, weight_ptr, grad_h_ptr, rows, columns, grad_stride,
            grad_sum_stride, h_stride, eps, block * steps + step, RMS, ROWS, WIDTH,
        )  # fmt: skip
        weight_sum += weight_term
        bias_sum += bias_term
    column = tl.arange(0, WIDTH)
    part = block * columns + column
    if weight_parts_ptr is not None:
        tl.store(weight_parts_ptr + part, tl.sum(weight_sum, 0), mask=column < columns)
    if bias_parts_ptr is not None:
        tl.store(bias_parts_ptr + part, tl.sum(bias_sum, 0), mask=column < columns)


@triton.jit
def _sum_parts(parts_ptr, out_ptr, parts, columns, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, parts, PARTS):
        part = (tl.cast(start, tl.int64) + tl.arange(0, PARTS))[:, None]
        inside = (part < parts) & (column < columns)[None, :]
        total += tl.sum(_load(parts_ptr, part, column[None, :], columns, inside), 0)
    tl.store(out_ptr + column, total.to(out_ptr.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["parts"])
def norm_backward_merge_kernel(
    weight_parts_ptr, bias_parts_ptr, grad_weight_ptr, grad_bias_ptr, parts, columns,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of columns."""
    if weight_parts_ptr is not None:
        _sum_parts(weight_parts_ptr, grad_weight_ptr, parts, columns, PARTS, COLUMNS)
    if bias_parts_ptr is not None:
        _sum_parts(bias_parts_ptr, grad_bias_ptr, parts, columns, PARTS, COLUMNS)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    return_sum: bool = False,
) -> Any:
    """LayerNorm of x + residual over the last dimension.

    Args:
        x: (..., width), float32, bfloat16 or float16, of at most `MAX_WIDTH` columns, with
            gradients `MAX_GRADIENT_WIDTH`.
        weight, bias: (width,), of any of these dtypes.
        residual: of the shape and dtype of x.
        return_sum: also return x + residual.

    Returns:
        A tensor like x, or with `return_sum` two. Differentiable once.

    Raises:
        TypeError, ValueError: another dtype, shapes that do not fit, rows that are too wide.
    """
    return _norm(Rows(x, weight, bias, eps, residual), False, return_sum)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    return_sum: bool = False,
) -> Any:
    """RMSNorm of x + residual, else as `layer_norm`; eps is that of the dtype if not given."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _norm(Rows(x, weight, None, eps, residual), True, return_sum)


def norms(*given: Rows, rms: bool = False) -> tuple[Tensor, ...]:
    """LayerNorm, or RMSNorm, of one or two tensors of any shapes in one launch, without
    gradients."""
    return _launch_forward(given, rms, False)[0]


def _norm(given: Rows, rms: bool, return_sum: bool) -> Any:
    tensors = (given.x, given.weight, given.bias, given.residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        outs = _Norm.apply(*given, rms)
        total = given.x if given.residual is None else outs[1]
        return (outs[0], total) if return_sum else outs[0]
    (out,), (total,) = _launch_forward((given,), rms, return_sum)
    return (out, total) if return_sum else out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        rms: bool,
    ) -> tuple[Tensor, ...]:
        if x.shape[-1] > MAX_GRADIENT_WIDTH:
            raise ValueError(
                f"gradients need rows of at most {MAX_GRADIENT_WIDTH} elements, got {x.shape[-1]}"
            )
        given = Rows(x, weight, bias, eps, residual)
        (out,), (total,) = _launch_forward((given,), rms, True)
        ctx.save_for_backward(total, weight, bias)
        ctx.eps, ctx.rms = eps, rms
        ctx.set_materialize_grads(False)
        return (out,) if residual is None else (out, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_sum: Tensor | None = None) -> Any:
        h, weight, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if grad_out is None:
            return grad_sum, None, None, None, grad_sum if needed[4] else None, None
        grad_h, grad_weight, grad_bias = _launch_backward(
            grad_out, grad_sum, h, weight if needed[1] else None, bias if needed[2] else None,
            weight, ctx.eps, ctx.rms,
        )  # fmt: skip
        return grad_h, grad_weight, grad_bias, None, grad_h if needed[4] else None, None


def _cut(columns: int) -> tuple[int, int, int]:
    """Rows of a program, their padded width, warps: functions of the width alone, as is the order
    in which a row is added up."""
    if not 1 <= columns <= MAX_WIDTH:
        raise ValueError(f"the norm kernels take rows of 1 to {MAX_WIDTH} elements, got {columns}")
    padded = width(columns)
    return max(1, 1024 // padded), padded, min(16, max(4, padded // 512))


def _rows(tensor: Tensor) -> Tensor:
    """(rows, columns), a view if it can be one."""
    tensor = rows_readable(tensor)
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _check(given: Rows) -> None:
    if given.x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x must be float32, bfloat16 or float16, got {given.x.dtype}")
    for name in ("weight", "bias", "residual"):
        tensor = getattr(given, name)
        expected = given.x.shape if name == "residual" else given.x.shape[-1:]
        if tensor is not None and tensor.shape != expected:
            raise ValueError(
                f"{name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}; "
                f"x has shape {tuple(given.x.shape)}"
            )


def _launch_forward(
    tensors: tuple[Rows, ...], rms: bool, want_sum: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The outputs and, if wanted, the sums of one or two tensors."""
    outs, sums, arguments, cuts, blocks, warps = [], [], [], [], 0, 0
    for given in tensors:
        _check(given)
        columns = given.x.shape[-1]
        own, padded, needed = _cut(columns)
        out = torch.empty(given.x.shape, dtype=given.x.dtype, device=given.x.device)
        total = torch.empty_like(out) if want_sum and given.residual is not None else None
        x = _rows(given.x)
        residual = None if given.residual is None else _rows(given.residual)
        weight, bias = (None if t is None else t.contiguous() for t in (given.weight, given.bias))
        outs.append(out)
        sums.append(given.x if total is None else total)
        arguments += [
            x, residual, weight, bias, total, out, x.shape[0], columns, x.stride(0),
            0 if residual is None else residual.stride(0), given.eps,
        ]  # fmt: skip
        cuts += [own, padded]
        blocks += cdiv(x.shape[0], own)
        warps = max(warps, needed)
    if len(tensors) == 1:
        arguments += [None] * 6 + [0] * 4 + [0.0]
        cuts += [0, 0]
    if blocks:
        with on(outs[0]):
            norm_kernel[(blocks,)](*arguments, rms, *cuts, num_warps=warps, **FUSION)
    return tuple(outs), tuple(sums)


def _launch_backward(
    grad_out: Tensor,
    grad_sum: Tensor | None,
    h: Tensor,
    weight_like: Tensor | None,
    bias_like: Tensor | None,
    weight: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of h and, of the dtype of what they are like, of weight and bias."""
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    grad, h = _rows(grad_out), _rows(h)
    extra = None if grad_sum is None else _rows(grad_sum)
    rows, columns = h.shape
    own, padded, warps = _cut(columns)
    steps = min(_CHAIN, max(1, cdiv(rows, _BLOCKS * own)))
    blocks = cdiv(rows, steps * own)
    sums = [
        None if like is None else torch.empty_like(like, memory_format=torch.contiguous_format)
        for like in (weight_like, bias_like)
    ]
    parts = [
        None if t is None else torch.empty(blocks, columns, dtype=torch.float32, device=h.device)
        for t in sums
    ]
    with on(h):
        if blocks:
            norm_backward_kernel[(blocks,)](
                grad, extra, h, None if weight is None else weight.contiguous(), grad_h, *parts,
                rows, columns, grad.stride(0), 0 if extra is None else extra.stride(0),
                h.stride(0), eps, steps, rms, own, padded, num_warps=warps, **FUSION,
            )  # fmt: skip
        if any(t is not None for t in sums):
            norm_backward_merge_kernel[(cdiv(columns, 32),)](
                *parts, *sums, blocks, columns, 64, 32, num_warps=4, **FUSION
            )
    return grad_h, sums[0], sums[1]
