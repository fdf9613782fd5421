"""diffusers' processors on our attention, in small models of each way that they call attention."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from checkout import need_library
from torch import Tensor, nn

need_library("diffusers")

from diffusers import (  # noqa: E402
    AutoencoderKL,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from diffusers.models import attention_dispatch  # noqa: E402
from diffusers.models.attention_processor import (  # noqa: E402
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)

import fastfusion as ff  # noqa: E402
from fastfusion.acceleration import swaps  # noqa: E402
from fastfusion.integrations import diffusers as ours  # noqa: E402

Made = tuple[nn.Module, dict[str, Any]]


def of_the_text(kind: type = torch.bool) -> Any:
    """Two texts of 7 tokens, of which one ends earlier."""
    return torch.tensor([[1] * 7, [1] * 4 + [0] * 3]).to(kind)


def unet() -> Made:
    model = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "encoder_attention_mask": of_the_text(),
    }


def pixart() -> Made:
    model = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=32, cross_attention_dim=24, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "timestep": torch.tensor([1, 2]),
        "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
        "encoder_attention_mask": of_the_text(torch.float32),
    }


def sd3() -> Made:
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.tensor([1.0, 2.0]),
    }


def flux() -> Made:
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(5, 3),
    }


def wan() -> Made:
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
    }


def vae() -> Made:
    model = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    return model, {"sample": torch.randn(1, 3, 16, 16)}


MODELS = {f.__name__: f for f in (unet, pixart, sd3, flux, wan, vae)}


def made(name: str) -> Made:
    """A model with weights that show every part, and its inputs."""
    model, inputs = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.02, 0.1)
    return model.eval(), inputs


def doubled(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def attentions(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if getattr(m, "processor", None) is not None]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_as_accurate_as_it_was(name: str) -> None:
    model, inputs = made(name)
    names = set(model.state_dict())
    before = [m.processor for m in attentions(model)]
    with torch.no_grad():
        expected = model(**inputs)[0]
        # What diffusers computes in float32 on its way is no reference; nor are 64-bit rotations.
        reference = copy.deepcopy(model).double()
        exact = reference(**{key: doubled(value) for key, value in inputs.items()})[0]
        ff.accelerate(model, example_inputs=inputs)
        actual = model(**inputs)[0]
    assert_accurate(*(t.reshape(1, -1) for t in (actual, exact, expected)))
    swapped = [row for row in model.fastfusion_report.layers if "Processor" in (row.target or "")]
    assert sum(row.name != "" for row in swapped) == len(before)
    assert all("scaled_dot_product_attention: cpu" in (row.road or "") for row in swapped)
    assert set(model.state_dict()) == names
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(**inputs)[0], actual)
        assert torch.equal(ff.restore(model)(**inputs)[0], expected)
    assert all(
        a is b for a, b in zip(before, [m.processor for m in attentions(model)], strict=True)
    )


@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_masks_are_kept(name: str) -> None:
    """What a text says behind its end does not matter, and does where nothing is hidden."""
    model, inputs = made(name)
    ff.accelerate(model)
    other = dict(inputs, encoder_hidden_states=inputs["encoder_hidden_states"].clone())
    other["encoder_hidden_states"][1, 4:] = 9.0
    with torch.no_grad():
        found, again = model(**inputs)[0], model(**other)[0]
        torch.testing.assert_close(found, again)
        other["encoder_attention_mask"] = torch.ones_like(other["encoder_attention_mask"])
        assert not torch.allclose(found, model(**other)[0])


def test_another_versions_dispatch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_original", lambda query, key, value, bias: None)
    model, _ = made("flux")
    assert "dispatches attention otherwise" in str(swaps.swap_for(attentions(model)[0]))


def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The queries of calls of diffusers' own dispatch."""
    calls: list[Any] = []

    def watched(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(query)
        return attention_dispatch.dispatch_attention_fn(query, *args, **kwargs)

    monkeypatch.setattr(ours, "_original", watched)
    return calls


@pytest.mark.parametrize("form", ["keys", "keys, float", "scores", "causal"])
def test_masks_of_the_dispatch(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = called(monkeypatch)
    query, key, value = (torch.randn(2, n, 3, 8) for n in (5, 7, 7))
    mask: Any = of_the_text()
    if form == "keys, float":
        mask = torch.randn(2, 7)
    elif form == "scores":
        mask = torch.rand(2, 1, 5, 7) > 0.5
    elif form == "causal":
        mask = None
    options = {"attn_mask": mask, "is_causal": form == "causal", "scale": 0.3}
    expected = attention_dispatch.dispatch_attention_fn(query, key, value, **options)
    doubles = (t.double() for t in (query, key, value))
    exact = attention_dispatch.dispatch_attention_fn(
        *doubles, **dict(options, attn_mask=doubled(mask))
    )
    actual = ours._dispatch(query, key, value, **options)
    assert not own
    assert_accurate(
        *(t.transpose(1, 2).flatten(0, 1).flatten(1) for t in (actual, exact, expected))
    )


@pytest.mark.parametrize("way", ["layer", "everywhere", "several devices", "arguments"])
def test_who_asks_for_a_backend_gets_it(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = called(monkeypatch)
    tensors = tuple(torch.randn(1, 4, 2, 8) for _ in "qkv")
    ours._dispatch(*tensors)
    ours._dispatch(*tensors, backend=attention_dispatch.AttentionBackendName.NATIVE)
    assert not own
    if way == "layer":
        ours._dispatch(*tensors, backend="_native_math")
    elif way == "everywhere":
        with attention_dispatch.attention_backend("_native_math"):
            ours._dispatch(*tensors)
    elif way == "arguments":
        ours._dispatch(*tensors, attention_kwargs={"scale": 0.5})
    else:
        with pytest.raises(Exception):  # noqa: B017  there is one device
            ours._dispatch(*tensors, parallel_config=object())
    assert len(own) == 1


def test_a_backend_set_on_an_accelerated_model_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made("flux")
    ff.accelerate(model)
    own = called(monkeypatch)
    registry = attention_dispatch._AttentionBackendRegistry  # all models hear of it
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    with torch.no_grad():
        model(**inputs)
        assert not own
        model.set_attention_backend("_native_math")
        model(**inputs)
    assert len(own) == len(attentions(model))
    ff.restore(model)
    assert attentions(model)[0].processor._attention_backend == "_native_math"


def test_attentions_may_share_a_processor() -> None:
    model, inputs = made("unet")
    shared = AttnProcessor2_0()
    model.set_attn_processor(shared)
    with torch.no_grad():
        before = model(**inputs)[0]
        ff.accelerate(model, example_inputs=inputs)
        assert model.fastfusion_report.deviation <= model.fastfusion_report.bound
        assert torch.equal(ff.restore(model)(**inputs)[0], before)
    assert all(m.processor is shared for m in attentions(model))


def test_processors_that_are_set_later_stay() -> None:
    model, _ = made("unet")
    ff.accelerate(model)
    later = AttnProcessor()
    attentions(model)[0].set_processor(later)
    ff.restore(model)
    assert attentions(model)[0].processor is later
    assert type(attentions(model)[1].processor) is AttnProcessor2_0


def test_a_processor_without_torchs_attention_stays() -> None:
    attention = Attention(32, heads=2, dim_head=16, processor=AttnProcessor())
    assert "AttnProcessor, does not call torch's attention" in str(swaps.swap_for(attention))


def test_a_processor_with_weights_keeps_them() -> None:
    processor = IPAdapterAttnProcessor2_0(32, 32, num_tokens=(4,))
    attention = Attention(32, cross_attention_dim=32, heads=2, dim_head=16, processor=processor)
    names = set(attention.state_dict())
    inputs = {
        "hidden_states": torch.randn(2, 6, 32),
        "encoder_hidden_states": (torch.randn(2, 7, 32), [torch.randn(2, 1, 4, 32)]),
    }
    with torch.no_grad():
        before = attention.eval()(**inputs)
        ff.accelerate(attention, example_inputs=inputs)
        assert attention.processor is processor
        assert set(attention.state_dict()) == names
        torch.testing.assert_close(attention(**inputs), before)
        assert torch.equal(ff.restore(attention)(**inputs), before)
    assert type(processor) is IPAdapterAttnProcessor2_0


def test_gradients_are_those_of_torchs_attention() -> None:
    model, inputs = made("sd3")
    results = []
    change: Callable[[Any], Any]
    for change in (lambda m: m, ff.accelerate):
        out = change(model)(**inputs)[0]
        results.append(torch.autograd.grad(out.sum(), [*model.parameters()], allow_unused=True))
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)


def test_compiled_attention_is_diffusers_own() -> None:
    attention = Attention(32, heads=2, dim_head=16).eval()
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        expected = attention(x)
        ff.accelerate(attention)
        torch.testing.assert_close(torch.compile(attention, backend="eager")(x), expected)
