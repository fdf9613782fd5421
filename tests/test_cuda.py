"""The CUDA C++ kernels as torch ops: on a GPU, and on the CPU in the emulator.

What they compute is the shared suite's (tests/ops); here is how torch sees them, what they refuse,
and that no order of the emulator changes a bit.
"""

import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from suite import DEVICE, DTYPES
from torch import Tensor
from torch.testing import assert_close

import fastfusion as ff
from fastfusion.backends import cuda, triton
from fastfusion.ops import bidirectional_attention, scaled_dot_product_attention

needs_kernels = pytest.mark.skipif(
    cuda.unavailable() is not None, reason=f"no CUDA kernels: {cuda.unavailable()}"
)
needs_emulator = pytest.mark.skipif(cuda.emulated is None, reason="runs in the emulator")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")

PADDING = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])
MASKS = (None, torch.randn(3, 5, 7), torch.rand(5, 7) > 0.2)
RAW = torch.ops.fastfusion
# Masks, whether causal and from where, scale, enable_gqa, and other kinds.
OPTIONS = {
    "attention": (None, None, None, None, 0.0, False, False, None, False, None, None, None),
    "bidirectional": (None, None, None, None, None, 0.0, False, False, None, None, None, None),
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def qkv() -> tuple[Tensor, ...]:
    return tuple(torch.randn(size) for size in ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)))


def both() -> tuple[Tensor, ...]:
    return (*qkv(), torch.randn(2, 3, 5, 4))


def attention(*tensors: Tensor, backend: str = "cuda", **options: Any) -> Any:
    return ff.scaled_dot_product_attention(*tensors, backend=backend, **options)


def bidirectional(*tensors: Tensor, backend: str = "cuda", **options: Any) -> Any:
    return ff.bidirectional_attention(*tensors, backend=backend, **options)


