"""Fixtures that every test may use: real RabbitMQ and Redis, shared or private.

`rabbitmq_url` and `redis_url` are shared by the whole run (or come from LORABBIT_TEST_BROKER_URL and
LORABBIT_TEST_REDIS_URL); `empty_rabbitmq_url` is a virtual host of its own on the shared broker; `rabbitmq`
and `redis_server` are private to one test, which may kill them. Without services the tests that
ask for them are skipped on a laptop and fail where CI=true.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import services
import structlog
from family import Family
from hypothesis import HealthCheck, settings
from services import serve

# The same examples in every run; `--hypothesis-profile=explore` tries new ones, as `make test-all` does.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "max_examples": 60}
settings.register_profile("fixed", derandomize=True, database=None, **COMMON)
settings.register_profile("explore", **COMMON)
settings.load_profile("fixed")
LINKS = (" publish", " consume")
"""How the names of the two threads of a connection to RabbitMQ end."""


def links() -> set[threading.Thread]:
    """The threads of this process that keep a connection to RabbitMQ."""
    return {thread for thread in threading.enumerate() if thread.name.endswith(LINKS)}


@pytest.fixture(autouse=True, scope="module")
def every_broker_is_closed() -> Iterator[None]:
    """A connection that a module leaves open would try for ever, beside the tests of the next one."""
    before = links()
    yield
    for thread in links() - before:
        thread.join(10.0)
    assert not links() - before, "a broker is not closed"


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """Undo what a command under test made of the log: its level, and a stream that is closed by now."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def family() -> Family:
    """The processes that this test starts; ask for it before what starts them."""
    return Family()


@pytest.fixture(scope="session")
def shared_rabbitmq() -> Iterator[services.RabbitMQ]:
    """The run's broker; never kill it (ask for `rabbitmq` instead)."""
    yield from serve(lambda: services.RabbitMQ(vhosts=100))


@pytest.fixture(scope="session")
def rabbitmq_url(request: pytest.FixtureRequest) -> str:
    """AMQP URL of a broker that the whole run shares, declarations and all."""
    return os.environ.get("LORABBIT_TEST_BROKER_URL") or request.getfixturevalue("shared_rabbitmq").url


@pytest.fixture
def empty_rabbitmq_url(request: pytest.FixtureRequest) -> str:
    """AMQP URL of a virtual host that no other test uses (a broker given by URL is taken as it is)."""
    return os.environ.get("LORABBIT_TEST_BROKER_URL") or request.getfixturevalue("shared_rabbitmq").empty_url()


@pytest.fixture(scope="module")
def module_rabbitmq_url(request: pytest.FixtureRequest) -> str:
    """AMQP URL of a virtual host that the tests of one module share."""
    return os.environ.get("LORABBIT_TEST_BROKER_URL") or request.getfixturevalue("shared_rabbitmq").empty_url()


@pytest.fixture
def rabbitmq() -> Iterator[services.RabbitMQ]:
    """A broker of this test's own, to kill and start again."""
    yield from serve(services.RabbitMQ)


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[services.Redis]:
    """The run's Redis; never kill it (ask for `redis_server` instead)."""
    yield from serve(services.Redis)


@pytest.fixture(scope="session")
def redis_url(request: pytest.FixtureRequest) -> str:
    """URL of a Redis that the whole run shares, keys and all."""
    return os.environ.get("LORABBIT_TEST_REDIS_URL") or request.getfixturevalue("shared_redis").url


@pytest.fixture
def redis_server() -> Iterator[services.Redis]:
    """A Redis of this test's own, to kill and start again."""
    yield from serve(services.Redis)


@pytest.fixture(scope="module")
def module_redis() -> Iterator[services.Redis]:
    """A Redis that the tests of one module share."""
    yield from serve(services.Redis)
