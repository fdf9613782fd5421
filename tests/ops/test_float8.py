"""Keys and values of 8-bit floats in attention: what they mean, CUDA's kernels, and refusals."""

import ctypes
import itertools
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from suite import DEVICE
from torch import Tensor
from torch.testing import assert_close

import fastfusion as ff
from fastfusion.backends import cuda
from fastfusion.ops import scaled_dot_product_attention as op

attention = ff.scaled_dot_product_attention
FLOAT8 = torch.float8_e4m3fn
HALF = (torch.float16, torch.bfloat16)


def _refusal() -> str | None:
    if cuda.unavailable() is not None:
        return f"no CUDA kernels: {cuda.unavailable()}"
    return (
        ", ".join(cuda.refuses_float8(torch.empty(1, dtype=torch.float16, device=DEVICE))) or None
    )


def operands(
    q_len: int, kv_len: int, dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (2, 4, q_len, dim), (2, 2, kv_len, dim), (2, 2, kv_len, value_dim)
    query, key, value = (torch.randn(size, device=DEVICE) for size in sizes)
    return query.to(dtype), key.to(FLOAT8), value.to(FLOAT8)


def scales() -> dict[str, Tensor]:
    """Of each entry and head, and of each head."""
    return {
        "key_scale": torch.tensor([[0.5, 1.7], [0.9, 0.1]], device=DEVICE),
        "value_scale": torch.tensor([3.0, 0.01], device=DEVICE),
    }


def meant(tensor: Tensor, scale: Tensor | None) -> Tensor:
    """The numbers themselves, in float64."""
    return tensor.double() * (1 if scale is None else scale.double()[..., None, None])


needs_kernels = pytest.mark.skipif(_refusal() is not None, reason=_refusal() or "")
needs_emulator = pytest.mark.skipif(cuda.emulated is None, reason="runs in the emulator")


class TestMeaning:
    """Of the reference, which runs everywhere."""

    @pytest.mark.parametrize("given", ["none", "key_scale", "value_scale", "both"])
    def test_numbers_times_their_scales(self, given: str) -> None:
        query, key, value = operands(5, 7, 8, 6, torch.float64)
        some = {n: s for n, s in scales().items() if given in (n, "both")}
        wide = meant(key, some.get("key_scale")), meant(value, some.get("value_scale"))
        call: dict[str, Any] = {"enable_gqa": True, "is_causal": True, "return_lse": True}
        exact = attention(query, *wide, **call)
        found = attention(
            query, key, value, enable_gqa=True, is_causal=True, return_lse=True, **some
        )
        assert_close(found, exact, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("leading", [(), (2,), (3, 2), (2, 3, 2)])
    def test_any_rank(self, leading: tuple[int, ...]) -> None:
        query, key, value = (torch.randn(*leading, n, 8) for n in (3, 5, 5))
        key, value = key.to(FLOAT8), value.to(FLOAT8)
        scale = torch.rand(leading) + 0.5
        out = attention(query.bfloat16(), key, value, key_scale=scale, value_scale=scale)
        exact = attention(query.bfloat16().double(), meant(key, scale), meant(value, scale))
        assert out.dtype == torch.bfloat16 and out.shape == exact.shape
        assert_close(out.double(), exact, rtol=8e-3, atol=1e-2)

    def test_autocast_leaves_them(self) -> None:
        query, key, value = operands(3, 5, 8, 8, torch.float32)
        with torch.autocast(DEVICE, torch.bfloat16):
            out = attention(query, key, value, enable_gqa=True, backend="reference")
        assert torch.equal(out, attention(query.bfloat16(), key, value, enable_gqa=True,
                                          backend="reference"))  # fmt: skip

    def test_compiles_and_maps(self) -> None:
        query, key, value = operands(3, 5, 8, 8, torch.float32)

        def run(*given: Tensor) -> Any:
            return attention(*given[:3], enable_gqa=True, key_scale=given[3], backend="reference")

        scale = torch.rand(2, 2, device=DEVICE)
        expected = run(query, key, value, scale)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert_close(compiled(query, key, value, scale), expected)
        mapped = torch.vmap(lambda q, s: run(q, key, value, s))(query[None], scale[None])
        assert_close(mapped[0], expected)

    def test_a_query_has_its_gradient(self) -> None:
        query, key, value = operands(3, 5, 8, 8, torch.float64)
        first, second = (query.clone().requires_grad_() for _ in range(2))
        attention(first, key, value, enable_gqa=True, **scales()).sum().backward()
        wide = (meant(t, s) for t, s in zip((key, value), scales().values(), strict=True))
        attention(second, *wide, enable_gqa=True).sum().backward()
        assert_close(first.grad, second.grad)


@needs_kernels
class TestKernels:
    @pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
    @pytest.mark.parametrize(
        ("lengths", "dims"),
        [
            ((20, 36), (64, 64)),
            ((1, 5), (1, 3)),
            ((33, 577), (64, 64)),
            ((5, 700), (40, 24)),
            ((70, 130), (64, 60)),
            ((70, 90), (200, 256)),
            ((20, 150), (128, 100)),
            ((520, 70), (96, 96)),
        ],
    )
    @pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
    def test_accuracy(
        self, lengths: tuple[int, int], dims: tuple[int, int], masked: bool, dtype: torch.dtype
    ) -> None:
        query, key, value = operands(*lengths, *dims, dtype)
        call: dict[str, Any] = {"enable_gqa": True, **scales()}
        if masked:
            hidden = torch.rand(2, lengths[1], device=DEVICE) < 0.3
            call |= {"key_padding_mask": hidden, "attn_mask": torch.randn(*lengths, device=DEVICE)}
            call |= {"softcap": 5.0, "sinks": torch.randn(4, device=DEVICE)}
        exact = attention(query.double(), key, value, return_lse=True, **call)
        wide = (meant(t, call[f"{n}_scale"]).to(dtype) for n, t in (("key", key), ("value", value)))
        rest = {k: v for k, v in call.items() if k not in scales()}
        plain = attention(query, *wide, backend="reference", return_lse=True, **rest)
        found = attention(query, key, value, backend="cuda", return_lse=True, **call)
        for mine, right, usual in zip(found, exact, plain, strict=True):
            assert mine.dtype == usual.dtype
            assert_accurate(*(t.reshape(8, -1) for t in (mine, right, usual)))

    @pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
    def test_every_number(self, dtype: torch.dtype) -> None:
        """One key has all the weight: outputs are the 256 values of a byte."""
        codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(FLOAT8)[None, None, None]
        query = torch.ones(1, 1, 2, 8, dtype=dtype, device=DEVICE)
        key = torch.ones(1, 1, 1, 8, device=DEVICE).to(FLOAT8)
        out = attention(query, key, codes, backend="cuda")[0, 0, 1]
        assert torch.equal(out.nan_to_num(1e4), codes[0, 0, 0].to(dtype).nan_to_num(1e4))

    @pytest.mark.parametrize("lengths", [(20, 36), (3, 200), (70, 130)])
    def test_what_is_hidden_is_not_read(self, lengths: tuple[int, int]) -> None:
        query, key, value = operands(*lengths, 24, 16, torch.float16)
        padding = torch.rand(2, lengths[1], device=DEVICE) < 0.4
        call = {"enable_gqa": True, "key_padding_mask": padding, "backend": "cuda", **scales()}
        expected = attention(query, key, value, **call)
        for tensor in (key, value):
            tensor.view(torch.uint8)[padding[:, None].expand(2, 2, -1)] = 0x7F
        assert torch.equal(attention(query, key, value, **call), expected)

    def test_strides(self) -> None:
        """Heads inside, rows that are not aligned, and a last stride that is not 1."""
        query, key, value = operands(20, 90, 24, 24, torch.float16)
        expected = attention(query, key, value, enable_gqa=True, backend="cuda", **scales())
        for change in (
            lambda t: t.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2).view(FLOAT8),
            lambda t: torch.nn.functional.pad(t.view(torch.uint8), (1, 2))[..., 1:-2].view(FLOAT8),
            lambda t: t.view(torch.uint8).mT.contiguous().mT.view(FLOAT8),
        ):
            given = change(key), change(value)
            out = attention(query, *given, enable_gqa=True, backend="cuda", **scales())
            assert torch.equal(out, expected)

    def test_opcheck(self) -> None:
        for kind in ("out", "forward"):
            call = op.OP.call(
                *operands(5, 7, 8, 8, torch.float16), enable_gqa=True, **scales(), is_causal=True
            )
            packet = getattr(torch.ops.fastfusion, f"cuda_attention_{kind}")
            # Torch's test of the schema multiplies the inputs, for which it has no 8-bit floats.
            tests = ("test_faketensor", "test_autograd_registration")
            torch.library.opcheck(packet.default, tuple(call), test_utils=tests)

    def test_compiled(self) -> None:
        query, key, value = operands(5, 7, 8, 8, torch.float16)

        def run(query: Tensor) -> Any:
            return attention(query, key, value, enable_gqa=True, backend="cuda", **scales())

        with torch.no_grad():
            compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(query), run(query))

    @needs_emulator
    def test_no_order_changes_a_bit(self) -> None:
        library = ctypes.CDLL(str(cuda.emulated))
        for lengths in ((20, 36), (5, 700), (33, 577), (70, 130)):
            query, key, value = operands(*lengths, 40, 24, torch.bfloat16)
            first = None
            for order in itertools.product((0, 1), repeat=3):
                library.ff_emulate_options(*order)
                out = attention(query, key, value, enable_gqa=True, backend="cuda", **scales())
                first = out if first is None else first
                assert torch.equal(out, first), order

    def test_bad_calls_of_the_op_itself(self) -> None:
        """What memory safety depends on is checked beside the kernels."""
        query, key, value = operands(5, 7, 8, 8, torch.float16)
        run = torch.ops.fastfusion.cuda_attention_out.default
        good = op.OP.call(query, key, value, enable_gqa=True, **scales())
        for change in (
            {"key": key.half()}, {"value": value.to(torch.float16)}, {"query": query.float()},
            {"key_scale": torch.ones(2, 4)}, {"value_scale": torch.ones(2, 2).double()},
            {"key": key.half(), "value": value.half()},
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="fastfusion"):
                run(*good._replace(**change))


