"""Failures of a task or of the client process, described in one sentence for an operator."""

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
OUT_OF_MEMORY_TEXTS = (
    "can't start new thread",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "failed to map segment",
)
"""Messages of Python, the dynamic loader and torch's allocators, in lower case."""
FAILED = 1
"""Exit code of a client that cannot go on."""
STDERR = 2
OUT_OF_MEMORY_LINE = f"client-failed: {OUT_OF_MEMORY}\n".encode()
RETRY_DELAY_SECONDS = 5.0
"""Delay before a task that ran out of memory is reported as failed: others may have freed memory by then."""

log = structlog.get_logger()


def failed_result(work: TaskInput, error: Exception) -> TaskResult:
    """Describe a task that ended in `error`; a defect keeps its traceback among the details."""
    details: dict[str, str] = {}
    retry_delay_seconds = 0.0
    if isinstance(error, LoRAbbitError):
        sentence = str(error)
    elif is_out_of_memory(error):
        retry_delay_seconds = RETRY_DELAY_SECONDS
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
        retry_delay_seconds=retry_delay_seconds,
        details=details,
    )


def exit_on_thread_memory_error() -> None:
    """Exit the process with a message when one of its threads runs out of memory.

    `Thread.start` waits for ever for a thread that fails before it begins. Such a thread cannot run Python code either,
    so its error goes to a thread that already exists. The journal is resumed when the client is started again.
    """
    errors: SimpleQueue[threading.ExceptHookArgs | sys.UnraisableHookArgs] = SimpleQueue()

    def watch() -> None:
        while True:
            error = errors.get()
            if is_out_of_memory(error.exc_value):
                _exit_out_of_memory()
            elif isinstance(error, threading.ExceptHookArgs):
                threading.__excepthook__(error)
            else:
                sys.__unraisablehook__(error)

    threading.Thread(target=watch, name="thread-errors", daemon=True).start()
    threading.excepthook = sys.unraisablehook = errors.put


def _exit_out_of_memory() -> None:
    """Log the reason and exit; a prepared message is written when logging needs memory that is missing."""
    try:
        log.error("client-failed", why=OUT_OF_MEMORY)
    except MemoryError:
        os.write(STDERR, OUT_OF_MEMORY_LINE)
    finally:
        os._exit(FAILED)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an error means out of memory; torch and the loader only say so in the message."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    text = str(error).lower()
    return isinstance(error, (RuntimeError, ImportError, OSError)) and any(
        words in text for words in OUT_OF_MEMORY_TEXTS
    )
