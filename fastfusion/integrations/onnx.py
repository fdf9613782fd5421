"""The ops in ONNX: `torch.onnx.export` of a model with this package's modules or ops just works.

    torch.onnx.export(model, args, "model.onnx", dynamic_shapes=...)

A translation of each op is handed to torch's exporter when that is imported, and to the TorchScript
exporter (``dynamo=False``) from opset 18 on. The graphs are standard ONNX and keep the promises of
the ops: a row without keys is 0, what a padding mask hides is never read into a result, causal
masks are written out. Lengths and batch sizes may differ from the exported ones where
`dynamic_shapes` says so.

The formulas are written once, over `Operators`, and take the arguments of an op by their names in
its schema, whatever the backend.

Up to opset 22 attention becomes MatMul, Softmax and Where. From opset 23 on it is the operator
`Attention`, for runtimes that fuse it, wherever that means the same: float32, no float mask
(runtimes disagree on very negative numbers), no dropout, a positive scale. It needs help to mean
the same: runtimes disagree on rows without keys, so these are set to 0 behind it, and onnxruntime
refuses a mask whose query axis is 1, so that is expanded. On CPUs onnxruntime 1.32 takes as long
with either, and its `Attention` refuses empty batches and empty sequences.

Dropout stays random, with the runtime's random numbers.
"""

from collections.abc import Callable
from typing import Any

import torch

from fastfusion.integrations.onnx_operators import Graph, Script

_OPSET = 18
_FUSED_OPSET = 23
_FLOAT, _INT64, _BOOL, _DOUBLE = 1, 7, 9, 11  # of onnx.TensorProto
_KINDS = ("", "_forward", "_out")
_BACKENDS = ("", "triton_", "cuda_")


def translations(opset_version: int = _OPSET) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of the ops, for an exporter that does not have them yet.

    `torch.onnx.export` has; this is for other users of torch's registry, or to change one.

    Args:
        opset_version: what the exported program targets, at least 18.

    Returns:
        A dictionary to pass as ``torch.onnx.export(..., custom_translation_table=...)``.

    Raises:
        ValueError: the opset is older than the operators that the translations use.
    """
    if opset_version < _OPSET:
        raise ValueError(f"opset_version must be at least {_OPSET}, got {opset_version}")
    return {op: _translation(op, opset_version >= _FUSED_OPSET) for op in _ops()}


def _ops() -> list[Any]:
    """The forward ops that this installation has."""
    names = (b + formula + k for b in _BACKENDS for formula in _formulas() for k in _KINDS)
    ops = torch.ops.fastfusion
    return [getattr(ops, name).default for name in names if hasattr(ops, name)]


def _formulas() -> dict[str, Callable[..., tuple[Any, ...]]]:
    from fastfusion.integrations import onnx_layers, onnx_linear  # made of those of this file

    return _FORMULAS | onnx_linear.FORMULAS | onnx_layers.FORMULAS


def _formula(op: Any) -> Callable[..., tuple[Any, ...]]:
    """A function of a builder and the op's arguments by name."""
    name = op._schema.name.removeprefix("fastfusion::")
    for backend in filter(None, _BACKENDS):
        name = name.removeprefix(backend)
    for kind in filter(None, _KINDS):
        name = name.removesuffix(kind)
    return _formulas()[name]


def _results(op: Any, outputs: tuple[Any, ...]) -> Any:
    """The outputs that the schema has; one alone is no tuple."""
    wanted = outputs[: len(op._schema.returns)]
    return wanted if len(wanted) > 1 else wanted[0]


def _translation(op: Any, fused: bool) -> Callable[..., Any]:
    """`op` as a function that torch's exporter calls with ONNX values and Python numbers."""
    formula = _formula(op)
    defaults = {argument.name: argument.default_value for argument in op._schema.arguments}

    def translate(*args: Any, **kwargs: Any) -> Any:
        given = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
        return _results(op, formula(Script(fused), **given))

    return translate


def _attention(
    op: Any,
    *,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    key_padding_mask: Any,
    is_causal: bool,
    bottom_right: bool = False,
    scale: float | None,
    dropout_p: float = 0.0,
    **kinds: Any,
) -> tuple[Any, Any]:
    """out and lse."""
    grouped = _is_grouped(op, query, key)
    dtype = op.dtype(query)
    softcap = kinds.get("softcap")
    fused = op.fused and dtype == _FLOAT and dropout_p == 0.0 and (scale is None or scale > 0.0)
    query, key, value = (_cast(op, t, dtype, _FLOAT) for t in (query, key, value))
    offset = _difference(op, query, key) if bottom_right else None
    bias, visible = _kinds(op, query, key, *_split(op, attn_mask), offset, is_causal, **kinds)
    sinks = kinds.get("sinks")
    out, lse = _rows(
        op, query, key, value, bias, visible, key_padding_mask, scale, dropout_p, grouped,
        fused and softcap is None and sinks is None, softcap, sinks,
    )  # fmt: skip
    return _cast(op, out, _FLOAT, dtype), lse


