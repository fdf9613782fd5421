"""Random legal calls on every implementation, by the rule of accuracy.py, for a fixed time.

Each op has a list of calls for each target, the same in every run; the time decides how far down
the list a run gets (`--random-seconds`, for kernels that are interpreted twice that). A failure
names its call, which `--random-example op:target:index` runs alone, and the simplest call that
still fails. Should the process die, the name is in .pytest_cache/d/random_calls.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import random_ops
import torch
from accuracy import assert_accurate
from random_calls import TRUE_BYTES, Built, Drawn
from random_ops import OPS
from suite import Target, evaluate, filled_memory, leaves, targets_of
from torch import Tensor

import fastfusion as ff

# Seconds in which a failure is made small.
SHRINK_SECONDS = 20.0
# Additions one after another in float32; kernels begin anew after so many.
CHAIN = 256
# How often the plain formula is asked again.
DRAWS = 16
COMPILED = Target("compiled")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    example = metafunc.config.getoption("random_example")
    wanted = None if example is None else example.rsplit(":", 1)[0]
    if "target" in metafunc.fixturenames:
        pairs = [(op, target) for op in OPS for target in targets_of(OPS[op])]
    elif "op" in metafunc.fixturenames:
        pairs = [(op, COMPILED) for op in OPS]
    else:
        return
    pairs = [(op, target) for op, target in pairs if wanted in (None, f"{op}:{target}")]
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("op, target", pairs, ids=str)
    else:
        metafunc.parametrize("op", [op for op, _ in pairs])


def matrices(tensor: Tensor) -> Tensor:
    """(slices, elements): what the last two dimensions hold is one slice."""
    while tensor.dim() < 3:
        tensor = tensor[None]
    return tensor.flatten(0, -3).flatten(1)


def slices_of(drawn: Drawn, name: str, tensor: Tensor) -> Tensor:
    """The slices of a result ("out", "lse") or a gradient, as OpSuite has them."""
    if drawn.packed and name != "attn_mask":
        return tensor.t() if name == "lse" else tensor.transpose(0, 1).flatten(1)
    if name == "lse":
        tensor = tensor[..., None]
        return matrices(tensor.transpose(-1, -3) if tensor.dim() > 2 else tensor)
    return matrices(tensor)


def rounded_again(
    tensor: Tensor, generator: torch.Generator, longest: int, least: float = 1.0
) -> Tensor:
    """Numbers some roundings away, `least` eps: as far as one chain of `longest` additions leaves a
    sum, whose error grows as its length where that of numbers grows as the square root."""
    chain = max(least, min(longest, CHAIN) ** 0.5 / 4)
    step = torch.rand(tensor.shape, generator=generator, device="cpu").to(tensor.device) * 2 - 1
    most = torch.finfo(tensor.dtype).eps * (chain if tensor.dtype == torch.float32 else 1.0)
    limit = torch.finfo(tensor.dtype).max  # a mask of finfo.min stays a number
    other = (tensor.double() * (1 + most * step)).clamp(-limit, limit).to(tensor.dtype)
    return torch.where(tensor.isinf(), tensor, other)


def plain_again(drawn: Drawn, call: dict[str, Any], draw: int) -> dict[str, Tensor]:
    """What the plain formula makes of a call's numbers rounded again, those of the gradients that
    arrive at its results among them: at a scale of 0 they are all that a gradient of values is
    made of, a sum of a few that may cancel."""
    generator = torch.Generator("cpu").manual_seed(draw)
    longest = max(n for v in call.values() if isinstance(v, Tensor) for n in v.shape[-3:])

    def plain(**rounded: Any) -> tuple[Tensor, ...]:
        results = drawn.plain(**rounded)
        for result in (r for r in results if r.requires_grad):
            result.register_hook(lambda g: rounded_again(g, generator, max(g.shape[-3:]), 0.5))
        return results

    again = {
        name: rounded_again(value, generator, longest)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in call.items()
    }
    return results_of(drawn, plain, again)


def assert_close_to(
    drawn: Drawn, built: Built, actual: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """The rule of accuracy.py. Where few numbers make the plain formula's error luck, its worst on
    the same numbers rounded again is the yardstick."""

    yardstick = results_of(drawn, drawn.plain, built.clean)
    for name, result in actual.items():
        yardstick.setdefault(name, torch.zeros_like(result))
        kind = name.rstrip("012345")
        cut = [slices_of(drawn, kind, t) for t in (result, exact[name], yardstick[name])]
        if kind == "lse":
            cut[2] = cut[2].float()
        try:
            assert_accurate(*cut)
        except AssertionError as error:
            if "relative error" not in str(error):
                raise AssertionError(f"{name}: {error}") from None
            worst = [cut]
            for draw in range(DRAWS):
                again = plain_again(drawn, built.clean, draw).get(name, yardstick[name])
                other = slices_of(drawn, kind, again).to(cut[2].dtype)
                worst.append([cut[1], cut[1], other])
            if kind == "lse":
                # Scores may happen to be exact in 16 bits; kernels owe no more than those hold.
                worst.append([cut[1], cut[1], cut[1].to(built.dtype).float()])
            try:
                assert_accurate(*(torch.cat(parts) for parts in zip(*worst, strict=True)))
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None


def results_of(
    drawn: Drawn, run: Callable[..., tuple[Tensor, ...]], call: dict[str, Any]
) -> dict[str, Tensor]:
    """Results and gradients by name, those that the call asks for."""
    count = drawn.outputs * (2 if drawn.return_lse else 1)
    wanted = [name for name in drawn.wanted if name in leaves(call)]
    if (
        "attn_mask" in wanted
        and call["attn_mask"].shape[-1:] in ((), (1,))
        and (max(drawn.weighed) < drawn.outputs)
    ):
        # A softmax does not see what is added to all scores of a row: the gradient is noise.
        wanted.remove("attn_mask")
    if 0.0 < abs(float(call.get("scale") or 0.0)) < torch.finfo(torch.float32).tiny:
        # A gradient times a subnormal number has no bits left but luck, the formula's as well.
        wanted = [name for name in wanted if name not in ("query", "key")]
    results, gradients = evaluate(lambda **kw: run(**kw)[:count], call, wanted, drawn.weighed)
    names = [f"{kind}{i}" for kind in ("out", "lse") for i in range(drawn.outputs)]
    if not drawn.weighed or not wanted:
        gradients = {}
    return dict(zip(names, results, strict=False)) | gradients


def check(drawn: Drawn, target: Target) -> None:
    """A call by a target against the formula in float64."""
    built = drawn.build()

    def run(**call: Any) -> tuple[Tensor, ...]:
        return target.call(type(drawn).function, **call, return_lse=drawn.return_lse)

    try:
        with filled_memory():
            actual = results_of(drawn, run, built.given)
    except ff.BackendUnavailableError:
        if target.backend != "cuda":
            raise
        return  # its kernels may leave a kind of call to others; the cases say which it takes
    double = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
              for k, v in built.clean.items()}  # fmt: skip
    exact = results_of(drawn, drawn.plain, double)
    statistics = torch.promote_types(built.dtype, torch.float32)
    assert actual.keys() >= exact.keys(), f"no gradient of {sorted(exact.keys() - actual.keys())}"
    for name, result in actual.items():
        # Where the results that count do not depend on an operand, the formula has no graph.
        exact.setdefault(name, torch.zeros_like(result, dtype=torch.float64))
        assert result.shape == exact[name].shape, (
            f"{name} has shape {tuple(result.shape)}, expected {tuple(exact[name].shape)}"
        )
        dtype = built.given[name].dtype if name in built.given else built.dtype
        assert result.dtype == (statistics if name.startswith("lse") else dtype)
    if target.backend == "reference" and drawn.has_double:
        by_reference = results_of(drawn, drawn.reference, double)
        for name, result in by_reference.items():
            torch.testing.assert_close(result.reshape(exact[name].shape), exact[name])
    if built.dtype == torch.float64:
        torch.testing.assert_close(actual, exact, check_dtype=False)  # a mask may be float32
        return
    assert_close_to(drawn, built, actual, exact)


def check_compiled(drawn: Drawn, target: Target) -> None:
    """A call in eager mode and compiled, where Dynamo makes tensors of NumPy's numbers."""
    built = replace(drawn, number="python").build()
    torch._dynamo.reset()

    def run(**call: Any) -> tuple[Tensor, ...]:
        result = type(drawn).function(**call, return_lse=drawn.return_lse)
        return result if isinstance(result, tuple) else (result,)

    eager = results_of(drawn, run, built.given)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(results_of(drawn, compiled, built.given), eager)


