"""Sentiment of spoken opinions: words, voice and face, all synthetic; three answers."""

from fastfusion.applications.sentiment.model import CHECKPOINT
from fastfusion.applications.sentiment.show import example, show
from fastfusion.applications.sentiment.train import Settings, train

PICTURE = "sentiment.png"

__all__ = ["CHECKPOINT", "PICTURE", "Settings", "example", "show", "train"]
