"""attn_implementation="fastfusion", by itself and through accelerate: masks, weights, causality,
and the models that know no interface."""

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import transformers_cases as cases
from accuracy import assert_accurate
from torch import Tensor, nn
from transformers_cases import (
    AUDIO,
    ENDLESS,
    IDS,
    IMAGE,
    LEFT,
    MEL,
    PIXELS,
    RESNET,
    RIGHT,
    SEQ2SEQ,
    SOUND,
    TEXT,
    WHISPER,
    assert_same,
    build,
    one_thread,  # noqa: F401
    run,
    tr,
    twin,
)

import fastfusion as ff
from fastfusion.integrations import transformers as integration
from fastfusion.integrations.transformers import _interface

TOKENS = {"input_ids": IDS}
LLAMA = {**TEXT, "num_key_value_heads": 2}
GPT_OSS = dict(
    **LLAMA, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=4,
)  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the attention function hands to the op."""
    seen: list[dict[str, Any]] = []
    op = _interface.scaled_dot_product_attention
    names = ("query", "key", "value", "mask", "dropout", "causal", "scale", "gqa")

    def spy(*args: Any, **more: Any) -> Tensor:
        seen.append({**dict(zip(names, args, strict=True)), **more})
        return op(*args, **more)

    monkeypatch.setattr(_interface, "scaled_dot_product_attention", spy)
    return seen


@pytest.fixture(autouse=True)
def untold() -> None:
    """What is said once is said in every test."""
    _interface._told.clear()


def text(model: str, **more: Any) -> tuple[Any, Any]:
    return getattr(tr, f"{model}Model"), getattr(tr, f"{model}Config")(**{**TEXT, **more})


# ---- registration


def test_importing_fastfusion_is_enough() -> None:
    """In either order, and without importing transformers for those who do not."""
    imports = "from transformers.modeling_utils import AttentionInterface"
    check = "assert 'fastfusion' in AttentionInterface().valid_keys()"
    without = "import sys, fastfusion; assert 'transformers' not in sys.modules"
    for code in (f"{without}; {imports}; {check}", f"{imports}; import fastfusion; {check}"):
        subprocess.run([sys.executable, "-c", code], check=True)


def test_register_again_is_harmless() -> None:
    before = tr.AttentionInterface._global_mapping["fastfusion"]
    integration.register()
    assert tr.AttentionInterface._global_mapping["fastfusion"] is before is integration.attention
    masks = tr.AttentionMaskInterface._global_mapping
    assert masks["fastfusion"] is integration.attention_mask


def test_a_version_without_the_interface_is_an_import_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import masking_utils

    monkeypatch.delattr(masking_utils, "sdpa_mask")
    with pytest.raises(ImportError, match="needs transformers >= 5"):
        integration.register()


# ---- T1: padding

PADDED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "BERT": (*text("Bert"), TOKENS),
    "CLIP text": (tr.CLIPTextModel, tr.CLIPTextConfig(**TEXT, eos_token_id=2), TOKENS),
    "SigLIP text": (tr.SiglipTextModel, tr.SiglipTextConfig(**TEXT), TOKENS),
    "DistilBERT": (
        tr.DistilBertModel,
        tr.DistilBertConfig(vocab_size=99, dim=64, n_layers=2, n_heads=4, hidden_dim=128),
        TOKENS,
    ),
    "T5": (
        tr.T5EncoderModel,
        tr.T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=99),
        TOKENS,
    ),
    "BART": (tr.BartModel, tr.BartConfig(**SEQ2SEQ), {**TOKENS, "decoder_input_ids": IDS}),
    "GPT-2": (tr.GPT2Model, tr.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99), TOKENS),
    "Llama": (*text("Llama", num_key_value_heads=2), TOKENS),
    "Gemma 3": (
        tr.Gemma3TextModel,
        tr.Gemma3TextConfig(**LLAMA, head_dim=16, sliding_window=4),
        TOKENS,
    ),
}


@pytest.mark.parametrize("how", ("name", "accelerate"))
@pytest.mark.parametrize("padding", ("left", "right"))
@pytest.mark.parametrize("name", PADDED)
def test_padding_is_not_lost(
    name: str, padding: str, how: str, calls: list[dict[str, Any]]
) -> None:
    model_class, config, inputs = PADDED[name]
    mask = LEFT if padding == "left" else RIGHT
    model = build(model_class, config)
    other = twin(model, "fastfusion") if how == "name" else ff.accelerate(copy.deepcopy(model))
    tokens = None if name == "BART" else mask
    assert_same(model, other, {**inputs, "attention_mask": mask}, tokens=tokens)
    assert calls if how == "name" else True


def test_sound_with_padding() -> None:
    model = build(tr.Wav2Vec2Model, tr.Wav2Vec2Config(**AUDIO))
    mask = torch.ones(2, 1200, dtype=torch.long)
    mask[1, 700:] = 0
    inputs = {"input_values": SOUND, "attention_mask": mask}
    for other in (twin(model, "fastfusion"), ff.accelerate(copy.deepcopy(model))):
        assert_same(model, other, inputs, lambda out: out.last_hidden_state[:, :30])


def test_masks_of_the_caller(calls: list[dict[str, Any]]) -> None:
    """Four dimensions, bool or float: as they are."""
    model = build(*text("Bert"))
    hidden = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(5)) < 0.4
    hidden[..., 0] = False
    mask = torch.zeros(2, 1, 9, 9).masked_fill(hidden, torch.finfo(torch.float32).min)
    inputs = {"input_ids": IDS, "attention_mask": mask}
    plain, exact = run(model, inputs)[0], run(twin(model, "sdpa").double(), cases.double(inputs))[0]
    for other in (twin(model, "fastfusion"), ff.accelerate(copy.deepcopy(model))):
        for given in (mask, ~hidden):
            actual = run(other, {"input_ids": IDS, "attention_mask": given})
            assert_accurate(actual[0], exact, plain)
    assert calls[0]["mask"] is mask and calls[2]["mask"].dtype == torch.bool


def test_padding_alone_is_one_row() -> None:
    config = build(*text("Bert")).config
    make = tr.masking_utils.create_bidirectional_mask
    config._attn_implementation = "fastfusion"
    mask = make(config, torch.zeros(2, 9, 64), RIGHT)
    assert mask.shape == (2, 1, 9, 9) and mask.dtype == torch.bool and mask.stride(2) == 0
    assert torch.equal(mask[:, 0, 3], RIGHT.bool())
    assert make(config, torch.zeros(2, 9, 64), torch.ones_like(RIGHT)) is None


# ---- T2: models that do not know the interface

WITHOUT: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ViLT": (
        tr.ViltModel,
        tr.ViltConfig(**{**TEXT, "max_position_embeddings": 40}, image_size=32, patch_size=8),
        {"pixel_values": PIXELS},
    ),
    "VisualBERT": (
        tr.VisualBertModel,
        tr.VisualBertConfig(**TEXT, visual_embedding_dim=16),
        {"visual_embeds": torch.ones(2, 4, 16), "visual_attention_mask": torch.ones(2, 4)},
    ),
    "LXMERT": (
        tr.LxmertModel,
        tr.LxmertConfig(
            hidden_size=64, num_attention_heads=4, intermediate_size=128, vocab_size=99,
            l_layers=1, x_layers=1, r_layers=1, visual_feat_dim=16,
        ),
        {"visual_feats": torch.ones(2, 4, 16), "visual_pos": torch.ones(2, 4, 4)},
    ),
    "BLIP text": (
        tr.models.blip.modeling_blip_text.BlipTextModel,
        tr.BlipTextConfig(**TEXT, encoder_hidden_size=64, is_decoder=False),
        {},
    ),
    "DeBERTa": (tr.DebertaV2Model, tr.DebertaV2Config(**TEXT), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT)
def test_the_name_changes_nothing_without_the_interface(
    name: str, calls: list[dict[str, Any]]
) -> None:
    model_class, config, more = WITHOUT[name]
    inputs = {"input_ids": IDS, "attention_mask": RIGHT, **more}
    model = build(model_class, config)
    named = build(model_class, config, "fastfusion")

    def everything(output: Any) -> Tensor:
        return torch.cat([t.flatten() for t in output.values() if isinstance(t, Tensor)])

    assert torch.equal(run(named, inputs, everything), run(model, inputs, everything))
    assert not calls


# ---- T5: weights


@pytest.mark.parametrize("how", ("name", "accelerate"))
def test_attention_weights(how: str) -> None:
    for name in ("BERT", "BART"):
        model_class, config, inputs = PADDED[name]
        inputs = {**inputs, "attention_mask": RIGHT}
        model = build(model_class, config)
        other = twin(model, "fastfusion") if how == "name" else ff.accelerate(copy.deepcopy(model))
        before = run(other, inputs)
        _interface._told.clear()
        with torch.no_grad():
            expected = model(**inputs, output_attentions=True, output_hidden_states=True)
            with pytest.warns(UserWarning, match="attention weights"):
                actual = other(**inputs, output_attentions=True, output_hidden_states=True)
        for field in expected:
            if "attentions" not in field:
                continue
            assert len(actual[field]) == len(expected[field]) in (0, 2)
            for a, b in zip(actual[field], expected[field], strict=True):
                torch.testing.assert_close(a, b)
        assert any(len(expected[field]) for field in expected if field.endswith("attentions"))
        states = [field for field in expected if field.endswith("hidden_states")]
        assert states and all(len(actual[f]) == len(expected[f]) == 3 for f in states)
        with warnings.catch_warnings():  # said once
            warnings.simplefilter("error")
            other(**inputs, output_attentions=True)
        assert torch.equal(run(other, inputs), before)


# ---- T6, T7, and what else the function is told


def test_causal_only_where_the_model_says_so(calls: list[dict[str, Any]]) -> None:
    cases: dict[str, tuple[Any, Any, bool]] = {
        "GPT-2": (*PADDED["GPT-2"][:2], True),
        "CLIP text": (*PADDED["CLIP text"][:2], True),
        "BERT": (*text("Bert"), False),
        "BERT as a decoder": (*text("Bert", is_decoder=True), True),
    }
    for model_class, config, causal in cases.values():
        model = build(model_class, config)
        assert_same(model, twin(model, "fastfusion"), TOKENS)
        assert all(call["causal"] is causal and call["mask"] is None for call in calls[-2:])
        del calls[:]
    model = build(tr.WhisperModel, tr.WhisperConfig(**{**WHISPER, **ENDLESS}))
    inputs = {"input_features": MEL, "decoder_input_ids": IDS}
    assert_same(model, twin(model, "fastfusion"), inputs)
    assert [call["causal"] for call in calls] == [False, False] + [True, False] * 2
    assert all(call["scale"] == 1.0 for call in calls)  # T7: queries are scaled before


def test_grouped_queries_are_not_repeated(calls: list[dict[str, Any]]) -> None:
    model_class, config, inputs = PADDED["Llama"]
    run(build(model_class, config, "fastfusion"), inputs)
    assert {(call["query"].shape[1], call["key"].shape[1]) for call in calls} == {(4, 2)}


@pytest.mark.parametrize(
    "model_class, config, name",
    [
        (tr.Gemma2Model, tr.Gemma2Config(**LLAMA, head_dim=16, sliding_window=4), "softcap"),
        (tr.GptOssModel, tr.GptOssConfig(**GPT_OSS), "sinks"),
    ],
)
def test_softcap_and_sinks_reach_the_op(
    model_class: Any, config: Any, name: str, calls: list[dict[str, Any]]
) -> None:
    model = build(model_class, config)
    named = twin(model, "fastfusion")
    inputs = {"input_ids": IDS, "attention_mask": RIGHT}
    for given in (inputs, TOKENS):  # without a mask: the causal one
        actual, expected = run(named, given), run(model, given)
        torch.testing.assert_close(actual[RIGHT.bool()], expected[RIGHT.bool()])
    assert calls and all(call[name] is not None for call in calls)
    named(**TOKENS).last_hidden_state.square().sum().backward()
    model(**TOKENS).last_hidden_state.square().sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for n, p in named.named_parameters():
        if n in expected:
            torch.testing.assert_close(p.grad, expected[n], rtol=1e-3, atol=1e-4)


class Attention(nn.Module):
    """A module with an attention of its own, and no eager function."""

    is_causal = False


QKV = [torch.randn(2, 4, 6, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_a_paged_cache_is_refused_by_name() -> None:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    cache = PagedAttentionCache.__new__(PagedAttentionCache)
    with pytest.raises(NotImplementedError, match="no paged cache"):
        integration.attention(Attention(), *QKV, None, cache=cache)


def test_weights_of_a_module_without_eager_function() -> None:
    module = Attention().eval()
    exact, _ = integration.attention(module, *QKV, None, scaling=0.5)
    out, weights = integration.attention(module, *QKV, None, scaling=0.5, output_attentions=True)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6))
    causal, _ = integration.attention(
        module, *QKV, None, is_causal=True, output_attentions=True, position_bias=torch.ones(6)
    )
    torch.testing.assert_close(causal, integration.attention(module, *QKV, None, is_causal=True)[0])
    more = {"softcap": 2.0, "s_aux": torch.linspace(-1.0, 3.0, 4)}
    bent, weights = integration.attention(module, *QKV, None, output_attentions=True, **more)
    torch.testing.assert_close(bent, integration.attention(module, *QKV, None, **more)[0])
    assert weights.shape == (2, 4, 6, 6) and (weights.sum(-1) < 1).all()


def test_a_filled_static_cache_is_not_seen() -> None:
    """More keys than queries, no mask and a causal module: the rest of the cache is empty."""
    query, key, value = QKV
    out, _ = integration.attention(Attention(), query[:, :, :4], key, value, None, is_causal=True)
    expected = ff.scaled_dot_product_attention(
        query[:, :, :4], key[:, :, :4], value[:, :, :4], is_causal=True
    )
    assert torch.equal(out, expected.transpose(1, 2)) and out.is_contiguous()


def test_dropout_is_for_training() -> None:
    module = Attention()
    dropped, _ = integration.attention(module.train(), *QKV, None, dropout=0.5)
    kept, _ = integration.attention(module.eval(), *QKV, None, dropout=0.5)
    plain, _ = integration.attention(module, *QKV, None)
    assert torch.equal(kept, plain) and not torch.allclose(dropped, plain)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype: torch.dtype) -> None:
    model = build(*text("Bert"))
    inputs = {"input_ids": IDS, "attention_mask": RIGHT}
    exact, keep = run(twin(model, "sdpa").double(), inputs), RIGHT.bool()
    model = model.to(dtype)
    for other in (twin(model, "fastfusion"), ff.accelerate(copy.deepcopy(model))):
        assert_accurate(run(other, inputs)[keep], exact[keep], run(model, inputs)[keep])


# ---- training


@pytest.mark.parametrize("name", ("BERT", "T5", "Llama"))
def test_gradients(name: str) -> None:
    """Of all weights, T5's position bias among them, and one step of an optimiser."""
    model_class, config, inputs = PADDED[name]
    inputs = {**inputs, "attention_mask": RIGHT}
    model = build(model_class, config)
    other = ff.accelerate(copy.deepcopy(model))
    exact = twin(model, "sdpa").double()
    weights = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)) * RIGHT[..., None]
    for each in (model, other, exact):
        (each(**inputs).last_hidden_state * weights).sum().backward()
    compared = 0
    for (key, a), b, e in zip(
        other.named_parameters(), model.parameters(), exact.parameters(), strict=True
    ):
        if b.grad is None:
            assert a.grad is None, key
            continue
        if float(e.grad.norm()) < 1e-9:  # of keys' biases: rounding alone
            continue
        assert_accurate(a.grad.flatten()[None], e.grad.flatten()[None], b.grad.flatten()[None])
        compared += 1
    assert compared > 10
    before = run(other, inputs)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert not torch.equal(run(other, inputs), before)


