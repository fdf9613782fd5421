"""The compiled attention ops under everything that torch does to an op.

Every check runs the public function with the features that a fused op can lose silently: a float
mask with a gradient, key padding, the log-sum-exp. Expected values come from the reference, which
is plain torch.
"""

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from suite import DEVICE
from torch import Tensor
from torch.testing import assert_close

import fastfusion as ff

native = pytest.mark.skipif(ff.backends.library.native is None, reason="without the C++ ops")
BACKENDS = [pytest.param("cpu", marks=native), "triton"]
backend_now = "cpu"

PADDING = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])
SMALL = (slice(0, 1), slice(0, 1), slice(0, 3), slice(0, 4))


@pytest.fixture(autouse=True, params=BACKENDS)
def _backend(request: pytest.FixtureRequest) -> Any:
    """Every test runs once for each compiled backend."""
    global backend_now
    backend_now = request.param
    yield
    backend_now = "cpu"


def compiled_only() -> None:
    if backend_now != "cpu":
        pytest.skip("is about the C++ ops")


def op(name: str) -> Any:
    """An attention op of the backend: "attention", "attention_forward", "attention_backward"."""
    return getattr(torch.ops.fastfusion, name if backend_now == "cpu" else f"triton_{name}").default


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def qkv(gradient: bool = False) -> tuple[Tensor, ...]:
    sizes = ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6))
    return tuple(torch.randn(size, requires_grad=gradient) for size in sizes)


def many(count: int, gradient: bool = False) -> list[Tensor]:
    return [torch.randn(count, *t.shape, requires_grad=gradient) for t in qkv()]


def attention(*tensors: Tensor, **options: Any) -> Any:
    return ff.scaled_dot_product_attention(*tensors, backend=backend_now, **options)


def reference(*tensors: Tensor, **options: Any) -> Any:
    return ff.scaled_dot_product_attention(*tensors, backend="reference", **options)


def both_losses(reduce: Callable[[Any], Tensor], **options: Any) -> tuple[Any, Any]:
    """The same scalar function of (q, k, v[, mask]) through the kernel and the reference."""
    return (
        lambda *t: reduce(attention(*t, **options)),
        lambda *t: reduce(reference(*t, **options)),
    )


def sine(out: Any) -> Tensor:
    if isinstance(out, tuple):
        return out[0].sin().sum() + out[1].cos().sum()
    return out.sin().sum()


def gradients(function: Callable[..., Tensor], tensors: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*tensors).sin().sum(), tensors)


OPTIONS = [{}, {"key_padding_mask": PADDING}, {"return_lse": True}, {"is_causal": True}]
option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")


class TestOpcheck:
    """torch.library.opcheck on every op, with every optional argument given and absent.

    With one head: it is about schemas, fake kernels and graphs, and calls an op ten times."""

    MASKS = (None, torch.randn(1, 5, 7), torch.rand(5, 7) > 0.2)

    @staticmethod
    def operands(gradient: bool = False) -> list[Tensor]:
        return [t[:, :1].contiguous().requires_grad_(gradient) for t in qkv()]

    # Every pair of them.
    @pytest.mark.parametrize(
        ("mask", "padding", "dropout_p"),
        [
            (MASKS[0], None, 0.0), (MASKS[0], PADDING, 0.3), (MASKS[1], None, 0.3),
            (MASKS[1], PADDING, 0.0), (MASKS[2], None, 0.0), (MASKS[2], PADDING, 0.3),
        ],
        ids=["none", "padded", "float", "float-padded", "bool", "bool-padded"],
    )  # fmt: skip
    @pytest.mark.parametrize("gradient", [False, True])
    def test_forward(self, mask: Any, padding: Any, dropout_p: float, gradient: bool) -> None:
        seed = torch.tensor([7]) if dropout_p else None
        if gradient and mask is not None and mask.is_floating_point():
            mask = mask.clone().requires_grad_()
        tensors = (*self.operands(gradient), mask, padding, None, seed)
        arguments = (*tensors, dropout_p, True, True, 0.3, False, None, None, None)
        names = ["attention"] if gradient else ["attention_forward", "attention"]
        if backend_now == "cpu":
            names += [] if gradient else ["attention_out"]
        for name in names:
            torch.library.opcheck(op(name), arguments)

    @pytest.mark.parametrize("mask", MASKS, ids=["none", "float", "bool"])
    @pytest.mark.parametrize("with_lse", [False, True])
    def test_backward(self, mask: Any, with_lse: bool) -> None:
        grads = (torch.randn(2, 1, 5, 6), torch.randn(2, 1, 5) if with_lse else None)
        arguments = (
            *grads, True, *self.operands(), mask, PADDING, None, None, 0.0, False,
            False, None, False, None, None, None,
        )  # fmt: skip
        torch.library.opcheck(op("attention_backward"), arguments)


