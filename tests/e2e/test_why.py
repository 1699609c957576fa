"""What an operator is told while something is away, by real processes over a real RabbitMQ and Redis."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import services
from processes import Federation

JOB: dict[str, Any] = {
    "name": "wait",
    "model": {"name": "tiny:bert"},
    "data": {"source": "stdlib-docs", "limit": 300, "max_length": 32},
    "rounds": 2,
    "clients": 2,
    "local": {"steps": 100_000, "batch_size": 8},
}
PATIENCE_SECONDS = 240.0
pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(900)]
Said = dict[str, Any]


@pytest.fixture
def federation(tmp_path: Path, rabbitmq: services.RabbitMQ, redis_server: services.Redis) -> Iterator[Federation]:
    made = Federation(tmp_path, rabbitmq.url, redis_server.url)
    try:
        yield made
    finally:
        made.close()


def lorabbit(url: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "lorabbit_cli", *arguments, "--server", url]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)  # noqa: S603 - of this run
    return run.stdout + run.stderr


def why(url: str, until: Callable[[Said], bool]) -> Said:
    """Ask until the answer holds what is expected."""
    deadline, told = time.monotonic() + PATIENCE_SECONDS, ""
    while time.monotonic() < deadline:
        answer = httpx.get(f"{url}/jobs/wait", timeout=30)
        told = answer.text
        found: Said = answer.json()
        if answer.is_success and until(found):
            return found
        time.sleep(0.2)
    raise AssertionError(f"never told what was expected; at last: {told}")


def owned(said: Said, owner: str) -> list[dict[str, Any]]:
    return [wait for wait in said["waits"] if wait["owner"] == owner]


@pytest.mark.thorough
def test_clients_that_lack_that_train_and_that_are_lost_are_named(federation: Federation) -> None:
    federation.start(1)
    federation.submit(JOB)

    lacking = why(federation.url, lambda said: "1 of 2 needed" in said["waits"][0]["reason"])
    federation.start_clients(1)
    training = why(federation.url, lambda said: sum(wait["fraction"] is not None for wait in said["waits"]) == 2)
    text = lorabbit(federation.url, "status", "wait")
    client = training["waits"][0]["owner"]
    federation.clients[federation.address_of(client)].kill()
    lost = why(federation.url, lambda said: any("lost" in wait["reason"] for wait in owned(said, client)))

    assert lacking["waits"][0]["owner"] == "operator"
    assert {wait["owner"] for wait in training["waits"]} == {"client-1", "client-2"}
    assert all(wait["seen_ms"] and wait["deadline_ms"] for wait in training["waits"])
    assert "round 1 waits for client-2: training, " in text
    assert " % done, last seen " in text
    (gone,) = owned(lost, client)
    assert "then it is set aside" in gone["ends"]
    assert gone["deadline_ms"] > lost["now_ms"]


def test_a_broker_that_is_away_or_takes_no_messages_is_named_with_its_begin(
    federation: Federation, rabbitmq: services.RabbitMQ
) -> None:
    federation.start(2)
    federation.submit(JOB)
    why(federation.url, lambda said: "training" in said["waits"][0]["reason"])

    rabbitmq.kill()
    away = why(federation.url, lambda said: bool(owned(said, "broker")))
    rabbitmq.start()
    back = why(federation.url, lambda said: not owned(said, "broker"))

    (wait,) = owned(away, "broker")
    assert "cannot be reached" in wait["reason"] or "broke" in wait["reason"], wait
    assert 0 < wait["since_ms"] <= away["now_ms"]
    assert owned(away, "client-1"), "who trains meanwhile is told as well"
    assert back["waits"]


@pytest.mark.thorough
def test_a_store_that_is_away_is_named_by_the_server_that_leads_from_what_it_knew(
    federation: Federation, redis_server: services.Redis
) -> None:
    federation.start(2)
    federation.submit(JOB)
    why(federation.url, lambda said: "training" in said["waits"][0]["reason"])

    redis_server.kill()
    away = why(federation.url, lambda said: bool(owned(said, "store")))
    text = lorabbit(federation.url, "why", "wait")
    redis_server.start()
    why(federation.url, lambda said: not owned(said, "store") and said["waits"])

    assert "Connection refused" in owned(away, "store")[0]["reason"]
    assert away["waits"][0]["owner"] == "store"
    assert owned(away, "client-2"), "the job is still told of, from the server's memory"
    assert "the store is unreachable: " in text


@pytest.mark.thorough
def test_a_store_that_hangs_does_not_keep_the_operator_waiting(
    federation: Federation, redis_server: services.Redis
) -> None:
    federation.start(2)
    federation.submit(JOB)
    why(federation.url, lambda said: "training" in said["waits"][0]["reason"])

    redis_server.freeze()
    try:
        hanging = why(federation.url, lambda said: bool(owned(said, "store")))
    finally:
        redis_server.thaw()

    assert owned(hanging, "store")[0]["reason"].startswith("the store is unreachable: Redis does not answer")


@pytest.mark.thorough
def test_a_server_that_stands_by_says_for_whom_and_tells_of_the_job_all_the_same(federation: Federation) -> None:
    federation.start(2)
    federation.submit(JOB)
    why(federation.url, lambda said: "training" in said["waits"][0]["reason"])

    second = federation.start_standby()
    said = why(second, lambda said: any(wait["fraction"] is not None for wait in said["waits"]))
    federation.server.kill()
    leads = why(second, lambda said: said["server"] == "this server leads")

    assert said["server"].startswith("this server stands by: the lease is held by ")
    assert {wait["owner"] for wait in said["waits"]} == {"client-1", "client-2"}
    assert leads["waits"]


def test_an_alarm_of_the_broker_is_named_although_the_server_has_nothing_to_say(
    tmp_path: Path, redis_server: services.Redis
) -> None:
    broker = services.RabbitMQ("vm_memory_high_watermark.absolute = 10MB\n")
    federation = Federation(tmp_path, broker.url, redis_server.url)
    try:
        broker.start()
        federation.start(1)
        federation.submit(JOB)

        said = why(federation.url, lambda said: bool(owned(said, "broker") and owned(said, "operator")))
    finally:
        federation.close()
        broker.close()

    (wait,) = owned(said, "broker")
    assert "takes no messages: low on memory alarm" in wait["reason"]
    assert 0 < wait["since_ms"] <= said["now_ms"]
