"""What RabbitMQ, the network and the disk do on purpose here, they do to users on some Tuesday."""

from __future__ import annotations

import hashlib
import threading
import time

import numpy as np
import pytest
import rabbitmq_files
import services
import structlog
from proxy import Proxy
from seen import Seen

from lorabbit.broker import topology
from lorabbit.broker.base import Outgoing, Queue
from lorabbit.errors import BrokerUnavailable, LoRAbbitError
from lorabbit.protocol.messages import PayloadRef
from lorabbit.transfer.chunked_transfer import ChunkSender, DamagedStream, StreamReader
from lorabbit.transfer.chunking import CHUNK, WINDOW
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.transfer.stream_publisher import StreamPublisher

pytestmark = pytest.mark.services
MIB = 2**20
FRAMES = MIB // 4
"""Room for what AMQP sends beside the chunks of 24 MiB."""


@pytest.fixture
def proxy(empty_rabbitmq_url):
    proxy = Proxy(empty_rabbitmq_url)
    yield proxy
    proxy.close()


@pytest.fixture
def store(tmp_path):
    return PayloadStore(tmp_path / "server", durable=False)


def noise(store, megabytes):
    """A payload that does not compress."""
    generator = np.random.default_rng(megabytes)
    return store.add_tensors({"w": generator.integers(0, 255, megabytes * MIB, dtype=np.uint8)}, chunk_bytes=MIB)


def message(body, key="q", **more):
    return Outgoing("", key, "test.v1", body, **more)


def declare(broker):
    for exchange in topology.EXCHANGES:
        broker.declare_exchange(exchange)
    for queue in topology.QUEUES:
        broker.declare_queue(queue)


def let_the_broker_note_its_queues(broker):
    """RabbitMQ loses a quorum queue or stream for good when it is killed within half a second of its declaration."""
    broker.after(1.0, broker.stop)
    broker.run()


def receive_into(broker, store, ref, seen, *, after_chunk=lambda: None):
    """Write granted chunks to a store, as the server does."""

    def on_chunk(delivery):
        store.write_chunk(ref, int(delivery.headers["index"]), delivery.body)
        broker.ack(delivery)
        after_chunk()
        if not store.missing(ref) and not seen:
            seen.add(store.finish(ref))

    broker.subscribe(topology.DATA_QUEUE.name, on_chunk, prefetch=4)


def test_a_download_goes_on_after_a_cut_in_the_middle(connect, empty_rabbitmq_url, proxy, store, tmp_path):
    ref = noise(store, 24)
    server, client = connect(empty_rabbitmq_url), connect(proxy.url)
    published = Seen(server)
    StreamPublisher(server, store).publish(ref, published.add)
    published.wait(1)
    mine = PayloadStore(tmp_path / "client", durable=False)
    cuts = [5, 12]

    class Cutting(PayloadStore):
        def write_chunk(self, ref, index, body):
            super().write_chunk(ref, index, body)
            if cuts and index == cuts[0]:
                cuts.pop(0)
                proxy.cut()

    done = Seen(client)
    reader = StreamReader(client, Cutting(mine.folder, durable=False), ref, done.add)

    done.wait(1)
    assert done == [None]
    assert cuts == []
    assert hashlib.sha256(mine.path(ref.sha256).read_bytes()).hexdigest() == ref.sha256
    here_twice = reader.received_bytes - ref.size_bytes
    assert 0 <= here_twice <= 2 * MIB  # for each cut the one that was being written
    twice_on_the_wire = proxy.returned - ref.size_bytes
    assert 0 <= twice_on_the_wire <= 2 * (WINDOW + 1) * MIB + FRAMES  # for each cut what was under way as well


def test_a_download_goes_on_with_what_another_process_left(connect, empty_rabbitmq_url, proxy, store, tmp_path):
    ref = noise(store, 24)
    server = connect(empty_rabbitmq_url)
    published = Seen(server)
    StreamPublisher(server, store).publish(ref, published.add)
    published.wait(1)
    mine = tmp_path / "client"
    half = PayloadStore(mine, durable=False)
    content = store.path(ref.sha256).read_bytes()
    for index in range(20):
        half.write_chunk(ref, index, content[index * MIB : (index + 1) * MIB])
    client = connect(proxy.url)
    done = Seen(client)

    reader = StreamReader(client, PayloadStore(mine, durable=False), ref, done.add)
    done.wait(1)

    missing = ref.size_bytes - 20 * MIB
    assert done == [None]
    assert reader.received_bytes == missing
    assert missing <= proxy.returned <= missing + FRAMES