class TestCompile:
    @option
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_without_gradient(self, options: Any, backend: str) -> None:
        tensors = qkv()
        compiled = torch.compile(
            lambda *t: attention(*t, **options), fullgraph=True, backend=backend
        )
        assert_close(compiled(*tensors), attention(*tensors, **options))

    @option
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_with_gradient(self, options: Any, backend: str) -> None:
        tensors = (*qkv(True), torch.randn(5, 7, requires_grad=True))
        kernel, plain = both_losses(sine, **options)
        compiled = torch.compile(kernel, fullgraph=True, backend=backend)
        assert_close(gradients(compiled, tensors), gradients(plain, tensors))

    def test_automatic_choice_compiles(self) -> None:
        tensors = qkv(True)
        compiled = torch.compile(
            ff.scaled_dot_product_attention, fullgraph=True, backend="aot_eager"
        )
        assert_close(gradients(compiled, tensors), gradients(reference, tensors))

    def test_graph_holds_the_raw_op_without_gradient(self) -> None:
        targets: list[str] = []

        def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
            targets.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        torch.compile(attention, fullgraph=True, backend=backend)(*qkv())
        assert str(op("attention_out" if backend_now == "cpu" else "attention_forward")) in targets

    def test_lengths_do_not_recompile(self) -> None:
        compiles = 0

        def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
            nonlocal compiles
            compiles += 1
            return graph

        compiled = torch.compile(attention, fullgraph=True, backend=backend)
        for length in (5, 6, 7, 9, 33):
            tensors = [torch.randn(2, 3, n, 8) for n in (length, length + 1, length + 1)]
            assert_close(compiled(*tensors), reference(*tensors))
        assert compiles == 2

    def test_one_tensor_three_times(self) -> None:
        x = torch.randn(2, 3, 5, 8, requires_grad=True)
        compiled = torch.compile(
            lambda x: attention(x, x, x) * 2, fullgraph=True, backend="aot_eager"
        )
        assert_close(gradients(compiled, (x,)), gradients(lambda x: reference(x, x, x) * 2, (x,)))

    def test_of_func_grad(self) -> None:
        kernel, plain = both_losses(sine)
        tensors = qkv()
        compiled = torch.compile(
            lambda *t: torch.func.grad(kernel, (0, 1, 2))(*t), fullgraph=True, backend="aot_eager"
        )
        assert_close(compiled(*tensors), torch.func.grad(plain, (0, 1, 2))(*tensors))

    def test_of_vmap(self) -> None:
        tensors = many(4)
        compiled = torch.compile(
            lambda *t: torch.vmap(attention)(*t), fullgraph=True, backend="aot_eager"
        )
        assert_close(compiled(*tensors), torch.vmap(reference)(*tensors))

    def test_with_dropout(self) -> None:
        tensors = qkv(True)

        def run(*t: Tensor) -> Tensor:
            return attention(*t, dropout_p=0.5)

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.manual_seed(3)
        expected = gradients(run, tensors)
        torch.manual_seed(3)
        assert_close(gradients(compiled, tensors), expected)
        assert not torch.equal(compiled(*tensors), compiled(*tensors))

    def test_compiled_autograd(self) -> None:
        tensors = qkv(True)
        with torch._dynamo.config.patch(compiled_autograd=True):
            compiled = torch.compile(
                lambda *t: sine(attention(*t)), fullgraph=True, backend="aot_eager"
            )
            compiled(*tensors).backward()
        expected = torch.autograd.grad(sine(reference(*tensors)), tensors)
        assert_close(tuple(t.grad for t in tensors), expected)

    def test_autocast(self) -> None:
        tensors = qkv(True)
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            eager, traced = attention(*tensors), compiled(*tensors)
        assert eager.dtype == traced.dtype == torch.bfloat16
        assert_close(
            torch.autograd.grad(traced.float().sum(), tensors),
            torch.autograd.grad(eager.float().sum(), tensors),
        )

    def test_checkpoint(self) -> None:
        tensors = qkv(True)
        compiled = torch.compile(
            lambda *t: torch.utils.checkpoint.checkpoint(attention, *t, use_reentrant=False),
            fullgraph=True,
            backend="aot_eager",
        )
        assert_close(gradients(compiled, tensors), gradients(reference, tensors))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, -1)
        return attention(query, key, value) + 1


