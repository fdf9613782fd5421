"""Bidirectional attention backward: dS is made of both softmaxes before it is rounded.

With P and R the softmaxes over keys and over queries (Hiller et al., BiXT, 2024, have both):

    dS = P * (dO_q value^T - delta_q + d lse_q) + R * (query_value dO_k^T - delta_k + d lse_k)
    dq = scale * dS k     dk = scale * dS^T q     d value = P^T dO_q     d query_value = R dO_k

One launch takes the statistics of both sides (see attention_backward), a second one the gradients:
each side owns tiles of its own and loops over the other. Short sides share their scores instead:
see bidirectional_shared.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfusion.kernels.attention.backward import merge_splits
from fastfusion.kernels.bidirectional.arguments import common_options, exchanged, prepared
from fastfusion.kernels.bidirectional.backward_on_chip import keys_on_chip, shared_backward
from fastfusion.kernels.device.gradient_sums import store_mask_gradient
from fastfusion.kernels.device.rows import load_rows, rows_of
from fastfusion.kernels.device.score_policy import (
    PADDING,
    ROW_PADDING,
    policy_of,
    signed,
    visible_keys,
)
from fastfusion.kernels.device.sides import both_gradients, side_gradients, side_statistics
from fastfusion.kernels.device.statistics import load_statistics
from fastfusion.kernels.device.sums import add
from fastfusion.kernels.host.arguments import (
    exchanged_kinds,
    gradient_scales,
    operand,
    rows_outside,
    rows_readable,
)
from fastfusion.kernels.host.plan import accepted, empty, launch, planned
from fastfusion.kernels.host.tiles import cdiv, cut, width

LENGTHS = ["numbers", "heads", "q_len", "kv_len", "q_programs", "q_splits", "k_splits"]


@triton.jit(do_not_specialize=LENGTHS[:5])
def statistics_kernel(
    q, k, v, qv, grad_q, grad_k, q_statistics_ptr, k_statistics_ptr, masks, numbers, heads, q_len,
    kv_len, q_programs, KINDS: tl.constexpr, KEY_KINDS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, QV_DIM: tl.constexpr,
    QV_WIDTH: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs: q_programs tiles of queries, then those of keys."""
    index = tl.program_id(0)
    if index < q_programs:
        side_statistics(
            index, q, k, v, grad_q, q_statistics_ptr, masks, numbers, heads, q_len, kv_len, KINDS,
            DIM, WIDTH, V_DIM, V_WIDTH, OWN, LOOP, DOT, PRECISION,
        )  # fmt: skip
    else:
        side_statistics(
            index - q_programs, k, q, qv, grad_k, k_statistics_ptr, masks, numbers, heads, kv_len,
            q_len, KEY_KINDS, DIM, WIDTH, QV_DIM, QV_WIDTH, OWN, LOOP, DOT, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def gradients_kernel(
    q, k, v, qv, grad_q, grad_k, q_statistics_ptr, k_statistics_ptr, q_grad_lse_ptr, k_grad_lse_ptr,
    dq, dk, dv, dqv, q_partial_ptr, k_partial_ptr, masks, numbers, heads, q_len, kv_len, q_programs,
    q_splits, k_splits, gradient_scale, KINDS: tl.constexpr, KEY_KINDS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr,
    QV_DIM: tl.constexpr, QV_WIDTH: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr,
    Q_SPLIT: tl.constexpr, K_SPLIT: tl.constexpr, LSE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs: q_programs of the queries' side, then those of the keys'."""
    index = tl.program_id(0)
    if index < q_programs:
        side_gradients(
            index, q, k, qv, v, grad_q, grad_k, q_statistics_ptr, k_statistics_ptr, q_grad_lse_ptr,
            k_grad_lse_ptr, dq, dqv, q_partial_ptr, masks, numbers, heads, q_len, kv_len, q_splits,
            gradient_scale, KINDS, DIM, WIDTH, QV_DIM, QV_WIDTH, V_DIM, V_WIDTH, OWN, LOOP, Q_SPLIT,
            LSE, DOT, PRECISION,
        )  # fmt: skip
    else:
        side_gradients(
            index - q_programs, k, q, v, qv, grad_k, grad_q, k_statistics_ptr, q_statistics_ptr,
            k_grad_lse_ptr, q_grad_lse_ptr, dk, dv, k_partial_ptr, masks, numbers, heads, kv_len,
            q_len, k_splits, gradient_scale, KEY_KINDS, DIM, WIDTH, V_DIM, V_WIDTH, QV_DIM,
            QV_WIDTH, OWN, LOOP, K_SPLIT, LSE, DOT, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*LENGTHS[:4], "batches", "mask_batches", "mask_heads"])
def mask_kernel(
    q, k, v, qv, grad_q, grad_k, q_statistics_ptr, k_statistics_ptr, q_grad_lse_ptr, k_grad_lse_ptr,
    dmask_ptr, masks, numbers, heads, q_len, kv_len, batches, mask_batches, mask_heads,
    KINDS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, V_DIM: tl.constexpr,
    V_WIDTH: tl.constexpr, QV_DIM: tl.constexpr, QV_WIDTH: tl.constexpr, OWN: tl.constexpr,
    LOOP: tl.constexpr, SHARED_ROWS: tl.constexpr, SHARED_COLUMNS: tl.constexpr, LSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a float mask, as in attention/backward.py."""
    columns_end = 1 if SHARED_COLUMNS else kv_len
    rows_end = 1 if SHARED_ROWS else q_len
    column_tiles, row_tiles = tl.cdiv(columns_end, LOOP), tl.cdiv(rows_end, OWN)
    index = tl.program_id(0)
    column, row = index % column_tiles * LOOP, index // column_tiles % row_tiles * OWN
    owner = index // column_tiles // row_tiles
    total = tl.zeros([OWN, LOOP], tl.float32)
    lost = tl.zeros([OWN, LOOP], tl.float32)
    for batch in range(owner // mask_heads, batches, mask_batches):
        for head in range(owner % mask_heads, heads, mask_heads):
            slice_index = batch * heads + head
            policy = policy_of(masks, numbers, batch, head, slice_index, q_len, kv_len, KINDS)
            q_base, q_row = rows_of(q, batch, head)
            k_base, k_row = rows_of(k, batch, head)
            v_base, v_row = rows_of(v, batch, head)
            qv_base, qv_row = rows_of(qv, batch, head)
            grad_q_base, grad_q_row = rows_of(grad_q, batch, head)
            grad_k_base, grad_k_row = rows_of(grad_k, batch, head)
            for q_start in range(row, q_len if SHARED_ROWS else row + 1, OWN):
                present = tl.arange(0, OWN) < q_len - q_start
                shown = visible_keys(policy.row_padding, q_start, q_len, OWN, ROW_PADDING & KINDS)
                queries = load_rows(q_base, q_start, present, q_row, DIM, WIDTH, DOT)
                queries = signed(queries, KINDS)
                q_values = load_rows(qv_base, q_start, shown, qv_row, QV_DIM, QV_WIDTH, DOT)
                q_grads = load_rows(grad_q_base, q_start, present, grad_q_row, V_DIM, V_WIDTH, DOT)
                at = tl.cast(slice_index, tl.int64) * q_len + q_start + tl.arange(0, OWN)
                of_q = load_statistics(q_statistics_ptr, q_grad_lse_ptr, at, present, LSE)
                for k_start in range(column, kv_len if SHARED_COLUMNS else column + 1, LOOP):
                    existing = tl.arange(0, LOOP) < kv_len - k_start
                    visible = visible_keys(policy.padding, k_start, kv_len, LOOP, PADDING & KINDS)
                    keys = load_rows(k_base, k_start, existing, k_row, DIM, WIDTH, DOT)
                    k_values = load_rows(v_base, k_start, visible, v_row, V_DIM, V_WIDTH, DOT)
                    k_grads = load_rows(
                        grad_k_base, k_start, existing, grad_k_row, QV_DIM, QV_WIDTH, DOT
                    )
                    k_at = tl.cast(slice_index, tl.int64) * kv_len + k_start + tl.arange(0, LOOP)
                    of_k = load_statistics(k_statistics_ptr, k_grad_lse_ptr, k_at, existing, LSE)
                    ds, _, _ = both_gradients(
                        queries, keys, q_values, k_values, q_grads, k_grads, q_start, k_start,
                        shown, visible, of_q, of_k, policy, KINDS, PRECISION,
                    )  # fmt: skip
                    total, lost = add(total, lost, ds)
    store_mask_gradient(
        dmask_ptr, total, owner, row, column, rows_end, columns_end, SHARED_ROWS, SHARED_COLUMNS
    )


def _split(own_len: int, other_len: int) -> tuple[int, int]:
    """(splits, other side's rows per split), a function of the shape: 1,024 rows, 16 at most.

    Few own rows mean few programs with long loops; many need none, and no partial sums either.
    """
    if own_len > 512 or other_len < 2048:
        return 1, 0
    length = cdiv(max(1024, cdiv(other_len, 16)), 64) * 64
    return cdiv(other_len, length), length


def _common(call: Any, grads: list[Tensor], lse_grads: list[Tensor] | None) -> dict[str, Any]:
    """Arguments of every gradient kernel, from those of the forward and the gradients."""
    q_lse, k_lse = (call.query, call.query) if lse_grads is None else lse_grads
    return {
        **common_options(call), "grad_q": operand(grads[0]), "grad_k": operand(grads[1]),
        "LSE": lse_grads is not None, "q_grad_lse_ptr": q_lse, "k_grad_lse_ptr": k_lse,
    }  # fmt: skip


def _take_statistics(common: dict[str, Any], widest: int) -> dict[str, Tensor]:
    """(shift, 1 / sum, delta) of the rows of both sides."""
    query, lengths = common["q"][0], (common["q_len"], common["kv_len"])
    slices = query.shape[0] * query.shape[1]
    # The tile of masked calls for all: that of the others would spill 600 bytes here with a mask.
    own, sizes = cut("attention_backward_rows", query, widest, max(lengths), masked=True)
    programs = [slices * cdiv(n, own) for n in lengths]
    found = {
        f"{side}_statistics_ptr": empty(query, (slices * n * 3,), torch.float32)
        for side, n in zip("qk", lengths, strict=True)
    }
    given = {**common, **found, **sizes, "q_programs": programs[0]}
    given["KEY_KINDS"] = exchanged_kinds(common["KINDS"])
    launch(statistics_kernel, sum(programs), **accepted(statistics_kernel, given))
    return found


def _sides(common: dict[str, Any], found: dict[str, Tensor], widest: int) -> None:
    """Fill `found`, each side by programs of its own."""
    query, dim = common["q"][0], common["DIM"]
    slices = query.shape[0] * query.shape[1]
    own, sizes = cut(
        "bidirectional_backward", query, widest, max(common["q_len"], common["kv_len"])
    )
    options: dict[str, Any] = {}
    merges, programs = [], []
    pairs = {"q": (found["dq"], found["dqv"]), "k": (found["dk"], found["dv"])}
    for side, (of_side, of_value) in pairs.items():
        length, value_dim = of_value.shape[2:]
        other = common["kv_len" if side == "q" else "q_len"]
        splits, split = _split(length, other)
        partial = query
        if splits > 1:
            partial = empty(query, (slices * splits * length * (dim + value_dim),), torch.float32)
            merges.append((partial, of_side, of_value, splits))
        options |= {
            f"{side}_partial_ptr": partial, f"{side}_splits": splits,
            f"{side.upper()}_SPLIT": split,
        }  # fmt: skip
        programs.append(slices * splits * cdiv(length, own))
    launch(
        gradients_kernel, sum(programs), **common, **sizes, **options,
        **{n: operand(g) for n, g in found.items()}, q_programs=programs[0],
        KEY_KINDS=exchanged_kinds(common["KINDS"]), gradient_scale=gradient_scales(common)[0],
    )  # fmt: skip
    for partial, of_side, of_value, splits in merges:
        merge_splits(partial, of_side, of_value, splits)


def _mask_gradient(common: dict[str, Any], dmask: Tensor, widest: int) -> None:
    query = common["q"][0]
    shared = (1,) * (4 - dmask.dim()) + tuple(dmask.shape)
    own, sizes = cut("bidirectional_mask", query, widest, shared[2])
    launch(
        mask_kernel,
        shared[0] * shared[1] * cdiv(shared[2], own) * cdiv(shared[3], sizes["LOOP"]),
        **common, **sizes, dmask_ptr=dmask, batches=query.shape[0], mask_batches=shared[0],
        mask_heads=shared[1], SHARED_ROWS=shared[2] == 1 and common["q_len"] > 1,
        SHARED_COLUMNS=shared[3] == 1 and common["kv_len"] > 1,
    )  # fmt: skip


@planned
def bidirectional_backward(
    output_grads: tuple[Tensor | None, ...], call: Any, mask_gradient: bool
) -> tuple[Tensor, ...]:
    """(dq, dk, d value, d query_value, d attn_mask), the last empty if not wanted.

    Args:
        output_grads: of out_q, out_k, lse_q and lse_k.
        call: as the forward takes it.
        mask_gradient: whether that of the mask is wanted.
    """
    call = prepared(call)
    query, key, value, query_value, attn_mask = call[:5]
    (batch, heads, q_len, dim), kv_len = query.shape, key.shape[2]
    found = {
        name: rows_outside(query, *t.shape)
        for name, t in (("dq", query), ("dk", key), ("dv", value), ("dqv", query_value))
    }
    wanted = mask_gradient and attn_mask is not None and attn_mask.is_floating_point()
    dmask = empty(attn_mask, attn_mask.shape) if wanted else empty(query, (0,))
    if batch * heads * (q_len + kv_len) == 0:
        return (*(g.zero_() for g in found.values()), dmask.zero_())
    values = (value.shape[3], query_value.shape[3])
    grads = [
        query.new_zeros(batch, heads, n, d) if g is None else rows_readable(g)
        for g, n, d in zip(output_grads[:2], (q_len, kv_len), values, strict=True)
    ]
    lse_grads = None
    if output_grads[2] is not None or output_grads[3] is not None:
        lse_grads = [
            query.new_zeros(batch, heads, n, dtype=torch.float32) if g is None else g.contiguous()
            for g, n in zip(output_grads[2:4], (q_len, kv_len), strict=True)
        ]
    widest = max(width(d) for d in (dim, *values))
    shared = keys_on_chip(min(q_len, kv_len), widest, query.element_size())
    if shared and q_len >= kv_len:
        shared_backward(_common(call, grads, lse_grads), found, widest, False)
    elif shared:
        turned = {"dq": "dk", "dk": "dq", "dv": "dqv", "dqv": "dv"}
        shared_backward(
            _common(exchanged(call), grads[::-1], lse_grads and lse_grads[::-1]),
            {name: found[other] for name, other in turned.items()}, widest, True,
        )  # fmt: skip
    if not shared or dmask.numel():
        common = _common(call, grads, lse_grads)
        common |= _take_statistics(common, widest)
        if not shared:
            _sides(common, found, widest)
        if dmask.numel():
            _mask_gradient(common, dmask, widest)
    return (*found.values(), dmask)
