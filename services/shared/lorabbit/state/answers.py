"""Answers of Redis, whatever its client makes of them."""

from __future__ import annotations


def text_of(value: str | bytes) -> str:
    """Read an answer of a client that decodes or of one that does not."""
    return value.decode() if isinstance(value, bytes) else str(value)
