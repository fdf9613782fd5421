"""The tests that every implementation of every op passes.

A test file subclasses `OpSuite` with an op, its cases and the plain formula; conftest.py runs each
test for every case, dtype and target. Targets come from the op's list of implementations (the CPU
kernels once per instruction set of this machine), so that a new implementation is tested without
touching a test.
"""

import ctypes
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

import fastfusion as ff
from fastfusion.backends import cuda, library
from fastfusion.core.op import Op

# Where the tests run: set by conftest.py, which reads --device.
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the CPU kernels, those that run here.
ISAS: list[str] = library.native.isas(runnable=True) if library.native is not None else []
needs_native = pytest.mark.skipif(not ISAS, reason="without the compiled part there is no kernel")
# Scales, and powers of two that queries, keys and the loss are multiplied by to make of them scores
# and gradients that float32 holds: though not in any order of multiplication.
SCALES = {
    "zero": (0.0, 0, 0, 0),
    "largest": (2.4e38, -63, -64, -20),
    "most_negative": (-3e38, -65, -64, -20),
    "with_large_queries": (1e37, 7, -131, -20),
    "with_large_keys": (-1e37, -131, 7, -20),
    "smallest": (2.0**-148, 50, 50, 0),
    "with_large_gradients": (1e-34, 0, 112, 18),
}
# Calls whose expected results a process keeps: all of a suite's scales and dtypes, in 110 MB.
MOST_EXPECTED = 160
# Of glibc's mallopt: fresh memory is filled with the complement of a byte, freed memory with it.
M_PERTURB = -6


# Results, and gradients by name.
Evaluated = tuple[tuple[Tensor, ...], dict[str, Tensor]]
_expected: dict[Any, tuple[Evaluated, Evaluated]] = {}


@dataclass(frozen=True)
class Target:
    """An implementation, and for the CPU kernels the instruction set."""

    backend: str
    isa: str | None = None
    differentiable: bool = True

    def __str__(self) -> str:
        return f"{self.backend}-{self.isa}" if self.isa else self.backend

    @property
    def interpreted(self) -> bool:
        return self.backend in ("triton", "cuda") and DEVICE == "cpu"

    @property
    def drops(self) -> bool:
        """Whether it takes calls with dropout."""
        return self.backend != "cuda"

    def call(self, function: Callable[..., Any], **kwargs: Any) -> tuple[Tensor, ...]:
        if self.isa is not None and library.native is not None:
            library.native.select_isa(self.isa)
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            result = function(**kwargs, backend=self.backend)
        return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True)
class Case:
    """A legal call: the shape for the op's `inputs`, and what to change in them.

    `why` names the fault that the case is there to catch. `in_triton` is what the shape has instead
    where Triton's interpreter runs the call, a thousand times slower; None: the fault is one that
    its kernels, which have fewer ways, cannot have beside those of other cases.
    """

    name: str
    why: str
    shape: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[dict[str, Any]], None] | None = None
    in_triton: dict[str, Any] | None = field(default_factory=dict)

    def suits(self, target: "Target") -> bool:
        """Whether the target can have the fault."""
        slow = target.interpreted and target.backend == "triton"
        return self.in_triton is not None or not slow


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double()
    return value


def in_bytes(call: dict[str, Any], *true: int) -> dict[str, Any]:
    """The call with its bools in other bytes, as views of pictures and of integers have them: the
    given ones in turn where they are True."""

    def change(mask: Tensor) -> Tensor:
        turns = torch.arange(mask.numel(), device=mask.device).view(mask.shape) % len(true)
        values = torch.tensor(true, dtype=torch.uint8, device=mask.device)[turns]
        return torch.where(mask, values, 0).view(torch.bool)

    bools = [k for k, v in call.items() if isinstance(v, Tensor) and v.dtype == torch.bool]
    return call | {name: change(call[name]) for name in bools}


def leaves(call: dict[str, Any]) -> list[str]:
    """The arguments that can require a gradient, but for slopes, which send a call to the
    reference; torch's objects for masks cannot."""
    found = [k for k, v in call.items() if type(v) is Tensor and v.is_floating_point()]
    return [name for name in found if name != "alibi_slopes"]


def identity(value: Any) -> Any:
    """An argument as a key: two that are equal are so down to their bytes and strides."""
    if not isinstance(value, Tensor):
        return type(value), value
    if type(value) is not Tensor:
        return object()  # like no other
    data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return value.dtype, value.shape, value.stride(), hashlib.blake2b(data).digest()


