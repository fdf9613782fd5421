"""The part of `fastfusion.cuda_graph` that talks to CUDA: with a fake CUDA, and on a GPU."""

import warnings
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfusion as ff
from fastfusion import _cuda_graph


class FakeCuda:
    """Notes what is asked of torch.cuda; a capture that fails ends as torch's does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.current = "stream 0"
        self.streams = 0
        replaced = {
            "device": lambda device: nullcontext(),
            "current_stream": lambda device=None: FakeStream(self, self.current),
            "set_stream": lambda stream: setattr(self, "current", stream.name),
            "graph_pool_handle": lambda: (0, 7),
            "CUDAGraph": lambda: FakeGraph(self),
            "Stream": lambda device: self.new_stream(),
            "stream": self.on_stream,
            "graph": self.capture,
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            note = lambda index, pool, name=name: self.events.append(f"{name} {index} {pool}")  # noqa: E731
            monkeypatch.setattr(torch._C, name, note, raising=False)

    def new_stream(self) -> "FakeStream":
        self.streams += 1
        return FakeStream(self, f"stream {self.streams}")

    @contextmanager
    def on_stream(self, stream: "FakeStream") -> Any:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    @contextmanager
    def capture(self, graph: "FakeGraph", stream: "FakeStream", **options: Any) -> Any:
        assert options["capture_error_mode"] == "thread_local"
        before, self.current = self.current, stream.name
        try:
            yield
        except RuntimeError:
            # The stream stays the current one, as after cudaStreamEndCapture has failed.
            raise RuntimeError("failed due to a previous error during capture") from None
        self.current = before
        self.events.append(f"captured on {stream.name}")


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeStream) and other.name == self.name

    def wait_stream(self, other: "FakeStream") -> None:
        self.cuda.events.append(f"{self.name} waits for {other.name}")


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def replay(self) -> None:
        self.cuda.events.append(f"replay on {self.cuda.current}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_the_order_of_a_recording(cuda: FakeCuda) -> None:
    recording = _cuda_graph.Recording(torch.device("cpu", 0))
    where: list[str] = []
    recording.warm_up(lambda: where.append(cuda.current))
    assert where == ["stream 1"] * _cuda_graph.WARM_UP
    assert cuda.events == ["stream 1 waits for stream 0", "stream 0 waits for stream 1"]
    cuda.events.clear()
    assert recording.capture(lambda: cuda.current) == "stream 1"
    assert cuda.current == "stream 0"
    assert recording.replay(lambda: cuda.events.append("copy"), lambda: "results") == "results"
    assert cuda.events == ["captured on stream 1", "copy", "replay on stream 0"]
    cuda.events.clear()
    cuda.current = "stream 9"
    recording.replay(lambda: None, lambda: None)
    recording.replay(lambda: None, lambda: None)
    waits = "stream 9 waits for stream 0"
    assert cuda.events == [waits, "replay on stream 9", "replay on stream 9"]


def test_what_a_broken_capture_leaves_is_put_back(cuda: FakeCuda) -> None:
    recording = _cuda_graph.Recording(torch.device("cpu", 0))

    def wait() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recording.capture(wait)
    assert cuda.current == "stream 0"
    assert cuda.events == [
        "_cuda_endAllocateToPool 0 (0, 7)",
        "_cuda_releasePool 0 (0, 7)",
        "captured on stream 2",
    ]


# ---- on a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, device="cuda")

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return self.linear(query) @ key.transpose(-1, -2)


@on_gpu
def test_a_graph_on_the_device() -> None:
    module = Scores()
    query, key = torch.randn(2, 3, 4, device="cuda"), torch.randn(2, 5, 4, device="cuda")
    made = ff.cuda_graph(module, query, key)
    assert made.reason is None
    with torch.inference_mode():
        for _ in range(3):
            query, key = torch.randn_like(query), torch.randn_like(key)
            assert made.why_not(query, key) is None
            out = made(query, key)
            assert torch.equal(out, module(query, key))
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        out = made(query + 1, key)
        expected = module(query + 1, key)
        side.synchronize()
        assert torch.equal(out, expected)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_ours_on_the_device(dtype: torch.dtype) -> None:
    layer = ff.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).cuda().to(dtype).eval()
    words = torch.randn(2, 20, 64, device="cuda", dtype=dtype)
    padding = torch.zeros(2, 20, dtype=torch.bool, device="cuda")
    padding[1, 15:] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        made = ff.cuda_graph(layer, words, src_key_padding_mask=padding)
    assert made.reason is None
    with torch.inference_mode():
        again = torch.randn_like(words)
        out = made(again, src_key_padding_mask=padding)
        assert torch.equal(out, layer(again, src_key_padding_mask=padding))


class Waits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum().item() > 0 else x - 1


@on_gpu
def test_torch_is_whole_after_a_failed_capture() -> None:
    """Random numbers, allocations, the current stream and the next capture."""
    x = torch.ones(8, device="cuda")
    stream = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="the capture failed"):
        made = ff.cuda_graph(Waits(), x)
    assert torch.equal(made(x), x + 1)
    assert torch.cuda.current_stream() == stream
    assert torch.rand(1000, device="cuda").mean().item() > 0
    assert torch.zeros(1 << 20, device="cuda").sum().item() == 0
    assert ff.cuda_graph(nn.ReLU(), x).reason is None
    torch.cuda.synchronize()


@on_gpu
def test_dropout_is_noticed_on_the_device() -> None:
    with pytest.warns(RuntimeWarning, match="draws random numbers"):
        made = ff.cuda_graph(nn.Dropout(0.5), torch.ones(64, device="cuda"))
    assert (made(torch.ones(64, device="cuda")) == 0).any()


@on_gpu
def test_a_call_inside_a_capture_on_the_device() -> None:
    x = torch.randn(8, device="cuda")
    inner = ff.cuda_graph(nn.ReLU(), x)

    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return inner(x) + 1

    outer = ff.cuda_graph(Outer(), x)
    assert outer.reason is None
    assert torch.equal(outer(-x), torch.relu(-x) + 1)
