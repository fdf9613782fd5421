"""The shared suite on scaled_dot_product_attention, and what is peculiar to it."""

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from suite import DEVICE, AttentionSuite, Case, Target, plain_attention
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import fastfusion as ff
from fastfusion.benchmarks.common import peers
from fastfusion.ops import scaled_dot_product_attention as spec


def shape(q: int, k: int, dim: int = 16, **more: Any) -> dict[str, Any]:
    return {"batch": 2, "heads": 2, "q_len": q, "kv_len": k, "head_dim": dim, **more}


def one_sign(call: dict[str, Any]) -> None:
    call["value"] = call["value"].abs()


def dead_rows(call: dict[str, Any]) -> None:
    mask = torch.rand(call["query"].shape[2], call["key"].shape[2]) > 0.4
    mask[::3] = False
    call["attn_mask"] = mask


def hide_all_of_one(call: dict[str, Any]) -> None:
    hidden = torch.rand(2, call["key"].shape[2]) < 0.5
    hidden[1] = True
    call["key_padding_mask"] = hidden


def hide_a_piece(call: dict[str, Any]) -> None:
    hidden = torch.rand(2, call["key"].shape[2]) < 0.1
    hidden[0, :1100] = True
    hidden[1] = True
    call["key_padding_mask"] = hidden


def bias_of(*sizes: int) -> Any:
    def edit(call: dict[str, Any]) -> None:
        call["attn_mask"] = torch.randn(sizes).to(call["query"].dtype)

    return edit


def lowest(call: dict[str, Any]) -> None:
    bias = torch.zeros(call["query"].shape[2], call["key"].shape[2])
    bias[::2] = torch.finfo(torch.float32).min
    bias[1, 3:] = torch.finfo(torch.float32).min
    call["attn_mask"] = bias


def slopes_of(*sizes: int) -> Any:
    """Those of ALiBi's paper for so many heads, or others for each entry and head, one of them
    below 0."""

    def edit(call: dict[str, Any]) -> None:
        if len(sizes) == 1:
            call["alibi_slopes"] = 2.0 ** (-8 * torch.arange(1, sizes[0] + 1) / sizes[0])
        else:
            call["alibi_slopes"] = 0.3 * torch.rand(sizes) - 0.1

    return edit


def segments(kind: str) -> Any:
    """Three segments of each side, "sorted", "turned" (the last one first), or "scattered"; keys of
    entry 0 have one that queries have not, queries one that keys have not."""

    def edit(call: dict[str, Any]) -> None:
        for name, other, more in (("segment_ids_q", "query", 0), ("segment_ids_k", "key", 1)):
            ids = torch.randint(0, 3, (2, call[other].shape[2]))
            if kind != "scattered":
                ids = ids.sort(-1, descending=kind == "turned").values
            ids[0] += more
            call[name] = ids

    return edit


