#!/usr/bin/env bash
# Triton 3.7.1 (3.5.1 and 3.6.0 too) lays out the operands of a 16-bit product by what its *masks* were loaded from.
# The heuristic looks for unpacked narrow operands: it takes the narrowest load behind an operand, and half of that
# where a join is among the operations. Weights that are 0 where a byte says so (padding) or where random words say so
# (dropout, whose words Philox makes four at a time and joins) are no such operands, but count: with both, bfloat16
# weights are taken for 4-bit ones and kWidth, the elements side by side in a lane, becomes 8. Four lanes share a row,
# so that a product over 16 elements has no room for it. Nothing is refused; a kernel of this form gave results on an
# H200 (Triton 3.6.0) that were off by more than their own size, while without the bytes or without the join they
# were right, as they are in Triton's interpreter. From 3.8.0 on kWidth stops at what the sum has room for.
# Seen: kWidth 2 without masks, 4 with either, 8 with both, compiled for sm_80 (no GPU is needed).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --no-deps triton==3.7.1
cat >"$folder/product.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(weights, values, hidden, words, out, BYTES: tl.constexpr, JOIN: tl.constexpr):
    i = tl.arange(0, 16)
    square = i[:, None] * 16 + i[None, :]
    w = tl.load(weights + square)
    if BYTES:
        w = tl.where(tl.load(hidden + i)[None, :] == 0, w, 0.0)
    if JOIN:
        half = tl.load(words + i[:, None] * 8 + tl.arange(0, 8)[None, :])
        w = tl.where(tl.reshape(tl.join(half, half + 1), [16, 16]) > 7, w, 0.0)
    tl.store(out + square, tl.dot(w.to(tl.bfloat16), tl.load(values + square)))


types = ["*fp32", "*bf16", "*u8", "*i32", "*fp32", "constexpr", "constexpr"]
seen = []
for flags in ((False, False), (False, True), (True, False), (True, True)):
    signature = dict(zip(product.arg_names, types))
    source = ASTSource(product, signature, constexprs={(5,): flags[0], (6,): flags[1]})
    text = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ttgir"]
    left = re.search(r"tensor<16x16xbf16, #ttg\.dot_op<\{opIdx = 0[^>]*kWidth = (\d+)", text)
    seen.append(int(left[1]))
    print("bytes", flags[0], "join", flags[1], "kWidth", seen[-1], "over 16 elements")
assert seen == [2, 4, 4, 8], seen
PYTHON
TRITON_CACHE_DIR="$folder/cache" TRITON_DEFAULT_FP_FUSION=1 "$folder/env/bin/python" "$folder/product.py"
