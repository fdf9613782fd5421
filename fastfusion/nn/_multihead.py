"""Multi-head attention as a drop-in for torch.nn.MultiheadAttention."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastfusion.core.arguments import autocast_dtype
from fastfusion.core.op import check_not_intercepted
from fastfusion.core.reference import cast
from fastfusion.core.score_policy import KINDS, Kinds, Window
from fastfusion.nn import _nested
from fastfusion.nn._attention_layer import attention_layer
from fastfusion.nn._attention_maps import RecordsAttention
from fastfusion.nn._linear import apply, project, runs_on_cpu
from fastfusion.nn._nested_pair import packed_attention_with_weights
from fastfusion.nn._quantized import Operands, QuantizedLinear, part, product
from fastfusion.nn._torchs_path import torchs_slow_path
from fastfusion.nn._tracing import be_leaf
from fastfusion.nn._weights import attention_with_weights
from fastfusion.ops._parts import attention_dtype
from fastfusion.ops.scaled_dot_product_attention import scaled_dot_product_attention
from fastfusion.ops.varlen_attention import varlen_attention

_HALVES = (torch.bfloat16, torch.float16)


def settle_in(module: torch.nn.Module) -> None:
    """What torch's parts need to be ours, besides the class."""
    be_leaf(module)
    if isinstance(module, MultiheadAttention):
        module.register_forward_pre_hook(stay_visible)


def move_out(module: torch.nn.Module) -> None:
    """Undo `settle_in`."""
    del module.__module__
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is stay_visible]:
        del hooks[key]


