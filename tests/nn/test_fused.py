"""The fusion modules through the kernels of whole layers, and the calls that stay with torch."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from accuracy import assert_accurate
from nn_cases import hidden, option_id
from suite import DEVICE, DTYPES
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import fastfusion as ff
from fastfusion.core.op import Op, forced_backend
from fastfusion.kernels.layer import linear, norm
from fastfusion.ops import cross_attention_layer, cross_modal_layer

BATCH, VISUAL, TEXT = 3, 9, 5


@pytest.fixture(autouse=True)
def _kernels_run_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU as well, in the interpreter, whichever backend the attention takes there."""
    if DEVICE != "cpu":
        return
    monkeypatch.setattr(Op, "may_fuse", lambda self, tensor: True)
    for spec in (cross_attention_layer, cross_modal_layer):
        rows = [i for i in spec.OP.implementations if i.backend in ("triton", "reference")]
        rows = [dataclasses.replace(i, on_request=None) for i in rows]
        op = dataclasses.replace(spec.OP, implementations=tuple(rows))
        monkeypatch.setattr(spec, "OP", op)


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE, dtype)


def modal_layer(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    module = ff.nn.CrossModalAttention(24, 16, 2, dim_feedforward=40, **options)
    return filled(module, dtype)


def attention_layer(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return filled(ff.nn.CrossAttention(24, 16, 2, **options), dtype)


def filled(module: Any, dtype: torch.dtype) -> Any:
    """Weights of a trained layer's size, so that no part of it drowns in another."""
    for index, parameter in enumerate(module.parameters()):
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1.0
        parameter.data = values(*parameter.shape, seed=index) * scale
    return module.to(DEVICE, dtype).eval()


def tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return values(BATCH, VISUAL, 24, dtype=dtype), values(BATCH, TEXT, 16, dtype=dtype, seed=1)


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of our kernels, one for each launch."""
    launched: list[str] = []

    class Counting:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    with monkeypatch.context() as patch:
        for module, name in ((linear, "linear_kernel"), (norm, "norm_kernel")):
            patch.setattr(module, name, Counting(name.split("_")[0], getattr(module, name)))
        yield launched


def assert_like_modules(
    module: Any, call: Callable[..., Any], dtype: torch.dtype, *inputs: Tensor
) -> None:
    """By the rule of accuracy.py, against the same modules in float64 and in `dtype`."""

    def run(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        result = call(*inputs)
        return result if isinstance(result, tuple) else (result,)

    inputs = inputs or tokens(dtype)
    with torch.no_grad():
        actual = run(inputs)
        with ff.use_backend("reference"):
            plain = run(inputs)
            module.double()
            exact = run(tuple(t.double() for t in inputs))
            module.to(dtype)
    for a, e, p in zip(actual, exact, plain, strict=True):
        assert a.dtype == p.dtype and a.shape == p.shape and a.is_contiguous()
        assert_accurate(*(t.reshape(len(t), t[:1].numel()) for t in (a, e, p)))


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"embed_dim": 12}, {"activation": "gelu"}], ids=option_id
)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_modal(
    dtype: torch.dtype, norm_first: bool, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = modal_layer(dtype, norm_first=norm_first, **options)
    masks = {
        "visual_padding_mask": hidden(BATCH, VISUAL).to(DEVICE),
        "text_padding_mask": hidden(BATCH, TEXT).to(DEVICE),
    }
    with counted(monkeypatch) as launched:
        assert_like_modules(module, lambda v, t: module(v, t, **masks), dtype)
    order = ["norm", "linear", "linear", "norm", "linear", "linear"]
    assert launched == (order if norm_first else [*order[1:], order[0]])


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_cross_modal_attn_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = modal_layer()
    floats = values(1, 2, VISUAL, TEXT)
    mask = floats if kind == "float" else hidden(VISUAL, TEXT, seed=5).to(DEVICE)

    def call(visual: Tensor, text: Tensor) -> Any:
        given = mask.to(visual.dtype) if mask is floats else mask
        return module(visual, text, attn_mask=given)

    with counted(monkeypatch) as launched:
        assert_like_modules(module, call, torch.float32)
    assert len(launched) == 6


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"head_dim": 5, "out_dim": 7}], ids=option_id
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_attention(dtype: torch.dtype, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = attention_layer(dtype, **options)
    padding = hidden(BATCH, TEXT).to(DEVICE)
    bias = values(BATCH, 1, VISUAL, TEXT)
    for mask in (None, hidden(VISUAL, TEXT, seed=5).to(DEVICE), bias):

        def call(query: Tensor, context: Tensor, mask: Tensor | None = mask) -> Tensor:
            if mask is bias:
                mask = mask.to(query.dtype)
            return module(query, context, padding, mask)

        with counted(monkeypatch) as launched:
            assert_like_modules(module, call, dtype)
        assert launched == ["linear", "linear"]

    def projected(query: Tensor, context: Tensor) -> Tensor:
        return module(query, module.project_context(context), padding)

    with counted(monkeypatch) as launched:
        assert_like_modules(module, projected, dtype)
    assert launched == ["linear", "linear"]


def test_one_projected_context_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    module = attention_layer()

    def call(query: Tensor, context: Tensor) -> Tensor:
        return module(query, module.project_context(context[:1]), hidden(1, TEXT).to(DEVICE))

    with counted(monkeypatch) as launched:
        assert_like_modules(module, call, torch.float32)
    assert launched == ["linear", "linear"]


@pytest.mark.parametrize("make, op", [
    (modal_layer, "bidirectional_attention"), (attention_layer, "scaled_dot_product_attention"),
])  # fmt: skip
def test_with_the_attention_kernel(
    make: Callable[[], Any], op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for by name, Triton runs the layer and its attention."""
    implementations = getattr(ff.ops, op).OP.implementations
    if "triton" not in [i.backend for i in implementations]:
        pytest.skip(f"{op} has no Triton kernel")
    monkeypatch.undo()
    module = make()

    def call(*inputs: Tensor) -> Any:
        forced = forced_backend() or ("triton" if inputs[0].dtype == torch.float32 else None)
        with ff.use_backend(forced):
            return module(*inputs)

    with counted(monkeypatch) as launched:
        assert_like_modules(module, call, torch.float32)
    assert launched.count("linear") >= 2


def test_norms_and_streams_of_their_own() -> None:
    """Each stream has its own eps, and may lack what the other has."""
    module = modal_layer(norm_first=True)
    module.visual.norm1.eps, module.text.norm1.eps = 1e-1, 1e-6
    module.visual.norm2 = torch.nn.LayerNorm(24, elementwise_affine=False).to(DEVICE)
    module.text.out_proj.bias = None
    assert _fits(module)
    assert_like_modules(module, module, torch.float32)


@pytest.mark.parametrize("sizes", [(0, 9, 5), (2, 0, 5), (2, 9, 0), (1, 1, 1)])
def test_empty_and_single(sizes: tuple[int, int, int]) -> None:
    batch, visual_len, text_len = sizes
    module = modal_layer()
    inputs = values(batch, visual_len, 24), values(batch, text_len, 16)
    assert_like_modules(module, module, torch.float32, *inputs)


def test_no_memory_is_left_unwritten() -> None:
    module = modal_layer()
    with torch.no_grad():
        expected = module(*tokens())
        torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
        try:
            actual = module(*tokens())
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, actual, expected))


