"""Train a small visual question answering model on easy-vqa, in a minute or two.

Usage: python train_fusion.py [images] [epochs]
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastfusion as ff
from fastfusion.data import easy_vqa as data  # easy-vqa as tensors: pip install "fastfusion[demo]"


class Model(nn.Module):
    """Patches of the image and words of the question look at each other."""

    def __init__(self, words: int, answers: int, width: int = 96) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=8, stride=8)
        self.place = nn.Parameter(torch.randn(64, width) * 0.02)
        self.words = nn.Embedding(words, width, padding_idx=0)
        self.fuse = ff.nn.CrossModalAttention(width, width, num_heads=4)
        self.head = nn.Linear(2 * width, answers)

    def forward(self, images: Tensor, question: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2) + self.place
        padding = question == 0
        patches, words = self.fuse(patches, self.words(question), text_padding_mask=padding)
        return self.head(torch.cat([patches.mean(1), words.amax(1)], -1))


images, epochs = (int(text) for text in [*sys.argv[1:], "1000", "6"][:2])
torch.manual_seed(0)
train, test = data.load("train", images), data.load("test", max(1, images // 4))
vocabulary = data.Vocabulary.of(train.texts)
model = Model(len(vocabulary), len(data.answers()))
optimizer = torch.optim.AdamW(model.parameters(), 2e-3)


def batches(split: data.Split, size: int = 128, shuffle: bool = False):
    questions = vocabulary.encode(split.texts)
    order = torch.randperm(len(split)) if shuffle else torch.arange(len(split))
    for some in order.split(size):
        pictures = split.images[split.image_index[some]].float() / 255 - 0.5
        yield pictures, questions[split.text_index[some]], split.answer[some]


for epoch in range(epochs):
    model.train()
    for pictures, question, answer in batches(train, shuffle=True):
        loss = cross_entropy(model(pictures, question), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = [(model(p, q).argmax(-1) == a).float() for p, q, a in batches(test)]
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {torch.cat(right).mean():.3f}")
