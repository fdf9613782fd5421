"""transformers (>= 5): attention by name, and layers for `fastfusion.accelerate`.

    model = AutoModel.from_pretrained(name, attn_implementation="fastfusion")   # attention alone
    model = fastfusion.accelerate(model)                                        # layers as well

It is imported with transformers, or by hand before the first.
"""

from fastfusion.acceleration.swaps import register_swap
from fastfusion.integrations.transformers import _cross_modal
from fastfusion.integrations.transformers._interface import (
    NAME,
    attention,
    attention_mask,
    register,
)
from fastfusion.integrations.transformers._structures import DECODER_LAYERS, ENCODER_LAYERS

__all__ = ["NAME", "attention", "attention_mask", "register"]

register()
register_swap(
    "transformers.modeling_utils.PreTrainedModel",
    "fastfusion.integrations.transformers._models:interface_swap",
    subclasses=True,
)
for _name, (_path, _) in (ENCODER_LAYERS | DECODER_LAYERS).items():
    register_swap(f"{_path}.{_name}", "fastfusion.integrations.transformers.layers:swap_of")
_cross_modal.register()
