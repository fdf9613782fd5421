"""Someone else's model made faster in place, with the proof that it still computes the same."""

import torch
from torch import Tensor, nn

import fastfusion as ff


class TheirModel(nn.Module):
    """Written with torch.nn, by somebody who has never heard of fastfusion."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(384, 6, 1536, activation="gelu", batch_first=True)
        self.embed = nn.Linear(128, 384)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 10))

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(features)))


torch.manual_seed(0)
model = TheirModel().eval()
features = torch.randn(1, 20, 128)
with torch.no_grad():
    before = model(features)

ff.accelerate(model, example_inputs=features)
print(model.fastfusion_report)

ff.restore(model)
with torch.no_grad():
    print("restored, the same bits:", torch.equal(model(features), before))
