"""The broker in memory: RabbitMQ's promises between parts of one process, without a socket.

Every embedded run and most tests stand on it, so it keeps what the protocol relies on and nothing else:
topic routing, order, prefetch, redelivery of what was not acknowledged, full queues, dead letters,
expiry, and streams that each reader reads from the start. A callback never runs inside the call
that caused it, as with a real broker. `reconnect` does what a broken connection does.

Messages at rest in the memory broker: its queues and streams, and who reads them.

Topic routing as RabbitMQ does it, for the broker in memory.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from lorabbit.broker.base import Broker, Cancellable, Delivery, First, OnDelivery, OnDone, Outgoing, Queue, beginning
from lorabbit.broker.event_loop import BrokerLoop, Clock, RunsOnLoop
from lorabbit.errors import BrokerBusy, LoRAbbitError, NotDeclared

STREAM = "stream"


@dataclass(slots=True)
class StoredMessage:
    """A message at rest in one queue."""

    message: Outgoing
    expires_at: float | None
    returns: int = 0
    """So often was it taken and came back."""


@dataclass(slots=True, eq=False)
class Subscription(Cancellable):
    """One reader of one queue, which may not exist yet."""

    queue: str
    on_delivery: OnDelivery
    prefetch: int
    on_cancel: Callable[[Subscription], None]
    unacked: dict[int, StoredMessage] = field(default_factory=dict)
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
class MemoryToken:
    """Which delivery of which reader; void once the reader's unacknowledged messages went back."""

    reader: Subscription
    number: int


@dataclass(slots=True)
class MemoryQueue:
    """A declared queue or stream with what it holds."""

    declared: Queue
    messages: deque[StoredMessage] = field(default_factory=deque)
    stored_bytes: int = 0
    readers: deque[Subscription] = field(default_factory=deque)
    unused_since: float = 0.0

    @property
    def is_stream(self) -> bool:
        """Tell whether reading leaves messages where they are."""
        return self.declared.kind == STREAM

    def is_full(self) -> bool:
        """Tell whether the next message is refused."""
        limit = self.declared.max_bytes
        return limit is not None and self.stored_bytes >= limit

    def put(self, stored: StoredMessage) -> None:
        """Add a message at the end."""
        self.messages.append(stored)
        self.stored_bytes += len(stored.message.body)

    def put_back(self, stored: StoredMessage) -> None:
        """Return a message that was taken, to the front."""
        self.messages.appendleft(stored)
        self.stored_bytes += len(stored.message.body)

    def take(self) -> StoredMessage:
        """Take the first message."""
        stored = self.messages.popleft()
        self.stored_bytes -= len(stored.message.body)
        return stored


class MemoryExchange:
    """A topic exchange. Patterns without wildcards are found by key, however many clients there are."""

    def __init__(self) -> None:
        """Start without bindings."""
        self._exact: dict[str, set[str]] = {}
        self._patterns: dict[str, set[str]] = {}

    def bind(self, pattern: str, queue: str) -> None:
        """Route keys that match the pattern to a queue; idempotent."""
        table = self._patterns if {"*", "#"} & set(pattern.split(".")) else self._exact
        table.setdefault(pattern, set()).add(queue)

    def unbind(self, queue: str) -> None:
        """Forget every binding of a queue."""
        for table in (self._exact, self._patterns):
            for pattern in [pattern for pattern, queues in table.items() if queue in queues]:
                table[pattern].discard(queue)
                if not table[pattern]:
                    del table[pattern]

    def route(self, key: str) -> set[str]:
        """Names of the queues that a message with this routing key goes to."""
        queues = set(self._exact.get(key, ()))
        for pattern, bound in self._patterns.items():
            if topic_matches(pattern.split("."), key.split(".")):
                queues |= bound
        return queues


def topic_matches(pattern: list[str], key: list[str]) -> bool:
    """Match the words of a routing key: ``*`` stands for one word, ``#`` for any number of words."""
    if not pattern:
        return not key
    if pattern[0] == "#":
        return any(topic_matches(pattern[1:], key[start:]) for start in range(len(key) + 1))
    return bool(key) and pattern[0] in {"*", key[0]} and topic_matches(pattern[1:], key[1:])


