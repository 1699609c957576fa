"""Payloads over the broker in memory: down by stream, up by chunks, and what may go wrong on the way."""

import zlib
from dataclasses import replace

import numpy as np
import pytest

from lorabbit.broker import topology
from lorabbit.broker.base import Outgoing, Queue
from lorabbit.broker.memory import MemoryBroker
from lorabbit.errors import BrokerUnavailable, LoRAbbitError, StoreUnavailable
from lorabbit.transfer.chunked_transfer import MAX_DAMAGES, ChunkSender, DamagedStream, StreamReader
from lorabbit.transfer.chunking import CHUNK, WINDOW, ChunkedPayload
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.transfer.stream_publisher import MAX_STREAMS, StreamPublisher


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def broker(clock):
    broker = MemoryBroker(clock=clock)
    for exchange in topology.EXCHANGES:
        broker.declare_exchange(exchange)
    for queue in topology.QUEUES:
        broker.declare_queue(queue)
    return broker


@pytest.fixture
def server_store(tmp_path):
    return PayloadStore(tmp_path / "server", durable=False)


@pytest.fixture
def client_store(tmp_path):
    return PayloadStore(tmp_path / "client", durable=False)


@pytest.fixture
def ref(server_store):
    return server_store.add_tensors({"w": np.arange(3000.0)}, chunk_bytes=1024)


def collect(broker, sink):
    broker.subscribe("lorabbit.data", lambda delivery: (broker.ack(delivery), sink.append(delivery)))


def test_a_published_adapter_arrives_whole(broker, server_store, client_store, ref):
    answers = []
    reader = StreamReader(broker, client_store, ref, answers.append)
    StreamPublisher(broker, server_store).publish(ref, answers.append)

    broker.run_until_idle()

    assert answers == [None, None]
    assert client_store.path(ref.sha256).read_bytes() == server_store.path(ref.sha256).read_bytes()
    assert reader.received_bytes == ref.size_bytes


def test_an_adapter_is_published_once(broker, server_store, tmp_path, ref):
    publisher, answers = StreamPublisher(broker, server_store), []
    publisher.publish(ref)
    broker.run_until_idle()
    publisher.publish(ref, answers.append)
    readers = [
        StreamReader(broker, PayloadStore(tmp_path / f"{n}", durable=False), ref, answers.append) for n in range(3)
    ]

    broker.run_until_idle()

    assert answers == [None] * 4
    assert [reader.received_bytes for reader in readers] == [ref.size_bytes] * 3


def test_a_client_that_holds_the_adapter_reads_nothing(broker, server_store, ref):
    answers = []

    reader = StreamReader(broker, server_store, ref, answers.append)
    assert answers == []
    broker.run_until_idle()

    assert (answers, reader.received_bytes) == ([None], 0)


def test_a_withdrawn_adapter_leaves_no_stream(broker, server_store, client_store, ref):
    publisher, answers = StreamPublisher(broker, server_store), []
    publisher.publish(ref)
    broker.run_until_idle()

    publisher.withdraw(ref.sha256)
    StreamReader(broker, client_store, ref, answers.append)
    broker.run_until_idle()

    assert answers == []
    assert client_store.missing(ref)


def test_a_reader_is_told_to_wait_until_the_first_chunk_is_in_the_stream(broker, server_store, ref):
    publisher, told = StreamPublisher(broker, server_store), []
    publisher.publish(ref)

    waits = publisher.when_readable(ref.sha256, lambda: told.append(len(told)))
    assert (waits, told) == (True, [])
    broker.run_until_idle()

    assert told == [0]
    assert not publisher.when_readable(ref.sha256, lambda: told.append(len(told)))


def test_nobody_waits_for_a_payload_that_is_not_being_published(broker, server_store, ref):
    publisher, told = StreamPublisher(broker, server_store), []
    assert not publisher.when_readable(ref.sha256, lambda: told.append("never published"))

    publisher.publish(ref)
    publisher.when_readable(ref.sha256, lambda: told.append("withdrawn"))
    publisher.withdraw(ref.sha256)
    broker.run_until_idle()

    assert told == ["withdrawn"]


def test_readers_of_a_payload_that_cannot_be_published_do_not_wait_for_ever(broker, server_store, ref):
    publisher, told = StreamPublisher(broker, server_store), []
    server_store.delete(ref.sha256)
    publisher.publish(ref)

    publisher.when_readable(ref.sha256, lambda: told.append("failed"))
    broker.run_until_idle()

    assert told == ["failed"]


def test_a_closed_publisher_leaves_streams_to_the_next_server(broker, server_store, client_store, ref):
    replaced, answers = StreamPublisher(broker, server_store), []
    replaced.publish(ref, lambda _: answers.append("published by the first"))
    replaced.close()
    StreamPublisher(broker, server_store).publish(ref, answers.append)
    StreamReader(broker, client_store, ref, answers.append)

    broker.run_until_idle()

    assert answers == [None, None]


