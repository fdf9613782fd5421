"""ONNX's operators as the formulas of onnx.py and its neighbours write them, for both of torch's
exporters."""

from collections.abc import Callable
from typing import Any

import torch


class Operators:
    """ONNX's operators as methods: inputs are values of the graph, floats, ints, bools or lists of
    ints (float32 and int64 constants), keywords are attributes, left out where None."""

    fused = False  # whether there is `Attention`

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def add(*inputs: Any, **attributes: Any) -> Any:
            values = [self._constant(i) if isinstance(i, float | int | list) else i for i in inputs]
            given = {key: value for key, value in attributes.items() if value is not None}
            return self._node(name, values, given)

        return add

    def _constant(self, number: Any) -> Any:
        raise NotImplementedError

    def _node(self, name: str, inputs: list[Any], attributes: dict[str, Any]) -> Any:
        raise NotImplementedError


def _tensor(number: Any) -> torch.Tensor:
    dtype = {float: torch.float32, bool: torch.bool}.get(type(number), torch.int64)
    return torch.tensor(number, dtype=dtype, device="cpu")


class Script(Operators):
    """As onnxscript records them for torch's exporter."""

    def __init__(self, fused: bool) -> None:
        self.fused = fused

    def _constant(self, number: Any) -> Any:
        import onnx_ir

        return self._node("Constant", [], {"value": onnx_ir.tensor(_tensor(number).numpy())})

    def _node(self, name: str, inputs: list[Any], attributes: dict[str, Any]) -> Any:
        import onnxscript

        opset = onnxscript.opset23 if name == "Attention" else onnxscript.opset18
        return getattr(opset, name)(*inputs, **attributes)

    @staticmethod
    def dtype(value: Any) -> int:
        return value.dtype

    @staticmethod
    def size(value: Any, dim: int) -> int | None:
        size = value.shape[dim]
        return size if isinstance(size, int) else None

    @staticmethod
    def rank(value: Any) -> int | None:
        return len(value.shape)


class Graph(Operators):
    """As nodes of the TorchScript exporter's graph."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def _constant(self, number: Any) -> Any:
        return self._graph.op("Constant", value_t=_tensor(number))

    def _node(self, name: str, inputs: list[Any], attributes: dict[str, Any]) -> Any:
        # The suffix says that it is an integer or a list of them.
        return self._graph.op(name, *inputs, **{f"{k}_i": v for k, v in attributes.items()})

    @staticmethod
    def dtype(value: Any) -> int:
        dtype: Any = torch.onnx.JitScalarType.from_value(value).onnx_type()
        return int(dtype)

    @staticmethod
    def size(value: Any, dim: int) -> int | None:
        return torch.onnx.symbolic_helper._get_tensor_dim_size(value, dim)

    @staticmethod
    def rank(value: Any) -> int | None:
        return torch.onnx.symbolic_helper._get_tensor_rank(value)
