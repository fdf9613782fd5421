"""A model written with torch.nn, and the one line that changes: the same weights and answers."""

from statistics import median
from time import perf_counter

import torch
from torch import Tensor

import fastfusion.nn as ffnn


class Classifier(torch.nn.Module):
    """A text classifier, made with either library of layers."""

    def __init__(self, nn) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 256)
        layer = nn.TransformerEncoderLayer(256, 8, 1024, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(256, 10)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        x = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        return self.head(x[:, 0])


def milliseconds(model: torch.nn.Module, *inputs: Tensor) -> float:
    times = []
    for _ in range(20):
        start = perf_counter()
        model(*inputs)
        times.append(perf_counter() - start)
    return 1e3 * median(times)


torch.manual_seed(0)
theirs = Classifier(torch.nn).eval()
ours = Classifier(ffnn).eval()
print(ours.load_state_dict(theirs.state_dict()))  # the same names

tokens = torch.randint(1000, (4, 32))
padding = torch.arange(32) >= torch.tensor([[32], [20], [9], [5]])
with torch.no_grad():
    difference = (theirs(tokens, padding) - ours(tokens, padding)).abs().max()
    before, after = milliseconds(theirs, tokens, padding), milliseconds(ours, tokens, padding)
print(f"largest difference {difference:.1e}")
print(f"torch.nn {before:.2f} ms, fastfusion.nn {after:.2f} ms")
