"""A federation of real processes over a real RabbitMQ and Redis, each to be killed and started at will."""

# ruff: noqa: S603 - the interpreter of the test run, by path
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from services import free_port

Event = dict[str, Any]
START_SECONDS = 60.0
JOB_SECONDS = 240.0


class Process:
    """One `python -m MODULE`; its folder and its log outlive it."""

    def __init__(self, module: str, folder: Path, environment: dict[str, str], prefix: Sequence[str] = ()) -> None:
        """Prepare; `prefix` is a command that becomes the process in the end, such as `unshare`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log = folder / "process.log"
        self._command = [*prefix, sys.executable, "-m", module]
        self._environment = {**os.environ, **environment, "LORABBIT_FOLDER": str(folder)}
        self._child: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> None:
        """Start it, this once with more in its environment."""
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self._command,
                env=self._environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL it and what it started: nothing is flushed, nobody is told."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            self._child = None

    def stop(self) -> int:
        """Ask it to end, as Docker does; its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(30)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, for example SIGCONT to wake it."""
        self.child.send_signal(number)

    def freeze(self) -> None:
        """Put it to sleep without closing its sockets, and wait until it does nothing more."""
        self.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.child.pid, os.WSTOPPED)

    def wait(self, seconds: float) -> int:
        """Wait for its own end; its exit code."""
        code = self.child.wait(seconds)
        self._child = None
        return code

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._child is not None and self._child.poll() is None

    @property
    def has_ended(self) -> bool:
        """Whether it ended by itself."""
        return self._child is not None and self._child.poll() is not None

    @property
    def child(self) -> subprocess.Popen[bytes]:
        """The process that runs."""
        assert self._child is not None, "not started"
        return self._child

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:]) if self.log.exists() else ""


class Federation:
    """One server and its clients, by name."""

    def __init__(
        self,
        folder: Path,
        broker_url: str,
        redis_url: str,
        *,
        server: Mapping[str, str] | None = None,
        client: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare over these services; `server` and `client` are further settings of each."""
        self.job_seconds = JOB_SECONDS
        """How long `events` waits for a job's end."""
        shared = {"LORABBIT_BROKER_URL": broker_url, "LORABBIT_LOG_FORMAT": "json", "LORABBIT_LOG_LEVEL": "DEBUG"}
        self._folder = folder
        # A crash test waits for a dead server's lease to end; a client's outlasts a busy machine.
        lease = {"LORABBIT_REDIS_URL": redis_url, "LORABBIT_LEASE_SECONDS": "3"}
        self._of_server = shared | lease | dict(server or {})
        self.server, self.url = self.make_server()
        self.standby: Process | None = None
        self._of_client = shared | dict(client or {})
        self.clients: dict[str, Process] = {}

    def start(self, clients: int) -> None:
        """Start the server and so many clients, and wait until the server answers."""
        self.server.start()
        self.start_clients(clients)
        self.await_server()

    def make_server(self, folder: str = "server", prefix: Sequence[str] = (), **settings: str) -> tuple[Process, str]:
        """Prepare one more server; it and the URL of its HTTP interface."""
        port = str(free_port())
        environment = self._of_server | {"LORABBIT_HTTP_PORT": port, **settings}
        return Process("lorabbit_server", self._folder / folder, environment, prefix), f"http://127.0.0.1:{port}"

    def add_client(self, address: str, **settings: str) -> Process:
        """Prepare one more client, with settings of its own; not started."""
        environment = self._of_client | {"LORABBIT_ADDRESS": address, **settings}
        self.clients[address] = Process("lorabbit_client", self._folder / address, environment)
        return self.clients[address]

    def start_clients(self, number: int, **environment: str) -> None:
        """Start so many more clients."""
        for place in range(len(self.clients), len(self.clients) + number):
            self.add_client(f"site-{place}", **environment).start()

    def start_standby(self) -> str:
        """Start a second server; its URL."""
        self.standby, url = self.make_server("standby")
        self.standby.start()
        self.await_server(url)
        return url

    def address_of(self, client: str) -> str:
        """The process that holds a client's identity."""
        entries = httpx.get(f"{self.url}/clients", timeout=10).json()
        return next(str(entry["address"]) for entry in entries if entry["client"] == client)

    def submit(self, job: dict[str, Any]) -> str:
        """Submit a job; its id."""
        answer = httpx.post(f"{self.url}/jobs", content=json.dumps(job), timeout=30)
        assert answer.status_code == httpx.codes.CREATED, answer.text
        return str(answer.json()["job"])

    def events(self, job: str) -> Iterator[Event]:
        """Every event of a job until its end, from the first; goes on over a restart of the server."""
        for _, event in self.logged(job):
            yield event

    def logged(self, job: str, cursor: str = "") -> Iterator[tuple[str, Event]]:
        """Events behind a cursor until the job's end, each with the cursor behind it."""
        deadline = time.monotonic() + self.job_seconds
        while time.monotonic() < deadline:
            for each in self._page(job, cursor):
                cursor = each["id"]
                yield cursor, each["event"]
                if each["event"]["kind"] == "job-ended":
                    return
        raise AssertionError(f"job {job} did not end in {self.job_seconds:.0f} s\n{self.tails()}")

    def run(self, job: dict[str, Any], on_event: Callable[[Event], None] = lambda _: None) -> dict[str, Any]:
        """Submit a job and follow it to its end; its report."""
        name = self.submit(job)
        for event in self.events(name):
            on_event(event)
        report: dict[str, Any] = httpx.get(f"{self.url}/jobs/{name}/report", timeout=30).json()
        assert report["status"] == "done", f"{report['reason']}\n{self.tails()}"
        return report

    def close(self) -> None:
        for process in (self.server, self.standby, *self.clients.values()):
            if process is not None:
                process.kill()

    def tails(self) -> str:
        """The end of every process's log, for a failure's message."""
        named = {"server": self.server, **self.clients}
        return "\n".join(f"--- {name}\n{process.tail()}" for name, process in named.items())

    def _page(self, job: str, cursor: str) -> list[dict[str, Any]]:
        parameters = {"wait": "5"} | ({"after": cursor} if cursor else {})
        try:
            answer = httpx.get(f"{self.url}/jobs/{job}/events", params=parameters, timeout=30)
        except httpx.TransportError:
            self.await_server()
            return []
        if answer.status_code == httpx.codes.OK:
            return list(answer.json())
        time.sleep(0.1)  # the server cannot answer now: its store is away
        return []

    def await_server(self, url: str | None = None) -> None:
        """Wait until the server at a URL, this federation's own where none is named, answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{url or self.url}/healthz", timeout=5).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(f"the server did not answer in {START_SECONDS:.0f} s\n{self.server.tail()}")


def run_embedded(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a job with `lorabbit run`, in processes of its own; its report."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "job.yaml"
    file.write_text(json.dumps(job), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "lorabbit_cli",
        "run",
        str(file),
        "--out",
        str(folder / "runs"),
        "--format",
        "json",
    ]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=JOB_SECONDS, cwd=folder)
    assert run.returncode == 0, run.stdout + run.stderr
    found = sorted((folder / "runs").rglob("report.json"))
    assert len(found) == 1, f"expected one report.json under {folder}: {found}\n{run.stderr}"
    report: dict[str, Any] = json.loads(found[0].read_text(encoding="utf-8"))
    return report


def idle_job(rounds: int) -> dict[str, Any]:
    """Return a job of three clients that train nothing, and that is scored and saved only at its end."""
    return {
        "name": "walk",
        "model": {"name": "null:40KB"},
        "rounds": rounds,
        "clients": 3,
        "evaluation": {"every": rounds},
        "output": {"checkpoint_every": rounds},
        "seed": 7,
    }
