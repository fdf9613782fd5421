"""Models by name: their constructors, inputs of a given length, and configurations in files."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastfusion.models.captioning import END, CaptioningTransformer
from fastfusion.models.retrieval import RetrievalTransformer
from fastfusion.models.sentiment import SentimentTransformer
from fastfusion.models.vqa import VQATransformer

Sizes = Mapping[str, Any]


@dataclass(frozen=True)
class Builder:
    """How a model is built and called.

    Attributes:
        model: the class.
        arguments: from sizes (width, num_heads, dim_feedforward, num_layers) and a shape
            (visual_len, text_len, batch, classes) to those of the constructor.
        inputs: from a width and a shape to example inputs of ``forward``.
        call: with these, what one use of the model is, of which the latency counts.
    """

    model: type[nn.Module]
    arguments: Callable[[Sizes, Sizes], dict[str, Any]]
    inputs: Callable[[int, Sizes], list[Any]]
    call: Callable[..., Any] = lambda model, *inputs: model(*inputs)


def _vqa(sizes: Sizes, shape: Sizes) -> dict[str, Any]:
    rest = {name: sizes[name] for name in ("num_heads", "dim_feedforward", "num_layers")}
    width = sizes["width"]
    return {"visual_dim": width, "text_dim": width, **rest, "num_classes": shape["classes"]}


def _retrieval(sizes: Sizes, shape: Sizes) -> dict[str, Any]:
    arguments = _vqa(sizes, shape)
    del arguments["num_classes"]
    return {**arguments, "embedding_dim": sizes["width"]}


def _sentiment(sizes: Sizes, shape: Sizes) -> dict[str, Any]:
    arguments = _vqa(sizes, shape)
    del arguments["visual_dim"]
    return {**arguments, "audio_dim": sizes["width"], "video_dim": sizes["width"]}


def _three(width: int, shape: Sizes) -> list[Any]:
    """Text, and as many frames of sound as of pictures."""
    video, text = _both(width, shape)
    return [text, torch.randn_like(video), video]


def _both(width: int, shape: Sizes) -> list[Any]:
    return [torch.randn(shape["batch"], shape[n], width) for n in ("visual_len", "text_len")]


def _captioning(sizes: Sizes, shape: Sizes) -> dict[str, Any]:
    rest = {name: sizes[name] for name in ("width", "num_heads", "dim_feedforward")}
    layers = dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), sizes["num_layers"])
    return {**rest, **layers, "words": shape["classes"], "max_length": shape["text_len"] + 1}


def _image_and_words(width: int, shape: Sizes) -> list[Any]:
    words = torch.full((shape["batch"], shape["text_len"]), END)
    return [torch.randn(shape["batch"], shape["visual_len"], width), words]


def _write(model: Any, visual: Tensor, words: Tensor) -> Any:
    """A caption of as many words by the cached search, none of which ends it."""
    with torch.no_grad():
        model.output.bias[END] = -1e9
    return model.generate(visual, max_length=words.shape[1])


BUILDERS: dict[str, Builder] = {
    "vqa": Builder(VQATransformer, _vqa, _both),
    "retrieval": Builder(RetrievalTransformer, _retrieval, _both),
    "sentiment": Builder(SentimentTransformer, _sentiment, _three),
    "captioning": Builder(CaptioningTransformer, _captioning, _image_and_words, _write),
}


def from_config(config: str | Path | Mapping[str, Any]) -> nn.Module:
    """A model with random weights, as ``python -m fastfusion fit`` has found it.

    Its weights are float32, to be trained; `ff.quantize(model, config["precision"])` makes them
    what the latency was measured with.

    Args:
        config: the file, or what is in it: ``model``, a name, and ``arguments`` of its constructor.

    Raises:
        ValueError: no such model, or a file of another form.
    """
    content: Any = config
    if not isinstance(config, Mapping):
        content = json.loads(Path(config).read_text())
    if not isinstance(content, Mapping) or not {"model", "arguments"} <= set(content):
        raise ValueError("a configuration has `model` and `arguments`")
    name = content["model"]
    if name not in BUILDERS:
        raise ValueError(f"model must be one of {', '.join(BUILDERS)}, got {name!r}")
    return BUILDERS[name].model(**content["arguments"])
