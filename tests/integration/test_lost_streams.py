"""A stream that RabbitMQ lost for good while it was killed: its payload gets another one."""

from __future__ import annotations

from pathlib import Path

import pytest
from seen import Seen

from lorabbit.broker import topology
from lorabbit.broker.rabbit import RabbitBroker
from lorabbit.payloads import PayloadStore
from lorabbit.publishing import AdapterPublisher
from lorabbit.transfer import AdapterReader

pytestmark = [pytest.mark.services, pytest.mark.slow]


@pytest.fixture
def broker(rabbitmq):
    broker = RabbitBroker(rabbitmq.url, name="lost-streams")
    yield broker
    broker.close()


def test_a_payload_whose_stream_the_broker_lost_is_published_and_read_all_the_same(broker, rabbitmq, tmp_path):
    server = PayloadStore(tmp_path / "server", durable=False)
    ref = server.add_file(Path(__file__))
    broker.declare_queue(topology.adapter_stream(ref.sha256))
    rabbitmq.kill()
    rabbitmq.start()
    publisher = AdapterPublisher(broker, server)
    published, read = Seen(broker), Seen(broker)

    publisher.publish(ref, published.add)
    published.wait(1)
    told = ref.model_copy(update={"stream": publisher.number(ref.sha256)})
    reader = AdapterReader(broker, PayloadStore(tmp_path / "client", durable=False), told, read.add)
    read.wait(1)
    publisher.withdraw(ref.sha256)

    assert (published, read) == ([None], [None])
    assert reader.received_bytes == ref.size_bytes
