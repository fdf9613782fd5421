"""`fastfusion.cuda_graph`: when a call replays, what it copies, and when it runs the module.

On a machine without a GPU the part that needs one, `Recording`, is replaced by one for the CPU that
runs the captured call again on the same memory; everything else is the real thing.
test_cuda_graph_device.py tests that part.
"""

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfusion as ff
from fastfusion import _cuda_graph


class FakeRecording:
    """Replays by running the captured call on the static buffers into the static outputs."""

    device_type = "cpu"
    under_way = False
    events: list[str] = []

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @staticmethod
    def unavailable() -> str | None:
        return None

    @classmethod
    def busy(cls) -> bool:
        return cls.under_way

    def random_state(self) -> Tensor:
        return torch.zeros(1)

    def warm_up(self, run: Callable[[], Any]) -> None:
        for _ in range(_cuda_graph.WARM_UP):
            run()
        self.events.append("warm-up")

    def capture(self, run: Callable[[], Any]) -> Any:
        self.events.append("capture")
        self.run = run
        self.results = run()
        return self.results

    def replay(self, copy: Callable[[], None], results: Callable[[], Any]) -> Any:
        self.events.append("replay")
        copy()
        with torch.inference_mode(False), torch.no_grad():
            old, _ = torch.utils._pytree.tree_flatten(self.results)
            new, _ = torch.utils._pytree.tree_flatten(self.run())
            for before, after in zip(old, new, strict=True):
                if isinstance(before, Tensor) and not isinstance(before, nn.Parameter):
                    before.copy_(after)
        return results()


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """Wherever the other tests run; what needs a GPU says so."""
    if torch.get_default_device().type == "cpu":
        yield
    else:
        with torch.device("cpu"):
            yield


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the fake recording was asked to do, in order."""
    monkeypatch.setattr(_cuda_graph, "Recording", FakeRecording)
    FakeRecording.events = []
    FakeRecording.under_way = False
    yield FakeRecording.events


class Scores(nn.Module):
    """Counts how often Python runs it; a graph never does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None = None,
        scale: float = 1.0,
        causal: bool = False,
    ) -> Tensor:
        self.calls += 1
        scores = self.dropout(self.linear(query)) @ key.transpose(-1, -2) * scale
        if causal:
            scores = scores.tril()
        return scores if mask is None else scores.masked_fill(mask, 0.0)


QUERY, KEY = torch.randn(2, 3, 4, device="cpu"), torch.randn(2, 5, 4, device="cpu")
MASK = torch.zeros(2, 3, 5, dtype=torch.bool, device="cpu")


@pytest.fixture
def graphed(events: list[str]) -> ff.CudaGraphed:
    """A captured module; its own Python has run 4 times."""
    made = ff.cuda_graph(Scores().eval(), QUERY, KEY)
    assert made.reason is None
    assert events == ["warm-up", "capture"]
    events.clear()
    made.module.calls = 0
    return made


# ---- replays


def test_a_call_replays_with_its_own_values(graphed: ff.CudaGraphed, events: list[str]) -> None:
    query, key = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    with torch.no_grad():
        assert graphed.why_not(query, key) is None
        out = graphed(query, key)
        assert events == ["replay"]
        assert torch.equal(out, graphed.module(query, key))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_replay(
    graphed: ff.CudaGraphed, events: list[str], mode: Callable[[], Any]
) -> None:
    with mode():
        query = torch.randn(2, 3, 4)
        assert torch.equal(graphed(query, KEY), graphed.module(query, KEY))
    assert events == ["replay"]


def test_a_capture_in_inference_mode_serves_outside_of_it(events: list[str]) -> None:
    with torch.inference_mode():
        module = Scores().eval()
        made = ff.cuda_graph(module, torch.randn(2, 3, 4), torch.randn(2, 5, 4))
    with torch.no_grad():
        assert torch.equal(made(QUERY, KEY), module(QUERY, KEY))
    assert events[-1] == "replay"


def test_strides_do_not_matter(graphed: ff.CudaGraphed, events: list[str]) -> None:
    key = torch.randn(2, 4, 5).transpose(1, 2)
    query = torch.randn(1, 3, 4).expand(2, 3, 4)
    with torch.no_grad():
        assert torch.equal(graphed(query, key), graphed.module(query, key.contiguous()))
    assert events == ["replay"]


def test_results_are_copies(graphed: ff.CudaGraphed) -> None:
    with torch.no_grad():
        first = graphed(QUERY, KEY)
        kept = first.clone()
        second = graphed(2 * QUERY, KEY)
    assert torch.equal(first, kept)
    assert first.data_ptr() != second.data_ptr()


