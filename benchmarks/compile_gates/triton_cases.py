"""The calls whose kernels `make kernels` compiles, forward and backward.

For every dtype and head dim a plain call, the heaviest (float mask with its gradient, padding,
dropout, and sinks of attention), one of shaped scores (window, soft cap and slopes), one of ranges
(segments, a prefix and, where an op takes them, sinks) and of attention one of positions (a table
and an index of each score). In bfloat16, at three head dims,
also what the launchers treat apart. A row of a mask is no multiple of 16 elements, as in most calls
of real models, and so cannot be read in vectors.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastfusion.kernels.attention.backward import attention_backward
from fastfusion.kernels.attention.forward import attention_forward
from fastfusion.kernels.bidirectional import backward_on_chip, forward
from fastfusion.kernels.bidirectional.backward import bidirectional_backward
from fastfusion.kernels.host.tiles import width
from fastfusion.kernels.layer import linear, norm
from fastfusion.kernels.varlen.backward import varlen_backward
from fastfusion.kernels.varlen.forward import varlen_forward
from fastfusion.ops.bidirectional_attention import Call as BidirectionalCall
from fastfusion.ops.scaled_dot_product_attention import Call as AttentionCall
from fastfusion.ops.varlen_attention import Call as VarlenCall

DTYPES = ("bfloat16", "float16", "float32")
# The padded widths.
HEAD_DIMS = (16, 32, 64, 128, 256)
EXTRA_HEAD_DIMS, QUICK_HEAD_DIMS = (64, 128, 256), (64, 128)
BATCH, HEADS = 2, 4
# As many keys of a bidirectional call as stay on chip.
MOST = -1

# variant -> (mask and options, Lq, Lk).
ATTENTION = {
    "plain": ("plain", 300, 300),
    "heaviest": ("heaviest", 300, 300),
    "bool": ("bool", 300, 300),
    "causal": ("causal", 300, 300),
    "large scale": ("large scale", 300, 300),
    "window": ("window", 300, 300),
    "shaped": ("shaped", 300, 300),
    "shaped heaviest": ("shaped heaviest", 300, 300),
    "ranges": ("ranges", 300, 300),
    "positions": ("positions", 300, 300),
    "positions heaviest": ("positions heaviest", 300, 300),
    "offsets": ("offsets", 300, 300),
    "small": ("plain", 20, 36),
    "small heaviest": ("heaviest", 20, 36),
    "tiny": ("plain", 8, 10),
    "few queries": ("plain", 8, 1100),
    "few queries heaviest": ("heaviest", 8, 1100),
    "many queries": ("plain", 1100, 36),
    "many queries heaviest": ("heaviest", 1100, 36),
    "shared mask": ("shared", 300, 300),
    "long": ("plain", 2100, 2100),
    "long causal": ("causal", 2100, 2100),
}
BIDIRECTIONAL = {
    "plain": ("plain", 600, MOST),
    "heaviest": ("heaviest", 600, MOST),
    "few keys": ("plain", 600, 20),
    "few keys heaviest": ("heaviest", 600, 20),
    "small": ("plain", 20, 36),
    "small heaviest": ("heaviest", 20, 36),
    "tiny": ("plain", 8, 10),
    "causal": ("causal", 600, MOST),
    "long": ("plain", 600, 600),
    "long causal": ("causal", 600, 600),
    "long heaviest": ("heaviest", 600, 600),
    "shaped": ("shaped", 600, MOST),
    "long shaped": ("shaped", 600, 600),
    "ranges": ("ranges", 600, MOST),
    "long ranges": ("ranges", 600, 600),
    "short and long": ("plain", 8, 2100),
    "short and long heaviest": ("heaviest", 8, 2100),
}
VARLEN = ("plain", "heaviest", "causal", "shaped", "ranges")
# variant -> rows; each with and without bias, activation and residual.
LINEAR = {"single": 8, "few": 40, "some": 200, "many": 20000}
# in_features, out_features: whole steps along the inner dimension, a rest, and unaligned rows.
FEATURES = ((768, 768), (160, 768), (77, 97))
ROW_WIDTHS = (77, 256, 768, 1024, 4096, 8192)
EXTRA_SIZES = (*EXTRA_HEAD_DIMS, *ROW_WIDTHS, *(inner for inner, _ in FEATURES))


@dataclass(frozen=True)
class Case:
    """A call that is recorded. `size` is the head dim, or the width of a row."""

    variant: str
    dtype: str
    size: int
    call: Callable[[], Any]


# Kinds of calls without a mask.
BARE = ("plain", "causal", "large scale", "window", "shaped", "ranges", "positions", "offsets")


def _heads(length: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(BATCH, HEADS, length, dim, dtype=dtype)


def _padding(length: int, kind: str) -> Tensor | None:
    return None if kind in BARE else torch.empty(BATCH, length, dtype=torch.bool)


def _mask(q_len: int, kv_len: int, kind: str, dtype: torch.dtype) -> Tensor | None:
    if kind in BARE or kind == "positions heaviest":
        return None
    shape = (1, 1, 1, kv_len) if kind == "shared" else (BATCH, HEADS, q_len, kv_len)
    return torch.empty(shape, dtype=torch.bool if kind == "bool" else dtype)


def _dropout(kind: str) -> tuple[Tensor | None, float]:
    drops = kind in ("heaviest", "shared", "shaped heaviest", "positions heaviest")
    return torch.zeros(1, dtype=torch.int64) if drops else None, 0.1 if drops else 0.0


def _kinds(kind: str, batch: int = BATCH) -> dict[str, Any]:
    """A window; with a soft cap and slopes, where scores are shaped."""
    if kind == "window":
        return {"window_left": 100, "window_right": 50}
    if kind.startswith("shaped"):
        slopes = torch.empty(batch, HEADS)
        return {"window_left": 100, "softcap": 30.0, "alibi_slopes": slopes}
    return {}


def _ranges(kind: str, q_len: int, kv_len: int) -> dict[str, Any]:
    """Segments and a prefix."""
    if kind != "ranges":
        return {}
    lengths = {"segment_ids_q": (q_len,), "segment_ids_k": (kv_len,), "prefix_len": ()}
    return {"is_causal": True} | {
        name: torch.empty(BATCH, *length, dtype=torch.int64) for name, length in lengths.items()
    }


def _attention(kind: str, q_len: int, kv_len: int, dim: int, dtype: torch.dtype) -> None:
    query, key = _heads(q_len, dim, dtype), _heads(kv_len, dim, dtype)
    mask, scale = _mask(q_len, kv_len, kind, dtype), 1e30 if kind == "large scale" else None
    options = (*_dropout(kind), kind == "causal", False, scale)
    call = AttentionCall(query, key, key, mask, _padding(kv_len, kind), None, *options, False)
    call = call._replace(**_kinds(kind), **_ranges(kind, q_len, kv_len))
    if kind in ("positions", "positions heaviest", "offsets"):
        size = (q_len + kv_len - 1,) if kind == "offsets" else (q_len, kv_len)
        index, table = torch.empty(size, dtype=torch.int64), torch.empty(HEADS, 50)
        call = call._replace(position_index=index, position_table=table)
    if kind in ("ranges", "heaviest", "positions heaviest"):
        call = call._replace(sinks=torch.empty(HEADS))
    grads = attention_forward(call, kind != "plain")
    attention_backward(grads, call, mask is not None and kind != "bool")


def _bidirectional(kind: str, q_len: int, kv_len: int, dim: int, dtype: torch.dtype) -> None:
    def call(part: Any) -> BidirectionalCall:
        keys = kv_len
        if kv_len == MOST:
            lengths = (256, 128, 64, 32, 16)
            extras = {"plain": 0, "shaped": 1}.get(kind, 2) + (dim % 8 > 0)
            sizes = (width(dim), dtype.itemsize, *((extras,) if part is forward else ()))
            fits = (n for n in lengths if part.keys_on_chip(n, *sizes))
            keys = next(fits, 64)  # where none fits, the other kernels run
        query, key = _heads(q_len, dim, dtype), _heads(keys, dim, dtype)
        mask = _mask(q_len, keys, kind, dtype)
        paddings = (_padding(q_len, kind), _padding(keys, kind))
        seed, dropout_p = _dropout(kind)
        return BidirectionalCall(
            query, key, key, query, mask, *paddings, None, seed, dropout_p, kind == "causal",
            False, None,
        )._replace(**_kinds(kind), **_ranges(kind, q_len, keys))  # fmt: skip

    forward.bidirectional_forward(call(forward), kind != "plain")
    given = call(backward_on_chip)
    query, wanted = given.query, given.attn_mask is not None and kind != "bool"
    lse = (None, None) if kind == "plain" else (query.new_empty(query.shape[:3]).float(), None)
    bidirectional_backward((query, given.key, *lse), given, wanted)


def _varlen(kind: str, dim: int, dtype: torch.dtype) -> None:
    tokens, offsets = torch.empty(300, HEADS, dim, dtype=dtype), torch.zeros(4, dtype=torch.int32)
    mask = None if kind in BARE else torch.empty(3, HEADS, 300, 300, dtype=dtype)
    seed, dropout_p = _dropout(kind)
    call = VarlenCall(
        tokens, tokens, tokens, mask, offsets, offsets, None, seed, 300, 300, dropout_p,
        kind == "causal", False, None,
    )._replace(**_kinds(kind, 3))  # fmt: skip
    if kind == "ranges":
        prefix = torch.empty(3, dtype=torch.int64)
        call = call._replace(is_causal=True, prefix_len=prefix, sinks=torch.empty(HEADS))
    grads = varlen_forward(call, kind != "plain")
    varlen_backward(grads, call, mask is not None)


def _linear(rows: int, inner: int, features: int, heaviest: bool, dtype: torch.dtype) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    product = linear.Product(empty(rows, inner), empty(features, inner))
    if heaviest:
        product = product._replace(bias=empty(features), residual=empty(rows, features))
    linear.linears((product,) * (1 + heaviest), "gelu" if heaviest else None)


def _norm(width: int, heaviest: bool, dtype: torch.dtype) -> None:
    rows = torch.empty(64, width, dtype=dtype, requires_grad=True)
    weight = torch.empty(width, dtype=dtype, requires_grad=True)
    if not heaviest:
        torch.autograd.grad(norm.rms_norm(rows, weight), (rows, weight), rows.detach())
        return
    outs = norm.layer_norm(rows, weight, weight, residual=rows, return_sum=True)
    torch.autograd.grad(outs, (rows, weight), [rows.detach()] * 2)
    pair = norm.Rows(rows.detach(), weight.detach(), weight.detach(), 1e-5, rows.detach())
    norm.norms(pair, pair)


def _tf32(call: Callable[[], Any]) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        call()
    finally:
        torch.set_float32_matmul_precision(before)


def _calls(dtype: torch.dtype, head_dims: tuple[int, ...]) -> Iterator[tuple[str, int, Any]]:
    """Variant, size and call, of all ops."""
    for dim in head_dims:
        for variant, (kind, q_len, kv_len) in ATTENTION.items():
            yield variant, dim, partial(_attention, kind, q_len, kv_len, dim, dtype)
        for variant, (kind, q_len, kv_len) in BIDIRECTIONAL.items():
            yield variant, dim, partial(_bidirectional, kind, q_len, kv_len, dim, dtype)
        for variant in VARLEN:
            yield variant, dim, partial(_varlen, variant, dim, dtype)
    for variant, rows in LINEAR.items():
        for inner, features in FEATURES:
            for name, heaviest in ((variant, False), (f"{variant} heaviest", True)):
                yield name, inner, partial(_linear, rows, inner, features, heaviest, dtype)
    for columns in ROW_WIDTHS:
        for name, heaviest in (("plain", False), ("heaviest", True)):
            yield name, columns, partial(_norm, columns, heaviest, dtype)


def cases(quick: bool) -> Iterator[Case]:
    """All cases, or with `quick` those that find most mistakes: the two variants in bfloat16."""
    main = (
        "plain", "heaviest", "shaped", "ranges", "positions", "few queries", "long",
        "long heaviest", "some", "some heaviest",
    )  # fmt: skip
    for dtype in DTYPES[:1] if quick else DTYPES:
        element = getattr(torch, dtype)
        for variant, size, call in _calls(element, QUICK_HEAD_DIMS if quick else HEAD_DIMS):
            extra = dtype == "bfloat16" and size in EXTRA_SIZES
            if variant in main or (extra and not quick):
                yield Case(variant, dtype, size, call)
            if dtype == "float32" and variant == "plain" and size in QUICK_HEAD_DIMS:
                yield Case("tf32", dtype, size, partial(_tf32, call))
