"""What a client with a RabbitMQ user of its own cannot do, tried against a real broker and a server that leads.

The table in docs/explanation/permissions.md lists these tests by their names.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx
import pika
import pytest
import services
from deployment import SECONDS, Enrolling
from pika.exceptions import ChannelClosedByBroker, ConnectionClosedByBroker, ProbableAuthenticationError
from scripted_client import ScriptedClient
from services import serve

from lorabbit.broker import topology
from lorabbit.broker.base import Outgoing
from lorabbit.broker.rabbitmq.broker import RabbitBroker
from lorabbit.config.enrollment import digest
from lorabbit.config.settings import ClientSettings
from lorabbit.job.spec import JobSpec
from lorabbit.protocol import codec
from lorabbit.protocol.messages import Alive, Hello, Metrics, Offer
from lorabbit_client.agent.credentials import with_credentials

pytestmark = pytest.mark.services
NOT_ALLOWED = 403
WRONG_USER = 406
FOREIGN = Offer(job="j", task="t", client="site-b", payload=None, metrics=Metrics(num_examples=1))


@pytest.fixture(scope="module")
def managed_rabbitmq():
    yield from serve(lambda: services.RabbitMQ(vhosts=30, admin=True))


@pytest.fixture(scope="module")
def deployment(managed_rabbitmq, tmp_path_factory):
    made = Enrolling(managed_rabbitmq, tmp_path_factory.mktemp("deployment"))
    made.users = {client: made.join(client) for client in ("site-a", "site-b")}
    for client, url in made.users.items():
        broker = RabbitBroker(url, name=client)
        scripted = ScriptedClient(broker, client, made.folder / "clients")
        scripted.start()
        broker.after(SECONDS, broker.stop)
        scripted.work = lambda _client, _task: True
        original = scripted._receive

        def receive(delivery, original=original, broker=broker):
            original(delivery)
            broker.stop()

        scripted._receive = receive
        broker.run()
        assert scripted.client == client
        broker.close()
    yield made
    made.close()


@pytest.fixture
def channel(deployment):
    connection = pika.BlockingConnection(pika.URLParameters(deployment.users["site-a"]))
    opened = connection.channel()
    opened.confirm_delivery()
    yield opened
    if connection.is_open:
        connection.close()


def publish(channel, exchange, key, body=b"{}", type_name="lorabbit.alive.v1", **properties):
    channel.basic_publish(exchange, key, body, pika.BasicProperties(type=type_name, **properties), mandatory=True)


def ask(deployment, verb, path):
    """Ask the server as its operator."""
    token = {"Authorization": f"Bearer {deployment.settings.http_token}"}
    return httpx.request(verb, deployment.http.url + path, headers=token, timeout=SECONDS)


def serve_for_ever(connection):
    """Read until the broker ends the connection."""
    while True:
        connection.process_data_events(time_limit=SECONDS)


def refusals(deployment, reason, before):
    """How often the server refused a message for a reason, once that is more than before."""
    deadline = time.monotonic() + SECONDS
    while deployment.service.refused[reason] == before and time.monotonic() < deadline:
        time.sleep(0.02)
    return deployment.service.refused[reason]


FORBIDDEN = {
    "publish as another": lambda c: publish(c, topology.UP, topology.up_key("site-b")),
    "send chunks as another": lambda c: publish(c, topology.UP, topology.data_key("site-b")),
    "publish beside its own keys": lambda c: publish(c, topology.UP, "c.site-a.ctl.more"),
    "publish to a client": lambda c: publish(c, topology.CONTROL, topology.control_key("site-b")),
    "publish straight into a queue": lambda c: publish(c, "", topology.inbox("site-b").name),
    "publish a dead letter": lambda c: publish(c, topology.DEAD, "x"),
    "read another's inbox": lambda c: c.basic_get(topology.inbox("site-b").name),
    "consume another's inbox": lambda c: next(c.consume(topology.inbox("site-b").name, inactivity_timeout=5)),
    "read what clients send": lambda c: c.basic_get(topology.SERVER_QUEUE.name),
    "read dead letters": lambda c: c.basic_get(topology.DEAD_QUEUE.name),
    "empty another's inbox": lambda c: c.queue_purge(topology.inbox("site-b").name),
    "declare a queue": lambda c: c.queue_declare("mine"),
    "declare a stream of adapters": lambda c: c.queue_declare(
        topology.adapter_stream("f" * 64).name, durable=True, arguments={"x-queue-type": "stream"}
    ),
    "delete a queue": lambda c: c.queue_delete(topology.inbox("site-b").name),
    "delete its own inbox": lambda c: c.queue_delete(topology.inbox("site-a").name),
    "bind its inbox to another's messages": lambda c: c.queue_bind(
        topology.inbox("site-a").name, topology.CONTROL, topology.control_key("site-b")
    ),
    "declare an exchange": lambda c: c.exchange_declare("mine"),
    "delete an exchange": lambda c: c.exchange_delete(topology.UP),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_broker_does_not_let_a_client(what, channel):
    with pytest.raises(ChannelClosedByBroker) as caught:
        FORBIDDEN[what](channel)

    assert caught.value.reply_code == NOT_ALLOWED
    assert "ACCESS_REFUSED" in caught.value.reply_text


def test_the_table_of_permissions_lists_what_is_tried_here():
    page = (Path(__file__).parents[2] / "docs/explanation/permissions.md").read_text(encoding="utf-8")
    table = " ".join(line for line in page.splitlines() if line.startswith("| ") and "403" in line)

    assert [what for what in FORBIDDEN if what not in table] == []


def test_the_broker_does_not_let_a_client_sign_as_another(channel):
    with pytest.raises(ChannelClosedByBroker) as caught:
        publish(channel, topology.UP, topology.up_key("site-a"), user_id="site-b")

    assert caught.value.reply_code == WRONG_USER


def test_a_client_may_read_its_own_inbox_and_publish_under_its_own_address(channel, deployment):
    before = deployment.service.refused.total()
    alive = codec.encode(Alive(address="site-a", client="site-a"))

    assert channel.basic_get(topology.inbox("site-a").name, auto_ack=True) is not None
    publish(channel, topology.UP, topology.up_key("site-a"), alive, user_id="site-a")

    assert deployment.service.refused.total() == before


def test_a_client_may_not_empty_a_stream_that_others_read(channel, deployment):
    stream = topology.adapter_stream("e" * 64)
    administrator = RabbitBroker(deployment.url, name="administrator")
    administrator.declare_queue(stream)
    administrator.close()

    with pytest.raises((ChannelClosedByBroker, ConnectionClosedByBroker)) as caught:
        channel.queue_purge(stream.name)

    assert "NOT_IMPLEMENTED" in caught.value.reply_text


def test_a_client_is_nobody_at_the_management_interface(deployment):
    user = pika.URLParameters(deployment.users["site-a"]).credentials
    answer = httpx.get(f"{deployment.rabbitmq.management_url}api/users", auth=(user.username, user.password))

    assert answer.status_code == httpx.codes.UNAUTHORIZED


def test_a_client_has_no_way_into_another_virtual_host(deployment):
    elsewhere = deployment.users["site-a"].rpartition("/")[0] + "/%2F"

    with pytest.raises((ConnectionClosedByBroker, pika.exceptions.ProbableAccessDeniedError)) as caught:
        pika.BlockingConnection(pika.URLParameters(elsewhere))

    assert "530" in repr(caught.value)


@pytest.mark.parametrize(
    ("body", "signature", "reason"),
    [
        (Alive(address="site-a", client="site-a"), None, "unsigned"),
        (Alive(address="site-b", client="site-b"), "site-a", "forged"),
        (Hello(address="site-a", client="site-b"), "site-a", "forged"),
        (FOREIGN, "site-a", "unknown-client"),
    ],
    ids=["nobody", "another's address", "another's identity", "another's task"],
)
def test_the_server_refuses_and_counts_a_message_signed_or_written_as(body, signature, reason, channel, deployment):
    before = deployment.service.refused[reason]

    publish(channel, topology.UP, topology.up_key("site-a"), codec.encode(body), body.type_name(), user_id=signature)

    assert refusals(deployment, reason, before) == before + 1


def test_the_server_refuses_a_user_that_an_operator_lets_publish_as_anybody(deployment):
    before = deployment.service.refused["forged"]
    body = codec.encode(Alive(address="site-a", client="site-a"))
    powerful = RabbitBroker(deployment.url, name="powerful")
    powerful.send(Outgoing(topology.UP, topology.up_key("site-a"), Alive.type_name(), body))

    assert refusals(deployment, "forged", before) == before + 1
    powerful.close()


def test_a_token_for_newcomers_in_the_place_of_its_own_takes_nothing_from_a_client(deployment, tmp_path):
    def start(token):
        settings = {"folder": tmp_path, "client": "site-d", "server_url": deployment.http.url}
        return with_credentials(ClientSettings(**settings, broker_url="amqp://broker/", join_token=token)).broker_url

    first = start(deployment.token(uses=1))
    newcomers = deployment.token(uses=1)
    restarted = [start(newcomers), start(newcomers)]
    named = start(deployment.token(client="site-d"))

    assert restarted == [first] * 2
    assert named != first
    left = deployment.service.access.tokens(now_ms=deployment.service.now_ms())
    assert [token.digest for token in left if not token.client] == [digest(newcomers)]


def test_an_upload_that_is_replayed_counts_once(managed_rabbitmq, tmp_path):
    deployment = Enrolling(managed_rabbitmq, tmp_path)
    brokers = []
    try:
        for client in ("site-a", "site-b"):
            broker = RabbitBroker(deployment.join(client), name=client)
            scripted = ScriptedClient(broker, client, tmp_path / "clients")
            scripted.stutter = 2
            scripted.start()
            brokers.append(broker)
        job = deployment.service.submit(JobSpec(name="job", clients=2, rounds=2))
        run_until(deployment.ended, brokers)
        report = ask(deployment, "GET", f"/jobs/{job}/report").json()
    finally:
        for broker in brokers:
            broker.close()
        deployment.close()

    assert report["status"] == "done"
    assert [each["accepted"] for each in report["rounds"]] == [2, 2]


def test_a_revoked_client_reads_nothing_more_and_cannot_come_back(deployment):
    url = deployment.join("site-c")
    connection = pika.BlockingConnection(pika.URLParameters(url))
    opened = connection.channel()
    opened.confirm_delivery()
    hello = Hello(address="site-c")
    publish(opened, topology.UP, topology.up_key("site-c"), codec.encode(hello), hello.type_name(), user_id="site-c")

    answer = ask(deployment, "POST", "/clients/site-c/revoke")

    assert answer.status_code == httpx.codes.OK
    with pytest.raises((ConnectionClosedByBroker, pika.exceptions.StreamLostError)):
        serve_for_ever(connection)
    with pytest.raises(ProbableAuthenticationError):
        pika.BlockingConnection(pika.URLParameters(url))


def run_until(event, brokers):
    """Run clients' loops until something has happened."""
    threads = [threading.Thread(target=broker.run) for broker in brokers]
    for thread in threads:
        thread.start()
    happened = event.wait(SECONDS)
    for broker in brokers:
        broker.stop()
    for thread in threads:
        thread.join(20)
    assert happened
