"""decoder_layer: against its definition, its ops one by one, and calls without a cache."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from layer_calls import flat, leaves_of, nested
from suite import ISAS, needs_native
from torch import Tensor

import fastfusion as ff
from fastfusion.ops import AttentionWeights, Norm
from fastfusion.ops.decoder_layer import OP, run_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES: list[dict[str, Any]] = [
    {"length": 1, "dim": 1, "heads": 1, "ffn": 1},
    {"batch": 2, "length": 5, "dim": 12, "heads": 3, "ffn": 7, "memory": 4},
    {"batch": 3, "length": 20, "dim": 64, "heads": 4, "ffn": 150, "activation": "relu",
     "memory": 37, "memory_dim": 40},
    {"length": 37, "dim": 48, "heads": 1, "ffn": 96, "activation": "quick_gelu", "memory": 21,
     "separate": True, "projected": True},
    {"batch": 2, "length": 1, "dim": 64, "heads": 4, "ffn": 128, "memory": 30, "projected": True,
     "past": 64, "capacity": 70, "is_causal": True},
    {"batch": 2, "length": 7, "dim": 40, "heads": 2, "ffn": 33, "past": 10, "separate": True},
]  # fmt: skip


def of_a_leaf(name: str) -> bool:
    return not name.startswith("cache")


def own(call: dict[str, Any]) -> dict[str, Any]:
    """The call with a cache of its own, to which it may write."""
    if call.get("cache") is None:
        return call
    return call | {"cache": tuple(t.clone() for t in call["cache"])}


def run(call: dict[str, Any], **options: Any) -> Tensor:
    return ff.decoder_layer(**own(call), **options)


def reference(call: dict[str, Any]) -> Tensor:
    result: Tensor = run_reference(OP.call(**own(call)), False)
    return result


def in_double(call: dict[str, Any]) -> dict[str, Any]:
    return nested(
        {
            k: v.double()
            if isinstance(v, Tensor) and v.is_floating_point() and not k.endswith("_scale")
            else v
            for k, v in flat(call).items()
        }
    )


def packed(weights: Any, names: tuple[str, ...]) -> Any:
    """The weights as 8-bit integers."""
    for name in names:
        weight = getattr(weights, f"{name}_weight")
        if weight is not None:
            parts = 3 if name == "in_proj" and weight.shape[0] > weight.shape[1] else 1
            integers, scale = ff.ops.pack_int8(weight.float(), parts)
            weights = weights._replace(**{f"{name}_weight": integers, f"{name}_scale": scale})
    return weights


def in_int8(call: dict[str, Any]) -> dict[str, Any]:
    names = ("in_proj", "k_proj", "v_proj", "out_proj")
    changed = {n: packed(call[n], names) for n in ("self_attn", "cross_attn") if n in call}
    feed = packed(call["feed_forward"], ("linear1", "linear2"))
    return call | changed | {"feed_forward": feed}


def in_bfloat16(call: dict[str, Any]) -> dict[str, Any]:
    """The call with weights of bfloat16."""
    changed = {}
    for name in ("self_attn", "cross_attn", "feed_forward"):
        if name in call:
            weights = {
                n: w.bfloat16()
                for n, w in call[name]._asdict().items()
                if n.endswith("weight") and w is not None
            }
            changed[name] = call[name]._replace(**weights)
    return call | changed


def with_narrow_keys(call: dict[str, Any]) -> dict[str, Any]:
    """The call with keys and values of bfloat16, where it is given any."""
    given = {n: call[n] for n in ("memory", "cache") if isinstance(call.get(n), tuple)}
    return call | {name: tuple(t.bfloat16() for t in pair) for name, pair in given.items()}


def narrow(call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The call, of float32, with each kind of narrow weights, and of keys."""
    for change in (in_int8, in_bfloat16):
        yield change(call)
        yield with_narrow_keys(change(call))
    yield with_narrow_keys(call)


