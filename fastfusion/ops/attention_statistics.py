"""What attention looks at, without its weights: sums over the softmax that need no L x L tensor.

With P = softmax(S) and lse the log-sum-exp of a row of scores S, as attention computes them:

    mass[j]    = sum_i P[i, j] = sum_i exp(S[i, j] - lse[i])
    entropy[i] = -sum_j P[i, j] log P[i, j] = lse[i] - sum_j P[i, j] S[i, j]

The CPU kernels take both from the scores as they make them. What has a gradient, and other
backends, take calls of attention: the mass is exp of the log-sum-exp of attention from keys to
queries with -lse as bias; and the sum of the entropy is scale * query[i] . out[i], out being
attention with the keys as values. All are linear in length, and these differentiable as attention
is.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfusion.backends import cpu
from fastfusion.core import arguments
from fastfusion.core.op import Implementation, Op
from fastfusion.core.reference import hide, log_sum_exp, masked_scores, safe_softmax
from fastfusion.core.score_policy import causal
from fastfusion.core.torch_op import Definition, needs_gradient
from fastfusion.ops import scaled_dot_product_attention as attention

WHAT = ("mass", "entropy", "topk")
# Scores at a time where they are needed themselves: a megabyte of float32 stays in the caches.
_AT_A_TIME = 1 << 18


class AttentionStatistics(NamedTuple):
    """Of every head; None what was not asked for. float32, float64 for float64 inputs.

    Attributes:
        mass: (batch, heads, kv_len), the weight that each key receives from all queries; its sum is
            the number of queries that see a key.
        entropy: (batch, heads, q_len), of each query's weights, in nats: 0 where all weight is on
            one key, log(kv_len) where it is spread evenly.
        weights: (batch, heads, q_len, k), the largest weights of each query, in descending order.
        keys: int64 of the same shape, the keys that have them.
    """

    mass: Tensor | None
    entropy: Tensor | None
    weights: Tensor | None
    keys: Tensor | None


class Arguments(NamedTuple):
    """Those of the public function, in its order."""

    query: Any
    key: Any
    # By name only:
    what: Any = ("mass", "entropy")
    k: Any = 5
    attn_mask: Any = None
    query_padding_mask: Any = None
    key_padding_mask: Any = None
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False
    causal_alignment: Any = "top_left"
    backend: Any = None


class Call(NamedTuple):
    """What an implementation takes; csrc/torch has its twin."""

    query: Tensor  # (B, H, Lq, D)
    key: Tensor  # (B, Hkv, Lk, D), Hkv divides H
    attn_mask: Tensor | None = None  # broadcasts to (B, H, Lq, Lk)
    query_padding_mask: Tensor | None = None  # (B, Lq)
    key_padding_mask: Tensor | None = None  # (B, Lk)
    entropy: bool = False  # whether it is asked for
    mass: bool = False
    is_causal: bool = False
    bottom_right: bool = False
    scale: float | None = None

    def attention(self) -> attention.Call:
        """The call of attention whose weights these are of."""
        return attention.Call(
            self.query, self.key, self.key, self.attn_mask, self.key_padding_mask,
            is_causal=self.is_causal, bottom_right=self.bottom_right, scale=self.scale,
            enable_gqa=True,
        )  # fmt: skip

    def conditions(self) -> Iterator[Any]:
        """What holds for every call; a mask that does not broadcast raises."""
        yield arguments.are_alike(self.query, self.key)
        yield from self.attention().conditions()
        yield from arguments.padding_fits(
            self.query_padding_mask, self.query, self.query.shape[0], self.query.shape[2]
        )


def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    what: Iterable[str] = ("mass", "entropy"),
    k: int = 5,
    attn_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_alignment: str = "top_left",
    backend: str | None = None,
) -> AttentionStatistics:
    """What the weights of `scaled_dot_product_attention(query, key, ...)` amount to.

    Mass and entropy are differentiable, so that they can be losses. With a float `attn_mask` the
    entropy is taken from scores, some rows at a time, where it has a gradient and outside of the
    CPU kernels; so are the largest weights always, which carry no gradient. Inputs of 16 bits are
    computed with in float32.

    Args:
        query: (batch, heads, q_len, head_dim), or another rank, as the op takes it.
        key: (batch, kv_heads, kv_len, head_dim).
        what: some of "mass", "entropy" and "topk".
        k: how many keys of each query "topk" gives.
        attn_mask, key_padding_mask, is_causal, scale, enable_gqa, causal_alignment, backend: as of
            :func:`fastfusion.scaled_dot_product_attention`.
        query_padding_mask: bool, broadcastable to (batch, q_len), True = this query does not count:
            its entropy and weights are 0, and it gives no mass.

    Returns:
        Mass, entropy, weights and keys, with the leading dimensions of the op's output.

    Raises:
        TypeError, ValueError: as of the op; an unknown name in `what`, or `k` that is no number
            from 1 to kv_len.
    """
    call = normalize(
        Arguments(
            query, key, what, k, attn_mask, query_padding_mask, key_padding_mask, is_causal, scale,
            enable_gqa, causal_alignment,
        )
    )  # fmt: skip
    mass = entropy = weights = keys = None
    if call.mass or call.entropy:
        entropy, mass = OP.run(backend, call, False)
    if "topk" in _asked(what):
        with torch.autocast(call.query.device.type, enabled=False):
            weights, keys = _strongest(_widened(call), k)
    leading = arguments.broadcast(query.shape[:-3], key.shape[:-3])
    inner = (call.query.shape[1],) if query.dim() > 2 else ()

    def shaped(tensor: Tensor | None, asked: bool = True) -> Tensor | None:
        if tensor is None or not asked:
            return None
        return tensor.reshape(*leading, *inner, *tensor.shape[2:])

    return AttentionStatistics(
        shaped(mass, call.mass), shaped(entropy, call.entropy), shaped(weights), shaped(keys)
    )


def check(given: Arguments) -> None:
    """Raise TypeError or ValueError for arguments that are not legal."""
    attention.check(_attention_arguments(given))
    _check_own(given)


def _check_own(given: Arguments) -> None:
    """Of what attention does not know."""
    query, kv_len = given.query, given.key.shape[-2]
    arguments.check_tensors(key=given.key)  # attention knows keys of 8 bits
    if "topk" in _asked(given.what):
        if isinstance(given.k, bool) or not isinstance(given.k, int):
            raise TypeError(f"k must be an int, got {type(given.k).__name__}")
        if not 1 <= given.k <= kv_len:
            raise ValueError(f"k must be from 1 to the number of keys, {kv_len}, got {given.k}")
    if given.query_padding_mask is not None:
        sizes = arguments.shapes(query=query)
        target = _padding_sizes(query)
        mask = given.query_padding_mask
        arguments.check_padding_mask("query_padding_mask", mask, query, target, sizes)


def _attention_arguments(given: Arguments) -> attention.Arguments:
    return attention.Arguments(
        given.query, given.key, given.key, given.attn_mask, 0.0, given.is_causal, given.scale,
        given.enable_gqa, given.key_padding_mask, given.causal_alignment,
    )  # fmt: skip


def _padding_sizes(query: Tensor) -> tuple[int, ...]:
    return (*(query.shape[:-3] if query.dim() > 3 else ()), query.shape[-2])


def _asked(what: Any) -> frozenset[str]:
    names = frozenset((what,) if isinstance(what, str) else what)
    if not names or not names <= set(WHAT):
        known = ", ".join(map(repr, WHAT))
        raise ValueError(f"what must be some of {known}, got {what!r}")
    return names


def normalize(given: Arguments) -> Call:
    """Public arguments, cast as autocast asks and checked, as every implementation takes them."""
    asked = _asked(given.what)
    call = attention.normalize(_attention_arguments(given))
    if not torch.compiler.is_compiling():
        _check_own(given)
    ignored = given.query_padding_mask
    if ignored is not None:
        ignored = ignored.expand(_padding_sizes(given.query)).reshape(-1, call.query.shape[2])
        ignored = ignored.expand(call.query.shape[0], -1)
    return Call(
        call.query, call.key, call.attn_mask, ignored, call.key_padding_mask, "entropy" in asked,
        "mass" in asked, call.is_causal, call.bottom_right, call.scale,
    )  # fmt: skip


def _widened(call: Call) -> Call:
    def wide(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

    return call._replace(query=wide(call.query), key=wide(call.key))


def _scale(call: Call) -> float:
    return arguments.softmax_scale(call.scale, call.query.shape[-1])


def by_attention(call: Call, backend: str) -> tuple[Tensor | None, Tensor | None]:
    """Entropy and mass, as far as they are asked for, by calls of attention on a backend."""
    call = _widened(call)
    ignored = call.query_padding_mask
    ignored = None if ignored is None else ignored[:, None]
    has_bias = call.attn_mask is not None and call.attn_mask.is_floating_point()
    mass = entropy = None
    by_sums = call.entropy and not has_bias
    if call.mass or by_sums:
        lse, entropy = _row_sums(call, by_sums, backend)
        if call.mass:
            mass = _mass(call, lse, ignored, backend)
    if call.entropy and has_bias:
        entropy = torch.cat([*_by_rows(call, _entropy_of)], 2)
    if entropy is not None and ignored is not None:
        entropy = entropy.masked_fill(ignored, 0.0)
    return entropy, mass


def _row_sums(call: Call, entropy: bool, backend: str) -> tuple[Tensor, Tensor | None]:
    """lse (batch, heads, q_len), and the entropy of the rows."""
    value = call.key if entropy else call.key.new_ones(()).expand(*call.key.shape[:-1], 1)
    out, lse = attention.scaled_dot_product_attention(
        call.query, call.key, value, call.attn_mask, 0.0, call.is_causal, call.scale, True,
        key_padding_mask=call.key_padding_mask, causal_alignment=_alignment(call.bottom_right),
        return_lse=True, backend=backend,
    )  # fmt: skip
    if not entropy:
        return lse, None
    dead = lse == -math.inf
    # In place, where nothing asks for it again: half of the memory of all this.
    products = call.query * out if out.requires_grad else out.mul_(call.query)
    expected = products.sum(-1) * _scale(call)
    return lse, (lse.masked_fill(dead, 0.0) - expected).masked_fill(dead, 0.0).clamp_min(0.0)


def _mass(call: Call, lse: Tensor, ignored: Tensor | None, backend: str) -> Tensor:
    """(batch, heads, kv_len): attention from keys to queries, as it were."""
    heads = call.query.shape[1]
    key = hide(call.key, call.key_padding_mask)  # as queries these are read
    kv_heads = key.shape[1]
    if kv_heads != heads:
        key = key.repeat_interleave(heads // kv_heads, 1)
    query, mask = call.query, call.attn_mask
    dead = lse == -math.inf
    if ignored is not None:
        dead = dead | ignored
    if call.is_causal:
        # Key j is seen by the queries from j - diagonal on: in reverse order, up to there.
        query, key, lse, dead = query.flip(2), key.flip(2), lse.flip(2), dead.flip(2)
    scale = _scale(call)
    if mask is None:
        bias = torch.where(dead, -math.inf, -lse.masked_fill(dead, 0.0))[:, :, None]
    else:
        # The bias as one more number of each query, which every key multiplies by 1: together with
        # the mask it would be as large as the scores. Rows that do not count are hidden by a score.
        mask = mask if mask.dim() > 1 else mask[None]
        if call.is_causal:
            mask = mask.flip(-2, -1)
        shift = torch.where(dead, _LOWEST, -lse.masked_fill(dead, 0.0))
        query = torch.cat([query * scale, shift[..., None]], -1)
        key = torch.cat([key, torch.ones_like(key[..., :1])], -1)
        bias, scale = mask.transpose(-1, -2), 1.0
    _, received = attention.scaled_dot_product_attention(
        key, query, query.new_ones(()).expand(*query.shape[:-1], 1), bias, 0.0, call.is_causal,
        scale, causal_alignment=_alignment(not call.bottom_right), return_lse=True,
        backend=backend,
    )  # fmt: skip
    mass = received.exp()
    if call.is_causal:
        mass = mass.flip(2)
    padding = call.key_padding_mask
    return mass if padding is None else mass.masked_fill(padding[:, None], 0.0)


_LOWEST = -1e30  # of a score: its exponential is 0


def _alignment(bottom_right: bool) -> str:
    return "bottom_right" if bottom_right else "top_left"


def _strongest(call: Call, k: int) -> tuple[Tensor, Tensor]:
    """Weights and keys (batch, heads, q_len, k).

    They are written to one place as they come: small results that are kept one by one leave holes
    in the heap that the next scores do not fit into, as large as all weights in the end
    (findings/torch-top-weights-keep-the-memory-of-all.sh).
    """
    query = call.query
    weights = query.new_empty((*query.shape[:3], k))
    keys = torch.empty_like(weights, dtype=torch.int64)
    with torch.no_grad():
        first = 0
        for some, places in _by_rows(call, lambda scores: safe_softmax(scores, -1).topk(k, -1)):
            rows = slice(first, first + some.shape[2])
            weights[:, :, rows], keys[:, :, rows] = some, places
            first = rows.stop
            del some, places
        if call.query_padding_mask is not None:
            weights.masked_fill_(call.query_padding_mask[:, None, :, None], 0.0)
    return weights, keys


def _entropy_of(scores: Tensor) -> Tensor:
    dead = (scores == -math.inf).all(-1)
    lse = log_sum_exp(scores, -1)
    hidden = scores == -math.inf
    logarithms = (scores - lse.masked_fill(dead, 0.0)[..., None]).masked_fill(hidden, 0.0)
    return -(logarithms.exp().masked_fill(hidden, 0.0) * logarithms).sum(-1)


def _by_rows(call: Call, of_scores: Callable[[Tensor], Any]) -> Iterator[Any]:
    """`of_scores` of some rows of scores after the other."""
    batch, heads, q_len, _ = call.query.shape
    kv_len = call.key.shape[2]
    key = hide(call.key, call.key_padding_mask)
    if key.shape[1] != heads:
        key = key.repeat_interleave(heads // key.shape[1], 1)
    diagonal = kv_len - q_len if call.bottom_right else 0
    rows = max(1, _AT_A_TIME // max(1, batch * heads * kv_len))
    mask = call.attn_mask

    def run(query: Tensor, key: Tensor, mask: Tensor | None, first: int) -> Any:
        policy = causal(diagonal + first if call.is_causal else None)
        scores = masked_scores(query, key, mask, call.key_padding_mask, policy, _scale(call))
        return of_scores(scores)

    for first in range(0, max(q_len, 1), rows):
        query = call.query[:, :, first : first + rows]
        some = mask
        if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            some = mask[..., first : first + rows, :]
        if torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint

            yield checkpoint(run, query, key, some, first, use_reentrant=False)
        else:
            yield run(query, key, some, first)


def _fake(call: Call) -> tuple[Tensor, Tensor]:
    query, (batch, heads, q_len, _) = call.query, call.query.shape
    sizes = (
        (batch, heads, q_len) if call.entropy else (0,),
        (batch, heads, call.key.shape[2]) if call.mass else (0,),
    )
    entropy, mass = (query.new_empty(size, dtype=torch.float32) for size in sizes)
    return entropy, mass


def _reference(call: Call) -> tuple[Tensor, ...]:
    found = by_attention(call, "reference")
    return tuple(call.query.new_empty(0) if t is None else t for t in found)


def _flops(call: Call, backward: bool) -> int:
    (batch, heads, q_len, dim), kv_len = call.query.shape, call.key.shape[2]
    return 2 * batch * heads * q_len * kv_len * dim * (2 if call.mass else 1)


DEFINITION = Definition(
    "weight_statistics", Call, gradients=3, results=2, outputs=2, fake=_fake, reference=_reference,
    flops=_flops,
)  # fmt: skip
_CPU = cpu.forward_op(DEFINITION)


def _run_cpu(call: Call, lse: bool) -> Any:
    # An exported program may need gradients.
    if needs_gradient(DEFINITION, call) or (torch.is_grad_enabled() and arguments.is_exporting()):
        return by_attention(call, "cpu")
    return _CPU(call, False)


def _over(row: Implementation) -> Implementation:
    """That of the same backend as one of attention, and where it runs."""

    def run(call: Call, lse: bool) -> Any:
        return by_attention(call, row.backend)

    def refuses(call: Call) -> Sequence[str]:
        return row.refuses(call.attention())

    def on_request(call: Call) -> bool:
        return row.on_request is not None and row.on_request(call.attention())

    by_kernel = row.backend == "cpu"
    return Implementation(
        row.backend, _run_cpu if by_kernel else run, refuses, row.differentiable,
        on_request=on_request, path=(lambda call: cpu.isa()) if by_kernel else None,
    )  # fmt: skip


def inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: Any = None, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of a legal call, as those of attention without the values."""
    given = attention.inputs(shape, dtype, device, seed)
    return {name: given[name] for name in given if name in Arguments._fields}


def cost(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Floating-point operations of the scores, twice, and bytes read and written once."""
    flops, moved = attention.cost({**shape, "value_dim": shape["head_dim"]}, dtype)
    return flops, moved // 2


OP = Op(
    name="attention_statistics",
    arguments=Arguments,
    check=check,
    normalize=normalize,
    definition=DEFINITION,
    inputs=inputs,
    cost=cost,
    ranks=(4,),
    implementations=tuple(map(_over, attention.OP.implementations)),
)
