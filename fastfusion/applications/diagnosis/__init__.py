"""Diagnoses from a drawn picture and a report. A demonstration of fusion, not for clinical use."""

from fastfusion.applications.diagnosis.model import CHECKPOINT
from fastfusion.applications.diagnosis.show import example, show
from fastfusion.applications.diagnosis.train import Settings, train

PICTURE = "diagnosis_attention.png"

__all__ = ["CHECKPOINT", "PICTURE", "Settings", "example", "show", "train"]