def _rows(
    op: Any,
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    visible: Any,
    padding: Any,
    scale: float | None,
    dropout_p: float,
    grouped: bool,
    fused: bool,
    softcap: float | None = None,
    sinks: Any = None,
) -> tuple[Any, Any]:
    """out and lse in float32; `grouped` says that the keys may have fewer heads, `fused` that
    `Attention` means the same if there is no bias."""
    if padding is not None:
        key, value = (_hide(op, t, padding) for t in (key, value))
        visible = _and(op, visible, op.Not(op.Unsqueeze(padding, [1, 2])))
    repeated = [_repeat(op, t, query) if grouped else t for t in (key, value)]
    scores = _scores(op, query, repeated[0], scale, bias, softcap)
    out, lse = _attend(op, scores, visible, repeated[1], dropout_p, bias is not None, sinks)
    # The lse has nodes of its own then; torch leaves out what nobody uses.
    return (_fused(op, query, key, value, visible, scale) if fused and bias is None else out), lse


def _fused(op: Any, query: Any, key: Any, value: Any, visible: Any, scale: float | None) -> Any:
    """By the operator, which has the formula's outputs but in rows without keys."""
    if visible is None:
        return op.Attention(query, key, value, scale=scale)[0]
    whole = op.Concat(_size(op, query, 2), _size(op, key, 2), axis=0)
    mask = op.Expand(visible, whole)
    out = op.Attention(query, key, value, mask, scale=scale)[0]
    any_key = op.ReduceMax(op.Cast(visible, to=_FLOAT), [-1], keepdims=1)
    return op.Where(op.Equal(any_key, 0.0), 0.0, out)


def _bidirectional(
    op: Any,
    *,
    query: Any,
    key: Any,
    value: Any,
    query_value: Any,
    attn_mask: Any,
    query_padding_mask: Any,
    key_padding_mask: Any,
    is_causal: bool = False,
    bottom_right: bool = False,
    scale: float | None,
    dropout_p: float = 0.0,
    **kinds: Any,
) -> tuple[Any, ...]:
    """Both directions from one score matrix, which `Attention` cannot share."""
    dtype = op.dtype(query)
    query, key, value, query_value = (
        _cast(op, t, dtype, _FLOAT) for t in (query, key, value, query_value)
    )
    out_q, out_k, *lse = _both_ways(
        op, query, key, value, query_value, attn_mask, query_padding_mask, key_padding_mask,
        is_causal, bottom_right, scale, dropout_p, **kinds,
    )  # fmt: skip
    return _cast(op, out_q, _FLOAT, dtype), _cast(op, out_k, _FLOAT, dtype), *lse


def _both_ways(
    op: Any,
    query: Any,
    key: Any,
    value: Any,
    query_value: Any,
    attn_mask: Any,
    query_padding_mask: Any,
    key_padding_mask: Any,
    is_causal: bool,
    bottom_right: bool,
    scale: float | None,
    dropout_p: float,
    **kinds: Any,
) -> tuple[Any, ...]:
    """The same in float32."""
    offset = _difference(op, query, key) if bottom_right else None
    bias, visible = _kinds(op, query, key, *_split(op, attn_mask), offset, is_causal, **kinds)
    scores = _scores(op, query, key, scale, bias, kinds.get("softcap"))
    if visible is not None:
        scores = op.Where(visible, scores, -torch.inf)
    masked = bias is not None or visible is not None

    def direction(scores: Any, padding: Any, value: Any) -> tuple[Any, Any]:
        seen = None
        if padding is not None:
            seen, value = op.Not(op.Unsqueeze(padding, [1, 2])), _hide(op, value, padding)
        return _attend(op, scores, seen, value, dropout_p, masked)

    out_q, lse_q = direction(scores, key_padding_mask, value)
    columns = op.Transpose(scores, perm=[0, 1, 3, 2])
    out_k, lse_k = direction(columns, query_padding_mask, query_value)
    return out_q, out_k, lse_q, lse_k


