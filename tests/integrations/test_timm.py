"""timm's attentions, blocks and MLPs on our ops."""

import copy
import inspect
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor, nn
from torchvision_stub import import_timm

timm = import_timm()

import timm.models as models  # noqa: E402
from timm.layers import activations  # noqa: E402

import fastfusion as ff  # noqa: E402
from fastfusion.acceleration import swaps  # noqa: E402
from fastfusion.integrations import timm as ours  # noqa: E402
from fastfusion.integrations._own_code import calls  # noqa: E402
from fastfusion.integrations.swaps import TIMM  # noqa: E402

DIM, HEADS = 64, 2
# Of registered classes: what makes a small one of it, and the shape of its input.
TOKENS = (2, 9, DIM)
IMAGE = (2, DIM, 6, 6)


def window(kind: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: kind(DIM, num_heads=HEADS, window_size=(3, 3), **options)


def plain(kind: Any, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: kind(DIM, *args, **options)


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layers.attention.Attention": (
        plain(timm.layers.Attention, HEADS, qk_norm=True, norm_layer=nn.LayerNorm), TOKENS),
    "layers.attention.AttentionRope": (
        plain(timm.layers.AttentionRope, 4, num_kv_heads=2, qkv_fused=False), TOKENS),
    "layers.attention2d.Attention2d": (
        plain(timm.layers.attention2d.Attention2d, num_heads=HEADS), IMAGE),
    "layers.attention2d.MultiQueryAttention2d": (
        plain(timm.layers.attention2d.MultiQueryAttention2d, num_heads=HEADS), IMAGE),
    "layers.attention_pool.AttentionPoolLatent": (
        plain(timm.layers.AttentionPoolLatent, num_heads=HEADS), TOKENS),
    "layers.attention_pool.AttentionPoolPrr": (
        plain(timm.layers.AttentionPoolPrr, num_heads=HEADS), TOKENS),
    "layers.attention_pool2d.AttentionPool2d": (
        plain(timm.layers.AttentionPool2d, feat_size=6, num_heads=HEADS), IMAGE),
    "layers.attention_pool2d.RotAttentionPool2d": (
        plain(timm.layers.RotAttentionPool2d, num_heads=HEADS), IMAGE),
    "layers.diff_attention.DiffAttention": (
        plain(timm.layers.DiffAttention, HEADS, norm_layer=nn.LayerNorm), TOKENS),
    "layers.other_pool.SimPool1d": (plain(timm.layers.other_pool.SimPool1d, HEADS), TOKENS),
    "layers.other_pool.SimPool2d": (plain(timm.layers.other_pool.SimPool2d, HEADS), IMAGE),
    "models.beit.Attention": (
        window(models.beit.Attention, qkv_bias=True), (2, 10, DIM)),
    "models.cait.ClassAttn": (plain(models.cait.ClassAttn, HEADS), TOKENS),
    "models.davit.WindowAttention": (
        plain(models.davit.WindowAttention, (3, 3), HEADS), TOKENS),
    "models.eva.EvaAttention": (
        plain(models.eva.EvaAttention, HEADS, norm_layer=nn.LayerNorm), TOKENS),
    "models.fastvit.Attention": (plain(models.fastvit.Attention, 32), IMAGE),
    "models.hiera.MaskUnitAttention": (
        lambda: models.hiera.MaskUnitAttention(DIM, DIM, HEADS, q_stride=2, window_size=4),
        (2, 16, DIM)),
    "models.hieradet_sam2.MultiScaleAttention": (
        lambda: models.hieradet_sam2.MultiScaleAttention(DIM, DIM, HEADS), (2, 3, 3, DIM)),
    "models.maxxvit.Attention2d": (plain(models.maxxvit.Attention2d), IMAGE),
    "models.maxxvit.AttentionCl": (plain(models.maxxvit.AttentionCl), TOKENS),
    "models.metaformer.Attention": (plain(models.metaformer.Attention), TOKENS),
    "models.nest.Attention": (plain(models.nest.Attention, HEADS), (2, 3, 9, DIM)),
    "models.nextvit.EfficientAttention": (plain(models.nextvit.EfficientAttention), TOKENS),
    "models.swin_transformer.WindowAttention": (
        plain(models.swin_transformer.WindowAttention, HEADS, window_size=3), (4, 9, DIM)),
    "models.tiny_vit.Attention": (
        plain(models.tiny_vit.Attention, 32, HEADS, resolution=(3, 3)), TOKENS),
    "models.vision_transformer.DiffParallelScalingBlock": (
        plain(models.vision_transformer.DiffParallelScalingBlock, HEADS), TOKENS),
    "models.vision_transformer.ParallelScalingBlock": (
        plain(models.vision_transformer.ParallelScalingBlock, HEADS, init_values=0.1), TOKENS),
    "models.vision_transformer_relpos.RelPosAttention": (
        plain(models.vision_transformer_relpos.RelPosAttention, HEADS), TOKENS),
    "models.vision_transformer_sam.Attention": (
        plain(models.vision_transformer_sam.Attention, HEADS, use_rel_pos=True, input_size=(3, 3)),
        (2, 3, 3, DIM)),
    "models.volo.Attention": (plain(models.volo.Attention, HEADS), (2, 3, 3, DIM)),
}  # fmt: skip
# Those that take more to make; their swaps are the same.
NOT_MADE = {
    "models.cpubone.ConvAttention", "models.gemma4_vit.Gemma4Attention", "models.iformer.SHMA",
    "models.lowformer.ConvAttention", "models.pvt_v2.Attention", "models.twins.GlobalSubSampleAttn",
    "models.twins.LocallyGroupedAttn", "models.visformer.Attention",
}  # fmt: skip
# What stays torch's: the head_dim of cross-covariance attention is the number of tokens.
LEFT = {"models.xcit.XCA"}


