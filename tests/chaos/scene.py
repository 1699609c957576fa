"""What a row of the failure matrix plays on: services, a federation on them, a job under way, and how it ended."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import redis
from cluster import Cluster, url_of_hosts
from outcome import Outcome
from processes import Event, Federation, Process
from proxy import Proxy
from services import RabbitMQ, Redis

from chaos.witness import Witness
from lorabbit.config.network import urls_of_hosts

DEATH_SECONDS = 240.0
"""How long a process that is to die may take to come to its point."""
KILLED = 137
PROGRESS = {"update-accepted", "round-closed", "round-evaluated", "job-ended"}
SERVER = {
    "LORABBIT_CHUNK_BYTES": "16384",
    "LORABBIT_HEARTBEAT_SECONDS": "0.5",
    "LORABBIT_CLIENT_LEASE_SECONDS": "20",
    "LORABBIT_LEASE_SECONDS": "2",
}


class Ground:
    """A broker, or a cluster of them, and a store for all rows; each row finds them empty."""

    def __init__(self, rows: int, clustered: int) -> None:
        """Start broker and store; so many scenes may stand on them, and so many on a cluster."""
        self.broker, self.store = RabbitMQ(vhosts=rows), Redis()
        self._clustered = clustered
        self._cluster: Cluster | None = None
        try:
            self.broker.start()
            self.store.start()
        except BaseException:
            self.close()
            raise

    @property
    def cluster(self) -> Cluster:
        """Three nodes of RabbitMQ, for a row that stands on them."""
        assert self._cluster is not None, "the scene is not clustered"
        return self._cluster

    def empty_urls(self, *, clustered: bool = False) -> tuple[str, str]:
        """URLs of a virtual host that nobody has used, and of the store without any key.

        A cluster is made for the first row that stands on one; raises ServiceMissing where that cannot be.
        """
        with redis.Redis.from_url(self.store.url) as client:
            client.flushall()
        if not clustered:
            return self.broker.empty_url(), self.store.url
        if self._cluster is None:
            self._cluster = Cluster(vhosts=self._clustered)
        self._cluster.start()
        return self._cluster.empty_url(), self.store.url

    def close(self) -> None:
        """Kill all of them and forget their data."""
        for service in (self.broker, self.store, self._cluster):
            if service is not None:
                service.close()


@dataclass(frozen=True)
class Played:
    """A row that was played to its end."""

    outcome: Outcome
    recovery_seconds: float | None
    """From the disturbance until something counted again; None where nothing was disturbed."""
    sent: int
    """Payload bytes of updates that left the clients, as the witness saw them."""
    accounted: int
    """Payload bytes of updates that the run's events account for."""


