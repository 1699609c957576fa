"""Coding: the same tensors in fewer bytes, or nearly the same; see docs/explanation/codecs.md."""

from __future__ import annotations

from lorabbit.coding.choice import check
from lorabbit.coding.coded import MARK, CodedTensors, coding_of, open_tensors
from lorabbit.coding.origin import Origin
from lorabbit.coding.writing import Recipe, most_bytes, restore, write_coded

__all__ = [
    "MARK",
    "CodedTensors",
    "Origin",
    "Recipe",
    "check",
    "coding_of",
    "most_bytes",
    "open_tensors",
    "restore",
    "write_coded",
]
