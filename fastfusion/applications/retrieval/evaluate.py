"""Whether the right picture of a text, or the right text of a picture, is among the first found."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastfusion.applications.retrieval.model import EmojiRetrieval
from fastfusion.applications.retrieval.subwords import Subwords
from fastfusion.models.parts import to_float

RANKS = (1, 5, 10)
CANDIDATES = 10  # that the re-ranker looks at
CHUNK = 512


@dataclass(frozen=True)
class Encoded:
    """Pictures or texts as they are kept for a search: vectors, tokens and their padding."""

    vectors: Tensor
    tokens: Tensor
    padding: Tensor | None


@torch.inference_mode()
def encode_pictures(model: EmojiRetrieval, pictures: Tensor) -> Encoded:
    """Of uint8 pictures (n, 3, 32, 32)."""
    parts = [model.encode_pictures(to_float(some)) for some in pictures.split(CHUNK)]
    tokens = torch.cat(parts)
    return Encoded(model.transformer.embed_visual(tokens), tokens, None)


@torch.inference_mode()
def encode_texts(model: EmojiRetrieval, subwords: Subwords, texts: Sequence[str]) -> Encoded:
    """Of texts in any language."""
    numbers = subwords.encode(texts, model.text.position.shape[0])
    parts = [model.encode_texts(some) for some in numbers.split(CHUNK)]
    tokens, padding = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    return Encoded(model.transformer.embed_text(tokens, padding), tokens, padding)


@torch.inference_mode()
def scores(model: EmojiRetrieval, texts: Encoded, pictures: Encoded) -> Tensor:
    """What the encoders make of every text (row) with every picture (column)."""
    return model.transformer.similarity(pictures.vectors, texts.vectors).T


@torch.inference_mode()
def rerank(
    model: EmojiRetrieval, found: Tensor, texts: Encoded, pictures: Encoded, *, to_text: bool
) -> Tensor:
    """The scores of `found`, (queries, candidates), with what the re-ranker adds to the best
    `CANDIDATES` of each query, and -inf for all others.

    Args:
        to_text: the queries are pictures, the candidates texts; else the other way round.
    """
    best = found.topk(min(CANDIDATES, found.shape[1]), dim=1).indices
    queries = torch.arange(len(found)).repeat_interleave(best.shape[1])
    picture, text = (queries, best.flatten()) if to_text else (best.flatten(), queries)
    added = torch.cat(
        [
            model.transformer.match(
                pictures.tokens[p],
                texts.tokens[t],
                None,
                None if texts.padding is None else texts.padding[t],
            )
            for p, t in zip(picture.split(CHUNK), text.split(CHUNK), strict=True)
        ]
    ).view_as(best)
    last = torch.full_like(found, -math.inf)
    return last.scatter(1, best, found.gather(1, best) + added)


def recall(scores: Tensor) -> list[float]:
    """The share of queries whose own candidate, that of the same number, is among the first
    `RANKS`; one that scores the same as others stands behind them."""
    own = scores.diagonal().unsqueeze(1)
    rank = (scores >= own).sum(dim=1)
    return [(rank <= first).double().mean().item() for first in RANKS]


def pixel_scores(styles: Sequence[Tensor], pictures: Tensor) -> Tensor:
    """Without a model: how alike a picture is to that of an emoji in other styles, by the
    correlation of their pixels, the best of the styles (rows: emoji, columns: `pictures`).

    Args:
        styles: uint8 (emoji, 3, 32, 32) each.
        pictures: uint8 (n, 3, 32, 32).
    """

    def vectors(some: Tensor) -> Tensor:
        pixels = to_float(some).flatten(1)
        return nn.functional.normalize(pixels - pixels.mean(dim=1, keepdim=True), dim=1)

    return torch.stack([vectors(style) @ vectors(pictures).T for style in styles]).amax(dim=0)
