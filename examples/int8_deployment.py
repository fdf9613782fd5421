"""A trained model with weights of 8-bit integers: how far off, saved, and loaded elsewhere."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model

import fastfusion as ff


def build() -> torch.nn.Module:
    layer = ff.nn.TransformerEncoderLayer(256, 8, 1024, activation="gelu", batch_first=True)
    return ff.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()


torch.manual_seed(0)
model = build()  # trained, one hopes
x = torch.randn(1, 20, 256)
with torch.no_grad():
    before = model(x)
    # Layers are compared on the example; one that deviates too much would stay as it is.
    report = ff.quantize(model, "int8", example_inputs=x)
    after = model(x)
print("\n".join(str(report).splitlines()[:3]))
print(str(report).splitlines()[-1])
similarity = torch.cosine_similarity(before, after, dim=-1).min()
print(f"cosine similarity of a token's output, at worst {similarity:.4f}")

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.safetensors"
    save_model(model, str(path))
    print(f"file of {path.stat().st_size / 1e6:.1f} MB")
    other = build()  # another process, another machine: any weights, the same shape
    ff.quantize(other, "int8")
    load_model(other, str(path))
    with torch.no_grad():
        print("the same bits after loading:", torch.equal(other(x), after))
