"""How our ops run on DTensors: each shards along dimensions in which a call falls into independent
ones, forward and backward; what cannot be sharded is gathered first.

A layout names the dimensions of every tensor by letters. To shard a call along a letter is to shard
each tensor that has it, and to replicate those that have not, or are of size 1 there; the gradient
of a replicated one is a sum over the ranks. Registered when `torch.distributed.tensor` is imported.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding


@dataclass(frozen=True)
class Layout:
    """Dimensions of an op's tensors.

    Attributes:
        inputs: a letter for each dimension of the tensors that have letters of `shards`; arguments
            that are not named here are replicated.
        outputs: likewise, in their order.
        shards: the letters along which a call may be sharded.
        gradients: how many inputs have a gradient in the backward op, if there is one.
        last: others of them, whose gradients come behind theirs.
    """

    inputs: Mapping[str, str]
    outputs: Sequence[str]
    shards: str
    gradients: int = 0
    last: tuple[str, ...] = ()


_ATTENTION = {
    "query": "bhqd", "key": "bhkd", "value": "bhkd", "attn_mask": "bhqk", "key_padding_mask": "bk",
    "alibi_slopes": "bh", "segment_ids_q": "bq", "segment_ids_k": "bk", "prefix_len": "b",
    "sinks": "h", "position_table": "he", "position_index": "", "key_scale": "bh",
    "value_scale": "bh",
}  # fmt: skip
_BOTH = {
    **_ATTENTION, "query_value": "bhqd", "query_padding_mask": "bq",
}  # fmt: skip
_PACKED = dict.fromkeys(("query", "key", "value"), "thd") | {
    "attn_mask": "bhqk", "alibi_slopes": "bh", "sinks": "h",
}  # fmt: skip

LAYOUTS: dict[str, Layout] = {
    "attention": Layout(
        _ATTENTION, ("bhqd", "bhq"), "bhq", gradients=4, last=("position_table", "sinks")
    ),
    # Its columns are normalised over all queries, so these cannot be sharded.
    "bidirectional": Layout(_BOTH, ("bhqd", "bhkd", "bhq", "bhk"), "bh", gradients=5),
    # A sequence may begin on one rank and end on another: heads alone are independent.
    "varlen": Layout(_PACKED, ("thd", "th"), "h", gradients=4, last=("sinks",)),
    "weight_statistics": Layout(
        {**_ATTENTION, "query_padding_mask": "bq"}, ("bhq", "bhk"), "bh"
    ),
    "linear": Layout(
        {"input": "blw", "weight": "fw", "bias": "f", "residual": "blf", "weight_scale": "f"},
        ("blf",), "blf",
    ),
    "norm": Layout({"input": "blw", "residual": "blw"}, ("blw",), "bl"),
    "encoder_layer": Layout(
        {"input": "blw", "attn_mask": "bhqk", "key_padding_mask": "bk"}, ("blw",), "b"
    ),
    "decoder_layer": Layout(
        {
            "input": "blw", "memory": "bmw", "memory_key": "bhmd", "memory_value": "bhmd",
            "memory_mask": "bhlm", "attn_mask": "bhqk", "key_padding_mask": "bk",
            "memory_padding_mask": "bm", "key_cache": "bhcd", "value_cache": "bhcd",
        },
        ("blw",), "b",
    ),
    "cross_attention_layer": Layout(
        {
            "query": "bqw", "context": "bkw", "key": "bhkd", "value": "bhkd", "residual": "bqw",
            "attn_mask": "bhqk", "key_padding_mask": "bk", "value_context": "bkw",
        },
        ("bqw",), "bq",
    ),
    "cross_modal_layer": Layout(
        {
            "visual": "bvw", "text": "btw", "attn_mask": "bhvt", "visual_padding_mask": "bv",
            "text_padding_mask": "bt",
        },
        ("bvw", "btw"), "b",
    ),
}  # fmt: skip

# Arguments of attention, besides its tensors, with which the letters mean what they say.
_UNDERSTOOD = frozenset((
    "seed", "dropout_p", "is_causal", "bottom_right", "scale", "enable_gqa", "mask_gradient",
    "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
    "window_left", "window_right", "softcap", "grad_0", "grad_1", "grad_2", "grad_3",
))  # fmt: skip
# The letter of queries, which may have to know their own place.
_ROWS = {"attention": "q", "cross_attention_layer": "q"}


def register() -> None:
    """Tell torch.distributed of every op that there is, of each backend."""
    ops = torch.ops.fastfusion
    for name, layout in LAYOUTS.items():
        for prefix in ("", "triton_"):
            for suffix in ("", "_forward", "_out", "_cached", "_backward"):
                packet = getattr(ops, prefix + name + suffix, None)
                if packet is None:
                    continue
                for overload in packet.overloads():
                    op = getattr(packet, overload)
                    register_sharding(op)(_rule(name, layout, packet.default))
                    _ask_again_for_other_options(op)


def _ask_again_for_other_options(op: Any) -> None:
    """Let what is kept of a rule's answers depend on all numbers and flags: torch takes integers
    alone into account, and would shard the queries of a causal call as those of the last one."""
    first = next((i for i, a in enumerate(op._schema.arguments) if "Tensor" not in str(a.type)), 0)
    infos = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    infos[op] = RuntimeSchemaInfo(first, needs_pytree=True)


def _rule(name: str, layout: Layout, op: Any) -> Any:
    defaults = {argument.name: argument.default_value for argument in op._schema.arguments}
    names = list(defaults)
    returns = len(op._schema.returns)
    backward = op._schema.name.endswith("_backward")

    def rule(*given: Any) -> list[tuple[list[Any], list[Any]]]:
        call = {**defaults, **dict(zip(names, given, strict=False))}
        found = []
        for letter in ("", *_letters(name, layout, call)):
            inputs = {a: _input(layout, a, call[a], letter) for a in names}
            if backward:
                first = names[len(layout.outputs) + 1 :][: layout.gradients]
                outputs = [_gradient(inputs[argument], letter) for argument in first]
                if not call["mask_gradient"]:
                    outputs[-1] = Replicate()  # a tensor without numbers
                for last in layout.last:
                    absent = call[last] is None
                    outputs.append(Replicate() if absent else _gradient(inputs[last], letter))
            else:
                outputs = [_place(dims, letter) for dims in layout.outputs[:returns]]
            found.append((outputs, list(inputs.values())[: len(given)]))
        return found

    return rule


def _letters(name: str, layout: Layout, call: Mapping[str, Any]) -> Iterator[str]:
    """Along which this call may be sharded."""
    if call.get("dropout_p", 0.0) > 0.0:
        return  # its random numbers count batch entries and heads of the whole
    if "seed" in call and any(call[n] for n in call.keys() - _UNDERSTOOD - layout.inputs.keys()):
        return  # an argument of attention that these rules know nothing of
    for letter in layout.shards:
        tensors = {name: spec for name, spec in call.items() if hasattr(spec, "shape")}
        dims = {name: _dim(layout.inputs.get(name, ""), letter, tensors[name]) for name in tensors}
        # Not as a set: sizes of a traced call may be symbols, which have no hash.
        sizes = [tensors[name].shape[dim] for name, dim in dims.items() if dim is not None]
        sizes = [size for size in sizes if size != 1]
        alike = bool(sizes) and all(size == sizes[0] for size in sizes)
        if letter == _ROWS.get(name) and _asks_for_places(call):
            continue  # a query would no longer know its own
        if alike or (letter == "h" and _groups_stay_whole(call)):
            yield letter


def _asks_for_places(call: Mapping[str, Any]) -> bool:
    """Whether a score depends on where its query is."""
    names = ("window_left", "window_right", "alibi_slopes", "position_table")
    given = (call.get(name) for name in names)
    return bool(call.get("is_causal", False)) or any(value is not None for value in given)


def _groups_stay_whole(call: Mapping[str, Any]) -> bool:
    """Whether queries and the keys that their heads share come to lie on the same rank."""
    key = call["key"]
    heads: int = key.shape[-3] if len(key.shape) == 4 else key.shape[-2]
    return heads % key.mesh.size() == 0


def _place(dims: str, letter: str) -> Placement:
    return Shard(dims.index(letter)) if letter and letter in dims else Replicate()


def _input(layout: Layout, argument: str, spec: Any, letter: str) -> Placement | None:
    if not hasattr(spec, "shape"):
        return None  # a number, or no tensor
    if argument.startswith("grad_"):
        dims = layout.outputs[int(argument.removeprefix("grad_"))]
    else:
        dims = layout.inputs.get(argument, "")
    dim = _dim(dims, letter, spec)
    # Masks have size 1 where all share them.
    return Replicate() if dim is None or spec.shape[dim] <= 1 else Shard(dim)


def _dim(dims: str, letter: str, spec: Any) -> int | None:
    """The dimension of a tensor that has the letter; masks may have the last of their letters
    alone."""
    dim = dims.index(letter) - len(dims) + len(spec.shape) if letter and letter in dims else -1
    return dim if dim >= 0 else None


def _gradient(place: Placement | None, letter: str) -> Placement:
    """Of an input: where it is, or a sum over the ranks that have all of it."""
    if isinstance(place, Shard):
        return place
    return Partial() if letter else Replicate()
