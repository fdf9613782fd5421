"""What is not legal is refused before any work, with the argument's name and the shapes.

One table for all ops, with a row for each reason. Every row goes all ways on which arguments are
looked at: a plain call, one with gradients, one with dropout, each backend asked for by name, and
`explain`. A bad call is a bad call also where the backend asked for does not have the op.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fastfusion as ff
from fastfusion import ops
from fastfusion.ops import bidirectional_attention, scaled_dot_product_attention, varlen_attention

SDPA, BIDIRECTIONAL, VARLEN = "scaled_dot_product_attention", "bidirectional_attention", "varlen"
FUNCTIONS: dict[str, Callable[..., Any]] = {
    SDPA: ff.scaled_dot_product_attention,
    BIDIRECTIONAL: ff.bidirectional_attention,
    VARLEN: ff.varlen_attention,
}


def legal(op: str) -> dict[str, Any]:
    """A legal call whose sizes all differ: query (2, 4, 5, 8), key (2, 4, 6, 8)."""
    sizes = {"batch": 2, "heads": 4, "q_len": 5, "kv_len": 6, "head_dim": 8, "value_dim": 3}
    if op == SDPA:
        return scaled_dot_product_attention.inputs(sizes, torch.float32)
    if op == BIDIRECTIONAL:
        return bidirectional_attention.inputs({**sizes, "query_value_dim": 7}, torch.float32)
    lengths = {"q_lens": [5, 2, 3], "kv_lens": [6, 1, 4]}
    return varlen_attention.inputs({**sizes, **lengths}, torch.float32)


@dataclass(frozen=True)
class Bad:
    """One illegal call: what is changed in a legal one, and what the error must say."""

    op: str
    name: str
    changes: dict[str, Any]  # a value, or a function of the legal call
    error: type[Exception]
    says: tuple[str, ...]  # the argument's name first

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def call(self) -> dict[str, Any]:
        call = legal(self.op)
        made = {k: v(call) if callable(v) else v for k, v in self.changes.items()}
        return {**call, **made}


def edited(name: str, edit: Callable[[Tensor], Any]) -> dict[str, Any]:
    return {name: lambda call: edit(call[name])}


def all_edited(edit: Callable[[Tensor], Any]) -> dict[str, Any]:
    """The same change in each of query, key and value."""
    return {name: lambda call, name=name: edit(call[name]) for name in ("query", "key", "value")}


def nested(layout: torch.layout) -> Callable[[Tensor], Tensor]:
    def edit(tensor: Tensor) -> Tensor:
        parts = [torch.randn(3, 4, 8), torch.randn(2, 4, 8)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the prototype warning of the strided layout
            return torch.nested.nested_tensor(parts, layout=layout)

    return edit


def bools(*sizes: int, **more: Any) -> Tensor:
    return torch.zeros(sizes, dtype=torch.bool, **more)


def tensors_rows(op: str) -> list[Bad]:
    """Faults of query, key, value (and query_value) that do not depend on the rank."""
    names = ["query", "key", "value", *(["query_value"] if op == BIDIRECTIONAL else [])]
    rows = [
        Bad(op, "query_none", {"query": None}, TypeError, ("query", "NoneType")),
        Bad(op, "query_nested", edited("query", nested(torch.strided)), TypeError,
            ("query", "nested")),
        Bad(op, "query_sparse_csr", edited("query", lambda t: torch.eye(5).to_sparse_csr()),
            TypeError, ("query", "sparse_csr")),
        Bad(op, "query_device", edited("query", lambda t: t.to("meta")), ValueError,
            ("key", "meta", "cpu")),
        Bad(op, "key_integer", edited("key", lambda t: t.int()), TypeError,
            ("key", "torch.int32")),
        Bad(op, "all_integer", all_edited(lambda t: t.int()), TypeError,
            ("query", "torch.int32")),
    ]  # fmt: skip
    for name in names:
        rows += [
            Bad(op, f"{name}_list", {name: [1.0, 2.0]}, TypeError, (name, "list")),
            Bad(op, f"{name}_jagged", edited(name, nested(torch.jagged)), TypeError,
                (name, "nested")),
            Bad(op, f"{name}_sparse", edited(name, lambda t: t.to_sparse()), TypeError,
                (name, "sparse_coo")),
        ]  # fmt: skip
    for name in names[1:]:
        rows += [
            Bad(op, f"{name}_dtype", edited(name, lambda t: t.bfloat16()), TypeError,
                (name, "torch.bfloat16", "torch.float32")),
            Bad(op, f"{name}_device", edited(name, lambda t: t.to("meta")), ValueError,
                (name, "meta", "cpu")),
        ]  # fmt: skip
    return rows


def number_rows(op: str) -> list[Bad]:
    """Faults of the arguments that are not tensors, and that all ops share."""
    values = {"scale": (float("nan"), float("inf")), "dropout_p": (1.5, -0.1, float("nan"))}
    rows = [
        Bad(op, f"{name}_{value}", {name: value}, ValueError, (name, str(value)))
        for name in values
        for value in values[name]
    ]
    rows += [
        Bad(op, f"causal_alignment_{value}", {"causal_alignment": value}, ValueError,
            ("causal_alignment", "top_left", "bottom_right", repr(value)))
        for value in ("center", None, [])
    ]  # fmt: skip
    flags = ["is_causal", "return_lse", *(["enable_gqa"] if op == SDPA else [])]
    wrong_types = {
        "scale": ("0.1", True, torch.tensor([0.1])),
        "dropout_p": ("0.1", True, torch.tensor(0.1)),
        # What torch's dispatcher would take for a bool.
        **dict.fromkeys(flags, (1, None, torch.tensor(True))),
    }
    for name, given in wrong_types.items():
        for value in given:
            kind = type(value).__name__
            rows.append(Bad(op, f"{name}_{kind}", {name: value}, TypeError, (name, kind)))
    rows += kind_rows(op) + prefix_rows(op) + ([] if op == VARLEN else segment_rows(op))
    rows += [] if op == BIDIRECTIONAL else sink_rows(op)
    return rows + (position_rows(op) if op == SDPA else [])


def kind_rows(op: str) -> list[Bad]:
    """Faults of windows, soft caps and slopes, of three sequences or two entries and 4 heads."""
    batch = 3 if op == VARLEN else 2
    slopes = torch.rand(batch, 4)
    rows = [
        Bad(op, f"window_{value}", {"window": value}, TypeError, ("window", "pair", repr(value)))
        for value in (3, (1,), (1, 2, 3), "ab ")
    ]
    rows += [
        Bad(
            op, f"window_{value}", {"window": value}, TypeError, ("window", type(value[0]).__name__)
        )
        for value in ((1.5, 0), (True, 0), ("1", 0))
    ]
    rows += [
        Bad(op, f"softcap_{value}", {"softcap": value}, TypeError, ("softcap", kind))
        for value, kind in (("1", "str"), (True, "bool"))
    ]
    rows += [
        Bad(op, f"softcap_{value}", {"softcap": value}, ValueError, ("softcap", str(value)))
        for value in (0.0, -1.0, float("inf"), float("nan"), 1e-40)
    ]
    return rows + [
        Bad(op, "window_negative", {"window": (-1, 0)}, ValueError, ("window", "(-1, 0)")),
        Bad(op, "slopes_list", {"alibi_slopes": [0.1] * 4}, TypeError, ("alibi_slopes", "list")),
        Bad(op, "slopes_dtype", {"alibi_slopes": slopes.long()}, TypeError,
            ("alibi_slopes", "torch.int64")),
        Bad(op, "slopes_device", {"alibi_slopes": slopes.to("meta")}, ValueError,
            ("alibi_slopes", "meta", "cpu")),
        Bad(op, "slopes_heads", {"alibi_slopes": slopes[:, :3]}, ValueError,
            ("alibi_slopes", f"({batch}, 4)", f"({batch}, 3)")),
        Bad(op, "slopes_batch", {"alibi_slopes": torch.rand(batch + 1, 4)}, ValueError,
            ("alibi_slopes", f"({batch}, 4)", f"({batch + 1}, 4)")),
    ]  # fmt: skip


def segment_rows(op: str) -> list[Bad]:
    """Faults of segments, of two entries and lengths 5 and 6."""
    q_ids, k_ids = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    both = {"segment_ids_q": q_ids, "segment_ids_k": k_ids}
    return [
        Bad(op, "segments_alone", {"segment_ids_k": k_ids}, ValueError,
            ("segment_ids_k comes with segment_ids_q",)),
        Bad(op, "segments_list", both | {"segment_ids_k": [0] * 6}, TypeError,
            ("segment_ids_k", "list")),
        Bad(op, "segments_floats", both | {"segment_ids_q": q_ids.float()}, TypeError,
            ("segment_ids_q", "integers", "float32")),
        Bad(op, "segments_length", both | {"segment_ids_k": q_ids}, ValueError,
            ("segment_ids_k", "(2, 6)", "(2, 5)")),
    ]  # fmt: skip


def prefix_rows(op: str) -> list[Bad]:
    """Faults of prefixes, of two entries or three packed sequences."""
    batch = 3 if op == VARLEN else 2
    prefix = torch.arange(batch)
    return [
        Bad(op, "prefix_bools", {"prefix_len": prefix > 1}, TypeError, ("prefix_len", "bool")),
        Bad(op, "prefix_int", {"prefix_len": 3}, TypeError, ("prefix_len", "int")),
        Bad(op, "prefix_batch", {"prefix_len": torch.arange(batch + 2)}, ValueError,
            ("prefix_len", f"({batch},)", f"({batch + 2},)")),
        Bad(op, "prefix_device", {"prefix_len": prefix.to("meta")}, ValueError,
            ("prefix_len", "meta", "cpu")),
    ]  # fmt: skip


def sink_rows(op: str) -> list[Bad]:
    """Faults of sinks, of 4 heads."""
    return [
        Bad(op, "sinks_number", {"sinks": 0.5}, TypeError, ("sinks", "float")),
        Bad(op, "sinks_dtype", {"sinks": torch.zeros(4).double()}, TypeError, ("sinks", "float64")),
        Bad(op, "sinks_heads", {"sinks": torch.zeros(3)}, ValueError, ("sinks", "(4,)", "(3,)")),
    ]


def position_rows(op: str) -> list[Bad]:
    """Faults of position tables, of 4 heads, 5 queries and 6 keys."""
    table, index = torch.zeros(4, 3), torch.zeros(5, 6).long()
    both = {"position_table": table, "position_index": index}
    return [
        Bad(op, "table_alone", {"position_table": table}, ValueError,
            ("position_table comes with position_index",)),
        Bad(op, "index_alone", {"position_index": index}, ValueError,
            ("position_index comes with position_table",)),
        Bad(op, "table_number", both | {"position_table": 0.5}, TypeError,
            ("position_table", "float")),
        Bad(op, "table_dtype", both | {"position_table": table.double()}, TypeError,
            ("position_table", "float64")),
        Bad(op, "table_heads", both | {"position_table": table[:3]}, ValueError,
            ("position_table", "(4, 3)", "(3, 3)")),
        Bad(op, "table_rank", both | {"position_table": table[0]}, ValueError,
            ("position_table", "(3,)")),
        Bad(op, "index_number", both | {"position_index": 1}, TypeError, ("position_index", "int")),
        Bad(op, "index_dtype", both | {"position_index": index.float()}, TypeError,
            ("position_index", "float32")),
        Bad(op, "index_shape", both | {"position_index": index.T}, ValueError,
            ("position_index", "(5, 6)", "(6, 5)")),
        Bad(op, "index_offsets", both | {"position_index": index.flatten()[:11]}, ValueError,
            ("position_index", "(5, 6)", "(11,)")),
        Bad(op, "index_large", both | {"position_index": index + 3}, ValueError,
            ("position_index must be from 0 to 2", "3 to 3")),
        Bad(op, "index_negative", both | {"position_index": index - 1}, ValueError,
            ("position_index must be from 0 to 2", "-1 to -1")),
    ]  # fmt: skip


def mask_rows(op: str) -> list[Bad]:
    """Faults of attn_mask and of the padding masks, for batch 2, heads 4, lengths 5 and 6 (packed:
    three sequences)."""
    batch = 3 if op == VARLEN else 2
    sizes = {SDPA: {"key_padding_mask": 6}, VARLEN: {},
             BIDIRECTIONAL: {"key_padding_mask": 6, "query_padding_mask": 5}}[op]  # fmt: skip
    target = f"({batch}, 4, 5, 6)"
    rows = [
        Bad(op, f"attn_mask_{'x'.join(map(str, size))}", {"attn_mask": torch.zeros(size)},
            ValueError, ("attn_mask", str(size), target))
        for size in ((5, 7), (4, 6), (0,), (3, 5, 6), (4, 4, 5, 6), (1, 1, 1, 5, 6))
    ]  # fmt: skip
    rows += [
        Bad(op, "attn_mask_bool_shape", {"attn_mask": bools(6, 6)}, ValueError,
            ("attn_mask", "(6, 6)", target)),
        Bad(op, "attn_mask_device", {"attn_mask": torch.zeros(5, 6, device="meta")}, ValueError,
            ("attn_mask", "meta", "cpu")),
        Bad(op, "attn_mask_nested", {"attn_mask": nested(torch.strided)}, TypeError,
            ("attn_mask", "nested")),
    ]  # fmt: skip
    for dtype in (torch.uint8, torch.float64, torch.float16):
        mask = torch.zeros(5, 6, dtype=dtype)
        rows.append(
            Bad(op, f"attn_mask_{dtype}", {"attn_mask": mask}, TypeError, ("attn_mask", str(dtype)))
        )
    for name, length in sizes.items():
        rows += [
            Bad(op, f"{name}_{'x'.join(map(str, size))}", {name: bools(*size)}, ValueError,
                (name, str(size), f"(2, {length})"))
            for size in ((2, length + 1), (3, length), (2, 1, 1, length))
        ]  # fmt: skip
        rows += [
            Bad(op, f"{name}_{dtype}", {name: torch.zeros(2, length, dtype=dtype)}, TypeError,
                (name, str(dtype)))
            for dtype in (torch.float32, torch.uint8)
        ]  # fmt: skip
        rows.append(
            Bad(op, f"{name}_device", {name: bools(2, length, device="meta")}, ValueError,
                (name, "meta", "cpu"))
        )  # fmt: skip
    for name, dense in (("attn_mask", bools(5, 6)), *((n, bools(2, s)) for n, s in sizes.items())):
        rows += [
            Bad(op, f"{name}_list", {name: dense.tolist()}, TypeError, (name, "list")),
            Bad(op, f"{name}_sparse", {name: dense.to_sparse()}, TypeError, (name, "sparse_coo")),
        ]
    return rows


def shape_rows() -> list[Bad]:
    """Ranks and sizes that do not fit; the message prints the offending shapes."""

    def bad(op: str, name: str, changes: dict[str, Any], *says: str) -> Bad:
        return Bad(op, name, changes, ValueError, says)

    both = [
        row
        for op in (SDPA, BIDIRECTIONAL)
        for row in (
            bad(op, "key_head_dim", edited("key", lambda t: t[..., :7]), "key", "(2, 4, 6, 7)"),
            bad(op, "value_kv_len", edited("value", lambda t: t[:, :, 1:]), "value",
                "(2, 4, 5, 3)", "(2, 4, 6, 8)"),
            bad(op, "key_heads", {n: lambda call, n=n: call[n][:, :3] for n in ("key", "value")},
                "key", "(2, 3, 6, 8)", "(2, 4, 5, 8)"),
            bad(op, "value_heads", edited("value", lambda t: t[:, :3]), "value", "(2, 3, 6, 3)"),
            bad(op, "key_batch", {
                n: lambda call, n=n: call[n].repeat(2, 1, 1, 1)[:3] for n in ("key", "value")},
                "key", "(3, 4, 6, 8)", "(2, 4, 5, 8)"),
            bad(op, "key_rank", edited("key", lambda t: t[0]), "key", "(4, 6, 8)", "(2, 4, 5, 8)"),
            bad(op, "query_rank", edited("query", lambda t: t[0]), "query", "(4, 5, 8)"),
            bad(op, "value_rank", edited("value", lambda t: t[None]), "value", "(1, 2, 4, 6, 3)"),
            bad(op, "one_dimension", all_edited(lambda t: t[0, 0, 0]), "query", "(8,)"),
            bad(op, "no_dimension", all_edited(lambda t: t[0, 0, 0, 0]), "query", "()"),
            bad(op, "head_dim_0", {
                n: lambda call, n=n: call[n][..., :0] for n in ("query", "key")},
                "scale", "head_dim"),
            bad(op, "no_heads_in_key", {
                n: lambda call, n=n: call[n][:, :0] for n in ("key", "value")},
                "key", "(2, 0, 6, 8)"),
        )
    ]  # fmt: skip
    grouped = {n: lambda call, n=n: call[n][:, :3] for n in ("key", "value")}
    swapped = {"query": lambda call: call["query"][:, :2], "enable_gqa": True}
    return [
        *both,
        bad(SDPA, "grouped_heads", {**grouped, "enable_gqa": True}, "key", "(2, 3, 6, 8)",
            "(2, 4, 5, 8)"),
        bad(SDPA, "more_key_heads", swapped, "key", "(2, 2, 5, 8)", "(2, 4, 6, 8)"),
        bad(SDPA, "grouped_value", {
            "value": lambda call: call["value"][:, :2], "enable_gqa": True},
            "value", "(2, 2, 6, 3)"),
        bad(BIDIRECTIONAL, "query_value_q_len", edited("query_value", lambda t: t[:, :, 1:]),
            "query_value", "(2, 4, 4, 7)", "(2, 4, 5, 8)"),
        bad(BIDIRECTIONAL, "query_value_heads", edited("query_value", lambda t: t[:, :1]),
            "query_value", "(2, 1, 5, 7)"),
        bad(BIDIRECTIONAL, "query_value_batch", edited("query_value", lambda t: t[:1]),
            "query_value", "(1, 4, 5, 7)"),
        bad(BIDIRECTIONAL, "query_value_rank", edited("query_value", lambda t: t[0]),
            "query_value", "(4, 5, 7)"),
        bad(VARLEN, "query_rank", edited("query", lambda t: t[None]), "query", "(1, 10, 4, 8)"),
        bad(VARLEN, "key_rank", edited("key", lambda t: t[0]), "key", "(4, 8)"),
        bad(VARLEN, "all_ranks", all_edited(lambda t: t[None]), "query", "(1, 10, 4, 8)"),
        bad(VARLEN, "key_head_dim", edited("key", lambda t: t[..., :7]), "key", "(11, 4, 7)"),
        bad(VARLEN, "head_dim_0", {n: lambda call, n=n: call[n][..., :0] for n in ("query", "key")},
            "scale", "head_dim"),
        bad(VARLEN, "value_total", edited("value", lambda t: t[1:]), "value", "(10, 4, 3)"),
        bad(VARLEN, "value_heads", edited("value", lambda t: t[:, 1:]), "value", "(11, 3, 3)"),
        bad(VARLEN, "heads", {n: lambda call, n=n: call[n][:, :3] for n in ("key", "value")},
            "key", "(11, 3, 8)", "(10, 4, 8)"),
        bad(VARLEN, "no_heads_in_key", {
            n: lambda call, n=n: call[n][:, :0] for n in ("key", "value")}, "key", "(11, 0, 8)"),
    ]  # fmt: skip


def offset_rows() -> list[Bad]:
    """Faults of the packing: query has rows 0-5-7-10, key 0-6-7-11."""
    rows = []
    for side, good in (("q", [0, 5, 7, 10]), ("k", [0, 6, 7, 11])):
        name, longest, total = f"cu_seqlens_{side}", f"max_seqlen_{side}", good[-1]
        values = {
            "not_from_0": [1, *good[1:]],
            "from_below_0": [-1, *good[1:]],
            "falling": [0, 7, 5, total],
            "past_the_end": [*good[:3], total + 1],
            "past_the_end_inside": [0, total + 5, 7, total],
        }
        rows += [
            Bad(VARLEN, f"{name}_{fault}", {name: torch.tensor(offsets)}, ValueError,
                (name, str(total), str(offsets)))
            for fault, offsets in values.items()
        ]  # fmt: skip
        rows += [
            Bad(VARLEN, f"{name}_{dtype}", {name: torch.tensor(good).to(dtype)}, TypeError,
                (name, str(dtype)))
            for dtype in (torch.float32, torch.int16)
        ]  # fmt: skip
        rows += [
            Bad(VARLEN, f"{name}_list", {name: good}, TypeError, (name, "list")),
            Bad(VARLEN, f"{name}_2d", {name: torch.tensor([good])}, ValueError, (name, "(1, 4)")),
            Bad(VARLEN, f"{name}_0d", {name: torch.tensor(0)}, ValueError, (name, "()")),
            Bad(VARLEN, f"{name}_empty", {name: torch.tensor([], dtype=torch.int32)}, ValueError,
                (name, "(0,)")),
            Bad(VARLEN, f"{name}_longer", {name: torch.tensor([*good, total])}, ValueError,
                (name, "(5,)", "(4,)")),
            Bad(VARLEN, f"{name}_device", {name: torch.tensor(good, device="meta")}, ValueError,
                (name, "meta", "cpu")),
            Bad(VARLEN, f"{name}_sparse", {name: torch.tensor(good).to_sparse()}, TypeError,
                (name, "sparse_coo")),
            Bad(VARLEN, f"{longest}_small", {longest: good[1] - 1}, ValueError,
                (longest, str(good[1]), str(good[1] - 1))),
            Bad(VARLEN, f"{longest}_negative", {longest: -1}, ValueError, (longest, "-1")),
            Bad(VARLEN, f"{longest}_float", {longest: 9.0}, TypeError, (longest, "float")),
            Bad(VARLEN, f"{longest}_bool", {longest: True}, TypeError, (longest, "bool")),
            Bad(VARLEN, f"{longest}_tensor", {longest: torch.tensor([9])}, TypeError,
                (longest, "Tensor")),
        ]  # fmt: skip
    return rows


ROWS = [
    *(row for op in FUNCTIONS for row in tensors_rows(op)),
    *(row for op in FUNCTIONS for row in number_rows(op)),
    *(row for op in FUNCTIONS for row in mask_rows(op)),
    *shape_rows(),
    *offset_rows(),
]


def refuse(row: Bad, run: Callable[..., Any], call: dict[str, Any]) -> None:
    """The right error with the right words, and no random number drawn before it."""
    state = torch.get_rng_state()
    with pytest.raises(row.error) as caught:
        run(**call)
    message = str(caught.value)
    assert type(caught.value) is row.error, repr(caught.value)
    for word in row.says:
        assert word in message, f"{word!r} is not in {message!r}"
    assert torch.equal(torch.get_rng_state(), state)


def with_gradients(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if floating else value


BACKENDS = sorted({i.backend for op in ops.ALL for i in op.implementations})
WAYS: dict[str, Callable[..., Any]] = {
    "plain": lambda function, **call: function(**call),
    "gradients": lambda function, **call: function(
        **{name: with_gradients(value) for name, value in call.items()}
    ),
    "dropout": lambda function, **call: function(**{"dropout_p": 0.5, **call}),
    "explain": ff.explain,
    **{
        name: lambda function, name=name, **call: function(**call, backend=name)
        for name in BACKENDS
    },
}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_refused(row: Bad) -> None:
    for way, run in WAYS.items():
        try:
            refuse(row, lambda run=run, **call: run(FUNCTIONS[row.op], **call), row.call())
        except BaseException as error:
            error.add_note(f"way: {way}")
            raise


@pytest.mark.parametrize("op", FUNCTIONS)
def test_the_legal_call_is_legal(op: str) -> None:
    """Otherwise every row above could fail for a fault that it does not name."""
    result = FUNCTIONS[op](**legal(op))
    assert all(t.isfinite().all() for t in (result if isinstance(result, tuple) else (result,)))


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("backend", ["gpu", "CPU", "", 3, True, [], ("cpu",)])
def test_unknown_backend(op: str, backend: Any) -> None:
    names = ("cuda", "triton", "cpu", "reference")
    row = Bad(op, "backend", {"backend": backend}, ValueError, ("backend", repr(backend), *names))
    refuse(row, FUNCTIONS[op], row.call())
    refuse(row, lambda **kw: ff.explain(FUNCTIONS[op], **kw), row.call())

    def block(**kw: Any) -> None:
        with ff.use_backend(backend):
            pass

    refuse(row, block, {})
    FUNCTIONS[op](**legal(op))  # the setting was not left behind


@pytest.mark.parametrize(
    "op", [print, None, "varlen_attention", [], torch.nn.functional.scaled_dot_product_attention]
)
def test_explain_of_something_else(op: Any) -> None:
    row = Bad("explain", "op", {}, TypeError, ("op must be", *(o.name for o in ops.ALL)))
    refuse(row, lambda **kw: ff.explain(op, **kw), legal(SDPA))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_arguments_missing_and_unknown(op: str) -> None:
    for run in (FUNCTIONS[op], lambda **kw: ff.explain(FUNCTIONS[op], **kw)):
        call = legal(op)
        del call["key"]
        refuse(Bad(op, "missing", {}, TypeError, ("'key'",)), run, call)
        call = {**legal(op), "temperature": 1.0}
        refuse(Bad(op, "unknown", {}, TypeError, ("'temperature'",)), run, call)