def failure(drawn: Drawn, target: Target, run: Callable[..., None]) -> Exception | None:
    try:
        run(drawn, target)
    except Exception as error:
        return error
    return None


def simplest(drawn: Drawn, target: Target, run: Callable[..., None]) -> Drawn:
    """The call with everything left out that the failure does without."""
    deadline = time.monotonic() + SHRINK_SECONDS
    found = True
    while found:
        found = False
        for candidate in drawn.simpler():
            if time.monotonic() > deadline:
                return drawn
            if failure(candidate, target, run) is not None:
                drawn, found = candidate, True
                break
    return drawn


def as_code(drawn: Drawn, target: Target) -> str:
    """A call with operands of the same shapes, strides and dtypes, ready to paste."""
    built = drawn.build()
    lines = []
    for name, value in built.given.items():
        if not isinstance(value, Tensor):
            lines.append(f"{name}={value!r}")
            continue
        if value.dtype in (torch.int32, torch.int64):
            lines.append(f"{name}=torch.tensor({value.tolist()}, dtype={value.dtype})")
            continue
        offset, strides = value.storage_offset(), value.stride()
        room = (
            offset + 1 + sum(max(n - 1, 0) * s for n, s in zip(value.shape, strides, strict=True))
        )
        memory = f"torch.randn({room}).to({value.dtype})"
        if value.dtype == torch.bool:
            some = f"torch.tensor([0, {max(TRUE_BYTES)}], dtype=torch.uint8)"
            memory = f"{some}[torch.randint(0, 2, ({room},))].view(torch.bool)"
        view = f".as_strided({tuple(value.shape)}, {strides}, {offset})"
        grad = ".requires_grad_()" if name in drawn.wanted and value.is_floating_point() else ""
        lines.append(f"{name}={memory}{view}{grad}")
    backend = f"backend={target.backend!r}" if target != COMPILED else ""
    given = ",\n    ".join(filter(None, [*lines, f"return_lse={drawn.return_lse}", backend]))
    isa = f"# FASTFUSION_CPU_ISA={target.isa}\n" if target.isa else ""
    return f"{isa}ff.{type(drawn).function.__name__}(\n    {given}\n)"