def test_a_bit_that_flips_on_the_way_down_costs_its_chunk(connect, empty_rabbitmq_url, proxy, store, tmp_path):
    ref = noise(store, 24)
    server, client = connect(empty_rabbitmq_url), connect(proxy.url)
    published, done = Seen(server), Seen(client)
    StreamPublisher(server, store).publish(ref, published.add)
    published.wait(1)
    mine = PayloadStore(tmp_path / "client", durable=False)
    proxy.flip_a_bit(upwards=False)

    with structlog.testing.capture_logs() as logs:
        reader = StreamReader(client, mine, ref, done.add)
        done.wait(1)

    assert done == [None]
    assert proxy.has_flipped
    assert [entry["event"] for entry in logs if entry["event"].startswith("chunk-")] == ["chunk-rejected"]
    assert hashlib.sha256(mine.path(ref.sha256).read_bytes()).hexdigest() == ref.sha256
    assert reader.received_bytes == ref.size_bytes + MIB


@pytest.mark.slow
def test_an_upload_goes_on_after_a_cut_in_the_middle(connect, empty_rabbitmq_url, proxy, store, tmp_path):
    ref = noise(store, 24)
    server, client = connect(empty_rabbitmq_url), connect(proxy.url)
    declare(server)
    arrived = Seen(server)
    chunks = []

    def cut_twice():
        chunks.append(1)
        if len(chunks) in {3, 11}:
            proxy.cut()

    target = PayloadStore(tmp_path / "target", durable=False)
    receive_into(server, target, ref, arrived, after_chunk=cut_twice)
    receiving = threading.Thread(target=arrived.wait, args=(1,))
    receiving.start()
    sent = Seen(client)
    ChunkSender(client, "host-1", ref, store.path(ref.sha256), range(ref.chunks), sent.add)

    sent.wait(1)
    receiving.join()
    assert sent == [None]
    assert ref.chunks <= len(chunks) <= ref.chunks + 2 * WINDOW  # for each cut what was under way
    assert ref.size_bytes <= proxy.passed <= ref.size_bytes + 2 * WINDOW * MIB + FRAMES
    assert arrived[0].read_bytes() == store.path(ref.sha256).read_bytes()


def test_what_was_not_acknowledged_before_a_cut_comes_again(connect, proxy):
    broker = connect(proxy.url)
    broker.declare_queue(Queue("q", "quorum"))
    seen, confirmed = Seen(broker), Seen(broker)
    broker.subscribe("q", seen.add, prefetch=3)  # whatever comes beyond three says which acknowledgements arrived
    for number in range(3):
        broker.send(message(b"%d" % number), confirmed.add)
    seen.wait(3)
    broker.ack(seen[0])
    broker.send(message(b"3"), confirmed.add)
    seen.wait(4)
    confirmed.wait(4)  # what is not confirmed is sent again

    proxy.cut()
    seen.wait_until(lambda: {b"1", b"2", b"3"} <= {d.body for d in seen if d.redelivered})
    for old in seen[:4]:
        broker.ack(old)
    again = {d.body: d for d in seen if d.redelivered}
    assert set(again) == {b"1", b"2", b"3"}
    broker.ack(again[b"1"])
    broker.ack(again[b"2"])
    broker.send(message(b"4"), confirmed.add)
    broker.send(message(b"5"), confirmed.add)
    seen.wait_until(lambda: b"5" in seen.bodies)
    confirmed.wait(6)
    proxy.cut()

    count = len(seen)
    seen.wait_until(lambda: {b"3", b"4", b"5"} <= {d.body for d in seen[count:]})
    assert {d.body for d in seen[count:]} == {b"3", b"4", b"5"}


