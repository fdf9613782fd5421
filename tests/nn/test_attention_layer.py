"""When `MultiheadAttention` is one call of an op, and when it calls its parts."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from nn_cases import bias, hidden, normal
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import fastfusion as ff
from fastfusion.backends import library

pytestmark = pytest.mark.skipif(library.native is None, reason="without the compiled part")
OURS = "fastfusion.cross_attention_layer_forward.default"
# Of so many numbers that the parts take the op `linear`, whose bits those of one call are.
WIDTH, HEADS, KEYS, VALUES = 128, 4, 130, 136
BATCH, Q_LEN, KV_LEN = 3, 9, 7
KINDS = ("self", "shared memory", "all different", "unbatched", "unbatched self")
WIDTHS: tuple[dict[str, int], ...] = (
    {},
    {"kdim": KEYS, "vdim": KEYS},
    {"kdim": KEYS, "vdim": VALUES},
)
MASKS = (None, "bool", "float", "bool per head", "float per head")
# Hides nothing, and is for the parts.
IN_PARTS: dict[str, Any] = {"window": (None, None)}


def calls(run: Callable[[], Any]) -> int:
    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.seen += str(func) == OURS
            return func(*args, **(kwargs or {}))

    with Count() as count:
        run()
    return count.seen


def attention(dtype: torch.dtype = torch.float32, weights: str | None = None, **more: Any) -> Any:
    torch.manual_seed(0)
    module = ff.nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **more}).eval()
    for place, parameter in enumerate(module.parameters()):
        if parameter.dim() == 1:
            parameter.data = normal(*parameter.shape, seed=place)
    if weights is not None:
        ff.quantize(module, weights)
    return module.to(dtype)


def inputs(module: Any, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    def tokens(length: int, width: int, seed: int) -> Tensor:
        x = normal(BATCH, length, width, seed=seed).to(dtype)
        if kind.startswith("unbatched"):
            return x[0]
        return x if module.batch_first else x.transpose(0, 1).contiguous()

    query = tokens(Q_LEN, WIDTH, 0)
    if kind.endswith("self"):
        return query, query, query
    key = tokens(KV_LEN, module.kdim, 1)
    if kind in ("shared memory", "unbatched") and module.kdim == module.vdim:
        return query, key, key
    return query, key, tokens(KV_LEN, module.vdim, 2)


def make_mask(mask: str | None, kind: str, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    batch = 1 if kind.startswith("unbatched") else BATCH
    kv_len = Q_LEN if kind.endswith("self") else KV_LEN
    shape = (batch * HEADS, Q_LEN, kv_len) if mask.endswith("head") else (Q_LEN, kv_len)
    return bias(*shape, dtype=dtype) if "float" in mask else hidden(*shape)


def make_padding(padding: str | None, kind: str) -> Tensor | None:
    if padding is None:
        return None
    batch = () if kind.startswith("unbatched") else (BATCH,)
    kv_len = Q_LEN if kind.endswith("self") else KV_LEN
    if padding == "float":
        return bias(*batch, kv_len, dtype=torch.float32, seed=6)
    return hidden(*batch, kv_len, seed=6)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("weights", [None, "int8", "bf16"])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@torch.no_grad()
def test_one_call_has_the_bits_of_the_parts(weights: str | None, widths: dict[str, int]) -> None:
    module = attention(weights=weights, **widths)
    for kind, mask, padding in itertools.product(KINDS, MASKS, (None, "bool", "float")):
        if kind.endswith("self") and widths:
            continue
        given = inputs(module, kind)
        masks = {
            "attn_mask": make_mask(mask, kind, torch.float32),
            "key_padding_mask": make_padding(padding, kind),
        }

        def run(given: Any = given, masks: Any = masks, **more: Any) -> Tensor:
            return module(*given, need_weights=False, **masks, **more)[0]

        assert calls(run) == 1 and calls(partial(run, **IN_PARTS)) == 0
        ours, theirs = run(), run(**IN_PARTS)
        assert ours.shape == theirs.shape and torch.equal(ours, theirs), (kind, mask, padding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_halves(dtype: torch.dtype) -> None:
    for widths, mask in itertools.product(WIDTHS, MASKS):
        module = attention(dtype, **widths)
        given = inputs(module, "all different", dtype)
        for mask_dtype in (dtype, torch.float32):
            masks = {"attn_mask": make_mask(mask, "all different", mask_dtype)}
            assert calls(lambda m=module, g=given, k=masks: m(*g, need_weights=False, **k)) == 1
            ours, theirs = (
                module(*given, need_weights=False, **masks, **more)[0] for more in ({}, IN_PARTS)
            )
            assert ours.dtype == dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("kind", ["self", "shared memory", "all different"])
@torch.no_grad()
def test_sequences_first(kind: str, weights: str | None) -> None:
    """The bits of the same batch the other way round, side by side in memory."""
    module, turned = (attention(weights=weights, batch_first=first) for first in (True, False))
    masks = {"attn_mask": make_mask("bool per head", kind, torch.float32)}
    masks["key_padding_mask"] = make_padding("bool", kind)
    given = inputs(turned, kind)
    assert calls(lambda: turned(*given, need_weights=False, **masks)) == 1
    ours = turned(*given, need_weights=False, **masks)[0]
    theirs = module(*inputs(module, kind), need_weights=False, **masks)[0]
    assert ours.is_contiguous() and torch.equal(ours.transpose(0, 1), theirs)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", [None, "int8", "bf16"])
@torch.no_grad()
def test_a_sample_has_the_same_bits_in_any_company(weights: str | None, batch_first: bool) -> None:
    module = attention(weights=weights, batch_first=batch_first, kdim=KEYS, vdim=VALUES)
    given = inputs(module, "all different")
    together = module(*given, need_weights=False)[0]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(module(*given, need_weights=False)[0], together)
    finally:
        torch.set_num_threads(threads)
    for b in range(BATCH):
        one = slice(b, b + 1)
        alone = [t[one] if batch_first else t[:, one] for t in given]
        result = module(*alone, need_weights=False)[0]
        assert torch.equal(result, together[one] if batch_first else together[:, one])


@torch.no_grad()
def test_what_padding_hides_is_not_read() -> None:
    module = attention(kdim=KEYS, vdim=VALUES)
    query, key, value = inputs(module, "all different")
    padding = hidden(BATCH, KV_LEN)
    padding[1] = True  # nothing is left of a sample
    expected = module(query, key, value, padding, need_weights=False)[0]
    assert torch.equal(expected[1], module.out_proj.bias.expand(Q_LEN, -1))
    key, value = (t.masked_fill(padding[..., None], torch.nan) for t in (key, value))
    assert torch.equal(module(query, key, value, padding, need_weights=False)[0], expected)


@torch.no_grad()
def test_explained_with_its_weights() -> None:
    for weights, words in ((None, "one call"), ("int8", "packed 8-bit weights")):
        module = attention(weights=weights, kdim=KEYS, vdim=VALUES)
        report = str(ff.explain(module, *inputs(module, "all different"), need_weights=False))
        assert "cross_attention_layer" in report and words in report and "value_context" in report


@torch.no_grad()
def test_weights_are_read_in_place() -> None:
    for widths in WIDTHS:
        module = attention(**widths)
        given = inputs(module, "all different")
        module(*given, need_weights=False)
        module.load_state_dict({k: 0.9 * v for k, v in module.state_dict().items()})
        module.in_proj_bias.data[::3] = 0.1
        ours, theirs = (module(*given, need_weights=False, **more)[0] for more in ({}, IN_PARTS))
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_negative_views() -> None:
    module = attention()
    given = inputs(module, "shared memory")
    negative = torch._neg_view(-given[0])
    expected = module(*given, need_weights=False)[0]
    torch.testing.assert_close(module(negative, *given[1:], need_weights=False)[0], expected)
    weight = module.in_proj_weight.data
    module.in_proj_weight = nn.Parameter(torch._neg_view(-weight), requires_grad=False)
    torch.testing.assert_close(module(*given, need_weights=False)[0], expected)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


@torch.no_grad()
def test_parametrized_projections_count() -> None:
    module = attention()
    parametrize.register_parametrization(module, "in_proj_weight", Twice())
    given = inputs(module, "shared memory")
    ours, theirs = (module(*given, need_weights=False, **more)[0] for more in ({}, IN_PARTS))
    assert torch.equal(ours, theirs)
    module.register_forward_hook(lambda *given: None)  # around the call, not inside
    assert calls(lambda: module(*given, need_weights=False)) == 1


def hooked(module: Any) -> None:
    module.out_proj.register_forward_pre_hook(lambda module, given: None)


def replaced(module: Any) -> None:
    class Other(nn.Linear):
        pass

    module.out_proj = Other(WIDTH, WIDTH)


def parametrized(module: Any) -> None:
    parametrize.register_parametrization(module.out_proj, "weight", Twice())


class Weight(nn.Parameter):
    pass


def of_a_subclass(module: Any) -> None:
    module.in_proj_weight = Weight(module.in_proj_weight.data)


def adding_bias(module: Any) -> None:
    module.bias_k, module.bias_v = (nn.Parameter(normal(1, 1, WIDTH)) for _ in range(2))


def adding_zeros(module: Any) -> None:
    module.add_zero_attn = True


def dropping(module: Any) -> None:
    module.train().dropout = 0.5


CHANGES = (hooked, replaced, parametrized, of_a_subclass, adding_bias, adding_zeros, dropping)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_modules_that_mean_more_call_their_parts(change: Callable[[Any], None]) -> None:
    module = attention()
    change(module)
    given = inputs(module, "shared memory")
    assert calls(lambda: module(*given, need_weights=False)) == 0
    assert module(*given, need_weights=False)[0].isfinite().all()


def run_with_weights(module: Any, *given: Tensor) -> Any:
    return module(*given)


def run_recorded(module: Any, *given: Tensor) -> Any:
    with ff.attention_maps(module) as maps:
        module(*given, need_weights=False)
    assert len(maps) == 1


def run_causal(module: Any, *given: Tensor) -> Any:
    mask = torch.ones(Q_LEN, KV_LEN, dtype=torch.bool).triu(1)
    return module(*given, need_weights=False, attn_mask=mask, is_causal=True)


def run_windowed(module: Any, *given: Tensor) -> Any:
    return module(*given, need_weights=False, window=(1, 1))


def run_with_gradients(module: Any, *given: Tensor) -> Any:
    with torch.enable_grad():
        return module(*given, need_weights=False)


def run_to_a_mask(module: Any, *given: Tensor) -> Any:
    module.requires_grad_(False)
    mask = torch.zeros(Q_LEN, KV_LEN, requires_grad=True)
    with torch.enable_grad():
        result = module(*given, need_weights=False, attn_mask=mask)[0]
        result.square().sum().backward()
    assert mask.grad is not None and mask.grad.abs().max() > 0


def run_autocast(module: Any, *given: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return module(*given, need_weights=False)


def run_vmap(module: Any, *given: Tensor) -> Any:
    return torch.vmap(lambda *each: module(*each, need_weights=False)[0])(*(t[None] for t in given))


def run_reference(module: Any, *given: Tensor) -> Any:
    with ff.use_backend("reference"):
        return module(*given, need_weights=False)


RUNS = (
    run_with_weights, run_recorded, run_causal, run_windowed, run_with_gradients, run_to_a_mask,
    run_autocast, run_vmap, run_reference,
)  # fmt: skip


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@torch.no_grad()
def test_calls_that_mean_more_are_the_parts(run: Callable[..., Any]) -> None:
    module = attention()
    assert calls(lambda: run(module, *inputs(module, "shared memory"))) == 0


@torch.no_grad()
def test_compiled_and_exported_programs_have_the_parts() -> None:
    module = attention(kdim=KEYS, vdim=VALUES)
    given = inputs(module, "all different")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, *given: Tensor) -> Tensor:
            return self.attention(*given, need_weights=False)[0]

    expected = Model()(*given)
    compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
    program = torch.export.export(Model(), given)
    assert OURS not in str(program.graph)
    for result in (compiled(*given), program.module()(*given)):
        torch.testing.assert_close(result, expected)
