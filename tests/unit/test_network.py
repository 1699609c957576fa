"""URLs of services: which are refused, which hosts a broker's names, and what a screen may show of them."""

from __future__ import annotations

import pytest

from lorabbit.broker import topology
from lorabbit.config.network import url_of_cluster, urls_of_hosts, without_password
from lorabbit.config.settings import ServerSettings

CLUSTER = "amqps://me:p%2Css%40@a:5671,b,[::1]:7/v?heartbeat=5"


def test_each_host_of_a_cluster_has_the_same_user_virtual_host_and_query():
    assert urls_of_hosts(CLUSTER) == (
        "amqps://me:p%2Css%40@a:5671/v?heartbeat=5",
        "amqps://me:p%2Css%40@b/v?heartbeat=5",
        "amqps://me:p%2Css%40@[::1]:7/v?heartbeat=5",
    )
    assert url_of_cluster("amqp", "amqps")(CLUSTER) == CLUSTER


def test_one_host_is_the_url_itself():
    assert urls_of_hosts("amqp://guest:a,b@host:5672/") == ("amqp://guest:a,b@host:5672/",)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("amqp://u:s3cret@a,,c/", r"amqp://HOST:PORT/ is expected, for each of the 3 hosts"),
        ("amqp://u:s3cret@a:5672,/", r"amqp://HOST:PORT/ is expected, for each of the 2 hosts"),
        ("http://u:s3cret@a,b/", r"amqp://HOST:PORT/ is expected, for each of the 2 hosts"),
        ("amqp://u:s3cret@a,b:99999/", r"a number up to 65535, for each of the 2 hosts between its commas$"),
        ("amqp://u:s3cret/x@a/", r"a number up to 65535$"),
        ("amqp://u:s3cret@a:1,b:1,a:1/", r"a host is named twice"),
    ],
)
def test_a_list_of_hosts_that_cannot_be_is_refused_without_its_password(url, why):
    with pytest.raises(ValueError, match=why) as caught:
        url_of_cluster("amqp", "amqps")(url)

    assert "s3cret" not in str(caught.value)


def test_a_password_is_not_shown():
    assert without_password("amqp://me:secret@host:5672/v") == "amqp://me:***@host:5672/v"
    assert without_password("redis://:secret@[::1]:1/0") == "redis://:***@[::1]:1/0"
    assert without_password("amqp://me:secret@a:1,b:2/v") == "amqp://me:***@a:1,b:2/v"
    assert without_password("http://host") == "http://host"


@pytest.mark.parametrize(
    ("url", "said", "replicates"),
    [
        ("amqp://a/", "", False),
        ("amqp://a,b,c/", "", True),
        ("amqp://a/", "true", True),
        ("amqp://a,b,c/", "false", False),
    ],
)
def test_queues_are_kept_by_a_majority_where_there_are_several_hosts_unless_said(url, said, replicates, monkeypatch):
    monkeypatch.setenv("LORABBIT_BROKER_URL", url)
    monkeypatch.setenv("LORABBIT_REPLICATED_QUEUES", said)

    assert ServerSettings().replicates is replicates


def test_on_a_cluster_no_queue_belongs_to_one_node():
    queues = [*topology.QUEUES, topology.inbox("site"), topology.adapter_stream("0" * 64)]

    kept = [topology.replicated(queue) for queue in queues]

    assert {queue.kind for queue in kept} == {"quorum", "stream"}
    assert all(queue.delivery_limit == topology.DELIVERIES for queue in kept if queue.kind == "quorum")
    assert [(q.name, q.bindings, q.max_bytes, q.expires_ms) for q in kept] == [
        (q.name, q.bindings, q.max_bytes, q.expires_ms) for q in queues
    ]
