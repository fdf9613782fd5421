"""The attention shapes through pytest-benchmark: ``pytest benchmarks/``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import fastfusion as ff
from fastfusion.benchmarks.common import ops, shapes
from fastfusion.benchmarks.cpu.cells import SUITES

CASES = [
    pytest.param(suite, shape, id=f"{suite}-{shape['name']}")
    for suite, about in SUITES.items()
    for shape in shapes.select(about.group)
]


@pytest.mark.parametrize("suite, shape", CASES)
@pytest.mark.parametrize("peer", [False, True], ids=["fastfusion", "torch"])
def test_forward(
    benchmark: Callable[..., Any], suite: str, shape: shapes.Shape, peer: bool
) -> None:
    """One call in float32; "torch" is SDPA, twice for both directions."""
    torch.set_num_threads(1)
    about = SUITES[suite]
    call = ops.spec(about.op).inputs(shape, torch.float32, "cpu", 0)
    adapter = next(iter(about.others.values()))
    function = adapter(call) if peer else partial(getattr(ff, about.op), **call)
    with torch.inference_mode():
        benchmark(function)