def randomized(module: nn.Module) -> nn.Module:
    """In eval mode, with weights that show every part."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.1, 0.2)
    module.eval()  # which returns nothing in TinyViT's attention
    return module


def swap(module: nn.Module) -> nn.Module:
    made = swaps.swap_for(module)
    assert made is not None and not isinstance(made, str), made
    swaps.enter(module, made)
    return module


def check(module: nn.Module, *args: Any) -> Tensor:
    """Whether the swapped module is as accurate as it was."""
    with torch.no_grad():
        precise = copy.deepcopy(module).double()
        doubles = [
            a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
        ]
        exact, expected = precise(*doubles), module(*args)
        swap(module)
        actual = module(*args)
    assert actual.shape == expected.shape
    assert_accurate(*(t.reshape(t.shape[0], -1) for t in (actual, exact, expected)))
    swaps.leave(module)
    with torch.no_grad():
        assert torch.equal(module(*args), expected)
    return actual


def classes_with_attention() -> set[str]:
    """Of timm, those whose forward calls torch's attention."""
    return {
        f"{kind.__module__}.{kind.__qualname__}".removeprefix("timm.")
        for name, module in list(sys.modules.items())
        if name.startswith("timm.")
        for kind in vars(module).values()
        if inspect.isclass(kind)
        and kind.__module__ == name
        and issubclass(kind, nn.Module)
        and calls(kind.__dict__.get("forward"))
    }


def test_every_class_that_calls_attention_is_known() -> None:
    registered = {name.removeprefix("timm.") for name in TIMM}
    attentions = registered - {"models.vision_transformer.Block", "layers.mlp.Mlp"}
    assert classes_with_attention() == attentions | LEFT
    assert attentions == set(SMALL) | NOT_MADE


@pytest.mark.parametrize("name", SMALL)
def test_attention_is_as_accurate_as_it_was(name: str) -> None:
    make, size = SMALL[name]
    check(randomized(make()), torch.randn(size))


@pytest.mark.parametrize("name", SMALL)
def test_attention_is_ours(name: str) -> None:
    make, size = SMALL[name]
    assert "scaled_dot_product_attention" in ops_of(swap(randomized(make())), torch.randn(size))


@pytest.mark.parametrize("masked", ["bool", "float", "causal"])
def test_masks_arrive(masked: str) -> None:
    module = randomized(timm.layers.Attention(DIM, HEADS, qkv_bias=True))
    mask = {"bool": torch.rand(9, 9) > 0.5, "float": torch.randn(2, 1, 9, 9), "causal": None}[
        masked
    ]
    found = check(module, torch.randn(TOKENS), mask, masked == "causal")
    assert not torch.allclose(found, module(torch.randn(TOKENS)))


def test_windows_of_swin_take_their_masks() -> None:
    make, size = SMALL["models.swin_transformer.WindowAttention"]
    mask = torch.zeros(2, 9, 9).masked_fill(torch.rand(2, 9, 9) > 0.7, -100.0)
    module = randomized(make())
    assert not module.fused_attn
    check(module, torch.randn(size), mask)
    assert not module.fused_attn
    assert swap(module).fused_attn


