"""The shared suite on bidirectional_attention, and what is peculiar to it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from suite import DEVICE, AttentionSuite, Case, Target, outside, plain_lse, shaped
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fastfusion as ff
from fastfusion.backends import triton
from fastfusion.ops import bidirectional_attention as spec

TENSORS = ("query", "key", "value", "query_value")


@pytest.fixture(autouse=True)
def _short_calls_share_their_scores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As long ones do in Triton's kernels, where the shorter side fits on chip; see
    test_each_way_of_triton for the other way."""
    if triton.unavailable() is not None:
        yield
        return
    from fastfusion.kernels.bidirectional import forward as bidirectional
    from fastfusion.kernels.host import plan as _plan

    monkeypatch.setattr(bidirectional, "LONG", 0)
    _plan.forget()
    yield
    _plan.forget()


def plain_bidirectional(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: Any = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    segment_ids_q: Tensor | None = None,
    segment_ids_k: Tensor | None = None,
    prefix_len: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both softmaxes as a user writes them, every step in the dtype of the inputs."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-1, -2)) * scale
    scores = shaped(scores, softcap, alibi_slopes, causal_alignment)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores.to(torch.promote_types(scores.dtype, attn_mask.dtype)) + attn_mask
    hidden = outside(
        scores, is_causal, window, causal_alignment, segment_ids_q, segment_ids_k, prefix_len
    )
    scores = scores.masked_fill(hidden, -torch.inf)
    rows = columns = scores
    if key_padding_mask is not None:
        rows = rows.masked_fill(key_padding_mask[:, None, None, :], -torch.inf)
    if query_padding_mask is not None:
        columns = columns.masked_fill(query_padding_mask[:, None, :, None], -torch.inf)
    row_keep = column_keep = torch.ones((), dtype=query.dtype)
    if dropout_p > 0.0:
        seed = ff.core.philox.draw_seed(query.device)
        factor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        row_keep, column_keep = (
            ff.core.philox.keep_mask(seed, dropout_p, *scores.shape, stream=stream).to(query.dtype)
            * factor
            for stream in (0, 1)
        )

    def weights(scores: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        dead = (scores == -torch.inf).all(dim, keepdim=True)
        scores = scores.masked_fill(dead, 0.0)
        lse = plain_lse(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim)
        lse = lse.masked_fill(dead.squeeze(dim), -torch.inf)
        return torch.softmax(scores, dim).masked_fill(dead, 0.0), lse

    to_keys, lse_q = weights(rows, -1)
    to_queries, lse_k = weights(columns, -2)
    out_q = (to_keys * row_keep).to(value.dtype) @ value
    out_k = (to_queries * column_keep).to(value.dtype).transpose(-1, -2) @ query_value
    return out_q, out_k, lse_q, lse_k


def shape(q: int, k: int, dim: int = 16, **more: Any) -> dict[str, Any]:
    return {"batch": 2, "heads": 2, "q_len": q, "kv_len": k, "head_dim": dim, **more}


def one_sign(call: dict[str, Any]) -> None:
    call["value"], call["query_value"] = call["value"].abs(), call["query_value"].abs()


def dead_rows_and_columns(call: dict[str, Any]) -> None:
    mask = torch.rand(call["query"].shape[2], call["key"].shape[2]) > 0.4
    mask[::3] = False
    mask[:, ::4] = False
    call["attn_mask"] = mask


def hide_holes(call: dict[str, Any]) -> None:
    """Entry 0 loses some of both sides, entry 1 all of its keys and some of its queries."""
    for name, other in (("query_padding_mask", "query"), ("key_padding_mask", "key")):
        call[name] = torch.rand(2, call[other].shape[2]) < 0.4
    call["key_padding_mask"][1] = True


def slopes(call: dict[str, Any]) -> None:
    call["alibi_slopes"] = 0.3 * torch.rand(call["query"].shape[:2])


def segments(kind: str) -> Any:
    """Three segments of each side, "sorted" or "scattered"; each of entry 0 has one that the other
    has not."""

    def edit(call: dict[str, Any]) -> None:
        for name, other, more in (("segment_ids_q", "query", 0), ("segment_ids_k", "key", 1)):
            ids = torch.randint(0, 3, (2, call[other].shape[2]))
            if kind == "sorted":
                ids = ids.sort(-1).values
            ids[0] += more
            call[name] = ids

    return edit


def prefix(call: dict[str, Any]) -> None:
    """One that ends within the keys, and one of more than there are."""
    kv_len = call["key"].shape[2]
    call["prefix_len"] = torch.tensor([kv_len // 3, kv_len + 5])


def both(*edits: Any) -> Any:
    def edit(call: dict[str, Any]) -> None:
        for each in edits:
            each(call)

    return edit


def hide_everything_of_one(call: dict[str, Any]) -> None:
    hide_holes(call)
    call["query_padding_mask"][1] = True


def bias_of(*sizes: int) -> Any:
    def edit(call: dict[str, Any]) -> None:
        call["attn_mask"] = torch.randn(sizes).to(call["query"].dtype)

    return edit


def lowest(call: dict[str, Any]) -> None:
    bias = torch.zeros(call["query"].shape[2], call["key"].shape[2])
    bias[::2] = torch.finfo(torch.float32).min
    bias[:, 2] = torch.finfo(torch.float32).min
    call["attn_mask"] = bias


CAUSAL, LAST = {"is_causal": True}, {"is_causal": True, "causal_alignment": "bottom_right"}
CASES = [
    *(Case(f"causal_{name}", "the diagonal in both directions", shape(*lengths), options)
      for name, lengths, options in (
          ("square", (50, 50), CAUSAL), ("wide", (18, 300), CAUSAL), ("tall", (150, 13), CAUSAL),
          ("bottom_right_wide", (18, 300), LAST), ("bottom_right_tall", (150, 13), LAST),
          ("few", (3, 40), LAST))),
    Case("causal_masked", "the diagonal among holes and a bias", shape(33, 40),
         LAST | {"attn_mask": torch.linspace(-2, 2, 40)}, edit=hide_holes),
    Case("small", "an ordinary call", shape(20, 36)),
    Case("one_by_one", "shortest lengths", shape(1, 1, heads=12)),
    Case("one_query", "a softmax over one score on one side", shape(1, 300, heads=3)),
    Case("one_key", "the same on the other side", shape(45, 1, 64)),
    Case("few_queries", "errors of single scores", shape(3, 200, 64, batch=1, heads=4)),
    Case("few_keys", "the same on the other side", shape(200, 2, 64, batch=1, heads=4)),
    Case("past_a_panel", "tails of panels and key blocks", shape(49, 257)),
    Case("tall", "columns longer than rows", shape(257, 49)),
    Case("wide_and_long", "few keys against many queries, too wide to stay on chip", shape(
        2100, 20, 160, batch=1, heads=1, mask="bias")),
    Case("blocks", "several blocks both ways", shape(270, 530, batch=1)),
    *(Case(f"dim_{d}", "tails of registers", shape(13, 19, d, heads=8))
      for d in (1, 6, 14, 40, 77, 97)),
    Case("dim_160", "wide heads", shape(9, 33, 160)),
    Case("dim_256", "one chain along the head dim, which a few rows show", shape(
        4, 20, 256, batch=1, heads=1)),
    Case("value_dims", "three different dims", shape(11, 23, 8, value_dim=33, query_value_dim=5)),
    Case("value_dims_other", "the same, other order", shape(
        11, 23, 33, value_dim=5, query_value_dim=40)),
    Case("padding", "hidden ends on both sides", shape(20, 37, mask="both_padding")),
    Case("padding_holes", "hidden anywhere, all keys of an entry", shape(31, 301), edit=hide_holes),
    Case("padding_all", "an entry without queries or keys", shape(31, 45),
         edit=hide_everything_of_one),
    Case("bool_mask", "a mask per score", shape(20, 36, mask="bool")),
    Case("dead", "rows and columns without a score", shape(21, 18), edit=dead_rows_and_columns),
    Case("bias", "a float mask per head, in both softmaxes", shape(20, 36, mask="bias")),
    Case("bias_full", "a float mask per entry", shape(9, 17), edit=bias_of(2, 2, 9, 17)),
    Case("bias_shared", "a float mask shared by heads", shape(9, 17), edit=bias_of(2, 1, 9, 17)),
    Case("bias_keys", "a float mask per key", shape(9, 17), edit=bias_of(17)),
    Case("bias_rows", "a float mask per row and head", shape(9, 17), edit=bias_of(2, 9, 1)),
    Case("bias_lowest", "finfo.min is a number, not -inf", shape(9, 17), edit=lowest),
    Case("bias_padding", "masks together", shape(30, 70, mask="bias"), edit=hide_holes),
    Case("negative_scale", "any finite scale", shape(8, 12), {"scale": -0.7}),
    Case("zero_scale", "means of the values", shape(18, 40, 64), {"scale": 0.0}),
    Case("dropout", "two streams of random bits", shape(20, 35), {"dropout_p": 0.3}),
    Case("dropout_padding", "bits count positions, not visible ones", shape(20, 35),
         {"dropout_p": 0.3}, hide_holes),
    Case("dropout_all", "p = 1 drops everything", shape(5, 9), {"dropout_p": 1.0}),
    Case("one_sign", "long row sums of one sign", shape(3, 4500, 8, batch=1), edit=one_sign,
         in_triton={"kv_len": 1500}),
    Case("one_sign_columns", "long column sums of one sign", shape(4500, 3, 8, batch=1),
         edit=one_sign, in_triton={"q_len": 1500}),
    Case("nearly_equal", "weights that differ by a rounding or two, which long sums drop", shape(
        200, 250), {"scale": 1e-7}, one_sign),
    Case("window", "a band of scores, both ways", shape(60, 70), {"window": (9, 4)}),
    Case("window_wide", "bottom right, rows and columns without a score", shape(150, 300),
         {"window": (30, 0), "causal_alignment": "bottom_right"}, hide_holes,
         in_triton={"q_len": 135, "kv_len": 150}),
    Case("window_few", "among few", shape(3, 40), {"window": (9, 4)}, in_triton=None),
    Case("softcap", "scores that a cap bends, in both softmaxes", shape(30, 70, mask="bias"),
         {"softcap": 0.8}),
    Case("softcap_blocks", "score tiles that are computed again", shape(270, 530, batch=1),
         {"softcap": 0.8}, in_triton={"q_len": 20}),
    Case("softcap_few", "among few", shape(3, 40, 40), {"softcap": 0.8}, in_triton=None),
    Case("alibi", "slopes in both softmaxes", shape(30, 70), edit=slopes),
    Case("segments", "score tiles of which some see nothing", shape(150, 300),
         edit=both(segments("sorted"), hide_holes), in_triton={"q_len": 30, "kv_len": 80}),
    Case("segments_few", "scattered, among few", shape(3, 40), edit=segments("scattered")),
    Case("prefix", "of each entry", shape(60, 130, mask="bias"), {"dropout_p": 0.2},
         edit=both(prefix, hide_holes), in_triton={"q_len": 20, "kv_len": 70}),
    Case("ranges_long", "of a short side's one tile", shape(6, 530), edit=both(
        segments("sorted"), prefix)),
    Case("all_kinds", "window, cap and slopes", shape(65, 130, mask="bias"),
         {"window": (50, 40), "softcap": 1.1, "dropout_p": 0.2}, edit=both(slopes, hide_holes),
         in_triton={"q_len": 65, "kv_len": 70, "head_dim": 32}),
    Case("no_queries", "out_k is 0, lse_k -inf", shape(0, 7)),
    Case("no_keys", "out_q is 0, lse_q -inf", shape(7, 0)),
    Case("nothing", "empty both ways", shape(0, 0)),
    Case("no_batch", "empty", shape(7, 5, batch=0)),
]  # fmt: skip


class TestBidirectionalAttention(AttentionSuite):
    op = spec.OP
    function = staticmethod(ff.bidirectional_attention)
    plain = staticmethod(plain_bidirectional)
    cases = CASES
    outputs = 2
    scale_cases = ("few_keys", "past_a_panel", "padding_holes", "dead", "bias")
    slow_scale_cases = ("few_keys", "bias")
    bool_cases = ("padding", "bool_mask")

    def test_gradients_of_nearly_equal_weights(self, threaded_target: Target) -> None:
        """Weights that differ by a rounding or two: long sums would drop what tells them apart, an
        error that all weights of a row share."""
        call = self.op.inputs(shape(16, 256), torch.float32) | {"scale": 1e-7}
        _, gradients = self.evaluate(
            lambda **kw: threaded_target.call(type(self).function, **kw, return_lse=True), call
        )
        self.compare_gradients(threaded_target, call, gradients)

    @pytest.mark.parametrize("scale", [2.0**20, 2.0**28])
    def test_one_score_above_all_others(
        self, scale: float, target: Target, dtype: torch.dtype
    ) -> None:
        """What the largest score loses when it is rounded may be a hundred exponents itself."""
        for seed in (24, 40, 100):
            torch.manual_seed(seed)
            query, key = (torch.randn(1, 1, n, 14).to(dtype).to(DEVICE) for n in (7, 5))
            value, query_value = (torch.randn(1, 1, n, 4).to(dtype).to(DEVICE) for n in (5, 7))
            out_q, out_k = target.call(
                self.function, query=query, key=key, value=value, query_value=query_value,
                scale=scale,
            )  # fmt: skip
            scores = (query.double() @ key.double().transpose(2, 3))[0, 0]
            assert torch.equal(out_q[0, 0], value[0, 0, scores.argmax(dim=1)])
            assert torch.equal(out_k[0, 0], query_value[0, 0, scores.argmax(dim=0)])

    def test_same_bits_alone_and_in_a_batch(
        self, native_target: Target, dtype: torch.dtype
    ) -> None:
        whole = spec.inputs(shape(60, 300, batch=3), dtype)
        whole["query_padding_mask"] = torch.rand(3, 60) < 0.3
        whole["key_padding_mask"] = torch.rand(3, 300) < 0.3
        expected = native_target.call(self.function, **whole)
        for b in range(3):
            alone = {k: v[b : b + 1] for k, v in whole.items()}
            results = native_target.call(self.function, **alone)
            for result, e in zip(results, expected, strict=True):
                assert torch.equal(result, e[b : b + 1])

    @pytest.mark.parametrize("mask", [None, "bool", "bias"])
    def test_equals_two_attentions(self, mask: str | None, target: Target) -> None:
        """Keys attend to queries as in a call with the roles exchanged."""
        call = spec.inputs(shape(21, 34, mask=mask, value_dim=9, query_value_dim=5), torch.float32)
        hide_holes(call)

        def two_calls(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            query_value: Tensor,
            query_padding_mask: Tensor,
            key_padding_mask: Tensor,
            attn_mask: Tensor | None = None,
        ) -> tuple[Tensor, ...]:
            turned = None if attn_mask is None else attn_mask.transpose(-1, -2)
            out_q, lse_q = ff.scaled_dot_product_attention(
                query, key, value, attn_mask, key_padding_mask=key_padding_mask, return_lse=True
            )
            out_k, lse_k = ff.scaled_dot_product_attention(
                key, query, query_value, turned, key_padding_mask=query_padding_mask,
                return_lse=True,
            )  # fmt: skip
            return out_q, out_k, lse_q, lse_k

        expected, expected_gradients = self.evaluate(two_calls, call)
        actual, gradients = self.evaluate(
            lambda **kw: target.call(self.function, **kw, return_lse=True), call
        )
        torch.testing.assert_close(actual, expected)
        if target.differentiable:
            torch.testing.assert_close(gradients, expected_gradients)

    def test_rows_drop_as_in_attention(self, dropout_target: Target) -> None:
        """Stream 0 is the row softmax of scaled_dot_product_attention, stream 1 another one."""
        call = spec.inputs(shape(36, 36), torch.float32)
        call["key"] = call["query"]
        call["query_value"] = call["value"]
        torch.manual_seed(4)
        out_q, out_k = dropout_target.call(self.function, **call, dropout_p=0.5)
        torch.manual_seed(4)
        alone = ff.scaled_dot_product_attention(
            call["query"], call["key"], call["value"], dropout_p=0.5
        )
        torch.testing.assert_close(out_q, alone)
        # Symmetric scores: without dropout of their own the columns would repeat the rows.
        assert not torch.allclose(out_k, out_q, atol=1e-2)

    def test_hidden_nan_is_never_read(self, target: Target) -> None:
        """Hidden value and query_value rows: nothing reads them, their gradient is 0."""
        call = spec.inputs(shape(20, 36), torch.float32)
        hide_holes(call)

        def run(**kw: Any) -> Any:
            return target.call(self.function, **kw, return_lse=True)

        clean, clean_gradients = self.evaluate(run, call)
        for name, mask in (("value", "key_padding_mask"), ("query_value", "query_padding_mask")):
            hidden = call[mask][:, None, :, None]
            call[name] = call[name].masked_fill(hidden, torch.nan)
            if target.differentiable:
                assert (clean_gradients[name].masked_select(hidden) == 0).all()
                assert (clean_gradients[name].masked_select(~hidden[:1]) != 0).any()
        results, gradients = self.evaluate(run, call)
        assert all(map(torch.equal, results, clean))
        assert all(torch.equal(gradients[n], clean_gradients[n]) for n in gradients)

    def test_hidden_key_reaches_its_own_output_only(self, target: Target) -> None:
        """A padded position still gathers from the other side; NaN in it goes no further."""
        call = spec.inputs(shape(20, 36), torch.float32)
        hide_holes(call)
        clean = target.call(self.function, **call, return_lse=True)
        for own, other in (("key", 1), ("query", 0)):
            hidden = call[f"{own}_padding_mask"]
            spoiled = {**call, own: call[own].masked_fill(hidden[:, None, :, None], torch.nan)}
            results = target.call(self.function, **spoiled, return_lse=True)
            assert torch.equal(results[1 - other], clean[1 - other])
            assert torch.equal(results[3 - other], clean[3 - other])
            visible = ~hidden[:, None, :].expand(clean[2 + other].shape)
            assert torch.equal(results[other][visible], clean[other][visible])
            assert torch.equal(results[2 + other][visible], clean[2 + other][visible])

    def test_output_memory_has_rows_outside(self, target: Target, dtype: torch.dtype) -> None:
        for out in target.call(self.function, **spec.inputs(shape(5, 7), dtype)):
            assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()

    def test_three_dimensions(self, target: Target) -> None:
        call = spec.inputs(shape(20, 36, batch=1, mask="bias"), torch.float32)
        call["query_padding_mask"] = torch.rand(1, 20) < 0.3
        call["key_padding_mask"] = torch.rand(1, 36) < 0.3
        expected = target.call(self.function, **call, return_lse=True)
        flat = {k: v.squeeze(0) for k, v in call.items()}
        for mask in (call["attn_mask"], flat["attn_mask"]):
            flat["attn_mask"] = mask.squeeze(0)
            results = target.call(self.function, **flat, return_lse=True)
            assert [r.dim() for r in results] == [3, 3, 2, 2]
            assert all(torch.equal(r, e.squeeze(0)) for r, e in zip(results, expected, strict=True))


def small(**more: Any) -> dict[str, Any]:
    """A call with every kind of mask, each tensor of another size."""
    call = spec.inputs(shape(5, 7, 4, value_dim=3, query_value_dim=6, mask="bias"), torch.float32)
    call["query_padding_mask"] = torch.tensor([[False] * 4 + [True], [False] * 5])
    call["key_padding_mask"] = torch.tensor([[True] * 2 + [False] * 5, [True] * 7])
    return {**call, **more}


def test_float64_statistics() -> None:
    call = {k: v.double() if v.is_floating_point() else v for k, v in small().items()}
    out_q, out_k, lse_q, lse_k = ff.bidirectional_attention(**call, return_lse=True)
    assert {t.dtype for t in (out_q, out_k, lse_q, lse_k)} == {torch.float64}
    expected = plain_bidirectional(**call)[:2]
    torch.testing.assert_close((out_q, out_k), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p: float) -> None:
    """First and second derivatives and forward mode, through outputs and statistics."""
    call = spec.inputs({"heads": 2, "q_len": 3, "kv_len": 4, "head_dim": 2}, torch.float64)
    bias = torch.randn(3, 4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (*(call[n] for n in TENSORS), bias)]
    query_padding_mask = torch.tensor([[False, True, False]])
    key_padding_mask = torch.tensor([[False, False, True, False]])

    def run(query: Tensor, key: Tensor, value: Tensor, query_value: Tensor, mask: Tensor) -> Any:
        torch.manual_seed(2)
        return ff.bidirectional_attention(
            query, key, value, query_value, attn_mask=mask, dropout_p=dropout_p,
            query_padding_mask=query_padding_mask, key_padding_mask=key_padding_mask,
            return_lse=True,
        )  # fmt: skip

    torch.autograd.gradcheck(run, leaves, check_forward_ad=True)
    torch.autograd.gradgradcheck(run, leaves)


def test_autocast() -> None:
    call = spec.inputs(shape(15, 18), torch.float32)
    leaves = [call[n].requires_grad_() for n in TENSORS]
    bias = torch.randn(15, 18)
    with torch.autocast(DEVICE, torch.bfloat16):
        outputs = ff.bidirectional_attention(*leaves, attn_mask=bias)
        by_reference = ff.bidirectional_attention(*leaves, attn_mask=bias, backend="reference")
    # The mask stays float32: in 16 bits its finfo.min would be -inf.
    low = [t.detach().bfloat16() for t in leaves]
    expected = ff.bidirectional_attention(*low, attn_mask=bias, backend="reference")
    exact = spec.OP.reference(*(t.double() for t in low), attn_mask=bias.double())
    direct = ff.bidirectional_attention(*low, attn_mask=bias)
    for out, same in zip(outputs, direct, strict=True):
        assert out.dtype == torch.bfloat16 and torch.equal(out, same)
    for other, e, precise in zip(by_reference, expected, exact[:2], strict=True):
        assert torch.equal(other, e)
        # Autocast inside the reference would round the scores to bfloat16 and be ten times worse.
        rounding = (precise.bfloat16().double() - precise).norm()
        assert (other.double() - precise).norm() < 1.5 * rounding
    sum(out.float().sum() for out in outputs).backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)


def gradients_of(run: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    leaves = {k: v.detach().requires_grad_() for k, v in call.items() if v.is_floating_point()}
    outputs = run(**{**call, **leaves})
    finite = (o.masked_fill(o.isinf(), 0.0) for o in outputs)
    loss = sum(o.sin().sum() for o in finite)
    return outputs, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("backend, dropout_p", [("aot_eager", 0.3), ("inductor", 0.0)])
def test_compile(backend: str, dropout_p: float) -> None:
    """One graph, forward and backward."""

    def run(**kw: Any) -> Any:
        return ff.bidirectional_attention(**kw, return_lse=True, dropout_p=dropout_p)

    torch.manual_seed(1)
    expected = gradients_of(run, small())
    torch.manual_seed(1)
    actual = gradients_of(torch.compile(run, fullgraph=True, backend=backend), small())
    torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(triton.unavailable() is not None, reason="no GPU, and no interpreter")
@pytest.mark.parametrize("lengths", [(20, 36), (70, 9), (1, 3)], ids=str)
@pytest.mark.parametrize("options", [{}, CAUSAL, {"dropout_p": 0.3}], ids=str)
def test_each_way_of_triton(
    lengths: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One score matrix, and a launch that computes each direction: the same call."""
    from fastfusion.kernels.bidirectional import forward as bidirectional
    from fastfusion.kernels.host import plan as _plan

    call = spec.inputs(shape(*lengths, mask="both_padding"), torch.float32, DEVICE)
    results = []
    for least in (0, 512):
        monkeypatch.setattr(bidirectional, "LONG", least)
        _plan.forget()
        torch.manual_seed(1)
        found = ff.bidirectional_attention(**call, **options, return_lse=True, backend="triton")
        results.append(found)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_compile_once_for_all_lengths() -> None:
    counter = CompileCounter()
    run = torch.compile(ff.bidirectional_attention, fullgraph=True, backend=counter, dynamic=True)
    for q, k in ((20, 36), (9, 50), (31, 7)):
        call = spec.inputs(shape(q, k, mask="both_padding"), torch.float32)
        with torch.inference_mode():
            torch.testing.assert_close(run(**call), ff.bidirectional_attention(**call))
    assert counter.frame_count == 1


def test_export() -> None:
    class Fusion(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return ff.bidirectional_attention(
                *tensors[:4], query_padding_mask=tensors[4], key_padding_mask=tensors[5]
            )

    def call(q: int, k: int) -> tuple[Tensor, ...]:
        given = spec.inputs(shape(q, k, mask="both_padding"), torch.float32)
        return tuple(given.values())

    q, k = torch.export.Dim("q", min=2), torch.export.Dim("k", min=2)
    dynamic = {"tensors": ({2: q}, {2: k}, {2: k}, {2: q}, {1: q}, {1: k})}
    program = torch.export.export(Fusion(), call(20, 36), dynamic_shapes=dynamic)
    for sizes in ((20, 36), (9, 50)):
        given = call(*sizes)
        torch.testing.assert_close(program.module()(*given), Fusion()(*given))


def test_vmap() -> None:
    call = spec.inputs(shape(9, 11), torch.float32)
    tensors = [call[n] for n in TENSORS]
    expected = ff.bidirectional_attention(*tensors)
    torch.testing.assert_close(torch.func.vmap(ff.bidirectional_attention)(*tensors), expected)
    # One shared side, and a batch inside the mapped dimension.
    inner = [t[:, None].repeat(1, 3, 1, 1, 1) for t in tensors]
    mapped = torch.func.vmap(ff.bidirectional_attention, in_dims=(0, None, None, 0))
    out_q, out_k = mapped(inner[0], inner[1][0], inner[2][0], inner[3])
    for b in range(2):
        alone = ff.bidirectional_attention(inner[0][b], inner[1][0], inner[2][0], inner[3][b])
        torch.testing.assert_close((out_q[b], out_k[b]), alone)


def test_func_grad() -> None:
    call = spec.inputs(shape(9, 11), torch.float32)
    tensors = tuple(call[n] for n in TENSORS)

    def loss(*given: Tensor) -> Tensor:
        out_q, out_k, lse_q, lse_k = ff.bidirectional_attention(*given, return_lse=True)
        return out_q.sin().sum() + out_k.cos().sum() + (lse_q.sum() - lse_k.sum()).square()

    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    argnums = tuple(range(4))
    torch.testing.assert_close(torch.func.grad(loss, argnums)(*tensors), expected)
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums))(*tensors)
    for b in range(2):
        one = torch.func.grad(loss, argnums)(*(t[b] for t in tensors))
        torch.testing.assert_close(tuple(g[b] for g in per_sample), one)
