"""The broker over RabbitMQ (3.10 and 4.x), with pika.

Two connections, each with an I/O thread: one publishes, one consumes, because an alarm blocks whoever
publishes and must not stop acknowledgements. The loop thread runs every callback and never touches a
socket. Works through any number of reconnects; see the modules of the parts for how.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from functools import partial

import structlog
from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker, ConnectionClosedByBroker

from lorabbit.broker import topology
from lorabbit.broker.base import Broker, Cancellable, Delivery, First, OnDelivery, OnDone, Outgoing, Queue, beginning
from lorabbit.broker.event_loop import BrokerLoop, RunsOnLoop
from lorabbit.broker.rabbitmq.connection import NOT_FOUND, Connection
from lorabbit.broker.rabbitmq.consumer import ChannelToken, Consumer
from lorabbit.broker.rabbitmq.publisher import Publisher
from lorabbit.config.network import TlsSettings, urls_of_hosts
from lorabbit.errors import BrokerFault, BrokerRefused, BrokerUnavailable, LoRAbbitError, NotDeclared
from lorabbit.runtime.backoff import shuffled

log = structlog.get_logger()

PATIENCE_SECONDS = 10.0
"""How long a blocking call waits for a connection."""
CLOSE_SECONDS = 5.0
_STARTING = "is down or inaccessible"
"""Part of the words in which a node says that a queue is not ready yet, or lost for good (404, of all codes)."""
_INTERNAL_ERROR = 541

Step = Callable[[Channel, Callable[[object], None]], object]
"""One request on a channel; calls back with the broker's answer."""


class RabbitBroker(RunsOnLoop, Broker):
    """See the module's docstring; `name` is what the broker's connection list shows."""

    def __init__(  # noqa: PLR0913 - whom to speak to, as whom, how patiently, and for how safe a keeping
        self,
        url: str,
        *,
        name: str,
        trust: TlsSettings | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
        refused_seconds: float | None = None,
        replicated: bool = False,
    ) -> None:
        """Begin to connect, in the background; raises nothing when the broker cannot be reached yet.

        The hosts that `url` names are tried in an order drawn once, so that many processes spread over them.
        `replicated` makes every queue one that outlives the loss of a node. `run` raises NotAllowed once the broker
        has known no such user for `refused_seconds`; never when None.
        """
        self._patience_seconds = patience_seconds
        self._replicated = replicated
        self._loop = BrokerLoop()
        self._consumers: set[Consumer] = set()
        self._has_sent = False
        self._exchange: str | None = None
        """One that was declared: where it is not, the broker has lost everything."""
        self._on_emptied: Callable[[], None] = lambda: None
        trust = trust or TlsSettings()
        hosts = urls_of_hosts(url)
        link = partial(Connection, shuffled(hosts), trust=trust, on_bug=self._on_bug, refused_seconds=refused_seconds)
        self._publishing, self._consuming = link(f"{name} publish"), link(f"{name} consume")
        self._publisher = Publisher(self._publishing, self._loop.post)
        self._publishing.start(on_up=self._publishing_up, on_down=self._publisher.down)
        self._consuming.start(on_up=self._consuming_up, on_down=self._consuming_down)

    def declare_exchange(self, name: str) -> None:
        """Declare a durable topic exchange; idempotent."""
        self._administer(
            lambda channel, done: channel.exchange_declare(name, exchange_type="topic", durable=True, callback=done)
        )
        self._exchange = name

    def on_broker_reset(self, callback: Callable[[], None]) -> None:
        """Call back on the loop thread each time the broker comes back without what was declared."""
        self._on_emptied = callback

    def declare_queue(self, queue: Queue) -> None:
        """Declare a durable queue with its bindings; idempotent."""
        self._administer(*_declare(topology.replicated(queue) if self._replicated else queue))

    def delete_queue(self, name: str) -> None:
        """Delete a queue or stream; a missing one is fine."""
        self._administer(lambda channel, done: channel.queue_delete(name, callback=done))

    def send(self, message: Outgoing, on_done: OnDone | None = None) -> None:
        """Hand a message to the publishing thread."""
        self._has_sent = True
        self._publishing.call(partial(self._publisher.enqueue, message, on_done))

    def subscribe(self, queue: str, on_delivery: OnDelivery, *, prefetch: int = 16) -> Cancellable:
        """Consume a queue, once it exists."""
        return self._consume(Consumer(self._consuming, queue, on_delivery, prefetch=prefetch, post=self._loop.post))

    def read_stream(
        self, stream: str, on_delivery: OnDelivery, *, prefetch: int = 16, first: First = beginning
    ) -> Cancellable:
        """Read a stream, once it exists."""
        return self._consume(
            Consumer(
                self._consuming,
                stream,
                on_delivery,
                prefetch=prefetch,
                arguments=lambda: {"x-stream-offset": first() or "first"},
                post=self._loop.post,
            )
        )

    def ack(self, delivery: Delivery) -> None:
        """Acknowledge a delivery; one from before a reconnect will come again."""
        self._settle(delivery, reject=False)

    def reject(self, delivery: Delivery) -> None:
        """Move a delivery to the dead letters."""
        self._settle(delivery, reject=True)

    def health(self) -> str | None:
        """What keeps RabbitMQ from working right now, as a sentence."""
        return self._publishing.health() or self._consuming.health()

    def close(self) -> None:
        """Wait a few seconds for what is not confirmed, then close both connections."""
        deadline = time.monotonic() + CLOSE_SECONDS
        if self._has_sent and self._publishing.has_been_up:
            answered = threading.Event()
            self._publishing.call(partial(self._publisher.when_idle, answered.set))
            answered.wait(CLOSE_SECONDS)
        for link in (self._publishing, self._consuming):
            link.close(max(1.0, deadline - time.monotonic()))

    def _consume(self, consumer: Consumer) -> Consumer:
        """Let the consuming thread know of a reader."""

        def begin() -> None:
            self._consumers.add(consumer)
            consumer.up()

        consumer.on_stopped = lambda: self._consumers.discard(consumer)
        self._consuming.call(begin)
        return consumer

    def _publishing_up(self) -> None:
        """Send on, but only after word that everything is lost, where it is."""
        self._consuming.hurry()
        if self._exchange is None:
            self._publisher.up()
            return
        answer: Future[None] = Future()
        answer.add_done_callback(self._send_on)
        look = partial(_look_for, self._exchange)
        _perform(self._publishing, (look,), answer)

    def _send_on(self, answer: Future[None]) -> None:
        if isinstance(answer.exception(), NotDeclared):
            log.warning("broker-reset", connection=self._publishing.name)
            self._loop.post(self._on_emptied)
        self._publisher.up()

    def _consuming_up(self) -> None:
        self._publishing.hurry()
        for consumer in list(self._consumers):
            consumer.up()

    def _consuming_down(self) -> None:
        for consumer in list(self._consumers):
            consumer.down()

    def _settle(self, delivery: Delivery, *, reject: bool) -> None:
        token = delivery.token
        assert isinstance(token, ChannelToken)  # noqa: S101 - a delivery of another driver is a programming error
        self._consuming.call(partial(token.consumer.settle, token.generation, token.tag, reject=reject))

    def _administer(self, *steps: Step) -> None:
        """Do requests one after the other on a channel of their own, and wait for the last answer."""
        answer: Future[None] = Future()
        self._publishing.call(partial(_perform, self._publishing, steps, answer))
        try:
            answer.result(self._patience_seconds)
        except TimeoutError as error:
            answer.cancel()
            trouble = self.health() or f"RabbitMQ gave no answer within {self._patience_seconds:.0f} s"
            raise BrokerUnavailable(trouble) from error

    def _on_bug(self, error: BaseException) -> None:
        """End the loop with an error of an I/O thread that is not the network's."""

        def fail() -> None:
            raise error

        self._loop.post(fail)


