"""Our ops as they are measured: their suites, calls, and what is right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastfusion as ff

from . import peers

Call = Callable[[], Any]


@dataclass(frozen=True)
class Suite:
    """An op, how many results it has, and its peers.

    Attributes:
        op: its name in fastfusion and in ff.ops.ALL, and so where inputs and cost come from.
        group: its list in shapes.json.
        results: how many tensors the public function returns.
        plain: the peer whose error sets what is allowed.
        others: what is timed beside it on every device; each adds its own.
    """

    op: str
    group: str
    results: int
    plain: str
    others: dict[str, peers.Adapter]


ATTENTION: dict[str, peers.Adapter] = {
    "sdpa": peers.sdpa,
    "unfused": peers.unfused,
    "sdpa math": peers.sdpa_math,
}
SUITES = {
    "attention": Suite(
        op="scaled_dot_product_attention",
        group="attention",
        results=1,
        plain="unfused",
        others=ATTENTION,
    ),
    "lengths": Suite(
        op="scaled_dot_product_attention",
        group="lengths",
        results=1,
        plain="unfused",
        others=ATTENTION,
    ),
    "bidirectional": Suite(
        op="bidirectional_attention",
        group="bidirectional",
        results=2,
        plain="unfused",
        others={"two sdpa": peers.two_sdpa, "unfused": peers.two_unfused},
    ),
    "linear": Suite(
        op="linear",
        group="linear",
        results=1,
        plain="torch",
        others={"torch": peers.linear},
    ),
}


def spec(name: str) -> Any:
    """The specification of an op, from ff.ops.ALL."""
    return next(op for op in ff.ops.ALL if op.name == name)


def flops(suite: str, shape: dict[str, Any], dtype: torch.dtype) -> int:
    """Floating-point operations of one forward call."""
    return spec(SUITES[suite].op).cost(shape, dtype)[0]


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """The results of a call, also where there is only one."""
    return results if isinstance(results, tuple) else (results,)


def floating(call: dict[str, Any]) -> list[Tensor]:
    """The tensors of a call that have a gradient, in the order of its arguments."""
    return [t for t in call.values() if isinstance(t, Tensor) and t.is_floating_point()]


def with_gradients(call: Call, leaves: Sequence[Tensor], seeds: Sequence[Tensor]) -> Call:
    """``call`` followed by its backward pass: returns the gradients of ``leaves``."""

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(as_tuple(call()), leaves, seeds)

    return run


def double_call(call: dict[str, Any]) -> dict[str, Any]:
    """The same call in float64, on its own leaves."""
    return {
        name: value.detach().double() if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in call.items()
    }  # fmt: skip


def expected_results(op: Any, call: dict[str, Any], count: int, backward: bool) -> tuple[Any, Any]:
    """The float64 results, or gradients, of a call; and the incoming gradients, in its dtype."""
    exact = double_call(call)
    leaves = floating(exact)
    if not backward:
        with torch.no_grad():
            return as_tuple(op.reference(**exact))[:count], ()
    for leaf in leaves:
        leaf.requires_grad_()
    results = as_tuple(op.reference(**exact))[:count]
    generator = torch.Generator().manual_seed(1)
    dtype = floating(call)[0].dtype
    seeds = [
        torch.randn(t.shape, generator=generator, device="cpu").to(t.device, dtype) for t in results
    ]
    return torch.autograd.grad(results, leaves, [s.double() for s in seeds]), seeds
