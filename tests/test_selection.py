"""Which implementation runs, how one is asked for, and what `explain` and `info` say about it."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastfusion as ff
from fastfusion import ops
from fastfusion.backends import library
from fastfusion.core.op import BACKENDS, Implementation, Op, forced_backend

PACKAGE = Path(ff.__file__).parent
SHAPES = {"batch": 1, "heads": 2, "q_len": 4, "kv_len": 5, "head_dim": 8}
SHAPES |= {"length": 4, "width": 8, "features": 6}
SHAPES |= {"dim": 16, "context_dim": 12, "ffn": 10}
FUNCTIONS = {op.name: function for function, op in ops.FUNCTIONS.items()}

needs_native = pytest.mark.skipif(
    library.native is None, reason="this package was built without its compiled part"
)


def call_of(op: Op, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    return op.inputs(SHAPES, dtype, device, 0)


def reasons(op: Op, backend: str, call: dict[str, Any]) -> tuple[str, ...]:
    """Why an implementation of the op would not run the call."""
    (implementation,) = (i for i in op.implementations if i.backend == backend)
    return tuple(implementation.refuses(op.call(**call)))


class Recorder(TorchDispatchMode):
    """The names of the ops that a call reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def is_native(names: Any) -> bool:
    return any(name.startswith("fastfusion.") for name in names)