EACH = pytest.mark.parametrize(
    ("run", "make", "name"),
    [(attention, qkv, "attention"), (bidirectional, both, "bidirectional")],
    ids=["attention", "bidirectional"],
)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@needs_kernels
class TestAsTorchOps:
    @pytest.mark.parametrize("mask", MASKS, ids=["none", "float", "bool"])
    @pytest.mark.parametrize("padding", [None, PADDING], ids=["all", "padded"])
    def test_opcheck(self, mask: Any, padding: Any) -> None:
        for kind in ("forward", "out"):
            op = getattr(RAW, f"cuda_attention_{kind}").default
            rest = (None, None, 0.0, True, True, 0.3, False, None, None, None)
            torch.library.opcheck(op, (*qkv(), mask, padding, *rest))
            op = getattr(RAW, f"cuda_bidirectional_{kind}").default
            rest = (None, None, 0.0, True, False, None, None, None, None)
            torch.library.opcheck(op, (*both(), mask, None, padding, *rest))

    def test_opcheck_of_kinds(self) -> None:
        call = scaled_dot_product_attention.OP.call(
            *qkv(), window=(2, None), is_causal=True, softcap=0.9, alibi_slopes=torch.rand(3),
            segment_ids_q=torch.randint(0, 2, (2, 5)), segment_ids_k=torch.randint(0, 2, (2, 7)),
            prefix_len=torch.tensor([3, 6]), sinks=torch.randn(3),
        )  # fmt: skip
        torch.library.opcheck(RAW.cuda_attention_out.default, tuple(call))

    @EACH
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_fakes_have_the_shapes_and_strides(
        self, run: Any, make: Any, name: str, dtype: torch.dtype
    ) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        tensors = [t.to(dtype) for t in make()]
        options = OPTIONS[name]
        for kind in ("forward", "out"):
            op = getattr(RAW, f"cuda_{name}_{kind}").default
            with FakeTensorMode() as mode:
                fakes = as_tuple(op(*map(mode.from_tensor, tensors), *options))
            for real, fake in zip(as_tuple(op(*tensors, *options)), fakes, strict=True):
                assert (real.shape, real.stride()) == (fake.shape, fake.stride())
                assert (real.dtype, real.device) == (fake.dtype, fake.device)
                assert real.dim() == 3 or real.transpose(1, 2).is_contiguous()

    @EACH
    @pytest.mark.parametrize("return_lse", [False, True])
    @pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
    def test_compile(self, run: Any, make: Any, name: str, return_lse: bool, guard: Any) -> None:
        """One graph with one op of ours, which computes the lse where it is wanted."""
        targets: list[str] = []

        def watch(graph: torch.fx.GraphModule, _: Any) -> Any:
            targets.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        tensors = make()
        with guard():
            torch.compile(run, fullgraph=True, backend=watch)(*tensors, return_lse=return_lse)
            expected = run(*tensors, return_lse=return_lse)
            for backend in ("aot_eager", "inductor"):
                torch._dynamo.reset()
                compiled = torch.compile(run, fullgraph=True, backend=backend)
                assert_close(compiled(*tensors, return_lse=return_lse), expected)
        ours = [t for t in targets if t.startswith("fastfusion.")]
        assert ours == [f"fastfusion.cuda_{name}_{'forward' if return_lse else 'out'}.default"]

    @EACH
    def test_compiles_once_for_all_lengths(self, run: Any, make: Any, name: str) -> None:
        from torch._dynamo.testing import CompileCounter

        counter = CompileCounter()
        compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
        op = scaled_dot_product_attention if name == "attention" else bidirectional_attention
        with torch.no_grad():
            for q_len, kv_len in ((20, 36), (9, 50), (31, 7)):
                shape = {"batch": 2, "heads": 3, "q_len": q_len, "kv_len": kv_len, "head_dim": 8}
                tensors = tuple(op.inputs(shape, torch.float32).values())
                assert_close(compiled(*tensors), run(*tensors))
        assert counter.frame_count == 1

    @EACH
    def test_export(self, run: Any, make: Any, name: str) -> None:
        class Module(torch.nn.Module):
            def forward(self, *tensors: Tensor) -> Any:
                return run(*tensors)

        tensors = make()
        with torch.no_grad():
            program = torch.export.export(Module(), tensors)
        assert f"fastfusion.cuda_{name}_out" in str(program.graph)
        assert_close(program.module()(*tensors), run(*tensors))
        with pytest.raises(RuntimeError, match="may need gradients"):
            torch.export.export(Module(), tensors)

    @EACH
    def test_transforms_are_the_references(self, run: Any, make: Any, name: str) -> None:
        first, *rest = make()

        def loss(query: Tensor, backend: str) -> Tensor:
            results = run(query, *rest, backend=backend, return_lse=True)
            return sum(r.sin().sum() for r in results)

        stacked = torch.stack([first, first + 1])
        assert_close(
            torch.vmap(lambda q: loss(q, "cuda"))(stacked),
            torch.stack([loss(q, "reference") for q in stacked]),
        )
        tangents = [
            torch.func.jvp(lambda q, chosen=backend: loss(q, chosen), (first,), (first,))[1]
            for backend in ("cuda", "reference")
        ]
        assert_close(*tangents)
        with pytest.raises(ff.BackendUnavailableError, match="gradients"):
            torch.func.grad(loss)(first, "cuda")

    @EACH
    def test_autocast(self, run: Any, make: Any, name: str) -> None:
        tensors = make()
        with torch.autocast(DEVICE, torch.float16):
            results = as_tuple(run(*tensors))
        expected = as_tuple(run(*(t.half() for t in tensors)))
        assert all(map(torch.equal, results, expected))

    @EACH
    def test_traces(self, run: Any, make: Any, name: str) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx

        tensors = make()
        expected = run(*tensors)
        with torch.no_grad():
            assert_close(torch.jit.trace(lambda *t: run(*t), tensors)(*tensors), expected)
            graph = make_fx(lambda *t: run(*t), tracing_mode="symbolic")(*tensors)
        assert f"fastfusion.cuda_{name}_out" in str(graph.graph)
        assert_close(graph(*tensors), expected)

    @EACH
    def test_flops_are_counted(self, run: Any, make: Any, name: str) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        tensors = make()
        for return_lse in (False, True):
            with FlopCounterMode(display=False) as counter:
                run(*tensors, return_lse=return_lse)
            dims = 8 + 6 + (0 if name == "attention" else 4)
            assert counter.get_total_flops() == 2 * 2 * 3 * 5 * 7 * dims

    def test_many_threads(self) -> None:
        tensors = qkv()
        expected = attention(*tensors)
        results: list[Tensor] = []

        def work() -> None:
            results.extend(attention(*tensors) for _ in range(20))

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(results) == 80 and all(torch.equal(r, expected) for r in results)

    @needs_gpu
    def test_cuda_graph_and_streams(self) -> None:
        """Captured on a stream of its own, and with splits, which need a workspace."""
        for q_len, kv_len in ((20, 36), (4, 4000)):
            call = scaled_dot_product_attention.inputs(
                {"heads": 4, "q_len": q_len, "kv_len": kv_len, "head_dim": 64}, torch.float16
            )
            with torch.no_grad():
                expected = attention(**call)
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    attention(**call)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = attention(**call)
            out.zero_()
            for _ in range(3):
                graph.replay()
            assert torch.equal(out, expected)


