"""The kernels as torch ops, and the calls that Triton's refuse.

Attention itself goes through tests/test_registration.py; here are the other two ops.
"""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from suite import DEVICE
from torch import Tensor
from torch.testing import assert_close

import fastfusion as ff
from fastfusion.backends import triton
from fastfusion.ops import bidirectional_attention, varlen_attention


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def both(gradient: bool = False, heads: int = 2, **more: Any) -> dict[str, Any]:
    shape = {"batch": 2, "heads": heads, "q_len": 5, "kv_len": 7, "head_dim": 8, "value_dim": 6}
    call = bidirectional_attention.inputs({**shape, "query_value_dim": 4, "mask": "bias"},
                                          torch.float32, DEVICE)  # fmt: skip
    call["key_padding_mask"] = torch.tensor([[False] * 5 + [True] * 2, [False] * 7], device=DEVICE)
    return _with_gradient({**call, **more}, gradient)


def packed(gradient: bool = False, heads: int = 4, **more: Any) -> dict[str, Any]:
    shape = {"heads": heads, "kv_heads": heads // 2, "q_lens": [3, 0, 5], "kv_lens": [4, 2, 6]}
    call = varlen_attention.inputs({**shape, "head_dim": 8}, torch.float32, DEVICE)
    mask = torch.linspace(-0.5, 0.5, heads * 5 * 6, device=DEVICE)
    call["attn_mask"] = mask.view(heads, 5, 6)
    return _with_gradient({**call, **more}, gradient)


def _with_gradient(call: dict[str, Any], gradient: bool) -> dict[str, Any]:
    floating = (t for t in call.values() if torch.is_tensor(t) and t.is_floating_point())
    for tensor in floating:
        tensor.requires_grad_(gradient)
    return call


def run_both(backend: str, **call: Any) -> tuple[Tensor, ...]:
    return ff.bidirectional_attention(**call, return_lse=True, backend=backend)


def run_packed(backend: str, **call: Any) -> tuple[Tensor, ...]:
    return ff.varlen_attention(**call, return_lse=True, backend=backend)


RUNS = [
    pytest.param(run_both, both, "triton", id="both-triton"),
    pytest.param(run_packed, packed, "triton", id="packed-triton"),
]
if DEVICE == "cpu":
    RUNS.append(pytest.param(run_both, both, "cpu", id="both-cpu"))
    RUNS.append(pytest.param(run_packed, packed, "cpu", id="packed-cpu"))
each_op = pytest.mark.parametrize(("run", "make", "backend"), RUNS)


def raw(name: str, backend: str) -> Any:
    prefix = "triton_" if backend == "triton" else ""
    return getattr(torch.ops.fastfusion, prefix + name).default


def finite(result: Tensor) -> Tensor:
    return result.masked_fill(result.isinf(), 0.0)


def gradients(results: tuple[Tensor, ...], call: dict[str, Any], **options: Any) -> Any:
    loss = sum(finite(r).sin().sum() for r in results)
    leaves = [t for t in call.values() if torch.is_tensor(t) and t.requires_grad]
    return torch.autograd.grad(loss, leaves, **options)


def raw_arguments(make: Any, dropout_p: float, gradient: bool) -> tuple[str, tuple[Any, ...]]:
    # Few heads: opcheck calls an op ten times.
    call = make(gradient, 1 if make is both else 2)
    seed = torch.tensor([7], device=DEVICE) if dropout_p else None
    if make is both:
        names = ("query", "key", "value", "query_value", "attn_mask")
        tensors = [call[n] for n in names]
        return "bidirectional", (
            *tensors, None, call["key_padding_mask"], None, seed, dropout_p, True, True, None, None,
            None, None,
        )  # fmt: skip
    names = ("query", "key", "value", "attn_mask", "cu_seqlens_q", "cu_seqlens_k")
    numbers = (5, 6, dropout_p, True, False, None, None, None, None)
    return "varlen", (*[call.get(n) for n in names], None, seed, *numbers)


@each_op
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(run: Any, make: Any, backend: str, dropout_p: float, gradient: bool) -> None:
    name, arguments = raw_arguments(make, dropout_p, gradient)
    for suffix in ("",) if gradient else ("", "_forward"):
        torch.library.opcheck(raw(name + suffix, backend), arguments)


@each_op
@pytest.mark.parametrize("mask_gradient", [False, True])
def test_opcheck_backward(run: Any, make: Any, backend: str, mask_gradient: bool) -> None:
    name, arguments = raw_arguments(make, 0.0, False)
    outputs = raw(f"{name}_forward", backend)(*arguments)
    grads = [torch.randn_like(o) for o in outputs]
    op = raw(f"{name}_backward", backend)
    torch.library.opcheck(op, (*grads, mask_gradient, *arguments))
    torch.library.opcheck(op, (grads[0], *[None] * (len(grads) - 1), mask_gradient, *arguments))


@each_op
@pytest.mark.parametrize("gradient", [False, True])
def test_compile(run: Any, make: Any, backend: str, gradient: bool) -> None:
    """One graph, with the op in it."""
    targets: list[str] = []

    def watch(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(run, fullgraph=True, backend=watch)(backend, **make(gradient))
    ours = [t for t in targets if t.startswith("fastfusion.")]
    assert len(ours) == 1 and ours[0].endswith("_forward.default") != gradient
    torch._dynamo.reset()
    call, expected = make(gradient), make(gradient)
    results = torch.compile(run, fullgraph=True, backend="aot_eager")(backend, **call)
    assert_close(results, run(backend, **expected))
    if gradient:
        assert_close(gradients(results, call), gradients(run(backend, **expected), expected))


@each_op
def test_double_backward(run: Any, make: Any, backend: str) -> None:
    found = []
    for chosen in (backend, "reference"):
        call = make(True)
        first = gradients(run(chosen, **call), call, create_graph=True)
        found.append(gradients(first, call))
    assert_close(*found)


@each_op
def test_third_derivatives(run: Any, make: Any, backend: str) -> None:
    found = []
    for chosen in (backend, "reference"):
        call = make(True)
        first = gradients(run(chosen, **call), call, create_graph=True)
        second = gradients(first, call, create_graph=True)
        found.append(gradients(second, call))
    assert_close(*found)


@each_op
def test_transforms(run: Any, make: Any, backend: str) -> None:
    call = make()
    query = call.pop("query")

    def loss(query: Tensor, chosen: str) -> Tensor:
        return sum(finite(r).sin().sum() for r in run(chosen, query=query, **call))

    assert_close(torch.func.grad(loss)(query, backend), torch.func.grad(loss)(query, "reference"))
    stacked = torch.stack([query, query + 1])
    assert_close(
        torch.vmap(lambda q: loss(q, backend))(stacked),
        torch.stack([loss(q, "reference") for q in stacked]),
    )


@each_op
def test_flops_are_counted(run: Any, make: Any, backend: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    call = make(True)
    with FlopCounterMode(display=False) as counter:
        results = run(backend, **call)
    packed_scores = 4 * (3 * 4 + 0 * 2 + 5 * 6)
    forward = 2 * 2 * 2 * 5 * 7 * (8 + 6 + 4) if make is both else 2 * packed_scores * (8 + 8)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        gradients(results, call)
    backward = 2 * 2 * 2 * 5 * 7 * (3 * 8 + 2 * 6 + 2 * 4)
    if make is packed:
        backward = 2 * packed_scores * (3 * 8 + 2 * 8)
    assert counter.get_total_flops() == backward


@each_op
def test_a_dispatch_mode_sees_the_op(run: Any, make: Any, backend: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        run(backend, **make())
    assert any(name.startswith("fastfusion.") for name in seen)
    # The transforms run the kernels, too.
    query = make()["query"]
    call = {name: value for name, value in make().items() if name != "query"}
    for transform in (lambda f: torch.vmap(f)(query[None]), lambda f: torch.func.grad(f)(query)):
        seen.clear()
        with Watch():
            transform(lambda q: finite(run(backend, query=q, **call)[0]).sum())
        assert any(name.startswith("fastfusion.") for name in seen)


def test_a_mask_is_not_read_behind_the_longest_lengths() -> None:
    """On a GPU nobody checks that no sequence is longer."""
    call = packed()
    names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k")
    tensors, options = (
        [call[n] for n in names],
        (None, None, 4, 3, 0.0, True, True, None, None, None, None),
    )
    around = torch.full((3, 4, 9, 11), torch.nan, device=DEVICE)
    around[:, :, :4, :3] = torch.randn(3, 4, 4, 3, device=DEVICE)
    given = (*tensors[:3], around[:, :, :4, :3], *tensors[3:], *options)
    out, lse = torch.ops.fastfusion.triton_varlen_forward(*given)
    ones = torch.ones_like(out)
    grads = torch.ops.fastfusion.triton_varlen_backward(ones, None, True, *given)
    assert not any(t.isnan().any() for t in (out, lse, *grads))


def reasons(call: dict[str, Any]) -> str:
    explanation = ff.explain(ff.bidirectional_attention, **call)
    return " ".join(dict(explanation.rows)["triton"])


def test_refuses_what_the_kernels_cannot_do() -> None:
    call = both()
    assert reasons(call) == ""
    wide = {n: torch.randn(1, 1, 3, 257 if n != "value" else 8, device=DEVICE)
            for n in ("query", "key", "value", "query_value")}  # fmt: skip
    assert "head dims above 256" in reasons(wide)
    wide = {**wide, **{n: wide["value"] for n in ("query", "key")}}
    assert "head dims above 256" in reasons(wide)
    double = {k: t.double() if t.is_floating_point() else t for k, t in call.items()}
    assert "float64" in reasons(double)


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = {k: t.cpu() for k, t in both().items()}
    monkeypatch.setattr(triton, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in reasons(on_cpu)
    with pytest.raises(ff.BackendUnavailableError, match="the inputs are on the CPU"):
        ff.bidirectional_attention(**on_cpu, backend="triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ff.info().backends["triton"] == "torch sees no NVIDIA GPU"
    monkeypatch.setattr(triton, "INTERPRETED", True)
    monkeypatch.setattr(triton, "_MISSING", "Triton is not installed (pip install triton)")
    assert "not installed" in reasons(on_cpu)
    assert ff.info().backends["triton"] == triton._MISSING


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    turing = SimpleNamespace(
        is_cpu=False, is_cuda=True, get_device=lambda: 0, dtype=torch.float16, shape=(1, 1, 4, 8)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "older than Ampere" in " ".join(triton.refuses_tensor(turing))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 7))
    assert not triton.refuses_tensor(turing)