def runs_natively(run: Callable[[], Any]) -> bool:
    with Recorder() as recorder:
        run()
    assert recorder.seen
    return is_native(recorder.seen)


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
class TestEveryOp:
    def test_list_of_implementations(self, op: Op) -> None:
        names = [i.backend for i in op.implementations]
        assert names[-1] == "reference"
        assert len(set(names)) == len(names) and set(names) <= set(BACKENDS)
        assert FUNCTIONS[op.name].__name__ == op.name and ops.FUNCTIONS[FUNCTIONS[op.name]] is op

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_first_that_accepts_is_chosen(self, op: Op, dtype: torch.dtype, device: str) -> None:
        call = call_of(op, dtype, device)
        explanation = ff.explain(FUNCTIONS[op.name], **call)
        given = op.call(**call)
        accepting = [
            i.backend
            for i in op.implementations
            if not i.refuses(given) and not (i.on_request and i.on_request(given))
        ]
        assert explanation.op == op.name and explanation.chosen == accepting[0]
        assert dict(explanation.rows) == {
            i.backend: reasons(op, i.backend, call) for i in op.implementations
        }
        assert op.select(None, op.call(**call)).backend == explanation.chosen
        result = FUNCTIONS[op.name](**call)
        assert all(t.dtype == dtype for t in (result if isinstance(result, tuple) else (result,)))

    def test_reference_never_refuses(self, op: Op) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for device in ("cpu", "meta"):
                assert reasons(op, "reference", call_of(op, dtype, device)) == ()

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("how", ["argument", "block"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_asked_for_by_name(self, op: Op, backend: str, how: str, dtype: torch.dtype) -> None:
        """It runs, or raises with one line per reason; another never runs in its place."""
        call = call_of(op, dtype)
        argument = {"backend": backend} if how == "argument" else {}
        with ff.use_backend(backend if how == "block" else None):
            explanation = ff.explain(FUNCTIONS[op.name], **call, **argument)
            listed = backend in [i.backend for i in op.implementations]
            if listed and not reasons(op, backend, call):
                assert explanation.chosen == backend
                ran = runs_natively(lambda: FUNCTIONS[op.name](**call, **argument))
                if backend in ("cpu", "reference"):  # the others launch without torch's dispatcher
                    assert ran == (backend == "cpu")
                return
            assert explanation.chosen is None
            with pytest.raises(ff.BackendUnavailableError) as caught:
                FUNCTIONS[op.name](**call, **argument)
        head, *lines = str(caught.value).splitlines()
        assert head == f"backend {backend!r} cannot run {op.name}:"
        if listed:
            assert lines == [f"  - {reason}" for reason in reasons(op, backend, call)]
        else:
            names = ", ".join(i.backend for i in op.implementations)
            assert lines == [f"  - it has no implementation there; implementations: {names}"]
            assert dict(explanation.rows)[backend] == ("it has no implementation of this op",)

    def test_gradients_change_the_choice_only_where_declared(self, op: Op) -> None:
        call = call_of(op)
        before = ff.explain(FUNCTIONS[op.name], **call)
        next(iter(call.values())).requires_grad_()
        after = ff.explain(FUNCTIONS[op.name], **call)
        chosen = next(i for i in op.implementations if i.backend == before.chosen)
        assert (after.chosen == before.chosen) == chosen.differentiable
        assert "requires_grad" in str(after)


def row(backend: str, *sentences: str, log: list[Any] | None = None) -> Implementation:
    """An implementation that answers with its name and refuses with `sentences`."""

    def refuses(*given: Any) -> tuple[str, ...]:
        if log is not None:
            log.append(given)
        return sentences

    return Implementation(backend, lambda *given: backend, refuses)


def made_of(*rows: Implementation) -> Op:
    return dataclasses.replace(ops.ALL[0], name="made", implementations=rows)


def test_order_decides() -> None:
    never = row("reference")
    assert made_of(row("triton"), row("cpu"), never).select(None, ()).backend == "triton"
    assert made_of(row("triton", "no GPU"), row("cpu"), never).select(None, ()).backend == "cpu"
    only_reference = made_of(row("triton", "a"), row("cpu", "b"), never)
    assert only_reference.select(None, ()).backend == "reference"


def test_refusals_see_the_arguments_and_stop_at_the_first_that_accepts() -> None:
    log: list[Any] = []
    op = made_of(row("triton", "no", log=log), row("cpu", log=log), row("reference", log=log))
    assert op.select(None, (1, "two")).run((1, "two"), False) == "cpu"
    assert log == [((1, "two"),)] * 2


def test_every_reason_has_its_line() -> None:
    op = made_of(row("triton", "no GPU", "head_dim 300 is above 256"), row("reference"))
    with pytest.raises(ff.BackendUnavailableError) as caught:
        op.select("triton", ())
    assert str(caught.value) == (
        "backend 'triton' cannot run made:\n  - no GPU\n  - head_dim 300 is above 256"
    )
    assert issubclass(ff.BackendUnavailableError, RuntimeError)


def test_reasons_of_the_cpu_kernels() -> None:
    spec = ops.ALL[0]
    said = " ".join(reasons(spec, "cpu", call_of(spec, torch.float64, "meta")))
    assert "meta" in said and "float64" in said
    missing = library.cpu_unavailable
    expected = () if missing is None else (missing,)
    assert reasons(spec, "cpu", call_of(spec)) == expected


def test_explanation_reads_as_a_table() -> None:
    query, key, value = call_of(ops.ALL[0], torch.float64).values()
    text = str(ff.explain(ff.scaled_dot_product_attention, query, key, value=value, is_causal=True))
    head, *lines = text.splitlines()
    assert head == (
        "scaled_dot_product_attention(float64[1, 2, 4, 8] on cpu, float64[1, 2, 5, 8] on cpu, "
        "value=float64[1, 2, 5, 8] on cpu, is_causal=True)"
    )
    assert [line.split()[0] for line in lines[:1] + lines[-1:]] == ["cpu", "reference"]
    assert lines[0].split(maxsplit=1)[1].startswith("no: ")
    assert lines[-1].endswith("chosen") and "not chosen" not in lines[-1]
    packed = call_of(ops.varlen_attention.OP)
    forced = ff.explain(ff.varlen_attention, **packed, backend="cuda")
    assert forced.chosen is None and repr(forced) == str(forced)
    assert str(forced).splitlines()[-1] == "  cuda       no: it has no implementation of this op"


ON_CPU = [op for op in ops.ALL if "cpu" in [i.backend for i in op.implementations]]


@needs_native
@pytest.mark.parametrize("op", ON_CPU, ids=lambda op: op.name)
def test_explanation_says_how_the_cpu_runs_a_call(op: Op) -> None:
    native: Any = library.native
    call = call_of(op, torch.bfloat16)
    for isa in native.isas(runnable=True):
        native.select_isa(isa)
        explanation = ff.explain(FUNCTIONS[op.name], **call)
        assert explanation.chosen == "cpu" and explanation.path is not None
        assert isa in explanation.path.split(", ")
        products = op.definition.flops(op.call(**call), False) > 0
        assert ("bfloat16 products" in explanation.path) == (products and isa.endswith("bf16"))
        assert f"chosen: {explanation.path}" in str(explanation)
    native.select_isa()
    few = ff.explain(ff.scaled_dot_product_attention, *(torch.randn(1, 1, n, 8) for n in (1, 5, 5)))
    assert few.path == f"{native.isa()}, one query at a time"
    far = ff.explain(
        ff.scaled_dot_product_attention, *(torch.randn(1, 1, n, 8) for n in (1, 3000, 3000))
    )
    assert far.path == f"{native.isa()}, one query at a time, keys in 3 pieces"


def test_explain_computes_nothing() -> None:
    call = call_of(ops.ALL[0])
    with Recorder() as recorder:
        ff.explain(ff.scaled_dot_product_attention, **call)
    # Views bring the arguments to their common form.
    assert set(recorder.seen) <= {"aten.expand.default", "aten.unsqueeze.default"}


def test_explain_takes_the_arguments_of_the_call() -> None:
    state = torch.get_rng_state()
    call = call_of(ops.ALL[0])
    explanation = ff.explain(ff.scaled_dot_product_attention, **call, dropout_p=0.5)
    assert explanation.chosen is not None
    assert torch.equal(torch.get_rng_state(), state), "asking moved torch's generator"


def test_blocks_nest_and_restore() -> None:
    assert forced_backend() is None
    with ff.use_backend("reference"):
        with ff.use_backend("cuda"):
            assert forced_backend() == "cuda"
            with ff.use_backend(None):
                assert forced_backend() is None
            assert forced_backend() == "cuda"
        assert forced_backend() == "reference"
    assert forced_backend() is None


def test_blocks_restore_after_an_error() -> None:
    with ff.use_backend("reference"):
        with pytest.raises(KeyError), ff.use_backend("cuda"):
            raise KeyError
        assert forced_backend() == "reference"
        with pytest.raises(ff.BackendUnavailableError), ff.use_backend("cuda"):
            ff.varlen_attention(**call_of(ops.varlen_attention.OP))
        with pytest.raises(ValueError, match="backend must be one of"), ff.use_backend("gpu"):
            pass
        assert forced_backend() == "reference"
    assert forced_backend() is None


def test_a_block_is_also_a_decorator() -> None:
    @ff.use_backend("reference")
    def inside() -> str | None:
        return forced_backend()

    assert [inside(), forced_backend(), inside()] == ["reference", None, "reference"]


@needs_native
def test_the_argument_beats_the_block() -> None:
    call = call_of(ops.ALL[0])

    def run(backend: str | None) -> bool:
        return runs_natively(lambda: ff.scaled_dot_product_attention(**call, backend=backend))

    assert run(None) and run("cpu") and not run("reference")
    with ff.use_backend("reference"):
        assert run("cpu") and not run(None)
        assert ff.explain(ff.scaled_dot_product_attention, **call, backend="cpu").chosen == "cpu"
    with ff.use_backend("cuda"):
        assert run("cpu") and not run("reference")


@needs_native
@pytest.mark.parametrize("gradients", [False, True])
def test_compiled_code_follows_the_block(gradients: bool) -> None:
    """Another choice recompiles, a choice made before does not."""
    graphs: list[bool] = []

    def capture(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(is_native(str(n.target) for n in graph.graph.nodes))
        return graph.forward

    @torch.compile(fullgraph=True, backend=capture)
    def run(query: Tensor) -> Tensor:
        return ff.scaled_dot_product_attention(query, query, query)

    query = torch.randn(1, 2, 4, 8, requires_grad=gradients)
    run(query)
    assert graphs == [True]
    with ff.use_backend("reference"):
        run(query)
        assert graphs == [True, False]
        with ff.use_backend(None):
            run(query)
        run(query)
    run(query)
    assert graphs == [True, False]
    with ff.use_backend("cpu"), pytest.raises(RuntimeError, match="left to the reference"):
        run(query.double())
    run(query)
    assert graphs == [True, False]


def test_a_block_inside_compiled_code() -> None:
    graphs: list[bool] = []

    def capture(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(is_native(str(n.target) for n in graph.graph.nodes))
        return graph.forward

    @torch.compile(fullgraph=True, backend=capture)
    def run(query: Tensor) -> Tensor:
        with ff.use_backend("reference"):
            return ff.scaled_dot_product_attention(query, query, query)

    query = torch.randn(1, 2, 4, 8)
    expected = ff.scaled_dot_product_attention(query, query, query, backend="reference")
    torch.testing.assert_close(run(query), expected)
    assert graphs == [False] and forced_backend() is None


def test_info() -> None:
    info = ff.info()
    assert info.facts["fastfusion"] == ff.__version__
    assert info.facts["torch"] == torch.__version__
    assert info.facts["threads"] == str(torch.get_num_threads())
    assert info.facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert list(info.backends) == list(BACKENDS)
    assert info.backends["reference"] is None
    assert info.backends["cpu"] == library.cpu_unavailable
    lines = str(info).splitlines()
    assert repr(info) == str(info) and len(lines) == len(info.facts) + 1 + len(info.backends)
    for name, value in info.facts.items():
        assert any(re.fullmatch(f"{name} +{re.escape(value)}", line) for line in lines)
    for name, reason in info.backends.items():
        answer = "yes" if reason is None else f"no: {reason}"
        assert any(re.fullmatch(f"  {name} +{re.escape(answer)}", line) for line in lines)


def test_info_names_the_choice() -> None:
    assert ff.info().facts["backend asked for"] == "none (automatic)"
    with ff.use_backend("reference"):
        assert ff.info().facts["backend asked for"] == "reference"


@needs_native
def test_info_on_the_compiled_part() -> None:
    native = library.native
    assert native is not None
    assert set(native.isas(runnable=True)) <= set(native.isas())
    for isa in native.isas(runnable=True):
        native.select_isa(isa)
        assert ff.info().facts["cpu isa"].split()[0] == isa == native.isa()
    assert all(isa in ff.info().facts["cpu isa"] for isa in native.isas())
    assert "torch" in ff.info().facts["built with"]


def python(code: str, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTFUSION_")}
    environment.update(variables, OMP_NUM_THREADS="1")
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=path
    )


def answer(code: str, path: Path | None = None, **variables: str) -> Any:
    done = python(code, path, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# What a fresh process chooses, in JSON: by itself, in an automatic block, after a change of the
# environment, and its result.
CHOICES = """
import json, os, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, fastfusion as ff
query = torch.arange(24.0).reshape(1, 1, 6, 4).sin()
def choice():
    return ff.explain(ff.scaled_dot_product_attention, query, query, query).chosen
asked = choice()
with ff.use_backend(None):
    automatic = choice()
os.environ["FASTFUSION_BACKEND"] = "cuda"
later = choice()
try:
    out = ff.scaled_dot_product_attention(query, query, query)
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    torch.testing.assert_close(out, expected)
    layer = ff.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    assert layer(torch.randn(2, 3, 8)).isfinite().all()
    error = None
except ff.BackendUnavailableError as unavailable:
    error = str(unavailable)
try:
    ff.scaled_dot_product_attention(query, query, query, backend="cpu")
    cpu_error = None
except ff.BackendUnavailableError as unavailable:
    cpu_error = str(unavailable)
info = ff.info()
print(json.dumps({"asked": asked, "automatic": automatic, "later": later, "error": error,
                  "file": ff.__file__, "cpu": info.backends["cpu"], "facts": info.facts,
                  "text": str(info), "cpu error": cpu_error,
                  "warnings": [str(w.message) for w in caught if "fastfusion" in str(w.message)]}))
"""


@pytest.mark.parametrize("backend", ["reference", "", "cuda"])
def test_environment_names_the_backend(backend: str) -> None:
    by_itself = ff.explain(ff.scaled_dot_product_attention, **call_of(ops.ALL[0])).chosen
    expected = {"reference": "reference", "": by_itself, "cuda": None}[backend]
    facts = answer(CHOICES, FASTFUSION_BACKEND=backend)
    assert (facts["asked"], facts["automatic"], facts["later"]) == (expected, by_itself, expected)
    assert facts["facts"]["backend asked for"] == (backend or "none (automatic)")
    assert (facts["error"] is None) == (expected is not None)


def test_environment_names_no_backend() -> None:
    done = python("import fastfusion", FASTFUSION_BACKEND="gpu")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        "ValueError: environment variable FASTFUSION_BACKEND: backend must be one of cuda, triton, "
        "cpu, reference or None, got 'gpu'"
    )


@needs_native
def test_environment_names_the_instruction_set() -> None:
    native = library.native
    assert native is not None
    runnable = native.isas(runnable=True)
    # The last is what the automatic choice takes last.
    facts = answer(CHOICES, FASTFUSION_CPU_ISA=runnable[-1])["facts"]
    assert facts["cpu isa"].split()[0] == runnable[-1]
    done = python("import fastfusion", FASTFUSION_CPU_ISA="sse9")
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: ")
    assert all(word in last for word in ("FASTFUSION_CPU_ISA", "'sse9'", *runnable))


def test_import_is_light() -> None:
    """fastfusion adds none of these to what torch itself imports."""
    code = """
import json, sys
import torch
before = set(sys.modules)
import fastfusion
print(json.dumps(sorted({name for name in set(sys.modules) - before})))
"""
    added = answer(code)
    assert "fastfusion.ops" in added
    heavy = ("triton", "transformers", "onnx", "onnxruntime", "PIL", "matplotlib", "easy_vqa",
             "torchvision", "timm", "safetensors", "tqdm", "pytest", "hypothesis",
             "torch._dynamo", "torch._inductor")  # fmt: skip
    for name in heavy:
        assert not [module for module in added if f"{module}.".startswith(f"{name}.")], name


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package's Python files, alone, as a source tree has them."""
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "fastfusion", ignore=ignore)
    return tmp_path


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "the package was never built: run `pip install .`"),
        ({"cpu": None}, "the compiled part of the package was built, but its files are gone"),
        ({"cpu": "no time"}, "the package was built without its compiled part: no time"),
    ],
    ids=["never built", "lost", "left out"],
)
def test_without_the_compiled_part(
    record: dict[str, str | None] | None, reason: str, copied: Path
) -> None:
    if record is not None:
        (copied / "fastfusion/_build.json").write_text(json.dumps(record))
    facts = answer(CHOICES, copied)
    assert facts["file"].startswith(str(copied))
    assert facts["asked"] == facts["automatic"] == "reference" and facts["error"] is None
    assert facts["warnings"] == [], "nothing is broken, so there is nothing to warn of"
    assert facts["cpu"].startswith(reason)
    assert f"no: {facts['cpu']}" in facts["text"]
    assert facts["cpu"] in facts["cpu error"]


@needs_native
@pytest.mark.parametrize("broken", ["_torch_ops.so", "libfastfusion_cpu.so"])
def test_with_a_broken_compiled_part(broken: str, copied: Path) -> None:
    """One warning, and everything runs on the reference; info says why."""
    for built in PACKAGE.glob("*.so"):
        target = copied / "fastfusion" / built.name
        if built.match(broken):
            target.write_bytes(b"not a shared library")
        else:
            shutil.copy(built, target)
    facts = answer(CHOICES, copied)
    assert facts["file"].startswith(str(copied))
    assert facts["asked"] == facts["automatic"] == "reference" and facts["error"] is None
    (warning,) = facts["warnings"]
    assert "CPU kernels disabled" in warning and facts["cpu"] in warning
    assert facts["cpu"] in facts["cpu error"]
    assert f"no: {facts['cpu']}" in facts["text"]
