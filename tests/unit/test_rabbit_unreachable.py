"""A RabbitMQ that was never there: what was handed over for it keeps nobody from leaving."""

from __future__ import annotations

import threading

import services

from lorabbit.broker.base import Outgoing
from lorabbit.broker.rabbitmq import broker as rabbitmq_broker


def test_a_broker_that_was_never_reached_is_closed_at_once(monkeypatch):
    monkeypatch.setattr(rabbitmq_broker, "CLOSE_SECONDS", 3600.0)
    broker = rabbitmq_broker.RabbitBroker(f"amqp://guest:guest@127.0.0.1:{services.free_port()}/", name="test")
    broker.send(Outgoing("", "inbox", "test", b"hello"))

    closing = threading.Thread(target=broker.close, daemon=True)
    closing.start()
    closing.join(60)

    assert not closing.is_alive()
