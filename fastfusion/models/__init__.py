"""Models built from :mod:`fastfusion.nn`."""

from fastfusion.models.builders import BUILDERS, from_config
from fastfusion.models.captioning import CaptioningTransformer
from fastfusion.models.vqa import VQATransformer

__all__ = ["BUILDERS", "CaptioningTransformer", "VQATransformer", "from_config"]