def _perform(link: Connection, steps: Iterable[Step], answer: Future[None]) -> None:
    """Do requests on a new channel of a link; on its I/O thread."""
    if answer.cancelled() or link.connection is None:
        return
    remaining = iter(steps)

    def advance(_frame: object) -> None:
        step = next(remaining, None)
        if step is not None:
            step(channel, advance)
            return
        channel.close()
        resolve(None)

    def closed(_channel: Channel, reason: Exception) -> None:
        if isinstance(reason, ConnectionClosedByBroker) and reason.reply_code == _INTERNAL_ERROR:
            resolve(BrokerFault("RabbitMQ cannot use the queue, and closes the connection over it: INTERNAL_ERROR"))
        elif not isinstance(reason, ChannelClosedByBroker):
            resolve(BrokerUnavailable(f"RabbitMQ cannot answer yet: {reason}"))
        elif _STARTING in reason.reply_text:
            resolve(BrokerFault(f"RabbitMQ cannot use the queue: {reason.reply_text}"))
        elif reason.reply_code == NOT_FOUND:
            resolve(NotDeclared(f"RabbitMQ lacks something: {reason.reply_text}"))
        else:
            resolve(BrokerRefused(f"RabbitMQ refuses: {reason.reply_text}"))

    def resolve(error: LoRAbbitError | None) -> None:
        # Whoever asked may have lost patience in this very moment.
        with contextlib.suppress(InvalidStateError):
            answer.set_exception(error) if error is not None else answer.set_result(None)

    channel = link.connection.channel(on_open_callback=advance)
    channel.add_on_close_callback(closed)


def _look_for(exchange: str, channel: Channel, done: Callable[[object], None]) -> None:
    channel.exchange_declare(exchange, passive=True, callback=done)


def _arguments(queue: Queue) -> dict[str, str | int]:
    """What RabbitMQ calls the properties of a queue."""
    arguments: dict[str, str | int] = {"x-queue-type": queue.kind}
    if queue.max_bytes is not None:
        arguments |= {"x-max-length-bytes": queue.max_bytes, "x-overflow": "reject-publish"}
    if queue.dead_letter_exchange is not None:
        arguments["x-dead-letter-exchange"] = queue.dead_letter_exchange
    if queue.expires_ms is not None:
        arguments["x-expires"] = queue.expires_ms
    if queue.delivery_limit is not None:
        arguments["x-delivery-limit"] = queue.delivery_limit
    return arguments


def _declare(queue: Queue) -> Iterator[Step]:
    """Requests that make a queue and bind it."""
    yield lambda channel, done: channel.queue_declare(
        queue.name, durable=True, arguments=_arguments(queue), callback=done
    )
    for exchange, key in queue.bindings:
        yield partial(_bind, queue.name, exchange, key)


def _bind(queue: str, exchange: str, key: str, channel: Channel, done: Callable[[object], None]) -> None:
    channel.queue_bind(queue, exchange, key, callback=done)
