#!/usr/bin/env bash
# transformers 5.23.0: BLIP's text models take encoder_attention_mask and lose it. BlipTextLayer hands it to its
# cross-attention as attention_mask, beside encoder_hidden_states; BlipTextSelfAttention reads
# encoder_attention_mask there, which is None. Patches that are hidden are attended.
# Seen: hiding 5 of 9 patches changes nothing; leaving them out does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel

torch.manual_seed(0)
config = BlipTextConfig(
    hidden_size=32, encoder_hidden_size=32, num_attention_heads=4, intermediate_size=64,
    num_hidden_layers=1, vocab_size=100, bos_token_id=1, sep_token_id=2, is_decoder=True,
)
model = BlipTextModel(config, add_pooling_layer=False).eval()
words, patches = torch.randint(3, 100, (1, 5)), torch.randn(1, 9, 32)


def run(patches, mask):
    with torch.no_grad():
        return model(
            input_ids=words, encoder_hidden_states=patches, encoder_attention_mask=mask
        ).last_hidden_state


everything = torch.ones(1, 9, dtype=torch.long)
four = everything.clone()
four[:, 4:] = 0
seen = run(patches, everything)
masked = float((run(patches, four) - seen).abs().max())
left_out = float((run(patches[:, :4], everything[:, :4]) - seen).abs().max())
print(f"hiding 5 of 9 patches changes {masked}, leaving them out {left_out:.4f}")
assert masked == 0.0 and left_out > 1e-3, (masked, left_out)
PYTHON