def _varlen(
    op: Any,
    *,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    is_causal: bool,
    bottom_right: bool,
    scale: float | None,
    dropout_p: float = 0.0,
    **kinds: Any,
) -> tuple[Any, Any]:
    """Padded to the longest sequences that the offsets show, which need not be those exported."""
    total, dtype, grouped = _size(op, query, 0), op.dtype(query), _is_grouped(op, query, key)
    rows, behind, q_lengths, q_longest = _places(op, cu_seqlens_q)
    columns, absent, kv_lengths, kv_longest = _places(op, cu_seqlens_k)
    query, key, value = (
        _cast(op, _pad(op, tensor, places), dtype, _FLOAT)
        for tensor, places in ((query, rows), (key, columns), (value, columns))
    )
    bias, visible = (
        # Of rank 4, then cut from the longest lengths that are allowed.
        None if mask is None else op.Slice(
            op.Expand(mask, [1, 1, 1, 1]), [0, 0], op.Concat(q_longest, kv_longest, axis=0), [2, 3]
        )
        for mask in _split(op, attn_mask)
    )  # fmt: skip
    # Lengths (sequences, 1): one diagonal for each.
    offset = op.Unsqueeze(op.Sub(kv_lengths, q_lengths), [2, 3]) if bottom_right else None
    bias, visible = _kinds(op, query, key, bias, visible, offset, is_causal, **kinds)
    out, lse = _rows(
        op, query, key, value, bias, visible, absent, scale, dropout_p, grouped, False,
        kinds.get("softcap"), kinds.get("sinks"),
    )  # fmt: skip
    present = op.Reshape(op.Not(behind), [-1])

    def pack(padded: Any, fill: float, *dims: int) -> Any:
        """(total, heads, ...), with `fill` behind the last sequence."""
        rows_first = op.Transpose(padded, perm=[0, 2, 1, 3][: len(dims) + 2])
        size = _size(op, rows_first, *dims)
        flat = op.Reshape(rows_first, op.Concat([-1], size, axis=0))
        packed = op.Compress(flat, present, axis=0)
        rest = op.Sub(total, _size(op, packed, 0))
        return op.Concat(packed, op.Expand(fill, op.Concat(rest, size, axis=0)), axis=0)

    return _cast(op, pack(out, 0.0, 2, 3), _FLOAT, dtype), pack(lse, -torch.inf, 2)


def _places(op: Any, offsets: Any) -> tuple[Any, ...]:
    """For each place (sequence, position) its row, 0 where it has none, and whether that is so;
    the lengths (sequences, 1); the longest."""
    offsets = op.Unsqueeze(op.Cast(offsets, to=_INT64), [1])
    begin, end = op.Slice(offsets, [0], [-1], [0]), op.Slice(offsets, [1], [2**62], [0])
    lengths = op.Sub(end, begin)
    # Not one sequence is a longest one of 0.
    longest = op.ReduceMax(op.Concat(op.Reshape(lengths, [-1]), [0], axis=0), [0], keepdims=1)
    rows = op.Add(begin, _range(op, longest))
    absent = op.GreaterOrEqual(rows, end)
    return op.Where(absent, 0, rows), absent, lengths, longest


def _pad(op: Any, packed: Any, places: Any) -> Any:
    """(sequences, heads, longest, dim) from (total, heads, dim)."""
    return op.Transpose(op.Gather(packed, places, axis=0), perm=[0, 2, 1, 3])


def _size(op: Any, value: Any, *dims: int) -> Any:
    """A tensor of one number for each of `dims`."""
    # Not by Shape's own start and end: the TorchScript exporter's shape inference ignores them.
    return op.Gather(op.Shape(value), list(dims), axis=0)


def _cast(op: Any, value: Any, dtype: int, to: int) -> Any:
    return value if dtype == to else op.Cast(value, to=int(to))


def _difference(op: Any, query: Any, key: Any) -> Any:
    """By how much a causal mask is shifted that ends with the last query at the last key."""
    return op.Sub(_size(op, key, 2), _size(op, query, 2))


def _range(op: Any, size: Any) -> Any:
    return op.Range(0, op.Squeeze(size, [0]), 1)


def _and(op: Any, first: Any, second: Any) -> Any:
    return second if first is None else op.And(first, second)


def _split(op: Any, attn_mask: Any) -> tuple[Any, Any]:
    """The mask as the bias in float32 or as the visible scores, which it is; None for the other."""
    dtype = None if attn_mask is None else op.dtype(attn_mask)
    if dtype is None or dtype == _BOOL:
        return None, attn_mask
    return _cast(op, attn_mask, dtype, _FLOAT), None


