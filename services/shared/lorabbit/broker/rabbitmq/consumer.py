"""Consumer: one queue or stream, read on a channel of its own for as long as it is wanted.

With a channel each, what goes wrong for one reader (its queue does not exist yet, was deleted, the broker
lost patience) does not disturb the others: the channel is opened again, after a short wait. Delivery
tags belong to a channel, so each delivery carries the generation of its channel, and an
acknowledgement of an older one is dropped: the broker delivers that message again.

A stream can be read only at a node of a cluster that has a copy of it. A reader that finds none for some seconds lets
the link go to the next host.

A stream that RabbitMQ lost for good can cost whoever asks for it the whole connection. A reader that had no answer
when its connection broke therefore lets the others go first on the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import pika
import structlog
from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker

from lorabbit.broker.base import Cancellable, Delivery, OnDelivery
from lorabbit.broker.rabbitmq.connection import NOT_FOUND, Connection

FIRST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 1.0
NO_REPLICA = "does not have a replica on the local node"
"""How RabbitMQ answers who reads a stream that is just being made here (406), or at a node without a copy of it."""
TRIES_WITHOUT_COPY = 10
"""So often is a stream asked for, over five seconds, before its reader looks for it at another host."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ChannelToken:
    """Which delivery, on which channel of which consumer."""

    consumer: Consumer
    generation: int
    tag: int


class Consumer(Cancellable):
    """See the module's docstring. `cancel` is for the loop thread, everything else for the link's I/O thread."""

    def __init__(  # noqa: PLR0913 - what to read and how, and the two threads it stands between
        self,
        link: Connection,
        queue: str,
        on_delivery: OnDelivery,
        *,
        prefetch: int,
        post: Callable[[Callable[[], None]], None],
        arguments: Callable[[], Mapping[str, str | int]] = dict,
    ) -> None:
        """Prepare to read; `post` brings deliveries to the loop thread, `arguments` makes those of basic.consume."""
        self._link, self._queue, self._on_delivery = link, queue, on_delivery
        self._prefetch, self._arguments, self._post = prefetch, arguments, post
        self._generation = 0
        self._channel: Channel | None = None
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._is_asking = False
        """Whether the broker has not yet said that it lets this one read."""
        self._tries_without_copy = 0
        self._wanted = True
        self.on_stopped: Callable[[], None] = lambda: None

    def cancel(self) -> None:
        """Stop reading; what was not acknowledged goes to others."""
        if self._wanted:
            self._wanted = False
            self._link.call(self._stop)

    def up(self) -> None:
        """Read over the link's present connection."""
        if self._is_asking:
            self._open_later()
        else:
            self._retry_seconds = FIRST_RETRY_SECONDS
            self._open()

    def down(self) -> None:
        """Forget the lost connection's channel and what came over it."""
        self._generation += 1
        self._channel = None

    def settle(self, generation: int, tag: int, *, reject: bool) -> None:
        """Acknowledge or reject a delivery of the present channel; of an older one there is nothing to say."""
        if generation != self._generation or self._channel is None or not self._channel.is_open:
            return
        if reject:
            self._channel.basic_reject(tag, requeue=False)
        else:
            self._channel.basic_ack(tag)

    def _open(self) -> None:
        connection = self._link.connection
        if not self._wanted or connection is None or not connection.is_open:
            return
        self._generation += 1
        connection.channel(on_open_callback=partial(self._opened, self._generation))

    def _opened(self, generation: int, channel: Channel) -> None:
        if generation != self._generation or not self._wanted:
            channel.close()
            return
        self._channel = channel
        channel.add_on_close_callback(partial(self._closed, generation))
        # The broker cancels a consumer whose queue was deleted or moved, and says nothing else.
        channel.add_on_cancel_callback(lambda _frame: channel.close() if channel.is_open else None)
        channel.basic_qos(prefetch_count=self._prefetch, callback=lambda _frame: self._consume(generation, channel))

    def _consume(self, generation: int, channel: Channel) -> None:
        if channel.is_open:
            self._is_asking = True
            receive = partial(self._receive, generation)
            channel.basic_consume(self._queue, receive, arguments=dict(self._arguments()), callback=self._reading)

    def _reading(self, _frame: object) -> None:
        self._is_asking = False
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._tries_without_copy = 0

    def _closed(self, generation: int, _channel: Channel, reason: Exception) -> None:
        """Open another channel, soon; a lost connection brings its own."""
        if generation != self._generation:
            return
        self._generation += 1
        self._channel = None
        if isinstance(reason, ChannelClosedByBroker):
            self._is_asking = False
            self._note_refusal(reason)
        self._open_later()

    def _note_refusal(self, reason: ChannelClosedByBroker) -> None:
        if reason.reply_code == NOT_FOUND:
            return
        early = NO_REPLICA in reason.reply_text
        note = log.debug if early else log.warning
        note("consumer-closed", queue=self._queue, code=reason.reply_code, why=reason.reply_text)
        self._tries_without_copy += early
        if self._tries_without_copy == TRIES_WITHOUT_COPY:
            self._tries_without_copy = 0
            self._link.move_on(f"{self._queue} has no copy at this node")

    def _open_later(self) -> None:
        if self._wanted:
            self._link.call_later(self._retry_seconds, self._open)
            self._retry_seconds = min(LONGEST_RETRY_SECONDS, self._retry_seconds * 1.5)

    def _stop(self) -> None:
        self.on_stopped()
        self._generation += 1
        channel, self._channel = self._channel, None
        if channel is not None and channel.is_open:
            channel.close()

    def _receive(
        self,
        generation: int,
        _channel: Channel,
        method: pika.spec.Basic.Deliver,
        properties: pika.BasicProperties,
        body: bytes,
    ) -> None:
        headers = properties.headers or {}
        delivery = Delivery(
            queue=self._queue,
            routing_key=method.routing_key,
            type=properties.type or "",
            body=body,
            headers={
                name: value
                for name, value in headers.items()
                if isinstance(value, str | int) and not name.startswith("x-")
            },
            sender=properties.user_id,
            redelivered=bool(method.redelivered),
            token=ChannelToken(self, generation, method.delivery_tag),
            message_id=properties.message_id or "",
        )
        self._post(partial(self._hand_over, generation, delivery))

    def _hand_over(self, generation: int, delivery: Delivery) -> None:
        """Call the reader, on the loop thread, unless its delivery is void by now."""
        if self._wanted and generation == self._generation:
            self._on_delivery(delivery)
