"""Models built from :mod:`fastfusion.nn`."""

from fastfusion.models.vqa import VQATransformer

__all__ = ["VQATransformer"]
