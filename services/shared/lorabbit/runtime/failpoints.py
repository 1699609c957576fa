"""Failpoints: named places at which a process can be made to die, as if its power had been cut.

``LORABBIT_CRASH_AT=<name>`` ends the process when it comes to that place, ``<name>:<n>`` when it comes there the
n-th time: SIGKILL's exit code, nothing flushed, nobody told. Each point is a step of the protocol between two effects
that must not depend on each other's success. Without the variable a point costs one comparison.
"""

from __future__ import annotations

import os
from enum import Enum

from lorabbit.errors import BadInput

KILLED = 137
"""The exit code of a process that SIGKILL ended, as a shell tells it."""


class Failpoint(Enum):
    """Every point: its name, the side it is on, and where it stands."""

    # ---- the server ----
    TASK_DECIDED = "task-decided", "server", "a task is decided, and not yet in the store"
    STEP_COMMITTED = "step-committed", "server", "a step with messages is in the store, none of them is sent"
    MESSAGE_SENT = "message-sent", "server", "a message of the outbox is given to the broker, unconfirmed"
    MESSAGES_CONFIRMED = "messages-confirmed", "server", "the broker has a step's messages, the outbox still holds them"
    STREAM_CHUNK_CONFIRMED = "stream-chunk-confirmed", "server", "the broker has one chunk of a published payload"
    OFFER_RECEIVED = "offer-received", "server", "a result is offered, and nothing is answered"
    CHUNK_WRITTEN = "chunk-written", "server", "a chunk is on the disk, its delivery is not acknowledged"
    UPLOAD_CHECKED = "upload-checked", "server", "an update is whole and admitted, and does not count yet"
    RESULT_COUNTED = "result-counted", "server", "a result counts in the store, its client does not know"
    AGGREGATING = "aggregating", "server", "the updates of a round are about to be folded"
    VERSION_WRITTEN = "version-written", "server", "the next adapter is on the disk, and not yet in the store"
    VERSION_COMMITTED = "version-committed", "server", "the store names a new adapter, and no stream has any of it"
    RUN_WRITTEN = "run-written", "server", "the run folder is up to date, the job is not marked as ended"

    # ---- the client ----
    TASK_DELIVERED = "task-delivered", "client", "a task is delivered, and not in the journal"
    TASK_JOURNALED = "task-journaled", "client", "a task is in the journal, its delivery is not acknowledged"
    PAYLOAD_CHUNK_READ = "payload-chunk-read", "client", "one chunk of a task's payload is on the disk"
    TRAINING = "training", "client", "the work on a task is under way"
    PRIVATE_WRITTEN = "private-written", "client", "new private state lies beside the old one, which still counts"
    PRIVATE_COMMITTED = "private-committed", "client", "new private state counts, the result is not in the outbox"
    RESULT_WRITTEN = "result-written", "client", "a result's tensors are on the disk, the outbox does not name them"
    RESULT_IN_OUTBOX = "result-in-outbox", "client", "a result is in the outbox, and nobody knows"
    UPLOAD_CHUNK_CONFIRMED = "upload-chunk-confirmed", "client", "the broker has one chunk of an upload"
    UPLOAD_SENT = "upload-sent", "client", "the broker has every chunk, the server is not told so"
    VERDICT_RECEIVED = "verdict-received", "client", "the server's verdict is here, the outbox still holds the result"

    def __init__(self, title: str, side: str, place: str) -> None:
        """Keep the name that an operator writes, the side, and what holds at this point."""
        self.title = title
        self.side = side
        self.place = place


def parse(text: str) -> tuple[Failpoint, int]:
    """Read ``<name>`` or ``<name>:<n>``; raises BadInput with the known names."""
    title, colon, count = text.partition(":")
    point = next((each for each in Failpoint if each.title == title), None)
    if point is None:
        known = ", ".join(each.title for each in Failpoint)
        raise BadInput(f"environment variable LORABBIT_CRASH_AT: there is no crash point {title!r}; known are {known}")
    if colon and not (count.isascii() and count.isdigit() and int(count) > 0):
        why = f"{count!r} is no number of passages; write for example {title}:2"
        raise BadInput(f"environment variable LORABBIT_CRASH_AT: {why}")
    return point, int(count) if colon else 1


class _ArmedFailpoint:
    """When this process dies; one for the process."""

    def __init__(self) -> None:
        """Let it live."""
        self.point: Failpoint | None = None
        self.passages = 0

    def pass_by(self) -> None:
        """Count one passage less; the last one is the end."""
        self.passages -= 1
        if self.passages <= 0:
            os._exit(KILLED)


_fate = _ArmedFailpoint()


def arm(text: str | None) -> None:
    """Die at the point that `text` names, from now on; at none when it is None. Raises BadInput."""
    _fate.point, _fate.passages = (None, 0) if text is None else parse(text)


def hit(point: Failpoint) -> None:
    """Die here when this is the point and the passage."""
    if point is _fate.point:
        _fate.pass_by()