class Scene:
    """One federation with one job; see `play`."""

    def __init__(
        self, folder: Path, ground: Ground, job: Mapping[str, Any], *, clustered: bool = False, **settings: str
    ) -> None:
        """Prepare processes, none of them started, over one broker or a cluster; `settings` are for the clients."""
        self.ground, self.job, self.folder = ground, dict(job), folder
        broker_url, redis_url = ground.empty_urls(clustered=clustered)
        self.broker_url = f"{broker_url}?heartbeat=5"
        self.witness = Witness(broker_url)
        self.federation = Federation(folder, self.broker_url, redis_url, server=SERVER, client=settings)
        for number in range(self.job["clients"]):
            self.federation.add_client(f"site-{number}", LORABBIT_CLIENT=f"client-{number + 1}")
        self.proxies: list[Proxy] = []
        self.name = ""
        self.events: list[Event] = []
        self.disturbed_at: float | None = None
        self._mourned = ""
        self._ended_at = 0.0
        self._cursor = ""
        self._others: list[Process] = []
        self._marks: dict[int, int] = {}

    # ---- processes ----
    @property
    def server(self) -> Process:
        """The server."""
        return self.federation.server

    @property
    def victim(self) -> Process:
        """The client that a row does something to."""
        return self.federation.clients["site-1"]

    def start(
        self,
        *,
        server: Mapping[str, str] | None = None,
        victim: Mapping[str, str] | None = None,
        others: Mapping[str, str] | None = None,
    ) -> None:
        """Start everything; the server, the victim and the others this once with more in their environment."""
        self.server.start(**(server or {}))
        self.federation.await_server()
        if self._others:
            self.await_log(self.server, '"leader-elected"')
        clients = self.federation.clients.values()
        for process in (*self._others, *clients):
            process.start(**((victim if process is self.victim else others) or {}))

    def proxy(self) -> Proxy:
        """A link to the broker for one process, to be disturbed."""
        self.proxies.append(Proxy(self.broker_url))
        return self.proxies[-1]

    def doors(self) -> tuple[str, list[Proxy]]:
        """A link to each node of the cluster, none of them open but the first, and the URL that names them all."""
        doors = [Proxy(each) for each in urls_of_hosts(self.broker_url)]
        self.proxies += doors
        for door in doors[1:]:
            door.accepts = False
        return url_of_hosts([door.url for door in doors]), doors

    def replace_server(self, prefix: Sequence[str]) -> None:
        """Start the server by another command."""
        self.federation.server, self.federation.url = self.federation.make_server(prefix=prefix)

    def add_standby(self, **settings: str) -> Process:
        """Start a second server on the same volume once the first one leads; it stands by."""
        standby, self._standby_url = self.federation.make_server(LORABBIT_NAME="standby", **settings)
        standby.log = self.folder / "standby.log"
        self._others.append(standby)
        return standby

    def ask_standby(self) -> None:
        """Follow the job over the second server from now on."""
        self.federation.url = self._standby_url

    def await_clients(self) -> None:
        """Wait until the server knows every client."""
        deadline = time.monotonic() + DEATH_SECONDS
        while time.monotonic() < deadline:
            present = httpx.get(f"{self.federation.url}/clients", timeout=10).json()
            if len(present) == len(self.federation.clients):
                return
            time.sleep(0.05)
        raise AssertionError(f"the clients did not come\n{self.federation.tails()}")

    def submit(self) -> None:
        """Hand the job in."""
        self.name = self.federation.submit(self.job)

    # ---- what happens ----
    def await_event(self, kind: str, round_number: int, **fields: object) -> None:
        """Follow the job up to its first event of a kind in a round."""
        wanted = {"kind": kind, "round": round_number, **fields}
        for event in self._follow():
            if all(event.get(name) == value for name, value in wanted.items()):
                return
        raise AssertionError(f"the job ended without {wanted}\n{self.federation.tails()}")

    def await_wait(self, owner: str, word: str, seconds: float = 60.0) -> None:
        """Wait until `lorabbit why` names somebody whom the job waits for, and why."""
        deadline, waits = time.monotonic() + seconds, []
        while time.monotonic() < deadline:
            waits = httpx.get(f"{self.federation.url}/jobs/{self.name}", timeout=30).json().get("waits", [])
            if any(wait["owner"] == owner and word in wait["reason"] for wait in waits):
                return
            time.sleep(0.1)
        raise AssertionError(f"nobody says that the job waits for the {owner}, {word}: {waits}")

    def forget_events(self) -> None:
        """Follow the job from its begin again: the store's log is another one."""
        self.events, self._cursor = [], ""

    def await_death(self, process: Process) -> None:
        """Wait until a process has died at its crash point."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.child.wait(DEATH_SECONDS)
        assert process.has_ended, f"it did not come to its crash point\n{self.federation.tails()}"
        code = process.wait(0)
        assert code == KILLED, f"it ended with {code}\n{process.tail()}"
        self.disturb("client-2" if process is self.victim else "")

    def await_log(self, process: Process, word: str, seconds: float = 60.0) -> None:
        """Wait until a process has written something new that holds a word."""
        start = self._marks.get(id(process), 0)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if word in process.log.read_text(errors="replace")[start:]:
                return
            time.sleep(0.05)
        raise AssertionError(f"no {word!r} in {seconds:.0f} s\n{process.tail()}")

    def mark(self, process: Process) -> None:
        """Let `await_log` look only at what a process writes from now on."""
        self._marks[id(process)] = len(process.log.read_text(errors="replace"))

    def disturb(self, client: str = "") -> None:
        """Note that the disturbance is now; recovery ends with the next thing that counts, of this client if named."""
        self.disturbed_at, self._mourned = time.time(), client

    def play_on(self) -> Played:
        """Follow the job to its end."""
        for _ in self._follow():
            pass
        self.await_end()
        report = httpx.get(f"{self.federation.url}/jobs/{self.name}/report", timeout=30).json()
        assert report["status"] == "done", f"{report['reason']}\n{self.federation.tails()}"
        outcome = Outcome.of(report, self.events)
        accounted = sum(event["bytes_up"] for event in self.events if event["kind"] == "update-accepted")
        self.witness.settle(lambda: self.witness.bytes_of(self.name) >= accounted)
        return Played(outcome, self._recovery(), self.witness.bytes_of(self.name), accounted)

    def await_end(self) -> None:
        """Wait until the store has the job as ended; its last event says so a little earlier."""
        deadline = time.monotonic() + DEATH_SECONDS
        while httpx.get(f"{self.federation.url}/jobs/{self.name}", timeout=30).json()["status"] == "running":
            assert time.monotonic() < deadline, f"the job does not leave the queue\n{self.federation.tails()}"
            time.sleep(0.05)
        self._ended_at = time.time()

    def close(self) -> None:
        """End every process."""
        for process in self._others:
            process.kill()
        self.federation.close()
        self.witness.close()
        for proxy in self.proxies:
            proxy.close()

    def _follow(self) -> Iterator[Event]:
        """Events that were not read yet."""
        for cursor, event in self.federation.logged(self.name, self._cursor):
            self._cursor = cursor
            self.events.append(event)
            yield event

    def _recovery(self) -> float | None:
        if self.disturbed_at is None:
            return None
        times = (
            event["at_ms"] / 1000
            for event in self.events
            if event["kind"] in PROGRESS and (not self._mourned or event.get("client", self._mourned) == self._mourned)
        )
        return next((at for at in times if at > self.disturbed_at), self._ended_at) - self.disturbed_at


Act = Callable[[Scene], None]
"""What a row does to a scene: it starts everything, hands the job in, and disturbs it."""