def report(
    name: str, first: Drawn, error: Exception, target: Target, run: Callable[..., None]
) -> str:
    small = simplest(first, target, run)
    last = failure(small, target, run) or error
    return "\n".join((
        f"{type(last).__name__}: {last}",
        f"random call {name}; alone: pytest tests/ops/test_random_calls.py --random-example {name}",
        f"drawn as {first!r}",
        f"simplest that fails: {small!r}",
        as_code(small, target),
    ))  # fmt: skip


def run_list(
    op: str,
    target: Target,
    request: pytest.FixtureRequest,
    run: Callable[..., None],
    seconds: float,
) -> None:
    """The calls of one list, one after the other until the time is over."""
    example = request.config.getoption("random_example")
    cache = getattr(request.config, "cache", None)
    note = cache.mkdir("random_calls") / f"{op}-{target}" if cache is not None else None
    deadline = time.monotonic() + seconds
    index = 0 if example is None else int(example.split(":")[2])
    while True:
        name = f"{op}:{target}:{index}"
        if note is not None:
            note.write_text(name)
        drawn = random_ops.draw(op, target, index, str(target))
        error = failure(drawn, target, run)
        if error is not None:
            pytest.fail(report(name, drawn, error, target, run), pytrace=False)
        index += 1
        if example is not None or time.monotonic() > deadline:
            break
    request.node.user_properties.append(("calls", index))
    if note is not None:
        note.unlink()


def test_fresh_memory_is_filled() -> None:
    """Otherwise no test would see a number that nobody wrote."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    with filled_memory():
        assert torch.empty_strided((3, 3), (3, 1)).isnan().all()
        block = libc.malloc(1 << 16)
    first = ctypes.c_ubyte.from_address(block).value
    libc.free(ctypes.c_void_p(block))
    assert first in (0xFE, 0xBE)  # a sanitizer's own


def test_calls(op: str, target: Target, request: pytest.FixtureRequest) -> None:
    seconds = request.config.getoption("random_seconds") * (2 if target.interpreted else 1)
    run_list(op, target, request, check, seconds)


def test_compiled_equals_eager(op: str, request: pytest.FixtureRequest) -> None:
    seconds = request.config.getoption("random_seconds")
    run_list(op, COMPILED, request, check_compiled, seconds)
