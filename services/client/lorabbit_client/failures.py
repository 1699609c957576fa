"""Failures: what came of a task that did not come to its end, in one sentence for an operator."""

from __future__ import annotations

import errno
import traceback

from lorabbit.errors import BadInput, LoRAbbitError
from lorabbit.messages import Metrics
from lorabbit_client.execution import Outcome, Work

OUT_OF_MEMORY = "the client ran out of memory; give it more, or use a smaller batch or a smaller model"
SAID_OF_MEMORY = (
    "can't start new thread",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "failed to map segment",
)
"""What Python, the loader of shared objects and torch's allocators say, in small letters."""


def failed(work: Work, error: Exception) -> Outcome:
    """Describe a task that ended in `error`; a defect keeps its traceback among the details."""
    details: dict[str, str] = {}
    if isinstance(error, LoRAbbitError):
        sentence = str(error)
    elif is_memory(error):
        sentence = f"{OUT_OF_MEMORY} ({type(error).__name__} in phase {work.task.phase!r})"
    else:
        sentence = f"{type(error).__name__} in phase {work.task.phase!r}: {error}"
        details["traceback"] = "".join(traceback.format_exception(error))
    bad_input = isinstance(error, BadInput)
    return Outcome(Metrics(num_examples=0), has_tensors=False, error=sentence, bad_input=bad_input, details=details)


def is_memory(error: Exception) -> bool:
    """Tell whether memory ran out; torch and the loader say so only in words."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    said = str(error).lower()
    return isinstance(error, (RuntimeError, ImportError, OSError)) and any(words in said for words in SAID_OF_MEMORY)
