#!/usr/bin/env bash
# What onnxruntime's Attention operator (opset 23) gives for a query whose keys are all masked depends on the
# version of the runtime, not on the model: 1.23.2 NaN, 1.26.0 the mean of the values (masked ones included),
# 1.32.0 zeros, as torch's scaled_dot_product_attention has them. A padded batch that was right when a model was
# exported is wrong, and finite, two releases earlier: "the output has no NaN" proves nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/run.py" <<'PYTHON'
import sys

import numpy as np
import onnxruntime as ort
from onnx import parser

model = parser.parse_model(
    '<ir_version: 10, opset_import: ["" : 23]> attention'
    "(float[1, 1, 2, 4] q, float[1, 1, 3, 4] k, bool[2, 3] m) => (float[1, 1, 2, 4] y)"
    "{ y = Attention(q, k, k, m) }"
)
session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
key = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4)
mask = np.array([[True, True, True], [False, False, False]])
row = session.run(None, {"q": key[:, :, :2] * 0, "k": key, "m": mask})[0][0, 0, 1]
mean = key[0, 0].mean(0)
kind = "NaN" if np.isnan(row).all() else "mean" if np.allclose(row, mean) else "zeros"
print(ort.__version__, row, kind)
assert kind != "zeros" or not row.any()
assert kind == sys.argv[1], kind
PYTHON
for pair in 1.23.2=NaN 1.26.0=mean 1.32.0=zeros; do
  python3 -m venv --clear "$folder/env"
  "$folder/env/bin/pip" install --quiet "onnxruntime==${pair%=*}" onnx==1.23.2 numpy==2.4.6
  "$folder/env/bin/python" "$folder/run.py" "${pair#*=}"
done
