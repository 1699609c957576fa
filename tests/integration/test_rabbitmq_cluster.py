"""A cluster of RabbitMQ loses a node: the majority serves, and whoever was connected there goes to the next host."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pika
import pytest
import structlog
from cluster import NODES, Cluster, url_of_hosts
from proxy import Proxy
from seen import Seen
from services import free_port, serve

from lorabbit.broker import topology
from lorabbit.broker.base import Outgoing, Queue
from lorabbit.broker.rabbitmq.broker import RabbitBroker
from lorabbit.config.network import urls_of_hosts
from lorabbit.errors import BrokerRefused, BrokerUnavailable
from lorabbit.transfer.chunked_transfer import ChunkSender, StreamReader
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.transfer.stream_publisher import StreamPublisher

pytestmark = [pytest.mark.services, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster():
    yield from serve(lambda: Cluster(vhosts=11))


@pytest.fixture
def url(cluster):
    """URL of an empty virtual host, with every node there."""
    cluster.start()
    return cluster.empty_url()


@pytest.fixture
def connect(connect):
    """Drivers that declare every queue with copies."""
    return partial(connect, replicated=True)


@pytest.fixture
def store(tmp_path):
    return PayloadStore(tmp_path / "server", durable=False)


def noise(store):
    """A payload of 12 MiB that does not compress."""
    generator = np.random.default_rng(1)
    return store.add_tensors({"w": generator.integers(0, 255, 12 * 2**20, dtype=np.uint8)}, chunk_bytes=2**18)


def vhost_of(url):
    return url.rpartition("/")[2]


def message(number):
    return Outgoing("", "q", "test.v1", b"%d" % number)


def node_of(cluster, broker):
    """The node that a broker's driver publishes over."""
    return next(node for node in cluster.nodes if node.port == broker._publishing.parameters.port)


def let_the_cluster_note_its_queues(broker):
    """RabbitMQ loses a quorum queue or stream for good when it is killed within half a second of its declaration."""
    broker.after(1.0, broker.stop)
    broker.run()


def test_every_queue_and_stream_has_a_copy_on_each_of_three_nodes(cluster, url, connect):
    broker = connect(url)
    queues = [*topology.QUEUES, topology.inbox("site-0"), topology.adapter_stream("0" * 64)]
    for exchange in topology.EXCHANGES:
        broker.declare_exchange(exchange)
    for queue in queues:
        broker.declare_queue(queue)

    members = cluster.members(vhost_of(url))

    assert {queue.name for queue in queues} == set(members)
    assert all(len(nodes) == NODES for nodes in members.values()), members


def test_hosts_that_do_not_answer_are_passed_over(cluster, url, connect):
    nobody = [f"127.0.0.1:{free_port()}" for _ in range(3)]
    only = urls_of_hosts(url)[1]
    place = f"127.0.0.1:{cluster.nodes[1].port}"

    broker = connect(only.replace(place, ",".join([*nobody, place])))

    broker.declare_queue(Queue("q", "classic"))
    assert node_of(cluster, broker) is cluster.nodes[1]
    assert broker.health() is None


def test_hosts_none_of_which_answers_are_all_named(connect):
    places = [f"127.0.0.1:{free_port()}" for _ in range(3)]
    broker = connect(f"amqp://guest:guest@{','.join(places)}/", patience_seconds=1.0)

    with pytest.raises(BrokerUnavailable) as caught:
        broker.declare_exchange("x")

    said = str(caught.value)
    assert all(place in said for place in places)
    assert "cannot be reached: Connection refused" in said
    assert "guest" not in said


def test_processes_spread_over_the_hosts(cluster, url, connect):
    brokers = [connect(url) for _ in range(12)]
    for broker in brokers:
        broker.declare_exchange("x")

    nodes = [node_of(cluster, broker) for broker in brokers]

    assert len({node.port for node in nodes}) > 1  # by chance one node in 3 ** 11


def test_confirmed_messages_outlive_the_node_that_confirmed_them(cluster, url, connect):
    broker = connect(url)
    broker.declare_queue(Queue("q", "classic"))  # is replicated, like every queue of a driver that is told so
    let_the_cluster_note_its_queues(broker)
    answers, seen = Seen(broker), Seen(broker)
    for number in range(100):
        broker.send_with_retry(message(number), answers.add)
    answers.wait(50)
    lost = node_of(cluster, broker)

    with structlog.testing.capture_logs() as logs:
        lost.kill()
        for number in range(100, 200):
            broker.send_with_retry(message(number), answers.add)
        answers.wait(200)

    assert answers == [None] * 200
    assert node_of(cluster, broker) is not lost
    assert {"broker-lost", "broker-connected"} <= {entry["event"] for entry in logs}
    broker.subscribe("q", lambda delivery: (broker.ack(delivery), delivery.body in seen or seen.add(delivery.body)))
    seen.wait(200)
    assert set(seen) == {b"%d" % number for number in range(200)}


