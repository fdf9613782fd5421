"""The shared suite on varlen_attention, and what is peculiar to packed sequences."""

import itertools
from typing import Any

import pytest
import torch
from suite import DEVICE, AttentionSuite, Case, Target, outside, plain_lse, shaped
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fastfusion as ff
from fastfusion.ops import varlen_attention as spec


def sequences(call: dict[str, Any]) -> list[tuple[slice, slice]]:
    """Rows of the queries and of the keys of each sequence."""
    sides = [
        [slice(a, b) for a, b in itertools.pairwise(call[name].tolist())]
        for name in ("cu_seqlens_q", "cu_seqlens_k")
    ]
    return list(zip(*sides, strict=True))


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: Any = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    prefix_len: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """A loop over the sequences as a user writes it, in the dtype of the inputs."""
    heads = query.shape[1]
    if key.shape[1] != heads:
        key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    pairs = sequences({"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k})
    if dropout_p > 0.0:
        seed = ff.core.philox.draw_seed(query.device)
        sizes = (len(pairs), heads, max_seqlen_q, max_seqlen_k)
        keep = ff.core.philox.keep_mask(seed, dropout_p, *sizes, stream=0)
    # Empty slices of the inputs, so that a pack of nothing has gradients too.
    outs = [query[:0, :, :1].expand(-1, -1, value.shape[-1])]
    statistics = [query[:0, :, 0].to(torch.promote_types(query.dtype, torch.float32))]
    for index, (rows, columns) in enumerate(pairs):
        q, k, v = (t.transpose(0, 1) for t in (query[rows], key[columns], value[columns]))
        scores = (q @ k.transpose(-1, -2)) * scale
        slopes = alibi_slopes
        if slopes is not None:
            slopes = slopes.expand(len(pairs), heads)[index]
        scores = shaped(scores, softcap, slopes, causal_alignment)
        if attn_mask is not None:
            whole = attn_mask.expand(len(pairs), heads, max_seqlen_q, max_seqlen_k)
            part = whole[index, :, : scores.shape[1], : scores.shape[2]]
            if part.dtype == torch.bool:
                scores = scores.masked_fill(~part, -torch.inf)
            else:
                scores = scores.to(torch.promote_types(scores.dtype, part.dtype)) + part
        own = None if prefix_len is None else prefix_len.expand(len(pairs))[index]
        hidden = outside(scores, is_causal, window, causal_alignment, prefix_len=own)
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            column = sinks.to(scores.dtype).expand(heads)[:, None, None]
            scores = torch.cat((scores, column.expand(-1, scores.shape[1], -1)), -1)
        dead = (scores == -torch.inf).all(-1, keepdim=True)
        scores = scores.masked_fill(dead, 0.0)
        weights = torch.softmax(scores, -1).masked_fill(dead, 0.0)[..., : v.shape[1]]
        if dropout_p > 0.0:
            kept = keep[index, :, : weights.shape[1], : weights.shape[2]]
            weights = weights * kept * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
        outs.append((weights.to(v.dtype) @ v).transpose(0, 1))
        lse = plain_lse(scores.to(statistics[0].dtype), -1).masked_fill(dead[..., 0], -torch.inf)
        statistics.append(lse.transpose(0, 1))
    # Rows behind the last sequence.
    end = int(cu_seqlens_q[-1])
    behind = query[end:].nan_to_num() * 0.0
    outs.append(behind[..., :1].expand(-1, -1, value.shape[-1]))
    statistics.append(behind[..., 0].to(statistics[0].dtype) - torch.inf)
    return torch.cat(outs), torch.cat(statistics)


def shape(q_lens: list[int], kv_lens: list[int], dim: int = 16, **more: Any) -> dict[str, Any]:
    return {"heads": 2, "q_lens": q_lens, "kv_lens": kv_lens, "head_dim": dim, **more}


MIXED = ([20, 3, 37], [36, 50, 4])


def one_sign(call: dict[str, Any]) -> None:
    call["value"] = call["value"].abs()


def wide_offsets(call: dict[str, Any]) -> None:
    call["cu_seqlens_q"] = call["cu_seqlens_q"].long()


def generous(call: dict[str, Any]) -> None:
    call["max_seqlen_q"] += 13
    call["max_seqlen_k"] += 70


def masked(sizes: tuple[int, ...], kind: str = "bias") -> Any:
    def edit(call: dict[str, Any]) -> None:
        mask = torch.randn(sizes)
        call["attn_mask"] = mask > -0.5 if kind == "bool" else mask.to(call["query"].dtype)

    return edit


def slopes(call: dict[str, Any]) -> None:
    call["alibi_slopes"] = 0.3 * torch.rand(3, call["query"].shape[1])


def prefix(call: dict[str, Any]) -> None:
    """One that ends within the keys, none, and one of more than there are."""
    call["prefix_len"] = torch.tensor([9, 0, 70])


def sinks(call: dict[str, Any]) -> None:
    """Of which one outweighs ordinary rows, and another one has no weight."""
    call["sinks"] = torch.randn(call["query"].shape[1])
    call["sinks"][0], call["sinks"][-1] = 6.0, -torch.inf


def both(*edits: Any) -> Any:
    def edit(call: dict[str, Any]) -> None:
        for each in edits:
            each(call)

    return edit


def rows_behind(call: dict[str, Any]) -> None:
    """Buffers of a fixed size, with NaN behind the last sequence."""
    for name in ("query", "key", "value"):
        rows = call[name]
        call[name] = torch.cat((rows, rows.new_full((9, *rows.shape[1:]), torch.nan)))


LAST = {"is_causal": True, "causal_alignment": "bottom_right"}
LONGEST = (37, 50)
CASES = [
    Case("bottom_right", "each sequence has a diagonal of its own", shape(*MIXED), LAST),
    Case("bottom_right_one_query_each", "decoding", shape([1, 1, 2], [300, 1, 77], heads=3), LAST),
    Case("bias", "a mask per score", shape(*MIXED), edit=masked((3, 2, *LONGEST))),
    Case("bias_shared", "a gradient summed over sequences", shape(*MIXED),
         edit=masked((1, 2, *LONGEST))),
    Case("bias_of_keys", "a gradient summed over all but keys", shape(*MIXED),
         edit=masked((1, LONGEST[1]))),
    Case("bias_few", "one query at a time", shape([1, 2, 1], [40, 3, 17], heads=8),
         edit=masked((3, 1, 2, 40))),
    Case("bool_mask", "hidden scores", shape(*MIXED, heads=4, kv_heads=2), LAST,
         edit=masked((3, 1, *LONGEST), "bool")),
    Case("rows_behind", "buffers longer than all sequences", shape(*MIXED), edit=rows_behind),
    Case("small", "an ordinary call", shape(*MIXED)),
    Case("one_sequence", "a pack of one", shape([20], [36])),
    Case("one_by_one", "shortest lengths", shape([1, 1, 1], [1, 1, 1])),
    Case("one_query_each", "decoding", shape([1, 1, 1], [300, 1, 77], heads=3)),
    Case("past_a_panel", "tails of panels and key blocks", shape([49, 1, 17], [257, 600, 33])),
    Case("many", "more sequences than threads", shape(list(range(1, 41)), list(range(40, 0, -1)))),
    *(Case(f"dim_{d}", "tails of registers", shape([13, 5], [19, 6], d))
      for d in (1, 6, 14, 40, 77, 97)),
    Case("dim_160", "wide heads", shape([9, 4], [33, 8], 160)),
    Case("dim_256_short", "one chain along the head dim, which a few rows show", shape(
        [4], [30], 256, heads=1)),
    Case("value_dim", "value dim above key dim", shape([11, 6], [23, 9], 8, value_dim=33)),
    Case("value_dim_less", "value dim below key dim", shape([11, 6], [23, 9], 33, value_dim=5)),
    Case("grouped", "grouped-query heads", shape(*MIXED, heads=6, kv_heads=2)),
    Case("one_kv_head", "multi-query heads", shape(*MIXED, heads=4, kv_heads=1)),
    Case("causal", "the diagonal of each sequence", shape([50, 7, 33], [50, 7, 33], causal=True)),
    Case("causal_unequal", "top-left alignment", shape([60, 10, 5], [13, 200, 5], causal=True)),
    Case("causal_grouped", "both", shape(*MIXED, heads=4, kv_heads=2, causal=True)),
    Case("empty_both", "a sequence without rows", shape([5, 0, 7], [6, 0, 9])),
    Case("empty_queries", "keys that nobody asks", shape([5, 0, 7], [6, 11, 9])),
    Case("empty_keys", "rows without a key: 0 and -inf", shape([5, 8, 7], [6, 0, 9])),
    Case("empty_at_the_ends", "the first and the last without rows", shape([0, 9, 0], [0, 5, 0])),
    Case("wide_offsets", "int64 beside int32 offsets", shape(*MIXED), edit=wide_offsets),
    Case("generous", "max_seqlen is a bound, not a length", shape(*MIXED), edit=generous),
    Case("negative_scale", "any finite scale", shape(*MIXED), {"scale": -0.7}),
    Case("zero_scale", "means of the values", shape(*MIXED, 64), {"scale": 0.0}),
    Case("dropout", "the shared random bits", shape(*MIXED), {"dropout_p": 0.3}),
    Case("dropout_generous", "bits do not depend on max_seqlen", shape(*MIXED),
         {"dropout_p": 0.3}, generous),
    Case("dropout_all", "p = 1 drops everything", shape([5, 3], [9, 2]), {"dropout_p": 1.0}),
    Case("one_sign", "long sums of one sign", shape([3, 2], [4500, 4100]), edit=one_sign,
         in_triton={"kv_lens": [1500, 1100]}),
    Case("window", "each sequence has a window of its own", shape([50, 7, 330], [50, 70, 330]),
         {"window": (20, 3)}, in_triton={"q_lens": [50, 7, 130], "kv_lens": [50, 70, 130]}),
    Case("window_bottom_right", "decoding with a window", shape([1, 2, 40], [300, 77, 60], heads=3),
         LAST | {"window": (64, None)}),
    Case("softcap", "scores that a cap bends", shape(*MIXED, 40), {"softcap": 0.8}),
    Case("alibi", "slopes for each sequence", shape(*MIXED, heads=4, kv_heads=2), LAST, slopes),
    Case("prefix", "one for each sequence, beside windows", shape(*MIXED), {"window": (25, None)},
         prefix),
    Case("prefix_bottom_right", "decoding behind a prefix", shape(
        [1, 2, 30], [60, 17, 40], heads=3), LAST, prefix),
    Case("sinks", "rows of a sink alone, and rows behind that have none", shape(
        [5, 8, 7], [6, 0, 90], heads=4, kv_heads=2), edit=both(sinks, rows_behind)),
    Case("sinks_alone", "no keys at all", shape([7, 3], [0, 0]), edit=both(sinks, rows_behind)),
    Case("sinks_and_prefix", "beside masks and dropout", shape(*MIXED, heads=8, kv_heads=2), {
        "dropout_p": 0.2}, both(sinks, prefix, slopes, masked((3, 1, *LONGEST)))),
    Case("no_queries", "empty", shape([0, 0], [7, 3])),
    Case("no_keys", "rows without a key only", shape([7, 3], [0, 0])),
    Case("no_sequences", "empty", shape([], [])),
]  # fmt: skip


class TestVarlenAttention(AttentionSuite):
    op = spec.OP
    function = staticmethod(ff.varlen_attention)
    plain = staticmethod(plain_varlen)
    cases = CASES
    outputs = 1
    scale_cases = ("past_a_panel", "many", "causal", "empty_keys")
    bool_cases = ("bool_mask",)
    slow_scale_cases = ("empty_keys", "bias_few")

    @staticmethod
    def slices(tensor: Tensor) -> Tensor:
        """One slice per head of (total, heads, dim); of a mask as in padded calls."""
        if tensor.dim() != 3:
            return AttentionSuite.slices(tensor)
        return tensor.transpose(0, 1).flatten(1)

    def test_same_bits_alone_and_in_a_pack(self, native_target: Target, dtype: torch.dtype) -> None:
        whole = spec.inputs(shape([60, 7, 33], [300, 20, 41], heads=4, kv_heads=2), dtype)
        expected = native_target.call(self.function, **whole)[0]
        for rows, columns in sequences(whole):
            alone = packed_alone(whole, rows, columns)
            out = native_target.call(self.function, **alone)[0]
            assert torch.equal(out, expected[rows])

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_equals_one_attention_per_sequence(self, is_causal: bool, target: Target) -> None:
        call = spec.inputs(shape([9, 0, 30, 5], [7, 4, 50, 0], heads=6, kv_heads=2), torch.float32)

        def loop(query: Tensor, key: Tensor, value: Tensor, **kw: Any) -> tuple[Tensor, ...]:
            results = []
            for rows, columns in sequences(call):
                q, k, v = (t.transpose(0, 1) for t in (query[rows], key[columns], value[columns]))
                results.append(
                    ff.scaled_dot_product_attention(
                        q, k, v, is_causal=is_causal, enable_gqa=True, return_lse=True
                    )
                )
            outs, statistics = zip(*results, strict=True)
            packed = torch.cat([o.transpose(0, 1) for o in outs])
            return packed, torch.cat([s.transpose(0, 1) for s in statistics])

        expected, expected_gradients = self.evaluate(loop, call)
        actual, gradients = self.evaluate(
            lambda **kw: target.call(self.function, **kw, is_causal=is_causal, return_lse=True),
            call,
        )
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(gradients, expected_gradients)

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_dropout_agrees_with_padding(self, is_causal: bool, target: Target) -> None:
        """The same seed drops the same scores in the padded call: positions count inside."""
        call = spec.inputs(shape([9, 0, 30, 5], [7, 4, 50, 13]), torch.float32)
        hidden = torch.ones(4, call["max_seqlen_k"], dtype=torch.bool)
        padded = {
            name: torch.zeros(4, 2, call[longest], 16)
            for name, longest in (
                ("query", "max_seqlen_q"), ("key", "max_seqlen_k"), ("value", "max_seqlen_k"),
            )
        }  # fmt: skip
        for b, (rows, columns) in enumerate(sequences(call)):
            for name, own in (("query", rows), ("key", columns), ("value", columns)):
                packed = call[name][own].transpose(0, 1)
                padded[name][b, :, : packed.shape[1]] = packed
            hidden[b, : columns.stop - columns.start] = False
        torch.manual_seed(8)
        out = target.call(self.function, **call, is_causal=is_causal, dropout_p=0.5)[0]
        torch.manual_seed(8)
        expected = ff.scaled_dot_product_attention(
            **padded, is_causal=is_causal, dropout_p=0.5, key_padding_mask=hidden
        )
        for b, (rows, _) in enumerate(sequences(call)):
            by_padding = expected[b, :, : rows.stop - rows.start].transpose(0, 1)
            torch.testing.assert_close(out[rows], by_padding)
        undropped = target.call(self.function, **call, is_causal=is_causal)[0]
        assert not torch.allclose(out, undropped, atol=0.1)

    def test_nan_stays_in_its_sequence(self, target: Target) -> None:
        call = spec.inputs(shape(*MIXED), torch.float32)

        def run(**kw: Any) -> Any:
            return target.call(self.function, **kw, return_lse=True)

        clean, clean_gradients = self.evaluate(run, call)
        rows, columns = sequences(call)[1]
        for name, own in (("query", rows), ("key", columns), ("value", columns)):
            spoiled = {**call, name: call[name].clone()}
            spoiled[name][own] = torch.nan
            results, gradients = self.evaluate(run, spoiled)
            assert results[0][rows].isnan().all()
            for result, expected in zip(results, clean, strict=True):
                for others, _ in (sequences(call)[0], sequences(call)[2]):
                    assert torch.equal(result[others], expected[others])
            for other, side in (("query", 0), ("key", 1), ("value", 1)):
                for pair in (sequences(call)[0], sequences(call)[2]):
                    assert torch.equal(
                        gradients[other][pair[side]], clean_gradients[other][pair[side]]
                    )

    @pytest.mark.parametrize(
        "offsets", list(itertools.product((torch.int32, torch.int64), repeat=2))
    )
    def test_offsets_of_both_integer_types(self, offsets: Any, target: Target) -> None:
        call = spec.inputs(shape(*MIXED), torch.float32)
        expected = target.call(self.function, **call)[0]
        call["cu_seqlens_q"] = call["cu_seqlens_q"].to(offsets[0])
        # A view with a stride: every second of twice as many.
        call["cu_seqlens_k"] = call["cu_seqlens_k"].to(offsets[1]).repeat_interleave(2)[::2]
        assert torch.equal(target.call(self.function, **call)[0], expected)

    def test_output_layout(self, target: Target, dtype: torch.dtype) -> None:
        call = spec.inputs(shape(*MIXED, value_dim=5), dtype)
        out, lse = target.call(self.function, **call, return_lse=True)
        assert out.shape == (60, 2, 5) and out.dtype == dtype and out.is_contiguous()
        assert lse.shape == (60, 2) and lse.dtype == torch.float32


def packed_alone(call: dict[str, Any], rows: slice, columns: slice) -> dict[str, Any]:
    """One sequence of a pack as a pack of its own."""
    q_len, kv_len = rows.stop - rows.start, columns.stop - columns.start
    return {
        "query": call["query"][rows],
        "key": call["key"][columns],
        "value": call["value"][columns],
        "cu_seqlens_q": torch.tensor([0, q_len]),
        "cu_seqlens_k": torch.tensor([0, kv_len]),
        "max_seqlen_q": q_len,
        "max_seqlen_k": kv_len,
    }


def small(**more: Any) -> dict[str, Any]:
    sizes = shape([3, 0, 5], [4, 2, 6], 4, value_dim=3, heads=4, kv_heads=2)
    return {**spec.inputs(sizes, torch.float32), **more}


def test_float64_statistics() -> None:
    call = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in small().items()}  # fmt: skip
    results = ff.varlen_attention(**call, return_lse=True)
    assert {r.dtype for r in results} == {torch.float64}
    torch.testing.assert_close(results, plain_varlen(**call), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dropout_p, is_causal", [(0.0, True), (0.4, False)])
def test_gradcheck(dropout_p: float, is_causal: bool) -> None:
    """First and second derivatives and forward mode, through output and statistics."""
    sizes = {"heads": 2, "kv_heads": 1, "q_lens": [2, 0, 1], "kv_lens": [3, 1, 0], "head_dim": 2}
    call = spec.inputs(sizes, torch.float64)
    leaves = [call.pop(n).requires_grad_() for n in ("query", "key", "value")]

    def run(*tensors: Tensor) -> Any:
        torch.manual_seed(2)
        out, lse = ff.varlen_attention(
            *tensors, **call, dropout_p=dropout_p, is_causal=is_causal, return_lse=True
        )
        # Rows of the last sequence have no key: their lse is -inf, which has no derivative.
        assert (lse[2] == -torch.inf).all()
        return out, lse[:2]

    torch.autograd.gradcheck(run, leaves, check_forward_ad=True)
    torch.autograd.gradgradcheck(run, leaves)


def test_autocast() -> None:
    call = spec.inputs(shape(*MIXED), torch.float32)
    leaves = [call.pop(n).requires_grad_() for n in ("query", "key", "value")]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = ff.varlen_attention(*leaves, **call)
        by_reference = ff.varlen_attention(*leaves, **call, backend="reference")
    assert out.dtype == by_reference.dtype == torch.bfloat16
    low = [t.detach().bfloat16() for t in leaves]
    assert torch.equal(out, ff.varlen_attention(*low, **call))
    exact = spec.OP.reference(*(t.double() for t in low), **call)[0]
    # Autocast inside the reference would round the scores to bfloat16 and be ten times worse.
    rounding = (exact.bfloat16().double() - exact).norm()
    assert (by_reference.double() - exact).norm() < 1.5 * rounding
    out.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)


def gradients_of(run: Any, call: dict[str, Any]) -> tuple[Any, tuple[Tensor, ...]]:
    leaves = {n: call[n].detach().requires_grad_() for n in ("query", "key", "value")}
    out, lse = run(**{**call, **leaves})
    loss = out.sin().sum() + lse.masked_fill(lse.isinf(), 0.0).cos().sum()
    return (out, lse), torch.autograd.grad(loss, list(leaves.values()))


@pytest.mark.parametrize(
    "backend, dropout_p, is_causal", [("aot_eager", 0.3, True), ("inductor", 0.0, False)]
)
def test_compile(backend: str, dropout_p: float, is_causal: bool) -> None:
    """One graph, forward and backward."""

    def run(**kw: Any) -> Any:
        return ff.varlen_attention(**kw, return_lse=True, dropout_p=dropout_p, is_causal=is_causal)

    torch.manual_seed(1)
    expected = gradients_of(run, small())
    torch.manual_seed(1)
    actual = gradients_of(torch.compile(run, fullgraph=True, backend=backend), small())
    torch.testing.assert_close(actual, expected)


def test_compile_once_for_all_lengths() -> None:
    counter = CompileCounter()
    run = torch.compile(ff.varlen_attention, fullgraph=True, backend=counter, dynamic=True)
    for q_lens, kv_lens in (MIXED, ([4, 9], [11, 3]), ([2, 31, 0, 8], [7, 7, 7, 7])):
        call = spec.inputs(shape(q_lens, kv_lens), torch.float32)
        with torch.inference_mode():
            torch.testing.assert_close(run(**call), ff.varlen_attention(**call))
    assert counter.frame_count == 1


def test_export() -> None:
    """Offsets are an input of the exported program, max_seqlen is a number in it."""

    class Packed(torch.nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return ff.varlen_attention(*given, 40, 60)

    def call(q_lens: list[int], kv_lens: list[int]) -> tuple[Tensor, ...]:
        given = spec.inputs(shape(q_lens, kv_lens), torch.float32)
        names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k")
        return tuple(given[n] for n in names)

    q, k, n = (torch.export.Dim(name, min=3) for name in ("q", "k", "n"))
    dynamic = {"given": ({0: q}, {0: k}, {0: k}, {0: n}, {0: n})}
    program = torch.export.export(Packed(), call(*MIXED), dynamic_shapes=dynamic)
    for lengths in (MIXED, ([0, 9, 40, 1], [60, 3, 0, 5])):
        given = call(*lengths)
        torch.testing.assert_close(program.module()(*given), Packed()(*given))


def test_vmap() -> None:
    """A further dimension of all tensors, the offsets shared."""
    call = spec.inputs(shape(*MIXED), torch.float32)
    tensors = [torch.stack([call.pop(n), torch.randn(60 if n == "query" else 90, 2, 16)])
               for n in ("query", "key", "value")]  # fmt: skip

    def run(*given: Tensor) -> Any:
        return ff.varlen_attention(*given, **call, return_lse=True)

    mapped = torch.func.vmap(run)(*tensors)
    for i in range(2):
        alone = run(*(t[i] for t in tensors))
        torch.testing.assert_close(tuple(m[i] for m in mapped), alone)


def test_func_grad() -> None:
    call = small()
    tensors = tuple(call.pop(n) for n in ("query", "key", "value"))

    def loss(*given: Tensor) -> Tensor:
        out, lse = ff.varlen_attention(*given, **call, return_lse=True)
        return out.sin().sum() + lse.cos().sum()

    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1, 2))(*tensors), expected)
