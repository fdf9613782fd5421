#!/usr/bin/env bash
# OpenVINO 2026.4.1 (CPU): scaled_dot_product_attention with causal=True ignores its attention_mask, without a
# word. The operation takes both inputs, the model compiles, and masked keys are attended. A padding mask beside
# the causal one, as every batched decoder has it, is lost.
# Seen: the difference that the mask makes is 0 with causal=True, and not without.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet openvino==2026.4.1 numpy==2.4.6
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
import openvino as ov
from openvino import opset13 as ops

generator = np.random.default_rng(0)
tokens = generator.standard_normal((1, 1, 4, 8)).astype(np.float32)


def run(causal, mask):
    operands = [ops.parameter([1, 1, 4, 8], np.float32) for _ in range(3)]
    hidden = ops.parameter([1, 1, 4, 4], bool)
    result = ops.scaled_dot_product_attention(*operands, hidden, causal=causal)
    compiled = ov.Core().compile_model(
        ov.Model([result], [*operands, hidden]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return compiled([tokens, tokens, tokens, mask])[0]


everything = np.ones((1, 1, 4, 4), bool)
without_the_first = everything.copy()
without_the_first[..., 0] = False
without_the_first[0, 0, 0, 0] = True  # no row loses all of its keys
seen = {c: float(abs(run(c, everything) - run(c, without_the_first)).max()) for c in (False, True)}
print("what the mask changes, without and with causal=True:", seen)
assert seen[False] > 0.1 and seen[True] == 0.0, seen
PYTHON