def targets_of(op: Op) -> list[Target]:
    """Every implementation that can run here, the CPU kernels once per instruction set."""
    targets = []
    for implementation in op.implementations:
        if implementation.backend == "cpu":
            if DEVICE != "cpu":
                continue
            targets += [Target("cpu", isa, implementation.differentiable) for isa in ISAS]
        elif implementation.backend != "cuda" or cuda.unavailable() is None:
            targets.append(Target(implementation.backend, None, implementation.differentiable))
    return targets


def evaluate(
    run: Callable[..., tuple[Tensor, ...]],
    call: dict[str, Any],
    wanted: Iterable[str] | None = None,
    weighed: Iterable[int] | None = None,
    factor: float = 1.0,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Results, and gradients of a loss that weighs them with random numbers.

    Args:
        wanted: the tensors that require a gradient; None: all that can.
        weighed: the results that the loss is made of; None: all.
        factor: of the loss.
    """
    names = leaves(call) if wanted is None else list(wanted)
    call = {k: v.detach().requires_grad_(k in names) if k in leaves(call) else v
            for k, v in call.items()}  # fmt: skip
    torch.manual_seed(11)
    results = run(**call)
    loss = torch.zeros((), dtype=torch.float64)
    for index, result in enumerate(results):
        if weighed is not None and index not in weighed:
            continue
        generator = torch.Generator("cpu").manual_seed(index)
        weight = torch.randn(result.shape, generator=generator, dtype=torch.float64, device="cpu")
        weight = weight.to(result.device)
        finite = result.double()
        finite = torch.where(finite.isinf(), 0.0, finite)
        # The weight in the result's own dtype: the gradient that arrives is then the same
        # number in every dtype.
        loss = loss + factor * (finite * weight.to(torch.bfloat16).double()).sum()
    if not loss.requires_grad:
        return results, {}
    gradients = torch.autograd.grad(loss, [call[n] for n in names], allow_unused=True)
    return results, {
        n: torch.zeros_like(call[n]) if g is None else g
        for n, g in zip(names, gradients, strict=True)
    }


@contextmanager
def filled_memory() -> Iterator[None]:
    """Fresh memory holds NaN where torch made it for Python, and -1.7e38 where it came from the C
    library, as the compiled ops' results do: what a kernel leaves unwritten shows in the result."""
    libc = ctypes.CDLL(None)
    fill = getattr(libc, "mallopt", lambda option, value: 0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill(M_PERTURB, 1)
    try:
        yield
    finally:
        fill(M_PERTURB, 0)
        torch.use_deterministic_algorithms(False)


class OpSuite:
    """Subclass with `op`, `function`, `plain` and `cases`; see the module docstring.

    The bools of all cases are bytes of many kinds: everything but 0 is True.
    """

    op: ClassVar[Op]
    function: ClassVar[Callable[..., Any]]
    # The formula as a user would write it, in the dtype of the inputs: all outputs with lse.
    plain: ClassVar[Callable[..., tuple[Tensor, ...]]]
    cases: ClassVar[list[Case]]
    outputs: ClassVar[int]  # before the lse
    # What asks the function for all outputs.
    with_lse: ClassVar[dict[str, Any]] = {"return_lse": True}
    # Names of cases that have each bool argument on each way through the kernels.
    bool_cases: ClassVar[tuple[str, ...]] = ()
    dtypes: ClassVar[tuple[torch.dtype, ...]] = DTYPES

    @classmethod
    def targets(cls) -> list[Target]:
        return targets_of(cls.op)

    @classmethod
    def native_targets(cls) -> list[Target]:
        return [t for t in cls.targets() if t.backend != "reference"]

    @classmethod
    def fast_targets(cls) -> list[Target]:
        """All but kernels of GPUs on the CPU, which are a thousand times slower."""
        return [t for t in cls.targets() if not t.interpreted]

    @classmethod
    def slow_targets(cls) -> list[Target]:
        return [t for t in cls.targets() if t.interpreted]

    @classmethod
    def differentiable_targets(cls) -> list[Target]:
        return [t for t in cls.targets() if t.differentiable]

    @classmethod
    def dropout_targets(cls) -> list[Target]:
        return [t for t in cls.targets() if t.drops]

    @classmethod
    def threaded_targets(cls) -> list[Target]:
        """Those whose work is cut by the number of threads."""
        return [t for t in cls.targets() if t.backend == "cpu"]

    @staticmethod
    def slices(tensor: Tensor) -> Tensor:
        """(slices, elements): what the last two dimensions hold is one slice."""
        while tensor.dim() < 3:
            tensor = tensor[None]
        return tensor.flatten(0, -3).flatten(1)

    @staticmethod
    def lse_slices(tensor: Tensor) -> Tensor:
        """One slice per batch entry (packed: per head): a head with one query has one number, and
        the relative error of one number is luck."""
        return tensor.flatten(1) if tensor.dim() == 3 else tensor.t()

    @classmethod
    def inputs(cls, shape: dict[str, Any], dtype: torch.dtype, seed: int) -> dict[str, Any]:
        """Arguments of `function`, each of them a tensor or an option."""
        return cls.op.inputs(shape, dtype, seed=seed)

    @classmethod
    def reference(cls, **call: Any) -> tuple[Tensor, ...]:
        return cls.op.reference(**call)

    def takes(self, target: Target, call: dict[str, Any]) -> bool:
        """Whether a target runs a call; one that does not is seen to refuse it."""
        return True

    @staticmethod
    def relayout(tensor: Tensor, layout: str) -> Tensor:
        return relayout(tensor, layout)

    def build(self, case: Case, dtype: torch.dtype, target: Target) -> dict[str, Any]:
        """The call of a case, without dropout where the target takes none."""
        slow = target.interpreted and target.backend == "triton"
        shape = case.shape | ((case.in_triton or {}) if slow else {})
        call = self.inputs(shape, dtype, len(case.name))
        call.update(case.options)
        if not target.drops:
            call.pop("dropout_p", None)
        if case.edit is not None:
            case.edit(call)
        return in_bytes(call, 1, 255, 2, 128)

    def evaluate(
        self, run: Callable[..., tuple[Tensor, ...]], call: dict[str, Any], factor: float = 1.0
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Outputs with lse, and gradients of a loss that uses each of them, times a factor."""
        return evaluate(run, call, factor=factor)

    def compare(self, target: Target, call: dict[str, Any], factor: float = 1.0) -> None:
        """Outputs and gradients of a target by the rule of accuracy.py."""
        if not self.takes(target, call):
            return
        (exact, _), (plain, _) = self.expected(call, factor)
        with filled_memory():
            actual, gradients = self.evaluate(
                lambda **kw: target.call(type(self).function, **kw, **self.with_lse), call, factor
            )
        for index, (a, e, p) in enumerate(zip(actual, exact, plain, strict=True)):
            is_lse = index >= self.outputs
            assert a.dtype == (torch.float32 if is_lse else p.dtype)
            if is_lse:
                assert_accurate(*map(self.lse_slices, (a, e, p.float())))
            else:
                assert_accurate(*map(self.slices, (a, e, p)))
        self.compare_gradients(target, call, gradients, factor)

    def compare_gradients(
        self,
        target: Target,
        call: dict[str, Any],
        gradients: dict[str, Tensor],
        factor: float = 1.0,
    ) -> None:
        (_, exact), (_, plain) = self.expected(call, factor)
        # An implementation that lost its graph would have no gradients to be wrong.
        assert gradients.keys() == (exact.keys() if target.differentiable else set())
        for name, gradient in gradients.items():
            assert gradient.dtype == call[name].dtype and gradient.shape == call[name].shape
            assert_accurate(*map(self.slices, (gradient, exact[name], plain[name])))

    def expected(self, call: dict[str, Any], factor: float) -> tuple[Evaluated, Evaluated]:
        """Results and gradients of the reference in float64, and of the plain formula. Targets
        share them: every one gets the same call, down to its bytes."""
        key = (type(self), factor, *((name, identity(v)) for name, v in call.items()))
        if key not in _expected:
            double = {k: _double(v) for k, v in call.items()}
            runs = [
                self.evaluate(lambda **kw: self.reference(**kw), double, factor),
                self.evaluate(type(self).plain, call, factor),
            ]
            exact, plain = ((tuple(r.detach() for r in out), grads) for out, grads in runs)
            if len(_expected) == MOST_EXPECTED:
                del _expected[next(iter(_expected))]
            _expected[key] = exact, plain
        return _expected[key]

    def test_accuracy(self, case: Case, target: Target, dtype: torch.dtype) -> None:
        self.compare(target, self.build(case, dtype, target))

    def test_bool_bytes(self, native_target: Target) -> None:
        """Whatever byte is in the place of True, the bits are those of 1."""

        def run(**kw: Any) -> tuple[Tensor, ...]:
            return native_target.call(type(self).function, **kw, **self.with_lse)

        for case in (c for c in self.cases if c.name in self.bool_cases):
            call = self.build(case, torch.float32, native_target)
            if not self.takes(native_target, call):
                continue
            expected, expected_gradients = self.evaluate(run, in_bytes(call, 1))
            for byte in (2, 128, 255):
                actual, gradients = self.evaluate(run, in_bytes(call, byte))
                assert all(map(torch.equal, actual, expected))
                assert all(torch.equal(gradients[n], expected_gradients[n]) for n in gradients)

    @pytest.mark.parametrize("layout", ["transposed", "offset", "repeated", "reversed_last"])
    def test_strides(self, layout: str, target: Target, dtype: torch.dtype) -> None:
        """Any strides give the result of contiguous inputs, and no neighbour is read or written."""
        call = self.build(self.cases[0], dtype, target)
        if not self.takes(target, call):
            return
        viewed = dict(call)
        for name in leaves(call):
            viewed[name] = self.relayout(call[name], layout)
            if layout == "repeated":
                call[name] = viewed[name].contiguous()
        expected, expected_gradients = self.evaluate(
            lambda **kw: target.call(type(self).function, **kw, **self.with_lse), call
        )
        actual, gradients = self.evaluate(
            lambda **kw: target.call(type(self).function, **kw, **self.with_lse), viewed
        )
        if target.backend == "reference":
            self.compare(target, viewed)
            return
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)
        for name in gradients:
            assert torch.equal(gradients[name], expected_gradients[name])

    def test_same_bits_for_any_threads(self, case: Case, threaded_target: Target) -> None:
        call = self.build(case, torch.float32, threaded_target)
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(
                self.evaluate(
                    lambda **kw: threaded_target.call(type(self).function, **kw, **self.with_lse),
                    call,
                )
            )
        for outputs, gradients in runs[1:]:
            assert all(map(torch.equal, outputs, runs[0][0]))
            assert all(torch.equal(gradients[n], runs[0][1][n]) for n in gradients)


class AttentionSuite(OpSuite):
    """That of an op with queries, keys and a scale."""

    # Of cases that go each way that a scale can take; and of few, for slow targets.
    scale_cases: ClassVar[tuple[str, ...]] = ()
    slow_scale_cases: ClassVar[tuple[str, ...]] = ()

    @pytest.mark.parametrize("scale", SCALES)
    def test_any_finite_scale(self, scale: str, fast_target: Target, dtype: torch.dtype) -> None:
        """Zero times infinity is nowhere on the way to a number that float32 holds."""
        self.check_scale(scale, fast_target, dtype, self.scale_cases)

    @pytest.mark.parametrize("scale", SCALES)
    def test_any_finite_scale_interpreted(self, scale: str, slow_target: Target) -> None:
        self.check_scale(scale, slow_target, torch.float32, self.slow_scale_cases)

    def check_scale(
        self, scale: str, target: Target, dtype: torch.dtype, names: tuple[str, ...]
    ) -> None:
        number, *powers = SCALES[scale]
        if dtype == torch.float16:  # its own range is smaller
            powers = [min(max(power, -9), 5) for power in powers]
            number = math.copysign(1.0, number) * 0.3 * 2.0 ** -sum(powers[:2]) if number else 0.0
        query, key, loss = (2.0**power for power in powers)
        for case in (c for c in self.cases if c.name in names):
            call = self.build(case, dtype, target)
            call |= {"scale": number, "query": call["query"] * query, "key": call["key"] * key}
            self.compare(target, call, loss)


def relayout(tensor: Tensor, layout: str) -> Tensor:
    """The same values (or, repeated, the first of them) behind other strides.

    Surrounding memory is NaN, so that a read past the view shows.
    """
    if layout == "transposed":
        order = [*range(tensor.dim() - 3), tensor.dim() - 2, tensor.dim() - 3, tensor.dim() - 1]
        return tensor.permute(order).contiguous().permute(order) if tensor.dim() > 2 else tensor
    if layout == "offset":
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan)
        wide[..., 1:-2] = tensor
        return wide[..., 1:-2]
    if layout == "repeated":
        # Heads: equal tokens would make a softmax constant, and gradients rounding noise.
        return tensor[:, :1].expand(tensor.shape) if tensor.dim() > 2 else tensor
    every_second = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
    every_second[..., ::2] = tensor
    return every_second[..., ::2]


def plain_lse(scores: Tensor, dim: int) -> Tensor:
    if scores.shape[dim] == 0:
        return scores.sum(dim)
    maximum = scores.detach().amax(dim, keepdim=True)
    return (maximum + (scores - maximum).exp().sum(dim, keepdim=True).log()).squeeze(dim)


def distances(scores: Tensor, alignment: str) -> Tensor:
    """(q_len, kv_len): by how much a query's place is behind a key."""
    q_len, kv_len = scores.shape[-2:]
    rows, columns = (torch.arange(n, device=scores.device) for n in (q_len, kv_len))
    return rows[:, None] + (kv_len - q_len if alignment == "bottom_right" else 0) - columns


def shaped(
    scores: Tensor, softcap: float | None, alibi_slopes: Tensor | None, alignment: str
) -> Tensor:
    """A soft cap, and ALiBi, in the dtype of the scores."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(scores.dtype)[..., None, None]
        scores = scores - slopes * distances(scores, alignment).abs()
    return scores


def positioned(table: Tensor, index: Tensor, scores: Tensor) -> Tensor:
    """What a position table adds, in the dtype of the scores."""
    if index.dim() == 1:
        index = index[scores.shape[-2] - 1 - distances(scores, "top_left")]
    return table[:, index.long()].to(scores.dtype)


def outside(
    scores: Tensor,
    is_causal: bool,
    window: Any,
    alignment: str,
    segment_ids_q: Tensor | None = None,
    segment_ids_k: Tensor | None = None,
    prefix_len: Tensor | None = None,
) -> Tensor:
    """The scores that a causal mask, a window, segments and a prefix hide, of three dimensions at
    least if there are segments or a prefix."""
    distance = distances(scores, alignment)
    left, right = window or (None, None)
    if prefix_len is None:
        hidden = distance < (0 if is_causal else -torch.inf if right is None else -right)
    else:
        keys = torch.arange(scores.shape[-1], device=scores.device)
        hidden = (distance < 0) & (keys >= prefix_len[..., None, None, None])
    if left is not None:
        hidden = hidden | (distance > left)
    if segment_ids_q is None or segment_ids_k is None:
        return hidden
    return hidden | (segment_ids_q[..., None, :, None] != segment_ids_k[..., None, None, :])


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    causal_alignment: str = "top_left",
    window: Any = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    segment_ids_q: Tensor | None = None,
    segment_ids_k: Tensor | None = None,
    prefix_len: Tensor | None = None,
    sinks: Tensor | None = None,
    position_table: Tensor | None = None,
    position_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Unfused attention as a user writes it, every step in the dtype of the inputs."""
    if enable_gqa:
        kv_heads = value.shape[-3] if key.shape[-3] == 1 else key.shape[-3]
        repeats = query.shape[-3] // kv_heads if kv_heads else 1
        key, value = (
            t.expand(*t.shape[:-3], kv_heads, *t.shape[-2:]).repeat_interleave(repeats, -3)
            for t in (key, value)
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-1, -2)) * scale
    scores = shaped(scores, softcap, alibi_slopes, causal_alignment)
    if position_table is not None and position_index is not None:
        scores = scores + positioned(position_table, position_index, scores)
    # A batch or heads that the values alone have.
    outer = torch.broadcast_shapes(scores.shape[:-2], value.shape[:-2])
    scores = scores.expand(*outer, *scores.shape[-2:])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        # Without a dimension it would not count among the dtypes.
        scores = scores.to(torch.promote_types(scores.dtype, attn_mask.dtype)) + attn_mask
    hidden = outside(
        scores, is_causal, window, causal_alignment, segment_ids_q, segment_ids_k, prefix_len
    )
    scores = scores.masked_fill(hidden, -torch.inf)
    if key_padding_mask is not None:
        per_head = key_padding_mask[..., None, None, :] if scores.dim() > 2 else key_padding_mask
        scores = scores.masked_fill(per_head, -torch.inf)
    if sinks is not None:
        last = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, last), -1)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(dead, 0.0)
    lse = plain_lse(scores.to(torch.promote_types(scores.dtype, torch.float32)), -1)
    lse = lse.masked_fill(dead.squeeze(-1), -torch.inf)
    weights = torch.softmax(scores, -1).masked_fill(dead, 0.0)
    if sinks is not None:
        weights = weights[..., :-1]
    if dropout_p > 0.0:
        seed = ff.core.philox.draw_seed(query.device)
        flat = (math.prod(outer[:-1]), outer[-1] if outer else 1, *weights.shape[-2:])
        keep = ff.core.philox.keep_mask(seed, dropout_p, *flat, stream=0).reshape(weights.shape)
        weights = weights * keep * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    return weights.to(value.dtype) @ value, lse
