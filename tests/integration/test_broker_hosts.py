"""URLs with several hosts, some of which do not answer: TLS, the management interface, and what doctor says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import services
from proxy import Proxy
from services import free_port, serve

from lorabbit.broker.rabbitmq.broker import RabbitBroker
from lorabbit.config.enrollment import password_hash
from lorabbit.config.network import TlsSettings
from lorabbit.errors import BrokerUnavailable
from lorabbit_cli import doctor
from lorabbit_server.clients.rabbitmq_admin import RabbitMqAdmin

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def broker(certificates):
    """A RabbitMQ with a management interface and a TLS listener."""
    yield from serve(lambda: services.RabbitMQ(admin=True, certificates=certificates))


@pytest.fixture
def nobody():
    """A place where nobody listens."""
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def links(broker):
    """Two ways to the management interface, as if to two nodes."""
    links = [Proxy(broker.management_url) for _ in range(2)]
    yield links
    for link in links:
        link.close()


def place_of(url):
    return url.rpartition("@")[2].rstrip("/")


def beside(url, *places):
    """The URL with more hosts in front of its own."""
    return url.replace(place_of(url), ",".join([*places, place_of(url)]))


@pytest.mark.slow
def test_every_host_of_a_tls_url_is_checked_against_the_authority(broker, certificates, nobody):
    driver = RabbitBroker(beside(broker.tls_url, nobody), name="hosts", trust=TlsSettings(certificates / "ca.pem"))
    other = RabbitBroker(beside(broker.tls_url, nobody), name="hosts", patience_seconds=5.0)

    driver.declare_exchange("x")
    with pytest.raises(BrokerUnavailable) as caught:
        other.declare_exchange("x")

    driver.close()
    other.close()
    assert nobody in str(caught.value)
    assert place_of(broker.tls_url) in str(caught.value)


def test_doctor_warns_of_a_host_that_is_away_while_another_one_answers(broker, nobody, monkeypatch):
    monkeypatch.setenv("LORABBIT_BROKER_URL", beside(broker.url, nobody))

    away, there = list(doctor._broker())

    assert (away.verdict, there.verdict) == ("warn", "pass")
    assert nobody in away.text
    assert "cannot be reached" in away.text
    assert there.text == f"RabbitMQ at amqp://guest:***@{place_of(broker.url)}/"
    assert doctor.exit_code([away, there]) == 0


@pytest.mark.slow
def test_doctor_fails_where_no_host_answers(nobody, monkeypatch):
    monkeypatch.setenv("LORABBIT_BROKER_URL", f"amqp://guest:s3cret@{nobody},127.0.0.1:{free_port()}/")

    found = list(doctor._broker())

    assert [finding.verdict for finding in found] == ["fail", "fail"]
    assert not any("s3cret" in finding.text for finding in found)


def test_the_node_whose_management_interface_answered_last_is_asked_first(broker, nobody, links):
    places = ",".join([nobody, *(place_of(link.url) for link in links)])
    admin = RabbitMqAdmin(f"http://guest:guest@{places}/", broker.url, TlsSettings())
    hash_ = password_hash("a password of some length")

    admin.put_user("site-a", hash_)
    links[0].accepts = False
    links[0].cut()
    seen = admin.users()
    links[0].accepts = True
    admin.delete_user("site-a")
    admin.close()

    assert seen["site-a"] == hash_
    assert (links[0].connections, links[1].connections) == (1, 1)


def test_a_user_that_two_servers_make_at_once_is_there_for_both(broker):
    two = [RabbitMqAdmin(broker.management_url, broker.url, TlsSettings()) for _ in range(2)]
    hash_ = password_hash("a password of some length")

    with ThreadPoolExecutor(2) as threads:
        for number in range(40):
            made = [threads.submit(each.put_user, f"twin-{number}", hash_) for each in two]
            assert [future.exception() for future in made] == [None, None]

    assert sum(name.startswith("twin-") for name in two[0].users()) == 40
    for each in two:
        each.close()


def test_management_interfaces_none_of_which_answers_are_all_named_without_the_password(broker, nobody):
    other = f"127.0.0.1:{free_port()}"
    admin = RabbitMqAdmin(f"http://guest:guest@{nobody},{other}/", broker.url, TlsSettings())

    with pytest.raises(BrokerUnavailable) as caught:
        admin.users()
    admin.close()

    assert f"at http://{nobody}, http://{other} cannot be reached" in str(caught.value)
    assert "guest" not in str(caught.value)