def test_strided_tokens() -> None:
    module = modal_layer()
    visual, text = tokens()
    wide = visual.new_full((BATCH, VISUAL, 30), torch.nan)
    wide[..., 3:27] = visual
    text = text.transpose(0, 1).contiguous().transpose(0, 1)
    assert_like_modules(module, module, torch.float32, wide[..., 3:27], text)


def _fits(module: Any, *inputs: Tensor, **options: Any) -> bool:
    """Whether the op takes the place of the parts, without gradients."""
    with torch.no_grad():
        return _fits_now(module, *inputs, **options)


def _fits_now(module: Any, *inputs: Tensor, attn_mask: Tensor | None = None) -> bool:
    given = inputs or tokens(next(module.parameters()).dtype)
    if isinstance(module, ff.nn.CrossAttention):
        return module._fused(*given, None, attn_mask) is not None
    return module._fused(*given, attn_mask, None, None) is not None


def test_what_fits() -> None:
    module = modal_layer(dropout=0.1)
    assert _fits(module) and _fits(attention_layer())
    assert not _fits_now(module)  # gradients
    assert _fits_now(module.requires_grad_(False))
    assert not _fits_now(module, *(t.requires_grad_() for t in tokens()))
    with torch.inference_mode():
        assert _fits_now(module)
    with torch.device(DEVICE):
        assert _fits(module)
    assert _fits(modal_layer(dropout=0.0).train()) and not _fits(module.train())
    frozen, bias = attention_layer().requires_grad_(False), values(VISUAL, TEXT)
    assert _fits_now(frozen, attn_mask=bias)
    assert not _fits_now(frozen, attn_mask=bias.requires_grad_())
    assert not _fits_now(module.eval(), attn_mask=bias)
    query, context = tokens()
    kept = frozen.project_context(context)
    assert _fits_now(frozen, query, kept)
    kept.key.requires_grad_()
    assert not _fits_now(frozen, query, kept)


