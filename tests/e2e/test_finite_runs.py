"""A client that ends by itself: its exit code tells a Job of Kubernetes whether it is done."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import services
from processes import Federation

JOB = {"name": "finite", "model": {"name": "null:20KB"}, "rounds": 1, "clients": 1}
OVER, LEFT_OVER = 0, 128 + signal.SIGTERM
pytestmark = pytest.mark.services


@pytest.fixture
def federation(tmp_path: Path, empty_rabbitmq_url: str, redis_server: services.Redis) -> Iterator[Federation]:
    quick = {"LORABBIT_HEARTBEAT_SECONDS": "0.2"}
    started = Federation(tmp_path, empty_rabbitmq_url, redis_server.url, server=quick)
    try:
        started.start(0)
        yield started
    finally:
        started.close()


def await_client(federation: Federation) -> None:
    """Wait until the server has welcomed a client."""
    deadline = time.monotonic() + 60
    while not httpx.get(f"{federation.url}/clients", timeout=10).json():
        assert time.monotonic() < deadline, federation.tails()
        time.sleep(0.1)


@pytest.mark.parametrize(("idle_seconds", "code"), [("900", LEFT_OVER), (None, OVER)])
def test_a_client_that_is_told_to_leave_has_failed_only_where_it_was_to_end_by_itself(
    federation: Federation, idle_seconds: str | None, code: int
) -> None:
    settings = {"LORABBIT_IDLE_SECONDS": idle_seconds} if idle_seconds else {}
    client = federation.add_client("fed-finite-0", **settings)
    client.start()
    await_client(federation)

    assert client.stop() == code, client.tail()


def test_a_client_that_leaves_after_its_last_task_has_done_its_part(federation: Federation) -> None:
    client = federation.add_client("fed-finite-0", LORABBIT_IDLE_SECONDS="1")
    client.start()

    federation.run(JOB)

    assert client.wait(60) == OVER, client.tail()