@needs_kernels
class TestRawOpsCheck:
    """What a compiled program could hand over without Python in between."""

    WRONG = {
        "rank": (0, lambda t: t[0]),
        "key batch": (1, lambda t: t[:1]),
        "key dim": (1, lambda t: t[..., :4]),
        "value heads": (2, lambda t: t[:, :2]),
        "value length": (2, lambda t: t[:, :, :4]),
        "value dtype": (2, lambda t: t.half()),
        "float64": (slice(0, 3), lambda t: t.double()),
        "head dim": (slice(0, 2), lambda t: t.repeat(1, 1, 1, 40)),
        "value dim": (2, lambda t: t.repeat(1, 1, 1, 50)),
        "meta": (2, lambda t: t.to("meta")),
    }

    @EACH
    @pytest.mark.parametrize("wrong", WRONG)
    def test_tensors(self, run: Any, make: Any, name: str, wrong: str) -> None:
        where, change = self.WRONG[wrong]
        tensors = list(make())
        chosen = range(3)[where] if isinstance(where, slice) else [where]
        for index in chosen:
            tensors[index] = change(tensors[index])
        for kind in ("forward", "out", "path"):
            with pytest.raises((RuntimeError, NotImplementedError)):
                getattr(RAW, f"cuda_{name}_{kind}")(*tensors, *OPTIONS[name])

    def test_masks_and_numbers(self) -> None:
        bad = [
            {"attn_mask": torch.randn(2, 3, 5, 6)},
            {"attn_mask": torch.randn(1, 2, 3, 5, 7)},
            {"attn_mask": torch.randn(5, 7).double()},
            {"key_padding_mask": torch.zeros(2, 6, dtype=torch.bool)},
            {"key_padding_mask": torch.zeros(2, 7)},
            {"scale": float("nan")},
        ]
        given = dict.fromkeys(("attn_mask", "key_padding_mask", "scale"))
        given |= {"is_causal": False, "bottom_right": False}
        for change in bad:
            with pytest.raises(RuntimeError):
                RAW.cuda_attention_out(*qkv(), **{**given, **change}, enable_gqa=False)
        query, key, value = qkv()
        with pytest.raises(RuntimeError, match="enable_gqa"):
            query = torch.randn(2, 6, 5, 8)
            RAW.cuda_attention_out(query, key, value, **given, enable_gqa=False)
        tensors = both()
        with pytest.raises(RuntimeError, match="query_value"):
            RAW.cuda_bidirectional_out(
                *tensors[:3], tensors[3][:, :, :4], *OPTIONS["bidirectional"]
            )
        with pytest.raises(RuntimeError, match="padding"):
            hidden = torch.zeros(2, 7, dtype=torch.bool)
            RAW.cuda_bidirectional_out(*tensors, None, hidden, *OPTIONS["bidirectional"][2:])