class TestRefusals:
    def test_other_ops(self) -> None:
        query, key, value = (t.cpu() for t in operands(3, 5, 8, 8, torch.float16))
        key, value = (t.repeat_interleave(2, 1) for t in (key, value))
        for run in (
            lambda: ff.attention_statistics(query, key),
            lambda: ff.bidirectional_attention(query, key, value, query),
        ):
            with pytest.raises(
                TypeError, match="key must be float16, bfloat16, float32 or float64"
            ):
                run()

    @pytest.mark.parametrize("backend", ["cpu", "triton"])
    def test_backends_without_them(self, backend: str) -> None:
        given = operands(3, 5, 8, 8, torch.bfloat16)
        with pytest.raises(ff.BackendUnavailableError, match="8 bits are left to the CUDA kernels"):
            attention(*given, enable_gqa=True, backend=backend)

    @needs_kernels
    def test_gpus_before_ada(self, monkeypatch: pytest.MonkeyPatch) -> None:
        query, key, value = operands(3, 5, 8, 8, torch.float16)
        monkeypatch.setitem(cuda._capabilities, query.get_device(), 86)
        with pytest.raises(ff.BackendUnavailableError, match="compute capability 8.9"):
            attention(query, key, value, enable_gqa=True, backend="cuda")
        attention(query, key, value, enable_gqa=True)

    @needs_kernels
    def test_queries_of_32_bits(self) -> None:
        query, key, value = operands(3, 5, 8, 8, torch.float32)
        with pytest.raises(ff.BackendUnavailableError, match="queries of float32"):
            attention(query, key, value, enable_gqa=True, backend="cuda")

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"value": "half"}, TypeError, "value torch.float16"),
            ({"key": "half"}, TypeError, "key torch.float16"),
            ({"query": FLOAT8}, TypeError, "query must be float16"),
            ({"key_scale": 2.0}, TypeError, "key_scale must be a Tensor or None, got float"),
            ({"key_scale": torch.ones(2).double()}, TypeError, "key_scale must be float32"),
            ({"value_scale": torch.ones(3)}, ValueError, r"value_scale must broadcast.* \(3,\)"),
            ({"value_scale": torch.ones(2, 2, 1)}, ValueError, "value_scale must broadcast"),
            ({"key_scale": torch.ones(2, device="meta")}, ValueError, "key_scale must be on"),
            ({"key_scale": torch.ones(2, requires_grad=True)}, ValueError, "key_scale requires"),
            ({"key": "gradient"}, ValueError, "key requires a gradient"),
            ({"key": "half", "value": "half"}, ValueError, "key_scale needs key and value of"),
        ],
    )
    def test_bad_input(self, change: dict[str, Any], error: type[Exception], words: str) -> None:
        query, key, value = (t.cpu() for t in operands(3, 5, 8, 8, torch.float16))
        call = {"query": query, "key": key, "value": value, "key_scale": torch.ones(2)}
        call["value_scale"] = torch.ones(2, 2)
        for name, new in change.items():
            old = call[name]
            if isinstance(new, torch.dtype):
                new = old.to(new)
            elif new == "half":
                new = old.half()
            elif isinstance(new, str):
                new = old.clone().requires_grad_()
            call[name] = new
        with pytest.raises(error, match=words):
            attention(**call, enable_gqa=True)
