"""Generation of accelerated models: the same tokens, with every cache that transformers has."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from suite import DEVICE
from torch import Tensor
from transformers_cases import (
    ENDLESS,
    IDS,
    LEFT,
    MEL,
    RIGHT,
    SEQ2SEQ,
    TEXT,
    WHISPER,
    Lora,
    build,
    one_thread,  # noqa: F401
    tr,
    twin,
)

import fastfusion as ff
from fastfusion.integrations.transformers import _decoders

CAUSAL = {"input_ids": IDS, "attention_mask": LEFT}

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "BART": (
        tr.BartForConditionalGeneration,
        tr.BartConfig(**SEQ2SEQ, **ENDLESS, forced_eos_token_id=None, scale_embedding=True),
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


# Models whose decoder layers are one call behind the first tokens.
IN_ONE_CALL = ("BART", "Marian", "Whisper")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a decoder layer that comes so far, whether the op ran."""
    seen: list[bool] = []

    def spy(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        seen.append(result is not None)
        return result

    original = _decoders._Parts.decode
    monkeypatch.setattr(_decoders._Parts, "decode", spy)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens(name: str, ran: list[bool]) -> None:
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
        del ran[:]
        assert torch.equal(accelerated.generate(**inputs, **options), expected), way
        if DEVICE == "cpu" and name in IN_ONE_CALL and way != "no cache":
            assert ran == [False] * 2 + [True] * 10
        if way == "greedy":
            named = twin(model, "fastfusion")
            assert torch.equal(named.generate(**inputs, **options), expected)


class Decoding:
    """A model and its cache, given tokens by hand."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.states = model.get_encoder()(input_ids=IDS, attention_mask=RIGHT)
        self.cache = tr.EncoderDecoderCache(tr.DynamicCache(), tr.DynamicCache())

    def __call__(self, *tokens: int, mask: Tensor | None = None) -> Tensor:
        """Logits for the tokens, the same for both sequences."""
        ids = torch.tensor([tokens, tokens])
        with torch.no_grad():
            output = self.model(
                encoder_outputs=self.states, attention_mask=RIGHT, decoder_input_ids=ids,
                past_key_values=self.cache, use_cache=True, decoder_attention_mask=mask,
            )  # fmt: skip
        return output.logits


@pytest.fixture
def pair() -> Iterator[tuple[Decoding, Decoding]]:
    """A model as it was and accelerated, behind the same first token."""
    model_class, config, _ = MODELS["BART"]
    model = build(model_class, config)
    with torch.no_grad():
        found = Decoding(model), Decoding(ff.accelerate(copy.deepcopy(model)))
    for each in found:
        each(1)
    yield found


def agree(pair: tuple[Decoding, Decoding], *tokens: int, mask: Tensor | None = None) -> None:
    expected, actual = (each(*tokens, mask=mask) for each in pair)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_caches_may_be_changed_between_tokens(
    pair: tuple[Decoding, Decoding], ran: list[bool]
) -> None:
    agree(pair, 5)
    agree(pair, 6)
    for each in pair:  # a token is taken back
        each.cache.crop(-1)
    agree(pair, 7)
    for each in pair:  # both sequences go on from the second
        each.cache.reorder_cache(torch.tensor([1, 1]))
    agree(pair, 8)
    agree(pair, 9, 10)
    lengths = {each.cache.get_seq_length() for each in pair}
    assert lengths == {6} and ran == [True] * 10
    for a, b in zip(*(each.cache.self_attention_cache.layers for each in pair), strict=True):
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-5)


def test_more_tokens_than_there_was_room_for(
    pair: tuple[Decoding, Decoding], ran: list[bool]
) -> None:
    for token in range(3, 3 + 2 * _decoders._SPARE - 20):
        agree(pair, token)
    assert all(ran)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_narrow_keys_of_a_memory_follow_the_cache(weights: str, ran: list[bool]) -> None:
    model_class, config, _ = MODELS["BART"]
    model = ff.accelerate(build(model_class, config), weights=weights)
    with torch.no_grad():
        kept, anew = Decoding(model), Decoding(model)

    def step(*tokens: int) -> Tensor:
        for layer in anew.cache.cross_attention_cache.layers:
            layer.__dict__.pop(_decoders._NARROW, None)
        logits = kept(*tokens)
        assert torch.equal(logits, anew(*tokens))
        return logits

    step(1)
    del ran[:]
    step(5)
    for each in (kept, anew):
        each.cache.crop(-1)
        each.cache.reorder_cache(torch.tensor([1, 0]))
    before = step(6)
    for each in (kept, anew):
        each.cache.crop(-1)
        each.cache.reorder_cache(torch.tensor([1, 0]))
    assert not torch.equal(step(6), before)
    if DEVICE == "cpu":
        assert ran == [True] * 12
        for layer in kept.cache.cross_attention_cache.layers:
            assert {t.dtype for t in layer.__dict__[_decoders._NARROW][2]} == {torch.bfloat16}


def test_what_others_hold_of_a_cache_stays(pair: tuple[Decoding, Decoding]) -> None:
    """Two that go on from the same tokens do not disturb each other."""
    agree(pair, 5)
    layers = [each.cache.self_attention_cache.layers[0] for each in pair]
    kept = [layer.keys for layer in layers]
    copies = [k.clone() for k in kept]
    forks = copy.deepcopy(pair[0].cache), copy.deepcopy(pair[1].cache)
    agree(pair, 6)
    for each, fork in zip(pair, forks, strict=True):
        each.cache = fork
    agree(pair, 11)
    for each in pair:
        each.cache.crop(-1)
    agree(pair, 12)
    for now, before in zip(kept, copies, strict=True):
        assert torch.equal(now, before)


def test_what_was_changed_in_a_decoder_layer_stays_in_force(
    pair: tuple[Decoding, Decoding], ran: list[bool]
) -> None:
    for each in pair:
        torch.manual_seed(0)
        layer = each.model.get_decoder().layers[0]
        layer.fc1 = Lora(layer.fc1)
    agree(pair, 5)
    for each in pair:
        layer = each.model.get_decoder().layers[1]
        layer.encoder_attn.register_forward_pre_hook(lambda module, args: None)
    agree(pair, 6)
    assert ran == [False, True, False, False]


def test_gradients_of_a_later_token(pair: tuple[Decoding, Decoding], ran: list[bool]) -> None:
    grads = []
    for each in pair:
        output = each.model(
            encoder_outputs=each.states, decoder_input_ids=torch.tensor([[5], [5]]),
            past_key_values=each.cache, use_cache=True,
        )  # fmt: skip
        output.logits.square().sum().backward()
        grads.append(each.model.get_decoder().layers[0].fc1.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    assert not any(ran)
    for each in pair:
        assert each.cache.get_seq_length() == 2


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