def test_attention_that_is_switched_off_stays() -> None:
    timm.layers.set_fused_attn(False)
    try:
        assert "set_fused_attn" in str(swaps.swap_for(timm.layers.Attention(DIM, HEADS)))
    finally:
        timm.layers.set_fused_attn(True)


def test_rotations_and_prefixes_stay_timms() -> None:
    module = randomized(models.eva.EvaAttention(DIM, HEADS, num_prefix_tokens=1, scale_norm=False))
    check(module, torch.randn(TOKENS), torch.randn(8, 2 * DIM // HEADS))


def test_shared_biases_of_beit_are_added() -> None:
    make, size = SMALL["models.beit.Attention"]
    check(randomized(make()), torch.randn(size), torch.randn(1, HEADS, 10, 10))


def test_compiled_attention_is_one_graph() -> None:
    module = swap(timm.layers.Attention(DIM, HEADS).eval())
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(TOKENS)
    torch.testing.assert_close(compiled(x), module(x))


# ---- blocks


def block(**options: Any) -> Any:
    return randomized(models.vision_transformer.Block(DIM, HEADS, **{"qkv_bias": True} | options))


def ops_of(module: nn.Module, *args: Any) -> set[str]:
    with torch.no_grad():
        rows = ff.explain(module, *args).rows
    return {found.op for _, found in rows if found is not None}


@pytest.mark.parametrize("masked", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize(
    "activation", [nn.GELU, nn.ReLU, nn.SiLU, activations.GELUTanh, activations.QuickGELU]
)
def test_a_block_is_one_call(masked: str, activation: Any) -> None:
    module = block(act_layer=activation, drop_path=0.3, proj_drop=0.2)
    mask = {"bool": torch.rand(9, 9) > 0.4, "float": torch.randn(9, 9)}.get(masked)
    args = (torch.randn(TOKENS), mask, masked == "causal")
    check(module, *args)
    assert ops_of(swap(module), *args) == {"encoder_layer"}


def test_a_block_of_swapped_parts_is_one_call() -> None:
    module = ff.accelerate(block())
    assert ops_of(module, torch.randn(TOKENS)) == {"encoder_layer"}


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_a_block_of_narrow_weights_is_one_call(weights: str) -> None:
    module = ff.accelerate(block(), weights=weights)
    assert all(isinstance(m, ff.nn.QuantizedLinear) for m in (module.attn.qkv, module.mlp.fc2))
    assert ops_of(module, torch.randn(TOKENS)) == {"encoder_layer"}


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


def narrow_the_heads(module: Any) -> None:
    module.attn = timm.layers.Attention(DIM, HEADS, attn_head_dim=16).eval()


def replace_a_part(module: Any) -> None:
    other = Doubling(DIM, DIM)
    other.load_state_dict(module.attn.proj.state_dict())
    module.attn.proj = other


def switch_attention_off(module: Any) -> None:
    module.attn.fused_attn, module.attn.scale = False, 2.0


def norm_in_half(module: Any) -> None:
    module.norm2._fast_norm = True


EDITS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "layer scale": ({"init_values": 0.1}, lambda m: None),
    "norms of queries": ({"qk_norm": True}, lambda m: None),
    "norm of attention": ({"scale_attn_norm": True}, lambda m: None),
    "norm in the MLP": ({"scale_mlp_norm": True}, lambda m: None),
    "another activation": ({"act_layer": nn.Hardswish}, lambda m: None),
    "another MLP": ({"mlp_layer": timm.layers.GluMlp}, lambda m: None),
    "another norm": ({"norm_layer": timm.layers.RmsNorm}, lambda m: None),
    "a replaced part": ({}, replace_a_part),
    "heads of another width": ({}, narrow_the_heads),
    "a scale of its own": ({}, switch_attention_off),
    "a norm in other types": ({}, norm_in_half),
    "a hook on a norm": ({}, lambda m: m.norm1.register_forward_hook(lambda m, i, o: o * 2)),
    "a hook on the MLP": ({}, lambda m: m.mlp.register_forward_pre_hook(lambda m, i: (i[0] + 1,))),
    "a hook on the attention": ({}, lambda m: m.attn.register_forward_hook(lambda m, i, o: -o)),
    "a forward of one layer": ({}, lambda m: setattr(m.ls1, "forward", lambda x: 3 * x)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_block_with_more_than_its_formula_calls_its_parts(edit: str) -> None:
    options, change = EDITS[edit]
    module = block(**options)
    change(module)
    x = torch.randn(TOKENS)
    with torch.no_grad():
        expected = module(x)
        assert "encoder_layer" not in ops_of(swap(module), x)
        assert torch.equal(module(x), expected)


def test_a_block_in_training_drops_and_learns() -> None:
    module = block(proj_drop=0.5, drop_path=0.5).train()
    x = torch.randn(TOKENS)
    results = []
    for change in (lambda m: m, swap):
        change(module)
        torch.manual_seed(3)
        out = module(x)
        gradients = torch.autograd.grad(out.sum(), [*module.parameters()])
        results.append([out, *gradients])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


def test_gradients_of_a_block_in_eval_mode_are_its_own() -> None:
    module = block()
    x = torch.randn(TOKENS, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    (actual,) = torch.autograd.grad(swap(module)(x).sum(), x)
    assert torch.equal(actual, expected)


def test_a_version_with_another_formula_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = models.vision_transformer.Block
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, **masks: 2 * original(self, x, **masks))
    ours._has_our_formula.cache_clear()
    try:
        assert "computes it otherwise" in str(swaps.swap_for(block()))
    finally:
        ours._has_our_formula.cache_clear()


def test_an_mlp_is_two_calls() -> None:
    module = randomized(timm.layers.Mlp(DIM, 256, drop=0.1))
    x = torch.randn(TOKENS)
    check(module, x)
    report = ff.accelerate(module, example_inputs=x).fastfusion_report
    assert report.layers[0].target == "fastfusion.integrations.timm.Mlp"
    assert report.layers[0].road.startswith("linear: cpu")
    assert swaps.swap_for(timm.layers.Mlp(DIM, use_conv=True)) is None


# ---- models


@pytest.fixture
def vit() -> Any:
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=DIM, depth=3, num_heads=HEADS, num_classes=5
    ).eval()


def test_a_model_is_accelerated_and_restored(vit: Any) -> None:
    x = torch.randn(2, 3, 32, 32)
    names = set(vit.state_dict())
    with torch.no_grad():
        before = vit(x)
        report = ff.accelerate(vit, example_inputs=x).fastfusion_report
        assert report.deviation is not None and report.deviation <= report.bound
        assert {row.target for row in report.layers if row.name.endswith("blocks.1")} == {
            "fastfusion.integrations.timm.Block"
        }
        assert set(vit.state_dict()) == names
        after = vit(x)
        for twin in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit)), ff.accelerate(vit)):
            assert torch.equal(twin(x), after)
        assert isinstance(vit.blocks[0], models.vision_transformer.Block)
        assert torch.equal(ff.restore(vit)(x), before)
    assert type(vit.blocks[0]) is models.vision_transformer.Block


