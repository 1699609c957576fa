"""TLS to a real RabbitMQ, a real Redis and the server's own HTTP interface, with certificates that lorabbit made."""

from __future__ import annotations

import pytest
import services
from fastapi import FastAPI
from services import serve
from typer.testing import CliRunner

from lorabbit.broker.base import Outgoing, Queue
from lorabbit.broker.rabbitmq.broker import RabbitBroker
from lorabbit.config.network import TlsSettings
from lorabbit.config.settings import ServerSettings
from lorabbit.errors import BadInput, ServerUnavailable, StoreUnavailable
from lorabbit.state.redis import RedisStateStore
from lorabbit_cli.__main__ import app
from lorabbit_cli.api_client import ApiClient
from lorabbit_cli.certificates import make
from lorabbit_server.http_server import HttpServer

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def trust(certificates):
    return TlsSettings(certificates / "ca.pem")


@pytest.fixture(scope="module")
def another_authority(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    make(folder)
    return TlsSettings(folder / "ca.pem")


@pytest.fixture(scope="module")
def tls_rabbitmq(certificates):
    yield from serve(lambda: services.RabbitMQ(certificates=certificates))


@pytest.fixture(scope="module")
def tls_redis(certificates):
    yield from serve(lambda: services.Redis(certificates=certificates))


@pytest.fixture
def https(certificates):
    web = FastAPI()

    @web.get("/jobs")
    def jobs() -> list[str]:
        return []

    server = HttpServer(web, "127.0.0.1", 0, cert=certificates / "server.pem", key=certificates / "server.key")
    server.start()
    yield server
    server.close()


def until_trouble(broker, text):
    """Run a broker's loop until it names a trouble with this text in it."""
    found = []

    def look():
        trouble = broker.health() or ""
        if text in trouble:
            found.append(trouble)
            broker.stop()
        else:
            broker.after(0.05, look)

    broker.after(60, broker.stop)
    broker.post(look)
    broker.run()
    return found


def sent_to_itself(broker, queue):
    """Send one message to a queue of one's own; returns what arrived."""
    received = []

    def take(delivery):
        received.append(delivery.body)
        broker.ack(delivery)
        broker.stop()

    broker.declare_queue(Queue(queue, "classic"))
    broker.subscribe(queue, take)
    broker.send(Outgoing("", queue, "x", b"over tls"))
    broker.run()
    broker.close()
    return received


@pytest.mark.slow
def test_messages_cross_a_tls_connection_to_rabbitmq(tls_rabbitmq, trust):
    broker = RabbitBroker(tls_rabbitmq.tls_url, name="tls", trust=trust)

    assert sent_to_itself(broker, "tls") == [b"over tls"]


def test_a_rabbitmq_of_another_authority_is_refused_in_one_sentence(tls_rabbitmq, another_authority):
    broker = RabbitBroker(tls_rabbitmq.tls_url, name="tls", trust=another_authority)

    (sentence,) = until_trouble(broker, "certificate")
    broker.close()

    assert sentence.startswith("RabbitMQ at 127.0.0.1:")
    assert "its certificate cannot be trusted (" in sentence
    assert sentence.endswith("; name the authority that signed it in LORABBIT_TLS_CA")
    assert len(sentence.splitlines()) == 1


def test_without_verification_any_certificate_will_do(tls_rabbitmq):
    broker = RabbitBroker(tls_rabbitmq.tls_url, name="tls", trust=TlsSettings(verify=False))

    assert sent_to_itself(broker, "unverified") == [b"over tls"]


def test_the_store_speaks_tls_to_redis(tls_redis, trust):
    store = RedisStateStore.connect(tls_redis.tls_url, trust=trust)

    assert store.acquire_lease("a", 1.0) is not None
    store.close()


def test_a_redis_of_another_authority_is_refused_in_one_sentence(tls_redis, another_authority):
    store = RedisStateStore.connect(tls_redis.tls_url, trust=another_authority, patience=0)

    with pytest.raises(StoreUnavailable) as caught:
        store.ping()
    store.close()

    assert str(caught.value).startswith("Redis does not answer: its certificate cannot be trusted (")
    assert len(str(caught.value).splitlines()) == 1


def test_the_http_interface_speaks_tls(https, trust):
    assert https.url.startswith("https://")
    with ApiClient(https.url, trust=trust) as server:
        assert server.jobs() == []


def test_a_server_of_another_authority_is_refused_in_one_sentence(https, another_authority, monkeypatch):
    with (
        ApiClient(https.url, trust=another_authority) as server,
        pytest.raises(ServerUnavailable, match="_TLS_CA"),
    ):
        server.jobs()
    monkeypatch.setenv("LORABBIT_TLS_CA", str(another_authority.ca))
    run = CliRunner().invoke(app, ["jobs", "--server", https.url])

    assert run.exit_code == 3
    assert len(run.output.splitlines()) == 1
    assert "its certificate cannot be trusted" in run.output


def test_an_http_interface_without_its_key_does_not_start(certificates, tmp_path):
    with pytest.raises(BadInput, match=r"^LORABBIT_HTTP_CERT and LORABBIT_HTTP_KEY: "):
        HttpServer(FastAPI(), "127.0.0.1", 0, cert=certificates / "server.pem", key=tmp_path / "none")


@pytest.mark.parametrize("setting", ["tls_ca", "tls_cert"])
def test_a_file_that_is_no_certificate_is_named(setting, tmp_path):
    (tmp_path / "file.pem").write_text("none")
    settings = ServerSettings(**{setting: tmp_path / "file.pem"})

    with pytest.raises(BadInput, match=f"LORABBIT_{setting.upper()}.*file.pem"):
        settings.trust.context()


def test_certificates_are_made_once_and_their_keys_are_not_everybodys(tmp_path):
    made = CliRunner().invoke(app, ["certificates", str(tmp_path / "c"), "--host", "broker.example"])
    again = CliRunner().invoke(app, ["certificates", str(tmp_path / "c")])

    assert made.exit_code == 0
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert names == {"ca.pem"} | {
        f"{n}.{end}" for n in ("rabbitmq", "redis", "server", "client") for end in ("pem", "key")
    }
    assert (tmp_path / "c" / "server.key").stat().st_mode & 0o007 == 0
    assert again.exit_code == 2
    assert "is not empty" in again.output