def reasons(function: Any, *tensors: Tensor, **options: Any) -> tuple[str, ...]:
    """Why the CUDA kernels do not take a call."""
    return dict(ff.explain(function, *tensors, **options).rows)["cuda"]


@needs_kernels
class TestRefusals:
    def test_each_reason(self) -> None:
        sdpa, two = ff.scaled_dot_product_attention, ff.bidirectional_attention
        query, key, value = qkv()
        wide = torch.randn(1, 1, 4, 257)
        gradient = (query.clone().requires_grad_(), key, value)
        bias = torch.randn(5, 7, requires_grad=True)
        left = "are left to Triton and the reference"
        assert reasons(sdpa, query, key, value) == ()
        expected = ("float64 is left to the reference",)
        assert reasons(sdpa, query.double(), key.double(), value.double()) == expected
        assert reasons(two, *(t.double() for t in both())) == expected
        expected = ("head dims above 256 are left to the reference",)
        assert reasons(sdpa, wide, wide, wide[..., :8]) == expected
        assert reasons(sdpa, wide[..., :8], wide[..., :8], wide) == expected
        assert reasons(two, *[wide[..., :8]] * 3, wide) == expected
        expected = ("dropout is left to Triton and the reference",)
        assert reasons(sdpa, query, key, value, dropout_p=0.1) == expected
        assert reasons(two, *both(), dropout_p=0.1) == expected
        assert reasons(sdpa, *gradient) == (f"gradients {left}",)
        assert reasons(sdpa, query, key, value, bias) == (f"gradients {left}",)
        assert reasons(two, *both(), attn_mask=bias) == (f"gradients {left}",)
        assert reasons(two, *both()[:3], both()[3].requires_grad_()) == (f"gradients {left}",)
        with torch.no_grad():
            assert reasons(sdpa, *gradient) == reasons(two, *both(), attn_mask=bias) == ()
        meta = [t.to("meta") for t in qkv()]
        assert reasons(sdpa, *meta) == ("the inputs are on meta",)
        assert len(reasons(sdpa, *(t.double() for t in gradient), dropout_p=0.5)) == 3

    @pytest.mark.parametrize(
        ("capability", "says", "bfloat16"),
        [
            (0, "driver is older", "driver is older"),
            (70, "older than Turing", "older than Turing"),
            (75, None, "bfloat16 needs a GPU of compute capability 8.0"),
            (80, None, None),
            (121, None, None),
        ],
    )
    def test_devices(
        self, capability: int, says: Any, bfloat16: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensors = qkv()
        monkeypatch.setitem(cuda._capabilities, tensors[0].get_device(), capability)
        for dtype, words in ((torch.float32, says), (torch.bfloat16, bfloat16)):
            said = reasons(ff.scaled_dot_product_attention, *(t.to(dtype) for t in tensors))
            assert len(said) == (words is not None) and (words is None or words in said[0])

    def test_what_runs_says_how(self) -> None:
        for function, make in ((attention, qkv), (bidirectional, both)):
            public = getattr(ff, scaled_dot_product_attention.OP.name)
            if function is bidirectional:
                public = ff.bidirectional_attention
            explanation = ff.explain(public, *make(), backend="cuda")
            assert explanation.chosen == "cuda" and explanation.path

    @needs_emulator
    def test_the_emulator_is_never_chosen(self) -> None:
        explanation = ff.explain(ff.scaled_dot_product_attention, *qkv())
        assert explanation.chosen == "cpu" and dict(explanation.rows)["cuda"] == ()
        assert ff.info().backends["cuda"] is None

    def test_place_among_the_implementations(self) -> None:
        orders = {
            scaled_dot_product_attention.OP: ["cuda", "triton", "reference"],
            bidirectional_attention.OP: ["triton", "cuda", "reference"],
        }
        for op, order in orders.items():
            assert [i.backend for i in op.implementations][1:] == order
            assert not next(i for i in op.implementations if i.backend == "cuda").differentiable

    def test_leaves_long_calls_to_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where both could run; compiled code does not ask for lengths."""
        monkeypatch.setattr(cuda, "emulates", lambda query: False)
        monkeypatch.setattr(triton, "refuses", lambda *given: ())

        def waits(q_len: int, kv_len: int, dim: int = 64, dtype: Any = torch.bfloat16) -> bool:
            query, key = (torch.empty(1, 2, n, dim, dtype=dtype) for n in (q_len, kv_len))
            call = scaled_dot_product_attention.OP.call(query, key, key)
            return scaled_dot_product_attention._cuda_waits(call)

        assert not waits(20, 36) and not waits(32, 257) and not waits(1, 1500)
        assert not waits(197, 197) and not waits(900, 256) and not waits(4096, 77)
        assert waits(1500, 1500) and waits(20, 600) and waits(100, 1050) and waits(4096, 129)
        assert waits(20, 36, 6) and waits(20, 36, dtype=torch.float32)
        monkeypatch.setattr(triton, "refuses", lambda *given: ("not installed",))
        assert not waits(1500, 1500)


@needs_kernels
@pytest.mark.parametrize("lengths", [(20, 36), (3, 200), (70, 130)], ids=["all", "slices", "tiles"])
@pytest.mark.parametrize("scale", [0.25, 0.0, -0.25, 2.0**-40, 2.0**40])
def test_scales(lengths: tuple[int, int], scale: float) -> None:
    """Scales up to 2^32 are part of an fma with log2(e); a negative or an extreme one takes kernels
    in natural units, as a mask does. Padding and a diagonal hide keys in either."""
    q_len, kv_len = lengths
    sizes = {"batch": 2, "heads": 2, "q_len": q_len, "kv_len": kv_len, "head_dim": 40}
    call = scaled_dot_product_attention.inputs(sizes, torch.float16)
    call |= {"scale": scale, "is_causal": True, "causal_alignment": "bottom_right"}
    call["key_padding_mask"] = torch.rand(2, kv_len, device=call["query"].device) < 0.3
    exact_call = {k: v.double() if k in ("query", "key", "value") else v for k, v in call.items()}
    exact, exact_lse = attention(**exact_call, backend="reference", return_lse=True)
    out, lse = attention(**call, return_lse=True)
    assert_close(out.double(), exact, rtol=4e-3, atol=2e-3)
    assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("head_dim", [20, 64, 96])
@pytest.mark.parametrize(
    "lengths",
    [(1, 50), (50, 50), (20, 100), (32, 257), (64, 320), (9, 513), (33, 577), (1, 640), (2, 700)],
)
def test_few_queries_or_keys(lengths: tuple[int, int], head_dim: int) -> None:
    """All ways to cut keys into slices and chunks, where rows are aligned chunks of 16 bytes and
    where they are not; hidden keys are NaN, and a row depends on no other batch entry."""
    q_len, kv_len = lengths
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": head_dim, "mask": "key_padding"}
    call = scaled_dot_product_attention.inputs(
        {**sizes, "q_len": q_len, "kv_len": kv_len}, torch.float16
    )
    padding = call["key_padding_mask"] = torch.rand(2, kv_len, device=call["query"].device) < 0.4
    exact_call = {k: v.double() if k in ("query", "key", "value") else v for k, v in call.items()}
    exact, exact_lse = attention(**exact_call, backend="reference", return_lse=True)
    for name in ("key", "value"):
        hidden = padding[:, None, :, None].expand_as(call[name])
        call[name] = call[name].masked_fill(hidden, float("nan"))
    out, lse = attention(**call, return_lse=True)
    assert_close(out.double(), exact, rtol=4e-3, atol=2e-3)
    assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    alone = {k: v[1:] if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    assert torch.equal(attention(**alone), out[1:])


@needs_emulator
def test_no_order_changes_a_bit() -> None:
    """Blocks up and down, warps in turns and greedy, lanes up and down."""
    library = ctypes.CDLL(str(cuda.emulated))
    sizes = {"batch": 2, "heads": 2, "head_dim": 40, "value_dim": 24}
    calls: list[tuple[Any, dict[str, Any]]] = []
    for dtype in DTYPES:
        for q_len, kv_len, mask in ((20, 36, "key_padding"), (5, 700, "bias"), (70, 130, "bool")):
            shape = {**sizes, "q_len": q_len, "kv_len": kv_len, "mask": mask}
            calls.append((attention, scaled_dot_product_attention.inputs(shape, dtype)))
        for q_len, kv_len in ((20, 36), (90, 150)):
            shape = {**sizes, "q_len": q_len, "kv_len": kv_len, "mask": "both_padding"}
            two = bidirectional_attention.inputs(shape, dtype)
            calls.append((bidirectional, two))
        causal = {"is_causal": True, "causal_alignment": "bottom_right"}
        calls.append((bidirectional, {**two, **causal}))
    for run, call in calls:
        first = None
        for order in itertools.product((0, 1), repeat=3):
            library.ff_emulate_options(*order)
            results = run(**call, return_lse=True)
            first = first or results
            assert all(map(torch.equal, results, first)), order


@needs_emulator
def test_turing() -> None:
    """Kernels of sm_75, which has no bfloat16 and no asynchronous copies, in a process of their
    own."""
    assert cuda.emulated is not None
    library = cuda.emulated.parents[1] / "sm75" / cuda.emulated.name
    if not library.exists():
        pytest.skip("only one emulated library is given")
    cases = (
        "small or past_a_panel or few_and_far or everything or padding or dim_160 or bias_padding"
        " or wide_chunks or vit_577"
    )
    ops = str(Path(__file__).with_name("ops"))
    command = [sys.executable, "-m", "pytest", ops, f"--emulated={library}"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"]
    command += ["-k", f"test_accuracy and cuda and not bfloat16 and ({cases})"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


# A process with a torch that says it is a CUDA build, and what it says of the backend.
PRETENDED = """
import json, warnings
import torch
torch.version.cuda = "13.0"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastfusion as ff
query = torch.randn(1, 1, 4, 8)
out = ff.scaled_dot_product_attention(query, query, query)
print(json.dumps([ff.info().backends["cuda"], out.isfinite().all().item(),
                  [str(w.message) for w in caught if "fastfusion" in str(w.message)]]))
"""


@pytest.mark.parametrize("library", ["absent", "broken"])
def test_without_a_library(library: str, tmp_path: Path) -> None:
    """Absent it is a reason, broken it is a warning as well; all the rest works."""
    package = Path(ff.__file__).parent
    shutil.copytree(package, tmp_path / "fastfusion", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "fastfusion/_build.json").write_text('{"cpu": "no time", "cuda": "no nvcc"}')
    if library == "broken":
        (tmp_path / "fastfusion/_torch_cuda_ops.so").write_bytes(b"not a shared library")
    done = subprocess.run(
        [sys.executable, "-c", PRETENDED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reason, works, warned = json.loads(done.stdout)
    assert works
    if library == "absent":
        assert reason == "the package was built without its CUDA part: no nvcc" and warned == []
    else:
        assert "does not load" in reason and len(warned) == 1
        assert "CUDA kernels disabled" in warned[0] and reason in warned[0]


@pytest.mark.skipif(torch.version.cuda is not None, reason="about a CPU build of torch")
def test_a_cpu_build_of_torch_loads_nothing() -> None:
    code = "import fastfusion as ff; print(ff.info().backends['cuda'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "this torch is built without CUDA"
    assert cuda._load() == "this torch is built without CUDA"
