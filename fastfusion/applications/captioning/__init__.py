"""Captions: what is in a square of four pictures of easy-vqa, in words."""

from fastfusion.applications.captioning.model import CHECKPOINT
from fastfusion.applications.captioning.show import example, show
from fastfusion.applications.captioning.train import Settings, train

PICTURE = "captioning_attention.png"

__all__ = ["CHECKPOINT", "PICTURE", "Settings", "example", "show", "train"]
