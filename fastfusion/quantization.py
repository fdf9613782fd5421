"""Linear layers of a model with weights of 8-bit integers or bfloat16, in place."""

import dis
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastfusion.core.int8 import shape_of
from fastfusion.nn import _nested
from fastfusion.nn._linear import AcceleratedLinear
from fastfusion.nn._multihead import MultiheadAttention
from fastfusion.nn._quantized import QuantizedLinear, check_weights, product
from fastfusion.nn._transformer import TransformerEncoder, TransformerEncoderLayer
from fastfusion.ops.linear import MAX_INT8_WIDTH

_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear, AcceleratedLinear)
_INPUTS = ("query", "key", "value")
_SEPARATE = ("q_proj", "k_proj", "v_proj")
# Hooks that read or write a state_dict, whose entries become others.
_STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip
# Those of calls, with what torch keeps beside them.
_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RANDOM_ROWS = 64
_MAKING = ("init_weights", "reset_parameters")  # how methods end that fill weights with numbers


@dataclass(frozen=True)
class QuantizedLayer:
    """What became of a layer.

    Attributes:
        name: of the layer in the model, and in its state_dict.
        weights: "int8" or "bf16"; None where it was left as it was.
        cosine: similarity of its output with that of the layer before, over all tokens and
            features; None where nothing was computed.
        deviation: the largest difference of the two outputs, as a share of the largest output.
        measured_on: "example inputs", or "random inputs".
        bytes_before, bytes_after: of the weight, with its scales.
        reason: why it was left as it was.
    """

    name: str
    weights: str | None
    cosine: float | None
    deviation: float | None
    measured_on: str | None
    bytes_before: int
    bytes_after: int
    reason: str | None = None


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` did to a model, to be read by people as `str(report)`.

    Attributes:
        layers: a row for each layer that was asked for.
        bytes_before, bytes_after: of all parameters and buffers of the model.
    """

    layers: tuple[QuantizedLayer, ...]
    bytes_before: int
    bytes_after: int

    @property
    def quantized(self) -> tuple[QuantizedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.weights is not None)

    @property
    def kept(self) -> tuple[QuantizedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.weights is None)

    def __str__(self) -> str:
        head = ("layer", "weights", "cosine", "deviation", "bytes", "")
        rows = [head, *map(_cells, self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.rjust(width) if i in (2, 3) else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        share = self.bytes_after / self.bytes_before if self.bytes_before else 1.0
        lines.append(
            f"{len(self.quantized)} of {len(self.layers)} layers; the model takes "
            f"{self.bytes_after:,} of {self.bytes_before:,} bytes ({share:.3f})"
        )
        return "\n".join(lines)

    __repr__ = __str__


def _cells(layer: QuantizedLayer) -> tuple[str, ...]:
    return (
        layer.name,
        layer.weights or "as before",
        "" if layer.cosine is None else f"{layer.cosine:.5f}",
        "" if layer.deviation is None else f"{layer.deviation:.2%}",
        f"{layer.bytes_before:,} -> {layer.bytes_after:,}",
        layer.reason or layer.measured_on or "",
    )


@dataclass
class _Candidate:
    """A weight that may be replaced.

    Attributes:
        name: of the module that will hold it.
        weight, bias: of the layer as it is.
        owner: the module that has them.
        parts: the inputs of `owner` that they are applied to, each the next of equal parts.
        reason: why the layer has to stay as it is.
        quantized: the module that will hold the weight, once it is made.
        products: of the outputs before with those now, with themselves, and of those now.
        largest, difference: of the outputs before, and between both.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    owner: nn.Module
    parts: tuple[str, ...]
    reason: str | None = None
    quantized: Any = None
    measured_on: str | None = None
    products: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    largest: float = 0.0
    difference: float = 0.0

    def compare(self, inputs: Mapping[str, Tensor], measured_on: str) -> None:
        """Take the outputs of these inputs into account."""
        self.measured_on = measured_on
        features = self.weight.shape[0] // len(self.parts)
        for i, name in enumerate(self.parts):
            x = inputs[name]
            packed = _nested.pack(x) if x.is_nested else None
            x = (x if packed is None else packed.values).to(self.weight.dtype)
            rows = slice(i * features, (i + 1) * features)
            bias = None if self.bias is None else self.bias[rows]
            before = F.linear(x, self.weight[rows], bias).double()
            now = product(x, *self.quantized.operands(i, i + 1)).double()
            for j, (a, b) in enumerate(((before, now), (before, before), (now, now))):
                self.products[j] += float((a * b).sum())
            if before.numel():
                self.largest = max(self.largest, float(before.abs().max()))
                self.difference = max(self.difference, float((now - before).abs().max()))

    def compare_random(self) -> None:
        """Take normally distributed inputs."""
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (1, _RANDOM_ROWS, self.weight.shape[1])
        x = torch.randn(shape, generator=generator, device="cpu").to(self.weight.device)
        self.compare(dict.fromkeys(self.parts, x), "random inputs")

    @property
    def cosine(self) -> float:
        both, before, now = self.products
        if before == 0.0 or now == 0.0:
            return 1.0 if before == now else 0.0
        return both / math.sqrt(before) / math.sqrt(now)

    def row(self, weights: str) -> QuantizedLayer:
        before = after = _size(self.weight)
        if self.reason is None:
            after = sum(map(_size, self.quantized.operands()[:2]))
        cosine = deviation = None
        if self.measured_on is not None:
            cosine = self.cosine
            deviation = self.difference / self.largest if self.largest else self.difference
        return QuantizedLayer(
            self.name, None if self.reason else weights, cosine, deviation, self.measured_on,
            before, after, self.reason,
        )  # fmt: skip


def quantize(
    model: nn.Module,
    weights: str = "int8",
    *,
    modules: Any = None,
    example_inputs: Any = None,
    bound: float = 0.99,
    tied: bool = False,
) -> QuantizationReport:
    """Give the linear layers of a model weights of 8-bit integers or bfloat16, in place.

    Every `torch.nn.Linear`, also those in modules of `fastfusion.nn`, becomes a
    :class:`fastfusion.nn.QuantizedLinear`, and so do the input projections of
    `fastfusion.nn.MultiheadAttention`. Hooks go along; the float weights are dropped. The model is
    for inference from then on. Left as they are, each with its reason in the report: subclasses of
    `torch.nn.Linear`, layers whose weight is computed or shared with something else, or is read by
    the code of the module they are in (`self.part.weight`), `torch.nn.MultiheadAttention` and
    `torch.nn.TransformerEncoderLayer`, which read the weights of their parts, layers that integers
    would make larger, layers that `example_inputs` do not reach, and those whose outputs deviate.

    A state_dict of the model holds int8 weights, scales and biases under the names of the layers.
    To load it, quantise a new model alike, whatever its weights, and load into that:

        safetensors.torch.save_model(model, "model.safetensors")
        ...
        model = Model()
        fastfusion.quantize(model)
        safetensors.torch.load_model(model, "model.safetensors")

    with `modules=[layer.name for layer in report.quantized]` where some were left out, and
    `bound=-1` to have nothing measured against it.

    Args:
        model: any module but a torch.nn.Linear, in training mode or not, on any device.
        weights: "int8", a quarter of float32, or "bf16", half of it, for layers in float32.
        modules: which layers, all by default: names or patterns of names ("encoder.*"), classes, or
            a function (name, module) to bool, or several of these. A layer is taken with any module
            that it is in.
        example_inputs: arguments of `model`: a tuple, a dict of keyword arguments or one tensor. It
            is called once, in eval mode, and layers are compared on the inputs that they get.
            Without them on random ones.
        bound: a layer whose output has a lower cosine similarity with what it was stays as it is.
        tied: also take a layer whose weight a `torch.nn.Embedding` has too, as the last one of a
            language model: it gets a weight of its own, and the embedding keeps the wide one. Each
            token is faster for more memory.

    Returns:
        A row for each layer, and the memory of the model.

    Raises:
        TypeError: an argument is not of the type named above.
        ValueError: unknown `weights`; a pattern or class in `modules` that is nowhere in the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Linear):
        raise TypeError(
            "model is a torch.nn.Linear, which cannot be replaced in place: "
            "fastfusion.nn.QuantizedLinear.from_linear(model)"
        )
    check_weights(weights)
    if isinstance(bound, bool) or not isinstance(bound, int | float):
        raise TypeError(f"bound must be a number, got {bound!r}")
    selected = _selected(model, modules)
    args, kwargs = arguments_of(() if example_inputs is None else example_inputs)
    before = memory_of(model)
    candidates = [c for c in _candidates(model) if c.name in selected]
    _leave_shared(model, candidates, tied)
    with torch.no_grad():
        for c in candidates:
            c.reason = c.reason or _reason(c, weights)
        _leave_incomplete(candidates)
        _make(candidates, weights)
        possible = [c for c in candidates if c.reason is None]
        if example_inputs is not None:
            _run(model, possible, args, kwargs)
        for c in possible:
            if example_inputs is None and not c.weight.is_meta:
                c.compare_random()
            if c.measured_on is not None and not c.cosine >= bound:
                c.reason = f"its cosine similarity is below {bound}"
            elif c.measured_on is None and not c.weight.is_meta:
                c.reason = "the example inputs do not reach it"
        _leave_incomplete(possible)
    for c in possible:
        if c.reason is None:
            _replace(model, c)
    rows = tuple(c.row(weights) for c in candidates)
    return QuantizationReport(rows, before, memory_of(model))


def arguments_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a model.

    Raises:
        TypeError: what is neither a tuple, nor a mapping with names, nor a tensor.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping) and all(
        isinstance(name, str) for name in example_inputs
    ):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise TypeError(
        "example_inputs must be a tuple of arguments, a dict of keyword arguments or a Tensor, got "
        f"{type(example_inputs).__name__}"
    )


# ---- which layers


def _selected(model: nn.Module, modules: Any) -> set[str]:
    """The names of all layers that `modules` takes: of nn.Linear and of input projections."""
    names = [c.name for c in _candidates(model)]
    if modules is None:
        return set(names)
    several = isinstance(modules, Iterable) and not isinstance(modules, str | type)
    owners = dict(model.named_modules(remove_duplicate=False))

    def takes(rule: Any, name: str) -> bool:
        if isinstance(rule, str):
            return fnmatchcase(name, rule)
        module = owners.get(name, owners[name.rpartition(".")[0]])  # of a projection, its attention
        if isinstance(rule, type):
            return isinstance(module, rule)
        return bool(rule(name, module))

    found: set[str] = set()
    for rule in modules if several else [modules]:
        if not (isinstance(rule, str | type) or callable(rule)):
            raise TypeError(
                "modules must be names, classes, a function (name, module) to bool or several of "
                f"these, got {rule!r}"
            )
        is_function = not isinstance(rule, str | type)
        asked = {name: [name] if is_function else [*_with_owners(name)] for name in names}
        taken = {name for name in names if any(takes(rule, n) for n in asked[name])}
        if not taken and not is_function:
            raise ValueError(f"modules: no linear layer of the model is {rule!r}, or in one")
        found |= taken
    return found


def _with_owners(name: str) -> Iterator[str]:
    """A name, and those of the modules that it is in, "" of the model."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    """All layers, those that have to be left alone with the reason."""
    read = dict((*_read_by_owners(model), *_read_by_torch(model)))
    for name, module in model.named_modules():
        reason = read.get(id(module))
        if isinstance(module, nn.Linear):
            weight: Tensor | None = module._parameters.get("weight")
            weight = torch.empty(0) if weight is None else weight
            bias = module._parameters.get("bias")
            reason = reason or _strange(module)
            yield _Candidate(name, weight, bias, module, ("input",), reason)
        elif isinstance(module, nn.MultiheadAttention):
            yield from _projections(name, module, reason)


def _read_by_owners(model: nn.Module) -> Iterator[tuple[int, str]]:
    """Modules whose `weight` the code of the module they are in reads: for a product of its own, as
    timm's Swin Transformer V2, or for its dtype, as T5."""
    for module in model.modules():
        kind: Any = type(module)
        for name in _weights_read_by(kind):
            part = module._modules.get(name)
            if part is not None:
                yield id(part), f"{type(module).__name__} reads its weight"


@cache
def _weights_read_by(kind: type) -> frozenset[str]:
    """The parts x of `self.x.weight` in the methods of a class, but for those that make it."""
    found: set[str] = set()
    for base in kind.__mro__:
        # Of those it is known: `_read_by_torch`.
        if base.__module__.partition(".")[0] in ("torch", "fastfusion", "builtins"):
            continue
        for name, method in vars(base).items():
            function = inspect.unwrap(method) if callable(method) else method
            code = getattr(function, "__code__", None)
            if code is not None and name != "__init__" and not name.endswith(_MAKING):
                found.update(_owners_of_weights(code))
    return frozenset(found)


def _owners_of_weights(code: Any) -> Iterator[str]:
    before = None
    for step in dis.get_instructions(code):
        is_attribute = step.opname == "LOAD_ATTR"
        if is_attribute and step.argval == "weight" and before is not None:
            yield before
        before = step.argval if is_attribute else None
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _owners_of_weights(inner)


def _read_by_torch(model: nn.Module) -> Iterator[tuple[int, str]]:
    """Modules whose weights a module of torch.nn reads, in its fast path at least: id and why."""
    for module in model.modules():
        parts: list[Any] = []
        if isinstance(module, nn.MultiheadAttention):
            if not isinstance(module, MultiheadAttention):
                parts = [module, module.out_proj]
        elif isinstance(module, nn.TransformerEncoderLayer):
            if not isinstance(module, TransformerEncoderLayer):
                parts = [*module.children()]
        elif isinstance(module, nn.TransformerEncoder):
            first = next(module.layers.children(), None)
            if not isinstance(module, TransformerEncoder) and first is not None:
                parts = [*first.modules()]
        for part in parts:
            yield id(part), f"torch.nn's {type(module).__name__} reads its weight"


def _projections(name: str, module: Any, reason: str | None) -> Iterator[_Candidate]:
    """Of an attention's inputs."""
    parameters = module._parameters
    prefix = f"{name}." if name else ""
    if reason is None and type(module) is not MultiheadAttention:
        reason = f"{type(module).__name__} is a subclass, which may read the weight"
    bias = parameters.get("in_proj_bias")
    whole = parameters.get("in_proj_weight")
    if whole is not None:
        yield _Candidate(f"{prefix}in_proj", whole, bias, module, _INPUTS, reason)
        return
    biases = (None,) * 3 if bias is None else [b.clone() for b in bias.detach().chunk(3)]
    for projection, own, given in zip(_SEPARATE, biases, _INPUTS, strict=True):
        weight = parameters.get(f"{projection}_weight")
        if weight is not None:
            yield _Candidate(f"{prefix}{projection}", weight, own, module, (given,), reason)


def _strange(module: nn.Linear) -> str | None:
    """Why calling this layer may not come to the product with its weight."""
    own = module.__dict__
    if type(module) not in _LINEAR:
        return f"{type(module).__name__} is a subclass of torch.nn.Linear"
    if "forward" in own:
        return "its forward was replaced"
    if own["_parameters"].get("weight") is None:
        return "its weight is computed"
    if any(own.get(hooks) for hooks in _STATE_HOOKS):
        return "it has hooks of its state_dict"
    return None


def _reason(candidate: _Candidate, weights: str) -> str | None:
    """Why a weight cannot be quantised, or would not gain by it."""
    weight = candidate.weight
    if type(weight) not in (Tensor, nn.Parameter) or weight.layout is not torch.strided:
        return f"its weight is a {type(weight).__name__} of layout {weight.layout}"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weights == "bf16":
        return None if weight.dtype == torch.float32 else f"its weight is {weight.dtype}"
    features, width = weight.shape
    if width > MAX_INT8_WIDTH:
        return f"it is more than {MAX_INT8_WIDTH} wide"
    if weight.is_meta:
        return None
    if not bool(weight.isfinite().all()):
        return "its weight is not finite"
    parts = len(candidate.parts)
    packed = math.prod(shape_of(parts, features // parts, width))
    if packed + 4 * features >= _size(weight):
        return "it is too small: integers are padded to 64 features"
    return None


def _leave_shared(model: nn.Module, candidates: list[_Candidate], tied: bool) -> None:
    """Leave alone weights that something else than these layers, and embeddings if those may, has
    too."""
    free = {(id(c.weight), id(c.owner)) for c in candidates if c.reason is None}
    for name, module in model.named_modules():
        if tied and type(module) is nn.Embedding:
            continue
        for parameter in module._parameters.values():
            for c in candidates if (id(parameter), id(module)) not in free else ():
                if c.weight is parameter and c.reason is None:
                    c.reason = f"{name or 'the model'} has the same weight"


def _leave_incomplete(candidates: list[_Candidate]) -> None:
    """Leave alone projections of an attention whose other ones stay as they are."""
    going: dict[int, int] = {}
    for c in candidates:
        going[id(c.owner)] = going.get(id(c.owner), 0) + (c.reason is None)
    for c in candidates:
        if c.reason is None and _is_separate(c) and going[id(c.owner)] < len(_SEPARATE):
            c.reason = "the three projections of an attention go together"


def _is_separate(candidate: _Candidate) -> bool:
    return len(candidate.parts) == 1 and not isinstance(candidate.owner, nn.Linear)


# ---- making, comparing, replacing


def _make(candidates: list[_Candidate], weights: str) -> None:
    made: dict[tuple[int, int], Any] = {}
    for c in candidates:
        if c.reason is not None:
            continue
        c.quantized = QuantizedLinear(c.weight, c.bias, weights, parts=len(c.parts))
        c.quantized.train(c.owner.training)
        first = made.setdefault((id(c.weight), len(c.parts)), c.quantized)
        c.quantized._buffers.update(first._buffers)  # what was shared stays so
        if weights == "bf16":
            c.quantized.weight = first.weight


def _run(
    model: nn.Module, candidates: list[_Candidate], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Call the model and compare the layers on what they are given."""
    owners: dict[nn.Module, list[_Candidate]] = {}
    for c in candidates:
        owners.setdefault(c.owner, []).append(c)

    def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        names = ("input",) if isinstance(module, nn.Linear) else _INPUTS
        inputs = {**dict(zip(names, given, strict=False)), **named}
        for c in owners[module]:
            c.compare(inputs, "example inputs")

    modes = {module: module.training for module in model.modules()}
    handles = [m.register_forward_pre_hook(look, with_kwargs=True) for m in owners]
    try:
        model.eval()
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _replace(model: nn.Module, candidate: _Candidate) -> None:
    owner, new = candidate.owner, candidate.quantized
    if isinstance(owner, nn.Linear):
        # The dictionaries themselves, which handles know.
        hooks = {k: v for k, v in owner.__dict__.items() if k.startswith(_CALL_HOOKS)}
        new.__dict__.update(hooks, _is_full_backward_hook=owner._is_full_backward_hook)
        for parent in model.modules():
            for name, part in parent._modules.items():
                if part is owner:
                    parent._modules[name] = new
        return
    name = candidate.name.rpartition(".")[2]
    owner.register_parameter(f"{name}_weight", None)
    owner.register_parameter("in_proj_bias", None)
    owner.register_module(name, new)


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def memory_of(model: nn.Module) -> int:
    """Bytes of parameters and buffers, of what is shared once."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(_size(t) for t in {id(t): t for t in tensors}.values())
