"""Visual question answering on easy-vqa: a question about a picture, one of 13 answers."""

from fastfusion.applications.vqa.model import CHECKPOINT
from fastfusion.applications.vqa.show import example, show
from fastfusion.applications.vqa.train import Settings, train

PICTURE = "vqa_attention.png"

__all__ = ["CHECKPOINT", "PICTURE", "Settings", "example", "show", "train"]