class MemoryBroker(RunsOnLoop, Broker):
    """See the module's docstring. `user` is what deliveries name as their sender."""

    def __init__(self, *, clock: Clock = time.monotonic, user: str = "embedded") -> None:
        """Start without exchanges or queues; `clock` counts seconds for timers and expiry."""
        self._clock = clock
        self._user: str | None = user
        self._loop = BrokerLoop(clock)
        self._exchanges: dict[str, MemoryExchange] = {}
        self._queues: dict[str, MemoryQueue] = {}
        self._waiting: dict[str, list[Subscription]] = {}
        self._numbers = 0
        self._on_emptied: Callable[[], None] = lambda: None

    def declare_exchange(self, name: str) -> None:
        """Declare a topic exchange; idempotent."""
        self._exchanges.setdefault(name, MemoryExchange())

    def on_broker_reset(self, callback: Callable[[], None]) -> None:
        """Call back after each `empty`."""
        self._on_emptied = callback

    def declare_queue(self, queue: Queue) -> None:
        """Declare a queue with its bindings; idempotent, and whoever waited for it starts reading."""
        existing = self._queues.get(queue.name)
        if existing is None:
            existing = self._queues[queue.name] = MemoryQueue(queue)
            self._watch_expiry(existing)
        elif _properties(existing.declared) != _properties(queue):
            raise LoRAbbitError(f"queue {queue.name} exists with other properties; delete it first")
        for exchange, pattern in queue.bindings:
            if exchange not in self._exchanges:
                raise NotDeclared(f"queue {queue.name} cannot be bound: there is no exchange {exchange}")
            self._exchanges[exchange].bind(pattern, queue.name)
        for reader in self._waiting.pop(queue.name, []):
            self._attach(reader)

    def delete_queue(self, name: str) -> None:
        """Delete a queue or stream with its messages; its readers wait until it is declared again."""
        existing = self._queues.pop(name, None)
        if existing is None:
            return
        for exchange in self._exchanges.values():
            exchange.unbind(name)
        for reader in existing.readers:
            reader.unacked.clear()
            self._waiting.setdefault(name, []).append(reader)

    def send(self, message: Outgoing, on_done: OnDone | None = None) -> None:
        """Route a message now; `on_done` is called from the loop, later."""
        error = self._publish(message)
        if on_done is not None:
            self._loop.post(partial(on_done, error))

    def subscribe(self, queue: str, on_delivery: OnDelivery, *, prefetch: int = 16) -> Cancellable:
        """Consume a queue, once it exists."""
        reader = Subscription(queue, on_delivery, prefetch, self._leave)
        self._attach(reader)
        return reader

    def read_stream(
        self, stream: str, on_delivery: OnDelivery, *, prefetch: int = 16, first: First = beginning
    ) -> Cancellable:
        """Read a stream, once it exists."""
        reader = Subscription(stream, on_delivery, prefetch, self._leave, first=first)
        self._attach(reader)
        return reader

    def _leave(self, reader: Subscription) -> None:
        """Stop a reader; what it did not acknowledge goes to others."""
        existing = self._queues.get(reader.queue)
        if existing is not None and reader in existing.readers:
            existing.readers.remove(reader)
            self._watch_expiry(existing)
            self._give_back(existing, [reader])
        waiting = self._waiting.get(reader.queue, [])
        if reader in waiting:
            waiting.remove(reader)

    def ack(self, delivery: Delivery) -> None:
        """Forget the message; nothing happens when it went back in the meantime."""
        self._settle(delivery)

    def reject(self, delivery: Delivery) -> None:
        """Move the message to the dead letters."""
        stored = self._settle(delivery)
        existing = self._queues.get(delivery.queue)
        if stored is not None and existing is not None and not existing.is_stream:
            self._bury(existing, stored)

    def reconnect(self) -> None:
        """Do what a broken connection does: every unacknowledged delivery comes again, streams from their start."""
        for existing in self._queues.values():
            self._give_back(existing, list(existing.readers))

    def empty(self) -> None:
        """Do what a broken connection to a broker that lost its volume does: only the readers are left, and wait."""
        for name in list(self._queues):
            self.delete_queue(name)
        self._exchanges.clear()
        self._loop.post(self._on_emptied)

    def run_until_idle(self) -> None:
        """Run what is due now and return; for tests that own the clock."""
        self._loop.run_until_idle()

    def health(self) -> str | None:
        """Nothing can be wrong with memory."""
        return None

    def close(self) -> None:
        """Forget every queue and reader."""
        self._queues.clear()
        self._waiting.clear()

    def _publish(self, message: Outgoing) -> LoRAbbitError | None:
        """Put a message into every queue it is routed to; the answer that a broker would give."""
        if message.exchange and message.exchange not in self._exchanges:
            return NotDeclared(f"there is no exchange {message.exchange}")
        targets = list(self._route(message))
        if not targets:
            where = f"{message.exchange}/{message.routing_key}" if message.exchange else message.routing_key
            return LoRAbbitError(f"nobody listens at {where}: no queue is bound there")
        expires_at = None if message.expires_ms is None else self._clock() + message.expires_ms / 1000
        error: LoRAbbitError | None = None
        for existing in targets:
            if existing.is_full():
                error = BrokerBusy(f"queue {existing.declared.name} is full")
                continue
            existing.put(StoredMessage(message, expires_at))
            self._pump(existing)
        return error

    def _route(self, message: Outgoing) -> Iterator[MemoryQueue]:
        if message.exchange:
            names = sorted(self._exchanges[message.exchange].route(message.routing_key))
        else:
            names = [message.routing_key]
        for name in names:
            if name in self._queues:
                yield self._queues[name]

    def _attach(self, reader: Subscription) -> None:
        existing = self._queues.get(reader.queue)
        if existing is None:
            self._waiting.setdefault(reader.queue, []).append(reader)
            return
        reader.offset = reader.first()
        existing.readers.append(reader)
        self._pump(existing)

    def _pump(self, existing: MemoryQueue) -> None:
        """Hand out what the readers have room for: a stream to each of them, a queue in turns."""
        if existing.is_stream:
            for reader in existing.readers:
                while reader.has_room and reader.offset < len(existing.messages):
                    self._deliver(reader, existing.messages[reader.offset])
                    reader.offset += 1
            return
        readers = existing.readers
        while existing.messages and any(reader.has_room for reader in readers):
            stored = existing.take()
            if stored.expires_at is not None and stored.expires_at <= self._clock():
                self._bury(existing, stored)
                continue
            while not readers[0].has_room:
                readers.rotate(-1)
            self._deliver(readers[0], stored)
            readers.rotate(-1)

    def _deliver(self, reader: Subscription, stored: StoredMessage) -> None:
        self._numbers += 1
        message, token = stored.message, MemoryToken(reader, self._numbers)
        reader.unacked[token.number] = stored
        delivery = Delivery(
            queue=reader.queue,
            routing_key=message.routing_key,
            type=message.type,
            body=message.body,
            headers=message.headers,
            sender=self._user,
            redelivered=stored.returns > 0,
            token=token,
            message_id=message.message_id,
        )
        self._loop.post(partial(_hand_over, delivery))

    def _settle(self, delivery: Delivery) -> StoredMessage | None:
        """Take a delivery off its reader; None when it is no longer the reader's."""
        token = delivery.token
        assert isinstance(token, MemoryToken)  # noqa: S101 - a delivery of another driver is a programming error
        stored = token.reader.unacked.pop(token.number, None)
        existing = self._queues.get(delivery.queue)
        if stored is not None and existing is not None:
            self._pump(existing)
        return stored

    def _give_back(self, existing: MemoryQueue, readers: list[Subscription]) -> None:
        """Put what the readers hold back in its old order, then hand it out again."""
        held = {number: stored for reader in readers for number, stored in reader.unacked.items()}
        for reader in readers:
            reader.unacked.clear()
            reader.offset = reader.first()
        if not existing.is_stream:
            limit = existing.declared.delivery_limit
            for number in sorted(held, reverse=True):
                held[number].returns += 1
                if limit is not None and held[number].returns > limit:
                    self._bury(existing, held[number])
                else:
                    existing.put_back(held[number])
        self._pump(existing)

    def _bury(self, existing: MemoryQueue, stored: StoredMessage) -> None:
        """Move a message to the queue's dead letters, if it has any."""
        exchange = existing.declared.dead_letter_exchange
        if exchange is not None:
            letter = stored.message
            self._publish(Outgoing(exchange, letter.routing_key, letter.type, letter.body, letter.headers))

    def _watch_expiry(self, existing: MemoryQueue) -> None:
        """Delete a queue that nobody has read for `expires_ms`."""
        expires_ms = existing.declared.expires_ms
        if expires_ms is None or existing.readers:
            return

        def expire() -> None:
            is_unused = not existing.readers and self._clock() - existing.unused_since >= expires_ms / 1000
            if is_unused and self._queues.get(existing.declared.name) is existing:
                self.delete_queue(existing.declared.name)

        existing.unused_since = self._clock()
        self._loop.after(expires_ms / 1000, expire)


def _properties(queue: Queue) -> tuple[object, ...]:
    """What a second declaration has to agree on; bindings may be added."""
    return queue.kind, queue.max_bytes, queue.dead_letter_exchange, queue.expires_ms, queue.delivery_limit


def _hand_over(delivery: Delivery) -> None:
    """Call the reader, unless the message went back or the reader left in the meantime."""
    token = delivery.token
    assert isinstance(token, MemoryToken)  # noqa: S101 - made by this module
    if token.number in token.reader.unacked:
        token.reader.on_delivery(delivery)