class _Linear(torch.nn.Linear):
    pass


class _LogMode(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


def _on_instance(module: Any) -> None:
    module.forward = module.forward


UNUSUAL: dict[str, Callable[[Any], Any]] = {
    "forward hook": lambda m: m.text.linear1.register_forward_hook(lambda *_: None),
    "pre-hook": lambda m: m.visual.norm2.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda m: m.visual.in_proj.register_full_backward_hook(lambda *_: None),
    "hook of dropout": lambda m: m.text.dropout1.register_forward_hook(lambda *_: None),
    "forward of an instance": lambda m: _on_instance(m.text.linear2),
    "subclass": lambda m: setattr(m.text, "linear1", _Linear(16, 40)),
    "parametrization": lambda m: torch.nn.utils.parametrizations.weight_norm(m.text.linear1),
    "another norm": lambda m: setattr(m.visual, "norm1", torch.nn.RMSNorm(24)),
    "another dropout": lambda m: setattr(m.visual, "dropout", torch.nn.AlphaDropout(0.5)),
    "dropout in training": lambda m: m.text.dropout2.train(),
    "activation": lambda m: setattr(m.text, "activation", F.silu),
    "activations": lambda m: setattr(m.text, "activation", F.gelu),
    "module as activation": lambda m: [setattr(s, "activation", torch.nn.ReLU()) for s in
                                       (m.visual, m.text) if delattr(s, "activation") is None],
    "norm in float32": lambda m: m.bfloat16().visual.norm1.float(),
    "float64": lambda m: m.double(),
    "sparse weight": lambda m: setattr(
        m.text.linear1, "weight", torch.nn.Parameter(m.text.linear1.weight.data.to_sparse())
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_modules_stay_with_torch(name: str) -> None:
    module = modal_layer(dropout=0.1)
    UNUSUAL[name](module)
    assert not _fits(module)


def test_unusual_circumstances_stay_with_torch() -> None:
    module = modal_layer()
    assert _fits(module)
    device = torch.device(DEVICE).type
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not _fits(module)
    finally:
        handle.remove()
    for context in (
        torch.autocast(device, dtype=torch.bfloat16), FlopCounterMode(display=False), _LogMode(),
        forward_ad.dual_level(), ff.use_backend("reference"),
    ):  # fmt: skip
        with context:
            assert not _fits(module)
    seen = []
    visual, text = tokens()
    torch.func.vmap(lambda v: seen.append(_fits(module, v, text)) or v)(visual[None])
    torch.jit.trace(lambda v: seen.append(_fits(module, v, text)) or v, visual, check_trace=False)
    assert seen == [False, False]


def test_weights_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch) as launched, torch.no_grad():
        modal_layer()(*tokens(), need_weights=True)
        attention_layer()(*tokens(), need_weights=True)
        for module in (modal_layer(), attention_layer()):
            with ff.attention_maps(module) as maps:
                module(*tokens())
            assert maps
    assert launched == []


def test_negated_view_stays_with_torch() -> None:
    visual, text = tokens()
    negated = torch._neg_view(visual)
    assert negated.is_neg() and not _fits(modal_layer(), negated, text)


def test_compiled_modules_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.set_default_device(None)  # which dynamo cannot follow through Tensor.unflatten
    try:
        for module, backend in ((modal_layer(), None), (attention_layer(), "triton")):
            compiled = torch.compile(module, fullgraph=True, backend="eager")
            with torch.no_grad(), counted(monkeypatch) as launched, ff.use_backend(backend):
                out = compiled(*tokens())
            assert launched == [] and out is not None
    finally:
        torch.set_default_device(None if DEVICE == "cpu" else DEVICE)


def test_where_it_is_worth_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing is prepared for a choice that cannot fall on a kernel."""
    monkeypatch.undo()
    tensor = values(1, 2, 3)
    for op in ff.ops.LAYERS:
        backends = {i.backend for i in op.implementations}
        assert op.may_fuse(tensor) == (DEVICE == "cuda" or "cpu" in backends)
        with ff.use_backend("triton"):
            assert op.may_fuse(tensor)
        with ff.use_backend("reference"):
            assert not op.may_fuse(tensor)
        with ff.use_backend("cuda"):
            assert op.may_fuse(tensor) == ("cuda" in backends)


def test_a_backend_that_cannot_leaves_the_call_to_the_parts() -> None:
    """Which then say why, as without the op."""
    module = modal_layer().double()
    inputs = tuple(t.double() for t in tokens())
    with ff.use_backend("triton"), torch.no_grad():
        with pytest.raises(ff.BackendUnavailableError, match="bidirectional_attention"):
            module(*inputs)
        assert module(*inputs, need_weights=True)