@pytest.mark.slow
def test_messages_given_away_while_the_broker_is_dead_arrive_in_order(connect, rabbitmq):
    broker = connect(rabbitmq.url)
    broker.declare_queue(Queue("q", "quorum"))
    let_the_broker_note_its_queues(broker)
    answers, seen = Seen(broker), Seen(broker)
    broker.subscribe("q", lambda delivery: (broker.ack(delivery), delivery.body in seen.bodies or seen.add(delivery)))
    for number in range(100):
        broker.send(message(b"%d" % number), answers.add)
    answers.wait(50)

    rabbitmq.kill()
    for number in range(100, 200):
        broker.send(message(b"%d" % number), answers.add)
    rabbitmq.start()

    answers.wait(200)
    seen.wait(200)
    assert answers == [None] * 200
    assert set(seen.bodies) == {b"%d" % number for number in range(200)}
    at_first = [int(delivery.body) for delivery in seen if not delivery.redelivered]
    assert at_first == sorted(at_first), "what was under way when the broker died may come behind the rest"
    assert at_first[-100:] == list(range(100, 200))
    assert broker.health() is None


def test_what_is_perishable_is_not_sent_again_on_another_connection(connect, empty_rabbitmq_url, proxy):
    broker, reader = connect(proxy.url), connect(empty_rabbitmq_url)
    broker.declare_queue(Queue("q", "quorum"))
    answers, seen = Seen(broker), Seen(reader)
    broker.send(message(b"before", drop_on_reconnect=True), answers.add)
    answers.wait(1)

    def cut_once_both_are_out():
        if len(broker._publisher._unconfirmed) < 2:
            broker.after(0.01, cut_once_both_are_out)
        else:
            proxy.cut()

    proxy.half_open()
    broker.send(message(b"perishable", drop_on_reconnect=True), lambda error: answers.add(type(error)))
    broker.send(message(b"lasting"), answers.add)
    cut_once_both_are_out()
    answers.wait(3)
    broker.send(message(b"after", drop_on_reconnect=True), answers.add)
    answers.wait(4)
    reader.subscribe("q", seen.add, prefetch=10)
    seen.wait(3)

    assert answers == [None, BrokerUnavailable, None, None]
    assert seen.bodies == [b"before", b"lasting", b"after"]


@pytest.mark.thorough
def test_an_adapter_is_read_whole_over_a_broker_that_is_killed(connect, rabbitmq, store, tmp_path):
    ref = noise(store, 8)
    server, client = connect(rabbitmq.url), connect(rabbitmq.url)
    published, done = Seen(server), Seen(client)
    StreamPublisher(server, store).publish(ref, published.add)
    published.wait(1)
    let_the_broker_note_its_queues(server)

    rabbitmq.kill()
    StreamReader(client, PayloadStore(tmp_path / "client", durable=False), ref, done.add)
    rabbitmq.start()

    done.wait(1)
    assert done == [None]


def test_a_full_queue_slows_the_sender_and_loses_nothing(connect, empty_rabbitmq_url, store, tmp_path):
    ref = noise(store, 12)
    broker = connect(empty_rabbitmq_url)
    broker.declare_exchange(topology.UP)
    broker.declare_queue(Queue(topology.DATA_QUEUE.name, "classic", ((topology.UP, "c.*.data"),), max_bytes=2 * MIB))
    sent, arrived = Seen(broker), Seen(broker)
    sender = ChunkSender(broker, "host-1", ref, store.path(ref.sha256), range(ref.chunks), sent.add)

    def drain_once_it_was_refused():
        if sender.sent_bytes <= 5 * MIB:
            broker.after(0.01, drain_once_it_was_refused)
            return
        receive_into(broker, PayloadStore(tmp_path / "target", durable=False), ref, arrived)

    drain_once_it_was_refused()

    arrived.wait(1)
    sent.wait(1)
    assert sent == [None]
    assert sender.sent_bytes > ref.size_bytes


def test_a_flipped_byte_in_the_stream_is_refused(connect, empty_rabbitmq_url, store, tmp_path):
    ref = noise(store, 3)
    broker = connect(empty_rabbitmq_url)
    stream = topology.adapter_stream(ref.sha256)
    broker.declare_queue(stream)
    content = bytearray(store.path(ref.sha256).read_bytes())
    content[MIB + 17] ^= 0x10
    for index in range(ref.chunks):
        body = bytes(content[index * MIB : (index + 1) * MIB])
        broker.send(Outgoing("", stream.name, CHUNK, body, {"index": index}))
    done = Seen(broker)

    StreamReader(broker, PayloadStore(tmp_path / "client", durable=False), ref, done.add)

    done.wait(1)
    assert [type(answer) for answer in done] == [DamagedStream]


