"""FLOP formulas of the ops, for torch.utils.flop_counter.

They are registered when that module is imported, by whoever counts: it imports Triton where that is
installed, 160 ms that every `import fastfusion` would pay.
"""

from typing import Any

from fastfusion.core import torch_op
from fastfusion.core.on_import import on_import


def _register(counter: Any) -> None:
    for op in torch_op.ALL:
        op.flops(counter)


def register() -> None:
    """Now if the counter is imported already, otherwise when it is."""
    on_import("torch.utils.flop_counter", _register)