def test_results_may_be_the_memory_of_the_graph(events: list[str]) -> None:
    made = ff.cuda_graph(Scores().eval(), QUERY, KEY, clone_outputs=False)
    with torch.no_grad():
        first, second = made(QUERY, KEY), made(2 * QUERY, KEY)
        assert first is second
        assert torch.equal(first, made.module(2 * QUERY, KEY))


def test_parameters_may_change_in_place(graphed: ff.CudaGraphed, events: list[str]) -> None:
    fresh = Scores().eval()
    graphed.module.load_state_dict(fresh.state_dict())
    with torch.no_grad():
        assert torch.equal(graphed(QUERY, KEY), fresh(QUERY, KEY))
    assert events == ["replay"]


def test_constants_and_names(events: list[str]) -> None:
    module = Scores().eval()
    made = ff.cuda_graph(module, QUERY, mask=MASK, key=KEY, scale=2.0, causal=True)
    events.clear()
    given = {"key": torch.randn(2, 5, 4), "scale": 2.0, "causal": True, "mask": ~MASK}
    with torch.no_grad():
        assert torch.equal(made(QUERY, **given), module(QUERY, **given))
        assert events == ["replay"]
        for name, value in {"scale": 3.0, "causal": False, "mask": None}.items():
            other = {**given, name: value}
            assert torch.equal(made(QUERY, **other), module(QUERY, **other))
            assert "in the capture it was" in str(made.why_not(QUERY, **other))
        # 1 == True, but the types decide what Python did.
        assert made.why_not(QUERY, **{**given, "causal": 1}) is not None
        positional = (QUERY, given["key"], given["mask"], 2.0, True)
        assert made.why_not(*positional) == (
            "the arguments are nested or named otherwise than in the capture"
        )
        assert torch.equal(made(*positional), module(*positional))
    assert events == ["replay"]


