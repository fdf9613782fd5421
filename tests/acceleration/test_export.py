"""Accelerated models for other runtimes: plain torch, AOTInductor packages, ONNX."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import need, need_library
from torch import Tensor, nn

import fastfusion as ff
from fastfusion.backends import library

LENGTH = torch.export.Dim("length", min=2, max=64)


class Model(nn.Module):
    """Layers of torch.nn, which accelerate swaps, and one of ours."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"batch_first": True, "activation": "gelu"}
        layer = nn.TransformerEncoderLayer(64, 4, 128, **options)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(64, 4, 128, **options)
        self.fusion = ff.nn.CrossModalAttention(64, 64, 4, dim_feedforward=128)
        self.head = nn.Linear(64, 256)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        memory = self.encoder(x, src_key_padding_mask=hidden)
        decoded = self.decoder(x, memory, memory_key_padding_mask=hidden)
        memory, decoded = self.fusion(memory, decoded, hidden)
        return memory, self.head(decoded)


def build() -> Model:
    torch.manual_seed(1)
    return ff.accelerate(Model().eval())  # type: ignore[return-value]


def given(length: int) -> tuple[Tensor, Tensor]:
    """One sample with padding, and one that is nothing else: rows without keys."""
    hidden = torch.arange(length).expand(2, length) >= torch.tensor([[length - 1], [0]])
    return torch.randn(2, length, 64), hidden


def ops_in(program: Any) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-5, atol=2e-5)


# ---- plain torch


@pytest.mark.parametrize("strict", [False, True])
def test_export_mode_leaves_torchs_operators_alone(strict: bool) -> None:
    model = build()
    shapes = ({1: LENGTH}, {1: LENGTH})
    with torch.no_grad():
        assert any("fastfusion" in op for op in ops_in(torch.export.export(model, given(9))))
        with ff.export_mode():
            program = torch.export.export(model, given(9), dynamic_shapes=shapes, strict=strict)
        assert all(op.startswith(("aten.", "<built-in")) for op in ops_in(program))
        for length in (9, 5, 20):
            inputs = given(length)
            found = program.module()(*inputs)
            assert all(bool(t.isfinite().all()) for t in found)
            assert_close(found, model(*inputs))


def test_without_masks_a_softmax_is_a_softmax() -> None:
    with torch.no_grad(), ff.export_mode():
        program = torch.export.export(build(), given(9)[:1])
    names = {op.split(".")[1] for op in ops_in(program) if op.startswith("aten.")}
    assert "softmax" in names and not names & {"eq", "all", "masked_fill", "to", "promote_types"}


OPS = {op.name: op for op in ff.ops.ALL}
SHAPE = {
    "batch": 2, "heads": 4, "head_dim": 16, "q_len": 5, "kv_len": 7, "length": 6, "width": 32,
    "features": 48, "dim": 64, "context_dim": 48, "ffn": 96, "mask": "bool", "residual": True,
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_plain_in_export_mode(name: str) -> None:
    inputs = OPS[name].inputs(SHAPE, torch.float32, "cpu", 0)
    public = getattr(ff, name)

    class Call(nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> Any:
            return public(**{**inputs, **tensors}, backend="cpu")

    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    with torch.no_grad(), ff.export_mode():
        program = torch.export.export(Call(), (tensors,))
        assert not any("fastfusion" in op for op in ops_in(program))
        assert not any("fastfusion" in op for op in ops_in(program.run_decompositions()))
    with torch.no_grad():
        expected, found = public(**inputs), program.module()(tensors)
    several = isinstance(expected, tuple)
    assert_close(found if several else [found], expected if several else [expected])


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_narrow_weights_are_plain_in_export_mode(weights: str) -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    ff.accelerate(model, weights=weights)
    x = torch.randn(2, 9, 64)
    with torch.no_grad(), ff.export_mode():
        program = torch.export.export(model, (x,))
    assert not any("fastfusion" in op for op in ops_in(program))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-2, atol=1e-2)


def test_export_mode_ends_and_holds_against_others() -> None:
    q = torch.randn(1, 2, 3, 16)

    def chosen(**options: Any) -> str | None:
        explanation = ff.explain(ff.scaled_dot_product_attention, q, q, q, **options)
        assert isinstance(explanation, ff.Explanation)
        return explanation.chosen

    before = chosen()
    with pytest.raises(RuntimeError, match="within"), ff.export_mode():
        with ff.export_mode():
            pass
        with ff.use_backend("cpu"):
            assert chosen() == "reference"
        assert chosen(backend="cpu") == "reference"
        with pytest.raises(ValueError, match="backend must be one of"):
            ff.scaled_dot_product_attention(q, q, q, backend="gpu")
        raise RuntimeError("within")
    assert chosen() == before


def test_compiled_code_is_compiled_again() -> None:
    attention = ff.nn.MultiheadAttention(32, 2, batch_first=True).eval()
    graphs, x = [], torch.randn(1, 5, 32)

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(ops_in(graph))
        return graph.forward

    def attend(x: Tensor) -> Any:
        return attention(x, x, x, need_weights=False)[0]

    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    with torch.no_grad():
        found = [compiled(x)]
        with ff.export_mode():
            found.append(compiled(x))
        found.append(compiled(x))
    assert len(graphs) == 2 and not any("fastfusion" in op for op in graphs[1])
    assert_close(found[1:], found[:2])


def test_bert_of_transformers_is_plain_in_export_mode() -> None:
    model, inputs = bert()
    with torch.no_grad(), ff.export_mode():
        program = torch.export.export(model, (), inputs(2, 9))
    assert not any("fastfusion" in op for op in ops_in(program))
    with torch.no_grad():
        args = inputs(2, 9)
        found = program.module()(**args).last_hidden_state
        assert_close([found], [model(**args).last_hidden_state])


def bert() -> tuple[nn.Module, Callable[[int, int], dict[str, Tensor]]]:
    transformers = need_library("transformers")
    torch.manual_seed(2)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128,
    )  # fmt: skip
    model = ff.accelerate(transformers.BertModel(config, add_pooling_layer=False).eval())

    def inputs(batch: int, length: int) -> dict[str, Tensor]:
        mask = torch.arange(length).expand(batch, length) < length - torch.arange(batch)[:, None]
        return {"input_ids": torch.randint(50, (batch, length)), "attention_mask": mask.long()}

    return model, inputs


