"""Layers of models whose attention is not the interface's, and which of our modules has theirs.

Their code is written after that of the version `TESTED`; with any other they stay what they are.
"""

from importlib import import_module
from typing import Any

from torch import nn

from fastfusion.acceleration.swaps import register_swap
from fastfusion.integrations.transformers._structures import TESTED

_HERE = __name__.rpartition(".")[0]
# By package of transformers and file: our module, and the classes in both.
LAYERS = {
    "blip.modeling_blip": ("_blip", "BlipAttention BlipEncoderLayer"),
    "blip.modeling_blip_text": ("_blip", "BlipTextSelfAttention BlipTextLayer"),
    "blip_2.modeling_blip_2": ("_blip", "Blip2QFormerLayer"),
    "bridgetower.modeling_bridgetower": (
        "_bridgetower",
        "BridgeTowerTextLayer BridgeTowerBertCrossLayer BridgeTowerResidualAttention",
    ),
    "conditional_detr.modeling_conditional_detr": ("_detr", "ConditionalDetrEncoderLayer"),
    "detr.modeling_detr": ("_detr", "DetrEncoderLayer DetrDecoderLayer"),
    "flava.modeling_flava": ("_single_stream", "FlavaSelfAttention FlavaLayer"),
    "grounding_dino.modeling_grounding_dino": (
        "_grounding_dino",
        """GroundingDinoEncoder GroundingDinoDecoder GroundingDinoBiMultiHeadAttention
        GroundingDinoMultiheadAttention GroundingDinoDeformableLayer GroundingDinoDecoderLayer
        MultiScaleDeformableAttention""",
    ),
    "lxmert.modeling_lxmert": ("_lxmert", "LxmertAttention LxmertLayer LxmertXLayer"),
    "mm_grounding_dino.modeling_mm_grounding_dino": (
        "_grounding_dino",
        """MMGroundingDinoEncoder MMGroundingDinoDecoder MMGroundingDinoBiMultiHeadAttention
        MMGroundingDinoMultiheadAttention MMGroundingDinoDeformableLayer
        MMGroundingDinoDecoderLayer MultiScaleDeformableAttention""",
    ),
    "perceiver.modeling_perceiver": ("_perceiver", "PerceiverSelfAttention PerceiverLayer"),
    "vilt.modeling_vilt": ("_single_stream", "ViltSelfAttention ViltLayer"),
    "visual_bert.modeling_visual_bert": (
        "_single_stream",
        "VisualBertSelfAttention VisualBertLayer",
    ),
}


def register() -> None:
    """Tell `fastfusion.accelerate` of them."""
    for file, (_, names) in LAYERS.items():
        for name in names.split():
            register_swap(f"transformers.models.{file}.{name}", f"{__name__}:swap_of")
    # Before the entry of all models of transformers.
    register_swap(
        "transformers.models.bridgetower.modeling_bridgetower.BridgeTowerPreTrainedModel",
        f"{__name__}:eager_bridgetower",
        subclasses=True,
    )
    for name in ("BridgeTowerSelfAttention", "BridgeTowerCrossAttention"):
        register_swap(
            f"transformers.models.bridgetower.modeling_bridgetower.{name}",
            f"{__name__}:attention_of_bridgetower",
        )


def swap_of(layer: nn.Module) -> type[nn.Module] | str:
    """The class that a layer becomes, or why it stays what it is."""
    import transformers

    version = transformers.__version__
    if not version.startswith(f"{TESTED}."):
        return f"its code is known of transformers {TESTED}, this is {version}"
    kind = type(layer)
    file = kind.__module__.removeprefix("transformers.models.")
    module: Any = import_module(f"{_HERE}.{LAYERS[file][0]}")
    name = kind.__name__
    if file.startswith("mm_") and not name.startswith("MM"):
        name = f"MM{name}"  # of two classes with one name
    target: type[nn.Module] = getattr(module, name)
    return target


def eager_bridgetower(model: nn.Module) -> str:
    """Why the attention of BridgeTower is not taken to the interface."""
    return "its cross-modal attention says that it is causal and is not; its layers are swapped"


def attention_of_bridgetower(attention: nn.Module) -> str | None:
    """Likewise of a part, but for those of layers that are one call."""
    is_cross_modal = attention.is_causal or type(attention).__name__.endswith("CrossAttention")
    return "its models return its weights, asked or not" if is_cross_modal else None
