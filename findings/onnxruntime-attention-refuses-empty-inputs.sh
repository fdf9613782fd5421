#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU) refuses an empty batch, no queries and no keys in the Attention operator (opset 23).
# The formula that the standard defines it by (MatMul, Softmax, MatMul) runs on the same inputs in the same
# runtime. A server that batches what came in since the last call meets the first of them when nothing came.
# Seen: plain operators run on all three, Attention on none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$folder/env/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime as ort
from onnx import parser


def session(body):
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> attention'
        "(float[B, H, L, D] q, float[B, H, S, D] k) => (float[B, H, L, D] y) {" + body + "}"
    )
    onnx.checker.check_model(model)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


plain = session(
    "t = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, t) p = Softmax<axis = -1>(s) "
    "y = MatMul(p, k)"
)
fused = session("y = Attention(q, k, k)")
seen = []
for batch, q_len, kv_len in ((2, 3, 5), (0, 3, 5), (2, 0, 5), (2, 3, 0)):
    feed = {
        "q": np.ones((batch, 2, q_len, 4), np.float32),
        "k": np.ones((batch, 2, kv_len, 4), np.float32),
    }
    assert plain.run(None, feed)[0].shape == (batch, 2, q_len, 4)
    try:
        fused.run(None, feed)
        seen.append(True)
    except Exception as error:
        print((batch, q_len, kv_len), "refused:", str(error).splitlines()[0][-100:])
        seen.append(False)
assert seen == [True, False, False, False], seen
PYTHON
