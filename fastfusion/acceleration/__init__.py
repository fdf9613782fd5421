"""`accelerate`: faster layers in other people's models, and the proof that they are the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion import ops
from fastfusion._info import explain_module
from fastfusion.acceleration import swaps
from fastfusion.acceleration.report import AccelerationReport, LayerReport
from fastfusion.acceleration.swaps import Swap, register_swap, short_name_of
from fastfusion.acceleration.verification import Example, bound_for, deviation, largest_of
from fastfusion.nn._quantized import QuantizedLinear, check_weights
from fastfusion.quantization import QuantizationReport, arguments_of, memory_of, quantize

__all__ = [
    "AccelerationReport",
    "LayerReport",
    "Swap",
    "accelerate",
    "register_swap",
    "restore",
]


def accelerate(
    model: nn.Module,
    *,
    weights: str | None = None,
    example_inputs: Any = None,
    atol: float | None = None,
    inplace: bool = True,
) -> nn.Module:
    """Make the layers of a model faster, and prove that it still computes the same.

    Layers that are known (:func:`register_swap`; all of torch.nn's attention and Transformer
    layers, linear layers, and those of the libraries in `fastfusion.integrations`) become
    subclasses of what they are. Nothing is copied: parameters, hooks, adapters and the names in a
    state_dict stay, and the model can be trained as before. Where a layer is called in a way that
    is not its formula alone (a gradient, a hook on a part, a replaced part, a recorder), it runs as
    it did. Call it again after layers were added or replaced; `torch.compile` comes after it.

    `model.fastfusion_report` says what happened to each layer; `restore` takes it back.

    Args:
        model: any module. Of a compiled, scripted or sharded one: its parts, before.
        weights: "bf16" or "int8" make the weights of linear layers narrower, see
            :func:`fastfusion.quantize` with `tied`: for inference only, and not to be taken back.
            "int8" adds scales to a state_dict.
        example_inputs: arguments of `model`: a tuple, a dict of keyword arguments or one tensor.
            With them outputs and times before and after are compared, in eval mode; layers that
            bring the outputs too far apart are found by bisection and left as they were. What a
            keyword `attention_mask` (batch, length) hides in outputs (batch, length, ...) does not
            count.
        atol: how far apart outputs may be; by default a share of the largest output, by its dtype
            and `weights`.
        inplace: work on the model itself, else on a copy.

    Returns:
        The model.

    Raises:
        TypeError: an argument of another type, a model as above, example inputs for which it
            returns no tensor.
        ValueError: unknown `weights`, a negative `atol`.
    """
    _check(model, weights, example_inputs, atol)
    if not inplace:
        model = copy.deepcopy(model)
    for _, module, _ in [*swaps.swapped(model)]:
        swaps.leave(module)
    work = _Work(model, weights, example_inputs, atol)
    work.swap()
    if weights is not None:
        work.quantize()
    work.remember_narrow_weights()
    model.fastfusion_report = work.report()  # type: ignore[assignment]
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`: all layers in `model` are again what they were, bit for bit.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no module.
        ValueError: weights were made narrower, or a layer got yet another class (a
            parametrization, sharding); the message names the first. All others are restored.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    stuck = {}
    for name, module, _ in [*swaps.swapped(model)]:
        reason = swaps.leave(module)
        if reason is not None:
            stuck[name] = reason
    report = model.__dict__.pop("fastfusion_report", None)
    if stuck:
        name, reason = next(iter(stuck.items()))
        raise ValueError(
            f"{len(stuck)} layers could not be restored, {name or 'the model'!r} first: {reason}"
        )
    if report is not None and report.quantization is not None and report.quantization.quantized:
        first = report.quantization.quantized[0]
        raise ValueError(
            f"the weights of {len(report.quantization.quantized)} layers are {first.weights} "
            f"now, {first.name!r} first, and cannot be taken back: load the model again"
        )
    return model


def _check(model: Any, weights: Any, example_inputs: Any, atol: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if weights is not None:
        check_weights(weights)
    if example_inputs is not None:
        arguments_of(example_inputs)
    if atol is not None:
        if isinstance(atol, bool) or not isinstance(atol, int | float):
            raise TypeError(f"atol must be a number or None, got {type(atol).__name__}")
        if not atol >= 0.0:
            raise ValueError(f"atol must not be negative, got {atol}")
    for name, module in model.named_modules():
        why = _not_to_be_changed(module)
        if why is not None:
            where = f"model.{name}" if name else "model"
            raise TypeError(f"{where} is a {type(module).__name__}: {why}")


def _not_to_be_changed(module: nn.Module) -> str | None:
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if isinstance(module, torch.jit.ScriptModule):
        return "its code is fixed; accelerate the model that it was made of"
    if "OptimizedModule" in kinds:
        return "accelerate the model first, then torch.compile it"
    if isinstance(module, torch.fx.GraphModule):
        return "its layers were traced; accelerate the model that it was made of"
    if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
        return "its weights are sharded; accelerate the model first"
    if any(type(p).__name__ == "DTensor" for p in module._parameters.values()):
        return "its weights are DTensors; accelerate the model before they are distributed"
    return None


class _Work:
    """One call of `accelerate`."""

    def __init__(self, model: nn.Module, weights: Any, example_inputs: Any, atol: Any) -> None:
        self.model, self.weights, self.atol = model, weights, atol
        self.example_inputs = example_inputs
        self.rows: list[LayerReport] = []
        self.notes: list[str] = []
        self.going: dict[str, tuple[nn.Module, Swap]] = {}
        self.callers: set[str] = set()  # of ops on the example inputs
        self.bytes_before = memory_of(model)
        self.quantization: QuantizationReport | None = None
        self.example = None if example_inputs is None else Example(model, example_inputs)
        self.deviation: float | None = None
        self.bound: float | None = None
        self.largest: float | None = None
        self.ms_before: float | None = None
        self.ms_after: float | None = None
        self.before: list[Tensor] = []
        if self.example is not None:
            self.before = self.example.outputs()
            self.noise = self._now()
            if self.noise > 0.0:
                noise = f"{self.noise:.2e}"
                self.notes.append(f"the model itself differs by {noise} from call to call")
            self.ms_before = self.example.milliseconds()
            self.largest = largest_of(self.before)

    # ---- swapping

    def swap(self) -> None:
        covered: dict[str, Any] = {}  # layers that answer for their parts, and how
        skipped: dict[str, str] = {}
        for name, module in self.model.named_modules():
            if _is_ours(module):
                covered[name] = None
                continue
            if type(module) is nn.Linear and self._is_torchs(name):
                continue
            made = swaps.swap_for(module)
            if isinstance(made, str):
                skipped[name] = made
            elif made is not None:
                self.going[name] = module, made
                covered[name] = made
        sources = {name: short_name_of(type(module)) for name, (module, _) in self.going.items()}
        for module, made in self.going.values():
            swaps.enter(module, made)
        rolled_back = self._roll_back() if self.example is not None else {}
        roads = self._roads()
        for name, module in self.model.named_modules():
            if name in rolled_back:
                alone, bound = rolled_back[name]
                why = f"rolled back: outputs differ by {alone:.2e}, more than {bound:.2e}"
                row = LayerReport(name, sources[name], None, why, deviation=alone)
            elif name in self.going:
                road = None if roads is None else _road(name, roads)
                row = LayerReport(name, sources[name], str(self.going[name][1]), None, road)
            elif name in skipped:
                row = LayerReport(name, short_name_of(type(module)), None, skipped[name])
            elif _looks_like_attention(module):
                why = "no swap of it is known"
                if _is_answered_for(name, module, covered):
                    if roads is None or _took_part(name, self.callers):
                        continue
                    why = "what was swapped around it did not come to it on the example inputs"
                row = LayerReport(name, short_name_of(type(module)), None, why)
            else:
                continue
            self.rows.append(row)

    def _is_torchs(self, name: str) -> bool:
        """Whether a linear layer is a part of a Transformer layer of ours or of torch.nn's, which
        becomes ours: they call the op for it by themselves."""
        parent = self.model.get_submodule(_parent(name)) if name else None
        return parent is not None and (_is_ours(parent) or type(parent) in swaps.REPLACEMENTS)

    def _roads(self) -> dict[str, str] | None:
        """What ran in each swapped layer on the example inputs, and in no swapped part of it."""
        if self.example is None:
            return None
        with self.example.quietly():
            args, kwargs = self.example.arguments()
            rows = explain_module(self.model, args, kwargs, ops.ALL).rows
        found: dict[str, list[str]] = {}
        for name, explanation in rows:
            if explanation is None or explanation.chosen is None:
                continue
            self.callers.add(name)
            text = f"{explanation.op}: {explanation.chosen}"
            if explanation.path:
                text += f" ({explanation.path})"
            while name and name not in self.going:
                name = _parent(name)
            if name in self.going and text not in found.setdefault(name, []):
                found[name].append(text)
        return {name: "; ".join(texts) for name, texts in found.items()}

    # ---- proof

    def _limit(self, weights: str | None) -> float:
        bound = bound_for(self.before, weights) if self.atol is None else float(self.atol)
        return max(bound, 2.0 * self.noise)

    def _now(self) -> float:
        assert self.example is not None
        return deviation(self.before, self.example.outputs())

    def _roll_back(self) -> dict[str, tuple[float, float]]:
        """Restore the layers without which outputs agree: their own deviations, and the bound."""
        bound = self.bound = self._limit(None)
        guilty: dict[str, tuple[float, float]] = {}
        apart = self._now()
        while apart > bound and len(guilty) < len(self.going):
            left = [name for name in self.going if name not in guilty]
            name = self._worst(left)
            self._only(left, [name])
            guilty[name] = self._now(), bound
            self._only(left, [other for other in left if other != name])
            apart = self._now()
        for name in guilty:
            self.going.pop(name)
        self.deviation = apart
        return guilty

    def _worst(self, names: list[str]) -> str:
        """The layer that is most at fault, by halves: of each two the one that deviates more."""
        while len(names) > 1:
            half = len(names) // 2
            halves = names[:half], names[half:]
            every = [name for name in self.going if swaps.in_force(self.going[name][0]) is not None]
            deviations = []
            for part in halves:
                self._only(every, part)
                deviations.append(self._now())
            self._only(every, every)
            names = halves[int(deviations[1] > deviations[0])]
        return names[0]

    def _only(self, names: list[str], some: list[str]) -> None:
        """Of these layers have just some swapped."""
        for name in names:
            module, swap = self.going[name]
            is_swapped = swaps.in_force(module) is not None
            if name in some and not is_swapped:
                swaps.enter(module, swap)
            elif name not in some and is_swapped:
                swaps.leave(module)

    # ---- narrower weights

    def quantize(self) -> None:
        """Give linear layers narrower weights, but those with which outputs get too far apart."""
        owners = {
            name: (module, dict(module._parameters))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear | nn.MultiheadAttention)
        }
        example = self.example
        with nullcontext() if example is None else example.quietly():
            report = quantize(
                self.model, self.weights, example_inputs=self.example_inputs, tied=True
            )
        rows = {row.name: row for row in report.layers}
        if example is not None:
            bound = self.bound = self._limit(self.weights)
            apart = self._now()
            worst = sorted(report.quantized, key=lambda row: row.cosine or 0.0)
            count = 1
            while apart > bound and worst:
                for row in worst[:count]:
                    _take_back(self.model, row.name, owners)
                    why = "rolled back: with it outputs deviate more than allowed"
                    rows[row.name] = replace(
                        row, weights=None, bytes_after=row.bytes_before, reason=why
                    )
                worst, count = worst[count:], 2 * count
                apart = self._now()
            self.deviation = apart
        self.quantization = replace(
            report, layers=tuple(rows.values()), bytes_after=memory_of(self.model)
        )

    def remember_narrow_weights(self) -> None:
        """Those of a call before, which are still there."""
        report = self.model.__dict__.get("fastfusion_report")
        earlier = None if report is None else report.quantization
        if earlier is None:
            return
        modules = dict(self.model.named_modules())
        rows = {
            row.name: row
            for row in earlier.quantized
            if isinstance(modules.get(row.name), QuantizedLinear)
        }
        now = self.quantization
        if now is not None:
            rows |= {row.name: row for row in now.layers}
        if rows:
            after = memory_of(self.model)
            self.quantization = QuantizationReport(
                tuple(rows.values()), earlier.bytes_before, after
            )

    def report(self) -> AccelerationReport:
        if self.example is not None:
            self.ms_after = self.example.milliseconds()
        return AccelerationReport(
            tuple(self.rows), self.bytes_before, memory_of(self.model), self.quantization,
            self.deviation, self.bound, self.largest, self.ms_before, self.ms_after,
            tuple(self.notes),
        )  # fmt: skip


def _take_back(model: nn.Module, name: str, owners: Mapping[str, Any]) -> None:
    """Put the layer, or the input projections of an attention, in the place of quantised ones."""
    if name in owners:
        original, quantized = owners[name][0], model.get_submodule(name)
        for parent in model.modules():
            for part, module in parent._modules.items():
                if module is quantized:
                    parent._modules[part] = original
        return
    owner, parameters = owners[_parent(name)]
    owner._modules.pop(name.rpartition(".")[2])
    owner._parameters.update(parameters)


def _road(name: str, roads: Mapping[str, str]) -> str:
    if name in roads:
        return roads[name]
    if any(other.startswith(f"{name}." if name else "") for other in roads):
        return "in the calls of its parts"
    above = name
    while above:
        above = _parent(above)
        if "_layer: " in roads.get(above, ""):
            return "in the call of the layer around it"
    return "as before: its parts"


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("fastfusion.")


def _is_answered_for(name: str, module: nn.Module, covered: Mapping[str, Any]) -> bool:
    """Whether a layer that is swapped, or one of ours, has this one as a part that it replaces."""
    while True:
        if name in covered and (covered[name] is None or covered[name].covers(module)):
            return True
        if not name:
            return False
        name = _parent(name)


def _took_part(name: str, callers: set[str]) -> bool:
    """Whether a layer, one in it or one around it has called an op."""
    return any(
        f"{name}.".startswith(f"{caller}." if caller else "") or caller.startswith(f"{name}.")
        for caller in callers
    )


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
