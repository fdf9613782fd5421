#!/usr/bin/env bash
# transformers 5.23.0: the self-attention in BridgeTower's cross-modal layers says is_causal = True. Images and
# words see each other both ways there, and its eager code never looks at the flag. An attention function of the
# public interface that does as transformers' own "sdpa" (no mask: causal where the module says so) is used by the
# model without a word, and each patch of the image sees only those before it.
# Seen: image features by the model's own function under another name are equal, by that of "sdpa" 0.59 apart.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PYTHON'
import copy

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import BridgeTowerConfig, BridgeTowerModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask
from transformers.models.bridgetower.modeling_bridgetower import eager_attention_forward

for name, function in (("own", eager_attention_forward), ("likewise", sdpa_attention_forward)):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, eager_mask)

torch.manual_seed(0)
sizes = dict(hidden_size=64, num_attention_heads=4, intermediate_size=128)
config = BridgeTowerConfig(
    **sizes, num_hidden_layers=2,
    text_config=dict(**sizes, num_hidden_layers=2, vocab_size=100, pad_token_id=0),
    vision_config=dict(hidden_size=64, num_hidden_layers=2, image_size=32, patch_size=8),
)
model = BridgeTowerModel(config).eval()
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.2)
inputs = dict(input_ids=torch.randint(5, 100, (1, 6)), pixel_values=torch.randn(1, 3, 32, 32))


def image(name):
    other = BridgeTowerModel._from_config(copy.deepcopy(config), attn_implementation=name).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        return other(**inputs, pixel_mask=torch.ones(1, 32, 32)).image_features


expected = image("eager")
seen = {name: float((image(name) - expected).abs().max()) for name in ("own", "likewise")}
print("image features differ from eager by", seen)
assert seen["own"] == 0.0 and seen["likewise"] > 0.1, seen
PYTHON
