"""The cross-attention layer of the CUDA kernels: on a GPU, and on the CPU in the emulator."""

import ctypes
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from suite import DEVICE, relayout
from torch import Tensor

import fastfusion as ff
from fastfusion.backends import cuda
from fastfusion.ops import cross_attention_layer as layer

pytestmark = pytest.mark.skipif(
    cuda.unavailable() is not None, reason=f"no CUDA kernels: {cuda.unavailable()}"
)
TYPES = (torch.float16, torch.bfloat16)
NAMES = layer.Call._fields
# Widths without a norm, 16 rows of which fill the shared memory of a compute capability.
WIDEST = {75: 2048, 80: 5184, 86: 3136, 87: 5184, 89: 3136, 90: 7232}

Call = dict[str, Any]


def capability() -> int:
    return int(torch.ops.fastfusion.cuda_capability(0))


def need(dtype: torch.dtype) -> None:
    reasons = cuda.refuses_tensor(torch.empty(1, 1, device=DEVICE, dtype=dtype))
    if reasons:
        pytest.skip(reasons[0])


def values(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE, dtype)


def hidden(*shape: int) -> Tensor:
    """A bool mask, True = hidden, that never hides all of a row."""
    mask = values(*shape, dtype=torch.float32, seed=5) > 0.5
    mask[..., :1] = False
    return mask


def bare(
    batch: int, q_len: int, kv_len: int, query_dim: int, context_dim: int, heads: int,
    head_dim: int, out_dim: int, dtype: torch.dtype = torch.float16,
) -> Call:  # fmt: skip
    """Without biases, norms, masks and residual."""
    inner = heads * head_dim
    call: Call = dict.fromkeys(NAMES)
    call |= {
        "query": values(batch, q_len, query_dim, dtype=dtype),
        "context": values(batch, kv_len, context_dim, dtype=dtype, seed=1),
        "num_heads": heads,
        "rms_norm": False,
    }
    for seed, (name, rows, columns) in enumerate(
        (("q", inner, query_dim), ("kv", 2 * inner, context_dim), ("out", out_dim, inner)), 2
    ):
        weight = values(rows, columns, dtype=torch.float32, seed=seed) * columns**-0.5
        call[f"{name}_weight"] = weight.to(dtype)
    return call


def full(*sizes: int, dtype: torch.dtype = torch.float16, rms: bool = False) -> Call:
    """With everything."""
    batch, q_len, kv_len, query_dim, context_dim, heads, head_dim, out_dim = sizes
    call = bare(*sizes, dtype=dtype)
    inner = heads * head_dim
    vectors = {
        "q_bias": inner, "kv_bias": 2 * inner, "out_bias": out_dim,
        "query_norm_weight": query_dim, "query_norm_bias": query_dim,
        "context_norm_weight": context_dim, "context_norm_bias": context_dim,
    }  # fmt: skip
    for seed, (name, size) in enumerate(vectors.items(), 10):
        call[name] = values(size, dtype=dtype, seed=seed)
    call |= {
        "residual": values(batch, q_len, out_dim, dtype=dtype, seed=20),
        "attn_mask": values(heads, 1, kv_len, dtype=dtype, seed=21),
        "key_padding_mask": hidden(batch, kv_len),
        "scale": 0.3,
        "query_norm_eps": 1e-5,
        "context_norm_eps": 1e-3,
        "rms_norm": rms,
    }
    return call


def op() -> Any:
    """The op, which `emulate` may have loaded after this file."""
    return torch.ops.fastfusion.cuda_cross_attention_layer_forward.default


def run(call: Call) -> Tensor:
    result: Tensor = op()(*call.values())
    return result


def formula(call: Call) -> Tensor:
    """Of modules, in the dtype of the call."""

    def normalized(name: str) -> Tensor:
        x: Tensor = call[name]
        weight, bias, eps = (call[f"{name}_norm_{part}"] for part in ("weight", "bias", "eps"))
        if eps is None:
            return x
        if not call["rms_norm"]:
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        x = F.rms_norm(x, x.shape[-1:], weight, eps)
        return x if bias is None else x + bias

    heads = call["num_heads"]
    q = F.linear(normalized("query"), call["q_weight"], call["q_bias"])
    kv = F.linear(normalized("context"), call["kv_weight"], call["kv_bias"])
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = (t.transpose(1, 2) for t in kv.unflatten(-1, (2, heads, -1)).unbind(2))
    out = ff.scaled_dot_product_attention(
        q, k, v, call["attn_mask"], scale=call["scale"],
        key_padding_mask=call["key_padding_mask"], backend="reference",
    )  # fmt: skip
    out = F.linear(out.transpose(1, 2).flatten(2), call["out_weight"], call["out_bias"])
    return out if call["residual"] is None else out + call["residual"]