def test_a_restarted_server_publishes_over_what_is_there(broker, server_store, client_store, ref):
    answers = []
    StreamPublisher(broker, server_store).publish(ref)
    broker.run_until_idle()
    reader = StreamReader(broker, client_store, ref, answers.append)

    StreamPublisher(broker, server_store).publish(ref)
    broker.run_until_idle()

    assert answers == [None]
    assert reader.received_bytes >= ref.size_bytes


def test_a_reader_goes_on_after_a_reconnect_with_what_it_has(broker, server_store, client_store, ref):
    StreamPublisher(broker, server_store).publish(ref)
    broker.run_until_idle()
    client_store.write_chunk(ref, 0, server_store.path(ref.sha256).read_bytes()[:1024])
    answers = []
    reader = StreamReader(broker, client_store, ref, answers.append)

    broker.reconnect()
    broker.run_until_idle()

    assert answers == [None]
    assert reader.received_bytes == ref.size_bytes - 1024


def fill(broker, store, ref, indices):
    """A payload's stream with these of its chunks, in this order."""
    stream = topology.adapter_stream(ref.sha256)
    broker.declare_queue(stream)
    chunks = ChunkedPayload(ref, store.path(ref.sha256), ("", stream.name), {})
    for index in indices:
        broker.send(chunks.message(index))


@pytest.mark.parametrize("order", ["twice", "late", "backwards"])
def test_a_reader_finds_chunks_that_stand_in_another_order(broker, server_store, client_store, ref, order):
    indices = list(range(ref.chunks))
    told = {
        "twice": [*indices[:3], *indices],
        "late": [*indices[:4], *indices[5:9], 4, *indices[9:]],
        "backwards": indices[::-1],
    }
    fill(broker, server_store, ref, told[order])
    for index in range(2):
        client_store.write_chunk(ref, index, server_store.path(ref.sha256).read_bytes()[index * 1024 :][:1024])
    answers = []

    StreamReader(broker, client_store, ref, answers.append)
    broker.run_until_idle()

    assert answers == [None]


def test_a_reader_that_finds_nothing_behind_what_it_has_reads_from_the_beginning(
    broker, clock, server_store, client_store, ref
):
    fill(broker, server_store, ref, [ref.chunks - 1, *range(ref.chunks - 1)])
    content = server_store.path(ref.sha256).read_bytes()
    for index in range(ref.chunks - 1):
        client_store.write_chunk(ref, index, content[index * 1024 :][:1024])
    answers = []
    StreamReader(broker, client_store, ref, answers.append, patience_seconds=10)
    broker.run_until_idle()
    assert answers == []

    for _ in range(2):
        clock.now += 10.0
        broker.run_until_idle()

    assert answers == [None]


class Spoiling(MemoryBroker):
    """A broker on the way to which some chunks are damaged, some of them for good."""

    damages: int = 0
    header: bool = False
    hits: int = 0

    def read_stream(self, stream, on_delivery, **how):
        def spoil(delivery):
            if delivery.headers["index"] == 5 and self.hits < self.damages:
                self.hits += 1
                if self.header:
                    delivery = replace(delivery, headers={**delivery.headers, "index": 8})
                else:
                    delivery = replace(delivery, body=b"\x01" + delivery.body[1:])
            on_delivery(delivery)

        return super().read_stream(stream, spoil, **how)


@pytest.mark.parametrize("header", [False, True])
def test_a_damaged_chunk_is_read_again_and_nothing_else(server_store, client_store, ref, header):
    broker, answers = Spoiling(), []
    StreamPublisher(broker, server_store).publish(ref)
    broker.run_until_idle()
    broker.damages, broker.header = 1, header

    reader = StreamReader(broker, client_store, ref, answers.append)
    broker.run_until_idle()

    assert answers == [None]
    assert broker.hits == 1
    assert reader.received_bytes == ref.size_bytes + 1024


def test_a_chunk_that_arrives_damaged_every_time_ends_the_read(server_store, client_store, ref):
    broker, answers = Spoiling(), []
    StreamPublisher(broker, server_store).publish(ref)
    broker.run_until_idle()
    broker.damages = 100

    StreamReader(broker, client_store, ref, answers.append)
    broker.run_until_idle()

    assert broker.hits == MAX_DAMAGES
    assert [type(answer) for answer in answers] == [DamagedStream]
    assert answers[0].ref == ref
    assert "chunk 5 of payload" in str(answers[0])
    assert 4 not in client_store.missing(ref)