def test_features_and_pruned_blocks_work(vit: Any) -> None:
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = vit.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        ff.accelerate(vit)
        found = vit.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        vit.prune_intermediate_layers([0], prune_head=True)
        assert vit(x).shape == (1, 17, DIM)


@pytest.mark.parametrize("weights", ["int8", "bf16"])
@pytest.mark.parametrize("family", ["beit", "eva"])
def test_weights_that_timm_reads_can_be_narrow(family: str, weights: str) -> None:
    """BEiT and EVA read `qkv.weight`, which a quantised layer does not have."""
    kind = {"beit": models.beit.Beit, "eva": models.eva.Eva}[family]
    model = kind(img_size=32, patch_size=8, embed_dim=DIM, depth=2, num_heads=HEADS, num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = randomized(model)(x)
        after = ff.accelerate(model, weights=weights)(x)
    assert torch.nn.functional.cosine_similarity(before, after).min() > 0.99


@pytest.mark.parametrize("weights", ["int8", "bf16"])
@torch.no_grad()
def test_swin_v2_reads_weights_of_its_parts(weights: Any) -> None:
    """`qkv.weight`, which stays; without example inputs, which would show that nobody calls it."""
    model = models.swin_transformer_v2.SwinTransformerV2(
        img_size=32, patch_size=2, window_size=4, embed_dim=64, depths=(1, 1), num_heads=(2, 2),
        num_classes=70,
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    report = ff.accelerate(model, weights=weights).fastfusion_report
    kept = {row.name: row.reason for row in report.quantization.kept}
    assert kept["layers.0.blocks.0.attn.qkv"] == "WindowAttention reads its weight"
    assert "layers.0.blocks.0.mlp.fc1" in {row.name for row in report.quantization.quantized}
    assert nn.functional.cosine_similarity(model(x), expected, dim=-1).min() > 0.99
