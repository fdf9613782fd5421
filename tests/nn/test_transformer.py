"""ff.nn.Transformer* against torch's: outputs, gradients, seeds, checkpoints, hooks."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from nn_cases import HEADS, WIDTH, assert_same, assert_same_call, bias, hidden, option_id, twin
from torch import Tensor

import fastfusion as ff

BATCH, LENGTH, MEMORY = 2, 4, 5
NAMES = (
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerEncoder",
    "TransformerDecoderLayer",
    "TransformerDecoder",
    "Transformer",
)


def build(nn: Any, name: str, *, stack: dict[str, Any] | None = None, **options: Any) -> Any:
    """A module of `nn` of that name, two layers deep if it is a stack."""
    options = {"dim_feedforward": 12, "dropout": 0.0, **options}
    stack = stack or {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "enable_nested_tensor is True")
        if name == "Transformer":
            return nn.Transformer(
                WIDTH, HEADS, num_encoder_layers=2, num_decoder_layers=2, **options
            )
        if name == "MultiheadAttention":
            options.pop("dim_feedforward")
            return nn.MultiheadAttention(WIDTH, HEADS, **options)
        if name.endswith("Layer"):
            return getattr(nn, name)(WIDTH, HEADS, **options)
        return getattr(nn, name)(getattr(nn, name + "Layer")(WIDTH, HEADS, **options), 2, **stack)


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    ours, theirs = build(ff.nn, name, **options), build(torch.nn, name, **options)
    twin(ours, theirs)
    return ours, theirs


def sequence(module: Any, length: int, *, unbatched: bool = False, seed: int = 1) -> Tensor:
    parameter = next(module.parameters())
    generator = torch.Generator().manual_seed(seed)
    batch_first = next(
        m for m in module.modules() if isinstance(m, torch.nn.MultiheadAttention)
    ).batch_first
    shape = (BATCH, length, WIDTH) if batch_first else (length, BATCH, WIDTH)
    return torch.randn(
        (length, WIDTH) if unbatched else shape, generator=generator, dtype=torch.float64
    ).to(parameter.dtype)


def masks_of(module: Any, kind: str, *, unbatched: bool = False) -> dict[str, Tensor]:
    """The masks of `kind` under the names that the module's forward gives them."""
    dtype = next(module.parameters()).dtype
    names = {
        ff.nn.TransformerEncoderLayer: {"src_mask": LENGTH, "src_key_padding_mask": LENGTH},
        ff.nn.TransformerEncoder: {"mask": LENGTH, "src_key_padding_mask": LENGTH},
        ff.nn.Transformer: {
            "src_mask": MEMORY,
            "tgt_mask": LENGTH,
            "memory_mask": MEMORY,
            "src_key_padding_mask": MEMORY,
            "tgt_key_padding_mask": LENGTH,
            "memory_key_padding_mask": MEMORY,
        },
    }.get(
        type(module),
        {
            "tgt_mask": LENGTH,
            "memory_mask": MEMORY,
            "tgt_key_padding_mask": LENGTH,
            "memory_key_padding_mask": MEMORY,
        },
    )
    made = {}
    for seed, (name, keys) in enumerate(names.items()):
        if ("padding" in name) != ("padding" in kind):
            continue
        if "padding" in name:
            shape: tuple[int, ...] = (keys,) if unbatched else (BATCH, keys)
        else:
            queries = MEMORY if name == "src_mask" and keys == MEMORY else LENGTH
            shape = (queries, keys)
            if "per head" in kind:
                shape = ((1 if unbatched else BATCH) * HEADS, *shape)
        made[name] = (
            bias(*shape, dtype=dtype, seed=seed) if "float" in kind else hidden(*shape, seed=seed)
        )
    return made


KINDS = ("no", "bool", "float", "bool per head", "float per head", "bool padding", "float padding")


def inputs_of(module: Any, *, unbatched: bool = False) -> list[Tensor]:
    if isinstance(module, torch.nn.TransformerEncoderLayer | torch.nn.TransformerEncoder):
        return [sequence(module, LENGTH, unbatched=unbatched)]
    given = [
        sequence(module, LENGTH, unbatched=unbatched),
        sequence(module, MEMORY, unbatched=unbatched, seed=2),
    ]
    return given[::-1] if isinstance(module, torch.nn.Transformer) else given


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"batch_first": True},
    {"norm_first": True, "activation": "gelu", "batch_first": True},
    {"norm_first": True, "bias": False},
    {"bias": False, "activation": torch.tanh, "layer_norm_eps": 1e-2, "batch_first": True},
    {"activation": torch.nn.functional.gelu},
    {"activation": torch.nn.SiLU(), "batch_first": True},
)


