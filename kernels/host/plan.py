"""Plans: what a launcher did for a call, done again for calls of the same kind.

A launcher works out tiles, grids and some sixty arguments per kernel in Python, and Triton looks
the compiled kernel up by them, which takes longer than a short attention does. The first
call of a kind (same shapes, strides, dtypes, alignments and numbers) therefore leaves a plan: which
tensors are allocated, and which compiled kernels run with which arguments. Later calls put their
own tensors into it.

A launcher that is `planned` allocates with `empty` and launches with `launch`, and its launches
take no tensor but those and its own arguments. A call for which it makes others (a copy of a
strided input, say) has no plan.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = bool(triton.knobs.runtime.interpret)
# Said in every launch, since the default is to change: products and sums fuse where LLVM sees them.
FUSION: dict[str, Any] = {} if INTERPRETED else {"enable_fp_fusion": True}
# Kinds of calls that a process may see before all plans are forgotten: each is some kilobytes.
_MOST = 4096
_plans: dict[Any, "_Plan | None"] = {}
_local = threading.local()
_NOTHING = nullcontext()


def forget() -> None:
    """Drop all plans, because tiles have changed."""
    _plans.clear()


# Where an argument stands and whose memory it is: of a tensor; of a descriptor, whose fields but
# for the memory come along; or of several tensors within a tuple, by their places in it.
_Place = tuple[int, int | list[tuple[int, int]], Any]


def with_base(fields: dict[str, Any], base: Tensor) -> TensorDescriptor:
    """The descriptor of other memory of the same kind, without the checks that the first passed."""
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(fields, base=base)
    return descriptor


class _Plan:
    """Allocations, launches and results; tensors stand as indices, those of the call first."""

    def __init__(self, given: Sequence[Any]) -> None:
        self.tensors = [t for t in given if isinstance(t, Tensor)]
        self.allocations: list[tuple[Any, ...]] = []
        self.launches: list[tuple[Any, tuple[int, ...], list[Any], list[_Place], Any]] = []
        self.results: list[int | None] = []
        self.repeatable = True

    def place(self, tensor: Tensor) -> int:
        """Whose memory a tensor is: the first of the same address, as in every call of the kind. If
        there is none, the plan is not repeatable."""
        address = tensor.data_ptr()
        for index, known in enumerate(self.tensors):
            if known.data_ptr() == address:
                return index
        self.repeatable = False
        return -1

    def add_launch(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], given: dict[str, Any]
    ) -> None:
        values = [given[name] for name in kernel.arg_names]
        places: list[_Place] = []
        for position, value in enumerate(values):
            if isinstance(value, TensorDescriptor):
                places.append((position, self.place(value.base), {**vars(value), "base": None}))
            elif isinstance(value, Tensor):
                places.append((position, self.place(value), None))
            elif isinstance(value, tuple):
                within = [(i, self.place(t)) for i, t in enumerate(value) if isinstance(t, Tensor)]
                if not within:
                    continue
                rest = [None if isinstance(part, Tensor) else part for part in value]
                places.append((position, within, rest))
            else:
                continue
            values[position] = None
        if not self.repeatable:
            return
        if INTERPRETED:
            options = {k: v for k, v in given.items() if k in ("num_warps", "num_stages")}
            self.launches.append((kernel, grid, values, places, options))
        elif compiled is None:  # a tool that records launches gives none back
            self.repeatable = False
        else:
            self.launches.append((compiled, grid, values, places, {}))

    def finish(self, results: tuple[Any, ...]) -> None:
        for result in results:
            index = next((i for i, t in enumerate(self.tensors) if t is result), None)
            if result is not None and index is None:
                self.repeatable = False
            self.results.append(index)
        self.repeatable = self.repeatable and bool(self.launches)
        self.tensors = []

    def __call__(self, tensors: list[Tensor]) -> tuple[Any, ...]:
        for size, stride, dtype in self.allocations:
            tensors.append(torch.empty_strided(size, stride, dtype=dtype, device=tensors[0].device))
        for kernel, grid, values, places, options in self.launches:
            arguments = values.copy()
            for position, place, rest in places:
                if isinstance(place, list):
                    parts = rest.copy()
                    for i, of_part in place:
                        parts[i] = tensors[of_part]
                    arguments[position] = tuple(parts)
                elif rest is None:
                    arguments[position] = tensors[place]
                else:
                    arguments[position] = with_base(rest, tensors[place])
            kernel[grid](*arguments, **options)
        return tuple([None if i is None else tensors[i] for i in self.results])


def empty(
    like: Tensor,
    size: Sequence[int],
    dtype: torch.dtype | None = None,
    order: Sequence[int] | None = None,
) -> Tensor:
    """A new tensor on the device of `like`, its dimensions in memory in the given order."""
    order = range(len(size)) if order is None else order
    strides, step = [0] * len(size), 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= max(size[dimension], 1)
    recipe = (tuple(size), tuple(strides), like.dtype if dtype is None else dtype)
    tensor = torch.empty_strided(*recipe[:2], dtype=recipe[2], device=like.device)
    plan = getattr(_local, "plan", None)
    if plan is not None:
        plan.allocations.append(recipe)
        plan.tensors.append(tensor)
    return tensor


def launch(kernel: Any, programs: int, *leading: Any, **given: Any) -> None:
    """Run a kernel with `programs` programs; num_warps and num_stages stand with its arguments."""
    given.update(zip(kernel.arg_names, leading, strict=False))
    grid = (programs, 1, 1)  # whole: a compiled kernel does not fill it up
    compiled = kernel[grid](**given, **FUSION)
    plan = getattr(_local, "plan", None)
    if plan is not None and plan.repeatable:
        plan.add_launch(kernel, compiled, grid, given)


def accepted(kernel: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a kernel takes, with the options of its launch."""
    names = {*kernel.arg_names, "num_warps", "num_stages"}
    return {name: value for name, value in given.items() if name in names}


def on(tensor: Tensor) -> Any:
    """Makes the tensor's device the current one, on which Triton launches."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING


def _flat(given: Sequence[Any]) -> list[Any]:
    values: list[Any] = []
    for value in given:
        if isinstance(value, tuple):
            values += value
        else:
            values.append(value)
    return values


def planned(launcher: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The launcher, with plans. Its arguments are tensors, numbers, None, and calls of those; its
    results tensors that it allocated and None."""

    def run(*given: Any) -> tuple[Any, ...]:
        tensors: list[Tensor] = []
        addresses: list[int] = []
        kind: list[Any] = [launcher]
        for value in _flat(given):
            if isinstance(value, Tensor):
                address = value.data_ptr()
                tensors.append(value)
                addresses.append(address)
                kind += (value.shape, value.stride(), value.dtype, address % 16)
            else:
                kind.append(value)
        # Which tensors are one: in another call of these shapes they may differ.
        if len(set(addresses)) < len(addresses):
            kind += [addresses.index(a) for a in addresses]
        first = tensors[0]
        kind += (first.get_device(), torch.get_float32_matmul_precision())
        key = tuple(kind)
        plan = _plans.get(key)
        with on(first):
            return plan(tensors) if plan is not None else record(key, given)

    def record(key: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        if key in _plans or getattr(_local, "plan", None) is not None:
            return launcher(*given)
        plan = _local.plan = _Plan(_flat(given))
        try:
            results = launcher(*given)
        finally:
            _local.plan = None
        plan.finish(results)
        if len(_plans) >= _MOST:
            _plans.clear()
        _plans[key] = plan if plan.repeatable else None
        return results

    return functools.update_wrapper(run, launcher)