def stay_visible(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing.

    In eval mode torch's TransformerEncoderLayer runs a C++ function on the weights of its parts
    instead of calling them, unless one of them carries a hook.
    """


class MultiheadAttention(torch.nn.MultiheadAttention, RecordsAttention):
    """Multi-head attention (Vaswani et al., "Attention Is All You Need", 2017), fused.

    A drop-in for `torch.nn.MultiheadAttention`: arguments, shapes, state_dict and initial weights
    are torch's. Inputs that the fused path does not take run through torch's own slow path, so
    that errors are torch's as well. It differs in that

    - a query with no key left gives `out_proj.bias` and weights of 0, where torch may give NaN;
    - `out_proj` is called, so that its hooks count and whatever stands in its place (an adapter, a
      quantised layer, a parametrized weight), where torch reads its weight and bias;
    - `fastfusion.attention_maps` reads the weights that a model's layers use;
    - self-attention on nested tensors (strided and jagged) works in training too, and attention
      to another nested tensor does; the result is nested in the layout of the query, with its
      holes where it has some;
    - `fastfusion.quantize` puts modules in the place of the weights of its input projections:
      `in_proj`, or `q_proj`, `k_proj` and `v_proj` where widths differ;
    - `need_weights=True` costs about as much as `need_weights=False`;
    - the result is contiguous in both settings of `batch_first`.

    Raises:
        RuntimeError, AssertionError: arguments that do not fit, as torch.nn.MultiheadAttention
            raises them in training mode.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        settle_in(self)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
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
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `key` and `value`.

        Args:
            query: (q_len, batch, embed_dim), (batch, q_len, embed_dim) if `batch_first`, or
                (q_len, embed_dim); or nested (batch, ragged, embed_dim) if `batch_first`.
            key: the same with kv_len and `kdim`.
            value: the same with kv_len and `vdim`.
            key_padding_mask: (batch, kv_len) or (kv_len,): bool, True = ignore the key, or float,
                added to its scores.
            need_weights: also return the attention weights.
            attn_mask: (q_len, kv_len) or (batch * num_heads, q_len, kv_len): bool, True = must not
                attend (the opposite of the op's), or float, added to the scores.
            average_attn_weights: average the weights over the heads.
            is_causal: promises that `attn_mask` is the causal mask. With `need_weights=False` and
                no `key_padding_mask` the mask itself is then not looked at.
            window: (left, right), how many keys a query sees before its own and behind it, which
                has the query's number; None: no bound.
            softcap: scores become softcap * tanh(score / softcap) before masks.
            alibi_slopes: broadcastable to (batch, num_heads): a score falls by slope * the distance
                of the key from the query's own.
            segment_ids_q, segment_ids_k: integers, broadcastable to (batch, q_len) and (batch,
                kv_len): a query sees the keys of its own segment alone.
            prefix_len: integers, broadcastable to (batch,): attention is causal without a mask,
                but all queries see the first so many keys.
            sinks: broadcastable to (num_heads,): one more score, which takes weight from the others
                and has no value; weights that are returned are those of keys alone.
            position_table, position_index: (num_heads, entries), and which entry is added to each
                score, integers (q_len, kv_len), or by offset (q_len + kv_len - 1,); as of the op.
                These, which torch's module has not, go with neither nested tensors nor
                `add_bias_kv` nor `add_zero_attn`.

        Returns:
            The output in the shape of `query`, and the weights (batch, q_len, kv_len), per head
            (batch, num_heads, q_len, kv_len), or None. The weights are those after dropout, with
            the columns of `add_bias_kv` and `add_zero_attn`, and differentiable.
        """
        batched = query.dim() == 3
        kinds = None
        if not (
            window is softcap is alibi_slopes is segment_ids_q is segment_ids_k is prefix_len
            is sinks is position_table is position_index is None
        ):  # fmt: skip
            kinds = Kinds(
                window, softcap, alibi_slopes, segment_ids_q, segment_ids_k, prefix_len, sinks,
                position_table, position_index,
            )  # fmt: skip
            self._check_kinds(query, key, value)
        if query.is_nested or key.is_nested or value.is_nested:
            return self._forward_nested(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        in_proj = self._in_proj()
        if not self._is_legal(
            query, key, value, key_padding_mask, need_weights, attn_mask, is_causal, in_proj[0]
        ):  # fmt: skip
            result = torchs_slow_path(
                self, query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
            if kinds is not None:
                raise ValueError(
                    f"{KINDS} do not go with these tensors, which torch's own code takes (of mixed "
                    "dtypes, or subclasses)"
                )
            return result
        if (
            key_padding_mask is not None
            and attn_mask is not None
            and key_padding_mask.dtype != attn_mask.dtype
        ):
            warnings.warn(
                "Support for mismatched key_padding_mask and attn_mask is deprecated. "
                "Use same type for both instead.",
                stacklevel=2,
            )
        batch_first = self.batch_first or not batched
        # Which tensors are one and the same, before unsqueeze makes three of them.
        shared = (query is key, key is value)
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        dropout_p = self.dropout if self.training else 0.0
        # As in torch: alone, the hint replaces the mask; beside padding or weights the mask counts.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        adds_keys = self.bias_k is not None or self.add_zero_attn
        with_weights = need_weights or bool(self._recorders)
        leading = query.shape[0 if batch_first else 1], self.num_heads
        masks = None
        if (
            not (with_weights or is_causal or adds_keys or dropout_p > 0.0)
            and kinds is None
            and runs_on_cpu(query)
        ):
            masks = _merge_masks(attn_mask, key_padding_mask, leading)
            fused = attention_layer(
                self, query, key, value, shared[1], batch_first, in_proj, *masks
            )
            if fused is not None:
                return (fused if batched else fused.squeeze(0)), None
        q, k, v = (
            heads
            for projected in self._project(
                query, key, value, shared, in_proj, project if batch_first else product
            )
            for heads in _heads(projected, self.num_heads, self.head_dim, batch_first)
        )
        if adds_keys:
            k, v, key_padding_mask, attn_mask = self._append_columns(
                k, v, key_padding_mask, attn_mask
            )
        weights = None
        if with_weights:
            if is_causal:
                attn_mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
            bias, padding = _merge_masks(attn_mask, key_padding_mask, leading, q.dtype)
            out, weights = attention_with_weights(q, k, v, bias, padding, dropout_p, kinds)
            if not batched:
                weights = weights.squeeze(0)
            weights = self._hand_out(weights, need_weights, average_attn_weights)
        else:
            mask = None if is_causal else attn_mask
            bias, padding = masks or _merge_masks(mask, key_padding_mask, leading)
            dtype = attention_dtype(q, *(weight for weight, _, _ in in_proj))
            out = scaled_dot_product_attention(
                cast(q, dtype), cast(k, dtype), cast(v, dtype), bias, dropout_p, is_causal,
                key_padding_mask=padding, window=window, softcap=softcap,
                alibi_slopes=alibi_slopes, segment_ids_q=segment_ids_q,
                segment_ids_k=segment_ids_k, prefix_len=prefix_len, sinks=sinks,
                position_table=position_table, position_index=position_index,
            )  # fmt: skip
            out = cast(out, q.dtype)
        out = (out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)).flatten(2)
        out = apply(self.out_proj, out) if batch_first else self.out_proj(out)
        return (out if batched else out.squeeze(0)), weights

    def _check_kinds(self, *tensors: Tensor) -> None:
        if any(t.is_nested for t in tensors):
            raise ValueError(f"{KINDS} do not go with nested tensors")
        if self.bias_k is not None or self.add_zero_attn:
            raise ValueError(
                f"{KINDS} do not go with add_bias_kv and add_zero_attn, whose keys have no place"
            )

    def _is_legal(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
        in_proj: Operands,
    ) -> bool:
        """Whether the fused path takes these arguments: by type, dtype, device and shape only."""
        shape = query.shape
        rank = len(shape)
        same = query is key and key is value
        if rank not in (2, 3) or shape[-1] != self.embed_dim or not _is_plain(query):
            return False
        dtype = query.dtype
        weight, _, bias = in_proj
        # Quantised weights take what their bias adds up with.
        like = bias if self._quantized() else weight
        mixed = like is not None and dtype != like.dtype
        mixed = mixed or not (dtype == key.dtype == value.dtype)
        if mixed and not _is_autocast(query):
            return False
        if not same:
            if not (_is_plain(key) and _is_plain(value)) or len(key.shape) != rank:
                return False
            if key.shape[:-1] != value.shape[:-1]:
                return False
            batch = 0 if self.batch_first else 1
            if rank == 3 and key.shape[batch] != shape[batch]:
                return False
        if (self.bias_k is None) != (self.bias_v is None):
            return False
        if key.shape[-1] != self.kdim or value.shape[-1] != self.vdim:
            return False
        if attn_mask is None and key_padding_mask is None:
            return not is_causal
        if attn_mask is None and is_causal:
            return False
        if not all(m is None or isinstance(m, Tensor) for m in (attn_mask, key_padding_mask)):
            return False
        if rank == 2:
            batch_size, q_len, kv_len = 1, shape[0], key.shape[0]
        elif self.batch_first:
            batch_size, q_len, kv_len = shape[0], shape[1], key.shape[1]
        else:
            batch_size, q_len, kv_len = shape[1], shape[0], key.shape[0]

        def is_legal_dtype(mask: Tensor) -> bool:
            if not (_is_plain(mask) and mask.device == query.device):
                return False
            if mask.dtype in (torch.bool, dtype):
                return True
            # As torch's: its SDPA adds a float32 mask to half-precision scores, its product
            # with weights does not.
            return mask.is_floating_point() and (
                _is_autocast(query)
                or (mask.dtype == torch.float32 and dtype in _HALVES and not need_weights)
            )

        if attn_mask is not None:
            scores = (q_len, kv_len)
            if attn_mask.dim() == 3:
                scores = (batch_size * self.num_heads, q_len, kv_len)  # type: ignore[assignment]
            if attn_mask.shape != scores or not is_legal_dtype(attn_mask):
                return False
        if key_padding_mask is not None:
            keys = (kv_len,) if rank == 2 else (batch_size, kv_len)
            if key_padding_mask.shape != keys or not is_legal_dtype(key_padding_mask):
                return False
        return True

    def _quantized(self) -> tuple[QuantizedLinear, ...]:
        """What `fastfusion.quantize` has put in the place of the weights of the projections."""
        parts = self._modules
        if len(parts) == 1:  # out_proj alone
            return ()
        if isinstance(whole := parts.get("in_proj"), QuantizedLinear):
            return (whole,)
        found = (parts.get("q_proj"), parts.get("k_proj"), parts.get("v_proj"))
        return tuple(m for m in found if isinstance(m, QuantizedLinear))

    def _in_proj(self) -> tuple[Operands, ...]:
        """One projection that is three side by side, or three; read once a call, since reading may
        be computing (`torch.nn.utils.parametrize`)."""
        quantized = self._quantized()
        if quantized:
            return tuple([m.operands() for m in quantized])
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim:
            return ((self.in_proj_weight, None, bias),)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(zip(weights, (None,) * 3, biases, strict=True))

    def _plain_in_proj(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """in_proj_weight, in_proj_bias, and the weights q, k, v, as torch's function takes them."""
        quantized = self._quantized()
        if not quantized:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            return (self.in_proj_weight, self.in_proj_bias, *separate)
        weights = [m.dequantize().to(dtype) for m in quantized]
        biases = [m.bias for m in quantized if m.bias is not None]
        bias = torch.cat(biases) if biases else None
        return (None, bias, *weights) if len(weights) > 1 else (*weights, bias, None, None, None)

    def _project(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        shared: tuple[bool, bool],
        in_proj: tuple[Operands, ...],
        linear: Callable[..., Tensor],
    ) -> tuple[Tensor, ...]:
        """The three input projections, those of one input side by side: one product per input.

        Returns:
            Tensors (..., n * embed_dim), n adding up to 3.
        """
        width = self.num_heads * self.head_dim  # embed_dim, or what a rank has of it
        query_is_key, key_is_value = shared
        if len(in_proj) == 1:
            (whole,) = in_proj
            if query_is_key and key_is_value:
                return (linear(query, *whole),)
            if key_is_value:
                return (
                    linear(query, *part(whole, 0, 1, width)),
                    linear(key, *part(whole, 1, 3, width)),
                )
            in_proj = tuple([part(whole, i, i + 1, width) for i in range(3)])
        inputs = (query, key, value)
        return tuple([linear(x, *own) for x, own in zip(inputs, in_proj, strict=True)])

    def _append_columns(
        self, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """One more key for `add_bias_kv`, one of zeros for `add_zero_attn`; no mask hides them."""
        check_not_intercepted("add_bias_kv and add_zero_attn")
        batch, heads, _, head_dim = k.shape
        keys, values = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            shape = (batch, heads, 1, head_dim)
            keys.append(self.bias_k.view(1, heads, 1, head_dim).to(k.dtype).expand(shape))
            values.append(self.bias_v.view(1, heads, 1, head_dim).to(v.dtype).expand(shape))
        if self.add_zero_attn:
            zeros = k.new_zeros(1, 1, 1, 1).expand(batch, heads, 1, head_dim)
            keys.append(zeros)
            values.append(zeros)
        added = (0, len(keys) - 1)
        if attn_mask is not None:
            attn_mask = F.pad(attn_mask, added)
        if key_padding_mask is not None:
            key_padding_mask = F.pad(key_padding_mask, added)
        return torch.cat(keys, 2), torch.cat(values, 2), key_padding_mask, attn_mask

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over the packed values of nested tensors, without padding."""
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. "
                "You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        packed = self._pack(query, key, value)
        reason = None
        if key_padding_mask is not None or attn_mask is not None:
            reason = "masks are not supported with NestedTensor input"
        elif self.bias_k is not None or self.add_zero_attn:
            reason = "add_bias_kv and add_zero_attn are not supported with NestedTensor input"
        elif not self.batch_first:
            reason = "batch_first was not True"
        elif isinstance(packed, str):
            reason = packed
        if reason is not None or isinstance(packed, str):
            raise AssertionError(
                "MultiheadAttention does not support NestedTensor outside of its fast path. "
                f"The fast path was not hit because {reason}"
            )
        queries, keys, values = packed
        dropout_p = self.dropout if self.training else 0.0
        shared = (query is key, key is value)
        heads = (self.num_heads, self.head_dim)
        inputs = (queries.values, keys.values, values.values)
        in_proj = self._in_proj()
        q, k, v = (
            each
            for projected in self._project(*inputs, shared, in_proj, product)
            for each in projected.unflatten(-1, (-1, *heads)).unbind(1)
        )
        weights = None
        if need_weights or self._recorders:
            out, weights = packed_attention_with_weights(q, k, v, queries, keys, dropout_p)
            weights = self._hand_out(weights, need_weights, average_attn_weights)
        else:
            dtype = attention_dtype(q, *(weight for weight, _, _ in in_proj))
            out = varlen_attention(
                cast(q, dtype), cast(k, dtype), cast(v, dtype), queries.offsets, keys.offsets,
                queries.longest, keys.longest, dropout_p=dropout_p,
            )  # fmt: skip
            out = cast(out, q.dtype)
        return _nested.unpack(self.out_proj(out.flatten(1)), queries), weights

    def _hand_out(self, weights: Tensor, need_weights: bool, average: bool) -> Tensor | None:
        """Weights ([batch,] heads, q_len, kv_len) to who reads them, and to the caller."""
        self._record(weights)
        if not need_weights:
            return None
        return weights.mean(-3) if average else weights

    def _pack(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[_nested.Packed, _nested.Packed, _nested.Packed] | str:
        """The packed query, key and value, or the reason why they do not fit together."""
        if not (query.is_nested and key.is_nested and value.is_nested):
            return "query, key and value were not all NestedTensors"
        if not query.layout == key.layout == value.layout:
            return "query, key and value were not of the same layout"
        queries = _nested.pack(query)
        keys = queries if key is query else _nested.pack(key)
        values = keys if value is key else _nested.pack(value)
        if queries is None or keys is None or values is None:
            return "the shape was not (batch, ragged length, width)"
        if values is not keys and not _nested.same_lengths(keys, values):
            return "key and value did not have the same lengths"
        if queries.offsets.shape != keys.offsets.shape:
            return "query and key did not have the same batch size"
        return queries, keys, values


def _is_autocast(tensor: Tensor) -> bool:
    """Whether autocast will make the dtypes agree."""
    return autocast_dtype(tensor.device.type) is not None


def _is_plain(tensor: Tensor) -> bool:
    """Not a subclass with a life of its own (DTensor, quantized, masked ...)."""
    kind = type(tensor)
    # By type: has_torch_function says yes to a Parameter while any function mode is on.
    return kind is Tensor or (
        kind.__torch_function__ is torch._C._disabled_torch_function_impl
        and not is_traceable_wrapper_subclass(tensor)
    )


def _heads(
    projected: Tensor, num_heads: int, head_dim: int, batch_first: bool
) -> tuple[Tensor, ...]:
    """(batch, length, n * width) or (length, batch, n * width) seen as n (batch, heads, length,
    head_dim)."""
    outer, inner, width = projected.shape
    split = (outer, inner, width // (num_heads * head_dim), num_heads, head_dim)
    parts = projected.view(split)
    if not projected.requires_grad:
        return parts.permute((2, 0, 3, 1, 4) if batch_first else (2, 1, 3, 0, 4)).unbind(0)
    # Two or three more views, and one copy less of all gradients: unbind here goes back to the
    # layout of the projection at once.
    order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
    return tuple(part.permute(order) for part in parts.unbind(2))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask, True = hidden, as a float one."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _merge_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    leading: tuple[int, int],
    additive: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """torch.nn's masks (True = hidden) as the attention's.

    Args:
        leading: batch and heads.
        additive: give `attn_mask` as a float of this dtype to be added, not as bool.

    Returns:
        A mask that broadcasts to (batch, heads, q_len, kv_len), as a bool True = attend, and the
        bool key padding mask (batch, kv_len); a float one has gone into the former.
    """
    bias, padding = attn_mask, key_padding_mask
    if bias is not None:
        if bias.dim() == 3:
            bias = bias.unflatten(0, leading)
        elif additive is not None:
            bias = bias[None, None]
    if padding is not None and padding.dtype != torch.bool:
        keys = padding[:, None, None, :]
        padding = None
        if bias is None:
            return keys, None
        bias = (_additive(bias, keys.dtype) if bias.dtype == torch.bool else bias) + keys
    if bias is not None and bias.dtype == torch.bool:
        bias = ~bias if additive is None else _additive(bias, additive)
    return bias, padding
