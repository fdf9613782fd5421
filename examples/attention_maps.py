"""What a model looked at: the weights of its layers, and sums over them that need no weights."""

import math

import torch

import fastfusion as ff

torch.manual_seed(0)
model = ff.nn.CrossModalAttention(visual_dim=96, text_dim=64, num_heads=4).eval()
regions, words = torch.randn(1, 36, 96), torch.randn(1, 12, 64)

# The weights themselves, out of an unchanged model: by names of layers, "" is the model.
with ff.attention_maps(model) as maps, torch.no_grad():
    model(regions, words)
of_regions, of_words = maps[""]
print("weights of regions on words", tuple(of_regions.shape))
print("weights of words on regions", tuple(of_words.shape))

# For long sequences: how much each key is looked at, how sharply each query looks, and where.
query, key = torch.randn(1, 4, 2000, 24), torch.randn(1, 4, 5000, 24)
found = ff.attention_statistics(query, key, what=("mass", "entropy", "topk"), k=3)
print("mass", tuple(found.mass.shape), f"in all {found.mass[0, 0].sum():.0f}, one per query")
print(f"entropy {found.entropy.mean():.2f}, of {math.log(5000):.2f} where all keys are alike")
print("the first query looks most at", found.keys[0, 0, 0].tolist())
