"""Whether calling a module comes to its formula: no hooks, and no other forward.

Attributes come from dictionaries: 19 us for a fusion layer, 44 through nn.Module's getattr.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def has_global_hooks() -> bool:
    """Whether torch calls something for every module."""
    return any([getattr(torch_module, f"_global{hooks}") for hooks in _HOOKS])


def is_bare(module: Any) -> bool:
    """Whether calling this module runs the forward of its class and nothing else."""
    own = module.__dict__
    return not (
        "forward" in own
        or own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
    )


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The kernels' name for an activation that they have."""
    if activation is F.relu:
        return "relu"
    return "gelu" if activation is F.gelu else None
