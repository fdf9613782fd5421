"""Triton's interpreter, mended where it differs from hardware and where it wastes time.

- It cuts the digits off that bfloat16 does not hold; hardware rounds to the nearest.
- It multiplies by BLAS, which adds a transposed product in another order than the product itself.
  Matrix units do not, and kernels count on it: a tile of scores and its transpose agree bit for
  bit. Sums in float64 agree too.
- It sums columns row after row. The threads of a GPU sum few numbers each and then pairs, as NumPy
  does along rows.
- Two thirds of its time go to nothing: it replaces the builtins of Triton's language anew in every
  call of a device function, looks for overflows of integers that it then does not report, and
  builds the same types again and again.
- Triton 3.6, which torch 2.11 asks for, takes an index out of an array, as NumPy 2.4 does not.
"""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np


def mend() -> None:
    """For the rest of the process."""
    import triton.language as tl
    from triton.runtime import interpreter

    # Both of its modules; it takes whatever has the globals of a function.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    tl.core.tensor.__index__ = lambda self: int(self.handle.data.item())
    nothing = interpreter._LangPatchScope()  # to restore
    interpreter._patch_lang = lambda function: nothing
    # Its assertions do nothing but with `debug`; that it is off stands in the same options.
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    remember_types(tl.core, interpreter)

    from fastfusion.kernels.host import default_tiles as _tiles

    default = _tiles.default

    def large(*given: Any) -> tuple[int, int, int, int]:
        own, loop, warps, stages = default(*given)
        return max(own, 64), max(loop, 64), warps, stages

    _tiles.default = large

    convert = interpreter._convert_float

    def to_nearest(value: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(value, source, target, rounding)
        bits = np.ascontiguousarray(value).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
        return np.where(np.isnan(value), (bits >> 16) | 0x40, rounded).astype(np.uint16)

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    sum_all = interpreter.ReduceOps.sum

    def sum_in_pairs(self: Any, input: Any) -> Any:
        if self.axis is None:
            return sum_all(self, input)
        rows = np.ascontiguousarray(np.moveaxis(input.handle.data, self.axis, -1))
        total = rows.sum(-1)
        if self.keep_dims:
            total = np.expand_dims(total, self.axis)
        return self.to_tensor(total, input.dtype)

    interpreter._convert_float = to_nearest
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.ReduceOps.sum = sum_in_pairs


def remember_types(core: Any, interpreter: Any) -> None:
    """What tensors and blocks take from their type and shape, made once for each."""
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[Any, tuple[Any, Any]] = {}
    arrays: dict[Any, np.dtype] = {}
    make_block, array_type = core.block_type.__init__, interpreter._get_np_dtype

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        known = blocks.get(key)
        if known is None:
            make_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        else:
            vars(self).update(known, element_ty=element_ty)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape.values if type.is_block() else ()
        known = tensors.get(key := tuple(shape))
        if known is None:
            known = core.constexpr(math.prod(key)), core.tuple([core.constexpr(n) for n in key])
            tensors[key] = known
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = known

    def of_numpy(type: Any) -> np.dtype:
        known = arrays.get(type.name)
        if known is None:
            known = arrays[type.name] = array_type(type)
        return known

    core.block_type.__init__ = block
    core.tensor.__init__ = tensor
    interpreter._get_np_dtype = of_numpy
