"""A fusion layer as ONNX: exported at some lengths, run by onnxruntime at others."""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch.export import Dim

import fastfusion as ff

torch.manual_seed(0)
model = ff.nn.CrossModalAttention(visual_dim=96, text_dim=64, num_heads=4).eval()
regions, words = torch.randn(2, 36, 96), torch.randn(2, 12, 64)

with tempfile.TemporaryDirectory() as folder:
    path = str(Path(folder) / "fusion.onnx")
    shapes = ({0: Dim("batch"), 1: Dim("regions")}, {0: Dim("batch"), 1: Dim("words")})
    torch.onnx.export(
        model, (regions, words), path, dynamo=True, opset_version=23, verbose=False,
        input_names=["regions", "words"], dynamic_shapes=shapes,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path)

regions, words = torch.randn(1, 50, 96), torch.randn(1, 7, 64)
with torch.no_grad():
    expected = model(regions, words)
found = session.run(None, {"regions": regions.numpy(), "words": words.numpy()})
for name, ours, theirs in zip(("regions", "words"), expected, found, strict=False):
    difference = (ours - torch.from_numpy(theirs)).abs().max()
    print(f"{name} {theirs.shape}: largest difference {difference:.1e}")
