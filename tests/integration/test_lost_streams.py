"""A stream that RabbitMQ lost for good while it was killed: its payload gets another one."""

from __future__ import annotations

from pathlib import Path

import pytest
from seen import Seen

from lorabbit.broker import topology
from lorabbit.broker.base import Outgoing, Queue
from lorabbit.broker.rabbitmq.broker import RabbitBroker
from lorabbit.transfer.chunked_transfer import StreamReader
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.transfer.stream_publisher import StreamPublisher

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
    publisher = StreamPublisher(broker, server)
    published, read = Seen(broker), Seen(broker)

    publisher.publish(ref, published.add)
    published.wait(1)
    told = ref.model_copy(update={"stream": publisher.number(ref.sha256)})
    reader = StreamReader(broker, PayloadStore(tmp_path / "client", durable=False), told, read.add)
    read.wait(1)
    publisher.withdraw(ref.sha256)

    assert (published, read) == ([None], [None])
    assert reader.received_bytes == ref.size_bytes


@pytest.mark.thorough
def test_a_stream_without_a_process_costs_nobody_the_payload(broker, rabbitmq, tmp_path):
    server = PayloadStore(tmp_path / "server", durable=False)
    ref = server.add_file(Path(__file__))
    lost = topology.adapter_stream(ref.sha256)
    broker.declare_queue(lost)
    take_the_process_from(rabbitmq, lost.name)
    broker.declare_queue(Queue("inbox", "classic"))
    published, early, read, letters = Seen(broker), Seen(broker), Seen(broker), Seen(broker)
    store = PayloadStore(tmp_path / "client", durable=False)

    too_early = StreamReader(broker, store, ref, early.add)
    publisher = StreamPublisher(broker, server)
    publisher.publish(ref, published.add)
    published.wait(1)
    broker.subscribe("inbox", letters.add)
    broker.send(Outgoing("", "inbox", "letter", b""))
    letters.wait(1)
    too_early.cancel()
    told = ref.model_copy(update={"stream": publisher.number(ref.sha256)})
    StreamReader(broker, store, told, read.add)
    read.wait(1)

    assert (published, early, read) == ([None], [], [None])
    assert told.stream == 1


def take_the_process_from(rabbitmq, stream):
    """Leave a stream as a broker does that is killed between noting it and starting it: every request for it fails."""
    answer = rabbitmq.control(
        "eval",
        f'N = rabbit_misc:r(<<"/">>, queue, <<"{stream}">>), '
        "mnesia:transaction(fun() -> [Q] = mnesia:wread({rabbit_queue, N}), P = amqqueue:set_pid(Q, none), "
        "mnesia:delete({rabbit_queue, N}), mnesia:write(rabbit_durable_queue, P, write) end).",
    )
    assert "atomic" in answer