def _kinds(
    op: Any,
    query: Any,
    key: Any,
    bias: Any,
    visible: Any,
    offset: Any,
    is_causal: bool,
    *,
    window_left: int | None = None,
    window_right: int | None = None,
    alibi_slopes: Any = None,
    segment_ids_q: Any = None,
    segment_ids_k: Any = None,
    prefix_len: Any = None,
    position_index: Any = None,
    position_table: Any = None,
    **others: Any,
) -> tuple[Any, Any]:
    """The bias and the visible scores with what causal masks, windows, segments, prefixes, ALiBi
    and position tables add to them. Queries stand beside the keys of the same number, or `offset`
    further."""
    if segment_ids_q is not None:
        rows, columns = op.Unsqueeze(segment_ids_q, [1, 3]), op.Unsqueeze(segment_ids_k, [1, 2])
        visible = _and(op, visible, op.Equal(rows, columns))
    if position_table is not None:
        if op.rank(position_index) == 1:  # by offset of key to query
            last = op.Sub(_size(op, query, 2), 1)
            rows, keys = (_range(op, _size(op, t, 2)) for t in (query, key))
            places = op.Sub(op.Add(keys, last), op.Unsqueeze(rows, [1]))
            position_index = op.Gather(position_index, places, axis=0)
        added = op.Gather(position_table, position_index, axis=1)
        bias = added if bias is None else op.Add(bias, added)
    window_right = 0 if is_causal else window_right
    if window_left is window_right is alibi_slopes is None:
        return bias, visible
    # (q_len, kv_len), or as `offset` broadcasts it: by how much a query is behind a key.
    place = op.Unsqueeze(_range(op, _size(op, query, 2)), [1])
    if offset is not None:
        place = op.Add(place, offset)
    keys = _range(op, _size(op, key, 2))
    if window_right == 0:
        near = op.LessOrEqual(keys, place)
        if prefix_len is not None:
            near = op.Or(near, op.Less(keys, op.Unsqueeze(prefix_len, [1, 2, 3])))
        visible = _and(op, visible, near)
    elif window_right is not None:
        visible = _and(op, visible, op.LessOrEqual(keys, op.Add(place, window_right)))
    if window_left is not None:
        visible = _and(op, visible, op.GreaterOrEqual(op.Add(keys, window_left), place))
    if alibi_slopes is not None:
        distance = op.Cast(op.Abs(op.Sub(place, keys)), to=_FLOAT)
        fall = op.Mul(op.Neg(op.Unsqueeze(alibi_slopes, [2, 3])), distance)
        bias = fall if bias is None else op.Add(bias, fall)
    return bias, visible


def _hide(op: Any, tensor: Any, padding: Any) -> Any:
    return op.Where(op.Unsqueeze(padding, [1, 3]), 0.0, tensor)


def _is_grouped(op: Any, query: Any, key: Any) -> bool:
    """Whether the heads of the keys have to be repeated; one head alone broadcasts."""
    heads = op.size(key, 1)
    return heads != 1 and (heads is None or heads != op.size(query, 1))


def _repeat(op: Any, tensor: Any, query: Any) -> Any:
    """With the heads of the query."""
    times = op.Div(_size(op, query, 1), _size(op, tensor, 1))
    repeats = op.Concat([1, 1], times, [1, 1], axis=0)
    shape = op.Concat(_size(op, query, 0, 1), _size(op, tensor, 2, 3), axis=0)
    return op.Reshape(op.Expand(op.Unsqueeze(tensor, [2]), repeats), shape, allowzero=1)


def _scores(
    op: Any, query: Any, key: Any, scale: float | None, bias: Any, softcap: float | None = None
) -> Any:
    factor = scale
    if scale is None:
        factor = op.Reciprocal(op.Sqrt(op.Cast(_size(op, query, 3), to=_FLOAT)))
    scores = op.Mul(op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2])), factor)
    if softcap is not None:
        scores = op.Mul(op.Tanh(op.Div(scores, softcap)), softcap)
    return scores if bias is None else op.Add(scores, bias)


