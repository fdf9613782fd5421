"""The gradient of attention sinks, from what the backward leaves of each row.

A sink has the weight P of its row and dP = 0, since it has no value: d sink = sum of
P * (d lse - delta) over the rows of a head, of all batch entries.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.kernels.device.score_policy import policy_of
from fastfusion.kernels.device.softmax import sink_weight
from fastfusion.kernels.device.statistics import load_statistics
from fastfusion.kernels.device.sums import add
from fastfusion.kernels.host.plan import accepted, empty, launch


@triton.jit(do_not_specialize=["numbers", "heads", "batches", "q_len"])
def sinks_kernel(
    dsinks_ptr, grad_lse_ptr, statistics_ptr, masks, numbers, heads, batches, q_len,
    KINDS: tl.constexpr, ROWS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Programs: heads. One after the other, so that sums have one order."""
    head = tl.program_id(0)
    policy = policy_of(masks, numbers, 0, head, 0, 0, 0, KINDS)
    total = tl.zeros([ROWS], tl.float32)
    lost = tl.zeros([ROWS], tl.float32)
    for batch in range(0, batches):
        first = tl.cast(batch * heads + head, tl.int64) * q_len
        for start in range(0, q_len, ROWS):
            rows = start + tl.arange(0, ROWS)
            present = rows < q_len
            shift, share, delta, grad_lse = load_statistics(
                statistics_ptr, grad_lse_ptr, first + rows, present, LSE
            )
            p = sink_weight(policy, shift, KINDS, False) * share
            # Rows that are not there have a share of 0.
            value = tl.where(share == 0.0, 0.0, p * (grad_lse - delta))
            total, lost = add(total, lost, value)
    tl.store(dsinks_ptr + head, tl.sum(total))


def sink_gradient(call: Any, batches: int, q_len: int, options: dict[str, Any]) -> Tensor:
    """d sinks (heads,), or without numbers where a call has none.

    Args:
        call: of an op.
        batches, q_len: of the rows' statistics, (batches, heads, q_len).
        options: arguments of the backward kernels; the statistics are there.
    """
    if call.sinks is None:
        return empty(call.query, (0,), torch.float32)
    heads = call.sinks.shape[0]
    dsinks = empty(call.query, (heads,), torch.float32)
    launch(
        sinks_kernel, heads, dsinks,
        **accepted(sinks_kernel, {**options, "q_len": q_len}), batches=batches, ROWS=1024,
        num_warps=4,
    )  # fmt: skip
    return dsinks


def gradient_without_keys(call: Any, grad_lse: Tensor | None) -> Tensor:
    """The same where a sink is all that a row has, with d lse (rows, heads): it has weight 1."""
    if call.sinks is None or grad_lse is None:
        heads = 0 if call.sinks is None else call.sinks.shape[0]
        return torch.zeros(heads, dtype=torch.float32, device=call.query.device)
    return torch.where(call.sinks == -torch.inf, 0.0, grad_lse.sum(0))
