"""`lorabbit scale --on processes` while a job runs: no work is lost, and the adapter is what it would have been."""

# ruff: noqa: S603 - the interpreter of the test run, by path
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import services
from processes import Event, Federation, idle_job, run_embedded

# Nobody trains, so that the machine is free to start processes; the rounds outlast what is done to them.
ROUNDS = 60
JOB = idle_job(ROUNDS)
SECONDS = 120.0
pytestmark = [pytest.mark.services, pytest.mark.slow]
Scale = Callable[..., dict[str, Any]]


@pytest.fixture
def federation(tmp_path: Path, empty_rabbitmq_url: str, redis_server: services.Redis) -> Iterator[Federation]:
    started = Federation(tmp_path, empty_rabbitmq_url, redis_server.url)
    try:
        started.start(0)
        yield started
    finally:
        started.close()


@pytest.fixture
def scale(federation: Federation, tmp_path: Path, empty_rabbitmq_url: str) -> Iterator[Scale]:
    """`lorabbit scale N --on processes`; in the end there is nobody left."""
    assert federation

    def run(number: int, *more: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "lorabbit_cli", "scale", str(number), "--on", "processes", "--format", "json"]
        done = subprocess.run(
            [*command, "--folder", str(tmp_path / "clients"), *more],
            check=False, capture_output=True, text=True, timeout=SECONDS,
            env={**os.environ, "LORABBIT_BROKER_URL": empty_rabbitmq_url, "LORABBIT_DEVICE": "cpu"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    try:
        yield run
    finally:
        run(0)


def clients(federation: Federation) -> dict[str, dict[str, Any]]:
    """What the server says of every client."""
    return {entry["client"]: entry for entry in httpx.get(f"{federation.url}/clients", timeout=10).json()}


def until(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.timeout(600)
def test_a_job_loses_nothing_when_its_clients_are_taken_away_and_come_back(
    federation: Federation, scale: Scale, tmp_path: Path
):
    embedded = run_embedded(JOB, tmp_path / "embedded")
    assert scale(3)["clients"] == 3
    seen: list[str] = []

    def take_away_and_bring_back(event: Event) -> None:
        if event["kind"] == "client-lost":
            seen.append(event["client"])
        elif event["kind"] == "round-started" and event["round"] == 2:
            assert (scale(1)["before"], scale(5)["before"]) == (3, 1)

    report = federation.run(JOB, take_away_and_bring_back)

    assert len(seen) == 2
    assert report["adapter"]["sha256"] == embedded["adapter"]["sha256"]
    assert [entry["accepted"] for entry in report["rounds"]] == [3] * ROUNDS


def test_a_client_that_comes_back_is_who_it_was_and_its_pool_is_known(federation: Federation, scale: Scale):
    scale(2, "--pool", "eu")
    until(lambda: sum(entry["present"] for entry in clients(federation).values()) == 2)
    before = {name: entry["address"] for name, entry in clients(federation).items()}

    scale(0, "--pool", "eu")
    until(lambda: {entry["state"] for entry in clients(federation).values()} == {"left"})
    scale(2, "--pool", "eu")
    until(lambda: sum(entry["present"] for entry in clients(federation).values()) == 2)

    after = clients(federation)
    assert {name: entry["address"] for name, entry in after.items()} == before
    assert {entry["pool"] for entry in after.values()} == {"eu"}
    scale(0, "--pool", "eu")


@pytest.mark.thorough
def test_a_client_that_cannot_start_is_named_with_its_last_words(tmp_path: Path):
    command = [sys.executable, "-m", "lorabbit_cli", "scale", "1", "--on", "processes", "--patience", "45"]

    done = subprocess.run(
        [*command, "--folder", str(tmp_path)], check=False, capture_output=True, text=True, timeout=SECONDS,
        env={**os.environ, "LORABBIT_THREADS": "none"},
    )  # fmt: skip

    assert done.returncode == 1
    assert "0 of 1 clients are ready" in done.stderr
    assert "LORABBIT_THREADS" in done.stderr
