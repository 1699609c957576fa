"""The outbox publisher: sends committed messages to the broker, in order for each client.

A message that names payloads waits until their streams hold a first chunk: RabbitMQ 3.10 refuses a consumer of a stream
that is being created, and sometimes fails. Later messages to the same client wait too, so that a cancellation is never
sent before its task.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeAlias

import structlog

from lorabbit.broker import topology
from lorabbit.broker.base import Outgoing
from lorabbit.errors import BrokerBusy, BrokerRefused, LoRAbbitError
from lorabbit.protocol import codec
from lorabbit.protocol.messages import Task
from lorabbit.runtime import failpoints
from lorabbit_server.context import ServerContext
from lorabbit_server.transfer.traffic_meter import TrafficMeter

RETRY_SECONDS = 1.0
Entry: TypeAlias = dict[str, str]
"""One message: ``address``, ``type``, ``task``, ``body``, ``message_id``, ``payloads`` (hashes separated by spaces)."""

log = structlog.get_logger()


class OutboxPublisher:
    """See the module's docstring; for the loop thread."""

    def __init__(
        self,
        context: ServerContext,
        meter: TrafficMeter,
        on_confirmed: Callable[[str], None],
        on_failed: Callable[[str, Exception], None],
    ) -> None:
        """Count what is sent; call `on_confirmed` with the id of a step when the broker has confirmed all its messages.

        `on_failed` is called for a message that the broker refuses for good.
        """
        self._broker, self._loop, self._epoch = context.broker, context.loop, context.epoch
        self._publisher, self._meter = context.publisher, meter
        self._on_confirmed, self._on_failed = on_confirmed, on_failed
        self._queues: dict[str, deque[tuple[str, Entry]]] = {}
        """Messages that are waiting to be sent, by address."""
        self._unconfirmed: dict[str, int] = {}
        self._closed = False

    @property
    def is_idle(self) -> bool:
        """Whether the broker has confirmed every message."""
        return not self._unconfirmed

    def publish(self, step: str, messages: list[Entry]) -> None:
        """Send the messages of one committed step."""
        self._unconfirmed[step] = len(messages)
        for message in messages:
            queue = self._queues.get(message["address"])
            if queue is not None:
                queue.append((step, message))
            else:
                self._queues[message["address"]] = deque([(step, message)])
                self._send_ready(message["address"])

    def close(self) -> None:
        """Stop sending."""
        self._closed = True

    def _send_ready(self, address: str) -> None:
        """Send the messages of one client, up to the first whose payloads are not yet readable."""
        if self._closed:
            return
        queue = self._queues[address]
        while queue:
            step, message = queue[0]
            for sha256 in message.get("payloads", "").split():
                if self._publisher.when_readable(sha256, lambda: self._send_ready(address)):
                    return
            queue.popleft()
            self._send(step, message)
        del self._queues[address]

    def _send(self, step: str, message: Entry) -> None:
        """Send one message; retry while the broker is busy."""
        if self._closed:
            return

        def done(error: LoRAbbitError | None) -> None:
            if isinstance(error, BrokerBusy):
                self._loop.after(RETRY_SECONDS, lambda: self._send(step, message))
                return
            if error is not None:
                log.warning("message-undeliverable", address=message["address"], type=message["type"], why=str(error))
            self._count_confirmed(step)
            if isinstance(error, BrokerRefused):
                self._on_failed(f"sending {message['type']} to {message['address']}", error)

        body = self._body(message).encode()
        self._meter.down(message["task"], len(body))
        self._broker.send(
            Outgoing(
                topology.CONTROL,
                topology.control_key(message["address"]),
                message["type"],
                body,
                {"epoch": self._epoch},
                message["message_id"],
            ),
            done,
        )
        failpoints.hit(failpoints.Failpoint.MESSAGE_SENT)

    def _body(self, message: Entry) -> str:
        """The body of a message, with the streams of its payloads where they were republished."""
        numbers = {sha256: self._publisher.number(sha256) for sha256 in message.get("payloads", "").split()}
        if not any(numbers.values()):
            return message["body"]
        return codec.encode(Task.model_validate_json(message["body"]).on_streams(numbers)).decode()

    def _count_confirmed(self, step: str) -> None:
        self._unconfirmed[step] -= 1
        if not self._unconfirmed[step]:
            failpoints.hit(failpoints.Failpoint.MESSAGES_CONFIRMED)
            del self._unconfirmed[step]
            self._on_confirmed(step)
