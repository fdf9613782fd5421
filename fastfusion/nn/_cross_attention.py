"""Attention from one sequence to another of a different width."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from fastfusion.core import arguments
from fastfusion.core.reference import cast
from fastfusion.core.score_policy import KINDS, Kinds, Window
from fastfusion.nn import _nested
from fastfusion.nn._attention_maps import RecordsAttention
from fastfusion.nn._checks import (
    check_counts,
    check_dropout,
    check_inputs,
    check_sequences,
    without_mask_object,
)
from fastfusion.nn._nested_pair import is_nested, pack_pair, packed_attention_with_weights
from fastfusion.nn._plain import attention_dtype_between, is_plain_call, operands_of
from fastfusion.nn._tracing import be_leaf
from fastfusion.nn._weights import attention_with_weights
from fastfusion.ops import cross_attention_layer as _layer
from fastfusion.ops.scaled_dot_product_attention import scaled_dot_product_attention
from fastfusion.ops.varlen_attention import varlen_attention


class ProjectedContext(NamedTuple):
    """The keys and values of a context, from `CrossAttention.project_context`.

    A tuple of two tensors: to reorder the beams of a search, for one, take
    `ProjectedContext(*(t[beams] for t in context))`.

    Attributes:
        key: (batch, num_heads, kv_len, head_dim).
        value: of the same shape.
    """

    key: Tensor
    value: Tensor


# So that contexts and exported programs that take them can be saved and loaded.
torch.serialization.add_safe_globals([ProjectedContext])
_register_namedtuple(ProjectedContext, serialized_type_name="fastfusion.nn.ProjectedContext")


class CrossAttention(RecordsAttention):
    """Multi-head attention of a query sequence to a context sequence.

    out = concat_h(softmax(Q_h K_h^T / sqrt(head_dim)) V_h) W_out, with Q from the query and K, V
    from the context (Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2 and 3.2.3).
    Weights are drawn as in `torch.nn.MultiheadAttention`: Xavier-uniform inputs, zero biases.

    Args:
        query_dim: width of the queries.
        context_dim: width of the context.
        num_heads: number of heads.
        head_dim: width of a head, by default query_dim // num_heads.
        dropout: probability of dropping an attention weight, in training only.
        bias: whether the projections learn an additive bias.
        out_dim: width of the output, by default query_dim.
        device, dtype: of the parameters.

    Raises:
        TypeError: an argument is not of the type named above.
        ValueError: a width or count below 1, a query_dim that num_heads does not divide while
            head_dim is not given, a dropout outside [0, 1].
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        out_dim: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(query_dim=query_dim, context_dim=context_dim, num_heads=num_heads)
        if head_dim is None:
            if query_dim % num_heads:
                raise ValueError(
                    f"query_dim must be a multiple of num_heads, got {query_dim} and {num_heads}; "
                    "or give head_dim"
                )
            head_dim = query_dim // num_heads
        out_dim = query_dim if out_dim is None else out_dim
        check_counts(head_dim=head_dim, out_dim=out_dim)
        check_dropout(dropout)
        self.query_dim, self.context_dim, self.out_dim = query_dim, context_dim, out_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.dropout = dropout
        inner = num_heads * head_dim
        self.q_proj = nn.Linear(query_dim, inner, bias=bias, device=device, dtype=dtype)
        self.kv_proj = nn.Linear(context_dim, 2 * inner, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(inner, out_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()
        be_leaf(self)

    def reset_parameters(self) -> None:
        """Draw the input projections anew and set the biases to 0."""
        nn.init.xavier_uniform_(self.q_proj.weight)
        init_halves(self.kv_proj)
        for linear in (self.q_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def project_context(self, context: Tensor) -> ProjectedContext:
        """The keys and values of a context that many calls attend to, computed once.

        `forward` takes the result instead of the context, with the same masks::

            context = attention.project_context(image)  # once for each image
            for words in steps:
                out = attention(words, context)

        It carries gradients, so several calls in training may share it too; it goes stale when the
        weights change.

        Args:
            context: (batch, kv_len, context_dim).

        Raises:
            TypeError, ValueError: a context that does not fit; the message names and prints it.
        """
        if not torch.compiler.is_compiling():
            check_sequences({"context": context}, [self.context_dim], [self.kv_proj])
        key, value = self._project_context(context)
        return ProjectedContext(key.transpose(1, 2), value.transpose(1, 2))

    def forward(
        self,
        query: Tensor,
        context: Tensor | ProjectedContext,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        need_weights: bool = False,
        average_attn_weights: bool = True,
        *,
        window: Window = None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        segment_ids_q: Tensor | None = None,
        segment_ids_k: Tensor | None = None,
        prefix_len: Tensor | None = None,
        sinks: Tensor | None = None,
        position_table: Tensor | None = None,
        position_index: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from `query` to `context`.

        Args:
            query: (batch, q_len, query_dim), or nested (batch, ragged length, query_dim).
            context: (batch, kv_len, context_dim), or nested as `query` is; or the result of
                `project_context`, of this batch size or of 1 for a context that all share.
            key_padding_mask: bool, broadcastable to (batch, kv_len), True = ignore this position of
                the context. No mask goes with nested tensors.
            attn_mask: broadcastable to (batch, num_heads, q_len, kv_len): bool, True = must not
                attend, as in torch.nn, or float, added to the scores; or a causal mask of
                `torch.nn.attention.bias`. Three dimensions are (num_heads, q_len, kv_len), also
                where batch equals num_heads; a mask for each sample is (batch, 1, q_len, kv_len).
            need_weights: also return the weights, as they are after dropout.
            average_attn_weights: average the weights over the heads.
            window: (left, right), how many keys a query sees before its own and behind it, which
                has the query's number; None: no bound.
            softcap: scores become softcap * tanh(score / softcap) before masks.
            alibi_slopes: broadcastable to (batch, num_heads): a score falls by slope * the distance
                of the key from the query's own.
            segment_ids_q, segment_ids_k: integers, broadcastable to (batch, q_len) and (batch,
                kv_len): a query sees the keys of its own segment alone.
            prefix_len: integers, broadcastable to (batch,): a query sees the keys up to its own,
                and the first so many.
            sinks: broadcastable to (num_heads,): one more score, which takes weight from the others
                and has no value; weights that are returned are those of the context alone.
            position_table, position_index: (num_heads, entries), and which entry is added to each
                score, integers (q_len, kv_len), or by offset (q_len + kv_len - 1,); as of the op.
                These do not go with nested tensors.

        Returns:
            (batch, q_len, out_dim), nested in the layout of `query` if that is; with
            `need_weights` also (batch, q_len, kv_len), or (batch, num_heads, q_len, kv_len) if not
            averaged, padded with 0 for nested tensors. A query with no position left gets the
            output projection's bias and weights of 0.

        Raises:
            TypeError, ValueError: arguments that do not fit; the message names and prints them.
        """
        kinds = None
        if not (
            window is softcap is alibi_slopes is segment_ids_q is segment_ids_k is prefix_len
            is sinks is position_table is position_index is None
        ):  # fmt: skip
            kinds = Kinds(
                window, softcap, alibi_slopes, segment_ids_q, segment_ids_k, prefix_len, sinks,
                position_table, position_index,
            )  # fmt: skip
        if is_nested(query, context):
            if kinds is not None:
                raise ValueError(f"{KINDS} do not go with nested tensors")
            return self._forward_nested(
                query, context, key_padding_mask, attn_mask, need_weights, average_attn_weights
            )
        if kinds is attn_mask is None and not (need_weights or self._recorders):
            fused = self._fused_unchecked(query, context, key_padding_mask)
            if fused is not None:
                return fused
        attn_mask = without_mask_object(attn_mask, query)
        if not torch.compiler.is_compiling():
            self._check(query, context, key_padding_mask, attn_mask)
        if isinstance(context, ProjectedContext):
            batch, kv_len = query.shape[0], context.key.shape[2]
            context = ProjectedContext(*(t.expand(batch, -1, -1, -1) for t in context))
        else:
            batch, kv_len = context.shape[:2]
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.expand(batch, kv_len)
        with_weights = need_weights or bool(self._recorders)
        if not with_weights:
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                attn_mask = ~attn_mask
            may_fuse = not torch.compiler.is_compiling() and _layer.OP.may_fuse(query)
            if may_fuse and kinds is None:
                fused = self._fused(query, context, key_padding_mask, attn_mask)
                if fused is not None:
                    return fused
        q = self.q_proj(query).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        if isinstance(context, ProjectedContext):
            k, v = context
            if not torch.compiler.is_compiling():
                check_inputs({"query": q, "context.key": k, "context.value": v}, [None] * 3)
        else:
            k, v = self._project_context(context)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        dropout_p = self.dropout if self.training else 0.0
        if not with_weights:
            dtype = q.dtype
            if not isinstance(context, ProjectedContext):
                dtype = attention_dtype_between(q, self.q_proj, self.kv_proj)
            out = scaled_dot_product_attention(
                cast(q, dtype), cast(k, dtype), cast(v, dtype), attn_mask, dropout_p,
                key_padding_mask=key_padding_mask, window=window, softcap=softcap,
                alibi_slopes=alibi_slopes, segment_ids_q=segment_ids_q,
                segment_ids_k=segment_ids_k, prefix_len=prefix_len, sinks=sinks,
                position_table=position_table, position_index=position_index,
            )  # fmt: skip
            return self.out_proj(cast(out, q.dtype).transpose(1, 2).flatten(2))
        if attn_mask is not None:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        out, weights = attention_with_weights(
            q, k, v, attn_mask, key_padding_mask, dropout_p, kinds
        )
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return self._hand_out(out, weights, need_weights, average_attn_weights)

    def _fused_unchecked(self, query: Any, context: Any, key_padding_mask: Any) -> Tensor | None:
        """`_fused` of arguments that nobody has checked, which takes a third of a small call: the
        op refuses what does not fit, for `_check` to say what it is."""
        given = context if type(context) is ProjectedContext else (context,)
        if not all(type(t) is Tensor for t in (query, *given)):
            return None
        if torch.compiler.is_compiling() or not _layer.OP.may_fuse(query):
            return None
        try:
            return self._fused(query, context, key_padding_mask, None)
        except RuntimeError:
            return None

    def _fused(
        self,
        query: Tensor,
        context: Tensor | ProjectedContext,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> Tensor | None:
        """The output by the op `cross_attention_layer`, for a bool mask that is True where a query
        attends; None where the parts are to run."""
        if self.training and self.dropout > 0.0:
            return None
        parts = self.__dict__["_modules"]
        projected = isinstance(context, ProjectedContext)
        sequences: Any = (None, *context) if projected else (context, None, None)
        inputs = (query, *context) if projected else (query, context)
        if not is_plain_call(inputs, parts.values(), attn_mask):
            return None
        q_weight, q_scale, q_bias = operands_of(parts["q_proj"])
        kv_weight, kv_scale, kv_bias = (
            (None, None, None) if projected else operands_of(parts["kv_proj"])
        )
        out_weight, out_scale, out_bias = operands_of(parts["out_proj"])
        values: list[Any] = [
            query, *sequences, q_weight, q_bias, kv_weight, kv_bias, out_weight, out_bias, None,
            None, None, None, None, attn_mask, key_padding_mask, self.num_heads, None, None, None,
            False, q_scale, kv_scale, out_scale,
        ]  # fmt: skip
        call = _layer.Call(*values)
        result: Tensor | None = _layer.OP.fuse(call)
        return result

    def _forward_nested(
        self,
        query: Any,
        context: Any,
        key_padding_mask: Any,
        attn_mask: Any,
        need_weights: bool,
        average_attn_weights: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Each sequence to its own context, packed end to end, without padding."""
        sequences = {"query": query, "context": context}
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        queries, keys = pack_pair(
            sequences, (self.query_dim, self.context_dim), (self.q_proj, self.kv_proj), **masks
        )
        q = self.q_proj(queries.values).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = self._project_context(keys.values)
        dropout_p = self.dropout if self.training else 0.0
        if not (need_weights or self._recorders):
            dtype = attention_dtype_between(q, self.q_proj, self.kv_proj)
            out = varlen_attention(
                cast(q, dtype), cast(k, dtype), cast(v, dtype), queries.offsets, keys.offsets,
                queries.longest, keys.longest, dropout_p=dropout_p,
            )  # fmt: skip
            return _nested.unpack(self.out_proj(cast(out, q.dtype).flatten(1)), queries)
        out, weights = packed_attention_with_weights(q, k, v, queries, keys, dropout_p)
        out = _nested.unpack(self.out_proj(out.flatten(1)), queries)
        return self._hand_out(out, weights, need_weights, average_attn_weights)

    def _hand_out(
        self, out: Tensor, weights: Tensor, need_weights: bool, average: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The weights (batch, heads, q_len, kv_len) to who reads them; what the caller gets."""
        self._record(weights)
        if not need_weights:
            return out
        return out, weights.mean(1) if average else weights

    def _project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., num_heads, head_dim), views of one projection."""
        parts = (2, self.num_heads, self.head_dim)
        key, value = self.kv_proj(context).unflatten(-1, parts).unbind(-3)
        return key, value

    def _check(self, query: Any, context: Any, key_padding_mask: Any, attn_mask: Any) -> None:
        if isinstance(context, ProjectedContext):
            dtype, given = check_sequences({"query": query}, [self.query_dim], [self.q_proj])
            given = self._check_projected(context, query, given)
            kv_len = context.key.shape[2]
        else:
            dtype, given = check_sequences(
                {"query": query, "context": context},
                (self.query_dim, self.context_dim),
                (self.q_proj, self.kv_proj),
            )
            kv_len = context.shape[1]
        batch = query.shape[0]
        target = (batch, self.num_heads, query.shape[1], kv_len)
        mask = arguments.autocast_mask(dtype, attn_mask)
        arguments.check_attn_mask(mask, query, target, given)
        arguments.check_padding_mask(
            "key_padding_mask", key_padding_mask, query, (batch, kv_len), given
        )

    def _check_projected(self, context: ProjectedContext, query: Tensor, given: str) -> str:
        names = ("context.key", "context.value")
        given += ", " + arguments.shapes(**dict(zip(names, context, strict=True)))
        for name, tensor in zip(names, context, strict=True):
            arguments.check_tensors(**{name: tensor})
            arguments.check_device(name, tensor, "query", query)
            batch, *shape = tensor.shape
            length = context.key.shape[-2:-1]
            if (
                batch not in (1, query.shape[0])
                or tuple(shape) != (self.num_heads, *length, self.head_dim)
            ):  # fmt: skip
                raise ValueError(
                    f"{name} must have shape (batch or 1, {self.num_heads}, kv_len, "
                    f"{self.head_dim}), got {given}"
                )
        return given

    def extra_repr(self) -> str:
        return (
            f"query_dim={self.query_dim}, context_dim={self.context_dim}, "
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, dropout={self.dropout}"
        )


def init_halves(linear: nn.Linear) -> None:
    """Xavier-uniform for a projection that is two side by side, each with its own fan."""
    for half in linear.weight.chunk(2):
        nn.init.xavier_uniform_(half)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