def double(call: Call) -> Call:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }


def assert_right(call: Call) -> None:
    actual, exact, plain = run(call), formula(double(call)), formula(call)
    assert actual.dtype == plain.dtype and actual.shape == plain.shape and actual.is_contiguous()
    assert_accurate(*(t.reshape(len(t), t[:1].numel()) for t in (actual, exact, plain)))


SIZES = [
    (1, 20, 36, 96, 64, 2, 64, 96),
    (2, 33, 17, 40, 200, 3, 40, 33),  # several tiles of rows, columns that fill none
    (2, 1, 1, 17, 33, 2, 6, 1),  # rows that are no multiple of 16 bytes
    (3, 17, 5, 8, 1, 1, 1, 9),
    (1, 3, 600, 24, 16, 1, 8, 8),  # attention in chunks of keys, which need a workspace
]


@pytest.mark.parametrize("make", [bare, full])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_accuracy(sizes: tuple[int, ...], dtype: torch.dtype, make: Callable[..., Call]) -> None:
    need(dtype)
    assert_right(make(*sizes, dtype=dtype))


@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("query_dim", [72, 75])
def test_norms(query_dim: int, rms: bool, missing: str) -> None:
    call = full(1, 9, 7, query_dim, 40, 2, 8, 16, rms=rms)
    for part in ("weight", "bias"):
        if missing in (part, "both"):
            call[f"query_norm_{part}"] = None
    call["context_norm_eps"] = None
    assert_right(call)


def test_a_mean_far_from_zero() -> None:
    """Rows of one value have no variance, and rows far from zero few digits of it."""
    call = full(1, 5, 4, 75, 40, 2, 8, 16)
    call["query"] = (call["query"] + 200.0).contiguous()
    call["query"][0, 0] = 1000.0
    call["query_norm_weight"] = None
    assert_right(call)


@pytest.mark.parametrize("bias", [False, True])
def test_masks(bias: bool) -> None:
    call = bare(2, 9, 7, 24, 16, 2, 8, 16)
    call["attn_mask"] = ~hidden(9, 7)
    if bias:
        call["attn_mask"] = values(2, 1, 9, 7, dtype=torch.float32)
    assert_right(call)


def test_what_is_hidden_is_not_read() -> None:
    call = full(2, 9, 7, 24, 16, 2, 8, 16)
    call["attn_mask"] = None
    expected = run(call)
    call["context"][call["key_padding_mask"]] = torch.nan
    assert torch.equal(run(call), expected)
    call["key_padding_mask"] = torch.ones(2, 7, dtype=torch.bool, device=DEVICE)
    assert torch.equal(run(call), call["out_bias"] + call["residual"])


def test_not_a_number_stays_in_its_row() -> None:
    call = full(1, 40, 7, 24, 16, 2, 8, 16)
    call["query"][0, 4, 7] = torch.nan
    assert run(call)[0].isnan().all(-1).tolist() == [row == 4 for row in range(40)]


@pytest.mark.parametrize("sizes", [(0, 9, 7), (2, 0, 7), (2, 9, 0)])
def test_empty(sizes: tuple[int, int, int]) -> None:
    assert_right(full(*sizes, 24, 16, 2, 8, 16))


