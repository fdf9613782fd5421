"""Models built from :mod:`fastfusion.nn`."""

from fastfusion.models.builders import BUILDERS, from_config
from fastfusion.models.captioning import CaptioningTransformer
from fastfusion.models.retrieval import RetrievalTransformer
from fastfusion.models.sentiment import SentimentTransformer
from fastfusion.models.vqa import VQATransformer

__all__ = [
    "BUILDERS",
    "CaptioningTransformer",
    "RetrievalTransformer",
    "SentimentTransformer",
    "VQATransformer",
    "from_config",
]