def prefix(call: dict[str, Any]) -> None:
    """One that ends within the keys, and one of more than there are."""
    kv_len = call["key"].shape[2]
    call["prefix_len"] = torch.tensor([kv_len // 3, kv_len + 5])


def sinks(call: dict[str, Any]) -> None:
    """Of which one outweighs ordinary rows."""
    call["sinks"] = torch.randn(call["query"].shape[1])
    call["sinks"][0] = 6.0


def positions(kind: str, heads: int | None = None) -> Any:
    """A table of 5 entries for so many heads, of which one outweighs ordinary scores, and an index:
    of each score, or by "offset"."""

    def edit(call: dict[str, Any]) -> None:
        q_len, kv_len = call["query"].shape[2], call["key"].shape[2]
        size = (q_len + kv_len - 1,) if kind == "offset" else (q_len, kv_len)
        call["position_table"] = torch.randn(heads or call["query"].shape[1], 5)
        call["position_table"][0, 2] = 6.0
        call["position_index"] = torch.randint(5, size)

    return edit


def swin(call: dict[str, Any]) -> None:
    """Its table lies (entries, heads) in memory."""
    call["position_table"] = torch.randn(169, 3).to(call["query"].dtype).T
    call["position_index"] = ff.positions.swin_window((7, 7)).int()


def both(*edits: Any) -> Any:
    def edit(call: dict[str, Any]) -> None:
        for each in edits:
            each(call)

    return edit


LAST = {"causal_alignment": "bottom_right"}
CASES = [
    Case("small", "an ordinary call", shape(20, 36)),
    Case("one_by_one", "shortest lengths", shape(1, 1, heads=12)),
    Case("one_query", "decoding", shape(1, 300, heads=3)),
    Case("few_queries", "decoding, one at a time", shape(3, 40, 40, mask="bias", causal=True)),
    Case("few_with_holes", "one at a time around hidden keys, with tails of registers", shape(
        2, 300, 77, value_dim=33, mask="bias", heads=4, kv_heads=2), {"dropout_p": 0.2},
        hide_all_of_one),
    Case("few_dead_rows", "one at a time, rows without a key", shape(3, 50), edit=dead_rows),
    Case("few_and_far", "splits of the keys, with everything that scores may have", shape(
        5, 700, mask="bias", heads=4, kv_heads=2), {"dropout_p": 0.2}, hide_all_of_one),
    Case("pieces", "keys cut into pieces, one of them hidden whole", shape(
        33, 1300, 8, value_dim=5, mask="bias", heads=2, kv_heads=1), edit=hide_a_piece),
    Case("pieces_rest", "the last of them of two keys", shape(9, 1026, 8, heads=2)),
    Case("pieces_few", "pieces of few queries", shape(2, 1300, 8, heads=4, kv_heads=2, mask="bool"),
         edit=hide_a_piece),
    Case("past_a_panel", "tails of panels and key blocks", shape(49, 257)),
    Case("blocks", "several key blocks", shape(17, 600)),
    Case("rest", "queries beyond whole registers, tails of registers along the head dim", shape(
        22, 300, 77, heads=4, kv_heads=2)),
    Case("rest_of_two", "the same of fewer, around hidden keys", shape(34, 41, 40),
         edit=hide_all_of_one),
    # More numbers than the others: on few, the plain formula's error is luck.
    Case("dim_1", "tails of registers", shape(45, 51, 1, heads=8)),
    *(Case(f"dim_{d}", "tails of registers", shape(13, 19, d)) for d in (6, 14, 40, 77, 97)),
    Case("dim_160", "wide heads", shape(9, 33, 160)),
    Case("wide_chunks", "keys of wide heads in chunks, of which some GPUs hold one alone", shape(
        33, 130, 100)),
    Case("vit_577", "a picture's patches, 24 x 24 and a token: one launch of CUDA's", shape(
        17, 577, 64, batch=1, heads=2, kv_heads=1)),
    Case("dim_256_short", "one chain along the head dim, which a few rows show", shape(
        4, 30, 256, batch=1, heads=1)),
    Case("value_dim", "value dim above key dim", shape(11, 23, 8, value_dim=33)),
    Case("value_dim_less", "value dim below key dim", shape(11, 23, 33, value_dim=5)),
    Case("grouped", "grouped-query heads", shape(12, 21, heads=6, kv_heads=2)),
    Case("one_kv_head", "multi-query heads", shape(12, 21, heads=4, kv_heads=1)),
    Case("causal", "the diagonal", shape(50, 50, causal=True)),
    Case("causal_wide", "top-left alignment, more keys", shape(10, 300, causal=True)),
    Case("causal_tall", "top-left alignment, more queries", shape(60, 13, causal=True)),
    *(Case(f"bottom_right_{name}", "bottom-right alignment", shape(*lengths, causal=True), LAST)
      for name, lengths in (("wide", (10, 300)), ("tall", (60, 13)), ("few", (3, 40)),
                            ("blocks", (65, 580)))),
    Case("bottom_right_masked", "the diagonal among hidden keys and masks", shape(
        20, 37, mask="key_padding", causal=True, heads=4, kv_heads=2), LAST,
         bias_of(2, 1, 20, 37)),
    Case("padding", "hidden keys at the end", shape(20, 37, mask="key_padding")),
    Case("padding_holes", "hidden keys anywhere, one entry whole", shape(5, 301),
         edit=hide_all_of_one),
    Case("bool_mask", "a mask per score", shape(20, 36, mask="bool")),
    Case("dead_rows", "rows without a key", shape(21, 18), edit=dead_rows),
    Case("bias", "a float mask per head", shape(20, 36, mask="bias")),
    Case("bias_full", "a float mask per entry", shape(9, 17), edit=bias_of(2, 2, 9, 17)),
    Case("bias_batch", "a float mask shared by heads", shape(9, 17), edit=bias_of(2, 1, 9, 17)),
    Case("bias_keys", "a float mask per key", shape(9, 17), edit=bias_of(17)),
    Case("bias_rows", "a float mask per row and head", shape(9, 17), edit=bias_of(2, 9, 1)),
    Case("bias_lowest", "finfo.min is a number, not -inf", shape(9, 17), edit=lowest),
    Case("everything", "masks together", shape(30, 70, mask="bias", heads=4, kv_heads=2,
                                               causal=True), edit=hide_all_of_one),
    Case("negative_scale", "any finite scale", shape(8, 12), {"scale": -0.7}),
    Case("zero_scale", "a mean of V", shape(8, 40, 64), {"scale": 0.0}),
    Case("dropout", "the shared random bits", shape(20, 35), {"dropout_p": 0.3}),
    Case("dropout_padding", "bits count positions, not visible keys", shape(20, 35),
         {"dropout_p": 0.3}, hide_all_of_one),
    Case("dropout_all", "p = 1 drops everything", shape(5, 9), {"dropout_p": 1.0}),
    Case("one_sign", "long sums of one sign", shape(
        3, 4500, 8, batch=1, heads=6), edit=one_sign, in_triton={"heads": 2}),
    *(Case(f"nearly_equal{name}", "weights that differ by a rounding or two, which long sums drop",
           shape(q, 250), {"scale": 1e-7}, one_sign) for name, q in (("", 16), ("_tail", 19))),
    Case("window", "keys on both sides", shape(60, 70), {"window": (9, 4)}),
    Case("window_blocks", "ranges that begin within a block, and blocks that no tile sees", shape(
        113, 1100), {"window": (40, 17), **LAST},
         in_triton={"q_len": 70, "kv_len": 330, "batch": 1, "heads": 1}),
    Case("window_tiles", "more tiles than walk together", shape(900, 900, 8, batch=1, heads=1),
         {"window": (100, 30)}, in_triton=None),
    Case("window_left", "keys before alone, below the diagonal", shape(70, 300, causal=True),
         {"window": (33, None)}, in_triton={"batch": 1, "heads": 1}),
    Case("window_right", "a bound on one side", shape(300, 70), {"window": (None, 3)},
         in_triton={"batch": 1, "heads": 1}),
    Case("window_few", "decoding with a window", shape(3, 700), {"window": (300, 0), **LAST},
         in_triton={"batch": 1, "heads": 1}),
    Case("window_few_masked", "the same around hidden keys", shape(
        2, 700, heads=4, kv_heads=2, mask="bias"), {"window": (290, 5), "dropout_p": 0.2, **LAST},
        hide_all_of_one, in_triton=None),
    Case("window_dead", "rows beyond all windows", shape(90, 13), {"window": (2, 2)}),
    Case("window_masked", "a window among hidden keys and masks", shape(
        65, 580, mask="bias", heads=4, kv_heads=2), {"window": (70, 9), "dropout_p": 0.2, **LAST},
        hide_all_of_one, in_triton={"q_len": 40, "kv_len": 130}),
    Case("window_bools", "with bits of a mask", shape(65, 580, mask="bool"),
         {"window": (270, 90), **LAST}, in_triton=None),
    Case("softcap", "scores that a cap bends", shape(20, 36, 40), {"softcap": 0.8}),
    Case("softcap_wide", "sums of wide heads in parts", shape(21, 70, 160), {"softcap": 2.0},
         in_triton=None),
    Case("softcap_reached", "scores far beyond the cap", shape(20, 300),
         {"softcap": 1.5, "scale": 3.0}, in_triton={"kv_len": 100}),
    Case("softcap_few", "one at a time", shape(3, 300, 40, mask="bias"), {"softcap": 0.7},
         in_triton=None),
    Case("softcap_pieces", "keys in pieces", shape(33, 1300, 8), {"softcap": 0.6}, in_triton=None),
    Case("softcap_masked", "the cap comes before masks", shape(
        30, 300, mask="bias", heads=4, kv_heads=2, causal=True), {"softcap": 0.9, "dropout_p": 0.2},
        hide_all_of_one, in_triton={"kv_len": 100}),
    Case("alibi", "slopes of the paper", shape(40, 300, heads=8), edit=slopes_of(8),
         in_triton={"kv_len": 70}),
    Case("alibi_entries", "slopes for each entry, bottom right", shape(40, 300), LAST,
         slopes_of(2, 2), in_triton={"kv_len": 100}),
    Case("alibi_few", "decoding with slopes", shape(2, 600, heads=4, kv_heads=2), LAST,
         slopes_of(4), in_triton=None),
    Case("alibi_pieces", "distances in pieces of the keys", shape(33, 1300, 8), LAST,
         slopes_of(2), in_triton=None),
    Case("alibi_holes", "distances over hidden keys", shape(21, 301), LAST,
         both(slopes_of(2), hide_all_of_one), in_triton={"kv_len": 101}),
    Case("segments", "ranges of each tile, and rows without a segment", shape(150, 700),
         edit=segments("sorted"), in_triton={"q_len": 70, "kv_len": 200}),
    Case("segments_turned", "ranges that go backwards, among hidden keys and masks", shape(
        65, 580, mask="bias", heads=4, kv_heads=2), {"dropout_p": 0.2, "softcap": 0.9},
        both(segments("turned"), hide_all_of_one),
        in_triton={"q_len": 20, "kv_len": 100, "heads": 2}),
    Case("segments_scattered", "keys of others within the ranges, and a window", shape(
        60, 300, mask="bool"), {"window": (90, 40), **LAST}, segments("scattered")),
    Case("segments_few", "one at a time, of a long row of keys", shape(
        3, 1300, heads=4, kv_heads=2), edit=segments("scattered"),
         in_triton={"kv_len": 520, "heads": 2}),
    Case("prefix", "ranges of each entry", shape(150, 400), edit=prefix,
         in_triton={"q_len": 70, "kv_len": 200}),
    Case("prefix_few", "one at a time", shape(2, 300), {"window": (280, None), **LAST}, prefix),
    Case("all_ranges", "prefix, window and segments", shape(65, 580, heads=4, kv_heads=2),
         {"window": (300, None), "dropout_p": 0.2, **LAST},
         both(segments("sorted"), prefix, hide_all_of_one),
         in_triton={"q_len": 20, "kv_len": 150}),
    Case("no_columns", "statistics that go with no value", shape(3, 200, value_dim=0)),
    Case("sinks", "weights that no value has", shape(60, 300), edit=sinks),
    Case("sinks_dead", "rows that have a sink alone", shape(21, 18, heads=4, kv_heads=2), edit=both(
        sinks, dead_rows, hide_all_of_one)),
    Case("sinks_few", "one at a time, rows of no other weight", shape(3, 50, heads=4, kv_heads=1),
         {"dropout_p": 0.2}, both(sinks, dead_rows, hide_all_of_one)),
    Case("sinks_pieces", "in one piece of the keys", shape(33, 1300, 8), edit=sinks,
         in_triton={"q_len": 3, "kv_len": 520}),
    Case("sinks_rest", "queries beyond whole registers", shape(19, 41, 40), edit=sinks),
    Case("sinks_blocks", "with everything", shape(100, 700, mask="bias", heads=4, kv_heads=2), {
        "window": (300, 40), "softcap": 1.1, "dropout_p": 0.2, **LAST},
         both(sinks, segments("sorted"), hide_all_of_one),
         in_triton={"q_len": 20, "kv_len": 100, "heads": 2}),
    Case("positions", "tiles and blocks of a table that heads share", shape(60, 300),
         edit=positions("each", 1)),
    Case("positions_offset", "the same by offset", shape(60, 300), edit=positions("offset")),
    Case("positions_swin", "windows, with a query beyond whole registers", shape(
        49, 49, batch=9, heads=3), edit=swin),
    Case("positions_rest", "queries beyond whole registers, around hidden keys", shape(
        19, 41, 40, heads=4, kv_heads=2), edit=both(positions("offset"), hide_all_of_one)),
    Case("positions_few", "one at a time", shape(2, 300, heads=4, kv_heads=2),
         edit=positions("offset")),
    Case("positions_few_each", "one at a time, by an index of each score", shape(3, 50),
         {"dropout_p": 0.2}, both(positions("each"), dead_rows, hide_all_of_one)),
    Case("positions_pieces", "of the keys in pieces", shape(33, 1300, 8), edit=positions("offset"),
         in_triton={"q_len": 3, "kv_len": 520}),
    Case("positions_masked", "with everything", shape(65, 580, mask="bias", heads=4, kv_heads=2), {
        "window": (300, 40), "softcap": 1.1, "dropout_p": 0.2, **LAST},
         both(positions("offset"), sinks, segments("scattered"), slopes_of(4), hide_all_of_one),
         in_triton={"q_len": 20, "kv_len": 100}),
    Case("all_kinds", "window, cap and slopes", shape(65, 580, mask="bias", heads=4, kv_heads=2),
         {"window": (90, 40), "softcap": 1.1, **LAST}, both(slopes_of(2, 4), hide_all_of_one),
         in_triton={"q_len": 40, "kv_len": 130}),
    Case("no_queries", "empty", shape(0, 7)),
    Case("no_keys", "empty: 0 and -inf", shape(7, 0)),
    Case("no_batch", "empty", shape(7, 5, batch=0)),
]  # fmt: skip


class TestScaledDotProductAttention(AttentionSuite):
    op = spec.OP
    function = staticmethod(ff.scaled_dot_product_attention)
    plain = staticmethod(plain_attention)
    cases = CASES
    outputs = 1
    scale_cases = (
        "few_dead_rows", "rest_of_two", "dead_rows", "bias", "pieces", "causal", "alibi",
        "alibi_few", "all_kinds", "positions_rest", "positions_few",
    )  # fmt: skip
    slow_scale_cases = ("dead_rows", "bias")
    bool_cases = ("few_dead_rows", "rest_of_two", "padding", "bool_mask")

    def test_gradients_of_nearly_equal_weights(self, threaded_target: Target) -> None:
        """Weights that differ by a rounding or two: long sums would drop what tells them apart, an
        error that all weights of a row share."""
        call = self.op.inputs(shape(16, 256), torch.float32) | {"scale": 1e-7}
        _, gradients = self.evaluate(
            lambda **kw: threaded_target.call(type(self).function, **kw, return_lse=True), call
        )
        self.compare_gradients(threaded_target, call, gradients)

    @pytest.mark.parametrize("kv_len", [300, 1100])
    def test_same_bits_alone_and_in_a_batch(
        self, kv_len: int, native_target: Target, dtype: torch.dtype
    ) -> None:
        """A sample's bits do not depend on its batch mates, nor a row's on those beside it."""
        if native_target.interpreted:
            kv_len = min(kv_len, 400)  # several blocks of its kernels
        whole = spec.inputs(shape(60, kv_len, batch=3, heads=4, kv_heads=2), dtype)
        hidden = torch.rand(3, kv_len) < 0.3
        expected = native_target.call(self.function, **whole, key_padding_mask=hidden)[0]
        for b in range(3):
            alone = {k: v[b : b + 1] if torch.is_tensor(v) else v for k, v in whole.items()}
            out = native_target.call(self.function, **alone, key_padding_mask=hidden[b : b + 1])
            assert torch.equal(out[0], expected[b : b + 1])
        # As many as leave no rest beside whole registers, which goes its own way.
        rows = {**whole, "query": whole["query"][:, :, 7:39]}
        out = native_target.call(self.function, **rows, key_padding_mask=hidden)[0]
        assert torch.equal(out, expected[:, :, 7:39])

    def test_padding_equals_trimming(self, native_target: Target) -> None:
        call = spec.inputs(shape(20, 300), torch.float32)
        hidden = torch.zeros(2, 300, dtype=torch.bool)
        hidden[:, 280:] = True
        padded = native_target.call(self.function, **call, key_padding_mask=hidden)[0]
        trimmed = {k: v[:, :, :280] if k != "query" else v for k, v in call.items()}
        assert torch.equal(padded, native_target.call(self.function, **trimmed)[0])

    def test_hidden_nan_is_never_read(self, target: Target) -> None:
        call = spec.inputs(shape(20, 36, mask="key_padding"), torch.float32)
        hidden = call["key_padding_mask"]

        def run(**kw: Any) -> Any:
            return target.call(self.function, **kw, return_lse=True)

        clean, clean_gradients = self.evaluate(run, call)
        for name in ("key", "value"):
            call[name] = call[name].masked_fill(hidden[:, None, :, None], torch.nan)
        results, gradients = self.evaluate(run, call)
        assert all(map(torch.equal, results, clean))
        assert all(torch.equal(gradients[n], clean_gradients[n]) for n in gradients)
        if target.differentiable:
            assert (gradients["key"].masked_select(hidden[:, None, :, None]) == 0).all()

    def test_nan_in_a_query_stays_in_its_row(self, target: Target) -> None:
        call = spec.inputs(shape(20, 36), torch.float32)
        clean = target.call(self.function, **call)[0]
        call["query"][0, 1, 3, 2] = torch.nan
        out = target.call(self.function, **call)[0]
        assert out[0, 1, 3].isnan().all()
        out[0, 1, 3] = clean[0, 1, 3]
        assert torch.equal(out, clean)

    def test_output_memory_has_rows_outside(self, target: Target, dtype: torch.dtype) -> None:
        out = target.call(self.function, **spec.inputs(shape(5, 7), dtype))[0]
        assert out.transpose(1, 2).is_contiguous()

    def test_agrees_with_torch(self, target: Target) -> None:
        for mask, causal in itertools.product((None, "bool", "bias"), (False, True)):
            call = spec.inputs(shape(20, 36, mask=mask, causal=causal), torch.float32)
            if mask == "bool":
                call["attn_mask"][:, 0] = True
            torch.testing.assert_close(target.call(self.function, **call)[0], peers.sdpa(call)())

    @pytest.mark.parametrize("mask", ["keys", "one", "entries", "heads"])
    def test_long_sums_in_gradients(self, mask: Any, differentiable_target: Target) -> None:
        """Terms of one sign from thousands of rows of several heads, added to few gradients: a
        single float32 chain errs by ten times the plain formula."""
        target = differentiable_target
        batch, heads, length = (1, 2, 1024) if target.interpreted else (2, 8, 4096)
        query, weight = torch.rand(2, batch, heads, length, 8)
        key = torch.rand(batch, 1, 40, 8)
        sizes = {"keys": (40,), "one": (1, 1), "entries": (batch, 1, 1, 40), "heads": (heads, 1, 1)}
        bias = torch.zeros(sizes[mask])

        def gradients(function: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
            q, k, v, b, g = (t.to(dtype) for t in (query, key, key, bias, weight))
            inputs = [t.clone().requires_grad_() for t in (k, v, b)]
            out, lse = function(q, inputs[0], inputs[1], inputs[2], enable_gqa=True)
            return torch.autograd.grad((out * g).sum() + lse.sum(), inputs)

        exact = gradients(spec.OP.reference, torch.float64)
        plain = gradients(plain_attention, torch.float32)
        actual = gradients(
            lambda q, k, v, b, **kw: target.call(
                self.function, query=q, key=k, value=v, attn_mask=b, return_lse=True, **kw
            ),
            torch.float32,
        )
        for triple in zip(actual, exact, plain, strict=True):
            assert_accurate(*map(self.slices, triple))


def test_long_sequences_need_little_memory() -> None:
    """8192 x 8192 scores would be 256 MB; forward and backward stay below 64 MB in all."""
    code = """
import resource, torch, fastfusion as ff
torch.set_num_threads(1)
def run(n):
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
    ff.scaled_dot_product_attention(q, k, v, backend="cpu").sum().backward()
run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(8192)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    if ff.backends.library.native is None:
        pytest.skip("the compiled part is not built: the promise is the native backends'")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024


@pytest.mark.parametrize("dims", [2, 3, 5])
def test_other_ranks(dims: int) -> None:
    size = (2, 2, 3, 5, 8)[5 - dims :]
    query, key, value = (torch.randn(size, requires_grad=True) for _ in range(3))
    out, lse = ff.scaled_dot_product_attention(query, key, value, return_lse=True)
    torch.testing.assert_close(out, torch_sdpa(query, key, value))
    assert lse.shape == size[:-1]
    hidden = torch.zeros(*size[:-3], 5, dtype=torch.bool)
    hidden[..., 3:] = True
    out = ff.scaled_dot_product_attention(query, key, value, key_padding_mask=hidden)
    visible = ~hidden[..., None, None, :] if dims > 2 else ~hidden
    torch.testing.assert_close(out, torch_sdpa(query, key, value, attn_mask=visible))


@pytest.mark.parametrize(
    "sizes",
    [((2, 3), (1, 3)), ((2, 3), (2, 1)), ((2, 3), (1, 1)), ((1, 3), (2, 3)), ((2, 1), (2, 3))],
)
def test_size_one_dimensions_broadcast(sizes: Any) -> None:
    query = torch.randn(*sizes[0], 4, 8, requires_grad=True)
    key, value = (torch.randn(*sizes[1], 5, 8, requires_grad=True) for _ in range(2))
    inputs = (query, key, value)
    out, expected = ff.scaled_dot_product_attention(*inputs), torch_sdpa(*inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sin().sum(), inputs),
        torch.autograd.grad(expected.sin().sum(), inputs),
    )


def test_float64_goes_to_the_reference() -> None:
    query, key, value = (torch.randn(1, 2, 4, 8, dtype=torch.float64) for _ in range(3))
    out, lse = ff.scaled_dot_product_attention(query, key, value, return_lse=True)
    torch.testing.assert_close(out, torch_sdpa(query, key, value), rtol=0, atol=1e-15)
    assert lse.dtype == torch.float64


def test_gradcheck() -> None:
    query, key, value = (
        torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    mask = torch.randn(2, 3, 1, dtype=torch.float64, requires_grad=True)

    def run(*tensors: Any) -> Any:
        return ff.scaled_dot_product_attention(*tensors, return_lse=True)

    torch.autograd.gradcheck(run, (query, key, value, mask))
    torch.autograd.gradgradcheck(run, (query, key, value, mask))


def test_autocast() -> None:
    query, key, value = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(5, 5)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = ff.scaled_dot_product_attention(query, key, value, bias)
        by_reference = ff.scaled_dot_product_attention(query, key, value, bias, backend="reference")
    assert out.dtype == by_reference.dtype == torch.bfloat16
    # The mask stays float32: in 16 bits its finfo.min would be -inf.
    expected = ff.scaled_dot_product_attention(
        query.bfloat16(), key.bfloat16(), value.bfloat16(), bias
    )
    assert torch.equal(out, expected)
    exact = ff.scaled_dot_product_attention(
        *(t.bfloat16().double() for t in (query, key, value)), bias.double()
    )
    # Autocast inside the reference would round the scores to bfloat16 and be ten times worse.
    rounding = (exact.bfloat16().double() - exact).norm()
    assert (by_reference.double() - exact).norm() < 1.5 * rounding
    out.float().sum().backward()
    assert query.grad is not None and query.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_takes_mixed_dtypes(backend: str | None) -> None:
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask = torch.randn(5, 5)
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = ff.scaled_dot_product_attention(query, key, value, mask.half(), backend=backend)
        out = ff.scaled_dot_product_attention(
            query, key.bfloat16(), value, mask.half(), backend=backend
        )
        packed = ff.varlen_attention(
            *(t.transpose(1, 2).flatten(0, 1) for t in (query, key.bfloat16(), value)),
            *[torch.tensor([0, 5, 10])] * 2, 5, 5, backend=backend,
        )  # fmt: skip
        both = ff.bidirectional_attention(query, key.bfloat16(), value, value, backend=backend)
    torch.testing.assert_close(out, expected)
    assert {t.dtype for t in (out, packed, *both)} == {torch.bfloat16}


def test_vmap_over_nothing() -> None:
    _, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    none = torch.randn(0, 2, 3, 4, 8)
    out = torch.vmap(lambda q: ff.scaled_dot_product_attention(q, key, value))(none)
    assert out.shape == none.shape