# ---- AOTInductor


def test_a_package_runs_in_fresh_processes_of_python_and_of_cpp(tmp_path: Path) -> None:
    need("tests/native/run_package.cpp")
    if library.native is None:
        pytest.skip("the compiled part is missing")
    model, x = build(), torch.randn(2, 20, 64)
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(2, 9, 64),), dynamic_shapes=({1: LENGTH},)
        )
        assert any("fastfusion" in op for op in ops_in(program))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        expected = model(x)
    ops = Path(ff.__file__).with_name("_torch_ops.so")
    (tmp_path / "x").write_bytes(x.numpy().tobytes())

    code = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "x = torch.from_file(sys.argv[3], size=2 * 20 * 64).view(2, 20, 64)\n"
        "out = torch._inductor.aoti_load_package(sys.argv[2])(x)[0]\n"
        "open(sys.argv[4], 'wb').write(out.contiguous().numpy().tobytes())\n"
        "assert 'fastfusion' not in sys.modules\n"
    )
    arguments = [str(ops), package, "x"]
    subprocess.run([sys.executable, "-c", code, *arguments, "python"], check=True, cwd=tmp_path)
    runner = _compiled_runner(tmp_path)
    subprocess.run([runner, *arguments, "cpp", "2", "20", "64"], check=True, cwd=tmp_path)
    for name in ("python", "cpp"):
        found = torch.frombuffer(bytearray((tmp_path / name).read_bytes()), dtype=torch.float32)
        assert_close([found.view(2, 20, 64)], expected[:1])


def _compiled_runner(folder: Path) -> str:
    """tests/native/run_package.cpp."""
    torch_folder = Path(torch.__file__).parent
    include, lib = torch_folder / "include", torch_folder / "lib"
    source = Path(__file__).parents[1] / "native/run_package.cpp"
    command = [
        os.environ.get("CXX", "g++"), "-std=c++20", "-O0", f"-I{include}",
        f"-I{include}/torch/csrc/api/include", str(source), "-o", "run_package",
        f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=folder)
    return str(folder / "run_package")


# ---- ONNX


def in_onnxruntime(path: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    return lambda args: torch.from_numpy(
        session.run(None, {name: t.numpy() for name, t in args.items()})[0]
    )


def in_openvino(path: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    """In float32: where the processor has bfloat16, that is what it takes by itself."""
    openvino: Any = pytest.importorskip("openvino")
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.compile_model(openvino.Core().read_model(path), "CPU", hint)
    return lambda args: torch.from_numpy(
        model({name: t.numpy() for name, t in args.items()})[0].copy()
    )


@pytest.mark.parametrize("runtime", [in_onnxruntime, in_openvino])
def test_onnx_at_other_lengths(
    runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opset 23; of a sample that is padding alone, too, which only masks of bools hide: also where
    the model has not been called before."""
    pytest.importorskip("onnxscript")
    interface = import_module("fastfusion.integrations.transformers._interface")
    monkeypatch.setattr(interface, "_reads_bool", {})
    model, inputs = bert()
    batch = torch.export.Dim("batch", min=1, max=64)
    example = inputs(2, 9)
    with torch.no_grad():
        program = torch.onnx.export(
            model, (), kwargs=example, dynamo=True, opset_version=23, verbose=False,
            dynamic_shapes={name: {0: batch, 1: LENGTH} for name in example},
        )  # fmt: skip
    assert program is not None
    program.save(str(tmp_path / "bert.onnx"))
    domains = {node.domain for node in program.model.graph}
    assert domains <= {"", "ai.onnx"}
    run = runtime(tmp_path / "bert.onnx")
    for size in ((2, 9), (1, 5), (3, 30)):
        args = inputs(*size)
        args["attention_mask"][-1] = 0
        with torch.no_grad():
            assert_close([run(args)], [model(**args).last_hidden_state])