class Repeated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.weight
        return attention(x, x, x)


class TestExport:
    X = torch.randn(2, 3, 5, 8)
    LENGTH = torch.export.Dim("length", min=2, max=99)

    @pytest.mark.parametrize("strict", [False, True])
    def test_dynamic_length_and_training(self, strict: bool) -> None:
        net, longer = Net(), torch.randn(2, 3, 11, 8)
        program = torch.export.export(
            net, (self.X,), dynamic_shapes=({2: self.LENGTH},), strict=strict
        )
        module = program.module()
        assert_close(module(longer), net(longer))
        assert_close(
            torch.autograd.grad(module(longer).sin().sum(), list(module.parameters())),
            torch.autograd.grad(net(longer).sin().sum(), list(net.parameters())),
        )
        assert_close(program.run_decompositions().module()(longer), net(longer))

    def test_without_gradient(self) -> None:
        net = Net()
        with torch.no_grad():
            program = torch.export.export(net, (self.X,), dynamic_shapes=({2: self.LENGTH},))
            assert_close(program.module()(self.X), net(self.X))

    @pytest.mark.parametrize("strict", [False, True])
    def test_one_tensor_three_times(self, strict: bool) -> None:
        net = Repeated()
        program = torch.export.export(net, (self.X,), strict=strict)
        assert_close(program.module()(self.X), net(self.X))

    def test_save_and_load(self, tmp_path: Path) -> None:
        net = Net().eval()
        torch.export.save(torch.export.export(net, (self.X,)), tmp_path / "net.pt2")
        assert_close(torch.export.load(tmp_path / "net.pt2").module()(self.X), net(self.X))

    def test_ahead_of_time_in_a_fresh_process(self, tmp_path: Path) -> None:
        """The package runs with the op library alone: no fastfusion, no Python kernels."""
        compiled_only()
        net = Net().eval()
        with torch.no_grad():
            program = torch.export.export(net, (self.X,), dynamic_shapes=({2: self.LENGTH},))
            package = torch._inductor.aoti_compile_and_package(
                program, package_path=str(tmp_path / "net.pt2")
            )
            torch.save((self.X, net(self.X)), tmp_path / "expected.pt")
        library = Path(ff.__file__).with_name("_torch_ops.so")
        code = (
            "import sys, torch\n"
            "torch.ops.load_library(sys.argv[1])\n"
            "x, expected = torch.load(sys.argv[3])\n"
            "out = torch._inductor.aoti_load_package(sys.argv[2])(x)\n"
            "torch.testing.assert_close(out, expected)\n"
            "assert 'fastfusion' not in sys.modules\n"
        )
        subprocess.run(
            [sys.executable, "-c", code, str(library), package, str(tmp_path / "expected.pt")],
            check=True,
            cwd=tmp_path,
        )


