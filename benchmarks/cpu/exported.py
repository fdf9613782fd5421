"""Whole layers in inference runtimes as peers, where a user has installed them.

Each runs an export of the stock layer of torch.nn, in float32 or with weights of 8-bit integers or
bfloat16, made once in some seconds: they are timed on the shapes of SOME; ``--peers`` by name takes
all shapes.
"""

import contextlib
import copy
import io
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.ops import Call
from ..common.peers import Skipped
from .runtimes import onnx_call, openvino_call

SOME = ("bert_20", "vit_197", "bert_36_b8", "fusion_64", "cross_20_36")
Forward = Callable[[nn.Module, list[Tensor]], Call]


class _Function(nn.Module):
    """A module whose forward takes the inputs and returns one tensor, as exporters want it."""

    def __init__(self, module: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.module, self.call = module, forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.module, list(inputs))()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters and quantisers tell much, from C++ and Python."""
    out = io.StringIO()
    sys.stdout.flush()
    before = logging.root.manager.disable
    saved = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    logging.disable(logging.WARNING)
    for number in (1, 2):
        os.dup2(nowhere, number)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            yield
    finally:
        for number, old in zip((1, 2), saved, strict=True):
            os.dup2(old, number)
            os.close(old)
        os.close(nowhere)
        logging.disable(before)


@dataclass
class Layer:
    """What is exported.

    Attributes:
        module: the stock layer, float32, in eval mode.
        forward: makes a call of it that returns one tensor.
        inputs: float32; the runtimes read their memory.
    """

    module: nn.Module
    forward: Forward
    inputs: list[Tensor]

    @property
    def function(self) -> nn.Module:
        return _Function(self.module, self.forward).eval()

    @cached_property
    def out(self) -> Tensor:
        """Memory for the result, contiguous, as that of attention in torch.nn is not."""
        with torch.no_grad():
            return torch.empty(self.forward(self.module, self.inputs)().shape)

    @cached_property
    def onnx(self) -> Any:
        """The layer as an ONNX model."""
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError:
            raise Skipped("not installed (pip install onnx onnxscript)") from None
        with _quiet(), torch.inference_mode(False), torch.no_grad():
            inputs = tuple(t.clone() for t in self.inputs)
            program = torch.onnx.export(self.function, inputs, dynamo=True, verbose=False)
        assert program is not None
        return program.model_proto

    @property
    def named_inputs(self) -> dict[str, Tensor]:
        return dict(zip((i.name for i in self.onnx.graph.input), self.inputs, strict=True))


def onnxruntime(layer: Layer, weights: str | None) -> Call:
    """onnxruntime; integers with its dynamic quantisation, QInt8 by channel."""
    try:
        import onnxruntime  # noqa: F401
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        raise Skipped("not installed (pip install onnx onnxruntime)") from None
    if weights == "bf16":
        raise Skipped("has no bfloat16 on CPUs")
    if weights is None:
        run = onnx_call(layer.onnx.SerializeToString(), layer.named_inputs, layer.out)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder, "model.onnx"))
            with _quiet():
                quantize_dynamic(layer.onnx, file, per_channel=True, weight_type=QuantType.QInt8)
            run = onnx_call(file, layer.named_inputs, layer.out)

    def call() -> Tensor:
        run()
        return layer.out

    return call


def openvino(layer: Layer, weights: str | None) -> Call:
    """OpenVINO in a precision that is set, since bfloat16 is its default on some CPUs; activations
    beside integers in groups of 128: its own choice, 32, takes a quarter more time."""
    try:
        import openvino
    except ImportError:
        raise Skipped("not installed (pip install openvino)") from None
    model = openvino.Core().read_model(layer.onnx.SerializeToString())
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if weights == "bf16" else "f32"}
    if weights == "int8":
        _compress(model)
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 128
    return openvino_call(model, layer.inputs, layer.out, options)


def _compress(model: Any) -> None:
    """Gives an OpenVINO model's products integers and a scale for each feature as weights, in the
    form that its own compression (NNCF) leaves behind."""
    import numpy
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        constant = node.input_value(1).get_node()
        if constant.get_type_name() != "Constant":  # a product of attention
            continue
        attributes = node.get_attributes()
        weight = constant.data if attributes["transpose_b"] else constant.data.T
        scale = numpy.abs(weight).max(1, keepdims=True) / 127
        integers = numpy.round(weight / scale).astype(numpy.int8)
        wide = opset13.multiply(
            opset13.convert(opset13.constant(integers), "f32"), opset13.constant(scale)
        )
        product = opset13.matmul(node.input_value(0), wide, attributes["transpose_a"], True)
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(product.output(0))


def litert(layer: Layer, weights: str | None) -> Call:
    """LiteRT, that is XNNPACK; integers with its dynamic quantisation."""
    try:
        with _quiet():
            import litert_torch
            from ai_edge_litert.interpreter import Interpreter
            from ai_edge_quantizer import quantizer, recipe
    except ImportError:
        raise Skipped("not installed (pip install ai-edge-litert litert-torch)") from None
    if weights == "bf16":
        raise Skipped("has no bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "model.tflite"))
        with _quiet(), torch.inference_mode(False), torch.no_grad():
            inputs = tuple(t.clone() for t in layer.inputs)
            litert_torch.convert(layer.function, inputs).export(file)
            if weights == "int8":
                made = quantizer.Quantizer(file)
                made.load_quantization_recipe(recipe.dynamic_wi8_afp32())
                file = str(Path(folder, "int8.tflite"))
                made.quantize().export_model(file)
        with _quiet():
            interpreter = Interpreter(file, num_threads=torch.get_num_threads())
            interpreter.allocate_tensors()
    given = sorted(interpreter.get_input_details(), key=lambda details: details["name"])
    for details, tensor in zip(given, layer.inputs, strict=True):
        interpreter.set_tensor(details["index"], tensor.numpy())
    view = interpreter.tensor(interpreter.get_output_details()[0]["index"])

    def call() -> Tensor:
        interpreter.invoke()
        return torch.from_numpy(view())

    return call


def frozen(layer: Layer, weights: str | None) -> Call:
    """torch.compile with frozen weights, which it packs; off torch's fused path, which it would
    call as it is."""
    import torch._inductor.config as config

    from .compiled import require_compiler

    if weights == "int8":
        raise Skipped("its weights are float32 or bfloat16")
    require_compiler()
    module, inputs = layer.module, layer.inputs
    if weights == "bf16":
        module, inputs = in_bfloat16(layer.module, layer.inputs)
    torch.compiler.reset()
    compiled: Any = torch.compile(module, dynamic=False)
    call = layer.forward(compiled, inputs)
    with config.patch(freezing=True):
        call()
    return call


def in_bfloat16(module: nn.Module, inputs: list[Tensor]) -> tuple[nn.Module, list[Tensor]]:
    """A copy of a module, and of its inputs."""
    return copy.deepcopy(module).bfloat16(), [t.bfloat16() for t in inputs]


RUNTIMES: dict[str, Callable[[Layer, str | None], Call]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "litert": litert,
}
