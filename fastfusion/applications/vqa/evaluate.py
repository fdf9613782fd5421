"""Answers to the questions of a split, and how many are right."""

import torch
from torch import Tensor

from fastfusion.applications.vqa.model import GRID, EasyVQA, QuestionOnly
from fastfusion.data.easy_vqa import Split, drawn
from fastfusion.models.parts import to_float


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


def accuracy(predicted: Tensor, split: Split) -> float:
    """The share of right answers, from 0 to 1."""
    return (predicted == split.answer).double().mean().item()
