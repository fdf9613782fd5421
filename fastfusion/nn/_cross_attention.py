"""Attention from one sequence to another of a different width."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfusion import _arguments as arguments
from fastfusion.nn import _fused
from fastfusion.nn._weights import attention_with_weights
from fastfusion.ops.scaled_dot_product_attention import scaled_dot_product_attention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class CrossAttention(nn.Module):
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

    def reset_parameters(self) -> None:
        """Draw the input projections anew and set the biases to 0."""
        nn.init.xavier_uniform_(self.q_proj.weight)
        init_halves(self.kv_proj)
        for linear in (self.q_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(
        self,
        query: Tensor,
        context: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        need_weights: bool = False,
        average_attn_weights: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from `query` to `context`.

        Args:
            query: (batch, q_len, query_dim).
            context: (batch, kv_len, context_dim).
            key_padding_mask: bool (batch, kv_len), True = ignore this position of the context.
            attn_mask: broadcastable to (batch, num_heads, q_len, kv_len): bool, True = must not
                attend, as in torch.nn, or float, added to the scores.
            need_weights: also return the weights, as they are after dropout.
            average_attn_weights: average the weights over the heads.

        Returns:
            (batch, q_len, out_dim); with `need_weights` also (batch, q_len, kv_len), or
            (batch, num_heads, q_len, kv_len) if not averaged. A query with no position left gets
            the output projection's bias and weights of 0.

        Raises:
            TypeError, ValueError: arguments that do not fit; the message names and prints them.
        """
        if not torch.compiler.is_compiling():
            self._check(query, context, key_padding_mask, attn_mask)
        if not need_weights:
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                attn_mask = ~attn_mask
            run = _fused.cross_attention_kernels(self, query, context, attn_mask)
            if run is not None:
                return run(self, query, context, key_padding_mask, attn_mask)
        heads = (self.num_heads, self.head_dim)
        q = self.q_proj(query).unflatten(-1, heads).transpose(1, 2)
        k, v = self.kv_proj(context).unflatten(-1, (2, *heads)).unbind(2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        dropout_p = self.dropout if self.training else 0.0
        if not need_weights:
            out = scaled_dot_product_attention(
                q, k, v, attn_mask, dropout_p, key_padding_mask=key_padding_mask
            )
            return self.out_proj(out.transpose(1, 2).flatten(2))
        bias = attn_mask
        if bias is not None:
            if bias.dtype == torch.bool:
                bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill(bias, -torch.inf)
            bias = bias[(None,) * (4 - bias.dim())]
        out, weights = attention_with_weights(q, k, v, bias, key_padding_mask, dropout_p)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return out, weights.mean(1) if average_attn_weights else weights

    def _check(
        self,
        query: Any,
        context: Any,
        key_padding_mask: Any,
        attn_mask: Any,
    ) -> None:
        dtype, given = check_sequences(
            {"query": query, "context": context},
            (self.query_dim, self.context_dim),
            self.q_proj.weight,
        )
        batch, q_len, kv_len = query.shape[0], query.shape[1], context.shape[1]
        target = (batch, self.num_heads, q_len, kv_len)
        mask = arguments.autocast_mask(dtype, attn_mask)
        arguments.check_attn_mask(mask, query, target, given)
        arguments.check_padding_mask(
            "key_padding_mask", key_padding_mask, query, (batch, kv_len), given
        )

    def extra_repr(self) -> str:
        return (
            f"query_dim={self.query_dim}, context_dim={self.context_dim}, "
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, dropout={self.dropout}"
        )


def check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"{name} must be an int, got {count!r}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def check_dropout(dropout: Any) -> None:
    if not isinstance(dropout, int | float) or isinstance(dropout, bool):
        raise TypeError(f"dropout must be a float, got {dropout!r}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be between 0 and 1, got {dropout}")


def check_sequences(
    sequences: dict[str, Any], widths: tuple[int, int], weight: Tensor
) -> tuple[torch.dtype | None, str]:
    """Two tensors (batch, length, width) of one batch, and of the dtype and device of `weight`.

    Returns:
        The dtype of an enabled autocast, which lets dtypes differ, and the shapes for messages.
    """
    dtype = arguments.autocast_dtype(weight.device.type)
    cast = arguments.autocast_cast(dtype, *sequences.values())
    arguments.check_tensors(**dict(zip(sequences, cast, strict=True)))
    given = arguments.shapes(**sequences)
    for (name, tensor), width in zip(sequences.items(), widths, strict=True):
        if tensor.dim() != 3 or tensor.shape[2] != width:
            raise ValueError(f"{name} must have shape (batch, length, {width}), got {given}")
        if dtype is None and tensor.dtype != weight.dtype:
            raise TypeError(
                f"{name} must have the dtype of the weights, {weight.dtype}, got {tensor.dtype}"
            )
        arguments.check_device(name, tensor, "the weights", weight)
    (first_name, first), (name, tensor) = sequences.items()
    if tensor.shape[0] != first.shape[0]:
        raise ValueError(f"{name} must have the batch size of {first_name}, got {given}")
    return dtype, given


def check_activation(activation: Any) -> None:
    if not (callable(activation) or (isinstance(activation, str) and activation in ACTIVATIONS)):
        raise ValueError(f"activation must be relu, gelu or callable, got {activation!r}")


def init_halves(linear: nn.Linear) -> None:
    """Xavier-uniform for a projection that is two side by side, each with its own fan."""
    for half in linear.weight.chunk(2):
        nn.init.xavier_uniform_(half)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
