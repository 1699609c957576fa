"""Broker: what the server and a client need of a message broker, and no more.

One thread, the *loop thread*, runs `run()`; every callback (deliveries, timers, confirmations,
`post`ed functions) happens there, so neither side needs a lock. Drivers keep their sockets in
threads of their own: a callback that takes long delays other callbacks, never a heartbeat.

Promises of every driver (the contract suite holds each of them to it):

* `send` is at-least-once and in order per driver: the message stays with the driver, through any
  number of reconnects, until the broker has confirmed it; then `on_done(None)` is called.
  `on_done(error)` is called when the broker answered no: `BrokerBusy` (a queue that is full, or has just
  lost its leader: try later, as `send_with_retry` does), `BrokerRefused` (not allowed, too large) or
  `LoRAbbitError` (nobody listens there: no queue is bound).
* A delivery comes back (`redelivered`) until it is `ack`ed, or came back more often than its queue allows. An `ack`
  of a delivery from before a reconnect does nothing, because the broker will deliver it again.
* Subscriptions survive reconnects.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from lorabbit.errors import BrokerBusy, LoRAbbitError
from lorabbit.runtime.backoff import Backoff

OnDone: TypeAlias = Callable[[LoRAbbitError | None], None]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to publish. `exchange` "" publishes straight to the queue named by `routing_key`."""

    exchange: str
    routing_key: str
    type: str
    body: bytes
    headers: Mapping[str, str | int] = field(default_factory=dict)
    message_id: str = ""
    expires_ms: int | None = None
    drop_on_reconnect: bool = False
    """Whether it is not worth sending again on another connection; it is then answered with BrokerUnavailable."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message received; `token` is the driver's own handle."""

    queue: str
    routing_key: str
    type: str
    body: bytes
    headers: Mapping[str, str | int]
    sender: str | None
    """The broker-checked `user_id`; None when the sender did not set it."""
    redelivered: bool
    token: object
    message_id: str = ""
    """As the sender gave it; another one where it was sent again because the first may be lost."""


OnDelivery: TypeAlias = Callable[[Delivery], None]
First: TypeAlias = Callable[[], int]


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue the server declares. `max_bytes` refuses further messages (`BrokerBusy`) when full."""

    name: str
    kind: str
    """"classic", "quorum" or "stream"."""
    bindings: tuple[tuple[str, str], ...] = ()
    """(exchange, routing-key pattern) pairs."""
    max_bytes: int | None = None
    dead_letter_exchange: str | None = None
    expires_ms: int | None = None
    """Deleted by the broker after so long without a consumer."""
    delivery_limit: int | None = None
    """What comes back more often, because whoever takes it dies of it, is a dead letter; for quorum queues."""


def beginning() -> int:
    """Number of a stream's first message."""
    return 0


class Cancellable(ABC):
    """A timer or a subscription."""

    @abstractmethod
    def cancel(self) -> None:
        """Stop it; safe to call twice."""


class Broker(ABC):
    """See the module's docstring. All methods but `post` and `stop` are for the loop thread."""

    @abstractmethod
    def declare_exchange(self, name: str) -> None:
        """Declare a durable topic exchange; idempotent. Blocks; raises BrokerUnavailable."""

    @abstractmethod
    def on_broker_reset(self, callback: Callable[[], None]) -> None:
        """Call back on the loop thread each time the broker comes back without what was declared, its volume lost."""

    @abstractmethod
    def declare_queue(self, queue: Queue) -> None:
        """Declare a durable queue with its bindings; idempotent. Blocks; raises BrokerUnavailable."""

    @abstractmethod
    def delete_queue(self, name: str) -> None:
        """Delete a queue or stream; a missing one is fine. Blocks; raises BrokerUnavailable."""

    @abstractmethod
    def send(self, message: Outgoing, on_done: OnDone | None = None) -> None:
        """Hand over a message; returns at once."""

    def send_with_retry(self, message: Outgoing, on_done: OnDone | None = None) -> None:
        """Hand over a message, again and again while its queue is full or looks for a new leader among its nodes."""
        backoff = Backoff(0.05, 5.0)

        def answered(error: LoRAbbitError | None) -> None:
            if isinstance(error, BrokerBusy):
                self.after(backoff.next_seconds(), partial(self.send, message, answered))
            elif on_done is not None:
                on_done(error)

        self.send(message, answered)

    @abstractmethod
    def subscribe(self, queue: str, on_delivery: OnDelivery, *, prefetch: int = 16) -> Cancellable:
        """Consume a queue. Where the queue does not exist yet, keep trying quietly until it does."""

    @abstractmethod
    def read_stream(
        self, stream: str, on_delivery: OnDelivery, *, prefetch: int = 16, first: First = beginning
    ) -> Cancellable:
        """Read a stream; every reader gets every message from the one on that `first` counts, from 0. `ack` each one.

        After a reconnect reading starts over from there: `first` is asked again, from any thread, and readers drop
        what they know.
        """

    @abstractmethod
    def ack(self, delivery: Delivery) -> None:
        """The message's effect is durable: forget it."""

    @abstractmethod
    def reject(self, delivery: Delivery) -> None:
        """Poison: move it to the dead letters."""

    @abstractmethod
    def post(self, callback: Callable[[], None]) -> None:
        """Run a function on the loop thread soon; callable from any thread."""

    @abstractmethod
    def after(self, seconds: float, callback: Callable[[], None]) -> Cancellable:
        """Run a function on the loop thread once, later."""

    @abstractmethod
    def run(self) -> None:
        """Run callbacks until `stop`; an exception of a callback ends the loop and is raised here."""

    @abstractmethod
    def stop(self) -> None:
        """Make `run` return after the current callback; callable from any thread and from signal handlers."""

    @abstractmethod
    def health(self) -> str | None:
        """What keeps the broker from working right now, as a sentence for an operator; None if nothing."""

    @abstractmethod
    def close(self) -> None:
        """Send what is left for at most a few seconds, then close."""