@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
@pytest.mark.parametrize("name", NAMES[1:])
def test_outputs_and_gradients(name: str, options: dict[str, Any]) -> None:
    ours, theirs = pair(name, dtype=torch.float64, **options)
    for kind, unbatched, training in itertools.product(KINDS, (False, True), (True, False)):
        masks = {} if kind == "no" else masks_of(ours, kind, unbatched=unbatched)

        def call(module: Any, tensors: list[Tensor], masks: Any = masks) -> Any:
            return module(*tensors, **masks)

        assert_same_call(
            ours.train(training),
            theirs.train(training),
            call,
            inputs_of(ours, unbatched=unbatched),
            f"{name}, {kind}, unbatched={unbatched}, training={training}",
        )


@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
@pytest.mark.parametrize("name", NAMES[1:])
def test_eval_without_gradients(name: str, options: dict[str, Any]) -> None:
    """Where torch takes its C++ path, nested tensors included."""
    ours, theirs = pair(name, **options)
    ours.eval(), theirs.eval()
    left_aligned = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    left_aligned[0, 2:] = True
    for kind in (*KINDS, "left-aligned padding"):
        masks = {} if kind == "no" else masks_of(ours, kind)
        if kind == "left-aligned padding":
            masks = {
                n: left_aligned if m.shape[1] == LENGTH else left_aligned.repeat(1, 2)[:, :MEMORY]
                for n, m in masks.items()
            }
        # torch's C++ path takes any number in a float mask for -inf: another test.
        masks = {n: hard(m) if m.is_floating_point() else m for n, m in masks.items()}
        with torch.inference_mode():
            expected = theirs(*inputs_of(ours), **masks)
            actual = ours(*inputs_of(ours), **masks)
        assert_same(actual, expected, f"{name}, {kind}")


def hard(mask: Tensor) -> Tensor:
    return torch.zeros_like(mask).masked_fill(mask == -torch.inf, -torch.inf)


@pytest.mark.parametrize("kind", ["float", "float per head", "float padding"])
def test_finite_masks_mean_the_same_in_eval(kind: str) -> None:
    ours, theirs = pair("TransformerEncoder", batch_first=True)
    masks = masks_of(ours, kind)
    with torch.no_grad():
        expected = theirs.train()(*inputs_of(ours), **masks)
        assert_same(ours.eval()(*inputs_of(ours), **masks), expected, kind)


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder", "Transformer"])
@pytest.mark.parametrize("as_float", [True, False])
def test_is_causal(name: str, as_float: bool) -> None:
    ours, theirs = pair(name, dtype=torch.float64)
    causal = ff.nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    mask = causal if as_float else causal == -torch.inf
    mask_name, hint_name = {
        "TransformerEncoder": ("mask", "is_causal"),
        "TransformerDecoder": ("tgt_mask", "tgt_is_causal"),
        "Transformer": ("tgt_mask", "tgt_is_causal"),
    }[name]
    results = []
    for hint in (None, True, False):

        def call(module: Any, tensors: list[Tensor], hint: Any = hint) -> Any:
            return module(*tensors, **{mask_name: mask, hint_name: hint})

        assert_same_call(ours, theirs, call, inputs_of(ours), f"{name}, {hint}")
        results.append(call(ours, inputs_of(ours)))
    assert_same(results[0], results[1], "the hint changes the result")