class TestTransforms:
    """torch.func, vmap, forward mode and higher derivatives."""

    @option
    def test_vmap(self, options: Any) -> None:
        tensors = many(4)
        assert_close(
            torch.vmap(lambda *t: attention(*t, **options))(*tensors),
            torch.vmap(lambda *t: reference(*t, **options))(*tensors),
        )

    def test_vmap_of_one_argument(self) -> None:
        queries, (_, key, value) = many(4)[0], qkv()
        dims = (0, None, None)
        assert_close(
            torch.vmap(attention, dims)(queries, key, value),
            torch.vmap(reference, dims)(queries, key, value),
        )
        moved = queries.movedim(0, 2)
        assert_close(
            torch.vmap(attention, (2, None, None))(moved, key, value),
            torch.vmap(reference, dims)(queries, key, value),
        )

    @pytest.mark.parametrize("size", [(7,), (5, 7), (3, 1, 7), (2, 1, 5, 7), (1, 3, 5, 7)])
    @pytest.mark.parametrize("batched", [False, True])
    def test_vmap_and_grad_with_a_mask(self, size: Any, batched: bool) -> None:
        kernel, plain = both_losses(sine, return_lse=True)
        mask = torch.randn(*([4] if batched else []), *size)
        dims = (0, 0, 0, 0 if batched else None)
        tensors = (*many(4), mask)
        assert_close(
            torch.vmap(torch.func.grad(kernel, (0, 1, 2, 3)), dims)(*tensors),
            torch.vmap(torch.func.grad(plain, (0, 1, 2, 3)), dims)(*tensors),
        )
        assert_close(torch.vmap(kernel, dims)(*tensors), torch.vmap(plain, dims)(*tensors))

    def test_vmap_with_a_bool_mask_and_padding(self) -> None:
        mask, padding = torch.rand(4, 2, 1, 5, 7) > 0.2, torch.rand(4, 2, 7) > 0.7

        def run(function: Any) -> Any:
            return torch.vmap(
                lambda q, k, v, m, p: function(q, k, v, m, key_padding_mask=p), randomness="error"
            )(*many_fixed, mask, padding)

        many_fixed = many(4)
        assert_close(run(attention), run(reference))

    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_vmap_with_dropout(self, randomness: str) -> None:
        one = [t.expand(6, *t.shape) for t in qkv()]

        def run(function: Any) -> Tensor:
            torch.manual_seed(5)
            return torch.vmap(lambda *t: function(*t, dropout_p=0.5), randomness=randomness)(*one)

        out = run(attention)
        assert_close(out, run(reference))
        assert torch.equal(out[0], out[1]) == (randomness == "same")

    def test_backward_through_vmap(self) -> None:
        tensors = many(4, True)
        assert_close(
            gradients(torch.vmap(attention), tensors), gradients(torch.vmap(reference), tensors)
        )

    @option
    def test_grad(self, options: Any) -> None:
        kernel, plain = both_losses(sine, **options)
        tensors = (*qkv(), torch.randn(5, 7))
        assert_close(
            torch.func.grad(kernel, (0, 1, 2, 3))(*tensors),
            torch.func.grad(plain, (0, 1, 2, 3))(*tensors),
        )

    def test_grad_of_vmap(self) -> None:
        tensors = many(4)
        expected = torch.func.grad(lambda *t: sine(torch.vmap(reference)(*t)), (0, 1, 2))(*tensors)
        actual = torch.func.grad(lambda *t: sine(torch.vmap(attention)(*t)), (0, 1, 2))(*tensors)
        assert_close(actual, expected)

    @pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd])
    def test_jacobians(self, jacobian: Any) -> None:
        tensors = tuple(t[:1, :1] for t in qkv())
        assert_close(
            jacobian(attention, (0, 1, 2))(*tensors), jacobian(reference, (0, 1, 2))(*tensors)
        )

    def test_reverse_over_reverse(self) -> None:
        kernel, plain = both_losses(sine, return_lse=True)
        tensors = (*(t[SMALL] for t in qkv()), torch.randn(3, 3))
        tensors = (tensors[0], tensors[1][:, :, :3], tensors[2][:, :, :3], tensors[3])
        for first, second in ((0, 1), (3, 3), (2, 0)):
            assert_close(
                torch.func.jacrev(torch.func.jacrev(kernel, first), second)(*tensors),
                torch.func.jacrev(torch.func.jacrev(plain, first), second)(*tensors),
            )

    def test_hessian(self) -> None:
        kernel, plain = both_losses(sine)
        tensors = tuple(t[SMALL] for t in qkv())
        assert_close(torch.func.hessian(kernel)(*tensors), torch.func.hessian(plain)(*tensors))

    def test_jvp_and_linearize(self) -> None:
        tensors = qkv()
        tangents = tuple(torch.randn_like(t) for t in tensors)
        expected = torch.func.jvp(reference, tensors, tangents)[1]
        assert_close(torch.func.jvp(attention, tensors, tangents)[1], expected)
        assert_close(torch.func.linearize(attention, *tensors)[1](*tangents), expected)
        assert_close(torch.autograd.functional.jvp(attention, tensors, tangents)[1], expected)

    def test_dual_numbers_keep_their_tangent(self) -> None:
        import torch.autograd.forward_ad as forward_ad

        tensors = qkv()
        tangents = tuple(torch.randn_like(t) for t in tensors)
        with forward_ad.dual_level():
            pairs = zip(tensors, tangents, strict=True)
            duals = [forward_ad.make_dual(*pair) for pair in pairs]
            tangent = forward_ad.unpack_dual(attention(*duals)).tangent
        assert_close(tangent, torch.func.jvp(reference, tensors, tangents)[1])

    @pytest.mark.parametrize("return_lse", [False, True])
    def test_double_backward(self, return_lse: bool) -> None:
        tensors = (*qkv(True), torch.randn(5, 7, requires_grad=True))

        def second_order(function: Any) -> Any:
            first = torch.autograd.grad(
                sine(function(*tensors, return_lse=return_lse)), tensors, create_graph=True
            )
            return torch.autograd.grad(sum(g.cos().sum() for g in first), tensors)

        assert_close(second_order(attention), second_order(reference))

    def test_functional_call(self) -> None:
        net, x = Net(), torch.randn(2, 3, 5, 8)
        parameters = {k: v.detach() for k, v in net.named_parameters()}
        actual = torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).sin().sum())(
            parameters
        )
        expected = torch.autograd.grad(net(x).sin().sum(), list(net.parameters()))
        assert_close(tuple(actual.values()), expected)

    def test_batched_gradients(self) -> None:
        tensors = qkv(True)
        out = attention(*tensors)
        weights = torch.randn(4, *out.shape)
        batched = torch.autograd.grad(
            out, tensors, weights, is_grads_batched=True, retain_graph=True
        )
        for i in range(4):
            single = torch.autograd.grad(out, tensors, weights[i], retain_graph=True)
            assert_close(tuple(b[i] for b in batched), single)


