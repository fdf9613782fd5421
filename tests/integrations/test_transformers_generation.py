"""Generation of accelerated models: the same tokens, with every cache that transformers has."""

import copy
from typing import Any

import pytest
import torch
from transformers_cases import (
    ENDLESS,
    IDS,
    LEFT,
    MEL,
    RIGHT,
    SEQ2SEQ,
    TEXT,
    WHISPER,
    build,
    tr,
    twin,
)

import fastfusion as ff

CAUSAL = {"input_ids": IDS, "attention_mask": LEFT}

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "BART": (
        tr.BartForConditionalGeneration,
        tr.BartConfig(**SEQ2SEQ, **ENDLESS, forced_eos_token_id=None),
        {"input_ids": IDS, "attention_mask": RIGHT},
    ),
    "Marian": (
        tr.MarianMTModel,
        tr.MarianConfig(**SEQ2SEQ, **ENDLESS, forced_eos_token_id=None),
        {"input_ids": IDS, "attention_mask": RIGHT},
    ),
    "Whisper": (
        tr.WhisperForConditionalGeneration,
        tr.WhisperConfig(**{**WHISPER, **ENDLESS}),
        {"input_features": MEL},
    ),
    "T5": (
        tr.T5ForConditionalGeneration,
        tr.T5Config(
            d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=99, **ENDLESS
        ),
        {"input_ids": IDS, "attention_mask": RIGHT},
    ),
    "BERT": (
        tr.BertLMHeadModel,
        tr.BertConfig(**TEXT, **ENDLESS, is_decoder=True),
        CAUSAL,
    ),
    "GPT-2": (
        tr.GPT2LMHeadModel,
        tr.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, **ENDLESS),
        CAUSAL,
    ),
    "Llama": (
        tr.LlamaForCausalLM,
        tr.LlamaConfig(**TEXT, num_key_value_heads=2, **ENDLESS),
        CAUSAL,
    ),
    "Gemma 3": (  # sliding windows, and caches of their length
        tr.Gemma3ForCausalLM,
        tr.Gemma3TextConfig(
            **TEXT, num_key_value_heads=2, head_dim=16, sliding_window=4, **ENDLESS
        ),
        CAUSAL,
    ),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "beam": {"num_beams": 3},
    "no cache": {"num_beams": 1, "use_cache": False},
    "static cache": {"num_beams": 1, "cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens(name: str) -> None:
    model_class, config, inputs = MODELS[name]
    model = build(model_class, config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    accelerated = ff.accelerate(copy.deepcopy(model))
    for way, options in WAYS.items():
        if name == "Whisper" and way == "no cache":
            continue  # its generate insists on a cache
        # Without repetition, so that the order of all scores counts.
        options = {**options, "max_new_tokens": 6, "do_sample": False, "no_repeat_ngram_size": 1}
        expected = model.generate(**inputs, **options)
        assert all(len({*row[-6:].tolist()}) == 6 for row in expected)
        assert torch.equal(accelerated.generate(**inputs, **options), expected), way
        if way == "greedy":
            named = twin(model, "fastfusion")
            assert torch.equal(named.generate(**inputs, **options), expected)


def test_scores_and_weights_of_generation() -> None:
    model_class, config, inputs = MODELS["BART"]
    model = build(model_class, config)
    model.generation_config.eos_token_id = None
    options = dict(
        max_new_tokens=4, num_beams=1, do_sample=False, output_scores=True, output_attentions=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    expected = model.generate(**inputs, **options)
    actual = ff.accelerate(copy.deepcopy(model)).generate(**inputs, **options)
    for a, b in zip(actual.scores, expected.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for field in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert len(actual[field]) == len(expected[field]) > 0
    for a, b in zip(actual.cross_attentions, expected.cross_attentions, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
