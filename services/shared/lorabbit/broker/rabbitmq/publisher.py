"""Publisher: messages in order, a window of them ahead of the broker's confirmations.

A message leaves only with its confirmation. What was not confirmed when the connection broke is sent
again first, unless it is perishable. Where the broker closes the channel instead of answering (no such
exchange, too large, not allowed), it does not say for which message: the window is then sent one by one
until the guilty one is alone, and that one is answered with the broker's words.

A channel of RabbitMQ 3.10 that first meets a quorum queue while it has no leader goes on refusing messages for it
after another node leads it; a new channel finds the leader. A channel that refuses is therefore replaced, from time
to time and only once everything sent over it is answered.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pika
import structlog
from pika.channel import Channel
from pika.exceptions import ChannelClosedByBroker

from lorabbit.broker.base import OnDone, Outgoing
from lorabbit.broker.rabbitmq.connection import NOT_FOUND, Connection
from lorabbit.errors import BrokerBusy, BrokerRefused, BrokerUnavailable, LoRAbbitError, NotDeclared

WINDOW_MESSAGES = 64
WINDOW_BYTES = 8 * 2**20
REPLACE_SECONDS = 1.0
"""So old is a channel before a refusal has it replaced; a queue that is merely full costs a channel as often."""

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Item:
    """A message on its way."""

    message: Outgoing
    on_done: OnDone | None
    returned: str | None = None
    tries: int = 0


class Publisher:
    """See the module's docstring; for the link's I/O thread."""

    def __init__(self, link: Connection, post: Callable[[Callable[[], None]], None]) -> None:
        """Sign messages as the user of the link's URL; `post` brings answers to the loop thread."""
        self._link, self._post = link, post
        self._user: str | None = getattr(link.parameters.credentials, "username", None)
        self._waiting: deque[_Item] = deque()
        self._unconfirmed: dict[int, _Item] = {}
        self._unconfirmed_bytes = 0
        self._channel: Channel | None = None
        self._ready_at = 0.0
        self._is_to_go = False
        """Whether the channel is to be replaced, once everything is answered."""
        self._next_tag = 1
        self._suspects = 0
        """How many messages at the front must go alone."""
        self._when_idle: list[Callable[[], None]] = []

    def enqueue(self, message: Outgoing, on_done: OnDone | None) -> None:
        """Take a message over."""
        self._waiting.append(_Item(message, on_done))
        self._advance()

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Call back once everything taken over so far and since is answered."""
        self._when_idle.append(callback)
        self._advance()

    def up(self) -> None:
        """Open a channel on the link's present connection."""
        if self._link.connection is not None and self._link.connection.is_open:
            self._link.connection.channel(on_open_callback=self._opened)

    def down(self) -> None:
        """Take what was not confirmed back to the front, except for what has perished with the connection."""
        self._take_back()
        perished = [item for item in self._waiting if item.message.drop_on_reconnect]
        self._waiting = deque(item for item in self._waiting if not item.message.drop_on_reconnect)
        for item in perished:
            self._answer(item, BrokerUnavailable("the connection broke before RabbitMQ confirmed it"))

    def _take_back(self) -> None:
        self._channel = None
        self._waiting.extendleft(reversed(self._unconfirmed.values()))
        self._unconfirmed.clear()
        self._unconfirmed_bytes = 0

    def _opened(self, channel: Channel) -> None:
        channel.add_on_close_callback(self._closed)
        channel.add_on_return_callback(self._returned)
        channel.confirm_delivery(self._confirmed, callback=lambda _frame: self._ready(channel))

    def _ready(self, channel: Channel) -> None:
        self._channel = channel
        self._ready_at, self._is_to_go = time.monotonic(), False
        self._next_tag = 1
        self._advance()

    def _closed(self, _channel: Channel, reason: Exception) -> None:
        """Find the message that the broker answers by closing the channel."""
        if not isinstance(reason, ChannelClosedByBroker):
            return
        log.debug("channel-closed", code=reason.reply_code, why=reason.reply_text)
        suspects = list(self._unconfirmed.values())
        self._take_back()
        if len(suspects) == 1:
            self._waiting.popleft()
            self._suspects = max(0, self._suspects - 1)
            error = NotDeclared if reason.reply_code == NOT_FOUND else BrokerRefused
            self._answer(suspects[0], error(f"RabbitMQ refuses the message: {reason.reply_text}"))
        else:
            self._suspects = max(self._suspects, len(suspects))
        self.up()

    def _advance(self) -> None:
        """Send what the window has room for."""
        while self._waiting and self._channel is not None and self._has_room():
            self._publish(self._channel, self._waiting.popleft())
        if self._is_to_go and self._channel is not None and not self._unconfirmed:
            channel, self._channel = self._channel, None
            channel.close()
            self.up()
        if not self._waiting and not self._unconfirmed:
            callbacks, self._when_idle = self._when_idle, []
            for callback in callbacks:
                callback()

    def _has_room(self) -> bool:
        if self._is_to_go:
            return False
        if self._suspects:
            return not self._unconfirmed
        return len(self._unconfirmed) < WINDOW_MESSAGES and self._unconfirmed_bytes < WINDOW_BYTES

    def _publish(self, channel: Channel, item: _Item) -> None:
        message, tag = item.message, self._next_tag
        item.returned = None
        item.tries += 1
        properties = pika.BasicProperties(
            type=message.type,
            message_id=_id_of(item),
            # Confirmations name the tag but returned messages do not; this is how they are told apart.
            correlation_id=str(tag),
            headers=dict(message.headers),
            delivery_mode=pika.DeliveryMode.Persistent.value,
            user_id=self._user,
            app_id="lorabbit",
            expiration=None if message.expires_ms is None else str(message.expires_ms),
        )
        self._next_tag += 1
        self._unconfirmed[tag] = item
        self._unconfirmed_bytes += len(message.body)
        channel.basic_publish(message.exchange, message.routing_key, message.body, properties, mandatory=True)

    def _returned(
        self, _channel: Channel, method: pika.spec.Basic.Return, properties: pika.BasicProperties, _body: bytes
    ) -> None:
        item = self._unconfirmed.get(int(properties.correlation_id or 0))
        if item is not None:
            item.returned = f"{method.exchange}/{method.routing_key}" if method.exchange else str(method.routing_key)

    def _confirmed(self, frame: pika.frame.Method) -> None:
        """Answer the messages that a confirmation speaks of."""
        method = frame.method
        refused = isinstance(method, pika.spec.Basic.Nack)
        self._is_to_go |= refused and time.monotonic() - self._ready_at >= REPLACE_SECONDS
        tags = [tag for tag in self._unconfirmed if tag <= method.delivery_tag] if method.multiple else None
        for tag in tags if tags is not None else [method.delivery_tag]:
            item = self._unconfirmed.pop(tag, None)
            if item is None:
                continue
            self._unconfirmed_bytes -= len(item.message.body)
            self._suspects = max(0, self._suspects - 1)
            self._answer(item, _verdict(item, refused=refused))
        self._advance()

    def _answer(self, item: _Item, error: LoRAbbitError | None) -> None:
        if item.on_done is not None:
            self._post(partial(item.on_done, error))
        elif error is not None:
            log.warning("message-refused", type=item.message.type, to=item.message.routing_key, why=str(error))


def _id_of(item: _Item) -> str | None:
    """The message's id; another one each time it is sent again, because the receiver may get both."""
    id_ = item.message.message_id
    return f"{id_}+{item.tries - 1}" if id_ and item.tries > 1 else id_ or None


def _verdict(item: _Item, *, refused: bool) -> LoRAbbitError | None:
    """What the broker's answer means to the sender."""
    if refused:
        return BrokerBusy(f"a queue at {item.message.routing_key} is full, or without a leader")
    if item.returned is not None:
        return LoRAbbitError(f"nobody listens at {item.returned}: no queue is bound there")
    return None
