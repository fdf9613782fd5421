"""Windows, soft caps, ALiBi, segments, prefixes, sinks and position tables: what they mean, and
everything that torch does to an op.

How accurate they are is tested among the cases of each op.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch
from suite import needs_native
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import fastfusion as ff
from fastfusion.backends import cuda
from fastfusion.core.score_policy import scores_seen
from fastfusion.ops import scaled_dot_product_attention as spec

SLOPES = torch.tensor([0.5, 0.25, 0.1])
KINDS: list[dict[str, Any]] = [
    {"window": (2, 1)},
    {"softcap": 0.7},
    {"alibi_slopes": SLOPES},
    {"window": (3, None), "is_causal": True, "causal_alignment": "bottom_right", "softcap": 0.9,
     "alibi_slopes": torch.stack((SLOPES, -SLOPES))},
    {"segment_ids_q": torch.tensor([[0, 1, 1, 2, 3], [5, 5, 3, 4, 5]]),
     "segment_ids_k": torch.tensor([[0, 0, 1, 1, 1, 3, 3], [3, 4, 5, 4, 3, 5, 3]]),
     "prefix_len": torch.tensor([3, 6])},
    {"sinks": torch.tensor([0.5, -torch.inf, 2.0])},
    {"position_table": torch.randn(3, 4),
     "position_index": torch.arange(35).reshape(5, 7) % 4},
    {"position_table": torch.randn(1, 4), "position_index": torch.arange(11) % 4},
]  # fmt: skip
kinds = pytest.mark.parametrize("kinds", KINDS, ids="-".join)
needs_cuda = pytest.mark.skipif(cuda.unavailable() is not None, reason="no CUDA kernels")
BACKENDS = [
    "reference", pytest.param("cpu", marks=needs_native), "triton",
    pytest.param("cuda", marks=needs_cuda),
]  # fmt: skip
backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def qkv(q_len: int = 5, kv_len: int = 7, gradient: bool = False) -> tuple[Tensor, ...]:
    sizes = ((2, 3, q_len, 8), (2, 3, kv_len, 8), (2, 3, kv_len, 6))
    return tuple(torch.randn(size, requires_grad=gradient) for size in sizes)


def attention(*tensors: Tensor, **options: Any) -> Any:
    return ff.scaled_dot_product_attention(*tensors, **options)


def reference(*tensors: Tensor, **options: Any) -> Any:
    return ff.scaled_dot_product_attention(*tensors, backend="reference", **options)


def seen(q_len: int, kv_len: int, **options: Any) -> Tensor:
    """Which keys a query sees: those to whose values its output has a gradient."""
    scores = torch.zeros(1, 1, q_len, 4), torch.zeros(1, 1, kv_len, 4)
    out = attention(*scores, torch.eye(kv_len)[None, None], **options)
    return out[0, 0] > 0


@backends
@pytest.mark.parametrize(
    ("alignment", "window", "rows"),
    [
        # flash-attn's flash_attn_func has the two pictures of "bottom_right" for causal=True.
        ("bottom_right", (None, 0), ["11110", "11111"]),
        ("bottom_right", (1, 0), ["00110", "00011"]),
        ("bottom_right", (0, 1), ["00011", "00001"]),
        ("top_left", (None, 0), ["10000", "11000"]),
        ("top_left", (0, 2), ["11100", "01110"]),
        ("top_left", (1, None), ["11111", "11111"]),
        ("top_left", (0, None), ["11111", "01111"]),
        ("top_left", (0, 0), ["10000", "01000"]),
    ],
)
def test_what_a_window_shows(alignment: str, window: Any, rows: list[str], backend: str) -> None:
    expected = torch.tensor([[key == "1" for key in row] for row in rows])
    options = {"causal_alignment": alignment, "backend": backend}
    assert torch.equal(seen(2, 5, window=window, **options), expected)
    if window[1] == 0:  # with is_causal, or as it
        assert torch.equal(seen(2, 5, window=(window[0], 3), is_causal=True, **options), expected)


@backends
def test_rows_and_columns_of_a_window(backend: str) -> None:
    """More queries than keys: those beyond all windows have no key."""
    out, lse = attention(*qkv(9, 4), window=(1, 1), return_lse=True, backend=backend)
    assert (out[:, :, 5:] == 0).all() and (lse[:, :, 5:] == -torch.inf).all()
    assert lse[:, :, :5].isfinite().all()


@backends
def test_a_cap_bounds_scores_before_masks(backend: str) -> None:
    query, key, value = qkv()
    bias = torch.full((5, 7), 3.0)
    _, lse = attention(
        100 * query, 100 * key, value, bias, softcap=2.0, return_lse=True, backend=backend
    )
    highest = 3.0 + 2.0 + torch.tensor(7.0).log()
    assert (lse <= highest + 1e-5).all() and (lse > 3.0 - 2.0).all()


@needs_native
def test_a_cap_bounds_scores_of_bfloat16_products(isa: str) -> None:
    """Among scores far beyond it, where the rational function alone would go on."""
    query, key, value = (100 * t.bfloat16() for t in qkv(60, 70))
    _, lse = attention(query, key, value, softcap=2.0, return_lse=True, backend="cpu")
    middle = torch.tensor(70.0).log()
    assert (lse <= middle + 2.0 + 1e-5).all() and (lse >= middle - 2.0 - 1e-5).all()


@backends
def test_slopes_are_of_distances(backend: str) -> None:
    query, key, value = qkv()
    distance = (torch.arange(5)[:, None] + 2 - torch.arange(7)).abs()
    bias = -SLOPES[:, None, None] * distance
    assert_close(
        attention(
            query, key, value, alibi_slopes=SLOPES, causal_alignment="bottom_right",
            backend=backend,
        ),
        reference(query, key, value, bias),
    )  # fmt: skip


@needs_native
def test_bits_of_a_window_are_those_of_its_batch_mates_and_threads() -> None:
    query, key, value = (torch.randn(2, 3, 700, 16) for _ in range(3))
    options: dict[str, Any] = {"window": (50, 20), "backend": "cpu"}
    expected = attention(query, key, value, **options)
    torch.set_num_threads(1)
    alone = [attention(*(t[b : b + 1, h : h + 1] for t in (query, key, value)), **options)
             for b in range(2) for h in range(3)]  # fmt: skip
    assert torch.equal(torch.cat(alone).unflatten(0, (2, 3)).squeeze(2), expected)


@pytest.mark.parametrize(
    ("backend", "length", "first", "rows", "keys"),
    [
        pytest.param("cpu", 2048, 1024, 900, 512, marks=needs_native),
        ("triton", 512, 320, 192, 128),
    ],
)
def test_a_window_reads_no_more_than_it_shows(
    backend: str, length: int, first: int, rows: int, keys: int
) -> None:
    """NaN beyond the blocks of keys that a tile sees does not reach it."""
    query, key, value = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        key[:, :, first:], value[:, :, first:] = torch.nan, torch.nan
    out = attention(query, key, value, window=(30, 30), backend=backend)[:, :, :rows]
    assert out.isfinite().all()
    for gradient in torch.autograd.grad(out.sum(), (query, key, value)):
        assert gradient[:, :, :keys].isfinite().all()


@pytest.mark.parametrize(
    ("backend", "length"), [pytest.param("cpu", 2048, marks=needs_native), ("triton", 512)]
)
def test_segments_read_no_more_than_they_show(backend: str, length: int) -> None:
    """Four of them, the first of the highest number; NaN is in the third and fourth."""
    query, key, value = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
    half, quarter = length // 2, length // 4
    with torch.no_grad():
        key[:, :, half:], value[:, :, half:] = torch.nan, torch.nan
    ids = (3 - torch.arange(length)[None] // quarter).int()
    out = attention(query, key, value, segment_ids_q=ids, segment_ids_k=ids, backend=backend)
    out = out[:, :, : half - length // 16]
    assert out.isfinite().all()
    for gradient in torch.autograd.grad(out.sum(), (query, key, value)):
        assert gradient[:, :, :quarter].isfinite().all()


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "shown", "rows", "kinds"),
    [
        (256, 256, slice(192), 128, {"window": (30, 30)}),
        (3, 700, slice(576, None), 3, {"window": (100, 0), "causal_alignment": "bottom_right"}),
        (256, 256, slice(128), 128, {"segment_ids_q": 64, "segment_ids_k": 64}),
    ],
    ids=["window", "window_few", "segments"],
)
def test_cuda_kernels_read_no_more_than_is_seen(
    q_len: int, kv_len: int, shown: slice, rows: int, kinds: Any, dtype: torch.dtype
) -> None:
    """NaN in tiles of keys that none of a block's queries sees; segments of so many tokens."""
    query, key, value = (torch.randn(1, 1, n, 16).to(dtype) for n in (q_len, kv_len, kv_len))
    kinds = {k: torch.arange(q_len)[None] // v if "ids" in k else v for k, v in kinds.items()}
    expected = attention(query, key, value, **kinds, backend="cuda")[:, :, :rows]
    unseen = torch.ones(kv_len, dtype=torch.bool)
    unseen[shown] = False
    key[:, :, unseen], value[:, :, unseen] = torch.nan, torch.nan
    out = attention(query, key, value, **kinds, backend="cuda")[:, :, :rows]
    assert torch.equal(out, expected)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cuda_bits_are_those_of_an_entry(dtype: torch.dtype) -> None:
    """One entry's segments are scattered, the other's lie together, and prefixes differ."""
    query, key, value = (torch.randn(2, 3, 150, 16).to(dtype) for _ in range(3))
    ids, prefix = torch.randint(0, 3, (2, 150)), torch.tensor([20, 110])
    ids[1] = ids[1].sort().values

    def run(*entries: Any) -> Any:
        own = [t[entries] if entries else t for t in (query, key, value, ids, prefix)]
        return attention(
            *own[:3], segment_ids_q=own[3], segment_ids_k=own[3], prefix_len=own[4],
            is_causal=True, window=(60, None), sinks=SLOPES, softcap=0.9, backend="cuda",
        )  # fmt: skip

    whole = run()
    for entry in range(2):
        assert torch.equal(run(slice(entry, entry + 1))[0], whole[entry])


@pytest.mark.parametrize(
    ("backend", "length"), [pytest.param("cpu", 300, marks=needs_native), ("triton", 100)]
)
def test_bits_are_those_of_an_entry_and_of_any_threads(backend: str, length: int) -> None:
    """One entry's segments are scattered, the other's lie together."""
    query, key, value = (torch.randn(2, 3, length, 16, requires_grad=True) for _ in range(3))
    ids = torch.randint(0, 3, (2, length))
    ids[1] = ids[1].sort().values
    sinks = torch.randn(3, requires_grad=True)

    def run(*entries: Any) -> tuple[Tensor, ...]:
        own = [t[entries] if entries else t for t in (query, key, value, ids)]
        out = attention(
            *own[:3], segment_ids_q=own[3], segment_ids_k=own[3], sinks=sinks, backend=backend
        )
        return out, *torch.autograd.grad(out.square().sum(), (sinks, query, key, value))

    whole = run()
    torch.set_num_threads(1)
    for found, expected in zip(run(), whole, strict=True):
        assert torch.equal(found, expected)
    for entry in range(2):
        out, _, *gradients = run(slice(entry, entry + 1))
        assert torch.equal(out[0], whole[0][entry])
        for found, expected in zip(gradients, whole[2:], strict=True):
            assert torch.equal(found[entry], expected[entry])


@needs_native
def test_heads_that_are_taken_some_at_a_time() -> None:
    """Indices of each score beyond 16 MB of numbers, of grouped heads with all that heads have."""
    query, key, value = (torch.randn(1, heads, n, 4) for heads, n in ((6, 900), (3, 800), (3, 800)))
    table, sinks = torch.randn(6, 9), torch.randn(6)
    index, runs = torch.randint(9, (900, 800)), []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(3)
        given = [t.detach().to(dtype).requires_grad_() for t in (query, key, value, table, sinks)]
        out = attention(
            *given[:3], torch.zeros(6, 1, 800), 0.2, enable_gqa=True, position_table=given[3],
            position_index=index, sinks=given[4], alibi_slopes=torch.arange(6.0) / 100,
            backend=backend,
        )  # fmt: skip
        found = (out, *torch.autograd.grad(out.square().sum(), given))
        runs.append([t.float() for t in found])
    assert_close(*runs)


@pytest.mark.parametrize("size", [(90, 40), (129,)])
def test_tables_of_stretches_of_queries(size: tuple[int, ...], monkeypatch: Any) -> None:
    """Triton's gradient of a table where one tile of queries is all that has room at once."""
    positions = pytest.importorskip("fastfusion.kernels.attention.positions")
    from fastfusion.kernels.host import plan

    tensors = [torch.randn(2, 4, 90, 16), *(torch.randn(2, 2, 40, 16) for _ in range(2))]
    table, index, given = torch.randn(4, 37), torch.randint(37, size), torch.randn(2, 4, 90, 16)

    def run(backend: str, dtype: torch.dtype) -> Tensor:
        number = table.to(dtype).requires_grad_()
        out = attention(
            *(t.to(dtype) for t in tensors), enable_gqa=True, position_table=number,
            position_index=index, backend=backend,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(out, number, given.to(dtype))
        return gradient

    whole, expected = run("triton", torch.float32), run("reference", torch.float64)
    monkeypatch.setattr(positions, "MOST_SCORES", 1)
    plan.forget()
    parts, again = run("triton", torch.float32), run("triton", torch.float32)
    plan.forget()
    assert_close(whole, expected.float())
    assert_close(parts, expected.float())
    assert torch.equal(parts, again)


@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_entries_that_are_not_there(backend: str) -> None:
    for wrong in (-1, 4):
        given = {"position_table": torch.zeros(3, 4), "position_index": torch.full((11,), wrong)}
        with pytest.raises(ValueError, match=f"from 0 to 3.*got {wrong} to {wrong}"):
            attention(*qkv(), **given, backend=backend)


@needs_cuda
def test_entries_that_are_not_there_on_a_gpu() -> None:
    """Nothing is read outside of the table: what goes with them is NaN, and no other row."""
    index = torch.zeros(5, 7, dtype=torch.long)
    index[1, 2], index[3, 0] = 4, -1
    given = {"position_table": torch.zeros(3, 4), "position_index": torch.zeros_like(index)}
    for dtype in (torch.float32, torch.float16):
        call = spec.OP.call(*(t.to(dtype) for t in qkv()), **given)
        run = torch.ops.fastfusion.cuda_attention_forward.default
        out, _ = run(*call._replace(position_index=index))
        assert out[:, :, [1, 3]].isnan().all() and out[:, :, [0, 2, 4]].isfinite().all()


def exported(module: torch.nn.Module) -> Any:
    """The program of a module that attends, for other lengths than `qkv()` has."""
    q_len, kv_len = torch.export.Dim("q_len"), torch.export.Dim("kv_len")
    shapes = ({2: q_len}, {2: kv_len}, {2: kv_len})
    program = torch.export.export(module, qkv(), dynamic_shapes=shapes)
    assert "fastfusion.attention" in program.graph_module.code
    return program.module()


@needs_native
class TestTransforms:
    @kinds
    def test_opcheck(self, kinds: Any) -> None:
        for gradient in (False, True):
            call = spec.OP.call(*qkv(gradient=gradient), **kinds)
            operators = torch.ops.fastfusion
            ops = (operators.attention,) if gradient else (operators.attention_forward,)
            for op in ops:
                torch.library.opcheck(op.default, tuple(call))

    def test_opcheck_of_triton(self) -> None:
        call = spec.OP.call(*qkv(), **KINDS[-4], **KINDS[-3], **KINDS[-2])
        op = torch.ops.fastfusion.triton_attention_backward.default
        torch.library.opcheck(op, (torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5), False, *call))

    @kinds
    @pytest.mark.parametrize("gradient", [False, True])
    def test_compile(self, kinds: Any, gradient: bool) -> None:
        tensors = qkv(gradient=gradient)
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        out, expected = compiled(*tensors, **kinds), reference(*tensors, **kinds)
        assert_close(out, expected)
        if gradient:
            given = torch.randn_like(out)
            assert_close(
                torch.autograd.grad(out, tensors, given),
                torch.autograd.grad(expected, tensors, given),
            )

    @kinds
    def test_export(self, kinds: Any) -> None:
        # Those of segments and positions are of one length.
        kinds = {k: v for k, v in kinds.items() if not k.startswith(("segment", "position"))}

        class Module(torch.nn.Module):
            def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                out: Tensor = attention(query, key, value, **kinds)
                return out

        others = qkv(9, 11)
        assert_close(exported(Module())(*others), reference(*others, **kinds))

    @kinds
    def test_vmap(self, kinds: Any) -> None:
        tensors = [torch.randn(4, *t.shape) for t in qkv()]
        assert_close(
            torch.vmap(lambda *t: attention(*t, **kinds))(*tensors),
            torch.stack([reference(*t, **kinds) for t in zip(*tensors, strict=True)]),
        )

    @kinds
    def test_func_grad(self, kinds: Any) -> None:
        def loss(function: Any) -> Any:
            return lambda *t: function(*t, **kinds).sin().sum()

        tensors = qkv()
        assert_close(
            torch.func.grad(loss(attention), (0, 1, 2))(*tensors),
            torch.func.grad(loss(reference), (0, 1, 2))(*tensors),
        )

    def test_vmap_over_segments(self) -> None:
        tensors, ids = qkv(), (torch.randint(0, 3, (4, 2, 5)), torch.randint(0, 3, (4, 2, 7)))
        for dim in (None, 0):  # of the ids of queries

            def attend(*each: Tensor) -> Any:
                return attention(*tensors, segment_ids_q=each[0], segment_ids_k=each[1])

            given = ids[0][0] if dim is None else ids[0], ids[1]
            expected = [
                attend(given[0] if dim is None else given[0][i], given[1][i]) for i in range(4)
            ]
            assert_close(torch.vmap(attend, (dim, 0))(*given), torch.stack(expected))

    def test_gradients_of_sinks(self) -> None:
        """First and second ones, through log-sum-exps too, eagerly, in torch.func and vmapped."""
        tensors, sinks = qkv(gradient=True), torch.randn(3, requires_grad=True)
        loss_weights = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5)

        def loss(run: Any, sinks: Tensor, *tensors: Tensor) -> Tensor:
            results = run(*tensors, window=(1, 1), sinks=sinks, return_lse=True)
            total: Tensor = sum(
                (r * w).sin().sum() for r, w in zip(results, loss_weights, strict=True)
            )
            return total

        found, expected = (
            torch.autograd.grad(loss(run, sinks, *tensors), (sinks, *tensors), create_graph=True)
            for run in (attention, reference)
        )
        assert_close(found, expected)
        second, expected_second = (
            torch.autograd.grad(sum(g.cos().sum() for g in gradients), (sinks, *tensors))
            for gradients in (found, expected)
        )
        assert_close(second, expected_second)
        gradient = torch.func.grad(lambda s, *t: loss(attention, s, *t), (0, 1))
        assert_close(gradient(sinks, *tensors), tuple(expected[:2]))
        several = torch.stack((sinks, sinks + 1.0)).detach()
        assert_close(
            torch.vmap(lambda s: gradient(s, *tensors)[0])(several)[0], expected[0].detach()
        )
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        assert_close(
            torch.autograd.grad(compiled(attention, sinks, *tensors), (sinks, *tensors)), expected
        )

    @pytest.mark.parametrize("size", [(5, 7), (11,)])
    def test_gradients_of_position_tables(self, size: tuple[int, ...]) -> None:
        """First and second ones beside those of sinks, and under what torch does to them."""
        tensors, table = qkv(gradient=True), torch.randn(3, 4, requires_grad=True)
        index, sinks = torch.randint(4, size), torch.randn(3, requires_grad=True)
        weight = torch.randn(2, 3, 5, 6)

        def loss(run: Any, table: Tensor, sinks: Tensor, *tensors: Tensor) -> Tensor:
            out = run(*tensors, sinks=sinks, position_table=table, position_index=index)
            total: Tensor = (out * weight).sin().sum()
            return total

        given = (table, sinks, *tensors)
        found, expected = (
            torch.autograd.grad(loss(run, *given), given, create_graph=True)
            for run in (attention, reference)
        )
        assert_close(found, expected)
        second, expected_second = (
            torch.autograd.grad(sum(g.cos().sum() for g in gradients), given)
            for gradients in (found, expected)
        )
        assert_close(second, expected_second)
        gradient = torch.func.grad(lambda *t: loss(attention, *t), (0, 1, 2))
        assert_close(gradient(*given), tuple(expected[:3]))
        several = torch.stack((table, table + 1.0)).detach()
        assert_close(
            torch.vmap(lambda t: gradient(t, *given[1:])[0])(several)[0], expected[0].detach()
        )
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        assert_close(torch.autograd.grad(compiled(attention, *given), given), expected)

    def test_vmap_over_position_indices(self) -> None:
        tensors, table = qkv(), torch.randn(3, 4)
        several = torch.randint(4, (4, 5, 7))

        def attend(index: Tensor) -> Any:
            return attention(*tensors, position_table=table, position_index=index)

        assert_close(torch.vmap(attend)(several), torch.stack([attend(i) for i in several]))

    def test_export_of_buckets(self) -> None:
        """For lengths that differ, as of T5."""
        table = torch.randn(3, 32)

        class Module(torch.nn.Module):
            def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                index = ff.positions.t5_buckets(query.shape[2], key.shape[2])
                out: Tensor = attention(
                    query, key, value, position_table=table, position_index=index
                )
                return out

        others = qkv(9, 11)
        assert_close(exported(Module())(*others), Module()(*others))

    def test_second_derivatives(self) -> None:
        tensors = [t.double().detach().requires_grad_() for t in qkv(3, 4)]
        assert torch.autograd.gradgradcheck(
            lambda *t: attention(*t, window=(1, 1), softcap=0.9), tensors
        )

    def test_autocast(self) -> None:
        tensors = qkv()
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(*tensors, window=(2, 1), softcap=0.9, alibi_slopes=SLOPES)
        assert out.dtype == torch.bfloat16
        expected = reference(*tensors, window=(2, 1), softcap=0.9, alibi_slopes=SLOPES)
        assert_close(out.float(), expected, atol=0.05, rtol=0.05)


