"""Two clients with one address, as two devices with one host name have, or with one name: one stops and says why."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import services
from processes import Event, Federation, run_embedded

JOB = {"name": "twins", "model": {"name": "null:40KB"}, "rounds": 120, "clients": 2, "seed": 3}
BAD_INPUT = 2
WATCHDOG_SECONDS = 60
pytestmark = [pytest.mark.services, pytest.mark.slow]


@pytest.fixture
def federation(tmp_path: Path, empty_rabbitmq_url: str, redis_server: services.Redis) -> Iterator[Federation]:
    often = {"LORABBIT_HEARTBEAT_SECONDS": "0.5"}
    started = Federation(tmp_path, empty_rabbitmq_url, redis_server.url, server=often)
    yield started
    started.close()


@pytest.mark.thorough
def test_the_second_client_at_an_address_stops_and_says_why_and_the_run_does_not_notice(
    federation: Federation, tmp_path: Path
) -> None:
    federation.start(2)
    twin = federation.add_client("twin", LORABBIT_ADDRESS="site-0")

    def disturb(event: Event) -> None:
        if event["kind"] == "round-closed" and event["round"] == 1:
            twin.start()
        if event["kind"] == "round-closed" and event["round"] == JOB["rounds"] - 1:
            assert twin.wait(30) == BAD_INPUT

    report = federation.run(JOB, disturb)

    assert "another client is at the address 'site-0'; give this one its own with LORABBIT_ADDRESS" in twin.tail()
    assert report["adapter"]["sha256"] == run_embedded(JOB, tmp_path / "embedded")["adapter"]["sha256"]
    there = httpx.get(f"{federation.url}/clients", timeout=10).json()
    assert sorted((each["address"], each["present"]) for each in there) == [("site-0", True), ("site-1", True)]


def test_of_two_clients_that_were_given_one_name_one_stops_and_says_why(federation: Federation) -> None:
    federation.server.start()
    federation.await_server()
    twins = [federation.add_client(place, LORABBIT_CLIENT="hospital") for place in ("site-0", "site-1")]
    for twin in twins:
        twin.start()
    deadline = time.monotonic() + WATCHDOG_SECONDS
    while not any(twin.has_ended for twin in twins) and time.monotonic() < deadline:
        time.sleep(0.1)
    ended = next(twin for twin in twins if twin.has_ended)

    assert ended.wait(1) == BAD_INPUT
    assert "another client took the name 'hospital'; give this one its own with LORABBIT_CLIENT" in ended.tail()
    assert [twin.is_running for twin in twins].count(True) == 1
