"""Messages at rest in the memory broker: its queues and streams, and who reads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from lorabbit.broker.base import Cancellable, First, OnDelivery, Outgoing, Queue, beginning

STREAM = "stream"


@dataclass(slots=True)
class Stored:
    """A message at rest in one queue."""

    message: Outgoing
    expires_at: float | None
    returns: int = 0
    """So often was it taken and came back."""


@dataclass(slots=True, eq=False)
class Reader(Cancellable):
    """One reader of one queue, which may not exist yet."""

    queue: str
    on_delivery: OnDelivery
    prefetch: int
    on_cancel: Callable[[Reader], None]
    unacked: dict[int, Stored] = field(default_factory=dict)
    offset: int = 0
    """Next message of a stream."""
    first: First = beginning
    """Number of the message with which reading a stream begins."""

    @property
    def has_room(self) -> bool:
        """Tell whether its prefetch allows one more delivery."""
        return len(self.unacked) < self.prefetch

    def cancel(self) -> None:
        """Leave the queue; what was not acknowledged goes to others."""
        self.on_cancel(self)


@dataclass(slots=True, frozen=True)
class Token:
    """Which delivery of which reader; void once the reader's unacknowledged messages went back."""

    reader: Reader
    number: int


@dataclass(slots=True)
class ExistingQueue:
    """A declared queue or stream with what it holds."""

    declared: Queue
    messages: deque[Stored] = field(default_factory=deque)
    stored_bytes: int = 0
    readers: deque[Reader] = field(default_factory=deque)
    unused_since: float = 0.0

    @property
    def is_stream(self) -> bool:
        """Tell whether reading leaves messages where they are."""
        return self.declared.kind == STREAM

    def is_full(self) -> bool:
        """Tell whether the next message is refused."""
        limit = self.declared.max_bytes
        return limit is not None and self.stored_bytes >= limit

    def put(self, stored: Stored) -> None:
        """Add a message at the end."""
        self.messages.append(stored)
        self.stored_bytes += len(stored.message.body)

    def put_back(self, stored: Stored) -> None:
        """Return a message that was taken, to the front."""
        self.messages.appendleft(stored)
        self.stored_bytes += len(stored.message.body)

    def take(self) -> Stored:
        """Take the first message."""
        stored = self.messages.popleft()
        self.stored_bytes -= len(stored.message.body)
        return stored