class TestChoice:
    def test_slopes_that_learn_go_to_the_reference(self) -> None:
        tensors, slopes = qkv(), SLOPES.clone().requires_grad_()
        explained = ff.explain(ff.scaled_dot_product_attention, *tensors, alibi_slopes=slopes)
        assert explained.chosen == "reference"
        assert "the gradient of alibi_slopes is left to the reference" in str(explained)
        distance = (torch.arange(5)[:, None] - torch.arange(7)).abs()
        bias = -slopes[:, None, None] * distance
        given = torch.randn(2, 3, 5, 6)
        assert_close(
            torch.autograd.grad(attention(*tensors, alibi_slopes=slopes), slopes, given),
            torch.autograd.grad(reference(*tensors, bias), slopes, given),
        )

    @pytest.mark.parametrize("op", [
        pytest.param("attention_forward", marks=needs_native),
        pytest.param("cuda_attention_forward", marks=needs_cuda),
    ])  # fmt: skip
    def test_compiled_ops_check_what_they_are_given(self, op: str) -> None:
        call = spec.OP.call(*qkv(), alibi_slopes=SLOPES)
        run = getattr(torch.ops.fastfusion, op).default
        # Those of a GPU are not read where kernels are launched.
        indices = (torch.full((11,), 2), torch.full((5, 7), -1)) if "cuda" not in op else ()
        for wrong in (
            {"alibi_slopes": SLOPES}, {"alibi_slopes": SLOPES.double().expand(2, 3)},
            {"alibi_slopes": torch.rand(3, 3)}, {"softcap": 0.0}, {"softcap": float("nan")},
            {"segment_ids_q": torch.zeros(2, 5).long()}, {"prefix_len": torch.ones(2).long()},
            {"segment_ids_q": torch.zeros(2, 5).int(), "segment_ids_k": torch.zeros(2, 7).long()},
            {"segment_ids_q": torch.zeros(2, 5).long(), "segment_ids_k": torch.zeros(2, 5).long()},
            {"prefix_len": torch.ones(3).long(), "is_causal": True}, {"sinks": torch.zeros(2)},
            {"sinks": torch.zeros(3).double()}, {"position_table": torch.zeros(3, 2)},
            *({"position_table": torch.zeros(3, 2), "position_index": index} for index in indices),
            {"position_table": torch.zeros(3, 0), "position_index": torch.zeros(5, 7).long()},
            {"position_table": torch.zeros(3, 2), "position_index": torch.zeros(12).long()},
            {"position_table": torch.zeros(3, 2), "position_index": torch.zeros(7, 5).long()},
            {"position_table": torch.zeros(3, 2), "position_index": torch.zeros(5, 7).int()},
            {"position_table": torch.zeros(2, 2), "position_index": torch.zeros(5, 7).long()},
        ):  # fmt: skip
            match = "softcap|alibi_slopes|segment|prefix|sinks|position"
            with pytest.raises(RuntimeError, match=match):
                run(*call._replace(**wrong))


