#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU) refuses masks of the Attention operator (opset 23) that broadcast to the scores: one
# whose query axis is 1, as every key padding mask is, and one whose key axis is 1. The standard allows both
# (ONNX operators, Attention-23, attn_mask: "broadcastable to" the scores), and onnx's own evaluator runs them.
# The model loads; the error comes when it runs, so an exporter that emits what torch computes passes its checks.
# Seen: shapes (2, 1, 3, 5) and (3, 5) run, (2, 1, 1, 5) and (2, 1, 3, 1) do not.
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
from onnx.reference import ReferenceEvaluator

query, key = np.ones((2, 2, 3, 4), np.float32), np.ones((2, 2, 5, 4), np.float32)


def runs(*shape):
    sizes = ", ".join("N%d" % i for i in range(len(shape)))
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> attention'
        f"(float[B, H, L, D] q, float[B, H, S, D] k, bool[{sizes}] m) => (float[B, H, L, D] y)"
        "{ y = Attention(q, k, k, m) }"
    )
    onnx.checker.check_model(model)
    feed = {"q": query, "k": key, "m": np.ones(shape, bool)}
    assert ReferenceEvaluator(model).run(None, feed)[0].shape == query.shape
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    try:
        session.run(None, feed)
    except Exception as error:
        print(shape, "refused:", str(error).splitlines()[0][-120:])
        return False
    print(shape, "runs")
    return True


seen = [runs(2, 1, 3, 5), runs(3, 5), runs(2, 1, 1, 5), runs(2, 1, 3, 1)]
assert seen == [True, True, False, False], seen
PYTHON
