"""Weights of 8-bit integers: how they come about, and how they lie in memory.

A row w of a weight becomes q = round(w / scale), scale = max|w| / 127: symmetric, so that a product
needs no zero point. The kernels read panels of 64 features, in which the features stand side by
side, four numbers of each:

    panel 0   step 0   [w00 w01 w02 w03] [w10 w11 w12 w13] .. [w63,0 .. w63,3]
              step 1   [w04 w05 w06 w07] [w14 w15 w16 w17] .. [w63,4 .. w63,7]

as q + 128, for instructions that multiply unsigned integers by signed ones; 128, a 0, also stands
behind the last feature and the last number. A weight that is several side by side is packed part by
part, so that one part can be used alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL, STEP = 64, 4  # features, and numbers of each
LIMIT, ZERO = 127.0, 128
# Where the largest number of a row of an input is less, 127 / max|x| overflows: it counts as zeros.
LEAST = 2.0**-119


def shape_of(parts: int, part_features: int, width: int) -> tuple[int, ...]:
    """Of packed weights."""
    return parts, -(-part_features // PANEL), -(-width // STEP), PANEL, STEP


def pack_int8(weight: Tensor, parts: int = 1) -> tuple[Tensor, Tensor]:
    """A weight as 8-bit integers, as `fastfusion.linear` takes it.

    Args:
        weight: (features, width), floating and finite.
        parts: how many weights of equal size stand side by side in it, as the three of a packed
            `in_proj_weight`. Part j alone is packed[j : j + 1] with its own scales.

    Returns:
        uint8 (parts, panels of 64 features, steps of 4 numbers, 64, 4), and the scales, float32
        (features,): max|w| / 127 of each row.

    Raises:
        TypeError: a weight that is not floating.
        ValueError: one that is not (features, width), that `parts` does not divide, or that holds
            NaN or infinity.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a floating Tensor, got {kind}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be (features, width), got {tuple(weight.shape)}")
    weight = weight.detach().float()
    if weight.shape[1] == 0:
        scale = weight.new_zeros(weight.shape[0])
    else:
        scale = weight.abs().amax(1) / LIMIT
    if not weight.is_meta and not bool(scale.isfinite().all()):
        raise ValueError("weight must be finite, got NaN or infinity")
    divisor = scale.masked_fill(scale == 0.0, 1.0)  # of rows of zeros
    integers = (weight / divisor[:, None]).round_().clamp_(-LIMIT, LIMIT).to(torch.int8)
    return pack_integers(integers, parts), scale


def pack_integers(integers: Tensor, parts: int) -> Tensor:
    """int8 (features, width) in [-127, 127] as packed weights.

    Raises:
        ValueError: `parts` does not divide the features.
    """
    features, width = integers.shape
    if not isinstance(parts, int) or parts < 1 or features % parts:
        raise ValueError(f"parts must divide the features, got {parts} and {tuple(integers.shape)}")
    shape = shape_of(parts, features // parts, width)
    if integers.numel() == 0:
        return integers.new_full(shape, ZERO, dtype=torch.uint8)
    _, panels, steps, *_ = shape
    behind = (0, steps * STEP - width, 0, panels * PANEL - features // parts)
    padded = F.pad(integers.view(parts, -1, width), behind) if any(behind) else integers
    # Four numbers at a time: one at a time takes five times as long.
    quads = padded.contiguous().view(torch.int32).view(parts, panels, PANEL, steps)
    packed = quads.transpose(2, 3).contiguous().view(torch.uint8).view(shape)
    return packed.bitwise_xor_(ZERO)  # + 128


def unpack_int8(packed: Tensor, width: int, part_features: int) -> Tensor:
    """The integers of packed weights: int8 (features, width).

    Args:
        packed: as `pack_int8` gives it.
        width: of the weight.
        part_features: features of each part.

    Raises:
        ValueError: a shape that such a weight does not have.
    """
    if packed.dtype != torch.uint8 or packed.shape != shape_of(
        packed.shape[0] if packed.dim() else 0, part_features, width
    ):
        raise ValueError(
            f"packed must be uint8 {('parts', *shape_of(1, part_features, width)[1:])}, got "
            f"{packed.dtype} {tuple(packed.shape)}"
        )
    return unpacked(packed, width, part_features).bitwise_xor(ZERO).view(torch.int8)


def unpacked(packed: Tensor, width: int, part_features: int) -> Tensor:
    """Packed weights in rows, still with 128 added: uint8 (features, width)."""
    parts, panels, steps = packed.shape[:3]
    rows = packed.transpose(2, 3).reshape(parts, panels * PANEL, steps * STEP)
    return rows[:, :part_features, :width].reshape(parts * part_features, width)