# ---- the swap of a model


def test_models_that_share_a_configuration() -> None:
    """One configuration, one implementation: as long as any of them is accelerated."""
    config = copy.deepcopy(text("Bert")[1])
    first, second = (tr.BertModel._from_config(config, attn_implementation="sdpa") for _ in "ab")
    assert first.config is second.config
    ff.accelerate(first)
    ff.accelerate(second)
    ff.restore(first)
    assert second.config._attn_implementation == "fastfusion"
    ff.restore(second)
    assert second.config._attn_implementation == "sdpa"


def test_what_was_chosen_by_hand_stays() -> None:
    model_class, config = text("Bert")
    model = build(model_class, config, "fastfusion")
    ff.restore(ff.accelerate(model))
    assert model.config._attn_implementation == "fastfusion"
    model = ff.accelerate(build(model_class, config))
    model.config._attn_implementation = "sdpa"
    assert ff.restore(model).config._attn_implementation == "sdpa"


def test_flash_attention_stays_and_is_named() -> None:
    model = build(*text("Bert"))
    model.config._attn_implementation_internal = "flash_attention_2"
    report = ff.accelerate(model).fastfusion_report
    assert [row.reason for row in report.kept if row.name == ""] == [
        "attn_implementation='flash_attention_2' was chosen for it"
    ]
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("name", ("BERT", "BART", "Llama", "T5"))
def test_restore_gives_back_the_same_bits(name: str) -> None:
    model_class, config, inputs = PADDED[name]
    inputs = {**inputs, "attention_mask": RIGHT}
    for attention in ("eager", "sdpa"):
        model = build(model_class, config, attention)
        keys, before = [*model.state_dict()], run(model, inputs)
        ff.accelerate(model)
        assert [*model.state_dict()] == keys
        assert model.config._attn_implementation in (attention, "fastfusion")
        ff.restore(model)
        assert torch.equal(run(model, inputs), before)
        assert model.config._attn_implementation == attention


