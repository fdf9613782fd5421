"""Inference runtimes as peers, where a user has installed them: ``pip install fastfusion[bench]``.

Each runs a model of one attention node, built once, on the memory of torch's tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.peers import Arguments, Skipped, additive, attend_mask, mask_or_causal, whole_mask


def _wide_heads(call: Arguments) -> list[Tensor]:
    """query, key and value, contiguous, with as many heads of keys as of queries."""
    query, key, value = (call[name].detach() for name in ("query", "key", "value"))
    repeats = query.shape[1] // key.shape[1]
    wide = [query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)]
    return [t.contiguous() for t in wide]


def _scores(wide: list[Tensor]) -> tuple[int, int]:
    """Lq and Lk."""
    return wide[0].shape[2], wide[1].shape[2]


def _scale(call: Arguments) -> float:
    scale = call.get("scale")
    return call["query"].shape[-1] ** -0.5 if scale is None else scale


def openvino_tensor(tensor: Tensor) -> Any:
    """A contiguous tensor's memory as OpenVINO takes it; NumPy has no bfloat16."""
    import openvino

    types = openvino.Type
    names = {
        torch.float32: types.f32, torch.bfloat16: types.bf16, torch.float16: types.f16,
        torch.bool: types.boolean,
    }  # fmt: skip
    bits = tensor.view(torch.int16) if tensor.element_size() == 2 else tensor
    return openvino.Tensor(bits.numpy(), list(tensor.shape), names[tensor.dtype])


def openvino(call: Arguments) -> Callable[[], Tensor]:
    """OpenVINO's attention in the precision of the inputs."""
    try:
        import openvino
        from openvino import opset13
    except ImportError:
        raise Skipped("not installed (pip install openvino)") from None
    inputs = _wide_heads(call)
    hints = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    if inputs[0].dtype not in hints:
        raise Skipped(f"has no {inputs[0].dtype}".replace("torch.", ""))
    mask, causal = mask_or_causal(call)
    inputs += [] if mask is None else [mask.contiguous()]
    types = [openvino_tensor(t).element_type for t in inputs]
    parameters = [
        opset13.parameter(list(t.shape), kind) for t, kind in zip(inputs, types, strict=True)
    ]
    node = opset13.scaled_dot_product_attention(
        *parameters, causal=causal,
        **({"scale": opset13.constant(call["scale"])} if call.get("scale") is not None else {}),
    )  # fmt: skip
    model = openvino.Model([node], parameters)
    out = torch.empty(*inputs[0].shape[:3], inputs[2].shape[3], dtype=inputs[0].dtype)
    return openvino_call(model, inputs, out, {"INFERENCE_PRECISION_HINT": hints[out.dtype]})


def openvino_call(
    model: Any, inputs: list[Tensor], out: Tensor, options: Arguments
) -> Callable[[], Tensor]:
    """A call of an OpenVINO model on the memory of `inputs` and `out`."""
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY", **options
    }  # fmt: skip
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    for index, tensor in enumerate(inputs):
        request.set_input_tensor(index, openvino_tensor(tensor))
    request.set_output_tensor(0, openvino_tensor(out))

    def run() -> Tensor:
        assert inputs  # whose memory the request reads
        request.infer()
        return out

    return run


def _onnx_session(
    node: str, attributes: Arguments, inputs: Sequence[Tensor | None], out: Tensor
) -> Callable[[], None]:
    """A call of one ONNX node on the memory of `inputs` and `out`; None stands for no input."""
    try:
        import onnxruntime  # noqa: F401
        from onnx import TensorProto, helper
    except ImportError:
        raise Skipped("not installed (pip install onnx onnxruntime)") from None
    if out.dtype != torch.float32:
        raise Skipped("its attention on CPUs is float32 alone")
    kinds = {torch.float32: TensorProto.FLOAT, torch.bool: TensorProto.BOOL}
    given = {f"input{i}": t for i, t in enumerate(inputs) if t is not None}
    domain = {} if node == "Attention" else {"domain": "com.microsoft"}
    graph = helper.make_graph(
        [
            helper.make_node(
                node,
                [f"input{i}" if t is not None else "" for i, t in enumerate(inputs)],
                ["out"],
                **domain,
                **attributes,
            )  # fmt: skip
        ],
        "attention",
        [helper.make_tensor_value_info(n, kinds[t.dtype], t.shape) for n, t in given.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, out.shape)],
    )
    versions = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=11)
    return onnx_call(model.SerializeToString(), given, out)


def onnx_call(model: bytes | str, given: dict[str, Tensor], out: Tensor) -> Callable[[], None]:
    """A call of an ONNX model, its bytes or its file, on the memory of `given` and `out`."""
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, tensor in given.items():
        kind = numpy.bool_ if tensor.dtype == torch.bool else numpy.float32
        binding.bind_input(name, "cpu", 0, kind, list(tensor.shape), tensor.data_ptr())
    output = session.get_outputs()[0].name
    binding.bind_output(output, "cpu", 0, numpy.float32, list(out.shape), out.data_ptr())

    def run() -> None:
        assert given  # whose memory the session reads
        session.run_with_iobinding(binding)

    return run


def onnxruntime(call: Arguments) -> Callable[[], Tensor]:
    """onnxruntime's Attention (ONNX opset 23)."""
    inputs = _wide_heads(call)
    mask = attend_mask(call)
    if mask is not None:
        inputs.append(mask.expand(*mask.shape[:-2], *_scores(inputs)).contiguous())
    out = inputs[0].new_empty(*inputs[0].shape[:3], inputs[2].shape[3])
    attributes = {"scale": _scale(call), "is_causal": int(bool(call.get("is_causal")))}
    session = _onnx_session("Attention", attributes, inputs, out)

    def run() -> Tensor:
        session()
        return out

    return run


def onnxruntime_fused(call: Arguments) -> Callable[[], Tensor]:
    """onnxruntime's own MultiHeadAttention, whose tensors are (B, L, H * D)."""
    wide = _wide_heads(call)
    heads = wide[0].shape[1]
    inputs: list[Any] = [t.transpose(1, 2).flatten(2) for t in wide]
    causal = bool(call.get("is_causal"))
    causal &= wide[0].shape[2] == wide[1].shape[2]  # its own diagonal is aligned bottom right
    bias = additive(attend_mask(call) if causal else whole_mask(call), wide[0].dtype)
    if bias is not None:
        bias = bias.expand(*[1] * (4 - bias.dim()), *bias.shape)
        inputs += [None, None, bias.expand(*bias.shape[:-2], *_scores(wide)).contiguous()]
    out = inputs[0].new_empty(*inputs[0].shape[:2], inputs[2].shape[2])
    attributes = {"num_heads": heads, "scale": _scale(call), "unidirectional": int(causal)}
    session = _onnx_session("MultiHeadAttention", attributes, inputs, out)
    view = out.unflatten(2, (heads, -1)).transpose(1, 2)

    def run() -> Tensor:
        session()
        return view

    return run


# Without gradients.
ALL = {"openvino": openvino, "onnxruntime": onnxruntime, "onnxruntime fused": onnxruntime_fused}