@pytest.mark.parametrize("bottom_right", [False, True])
@pytest.mark.parametrize("lengths", [(5, 7), (9, 4), (1, 6), (6, 6), (0, 3), (4, 0)])
def test_scores_of_a_window_are_counted(lengths: tuple[int, int], bottom_right: bool) -> None:
    q_len, kv_len = lengths
    alignment = "bottom_right" if bottom_right else "top_left"
    for window in ((0, 0), (2, 1), (None, 2), (3, None), (50, 50)):
        for is_causal in (False, True):
            options = {"window": window, "is_causal": is_causal, "causal_alignment": alignment}
            call = spec.OP.call(*qkv(q_len, kv_len), **options)
            expected = int(seen(q_len, kv_len, **options, backend="reference").sum())
            assert scores_seen(call, q_len, kv_len) == expected


@needs_native
def test_flops_count_what_a_window_shows() -> None:
    query, key, value = qkv(6, 6)
    with FlopCounterMode(display=False) as counter:
        attention(query, key, value, window=(1, 0))
    assert counter.get_total_flops() == 2 * 2 * 3 * 11 * (8 + 6)


@needs_native
def test_memory_of_a_window_is_linear() -> None:
    """Forward and backward of a capped window with a table over 8,192 tokens, within 64 MB."""
    code = """
import resource, torch, fastfusion as ff
torch.set_num_threads(1)
def run(n):
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
    table = torch.randn(1, 32, requires_grad=True)
    ff.scaled_dot_product_attention(
        q, k, v, window=(64, 64), softcap=5.0, backend="cpu", position_table=table,
        position_index=ff.positions.t5_buckets(n, n),
    ).sum().backward()
run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(8192)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024