def test_widest_rows() -> None:
    """Shared memory holds 32 rows, 16, or none."""
    widest = WIDEST[capability()]
    assert_right(bare(1, 17, 3, widest // 2, 16, 1, 8, 8))
    assert_right(bare(1, 17, 3, widest // 2 + 64, 16, 1, 8, 8))
    assert_right(bare(1, 17, 3, widest, 16, 1, 8, 8))
    with pytest.raises(RuntimeError, match="rows are too wide"):
        run(bare(1, 17, 3, widest + 1, 16, 1, 8, 8))


@pytest.mark.parametrize("query_dim, batch", [(320, 70), (75, 3)])
def test_a_sample_alone_has_the_same_bits(query_dim: int, batch: int) -> None:
    """Also where there are so many blocks that warps no longer share columns."""
    call = full(batch, 20, 36, query_dim, 40, 8, 32, 40)
    together = run(call)
    for index in (0, batch - 1):
        alone = dict(call)
        for name in ("query", "context", "key_padding_mask", "residual"):
            alone[name] = call[name][index : index + 1]
        assert torch.equal(run(alone)[0], together[index])


def test_wide_blocks() -> None:
    assert_right(full(70, 20, 36, 48, 40, 8, 32, 40))


@pytest.mark.parametrize("layout", ["transposed", "offset", "reversed_last", "repeated"])
def test_any_strides(layout: str) -> None:
    call = full(2, 9, 7, 24, 16, 2, 8, 24)
    viewed = dict(call)
    for name, value in call.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            viewed[name] = relayout(value, layout)
            call[name] = viewed[name].contiguous()
    assert torch.equal(run(viewed), run(call))


def test_no_memory_is_left_unwritten() -> None:
    call = full(2, 20, 36, 40, 33, 2, 24, 24)
    expected = run(call)
    torch.use_deterministic_algorithms(True)  # fills fresh tensors with NaN
    try:
        actual = run(call)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(actual, expected)


@pytest.mark.skipif(cuda.emulated is None, reason="runs in the emulator")
@pytest.mark.parametrize("query_dim", [72, 75])
def test_every_order_gives_the_same_bits(query_dim: int) -> None:
    call = full(2, 33, 36, query_dim, 40, 2, 24, 40)
    set_order = ctypes.CDLL(str(cuda.emulated)).ff_emulate_options
    results = []
    for order in itertools.product((0, 1), repeat=3):
        set_order(*order)
        results.append(run(call))
    assert all(torch.equal(result, results[0]) for result in results)


BAD: dict[str, Any] = {
    "query": values(2, 9, 25),
    "context": values(3, 7, 16),
    "key": values(2, 2, 7, 8),
    "value": values(2, 2, 7, 8),
    "q_weight": values(16, 24, dtype=torch.bfloat16),
    "q_bias": values(15),
    "kv_weight": values(31, 16),
    "kv_bias": values(32, 1),
    "out_weight": values(16, 15),
    "out_bias": values(16, dtype=torch.float32),
    "attn_mask": values(2, 2, 9, 8),
    "key_padding_mask": torch.zeros(2, 8, dtype=torch.bool, device=DEVICE),
    "residual": values(2, 8, 16),
    "query_norm_weight": values(23),
    "query_norm_bias": values(25),
    "context_norm_weight": values(1, 16),
    "context_norm_bias": values(17),
    "num_heads": 3,
    "scale": float("inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call = full(2, 9, 7, 24, 16, 2, 8, 16)
    run(call)
    call[name] = BAD[name]
    with pytest.raises(RuntimeError, match="fastfusion: "):
        run(call)


def test_other_bad_input() -> None:
    for changes in (
        {"num_heads": 0}, {"query": values(9, 24)}, {"q_weight": values(16)},
        {"context": values(2, 7, 0), "kv_weight": values(32, 0)},
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="fastfusion: "):
            run(bare(2, 9, 7, 24, 16, 2, 8, 16) | changes)
    with pytest.raises(RuntimeError, match="head dims above 256"):
        run(bare(2, 9, 7, 24, 16, 1, 257, 16))
    with pytest.raises(RuntimeError, match="no kernel"):
        run({n: v.float() if isinstance(v, Tensor) else v
             for n, v in bare(2, 9, 7, 24, 16, 2, 8, 16).items()})  # fmt: skip


def test_how_torch_sees_it() -> None:
    call = full(2, 9, 7, 24, 16, 2, 8, 16)
    torch.library.opcheck(op(), tuple(call.values()))


# ---- CrossAttention


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """An entry for each call of the op that a module makes."""
    calls: list[int] = []
    kernels = layer._CUDA.op
    monkeypatch.setattr(layer._CUDA, "op", lambda call, lse: calls.append(1) or kernels(call, lse))
    yield calls


def module(dtype: torch.dtype = torch.float16, **options: Any) -> Any:
    made = ff.nn.CrossAttention(24, 16, 2, **options)
    for seed, parameter in enumerate(made.parameters()):
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1.0
        parameter.data = values(*parameter.shape, dtype=torch.float32, seed=seed) * scale
    return made.to(DEVICE, dtype).eval()


def tokens(dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    return values(3, 9, 24, dtype=dtype), values(3, 5, 16, dtype=dtype, seed=1)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"head_dim": 6, "out_dim": 7}], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_module(dtype: torch.dtype, options: Any, blocks: list[int]) -> None:
    need(dtype)
    layer = module(dtype, **options)
    padding = hidden(3, 5)
    masks = (None, hidden(9, 5), values(3, 1, 9, 5, dtype=dtype))
    for mask in masks:
        inputs = tokens(dtype)
        bias = mask if mask is None or mask.dtype == torch.bool else mask.double()
        with torch.no_grad():
            with ff.use_backend("cuda"):
                actual = layer(*inputs, padding, mask)
            with ff.use_backend("reference"):
                plain = layer(*inputs, padding, mask)
                exact = layer.double()(*(t.double() for t in inputs), padding, bias)
        layer.to(dtype)
        assert_accurate(*(t.flatten(1) for t in (actual, exact, plain)))
    assert len(blocks) == len(masks)


def test_weights_that_change(blocks: list[int]) -> None:
    """They are read where they are, so that no way to write them goes unnoticed."""
    layer, inputs = module(), tokens()

    def assert_current() -> None:
        with ff.use_backend("cuda"):
            actual = layer(*inputs)
        with ff.use_backend("reference"):
            expected = layer(*inputs)
        torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)

    with torch.no_grad():
        assert_current()
        layer.q_proj.weight.mul_(-2.0)
        assert_current()
        layer.kv_proj.weight.data.copy_(values(48, 16, seed=30))
        assert_current()
        layer.out_proj.weight.data = values(24, 24, seed=31)
        assert_current()
    assert len(blocks) == 4


def test_what_the_block_leaves_to_the_modules(blocks: list[int]) -> None:
    query, context = tokens()
    with ff.use_backend("cuda"):
        with torch.no_grad():
            module(torch.float32)(query.float(), context.float())
            module()(query, context, need_weights=True)
            layer = module()
            expected = layer(query, context, need_weights=True)[0]
            kept = layer(query, layer.project_context(context))
            torch.testing.assert_close(kept, expected, atol=2e-2, rtol=2e-2)
            hooked = module()
            hooked.out_proj.register_forward_hook(lambda *_: None)
            hooked(query, context)
        bias = torch.zeros(9, 5, dtype=torch.float16, device=DEVICE, requires_grad=True)
        with pytest.raises(ff.BackendUnavailableError, match="gradients"):
            module().requires_grad_(False)(query, context, attn_mask=bias)
    with torch.no_grad(), ff.use_backend("reference"):
        module()(query, context)
    assert not blocks


def test_long_sequences_are_left_to_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton is not what runs; by name the kernels take any length."""
    monkeypatch.setattr(cuda, "emulates", lambda call: False)
    monkeypatch.setattr(layer, "_triton_refuses", lambda call: ("it is not here",))
    monkeypatch.setattr(layer.triton, "interprets", lambda call: True)

    def chosen(q_len: int, kv_len: int, backend: str | None = None) -> str:
        call = bare(1, q_len, kv_len, 24, 16, 2, 8, 16)
        return layer.OP.select(backend, layer.Call(**call)).backend

    most = layer.MAX_LENGTH
    with torch.no_grad():
        assert chosen(most, most) == "cuda"
        longer = [chosen(most + 1, 5), chosen(5, most + 1)]
        assert "cuda" not in longer
        assert chosen(most + 1, 5, "cuda") == "cuda"


def test_compiled_module(blocks: list[int]) -> None:
    torch.set_default_device(None)  # which dynamo cannot follow through Tensor.unflatten
    try:
        compiled = torch.compile(module(), fullgraph=True, backend="eager")
        with torch.no_grad(), ff.use_backend("cuda"):
            out = compiled(*tokens())
        assert out.shape == (3, 9, 24) and not blocks
    finally:
        torch.set_default_device(None if DEVICE == "cpu" else DEVICE)