def test_a_message_that_is_too_large_is_answered_and_the_next_one_arrives(connect, empty_rabbitmq_url):
    broker = connect(empty_rabbitmq_url)
    broker.declare_queue(Queue("q", "classic"))
    answers, seen = Seen(broker), Seen(broker)
    broker.subscribe("q", seen.add)

    broker.send(message(bytes(rabbitmq_files.MAX_MESSAGE_BYTES + 1)), answers.add)
    broker.send(message(b"small"), answers.add)

    answers.wait(2)
    seen.wait(1)
    assert isinstance(answers[0], LoRAbbitError)
    assert "larger than" in str(answers[0])
    assert answers[1] is None


def test_a_consumer_that_the_broker_drops_comes_back(connect, empty_rabbitmq_url):
    broker = connect(empty_rabbitmq_url)
    broker.declare_queue(Queue("q", "classic"))
    seen = Seen(broker)
    subscription = broker.subscribe("q", seen.add)
    broker.send(message(b"held"))
    seen.wait(1)

    # An acknowledgement of a tag that does not exist makes the broker close the channel, and only it.
    broker._consuming.call(lambda: subscription._channel.basic_ack(4711))

    seen.wait(2)
    assert [(d.body, d.redelivered) for d in seen] == [(b"held", False), (b"held", True)]


def test_a_broker_that_is_not_there_is_named(connect):
    port = services.free_port()
    broker = connect(f"amqp://guest:guest@127.0.0.1:{port}/", patience_seconds=0.2)

    with pytest.raises(BrokerUnavailable, match=f"127.0.0.1:{port} cannot be reached: Connection refused"):
        broker.declare_exchange("x")

    assert "cannot be reached" in broker.health()
    began = time.monotonic()
    broker.close()
    assert time.monotonic() - began < 3


def test_a_wrong_password_is_named(connect, rabbitmq_url):
    broker = connect(rabbitmq_url.replace("guest:guest", "guest:wrong"), patience_seconds=3)

    with pytest.raises(BrokerUnavailable, match="refuses the user guest: it has none with this password"):
        broker.declare_exchange("x")


@pytest.mark.slow
def test_an_alarm_is_shown_and_not_a_hang(connect):
    server = services.RabbitMQ("vm_memory_high_watermark.absolute = 10MB\n")
    try:
        server.start()
        broker = connect(server.url)
        broker.declare_queue(Queue("q", "classic"))
        answers, troubles = Seen(broker), Seen(broker)

        def look():
            if broker.health() is not None:
                troubles.add(broker.health())
            else:
                broker.after(0.01, look)

        broker.send(message(b"x"), answers.add)
        look()

        troubles.wait(1)
        assert "takes no messages: low on memory alarm" in troubles[0]
        assert answers == []
    finally:
        server.close()


@pytest.mark.slow
def test_200_megabytes_pass_a_broker_that_takes_16_at_a_time(connect, empty_rabbitmq_url, store, tmp_path):
    generator = np.random.default_rng(1)
    ref = store.add_tensors({"w": generator.integers(0, 255, 200_000_000, dtype=np.uint8)}, chunk_bytes=MIB)
    server, client = connect(empty_rabbitmq_url), connect(empty_rabbitmq_url)
    declare(server)
    target = PayloadStore(tmp_path / "target", durable=False)
    mine = PayloadStore(tmp_path / "client", durable=False)
    done, sent, arrived = Seen(client), Seen(client), Seen(server)
    published = Seen(server)
    publisher = StreamPublisher(server, store)
    publisher.publish(ref, published.add)
    published.wait(1)

    StreamReader(client, mine, ref, done.add)
    done.wait(1)
    publisher.withdraw(ref.sha256)
    receive_into(server, target, ref, arrived)
    ChunkSender(client, "host-1", ref, mine.path(ref.sha256), range(ref.chunks), sent.add)
    sent.wait(1)
    arrived.wait(1)

    assert (done, sent) == ([None], [None])
    assert target.add_file(arrived[0]) == PayloadRef(
        sha256=ref.sha256, size_bytes=ref.size_bytes, chunk_bytes=ref.chunk_bytes
    )
