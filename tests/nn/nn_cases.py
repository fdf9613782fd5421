"""What the tests of fastfusion.nn share: one call of two modules, compared to the gradients."""

from collections.abc import Callable
from typing import Any

import torch
from suite import DEVICE
from torch import Tensor, nn

import fastfusion as ff

WIDTH, HEADS = 8, 2


def twin(ours: nn.Module, theirs: nn.Module) -> None:
    """Give `ours` the weights of `theirs`, made uneven so that no bias is 0 and no norm is 1."""
    generator = torch.Generator("cpu").manual_seed(7)
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.add_(0.3 * noise.to(parameter.device))
    ours.load_state_dict(theirs.state_dict())


def hidden(*shape: int, seed: int = 3) -> Tensor:
    """A bool mask, True = hidden, that hides about a third and never all of a row."""
    generator = torch.Generator("cpu").manual_seed(seed)
    mask = (torch.rand(shape, generator=generator, device="cpu") < 0.35).to(DEVICE)
    mask[..., 0] = False
    return mask


def bias(*shape: int, dtype: torch.dtype, seed: int = 4) -> Tensor:
    """A float mask: numbers, and -inf where `hidden` hides."""
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, device="cpu").to(DEVICE, dtype)
    return numbers.masked_fill(hidden(*shape, seed=seed), -torch.inf)


def outputs(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [part for part in parts if part is not None]


def assert_same(ours: Any, theirs: Any, case: str) -> None:
    torch.testing.assert_close(ours, theirs, msg=lambda text: f"{case}: {text}")


def assert_same_call(
    ours: nn.Module,
    theirs: nn.Module,
    call: Callable[[nn.Module, list[Tensor]], Any],
    inputs: list[Tensor],
    case: str,
    *,
    gradients: bool = True,
) -> None:
    """Both modules give the same outputs, and the same gradients of a weighted sum of them.

    Args:
        call: runs a module on its own copies of `inputs`, all of which require a gradient.
    """
    results = []
    for module in (ours, theirs):
        copies = [t.detach().clone().requires_grad_(gradients) for t in inputs]
        module.zero_grad(set_to_none=True)
        parts = outputs(call(module, copies))
        grads: list[Tensor | None] = []
        if gradients:
            generator = torch.Generator("cpu").manual_seed(11)
            weighted = [
                (part * torch.randn(part.shape, generator=generator, device="cpu").to(part)).sum()
                for part in parts
            ]
            sum(weighted).backward()  # type: ignore[union-attr]
            grads = [t.grad for t in copies] + [p.grad for p in module.parameters()]
        results.append((parts, grads))
    (our_parts, our_grads), (their_parts, their_grads) = results
    assert_same(our_parts, their_parts, f"{case}, outputs")
    for place, (our_grad, their_grad) in enumerate(zip(our_grads, their_grads, strict=True)):
        # torch leaves None where a mask was replaced by the causal hint; 0 says the same.
        if our_grad is None or their_grad is None:
            assert our_grad is their_grad, f"{case}, gradient {place}"
        else:
            assert_same(our_grad, their_grad, f"{case}, gradient {place}")


def option_id(options: dict[str, Any]) -> str:
    """A test's name for its options: without addresses, which differ between processes."""
    names = (f"{k}={getattr(v, '__name__', v)}" for k, v in options.items())
    return ",".join(names) or "defaults"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> float:
    first, second = (t.detach().double().flatten() for t in (a, b))
    return float(torch.cosine_similarity(first, second, 0))


def runs_on_cpu(layer: ff.nn.QuantizedLinear) -> bool:
    """Whether its products are those of the CPU kernels, whose bits depend on the row alone."""
    weight, scale, bias = layer.operands()
    x = normal(1, 2, layer.in_features)
    return ff.explain(ff.linear, x, weight, bias, weight_scale=scale).chosen == "cpu"