class Nested(nn.Module):
    """Arguments and results in containers."""

    def forward(self, pair: tuple[Tensor, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        left, right = pair
        return {"sum": left + right, "more": [left * options["factor"], None, "text"]}


def test_containers(events: list[str]) -> None:
    left, right = torch.randn(3), torch.randn(3)
    made = ff.cuda_graph(Nested(), (QUERY[0, 0], KEY[0, 0]), {"factor": torch.ones(1)})
    assert made.reason is None
    events.clear()
    pair = (torch.randn(4), torch.randn(4))
    out = made(pair, {"factor": torch.full((1,), 3.0)})
    assert events == ["replay"]
    assert torch.equal(out["sum"], pair[0] + pair[1])
    assert torch.equal(out["more"][0], 3 * pair[0])
    assert out["more"][1:] == [None, "text"]
    assert "nested" in str(made.why_not([*pair], {"factor": torch.ones(1)}))
    assert made.why_not((left, right), {"factor": torch.ones(1)}) is not None


def test_an_empty_container_is_no_argument(events: list[str]) -> None:
    class Module(nn.Module):
        def forward(self, nothing: tuple[()], pair: tuple[Tensor, Tensor]) -> Tensor:
            return pair[0] + pair[1]

    made = ff.cuda_graph(Module(), (), (QUERY, QUERY + 1))
    assert torch.equal(made((), (QUERY, KEY[:, :3])), QUERY + KEY[:, :3])
    assert events[-1] == "replay"


class Same(nn.Module):
    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return query + 1 if query is key else query - key


def test_one_tensor_twice_stays_one(events: list[str]) -> None:
    """A self-attention that asks `query is key` takes its packed road."""
    made = ff.cuda_graph(Same(), QUERY, QUERY)
    other, third = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    events.clear()
    assert torch.equal(made(other, other), other + 1)
    assert events == ["replay"]
    assert made.why_not(other, third) == "arguments 0 and 1 were one tensor in the capture"
    assert torch.equal(made(other, third), other - third)
    assert events == ["replay"]


def test_self_attention_of_fastfusion(events: list[str]) -> None:
    layer = ff.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    words, padding = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    made = ff.cuda_graph(layer, words, src_key_padding_mask=torch.zeros_like(padding))
    events.clear()
    with torch.inference_mode():
        out = made(words, src_key_padding_mask=padding)
        torch.testing.assert_close(out, layer(words, src_key_padding_mask=padding))
    assert events == ["replay"]


# ---- calls that the graph cannot take


@pytest.mark.parametrize(
    "query",
    [
        QUERY.new_ones(3, 3, 4),
        QUERY.double(),
        QUERY.to_sparse(),
        QUERY.to("meta"),
        QUERY.int(),
        None,
        [QUERY],
    ],
    ids=["shape", "dtype", "layout", "device", "integers", "none", "list"],
)
def test_another_kind_of_argument_runs_the_module(
    graphed: ff.CudaGraphed, events: list[str], query: Any
) -> None:
    """With the module's own errors."""
    with torch.no_grad():
        why = graphed.why_not(query, KEY)
        assert why is not None
        assert "float32[2, 3, 4] on cpu" in why
        try:
            expected = graphed.module(query, KEY)
        except Exception as error:
            with pytest.raises(type(error)):
                graphed(query, KEY)
        else:
            assert torch.equal(graphed(query, KEY), expected)
    assert events == []
    assert graphed.module.calls == 2


def test_a_gradient_runs_the_module(graphed: ff.CudaGraphed, events: list[str]) -> None:
    out = graphed(QUERY, KEY)
    assert "parameters require a gradient" in str(graphed.why_not(QUERY, KEY))
    (gradient,) = torch.autograd.grad(out.sum(), [graphed.module.linear.bias])
    assert gradient.shape == (4,)
    graphed.requires_grad_(False)
    assert graphed.why_not(QUERY, KEY) is None
    leaf = QUERY.clone().requires_grad_()
    assert graphed.why_not(leaf, KEY) == "argument 0 requires a gradient"
    assert graphed(leaf, KEY).requires_grad
    assert events == []
    assert not graphed(QUERY, KEY).requires_grad
    assert events == ["replay"]


def test_training_mode_runs_the_module(graphed: ff.CudaGraphed, events: list[str]) -> None:
    with torch.no_grad():
        graphed.train()
        assert graphed.module.dropout.training
        assert (graphed(QUERY, KEY) != graphed.eval()(QUERY, KEY)).any()
        assert events == ["replay"]
        graphed.module.dropout.train()
        assert graphed.why_not(QUERY, KEY) == "train() or eval() was called since the capture"


def test_autocast_of_another_kind_runs_the_module(
    graphed: ff.CudaGraphed, events: list[str]
) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert graphed(QUERY, KEY).dtype == torch.bfloat16
        assert graphed.why_not(QUERY, KEY) == "autocast is set otherwise than in the capture"
    assert events == []


def test_autocast_of_the_capture_replays(events: list[str]) -> None:
    module = Scores().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        made = ff.cuda_graph(module, QUERY, KEY)
        out = made(QUERY, KEY)
        assert torch.is_autocast_cache_enabled()
        assert torch.equal(out, module(QUERY, KEY))
        assert out.dtype == torch.bfloat16
    assert events == ["warm-up", "capture", "replay"]
    with torch.no_grad():
        assert made(QUERY, KEY).dtype == torch.float32


def test_moved_parameters_run_the_module(graphed: ff.CudaGraphed, events: list[str]) -> None:
    graphed.module.linear.weight.data = 2 * graphed.module.linear.weight.data
    with torch.no_grad():
        assert torch.equal(graphed(QUERY, KEY), graphed.module(QUERY, KEY))
        assert "has moved to other memory" in str(graphed.why_not(QUERY, KEY))
    assert events == []


def test_inside_another_capture_the_module_runs(graphed: ff.CudaGraphed, events: list[str]) -> None:
    FakeRecording.under_way = True
    with torch.no_grad():
        graphed(QUERY, KEY)
        assert graphed.why_not(QUERY, KEY) == "another capture is under way"
    assert events == []


def test_transforms_run_the_module(graphed: ff.CudaGraphed, events: list[str]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad():
        out = torch.vmap(graphed)(QUERY[None], KEY[None])
        assert torch.equal(out[0], graphed.module(QUERY, KEY))
        with FlopCounterMode(display=False) as counter:
            graphed(QUERY, KEY)
        assert counter.get_total_flops() > 0
        _, tangent = torch.func.jvp(graphed, (QUERY, KEY), (QUERY, KEY))
        assert tangent.shape == (2, 3, 5)
    assert events == []


def test_attention_maps_run_the_module(events: list[str]) -> None:
    attention = ff.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    words = torch.randn(2, 5, 16)
    made = ff.cuda_graph(attention, words, words, words)
    events.clear()
    with torch.no_grad():
        expected = attention(words, words, words)[1]
        for model in (attention, made):
            with ff.attention_maps(model) as maps:
                made(words, words, words)
            (weights,) = maps.values()
            torch.testing.assert_close(weights, expected)
        assert events == []
        made(words, words, words)
    assert events == ["replay"]


def test_compiled_code_sees_the_module(graphed: ff.CudaGraphed, events: list[str]) -> None:
    compiled = torch.compile(graphed, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(QUERY, KEY), graphed.module(QUERY, KEY))
    assert events == []


# ---- nothing to capture


def test_without_a_gpu_the_module_runs_silently() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    module = Scores().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = ff.cuda_graph(module, QUERY, KEY)
    assert made.reason == "torch sees no CUDA device"
    assert made.why_not(QUERY, KEY) == made.reason
    assert torch.equal(made(QUERY, KEY), module(QUERY, KEY))
    assert module.calls == 2
    assert "no graph: torch sees no CUDA device" in repr(made)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((QUERY.to("meta"), KEY.to("meta")), "must be on one CUDA device: meta"),
        ((QUERY, KEY.to("meta")), "must be on one CUDA device: cpu, meta"),
        ((1.0, 2.0), "must be on one CUDA device: there are none"),
        ((QUERY, object()), "argument 1 is a object, which later calls could not be compared"),
        ((QUERY, KEY.to_sparse()), "torch.sparse_coo; only dense tensors copy"),
    ],
    ids=["meta", "mixed", "numbers", "object", "sparse"],
)
def test_what_cannot_be_captured_is_no_error(
    events: list[str], arguments: tuple[Any, ...], reason: str
) -> None:
    module = Nested()
    made = ff.cuda_graph(module, *arguments)
    assert reason in str(made.reason)
    assert events == []


class Failing(nn.Module):
    """Fails only while it is captured, as an op that waits for the device does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 1 + _cuda_graph.WARM_UP:
            raise RuntimeError("operation not permitted when stream is capturing\nlong story")
        return x + 1


def test_a_failed_capture_warns_once_and_falls_back(events: list[str]) -> None:
    with pytest.warns(RuntimeWarning, match="calls run the module itself") as caught:
        made = ff.cuda_graph(Failing(), QUERY)
    assert [warning.filename for warning in caught] == [__file__]
    reason = "the capture failed, RuntimeError: operation not permitted when stream is capturing"
    assert made.reason == reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(made(QUERY), QUERY + 1)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, object()


class Elsewhere(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x.to("meta")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Dropout(0.5), "draws random numbers, as dropout does in training mode"),
        (InPlace(), "changes an argument in place"),
        (Opaque(), "returns a object, which a replay cannot renew"),
        (Elsewhere(), "returns float32[2, 3, 4] on meta, which a replay cannot renew"),
    ],
    ids=["random", "in_place", "object", "elsewhere"],
)
def test_forwards_that_a_graph_would_get_wrong(
    events: list[str], module: nn.Module, reason: str
) -> None:
    with pytest.warns(RuntimeWarning, match=re.escape(reason)):
        made = ff.cuda_graph(module, QUERY)
    assert reason in str(made.reason)
    made(QUERY.clone())
    assert "replay" not in events


def test_an_error_of_the_module_is_raised(events: list[str]) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ff.cuda_graph(nn.Linear(3, 3), QUERY)
    with pytest.raises(TypeError, match="module must be a torch.nn.Module, got function"):
        ff.cuda_graph(lambda x: x, QUERY)  # type: ignore[arg-type]


# ---- as a module


def test_copies_and_pickles_have_no_graph(graphed: ff.CudaGraphed, events: list[str]) -> None:
    for twin in (copy.deepcopy(graphed), pickle.loads(pickle.dumps(graphed))):
        with torch.no_grad():
            assert torch.equal(twin(QUERY, KEY), graphed.module(QUERY, KEY))
        assert "a copy has no graph" in twin.reason
    assert events == []
    with torch.no_grad():
        graphed(QUERY, KEY)
    assert events == ["replay"]


def test_it_holds_the_module_like_data_parallel_does(graphed: ff.CudaGraphed) -> None:
    assert [name for name, _ in graphed.named_parameters()] == [
        "module.linear.weight",
        "module.linear.bias",
    ]
    assert not graphed.training
    assert repr(graphed).splitlines()[1].strip() == "captured"


def test_threads_share_one_graph(graphed: ff.CudaGraphed) -> None:
    from concurrent.futures import ThreadPoolExecutor

    queries = [torch.randn(2, 3, 4) for _ in range(32)]

    def call(query: Tensor) -> Tensor:
        with torch.no_grad():
            return graphed(query, KEY)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, queries))
    with torch.no_grad():
        for query, result in zip(queries, results, strict=True):
            assert torch.equal(result, graphed.module(query, KEY))
