"""Readers: a tokenizer or image format, equal to another one that encodes alike."""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reader:
    """What encodes a dataset, comparable by what comes of it."""

    fingerprint: str
    processor: Any = field(compare=False)

    @classmethod
    def of(cls, processor: Any) -> Reader:  # noqa: ANN401 - a tokenizer, or an ImageFormat
        """Wrap a tokenizer or an ImageFormat."""
        return cls(_fingerprint(processor), processor)


_FINGERPRINTS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _fingerprint(processor: Any) -> str:  # noqa: ANN401 - a tokenizer, or an ImageFormat
    """Hash all that decides how a processor encodes."""
    known = _FINGERPRINTS.get(processor)
    if known is None:
        backend = getattr(processor, "backend_tokenizer", None)
        state = (
            repr(processor),
            "" if backend is None else backend.to_str(),
            str(getattr(processor, "chat_template", "")),
        )
        known = _FINGERPRINTS[processor] = hashlib.sha256("\x1f".join(state).encode()).hexdigest()
    return known
