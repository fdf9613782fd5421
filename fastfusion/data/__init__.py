"""Data sets as they are published: readers, vocabularies, targets and official measures."""

from fastfusion.data import vqa

__all__ = ["vqa"]
