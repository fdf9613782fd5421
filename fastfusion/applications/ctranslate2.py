"""Models in the files of CTranslate2, and Whisper out of them.

A `model.bin` of version 6 is, in little endian: the version, the name of the kind of model, its
revision, and the number of variables; of each its name, the number of its dimensions (a byte), the
dimensions, a byte for the dtype, and its numbers with their size in bytes before them; then names
that mean another variable. Counts take four bytes; a text is its size in two, and ends with a 0.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfusion.core.extras import TRANSFORMERS, require

VERSION = 6
_DTYPES = (
    torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16,
)  # fmt: skip


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, path.read_bytes(), 0

    def number(self, format: str = "I") -> int:
        (value,) = struct.unpack_from(f"<{format}", self.bytes(struct.calcsize(f"<{format}")))
        return int(value)

    def text(self) -> str:
        return self.bytes(self.number("H")).rstrip(b"\0").decode()

    def bytes(self, size: int) -> bytes:
        part = self.data[self.at : self.at + size]
        if len(part) < size:
            raise ValueError(f"{self.path} ends after {len(self.data)} bytes, within a variable")
        self.at += size
        return part


def read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The kind of model in a `model.bin`, and its variables by name.

    Raises:
        ValueError: a file of another version, or none of this kind.
    """
    reader = _Reader(path)
    version = reader.number()
    if version != VERSION:
        raise ValueError(f"{path} must be of CTranslate2's version {VERSION}, got {version}")
    kind = reader.text()
    reader.number()  # the revision of the kind, which has changed no name of Whisper's
    variables: dict[str, Tensor] = {}
    for _ in range(reader.number()):
        name = reader.text()
        shape = [reader.number() for _ in range(reader.number("B"))]
        dtype = reader.number("B")
        if dtype >= len(_DTYPES):
            raise ValueError(f"{path}: {name} is of dtype {dtype}, which is not known")
        # A copy, since the numbers of a file are not aligned.
        numbers = np.frombuffer(bytearray(reader.bytes(reader.number())), np.uint8)
        variables[name] = torch.from_numpy(numbers).view(_DTYPES[dtype]).reshape(shape)
    for _ in range(reader.number()):
        name = reader.text()
        variables[name] = variables[reader.text()]
    return kind, variables


def whisper(folder: Path) -> tuple[Any, Any]:
    """Whisper in float32, and its tokenizer.

    Args:
        folder: with `model.bin` in a floating dtype, `config.json` and `tokenizer.json`.

    Returns:
        A `transformers.WhisperForConditionalGeneration` in eval mode, whose `generation_config`
        has the special tokens and, as `config.json`, those that it must not say; and a
        `tokenizers.Tokenizer`.

    Raises:
        MissingExtra: transformers is not installed.
        ValueError: a file of another kind.
    """
    transformers = require("transformers", TRANSFORMERS)
    tokenizers = require("tokenizers", TRANSFORMERS)
    kind, variables = read(folder / "model.bin")
    if kind != "WhisperSpec":
        raise ValueError(f"{folder / 'model.bin'} must be a WhisperSpec, got {kind}")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in _SPECIAL}
    special = {
        "decoder_start_token_id": ids["startoftranscript"],
        "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["endoftext"],
        "pad_token_id": ids["endoftext"],
    }
    config = transformers.WhisperConfig(**_sizes(variables), **special)
    model = transformers.WhisperForConditionalGeneration(config)
    model.load_state_dict({name: t.float() for name, t in _renamed(variables).items()})
    model.tie_weights()

    texts = json.loads((folder / "config.json").read_text())
    model.generation_config = transformers.GenerationConfig(
        **special,
        max_length=config.max_target_positions,
        no_timestamps_token_id=ids["notimestamps"],
        suppress_tokens=texts["suppress_ids"],
        begin_suppress_tokens=texts["suppress_ids_begin"],
        is_multilingual=False,
        return_timestamps=False,
    )
    return model.eval(), tokenizer


_SPECIAL = ("startoftranscript", "endoftext", "notimestamps")


def _layers(variables: dict[str, Tensor], stack: str) -> int:
    names = {name.split("/")[1] for name in variables if name.startswith(f"{stack}/")}
    return sum(name.startswith("layer_") and name != "layer_norm" for name in names)


def _sizes(variables: dict[str, Tensor]) -> dict[str, int]:
    """What a `WhisperConfig` takes of them."""
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    sizes = {
        "vocab_size": vocabulary,
        "d_model": width,
        "num_mel_bins": variables["encoder/conv1/weight"].shape[1],
        "max_source_positions": len(variables["encoder/position_encodings/encodings"]),
        "max_target_positions": len(variables["decoder/position_encodings/encodings"]),
    }
    for stack in ("encoder", "decoder"):
        sizes |= {
            f"{stack}_layers": _layers(variables, stack),
            f"{stack}_attention_heads": int(variables[f"{stack}/num_heads"]),
            f"{stack}_ffn_dim": len(variables[f"{stack}/layer_0/ffn/linear_0/bias"]),
        }
    return sizes


def _renamed(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The variables under transformers' names; projections that lie side by side here, apart.

    Raises:
        ValueError: keys that have a bias, which Whisper's have not.
    """
    found: dict[str, Tensor] = {}

    def linear(target: str, source: str) -> None:
        found[f"{target}.weight"] = variables[f"{source}/weight"]
        found[f"{target}.bias"] = variables[f"{source}/bias"]

    def norm(target: str, source: str) -> None:
        found[f"{target}.weight"] = variables[f"{source}/gamma"]
        found[f"{target}.bias"] = variables[f"{source}/beta"]

    def side_by_side(target: str, source: str, names: str) -> None:
        weights, biases = (
            variables[f"{source}/{part}"].chunk(len(names)) for part in ("weight", "bias")
        )
        for name, weight, bias in zip(names, weights, biases, strict=True):
            found[f"{target}.{name}_proj.weight"] = weight
            if name != "k":
                found[f"{target}.{name}_proj.bias"] = bias
            elif bias.any():
                raise ValueError(f"{source}/bias must be 0 for the keys, as Whisper's are")

    for name in ("conv1", "conv2"):
        linear(f"model.encoder.{name}", f"encoder/{name}")
    for stack in ("encoder", "decoder"):
        positions = variables[f"{stack}/position_encodings/encodings"]
        found[f"model.{stack}.embed_positions.weight"] = positions
        norm(f"model.{stack}.layer_norm", f"{stack}/layer_norm")
        for i in range(_layers(variables, stack)):
            target, source = f"model.{stack}.layers.{i}", f"{stack}/layer_{i}"
            side_by_side(f"{target}.self_attn", f"{source}/self_attention/linear_0", "qkv")
            linear(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            if stack == "decoder":
                linear(f"{target}.encoder_attn.q_proj", f"{source}/attention/linear_0")
                side_by_side(f"{target}.encoder_attn", f"{source}/attention/linear_1", "kv")
                linear(f"{target}.encoder_attn.out_proj", f"{source}/attention/linear_2")
                norm(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
            linear(f"{target}.fc1", f"{source}/ffn/linear_0")
            linear(f"{target}.fc2", f"{source}/ffn/linear_1")
            norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
    embedding = variables["decoder/embeddings/weight"]
    found["model.decoder.embed_tokens.weight"] = found["proj_out.weight"] = embedding
    return found
