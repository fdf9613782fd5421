#!/usr/bin/env bash
# diffusers 0.42.1: set_attention_backend of one model also sets the process-wide default, so that every other model,
# also one that is made later, computes by that backend; and reset_attention_backend, which is documented to go back
# to "the environment default, if set, or the torch native scaled dot product attention", leaves the default as it is:
# the model itself goes on with the backend that was reset. (diffusers/models/modeling_utils.py: the first ends with
# _AttentionBackendRegistry.set_active_backend(backend), the second has no counterpart.)
# Seen: with backend "_native_math" on model a, b's attention is computed by _native_math, after a's reset, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0 diffusers==0.42.1
"$folder/env/bin/python" - <<'PYTHON'
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

called = []
for name in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH):
    function = _AttentionBackendRegistry._backends[name]

    def watched(*args, _name=name, _function=function, **kwargs):
        called.append(_name.value)
        return _function(*args, **kwargs)

    _AttentionBackendRegistry._backends[name] = watched


def model():
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=0, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )


def backend_of(model):
    called.clear()
    with torch.no_grad():
        model(
            hidden_states=torch.randn(1, 16, 4), encoder_hidden_states=torch.randn(1, 5, 32),
            pooled_projections=torch.randn(1, 32), timestep=torch.tensor([1.0]),
            img_ids=torch.randn(16, 3), txt_ids=torch.randn(5, 3),
        )
    return called[0]


a, b = model(), model()
seen = [backend_of(a), backend_of(b)]
a.set_attention_backend("_native_math")
seen += [backend_of(a), backend_of(b)]
a.reset_attention_backend()
seen += [backend_of(a), backend_of(b)]
print(seen)
assert seen == ["native", "native", *["_native_math"] * 4], seen
PYTHON
