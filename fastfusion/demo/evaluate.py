"""Accuracy over a split, and the latency of models side by side."""

import copy
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from fastfusion.demo.data import Split, drawn
from fastfusion.demo.model import GRID, EasyVQA, QuestionOnly
from fastfusion.quantization import QuantizationReport, quantize


def to_float(images: Tensor) -> Tensor:
    """uint8 pixels to float32 from 0 to 1."""
    return images.to(torch.float32) / 255


def shape_tokens(images: Tensor) -> Tensor:
    """The tokens whose 8x8 pixels hold a part of the shape: bool (n, 64) of uint8 images."""
    size = images.shape[-1] // GRID
    cells = drawn(images).unflatten(1, (GRID, size)).unflatten(3, (GRID, size))
    return cells.any(dim=4).any(dim=2).flatten(1)


@torch.inference_mode()
def predict(model: EasyVQA, split: Split, tokens: Tensor, chunk: int = 50) -> Tensor:
    """The answer (questions,) that the model gives to every question of a split.

    Args:
        tokens: int64 (texts, length), the encoded ``split.texts``.
        chunk: images per forward; each is encoded once for all of its questions.
    """
    parts = []
    for first in range(0, len(split.images), chunk):
        images = to_float(split.images[first : first + chunk])
        about = (split.image_index >= first) & (split.image_index < first + chunk)
        logits = model(images, tokens, split.image_index[about] - first, split.text_index[about])
        parts.append(logits.argmax(dim=1))
    return torch.cat(parts)


@torch.inference_mode()
def predict_from_question(model: QuestionOnly, split: Split, tokens: Tensor) -> Tensor:
    """As :func:`predict`, without looking at the images."""
    return model(tokens).argmax(dim=1)[split.text_index]


def quantized(
    model: EasyVQA, weights: str, sample: tuple[Tensor, Tensor]
) -> tuple[EasyVQA, QuantizationReport]:
    """A copy of a model with narrower weights, and how its layers did on a sample of its inputs."""
    narrow = copy.deepcopy(model)
    return narrow, quantize(narrow, weights, example_inputs=sample)


def accuracy(predicted: Tensor, split: Split) -> float:
    """The share of right answers, from 0 to 1."""
    return (predicted == split.answer).double().mean().item()


@torch.inference_mode()
def latencies(calls: dict[str, Callable[[], object]], rounds: int = 40) -> dict[str, float]:
    """The median time of every call in seconds; the calls take turns, so a disturbance hits all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for warming_up in range(5 + rounds):
        for name, call in calls.items():
            start = perf_counter()
            call()
            if warming_up >= 5:
                times[name].append(perf_counter() - start)
    return {name: median(values) for name, values in times.items()}