def test_each_model_in_a_model_has_its_own_attention() -> None:
    config = tr.CLIPConfig(
        text_config={**TEXT, "eos_token_id": 2}, vision_config=IMAGE, projection_dim=16
    )
    model = build(tr.CLIPModel, config)
    ff.accelerate(model.vision_model)
    assert model.config.vision_config._attn_implementation == "fastfusion"
    assert model.config.text_config._attn_implementation == "eager"
    inputs = {"input_ids": IDS, "attention_mask": RIGHT, "pixel_values": PIXELS}
    report = ff.accelerate(model, example_inputs=inputs).fastfusion_report
    assert {row.name for row in report.swapped if "implementation" in row.target} == {
        "text_model", "vision_model",
    }  # fmt: skip
    assert not report.kept
    ff.restore(model)
    assert model.config.vision_config._attn_implementation == "eager"


def test_a_backbone_without_attention() -> None:
    """DETR's ResNet, for which `sdpa` by name raises."""
    config = tr.DetrConfig(
        **{k: v for k, v in SEQ2SEQ.items() if "position" not in k and "vocab" not in k},
        use_timm_backbone=False, use_pretrained_backbone=False, num_queries=5,
        backbone_config=tr.ResNetConfig(**RESNET),
    )  # fmt: skip
    model = build(tr.DetrModel, config)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 64, 64, dtype=torch.long)
    mask[1, :, 40:] = 0
    inputs = {"pixel_values": pixels, "pixel_mask": mask}
    other = ff.accelerate(copy.deepcopy(model), example_inputs=inputs)
    assert_same(model, other, inputs)
    assert not other.fastfusion_report.kept
    with torch.no_grad():
        a, b = (m(**inputs, output_attentions=True) for m in (other, model))
    for field in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert len(a[field]) == len(b[field]) == 2
        for x, y in zip(a[field], b[field], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_attention_that_was_not_reached_is_named() -> None:
    model = build(tr.BertModel, tr.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True))
    report = ff.accelerate(model, example_inputs=TOKENS).fastfusion_report
    assert {row.name for row in report.kept} >= {
        f"encoder.layer.{i}.crossattention.self" for i in range(2)
    }
    assert all("did not come to it" in row.reason for row in report.kept)


# ---- compiled programs


def test_compiled() -> None:
    model = build(*text("Bert"))
    torch._dynamo.reset()
    compiled = torch.compile(twin(model, "fastfusion"), backend="eager", fullgraph=True)
    assert_same(model, compiled, {"input_ids": IDS, "attention_mask": RIGHT}, tokens=RIGHT)


def test_round_trip_to_disk(tmp_path: Any) -> None:
    """The name is no part of a checkpoint, and can be given when it is loaded."""
    model = ff.accelerate(build(*text("Bert")))
    model.save_pretrained(tmp_path)
    assert "fastfusion" not in (tmp_path / "config.json").read_text()
    loaded = tr.BertModel.from_pretrained(tmp_path, attn_implementation="fastfusion").eval()
    inputs = {"input_ids": IDS, "attention_mask": RIGHT}
    assert loaded.config._attn_implementation == "fastfusion"
    assert_same(ff.restore(model), loaded, inputs, tokens=RIGHT)