class TestEager:
    @option
    def test_gradients(self, options: Any) -> None:
        tensors = (*qkv(True), torch.randn(5, 7, requires_grad=True))
        kernel, plain = both_losses(sine, **options)
        assert_close(gradients(kernel, tensors), gradients(plain, tensors))

    def test_gradient_through_lse_alone(self) -> None:
        tensors = qkv(True)
        kernel, plain = both_losses(lambda result: result[1].sin().sum(), return_lse=True)
        actual = torch.autograd.grad(kernel(*tensors), tensors, allow_unused=True)
        expected = torch.autograd.grad(plain(*tensors), tensors, allow_unused=True)
        assert_close(actual[:2], expected[:2])
        assert actual[2] is None or not actual[2].any()

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoint(self, reentrant: bool) -> None:
        tensors = qkv(True)
        out = torch.utils.checkpoint.checkpoint(attention, *tensors, use_reentrant=reentrant)
        out.sin().sum().backward()
        expected = gradients(reference, tensors)
        assert_close(tuple(t.grad for t in tensors), expected)

    def test_selective_checkpoint(self) -> None:
        import functools

        from torch.utils.checkpoint import (
            CheckpointPolicy,
            checkpoint,
            create_selective_checkpoint_contexts,
        )

        seen = []

        def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            seen.append(str(op))
            return CheckpointPolicy.MUST_SAVE

        tensors = qkv(True)
        context = functools.partial(create_selective_checkpoint_contexts, policy)
        out = checkpoint(attention, *tensors, use_reentrant=False, context_fn=context)
        assert_close(torch.autograd.grad(out.sin().sum(), tensors), gradients(reference, tensors))
        assert str(op("attention_out" if backend_now == "cpu" else "attention_forward")) in seen

    def test_meta_tensors(self) -> None:
        out, lse = ff.scaled_dot_product_attention(*(t.to("meta") for t in qkv()), return_lse=True)
        assert out.shape == (2, 3, 5, 6) and lse.shape == (2, 3, 5)

    def test_many_threads(self) -> None:
        if backend_now == "triton" and DEVICE == "cpu":
            pytest.skip("Triton's interpreter runs in one thread at a time")
        tensors = qkv(True)
        expected = gradients(attention, tensors)
        results: list[Any] = []
        workers = [
            threading.Thread(
                target=lambda: results.extend(gradients(attention, tensors) for _ in range(20))
            )
            for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(results) == 80
        assert all(torch.equal(a, b) for r in results for a, b in zip(r, expected, strict=True))

    def test_subclass_is_kept(self) -> None:
        class Tagged(torch.Tensor):
            pass

        assert type(attention(*(t.as_subclass(Tagged) for t in qkv()))) is Tagged

    def test_flop_counter(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        tensors = qkv(True)
        with FlopCounterMode(display=False) as counter:
            out = attention(*tensors)
        assert counter.get_total_flops() == 2 * 2 * 3 * 5 * 7 * (8 + 6)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * 2 * 3 * 5 * 7 * (3 * 8 + 2 * 6)

    def test_traces(self) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx

        tensors = qkv()
        expected = reference(*tensors)
        assert_close(torch.jit.trace(lambda *t: attention(*t), tensors)(*tensors), expected)
        graph = make_fx(lambda *t: attention(*t), tracing_mode="symbolic")(*tensors)
        assert_close(graph(*tensors), expected)

    def test_higher_order_map(self) -> None:
        from torch._higher_order_ops.map import map as map_op

        tensors = many(4)
        assert_close(
            map_op(lambda t: attention(*t), tuple(tensors)), torch.vmap(reference)(*tensors)
        )
