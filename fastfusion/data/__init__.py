"""Data sets as they are published: readers, vocabularies, targets and official measures."""

from fastfusion.data import easy_vqa, emoji, vqa

__all__ = ["easy_vqa", "emoji", "vqa"]