def _attend(
    op: Any,
    scores: Any,
    visible: Any,
    value: Any,
    dropout_p: float,
    masked: bool,
    sinks: Any = None,
) -> tuple[Any, Any]:
    """out and lse of rows of scores; `masked` says that some may be -inf already."""
    if visible is not None:
        scores, masked = op.Where(visible, scores, -torch.inf), True
    if sinks is not None:
        keys = _size(op, scores, 3)
        column = op.Concat(_size(op, scores, 0, 1, 2), [1], axis=0)
        scores = op.Concat(scores, op.Expand(op.Unsqueeze(sinks, [0, 2, 3]), column), axis=-1)
    probabilities = op.Softmax(scores, axis=-1)
    if sinks is not None:
        probabilities = op.Slice(probabilities, [0], keys, [3])
    if dropout_p > 0.0:
        # Not by Dropout, which onnxruntime 1.32 leaves out between a Softmax and a MatMul.
        kept = op.GreaterOrEqual(op.RandomUniformLike(probabilities, dtype=_FLOAT), dropout_p)
        factor = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
        probabilities = op.Mul(probabilities, op.Mul(op.Cast(kept, to=_FLOAT), factor))
    out = op.MatMul(probabilities, value)
    # Softmax of a row of -inf alone is NaN.
    top = op.ReduceMax(scores, [-1], keepdims=1)
    dead = op.Equal(top, -torch.inf)
    if masked:
        out = op.Where(dead, 0.0, out)
    shift = op.Where(dead, 0.0, top)
    total = op.ReduceSum(op.Exp(op.Sub(scores, shift)), [-1], keepdims=1)
    return out, op.Squeeze(op.Add(shift, op.Log(total)), [-1])


def _statistics(
    op: Any,
    *,
    query: Any,
    key: Any,
    attn_mask: Any,
    query_padding_mask: Any,
    key_padding_mask: Any,
    is_causal: bool,
    bottom_right: bool,
    scale: float | None,
    **asked: bool,
) -> tuple[Any, Any]:
    """Entropy and mass, whichever is asked for: what nobody uses is left out."""
    grouped = _is_grouped(op, query, key)
    query, key = (_cast(op, t, op.dtype(t), _FLOAT) for t in (query, key))
    offset = _difference(op, query, key) if bottom_right else None
    bias, visible = _kinds(op, query, key, *_split(op, attn_mask), offset, is_causal)
    if key_padding_mask is not None:
        key = _hide(op, key, key_padding_mask)
        visible = _and(op, visible, op.Not(op.Unsqueeze(key_padding_mask, [1, 2])))
    scores = _scores(op, query, _repeat(op, key, query) if grouped else key, scale, bias)
    if visible is not None:
        scores = op.Where(visible, scores, -torch.inf)
    dead = op.Equal(op.ReduceMax(scores, [-1], keepdims=1), -torch.inf)
    weights = op.Where(dead, 0.0, op.Softmax(scores, axis=-1))
    if query_padding_mask is not None:
        weights = op.Where(op.Unsqueeze(query_padding_mask, [1, 3]), 0.0, weights)
    none = op.Equal(weights, 0.0)
    terms = op.Mul(weights, op.Log(op.Where(none, 1.0, weights)))
    entropy = op.Neg(op.ReduceSum(terms, [-1], keepdims=0))
    return entropy, op.ReduceSum(weights, [2], keepdims=0)


_FORMULAS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "attention": _attention,
    "bidirectional": _bidirectional,
    "varlen": _varlen,
    "weight_statistics": _statistics,
}


def register_translations() -> None:
    """Hand the translations to torch's exporter."""
    try:
        from torch.onnx._internal.exporter._torchlib import _torchlib_registry as registry
    except ImportError:  # another torch: `translations` is left
        return
    for op in _ops():
        for opset in (_OPSET, _FUSED_OPSET):
            registry.onnx_impl(op, opset_introduced=opset, no_compile=True)(
                _translation(op, opset >= _FUSED_OPSET)
            )


def register_symbolics(exporter: Any) -> None:
    """Hand them to the TorchScript exporter, which `exporter`, torch.onnx, speaks for."""
    if not hasattr(exporter, "register_custom_op_symbolic"):
        return
    for op in _ops():
        exporter.register_custom_op_symbolic(op._schema.name, _symbolic(op), _OPSET)


def _symbolic(op: Any) -> Callable[..., Any]:
    """`op` as a function that the TorchScript exporter calls with its graph and values."""
    formula, arguments = _formula(op), op._schema.arguments

    def constant(argument: Any, value: Any) -> Any:
        helper = torch.onnx.symbolic_helper
        if helper._is_none(value):
            return None
        kind = str(argument.type).removeprefix("Optional[").removesuffix("]")
        letter = {"float": "f", "bool": "b", "int": "i"}.get(kind)
        return value if letter is None else helper._get_const(value, letter, argument.name)

    def symbolic(graph: Any, *values: Any) -> Any:
        given = {a.name: constant(a, v) for a, v in zip(arguments, values, strict=True)}
        return _results(op, formula(Graph(graph), **given))

    return symbolic
