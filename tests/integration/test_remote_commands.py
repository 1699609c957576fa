"""The operator's commands against a server's real HTTP interface."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner, Result

from lorabbit.broker.memory import MemoryBroker
from lorabbit.config.logging import configure
from lorabbit.config.settings import ClientSettings, ServerSettings
from lorabbit.errors import BadInput
from lorabbit.state.redis import RedisStateStore
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit_cli.__main__ import app
from lorabbit_cli.api_client import ApiClient
from lorabbit_client.agent.agent import Agent
from lorabbit_client.agent.payload_cache import PayloadCache
from lorabbit_client.execution.runners import InlineRunner
from lorabbit_client.executor import Executor
from lorabbit_server.api.app import make_app
from lorabbit_server.api.metrics import ServerMetrics
from lorabbit_server.http_server import HttpServer
from lorabbit_server.server import Server

JOB = "name: walk\nmodel: {name: 'null:40KB'}\nrounds: 2\nclients: 3\n"
FOREVER = 1e8


class Deployment:
    """A server with its HTTP interface, and clients, in threads of this process."""

    def __init__(self, folder: Path) -> None:
        self.broker = MemoryBroker()
        self.store = RedisStateStore.embedded()
        settings = ServerSettings(
            folder=folder / "server", durable=False, lease_seconds=FOREVER, client_lease_seconds=FOREVER
        )
        self.service = Server(self.broker, self.store, settings, owner="test")
        self.http = HttpServer(make_app(self.service, ServerMetrics()), "127.0.0.1", 0)
        self.cache = PayloadCache(self.broker, PayloadStore(folder / "payloads", durable=False), keep=4)
        self.folder = folder
        self.thread = threading.Thread(target=self.broker.run, name="loop")

    def start(self) -> None:
        self.service.start()
        self.thread.start()
        self.http.start()

    def add_clients(self, number: int, prefix: str = "client", **settings_of_all: Any) -> None:
        for name in (f"{prefix}-{n}" for n in range(1, number + 1)):
            settings = ClientSettings(
                folder=self.folder / name, address=name, client=name, device="cpu", **settings_of_all
            )
            agent = Agent(self.broker, InlineRunner(Executor()), settings, cache=self.cache, embedded=True)
            self.broker.post(agent.start)

    def await_clients(self, number: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.service.registry.present) < number:
            assert time.monotonic() < deadline, f"{len(self.service.registry.present)} clients are there"
            time.sleep(0.01)

    def close(self) -> None:
        self.http.close()
        self.broker.stop()
        self.thread.join(10)
        self.service.close()
        self.broker.close()
        self.store.close()


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    configure("ERROR", "text")  # the server's log would stand among what the commands print
    deployment = Deployment(tmp_path)
    deployment.start()
    yield deployment
    deployment.close()
    structlog.reset_defaults()


@pytest.fixture
def job(tmp_path: Path) -> str:
    file = tmp_path / "job.yaml"
    file.write_text(JOB, encoding="utf-8")
    return str(file)


def lorabbit(deployment: Deployment, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--server", deployment.http.url])


@pytest.mark.parametrize("told", [True, False])
def test_a_report_asked_for_where_the_server_keeps_its_runs_spoils_none_of_them(
    deployment: Deployment, job: str, monkeypatch: pytest.MonkeyPatch, *, told: bool
) -> None:
    """As in a server's container, where the command and the server work in one folder."""
    if told:
        monkeypatch.setenv("LORABBIT_FOLDER", str(deployment.folder / "server"))
    deployment.add_clients(3)
    lorabbit(deployment, "submit", job)
    lorabbit(deployment, "watch", "walk")
    runs = deployment.folder / "server" / "runs"
    before = {path: path.read_bytes() for path in (runs / "walk").iterdir() if path.is_file()}
    written_at = (runs / "walk" / "report.json").stat().st_ino

    reported = lorabbit(deployment, "report", "walk", "--out", str(runs))

    assert reported.exit_code == 0, reported.output
    assert {path: path.read_bytes() for path in before} == before
    assert not list(runs.rglob("*.part"))
    assert (runs / "walk" / "report.html").is_file()
    assert not told or (runs / "walk" / "report.json").stat().st_ino == written_at


def test_a_job_is_submitted_watched_reported_and_exported(deployment: Deployment, job: str, tmp_path: Path) -> None:
    deployment.add_clients(3)

    submitted = lorabbit(deployment, "submit", job, "--set", "rounds=3")
    watched = lorabbit(deployment, "watch", "walk")
    reported = lorabbit(deployment, "report", "walk", "--out", str(tmp_path / "reports"))
    exported = lorabbit(deployment, "export", "walk", "--out", str(tmp_path / "adapter"))
    listed = json.loads(lorabbit(deployment, "jobs", "--format", "json").stdout)

    assert submitted.stdout == "submitted walk; next: lorabbit watch walk\n"
    assert [r.exit_code for r in (submitted, watched, reported, exported)] == [0, 0, 0, 0], reported.exception
    assert "round 3/3" in watched.stdout
    pages = {path.name for path in (tmp_path / "reports" / "walk").iterdir()}
    assert {"report.json", "report.md", "report.html", "rounds.jsonl", "job.yaml"} <= pages
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert [(entry["job"], entry["status"]) for entry in listed] == [("walk", "done")]