def padded(lengths: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    mask = torch.arange(LENGTH) >= torch.tensor(lengths)[:, None]
    if dtype is None:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("enable_nested_tensor", [True, False])
@pytest.mark.parametrize("mask_check", [True, False])
def test_padded_positions_as_torch(
    mask_check: bool, enable_nested_tensor: bool, training: bool, gradient: bool, with_norm: bool
) -> None:
    """torch's nested path, and every condition that keeps torch from it."""
    norm = torch.nn.LayerNorm(WIDTH, bias=False) if with_norm else None
    stack = {
        "norm": norm, "mask_check": mask_check, "enable_nested_tensor": enable_nested_tensor,
    }  # fmt: skip
    ours, theirs = pair("TransformerEncoder", batch_first=True, stack=stack)
    ours.train(training), theirs.train(training)
    src = sequence(ours, LENGTH)
    not_aligned = torch.tensor([[True, False, False, False], [False, True, False, False]])
    cases = {
        "padding": padded((2, 4)),
        "all full": padded((4, 4)),
        "one empty": padded((0, 3)),
        "shorter than the batch": padded((2, 3)),
        "float padding": padded((2, 4), torch.float32),
    }
    if mask_check:
        cases["not left-aligned"] = not_aligned
        cases["float, not left-aligned"] = torch.where(not_aligned, -torch.inf, 0.0)
    for case, padding in cases.items():
        if case == "one empty" and (training or gradient or not enable_nested_tensor):
            continue  # NaN in torch, which is another test
        with torch.set_grad_enabled(gradient):
            expected = theirs(src, src_key_padding_mask=padding)
            assert_same(ours(src, src_key_padding_mask=padding), expected, case)


@pytest.mark.parametrize("blocked_by", ["mask", "norm_first", "fast path off", "one grad"])
def test_padded_positions_when_torch_does_not_nest(blocked_by: str) -> None:
    ours, theirs = pair(
        "TransformerEncoder", batch_first=True, norm_first=blocked_by == "norm_first"
    )
    ours.eval(), theirs.eval()
    ours.requires_grad_(False), theirs.requires_grad_(False)
    src = sequence(ours, LENGTH)
    masks = {"src_key_padding_mask": padded((2, 4))}
    if blocked_by == "mask":
        masks["mask"] = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    if blocked_by == "one grad":
        src.requires_grad_(True)
    torch.backends.mha.set_fastpath_enabled(blocked_by != "fast path off")
    try:
        expected, actual = theirs(src, **masks), ours(src, **masks)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert_same(actual, expected, blocked_by)
    assert (actual[0, 2:] != 0).any()


def test_a_sample_without_any_token_is_not_nan() -> None:
    ours, _ = pair("TransformerEncoder", batch_first=True)
    src = sequence(ours, LENGTH)
    for training in (True, False):
        out = ours.train(training)(src, src_key_padding_mask=padded((0, 3)))
        assert torch.isfinite(out).all()
        out.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dtype": torch.bfloat16}], ids=option_id)
def test_same_seed_same_weights(name: str, options: dict[str, Any]) -> None:
    states, after = [], []
    for nn in (ff.nn, torch.nn):
        torch.manual_seed(5)
        states.append(build(nn, name, **options).state_dict())
        after.append(torch.rand(1))
    assert list(states[0]) == list(states[1])
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key
    assert torch.equal(*after)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_go_both_ways(name: str) -> None:
    ours, theirs = build(ff.nn, name), build(torch.nn, name)
    theirs.load_state_dict(ours.state_dict())
    for parameter in theirs.parameters():
        parameter.data.add_(1.0)
    ours.load_state_dict(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_every_part_is_ours(name: str) -> None:
    module = build(ff.nn, name)
    assert isinstance(module, getattr(torch.nn, name))
    parts = [
        m for m in module.modules() if "ransformer" in type(m).__name__ or "Multi" in repr(type(m))
    ]
    assert parts and all(type(m).__module__.startswith("fastfusion.nn") for m in parts)


def test_parts_of_the_caller_stay_what_they_are() -> None:
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, batch_first=True)
    encoder = ff.nn.TransformerEncoder(layer, 2)
    assert type(layer) is torch.nn.TransformerEncoderLayer
    assert type(layer.self_attn) is torch.nn.MultiheadAttention
    assert all(type(m) is ff.nn.TransformerEncoderLayer for m in encoder.layers)
    assert type(encoder.layers[0].self_attn) is ff.nn.MultiheadAttention
    custom = torch.nn.TransformerEncoder(layer, 1)
    assert ff.nn.Transformer(WIDTH, HEADS, custom_encoder=custom).encoder is custom
    assert type(custom) is torch.nn.TransformerEncoder


class Louder(torch.nn.TransformerEncoderLayer):
    """A layer of a user's, which may rely on torch's float masks."""

    def forward(self, src: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None,
                is_causal: bool = False) -> Tensor:  # fmt: skip
        assert src_mask is None or src_mask.is_floating_point()
        assert src_key_padding_mask is None or src_key_padding_mask.is_floating_point()
        return super().forward(2 * src, src_mask, src_key_padding_mask, is_causal)


def test_a_users_layer_gets_torchs_masks() -> None:
    layer = Louder(WIDTH, HEADS, 12, 0.0, batch_first=True, dtype=torch.float64)
    ours, theirs = ff.nn.TransformerEncoder(layer, 2), torch.nn.TransformerEncoder(layer, 2)
    assert type(ours.layers[0]) is Louder
    src = sequence(ours, LENGTH)
    for kind in ("bool", "bool padding"):
        masks = masks_of(ours, kind)
        assert_same(ours(src, **masks), theirs(src, **masks), kind)


class Watching(ff.nn.TransformerEncoderLayer):
    """The usual way to see a layer's weights: override the self-attention block."""

    def _sa_block(self, x: Tensor, attn_mask: Any, key_padding_mask: Any,
                  is_causal: bool = False) -> Tensor:  # fmt: skip
        out, self.seen = self.self_attn(
            x, x, x, attn_mask=attn_mask, key_padding_mask=key_padding_mask
        )
        return self.dropout1(out)


@pytest.mark.parametrize("training", [True, False])
def test_overridden_blocks_are_used(training: bool) -> None:
    layer = Watching(WIDTH, HEADS, batch_first=True).train(training)
    with torch.set_grad_enabled(training):
        layer(sequence(layer, LENGTH))
    assert layer.seen.shape == (BATCH, LENGTH, LENGTH)


@pytest.mark.parametrize("training", [True, False])
def test_hooks_on_parts_fire(training: bool) -> None:
    module = build(ff.nn, "Transformer", batch_first=True).train(training)
    called: list[str] = []
    for name, part in module.named_modules():
        part.register_forward_hook(lambda *_, name=name: called.append(name))
    expected = [
        name
        for name, part in module.named_modules()
        if not isinstance(part, torch.nn.ModuleList)  # a list is not called
    ]
    with torch.set_grad_enabled(training):
        module(*inputs_of(module))
    assert sorted(called) == sorted(expected)


@pytest.mark.parametrize("through", ["constructor", "retag"])
@pytest.mark.parametrize("with_padding", [False, True])
def test_a_stock_parent_calls_our_attention(through: str, with_padding: bool) -> None:
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 12, 0.0, batch_first=True)
    stock = torch.nn.TransformerEncoder(layer, 2).eval()
    swapped = torch.nn.TransformerEncoder(layer, 2).eval()
    swapped.load_state_dict(stock.state_dict())
    for part in swapped.layers:
        if through == "constructor":
            attention = ff.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
            attention.load_state_dict(part.self_attn.state_dict())
            part.self_attn = attention
        else:
            ff.nn._retag(part.self_attn)
    calls = []
    for part in swapped.layers:
        forward = part.self_attn.forward
        part.self_attn.forward = lambda *a, f=forward, **k: calls.append(1) or f(*a, **k)
    src = sequence(swapped, LENGTH)
    padding = padded((2, 4)) if with_padding else None
    with torch.inference_mode():
        actual = swapped(src, src_key_padding_mask=padding)
        assert len(calls) == 2
        assert_same(actual, stock(src, src_key_padding_mask=padding), "stock parent")


def test_retag_twice_is_retag_once() -> None:
    module = ff.nn._retag(ff.nn._retag(build(torch.nn, "Transformer")))
    assert type(module) is ff.nn.Transformer
    for part in module.modules():
        expected = 1 if isinstance(part, ff.nn.MultiheadAttention) else 0
        assert len(part._forward_pre_hooks) == expected


def test_dropout_in_training() -> None:
    torch.manual_seed(0)
    ours = ff.nn.TransformerEncoderLayer(WIDTH, HEADS, 12, dropout=0.4, norm_first=True)
    theirs = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 12, dropout=0.4, norm_first=True)
    theirs.load_state_dict(ours.state_dict())
    src = torch.randn(4, 400, WIDTH)
    src[:] = src[:, :1]
    ours_draws, their_draws = ours(src), theirs(src)
    # 400 copies of one sequence: the mean and the spread of the two are the same.
    for statistic in (lambda t: t.mean(1), lambda t: t.std(1)):
        a, b = statistic(ours_draws), statistic(their_draws)
        assert ((a - b).abs() < 0.35 * their_draws.std(1)).all()
    assert not torch.equal(ours_draws[:, 0], ours_draws[:, 1])
