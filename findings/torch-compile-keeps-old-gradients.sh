#!/usr/bin/env bash
# torch 2.13.0: the cache that torch.compile keeps on disk does not notice that the gradient of a custom operator has
# changed. The graph that was compiled for training holds the operator by name, with the steps of the backward as they
# were traced; its key has the operator's name, but nothing of the function that register_autograd was given. A program
# that is compiled again after the package with the operator was upgraded, by another process that finds the same cache
# folder, is given the old backward: right in eager mode, and silently wrong (or refused, where the arguments of an
# operator of the backward have changed) when compiled. Who ships a custom operator has to give it another name when its
# gradient changes, or to have users empty TORCHINDUCTOR_CACHE_DIR.
# Seen: the same script with a backward of 2 * grad and then, as after a correction, of 3 * grad.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/train.py" <<'PYTHON'
import sys

import torch

factor = float(sys.argv[1])


@torch.library.custom_op("demo::scaled", mutates_args=())
def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@scaled.register_fake
def _(x):
    return torch.empty_like(x)


scaled.register_autograd(lambda ctx, grad: grad * factor)


def loss(x):
    return torch.ops.demo.scaled(x).sin().sum()


def gradient(function):
    x = torch.ones(3, requires_grad=True)
    return torch.autograd.grad(function(x), x)[0][0].item()


print(f"{gradient(loss):.3f} {gradient(torch.compile(loss)):.3f}")
PYTHON
train() { TORCHINDUCTOR_CACHE_DIR="$folder/$1" "$folder/env/bin/python" "$folder/train.py" "$2"; }
first=$(train kept 2)
second=$(train kept 3)
emptied=$(train another 3)
echo "eager and compiled, first: $first; with another gradient: $second; with an empty cache: $emptied"
test "$first" = "-0.832 -0.832"
test "$second" = "-1.248 -0.832"
test "$emptied" = "-1.248 -1.248"
