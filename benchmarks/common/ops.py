"""Our ops as they are measured: their suites, calls, and what is right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

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
    "kinds": Suite(
        op="scaled_dot_product_attention",
        group="kinds",
        results=1,
        plain="unfused",
        others={"unfused": peers.unfused},
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
    "cross_attention_layer": Suite(
        op="cross_attention_layer",
        group="cross_attention",
        results=1,
        plain="linear + unfused",
        others={"linear + sdpa": peers.linear_sdpa, "linear + unfused": peers.linear_unfused},
    ),
    "cross_modal_layer": Suite(
        op="cross_modal_layer",
        group="cross_modal",
        results=2,
        plain="layer + unfused",
        others={
            "layer + two sdpa": peers.layer_two_sdpa,
            "layer + unfused": peers.layer_two_unfused,
        },
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
    return [t for t in tree_leaves(call) if isinstance(t, Tensor) and t.is_floating_point()]


def with_gradients(call: Call, leaves: Sequence[Tensor], seeds: Sequence[Tensor]) -> Call:
    """``call`` followed by its backward pass: returns the gradients of ``leaves``."""

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(as_tuple(call()), leaves, seeds)

    return run


def double_call(call: dict[str, Any]) -> dict[str, Any]:
    """The same call in float64, on its own leaves."""

    def double(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double()
        return value

    doubled: dict[str, Any] = tree_map(double, call)
    return doubled


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