def by_ops(call: dict[str, Any]) -> Tensor:
    """The layer by the ops that it is made of."""
    c = OP.call(**own(call))
    first = c.norm_first

    def linear(name: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, bias, scale = (getattr(c, f"{name}_{s}") for s in ("weight", "bias", "scale"))
        activation = call["activation"] if name == "linear1" else None
        return ff.linear(
            x, weight, bias, weight_scale=scale, activation=activation, residual=residual,
            backend="cpu",
        )  # fmt: skip

    def norm(name: str, x: Tensor, wanted: bool) -> Tensor:
        weights = getattr(c, f"{name}_weight"), getattr(c, f"{name}_bias")
        return ff.norm(x, *weights, backend="cpu") if wanted else x

    def split(x: Tensor, parts: int) -> list[Tensor]:
        return [t.transpose(1, 2) for t in x.unflatten(-1, (parts, c.num_heads, -1)).unbind(2)]

    def attend(
        names: list[str], q: Tensor, k: Tensor, v: Tensor, mask: Any, padding: Any, causal: bool
    ) -> Tensor:
        weights = {getattr(c, f"{name}_weight").dtype for name in names}
        if k.dtype == torch.float32 and names and weights <= {torch.bfloat16, torch.uint8}:
            k, v = k.bfloat16(), v.bfloat16()
        out = ff.scaled_dot_product_attention(
            q.to(k.dtype), k, v, mask, is_causal=causal, causal_alignment="bottom_right",
            key_padding_mask=padding, backend="cpu",
        )  # fmt: skip
        return out.to(q.dtype).transpose(1, 2).flatten(2)

    names = ["self_q"] if c.self_k_weight is None else ["self_q", "self_k", "self_v"]
    scored = norm("norm1", c.input, first)
    q, k, v = split(torch.cat([linear(name, scored) for name in names], -1), 3)
    if c.key_cache is not None:
        names = []
        k, v = (
            torch.cat([old[:, :, : c.past_length], new.to(old.dtype)], 2)
            for old, new in ((c.key_cache, k), (c.value_cache, v))
        )
    out = attend(names, q, k, v, c.attn_mask, c.key_padding_mask, c.is_causal)
    y = norm("norm1", linear("self_out", out, c.input), not first)
    if c.has_memory:
        (q,) = split(linear("cross_q", norm("norm2", y, first)), 1)
        k, v, names = c.memory_key, c.memory_value, []
        if c.memory is not None:
            names = ["cross_q", "cross_k", "cross_v"]
            k, v = (split(linear(name, c.memory), 1)[0] for name in names[1:])
        out = attend(names, q, k, v, c.memory_mask, c.memory_padding_mask, False)
        y = norm("norm2", linear("cross_out", out, y), not first)
    y = linear("linear2", linear("linear1", norm("norm3", y, first)), y)
    return norm("norm3", y, not first)


def masks(call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The call with each kind of mask."""
    batch, length, _ = call["input"].shape
    total, heads = call.get("past_length", 0) + length, call["num_heads"]
    generator = torch.Generator().manual_seed(1)

    def hidden(count: int) -> Tensor:
        return torch.rand(batch, count, generator=generator) < 0.4

    def bias(count: int) -> Tensor:
        numbers = torch.randn(batch, heads, length, count, generator=generator)
        return numbers.to(call["input"].dtype)

    some = torch.rand(length, total, generator=generator) < 0.7
    yield call
    yield call | {"is_causal": True}
    yield call | {"key_padding_mask": hidden(total), "attn_mask": some}
    yield call | {"attn_mask": bias(total), "key_padding_mask": hidden(total)}
    if "memory" in call:
        memory = call["memory"]
        asked = memory[0].shape[2] if isinstance(memory, tuple) else memory.shape[1]
        yield call | {"memory_padding_mask": hidden(asked)}
        yield call | {"memory_mask": bias(asked), "memory_padding_mask": hidden(asked)}


@needs_native
class TestKernel:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_accurate(self, isa: str, shape: Any, dtype: torch.dtype) -> None:
        for norm_first in (False, True):
            call = OP.inputs(shape | {"norm_first": norm_first}, dtype)
            for given in masks(call):
                result = run(given, backend="cpu")
                assert result.dtype == dtype and result.is_contiguous()
                exact, formula = reference(in_double(given)), reference(given)
                assert_accurate(*(t.reshape(1, -1) for t in (result, exact, formula)))

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_accurate_with_narrow_weights_and_keys(self, isa: str, shape: Any) -> None:
        """Against the layer whose attention and activations round nowhere, but as 8 bits do."""
        for norm_first in (False, True):
            for call in narrow(OP.inputs(shape | {"norm_first": norm_first}, torch.float32)):
                for given in masks(call):
                    result = run(given, backend="cpu")
                    exact, formula = reference(in_double(given)), reference(given)
                    assert_accurate(*(t.reshape(1, -1) for t in (result, exact, formula)))

    @pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
    def test_bits_of_its_ops(self, isa: str, shape: Any) -> None:
        for dtype, norm_first in itertools.product(DTYPES, (False, True)):
            call = OP.inputs(shape | {"norm_first": norm_first}, dtype)
            changed = narrow(call) if dtype == torch.float32 else [in_int8(call)]
            for given in itertools.chain(masks(call), *map(masks, changed)):
                assert torch.equal(run(given, backend="cpu"), by_ops(given))

    @pytest.mark.parametrize("norm_first", [False, True])
    def test_token_by_token(self, isa: str, norm_first: bool) -> None:
        """A cached step computes what the whole call does, whatever it is cut into."""
        shape = {"batch": 2, "length": 9, "dim": 48, "heads": 3, "ffn": 60, "memory": 11}
        for dtype, change in itertools.product(DTYPES[:2], (dict, in_int8)):
            call = change(OP.inputs(shape | {"norm_first": norm_first, "is_causal": True}, dtype))
            whole = run(call, backend="cpu")
            exact = reference(in_double(call)) if change is dict else None
            kept = torch.bfloat16 if change is in_int8 else dtype
            for sizes in ((1,) * 9, (4, 1, 4), (9,)):
                cache = tuple(torch.full((2, 3, 12, 16), torch.nan, dtype=kept) for _ in range(2))
                past, steps = 0, []
                for tokens in call["input"].split(sizes, 1):
                    step = call | {"input": tokens, "cache": cache, "past_length": past}
                    steps.append(ff.decoder_layer(**step, backend="cpu"))
                    past += tokens.shape[1]
                together = torch.cat(steps, 1)
                if exact is not None:
                    assert_accurate(*(t.reshape(1, -1) for t in (together, exact, whole)))
                elif sizes == (9,):
                    assert torch.equal(together, whole)
                assert all(t[:, :, 9:].isnan().all() for t in cache)
                assert not any(t[:, :, :9].isnan().any() for t in cache)

    def test_cache_of_any_strides(self, isa: str) -> None:
        for dtype in DTYPES:
            call = OP.inputs(SHAPES[5], dtype)
            expected = own(call)
            result = ff.decoder_layer(**expected, backend="cpu")
            shape = call["cache"][0].shape
            for order in ((0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)):
                back = [order.index(i) for i in range(4)]
                sizes = [shape[i] for i in order]
                cache = tuple(torch.empty(sizes, dtype=dtype).permute(back) for _ in range(2))
                for to, given in zip(cache, call["cache"], strict=True):
                    to.copy_(given)
                strided = ff.decoder_layer(**call | {"cache": cache}, backend="cpu")
                assert torch.equal(strided, result)
                for ours, theirs in zip(cache, expected["cache"], strict=True):
                    assert torch.equal(ours, theirs)

    def test_bits_depend_on_nothing_but_the_sequence(self, isa: str) -> None:
        shape = {"batch": 9, "dim": 48, "heads": 2, "ffn": 200, "memory": 30}
        lengths = ((1, None), (20, None), (1, 60), (5, 20))
        for dtype, (length, past) in itertools.product((torch.float32, torch.bfloat16), lengths):
            full = shape | {"length": length} | ({} if past is None else {"past": past})
            for change in (dict, in_int8):
                call = change(OP.inputs(full, dtype))
                together = run(call, backend="cpu")
                threads = torch.get_num_threads()
                torch.set_num_threads(3)
                try:
                    assert torch.equal(run(call, backend="cpu"), together)
                finally:
                    torch.set_num_threads(threads)
                for b in (0, 4, 8):
                    alone = call | {n: call[n][b : b + 1] for n in ("input", "memory")}
                    if past is not None:
                        alone["cache"] = tuple(t[b : b + 1] for t in call["cache"])
                    assert torch.equal(run(alone, backend="cpu")[0], together[b])

    def test_projected_memory(self, isa: str) -> None:
        for shape, change in itertools.product(SHAPES[1:3], (dict, in_int8, in_bfloat16)):
            call = change(OP.inputs(shape, torch.float32))
            weights, heads = call["cross_attn"], call["num_heads"]
            kept = ff.ops.project_memory(call["memory"], weights, heads, backend="cpu")
            assert {t.dtype for t in kept} == {torch.float32 if change is dict else torch.bfloat16}
            result = run(call, backend="cpu")
            assert torch.equal(run(call | {"memory": kept}, backend="cpu"), result)
            (weight, bias, scale), *_ = weights.each()
            query = AttentionWeights(weight, bias, weights.out_proj_weight, weights.out_proj_bias)
            query = query._replace(in_proj_scale=scale, out_proj_scale=weights.out_proj_scale)
            alone = call | {"memory": kept, "cross_attn": query}
            assert torch.equal(run(alone, backend="cpu"), result)

    def test_empty(self, isa: str) -> None:
        call = OP.inputs(SHAPES[2], torch.float32)
        for cut in (slice(0), slice(None)):
            nothing = {"input": call["input"][cut, : 0 if cut == slice(None) else 20]}
            nothing["memory"] = call["memory"][cut]
            result = run(call | nothing, backend="cpu")
            assert result.shape == nothing["input"].shape
        nothing = {"memory": call["memory"][:, :0]}
        torch.testing.assert_close(run(call | nothing, backend="cpu"), reference(call | nothing))


@needs_native
class TestTorch:
    def test_opcheck(self) -> None:
        shape = {"length": 5, "dim": 8, "heads": 2, "ffn": 12, "memory": 3}
        call = OP.inputs(shape, torch.float32)
        for given in (call, in_int8(call), *masks(call)):
            op = torch.ops.fastfusion.decoder_layer_forward.default
            torch.library.opcheck(op, tuple(OP.call(**given)))
        for more in ({"past": 0, "capacity": 9}, {"past": 4, "projected": True}):
            op = torch.ops.fastfusion.decoder_layer_cached.default
            torch.library.opcheck(op, tuple(OP.call(**OP.inputs(shape | more, torch.float32))))

    @pytest.mark.parametrize("cached", [False, True])
    def test_compile_and_export(self, cached: bool) -> None:
        shape = {"length": 20, "dim": 16, "heads": 2, "ffn": 24, "memory": 9}
        call = OP.inputs(shape | ({"past": 3} if cached else {}), torch.float32)
        tensors = {n: t for n, t in flat(call).items() if isinstance(t, Tensor)}
        others = {n: v for n, v in flat(call).items() if n not in tensors}
        names = list(tensors)

        class Module(torch.nn.Module):
            def forward(self, *given: Tensor) -> Tensor:
                return ff.decoder_layer(**nested(dict(zip(names, given, strict=True)) | others))

        theirs = own(call)
        expected = ff.decoder_layer(**theirs)
        compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            given = own(call)
            values = tuple(t for t in flat(given).values() if isinstance(t, Tensor))
            assert torch.equal(compiled(*values), expected)
            if cached:
                assert all(map(torch.equal, given["cache"], theirs["cache"]))
            program = torch.export.export(Module(), tuple(tensors.values()))
        op = "decoder_layer_cached" if cached else "decoder_layer_forward"
        assert f"fastfusion.{op}" in str(program.graph)
        given = own(call)
        values = tuple(t for t in flat(given).values() if isinstance(t, Tensor))
        assert torch.equal(program.module()(*values), expected)

    def test_gradients_and_vmap(self) -> None:
        shape = {"length": 6, "dim": 16, "heads": 2, "ffn": 24, "memory": 9}
        for more in ({}, {"past": 3}):
            call = OP.inputs(shape | more, torch.float64)
            given = flat(own(call))
            leaves = {k: t for k, t in leaves_of(given).items() if of_a_leaf(k)}
            for leaf in leaves.values():
                leaf.requires_grad_()
            assert ff.explain(ff.decoder_layer, **nested(given)).chosen == "reference"
            with pytest.raises(ff.BackendUnavailableError, match="gradients|float64"):
                ff.decoder_layer(**nested(given), backend="cpu")

            def loss(*values: Tensor, given: Any = given, names: Any = tuple(leaves)) -> Tensor:
                return run(nested(given | dict(zip(names, values, strict=True))))

            assert torch.autograd.gradcheck(loss, tuple(leaves.values()), fast_mode=True)
        call = OP.inputs(shape, torch.float32)
        batch = torch.stack([call["input"], -call["input"]])
        mapped = torch.vmap(lambda x: ff.decoder_layer(**call | {"input": x}))(batch)
        expected = ff.decoder_layer(**call | {"input": -call["input"]})
        torch.testing.assert_close(mapped[1], expected)

    def test_autocast(self) -> None:
        shape = {"length": 20, "dim": 16, "heads": 2, "ffn": 24, "memory": 9}
        call = OP.inputs(shape, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            result = ff.decoder_layer(**call)
        low = nested(
            {k: t.bfloat16() if isinstance(t, Tensor) else t for k, t in flat(call).items()}
        )
        assert torch.equal(result, ff.decoder_layer(**low))

    def test_flops(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        for shape in SHAPES:
            with FlopCounterMode(display=False) as counter:
                ff.decoder_layer(**OP.inputs(shape, torch.float32))
            assert counter.get_total_flops() == OP.cost(shape, torch.float32)[0]

    def test_explain(self) -> None:
        call = in_int8(OP.inputs(SHAPES[4], torch.float32))
        explained = ff.explain(ff.decoder_layer, **call)
        assert explained.chosen == "cpu" and "one call, packed 8-bit" in str(explained.path)


CALL = OP.inputs(
    {"batch": 2, "length": 5, "dim": 8, "heads": 2, "ffn": 12, "memory": 3, "past": 2},
    torch.float32,
)
X, OWN, CROSS, FEED = (CALL[n] for n in ("input", "self_attn", "cross_attn", "feed_forward"))
MEMORY, (KEYS, VALUES) = CALL["memory"], CALL["cache"]
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [1.0]}, TypeError, "input must be a Tensor"),
    ({"input": X[0]}, ValueError, r"input must be \(batch, length, width\), got input \(5, 8\)"),
    ({"num_heads": 3}, ValueError, "num_heads must divide the width"),
    ({"num_heads": 2.0}, TypeError, "num_heads must be an int"),
    ({"self_attn": tuple(OWN)}, TypeError, "self_attn must be fastfusion.ops.AttentionWeights"),
    ({"feed_forward": None}, TypeError, "feed_forward must be fastfusion.ops.FeedForwardWeights"),
    ({"norms": None}, TypeError, "norms must be a tuple of fastfusion.ops.Norm, got NoneType"),
    ({"norms": CALL["norms"][:2]}, ValueError, "norms must be 3, got 2"),
    ({"norms": (1, 2, 3)}, TypeError, r"norms\[0\] must be a fastfusion.ops.Norm"),
    ({"norms": (Norm(torch.ones(7)),) * 3}, ValueError, r"norms\[0\]: weight must be"),
    ({"memory": None}, ValueError, "memory and cross_attn must both be given"),
    ({"cross_attn": None}, ValueError, "memory and cross_attn must both be given"),
    ({"memory": MEMORY[:1]}, ValueError, "memory must have the batch size"),
    ({"memory": MEMORY.double()}, TypeError, "memory must have the dtype of input"),
    ({"memory": MEMORY[..., :6]}, ValueError, "cross_attn: k_proj_weight and v_proj_weight must"),
    ({"memory": (KEYS.half(), VALUES.half())}, TypeError, r"memory\[0\] must have the dtype of i"),
    ({"memory": (KEYS.bfloat16(), VALUES)}, TypeError, r"memory\[1\] must have the dtype of m"),
    ({"memory": (MEMORY,)}, TypeError, "memory must be a pair of keys and values"),
    ({"memory": (MEMORY, MEMORY)}, ValueError, r"the keys of memory must be \(2, 2, 'length', 4\)"),
    ({"memory": (KEYS, VALUES[:, :, :3])}, ValueError, "the values of memory must have the shape"),
    (
        {"self_attn": OWN._replace(in_proj_weight=torch.ones(23, 8), in_proj_bias=None)},
        ValueError,
        "self_attn: in_proj_weight must have 24 features, got 23",
    ),
    (
        {"self_attn": OWN._replace(k_proj_weight=torch.ones(8, 8))},
        ValueError,
        "self_attn: k_proj_weight and v_proj_weight must both be given",
    ),
    (
        {"cross_attn": CROSS._replace(v_proj_bias=torch.ones(8))},
        ValueError,
        "cross_attn: v_proj_bias must be None without v_proj_weight",
    ),
    (
        {"cross_attn": CROSS._replace(in_proj_weight=None)},
        TypeError,
        "cross_attn: in_proj: weight must be a Tensor",
    ),
    (
        {"cross_attn": CROSS._replace(out_proj_weight=torch.ones(8, 9))},
        ValueError,
        r"cross_attn: out_proj: weight must be \(features, width\)",
    ),
    (
        {"feed_forward": FEED._replace(linear2_weight=torch.ones(8, 11))},
        ValueError,
        "feed_forward: linear2: weight must be",
    ),
    ({"activation": "tanh"}, ValueError, "feed_forward: linear1: activation must be one of"),
    ({"norm_first": 1}, TypeError, "norm_first must be a bool"),
    ({"is_causal": None}, TypeError, "is_causal must be a bool"),
    ({"attn_mask": torch.ones(4, 7)}, ValueError, "attn_mask must broadcast"),
    ({"key_padding_mask": torch.ones(2, 7)}, TypeError, "key_padding_mask must be bool"),
    ({"key_padding_mask": torch.ones(2, 5) > 0}, ValueError, "key_padding_mask must"),
    ({"memory_mask": torch.ones(5, 4)}, ValueError, "memory_mask must broadcast"),
    ({"memory_padding_mask": torch.ones(2, 5) > 0}, ValueError, "memory_padding_mask must"),
    (
        {"memory": None, "cross_attn": None, "norms": CALL["norms"][:2],
         "memory_mask": torch.ones(5, 3)},
        ValueError,
        "memory_mask and memory_padding_mask must be None without a memory",
    ),
    ({"cache": KEYS}, TypeError, "cache must be a pair of keys and values"),
    ({"cache": (KEYS[:, :, :6], VALUES[:, :, :6])}, ValueError, "cache must have room for 7 tok"),
    ({"cache": (KEYS, VALUES.double())}, TypeError, r"cache\[1\] must have the dtype"),
    ({"cache": (KEYS.clone().requires_grad_(), VALUES)}, ValueError, "must not require a gradient"),
    ({"cache": (KEYS[:1].expand(KEYS.shape), VALUES)}, ValueError, "memory for every number"),
    ({"cache": None}, ValueError, "past_length must be 0 without a cache, got 2"),
    ({"past_length": -1}, ValueError, "past_length must not be negative, got -1"),
    ({"past_length": 1.0}, TypeError, "past_length must be an int"),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "match"), BAD, ids=map(str, range(len(BAD))))
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input(change: dict[str, Any], error: Any, match: str, backend: str) -> None:
    if backend == "cpu" and not ISAS:
        pytest.skip("without the compiled part there is no kernel")
    before = [t.clone() for t in CALL["cache"]]
    with pytest.raises(error, match=match):
        ff.decoder_layer(**{**CALL, "backend": backend, **change})
    assert all(map(torch.equal, CALL["cache"], before))


def test_project_memory_refuses() -> None:
    for memory, weights, heads, error, match in (
        (MEMORY, None, 2, TypeError, "cross_attn must be AttentionWeights"),
        (MEMORY[0], CROSS, 2, ValueError, r"memory must be \(batch, memory_length"),
        (MEMORY, CROSS, 3, ValueError, "num_heads divide the width, got 3"),
        (MEMORY.double(), CROSS, 2, TypeError, "weight must have the dtype of input"),
    ):
        with pytest.raises(error, match=match):
            ff.ops.project_memory(memory, weights, heads)
