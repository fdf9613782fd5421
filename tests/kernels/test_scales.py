"""Any finite scale, on GPUs' kernels: what is finite in the plain formula is right in theirs.

Their exponents are of base 2, so scores go through a factor of 1.44 that may overflow before the
maximum is taken off, and a factor that underflows would make NaN of -inf.
"""

from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from suite import DEVICE, Target
from torch import Tensor

import fastfusion as ff
from fastfusion import _cuda
from fastfusion.ops import (
    bidirectional_attention,
    scaled_dot_product_attention,
    varlen_attention,
)

# scale, and the largest numbers in queries and keys. The last is less than a normal float.
SCALES = {
    "largest": (2.4e38, 1.0, 1.0),
    "largest negative": (-2.4e38, 1.0, 1.0),
    "large": (1e30, 1e4, 1e4),
    "zero": (0.0, 1.0, 1.0),
    "small": (1e-31, 1e16, 1e16),
    "subnormal": (1e-40, 1e19, 1e19),
    "subnormal keys": (1e37, 100.0, 1e-38),
}
TRITON, CUDA = Target("triton"), Target("cuda", differentiable=False)
TARGETS = [TRITON, CUDA] if _cuda.unavailable() is None else [TRITON]


def spread(count: int, largest: float, *shape: int) -> Tensor:
    """(*shape, 1): numbers from -1 to 1 times `largest`, each another, none of them 0, whose
    products with few others are exact: scores of 1e38 may not differ by their rounding."""
    numbers = (torch.arange(count, device=DEVICE) - count // 2 + 0.5) / 64
    return (numbers.flip(0) * largest).unsqueeze(-1).expand(*shape, count, 1)


def call_of(op: Any, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A call of one score per pair, and its tensors that have gradients."""
    scale, largest_query, largest_key = SCALES[name]
    q_len, kv_len = 20, 37
    call = op.inputs({"q_len": q_len, "kv_len": kv_len, "head_dim": 1, "value_dim": 5, "heads": 2},
                     torch.float32, DEVICE)  # fmt: skip
    query, key = spread(q_len, largest_query, 1, 2), spread(kv_len, largest_key, 1, 2)
    if op is varlen_attention:
        query, key = query[0].transpose(0, 1), key[0].transpose(0, 1)
    leaves = {k: v for k, v in call.items() if torch.is_tensor(v) and v.is_floating_point()}
    leaves.update(query=query.contiguous(), key=key.contiguous())
    return {**call, "scale": scale}, leaves


def results(
    run: Any, call: dict[str, Any], leaves: dict[str, Tensor], gradient: bool
) -> list[Tensor]:
    """Outputs with lse, and gradients small enough for float32."""
    leaves = {k: v.detach().requires_grad_(gradient) for k, v in leaves.items()}
    outputs = run(**{**call, **leaves})
    if not gradient:
        return list(outputs)
    grads = [torch.linspace(-1e-4, 1e-4, o.numel(), device=DEVICE).view(o.shape) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), grads)]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("masked", [False, True], ids=["bare", "masked"])
@pytest.mark.parametrize(
    ("op", "function"),
    [
        (scaled_dot_product_attention, ff.scaled_dot_product_attention),
        (bidirectional_attention, ff.bidirectional_attention),
        (varlen_attention, ff.varlen_attention),
    ],
    ids=["attention", "bidirectional", "varlen"],
)
def test_any_finite_scale(op: Any, function: Any, masked: bool, name: str, target: Target) -> None:
    if op is varlen_attention and target is CUDA:
        pytest.skip("CUDA has no kernel of it")
    call, leaves = call_of(op, name)
    if masked:
        call["attn_mask"] = torch.arange(37, device=DEVICE) % 3 > 0
    doubles = {k: v.double() for k, v in leaves.items()}
    exact = results(op.reference, call, doubles, target.differentiable)
    plain = results(op.reference, call, leaves, target.differentiable)
    actual = results(
        lambda **kw: target.call(function, **kw, return_lse=True), call, leaves,
        target.differentiable,
    )  # fmt: skip
    for a, e, p in zip(actual, exact, plain, strict=True):
        assert p.isfinite().all()
        assert_accurate(*(t.reshape(1, -1) for t in (a, e.to(torch.float64), p)))