@pytest.mark.thorough
def test_a_reader_goes_on_where_another_node_leads_its_queue(cluster, url, connect):
    leading, reading = connect(urls_of_hosts(url)[0]), connect(urls_of_hosts(url)[1])
    leading.declare_queue(Queue("q", "classic"))  # led by the node over which it was declared
    let_the_cluster_note_its_queues(leading)
    answers, seen = Seen(reading), Seen(reading)
    reading.subscribe("q", lambda delivery: (reading.ack(delivery), seen.add(delivery.body)))
    reading.send_with_retry(message(0), answers.add)
    seen.wait(1)

    cluster.nodes[0].kill()
    for number in range(1, 50):
        reading.send_with_retry(message(number), answers.add)

    answers.wait(50)
    assert answers == [None] * 50
    wanted = {b"%d" % number for number in range(50)}
    seen.wait_until(lambda: set(seen) == wanted)


@pytest.mark.thorough
def test_an_adapter_is_read_whole_while_the_reader_loses_its_node(cluster, url, connect, store, tmp_path):
    ref = noise(store)
    server, client = connect(url), connect(url)
    published, done = Seen(server), Seen(client)
    StreamPublisher(server, store).publish(ref, published.add)
    published.wait(1)
    let_the_cluster_note_its_queues(server)
    lost = []

    class Killing(PayloadStore):
        def write_chunk(self, ref, index, body):
            super().write_chunk(ref, index, body)
            if not lost and index == 5:
                lost.append(next(n for n in cluster.nodes if n.port == client._consuming.parameters.port))
                lost[0].kill()

    StreamReader(client, Killing(tmp_path / "client", durable=False), ref, done.add)

    done.wait(1)
    assert done == [None]
    assert len(lost) == 1


@pytest.mark.thorough
def test_an_update_arrives_whole_while_the_node_of_its_queue_is_lost(cluster, url, connect, store, tmp_path):
    ref = noise(store)
    server, client = connect(urls_of_hosts(url)[1]), connect(url)
    founder = connect(urls_of_hosts(url)[0])  # its node leads the queues
    for exchange in topology.EXCHANGES:
        founder.declare_exchange(exchange)
    for queue in topology.QUEUES:
        founder.declare_queue(queue)
    let_the_cluster_note_its_queues(founder)
    target, arrived, chunks = PayloadStore(tmp_path / "target", durable=False), Seen(server), Seen(server)

    def on_chunk(delivery):
        target.write_chunk(ref, int(delivery.headers["index"]), delivery.body)
        server.ack(delivery)
        chunks.add(delivery.message_id)
        if len(chunks) == 5:
            cluster.nodes[0].kill()
        if not target.missing(ref) and not arrived:
            arrived.add(target.finish(ref))

    server.subscribe(topology.DATA_QUEUE.name, on_chunk, prefetch=4)
    sent = Seen(client)
    uploading = threading.Thread(target=sent.wait, args=(1,))
    ChunkSender(client, "site-0", ref, store.path(ref.sha256), range(ref.chunks), sent.add)
    uploading.start()

    arrived.wait(1)
    uploading.join()
    assert sent == [None]
    assert arrived[0].read_bytes() == store.path(ref.sha256).read_bytes()


@pytest.mark.thorough
def test_a_reader_leaves_a_node_that_has_no_copy_of_its_stream(cluster, url, connect):
    here, elsewhere = urls_of_hosts(url)[:2]
    with pika.BlockingConnection(pika.URLParameters(here)) as connection:
        channel = connection.channel()
        arguments = {"x-queue-type": "stream", "x-initial-cluster-size": 1, "x-queue-leader-locator": "client-local"}
        channel.queue_declare("s", durable=True, arguments=arguments)
        channel.basic_publish("", "s", b"chunk", pika.BasicProperties(type="test.v1"))
    door = Proxy(here)
    door.accepts = False
    try:
        reader = connect(url_of_hosts([door.url, elsewhere]))
        seen = Seen(reader)
        reader.read_stream("s", seen.add)
        reader.declare_exchange("x")
        assert node_of(cluster, reader) is cluster.nodes[1]
        door.accepts = True

        with structlog.testing.capture_logs() as logs:
            seen.wait(1)
    finally:
        door.close()

    assert seen.bodies == [b"chunk"]
    assert "s has no copy at this node" in {entry.get("why") for entry in logs}


def test_queues_of_one_node_are_not_taken_for_replicated_ones(url, connect):
    before = RabbitBroker(url, name="before")
    before.declare_queue(Queue("q", "classic"))
    before.close()

    with pytest.raises(BrokerRefused, match=r"inequivalent arg 'x-queue-type' for queue 'q'"):
        connect(url).declare_queue(Queue("q", "classic"))