def test_a_watch_ends_when_the_run_folder_is_whole(deployment: Deployment, job: str) -> None:
    deployment.add_clients(3)
    lorabbit(deployment, "submit", job, "--set", "model.name=null:40MB", "--set", "rounds=1")

    lorabbit(deployment, "watch", "walk")
    (folder,) = deployment.folder.glob("server/**/walk")
    written = json.loads((folder / "report.json").read_text(encoding="utf-8"))

    assert written["status"] == "done"
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size > 40_000_000
    assert not list(folder.rglob("*.part"))


def test_the_newest_job_is_meant_when_none_is_named(deployment: Deployment, job: str) -> None:
    deployment.add_clients(3)
    lorabbit(deployment, "submit", job)
    lorabbit(deployment, "watch", "walk")

    events = [json.loads(line) for line in lorabbit(deployment, "watch", "--format", "json").stdout.splitlines()]
    status = json.loads(lorabbit(deployment, "status", "--format", "json").stdout)

    assert events[0]["kind"] == "job-submitted"
    assert events[-1] == {**events[-1], "kind": "job-ended", "status": "done"}
    assert (status["job"], status["status"]) == ("walk", "done")


def test_a_job_that_waits_says_for_whom_and_can_be_cancelled(deployment: Deployment, job: str) -> None:
    deployment.add_clients(1)
    lorabbit(deployment, "submit", job)
    lorabbit(deployment, "submit", job)

    waiting = lorabbit(deployment, "status", "walk")
    queued = lorabbit(deployment, "status", "walk-2")
    cancelled = lorabbit(deployment, "cancel", "walk")
    watched = lorabbit(deployment, "watch", "walk")
    again = lorabbit(deployment, "cancel", "walk")

    assert "walk: running, gathering" in waiting.stdout
    assert "job walk waits for 2 more clients: 1 of 3 needed are connected, for " in waiting.stdout
    assert "job walk-2 waits for job walk: jobs run one after the other, for " in queued.stdout
    assert cancelled.exit_code == 0
    assert watched.exit_code == 1
    assert again.stdout == "walk is cancelled already\n"


def test_an_unknown_job_is_bad_input_in_the_servers_own_words(deployment: Deployment) -> None:
    for command in ("status", "watch", "cancel", "report"):
        result = lorabbit(deployment, command, "nothing")

        assert result.exit_code == 2
        assert result.stderr == "error: there is no job 'nothing'; none has been submitted yet\n"
    assert lorabbit(deployment, "status").stderr.startswith("error: no job has been submitted yet")


def test_clients_are_listed_by_pool_with_device_and_state(deployment: Deployment) -> None:
    assert lorabbit(deployment, "clients").stdout == "no client was ever here\n"

    deployment.add_clients(2, pool="eu", tags=("fast", "big"))
    deployment.add_clients(1, prefix="lone")
    deployment.await_clients(3)

    lines = lorabbit(deployment, "clients").stdout.splitlines()
    assert lines[0].split() == ["client", "pool", "device", "state", "last", "seen", "tags"]
    assert lines[1].split()[:4] == ["client-1", "eu", "cpu", "idle"]
    assert lines[1].split()[-3:] == ["s", "ago", "fast,big"]
    assert lines[-1] == "3 of 3 are here"
    eu = json.loads(lorabbit(deployment, "clients", "--pool", "eu", "--format", "json").stdout)
    assert [(entry["client"], entry["pool"], entry["dtype"]) for entry in eu] == [
        ("client-1", "eu", "float32"), ("client-2", "eu", "float32"),
    ]  # fmt: skip


def test_doctor_finds_the_server_and_its_clients(deployment: Deployment) -> None:
    with ApiClient(deployment.http.url) as server:
        assert server.ready() is None
        assert server.clients() == []


def test_an_export_of_what_was_not_made_names_what_there_is(deployment: Deployment, job: str, tmp_path: Path) -> None:
    deployment.add_clients(3)
    lorabbit(deployment, "submit", job)
    lorabbit(deployment, "watch", "walk")

    result = lorabbit(deployment, "export", "walk", "--out", str(tmp_path / "x"), "--which", "checkpoint-9")

    assert result.exit_code == 2
    assert "checkpoint-9" in result.stderr


def test_an_address_that_is_no_url_is_bad_input() -> None:
    with pytest.raises(BadInput, match="is no URL"):
        ApiClient("http://[::1").close()