def test_a_payload_whose_stream_is_damaged_gets_another_one_once(broker, server_store, client_store, ref):
    publisher, answers = StreamPublisher(broker, server_store), []
    publisher.publish(ref)
    publisher.republish(ref)
    assert publisher.number(ref.sha256) == 0, "a stream that is being filled is not renewed"
    broker.run_until_idle()

    for _ in range(2):
        publisher.republish(ref)
        broker.run_until_idle()
    told = ref.model_copy(update={"stream": publisher.number(ref.sha256)})
    StreamReader(broker, client_store, told, answers.append)
    broker.run_until_idle()
    publisher.withdraw(ref.sha256)

    assert told.stream == 1
    assert answers == [None]
    assert not [name for name in broker._queues if name.startswith(topology.ADAPTERS)]


def test_a_payload_is_not_published_again_for_ever(broker, server_store, ref):
    publisher = StreamPublisher(broker, server_store)
    publisher.publish(ref)
    broker.run_until_idle()

    for number in range(20):
        publisher.republish(ref.model_copy(update={"stream": number}))
        broker.run_until_idle()

    assert publisher.number(ref.sha256) == MAX_STREAMS


class Successive:
    """Tells whether a server still leads, as a store does that may be away."""

    def __init__(self):
        self.answer = True

    def __call__(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def held(broker):
    """How many chunks each stream holds."""
    return {name: len(queue.messages) for name, queue in broker._queues.items() if name.startswith(topology.ADAPTERS)}


def test_a_server_that_was_replaced_publishes_and_withdraws_nothing(broker, server_store, ref):
    leads, done = Successive(), []
    late = StreamPublisher(broker, server_store, leads=leads)
    StreamPublisher(broker, server_store).publish(ref)
    broker.run_until_idle()
    before = held(broker)

    leads.answer = False
    late.publish(ref, done.append)
    broker.run_until_idle()
    late.withdraw(ref.sha256)
    broker.run_until_idle()

    assert before == held(broker) == {topology.adapter_stream(ref.sha256).name: ref.chunks}
    assert done == []


@pytest.mark.parametrize("still", [True, False])
def test_whether_a_server_leads_is_asked_until_the_store_answers(broker, clock, server_store, ref, still):
    leads = Successive()
    leads.answer = StoreUnavailable("Redis is away")
    publisher, done = StreamPublisher(broker, server_store, leads=leads), []
    publisher.publish(ref, done.append)
    broker.run_until_idle()
    assert held(broker) == {}

    leads.answer = still
    clock.now += 60
    broker.run_until_idle()

    assert held(broker) == ({topology.adapter_stream(ref.sha256).name: ref.chunks} if still else {})
    assert done == ([None] if still else [])


def test_a_stream_with_a_flipped_byte_is_refused(broker, server_store, client_store, ref):
    stream = topology.adapter_stream(ref.sha256)
    broker.declare_queue(stream)
    content = bytearray(server_store.path(ref.sha256).read_bytes())
    content[5000] ^= 1
    for index in range(ref.chunks):
        body = bytes(content[index * 1024 : (index + 1) * 1024])
        broker.send(Outgoing("", stream.name, CHUNK, body, {"index": index}))
    answers = []

    StreamReader(broker, client_store, ref, answers.append)
    broker.run_until_idle()

    assert [type(answer) for answer in answers] == [DamagedStream]
    assert not client_store.has(ref.sha256)


@pytest.mark.parametrize("headers", [{}, {"index": "first"}, {"index": 10_000}])
def test_a_stream_of_something_else_is_refused(broker, client_store, ref, headers):
    stream = topology.adapter_stream(ref.sha256)
    broker.declare_queue(stream)
    broker.send(Outgoing("", stream.name, CHUNK, b"x" * 1024, headers))
    answers = []

    StreamReader(broker, client_store, ref, answers.append)
    broker.run_until_idle()

    assert [type(answer) for answer in answers] == [DamagedStream]


def silence(broker, clock, store, ref):
    """What a reader says of a stream that is not there, after as many seconds as it has patience for."""
    answers = []
    StreamReader(broker, store, ref, answers.append, patience_seconds=10)
    broker.run_until_idle()

    clock.now = 9.9
    broker.run_until_idle()
    assert answers == []
    clock.now = 10.0
    broker.run_until_idle()
    (answer,) = answers
    return answer


def test_a_read_on_which_nothing_arrives_though_the_broker_answers_ends_and_names_the_stream(
    broker, clock, client_store, ref
):
    answer = silence(broker, clock, client_store, ref)

    assert isinstance(answer, DamagedStream)
    assert answer.ref == ref
    assert "24 chunks that the server announced are not there" in str(answer)


def test_a_stream_that_lost_its_end_is_found_out_although_its_beginning_is_read_again(
    broker, clock, server_store, client_store, ref
):
    StreamPublisher(broker, server_store).publish(ref)
    broker.run_until_idle()
    (stream,) = held(broker)
    while len(broker._queues[stream].messages) > 5:
        broker._queues[stream].messages.pop()
    answers = []
    reader = StreamReader(broker, client_store, ref, answers.append, patience_seconds=10)
    for second in range(31):
        clock.now = float(second)
        broker.run_until_idle()

    assert [type(answer) for answer in answers] == [DamagedStream]
    assert "19 chunks that the server announced are not there" in str(answers[0])
    assert reader.received_bytes == 2 * 5 * 1024


def test_a_read_on_which_nothing_arrives_as_the_broker_is_away_says_so(broker, clock, client_store, ref):
    broker.health = lambda: "no route to host"

    answer = silence(broker, clock, client_store, ref)

    assert isinstance(answer, BrokerUnavailable)
    assert "no route to host" in str(answer)


def test_a_cancelled_read_tells_nothing(broker, server_store, client_store, ref):
    answers = []
    reader = StreamReader(broker, client_store, ref, answers.append)
    StreamPublisher(broker, server_store).publish(ref)

    reader.cancel()
    reader.cancel()
    broker.run_until_idle()

    assert answers == []


def test_granted_chunks_arrive_with_what_they_are_about(broker, server_store, ref):
    chunks, answers = [], []
    collect(broker, chunks)

    about = {"task": "t"}
    sender = ChunkSender(
        broker, "host-1", ref, server_store.path(ref.sha256), (1, 3, ref.chunks - 1), answers.append, about=about
    )
    broker.run_until_idle()

    content = server_store.path(ref.sha256).read_bytes()
    assert answers == [None]
    assert [delivery.body for delivery in chunks] == [content[1024:2048], content[3072:4096], content[23 * 1024 :]]
    about_chunk = {"task": "t", "sha256": ref.sha256, "size": ref.size_bytes, "index": 1}
    assert dict(chunks[0].headers) == {**about_chunk, "crc32": zlib.crc32(chunks[0].body, 1)}
    assert chunks[0].routing_key == "c.host-1.data"
    assert sender.sent_bytes == sum(len(delivery.body) for delivery in chunks)


def test_no_chunks_to_send_is_done_at_once(broker, server_store, ref):
    answers = []

    ChunkSender(broker, "host-1", ref, server_store.path(ref.sha256), (), answers.append)
    broker.run_until_idle()

    assert answers == [None]


def test_a_full_queue_makes_the_sender_wait_and_then_go_on(clock, server_store, ref):
    broker = MemoryBroker(clock=clock)
    broker.declare_exchange(topology.UP)
    broker.declare_queue(Queue("lorabbit.data", "classic", ((topology.UP, "c.*.data"),), max_bytes=3 * 1024))
    chunks, answers = [], []
    ChunkSender(broker, "host-1", ref, server_store.path(ref.sha256), range(ref.chunks), answers.append)
    broker.run_until_idle()
    assert answers == []

    collect(broker, chunks)
    clock.now += 60
    broker.run_until_idle()

    assert answers == [None]
    assert sorted(delivery.headers["index"] for delivery in chunks) == list(range(ref.chunks))


def test_a_sender_is_only_a_window_ahead(server_store, ref):
    class Silent(MemoryBroker):
        """A broker that takes messages and has not confirmed any of them yet."""

        taken = 0

        def send(self, _message, _on_done=None):
            self.taken += 1

    broker = Silent()

    ChunkSender(broker, "host-1", ref, server_store.path(ref.sha256), range(ref.chunks), print)
    broker.run_until_idle()

    assert broker.taken == WINDOW


def test_chunks_for_nobody_end_the_upload(server_store, ref):
    broker, answers = MemoryBroker(), []
    broker.declare_exchange(topology.UP)

    ChunkSender(broker, "host-1", ref, server_store.path(ref.sha256), range(ref.chunks), answers.append)
    broker.run_until_idle()

    assert [type(answer) for answer in answers] == [LoRAbbitError]


def test_a_file_that_is_gone_ends_the_upload(broker, server_store, ref):
    answers = []
    path = server_store.path(ref.sha256)
    path.unlink()

    ChunkSender(broker, "host-1", ref, path, range(ref.chunks), answers.append)
    broker.run_until_idle()

    assert len(answers) == 1
    assert "cannot be read" in str(answers[0])


def test_a_cancelled_upload_tells_nothing(broker, server_store, ref):
    chunks, answers = [], []
    collect(broker, chunks)
    sender = ChunkSender(broker, "host-1", ref, server_store.path(ref.sha256), range(ref.chunks), answers.append)

    sender.cancel()
    broker.run_until_idle()

    assert (chunks, answers) == ([], [])
