#!/usr/bin/env bash
# onnxruntime 1.32.0 removes a Dropout whose training_mode is true, between Softmax and MatMul, when it
# optimises a graph (from the basic level on, and so by default). The standard says that such a Dropout
# drops (ONNX operators, Dropout-13: "training_mode ... if true"); without optimisation it does. A model that
# is exported with dropout switched on, for Monte Carlo dropout, answers the same each time, without a word.
# Seen: 5 different results unoptimised, 1 by default, 5 by default without the optimiser EliminateDropout.
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

model = parser.parse_model("""
<ir_version: 10, opset_import: ["" : 18]>
attention_weights (float[4, 4] x) => (float[4, 4] y) {
  ratio = Constant<value = float {0.5}>()
  training = Constant<value = bool {1}>()
  weights = Softmax<axis = -1>(x)
  dropped = Dropout(weights, ratio, training)
  y = MatMul(dropped, x)
}""")
onnx.checker.check_model(model)
x = np.ones((4, 4), np.float32)


def kinds(level, disabled=None):
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = ort.InferenceSession(
        model.SerializeToString(), options, disabled_optimizers=disabled,
        providers=["CPUExecutionProvider"],
    )
    return len(np.unique([session.run(None, {"x": x})[0] for _ in range(50)]))


levels = ort.GraphOptimizationLevel
seen = (
    kinds(levels.ORT_DISABLE_ALL),
    kinds(levels.ORT_ENABLE_ALL),
    kinds(levels.ORT_ENABLE_ALL, ["EliminateDropout"]),
)
print("different results: unoptimised, by default, without EliminateDropout:", seen)
assert seen == (5, 1, 5), seen
PYTHON
