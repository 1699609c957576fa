"""Failures: what came of a task, or of the client, that did not come to its end, in one sentence for an operator."""

from __future__ import annotations

import errno
import os
import sys
import threading
import traceback
from queue import SimpleQueue

import structlog

from lorabbit.errors import BadInput, LoRAbbitError
from lorabbit.protocol.messages import Metrics
from lorabbit_client.execution.interface import TaskInput, TaskResult

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
FAILED = 1
"""Exit code of a client that cannot go on."""
STDERR = 2
LAST_WORDS = f"client-failed: {OUT_OF_MEMORY}\n".encode()
REST_SECONDS = 5.0
"""So long is a task without memory not handed back: what others use may be free again by then."""

log = structlog.get_logger()


def failed(work: TaskInput, error: Exception) -> TaskResult:
    """Describe a task that ended in `error`; a defect keeps its traceback among the details."""
    details: dict[str, str] = {}
    rest_seconds = 0.0
    if isinstance(error, LoRAbbitError):
        sentence = str(error)
    elif is_memory(error):
        rest_seconds = REST_SECONDS
        sentence = f"{OUT_OF_MEMORY} ({type(error).__name__} in phase {work.task.phase!r})"
    else:
        sentence = f"{type(error).__name__} in phase {work.task.phase!r}: {error}"
        details["traceback"] = "".join(traceback.format_exception(error))
    bad_input = isinstance(error, BadInput)
    return TaskResult(
        Metrics(num_examples=0),
        has_tensors=False,
        error=sentence,
        bad_input=bad_input,
        rest_seconds=rest_seconds,
        details=details,
    )


def end_with_a_thread() -> None:
    """End the process, in a sentence, once one of its threads finds no memory to begin or to go on.

    Whoever waits for such a thread waits for ever: Python's own `Thread.start` for one that dies before it has begun.
    That one cannot call a function written in Python either, so a thread that is there already hears of it. What was
    journaled goes on when the client is started again.
    """
    deaths: SimpleQueue[threading.ExceptHookArgs | sys.UnraisableHookArgs] = SimpleQueue()

    def mourn() -> None:
        while True:
            death = deaths.get()
            if is_memory(death.exc_value):
                _end()
            elif isinstance(death, threading.ExceptHookArgs):
                threading.__excepthook__(death)
            else:
                sys.__unraisablehook__(death)

    threading.Thread(target=mourn, name="mourner", daemon=True).start()
    threading.excepthook = sys.unraisablehook = deaths.put


def _end() -> None:
    """Say why, with memory of before if there is none now, and end."""
    try:
        log.error("client-failed", why=OUT_OF_MEMORY)
    except MemoryError:
        os.write(STDERR, LAST_WORDS)
    finally:
        os._exit(FAILED)


def is_memory(error: BaseException | None) -> bool:
    """Tell whether memory ran out; torch and the loader say so only in words."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    said = str(error).lower()
    return isinstance(error, (RuntimeError, ImportError, OSError)) and any(words in said for words in SAID_OF_MEMORY)
