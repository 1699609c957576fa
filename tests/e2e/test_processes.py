"""One job, one adapter: in one process, over RabbitMQ and Redis, and whoever is killed on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import services
from processes import Event, Federation, run_embedded

CLIENTS = 3
JOB: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "tiny:bert"},
    "data": {"source": "stdlib-docs", "limit": 300, "max_length": 32},
    "rounds": 2,
    "clients": CLIENTS,
    "local": {"steps": 200, "batch_size": 8, "learning_rate": 0.001},
    "seed": 7,
}
pytestmark = [pytest.mark.services, pytest.mark.slow]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of the job as `lorabbit run` runs it."""
    return run_embedded(JOB, tmp_path_factory.mktemp("embedded"))


@pytest.fixture
def federation(tmp_path: Path, empty_rabbitmq_url: str, redis_server: services.Redis) -> Iterator[Federation]:
    started = Federation(tmp_path, empty_rabbitmq_url, redis_server.url)
    try:
        started.start(CLIENTS)
        yield started
    finally:
        started.close()


class Once:
    """Does something at the first event of a kind and round."""

    def __init__(self, kind: str, round_number: int, act: Callable[[Event], None]) -> None:
        self.kind = kind
        self.round_number = round_number
        self.act = act
        self.done = False

    def __call__(self, event: Event) -> None:
        if not self.done and event["kind"] == self.kind and event.get("round") == self.round_number:
            self.done = True
            self.act(event)


@pytest.mark.thorough
def test_processes_and_one_process_make_the_same_adapter(federation: Federation, embedded: dict[str, Any]) -> None:
    report = federation.run(JOB)

    assert report["adapter"]["sha256"] == embedded["adapter"]["sha256"]
    assert [entry["metrics"] for entry in report["rounds"]] == [entry["metrics"] for entry in embedded["rounds"]]


@pytest.mark.thorough
def test_a_client_killed_while_it_trains_changes_nothing(federation: Federation, embedded: dict[str, Any]) -> None:
    def kill(event: Event) -> None:
        client = federation.clients[federation.address_of(event["client"])]
        client.kill()
        client.start()

    killing = Once("task-progressed", 2, kill)

    report = federation.run(JOB, killing)

    assert killing.done
    assert report["adapter"]["sha256"] == embedded["adapter"]["sha256"]
    assert [entry["accepted"] for entry in report["rounds"]] == [CLIENTS] * 2


@pytest.mark.thorough
def test_a_server_killed_in_mid_round_changes_nothing(federation: Federation, embedded: dict[str, Any]) -> None:
    def kill(_: Event) -> None:
        federation.server.kill()
        federation.server.start()

    killing = Once("update-accepted", 2, kill)

    report = federation.run(JOB, killing)

    assert killing.done
    assert report["adapter"]["sha256"] == embedded["adapter"]["sha256"]
    assert [entry["accepted"] for entry in report["rounds"]] == [CLIENTS] * 2


@pytest.mark.thorough
def test_clients_with_quantized_bases_run_a_job_to_its_end_and_learn_as_much(
    federation: Federation, embedded: dict[str, Any]
) -> None:
    for address, process in list(federation.clients.items()):
        process.stop()
        federation.add_client(address, LORABBIT_QUANTISATION="int4").start()

    report = federation.run(JOB)

    losses, whole = ([entry["train_loss"] for entry in each["rounds"]] for each in (report, embedded))
    listed = httpx.get(f"{federation.url}/clients", timeout=10).json()
    assert [each["quantisation"] for each in listed if each["present"]] == ["int4"] * CLIENTS
    assert report["adapter"]["sha256"] != embedded["adapter"]["sha256"]
    assert report["base"] == embedded["base"]
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(whole, rel=0.05)


def test_a_job_that_names_data_outside_of_the_clients_folder_is_refused(federation: Federation) -> None:
    name = federation.submit(JOB | {"data": {"source": "/etc/passwd.csv"}})

    ended = list(federation.events(name))[-1]

    assert (ended["status"], ended["exit_code"]) == ("failed", 2)
    assert "data.source: '/etc/passwd.csv' is outside of this client's data folder" in ended["reason"]


def test_everybody_ends_cleanly_when_told_to_stop(federation: Federation) -> None:
    federation.run(JOB | {"rounds": 1})

    codes = [process.stop() for process in (*federation.clients.values(), federation.server)]

    assert codes == [0] * (CLIENTS + 1), federation.tails()
