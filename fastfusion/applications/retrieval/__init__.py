"""Retrieval on emoji: the picture of a text and the text of a picture, in a style never seen."""

from fastfusion.applications.retrieval.model import CHECKPOINT
from fastfusion.applications.retrieval.show import example, show
from fastfusion.applications.retrieval.train import FOLDER, Settings, train

PICTURE = "retrieval.png"

__all__ = ["CHECKPOINT", "FOLDER", "PICTURE", "Settings", "example", "show", "train"]
