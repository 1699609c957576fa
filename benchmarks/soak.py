"""Kill whatever there is, every few seconds, for an hour: every run must end in the same adapter.

    python benchmarks/soak.py [--minutes 60] [--clients 8] [--seed 1] [--out FILE]

Starts a private broker and store, a server and the clients as processes of their own, and runs one
null job after the other. The first runs undisturbed. During all others a part that the seed picks is
killed with SIGKILL every few seconds and started again at once; a part that is not back yet is left
alone. A job that ends in another adapter, counts an update twice, skips one or fails ends the soak
with exit code 1.

Recovery is the time from SIGKILL until the part is back and, after that, the next update counts; of
that very client, where a client was killed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from measure import Table, machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from outcome import Outcome
from processes import Event, Federation, Process
from services import RabbitMQ, Redis

KINDS = {"client": 0.70, "server": 0.15, "store": 0.08, "broker": 0.07}
"""What is killed, and how often: a broker takes longest to come back."""
PAUSE_SECONDS = (2.0, 6.0)
BACK = {"client": "client-registered", "server": "leader-elected"}
"""The event in its log that says that a part is at work again."""
QUICK = {"LORABBIT_HEARTBEAT_SECONDS": "1", "LORABBIT_CLIENT_LEASE_SECONDS": "10", "LORABBIT_LEASE_SECONDS": "3"}


@dataclass(slots=True)
class Kill:
    """One death."""

    kind: str
    victim: str
    at: float
    """Seconds since 1970."""
    up: float | None = None
    """When a broker or store answered again."""
    client: str = ""


@dataclass
class Follower:
    """Reads the events of one job after the other, in a thread."""

    federation: Federation
    events: list[Event] = field(default_factory=list)
    error: Exception | None = None
    _thread: threading.Thread | None = None

    @property
    def is_idle(self) -> bool:
        """Whether the job it follows has ended."""
        return self._thread is None or not self._thread.is_alive()

    def follow(self, job: str) -> None:
        """Begin with a job."""
        self.events = []
        self._thread = threading.Thread(target=self._read, args=(job,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the job has ended; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error

    def _read(self, job: str) -> None:
        try:
            self.events.extend(self.federation.events(job))
        except Exception as error:  # noqa: BLE001 - raised in the main thread
            self.error = error


class Soak:
    """A federation, and who kills it."""

    def __init__(self, scratch: Path, arguments: argparse.Namespace) -> None:
        """Start everything."""
        self.clients, self.dice = arguments.clients, random.Random(arguments.seed)  # noqa: S311 - reproducible
        self.broker, self.store = RabbitMQ(), Redis()
        self.broker.start()
        self.store.start()
        self.federation = Federation(scratch, self.broker.url, self.store.url, server=QUICK)
        self.federation.job_seconds = 1800.0
        self.federation.start(self.clients)
        self.follower = Follower(self.federation)
        self.kills: list[Kill] = []
        self.accepted: list[tuple[float, str]] = []
        """When an update counted, and whose."""
        self.ended_alone = 0
        self.identities: dict[str, str] = {}
        self._seen: dict[str, int] = {}
        """Length of a victim's log when it was killed."""
        self.job = {
            "name": "soak",
            "model": {"name": "null:200KB"},
            "rounds": arguments.rounds,
            "clients": self.clients,
            "seed": 7,
            "evaluation": {"every": 5},
            "output": {"keep_checkpoints": 0},
        }

    def begin(self) -> None:
        """Submit the next job."""
        self.name = self.federation.submit(self.job)
        self.follower.follow(self.name)

    def finish(self) -> Outcome:
        """Wait for the job under way; what it came to."""
        self.follower.wait()
        report: dict[str, Any] = httpx.get(f"{self.federation.url}/jobs/{self.name}/report", timeout=60).json()
        events = self.follower.events
        self.accepted += [(e["at_ms"] / 1000, e["client"]) for e in events if e["kind"] == "update-accepted"]
        return Outcome.of(report, events)

    def kill_one(self) -> None:
        """Kill what the dice pick, unless it is not back yet, and start it again."""
        kind = self.dice.choices(list(KINDS), list(KINDS.values()))[0]
        number = self.dice.randrange(self.clients)
        if kind in {"broker", "store"}:
            service = self.broker if kind == "broker" else self.store
            kill = Kill(kind, kind, time.time())
            service.kill()
            service.start()
            kill.up = time.time()
        else:
            victim = "server" if kind == "server" else f"site-{number}"
            process = self._process(victim)
            if BACK[kind] not in log_of(process)[self._seen.get(victim, 0) :]:
                return
            kill = Kill(kind, victim, time.time(), client=self.identities.get(victim, ""))
            process.kill()
            self._seen[victim] = len(log_of(process))
            process.start()
        self.kills.append(kill)

    def revive(self) -> None:
        """Start again what ended without being killed, and count it."""
        for name in ("server", *self.federation.clients):
            if self._process(name).has_ended:
                print(f"{name} ended by itself:\n{self._process(name).tail()}", flush=True)
                self._process(name).kill()
                self._process(name).start()
                self.ended_alone += 1

    def learn_identities(self) -> None:
        """Ask which client is at which address."""
        entries = httpx.get(f"{self.federation.url}/clients", timeout=10).json()
        self.identities = {str(entry["address"]): str(entry["client"]) for entry in entries}

    def recoveries(self) -> Iterator[tuple[str, float]]:
        """Seconds of every kill whose part came back while a job went on."""
        marks = {name: marks_of(self._process(name)) for name in ("server", *self.federation.clients)}
        for kill in self.kills:
            back = kill.up or next(
                (at for at, event in marks[kill.victim] if at > kill.at and event == BACK[kill.kind]), None
            )
            counted = (at for at, client in self.accepted if back and at >= back and kill.client in {"", client})
            first = next(counted, None)
            if first is not None:
                yield kill.kind, first - kill.at

    def close(self) -> None:
        """Stop everything."""
        self.federation.close()
        self.broker.close()
        self.store.close()

    def _process(self, name: str) -> Process:
        return self.federation.server if name == "server" else self.federation.clients[name]


def log_of(process: Process) -> str:
    """What a process wrote so far."""
    return process.log.read_text(encoding="utf-8", errors="replace")


def marks_of(process: Process) -> list[tuple[float, str]]:
    """When a process came back, by its log."""
    marks = []
    for line in log_of(process).splitlines():
        if any(f'"{event}"' in line for event in BACK.values()):
            entry = json.loads(line)
            marks.append((datetime.fromisoformat(entry["timestamp"]).timestamp(), entry["event"]))
    return marks


def run(soak: Soak, seconds: float) -> tuple[Outcome, int, float]:
    """Kill for so long, then let the last job end; raises SystemExit at the first run that differs."""
    soak.begin()
    expected = soak.finish()
    soak.learn_identities()
    print(f"undisturbed: adapter {expected.adapter[:16]}, {len(expected.counted)} updates", flush=True)
    began, runs = time.monotonic(), 0
    soak.begin()
    while (spent := time.monotonic() - began) < seconds or not soak.follower.is_idle:
        if soak.follower.is_idle:
            runs += check(soak, expected)
            soak.begin()
        if spent < seconds:
            soak.kill_one()
        soak.revive()
        time.sleep(soak.dice.uniform(*PAUSE_SECONDS))
        print(f"{spent:7.0f} s  {len(soak.kills):4d} kills  {runs} runs", flush=True)
    runs += check(soak, expected)
    return expected, runs, time.monotonic() - began


def check(soak: Soak, expected: Outcome) -> int:
    """Compare the run that has ended with the undisturbed one."""
    found = soak.finish()
    if found != expected:
        print(soak.federation.tails())
        raise SystemExit("\n".join([f"run {soak.name} differs from the undisturbed one", *found.differences(expected)]))
    return 1


def rows_of(soak: Soak) -> Iterator[Mapping[str, object]]:
    """One row per kind of failure."""
    seconds: dict[str, list[float]] = {}
    for kind, value in soak.recoveries():
        seconds.setdefault(kind, []).append(value)
    for kind in KINDS:
        times = seconds.get(kind, [])
        yield {
            "killed": kind,
            "times": sum(kill.kind == kind for kill in soak.kills),
            "recovery, s (p50)": statistics.median(times) if times else "-",
            "recovery, s (p95)": float(np.quantile(times, 0.95, method="nearest")) if times else "-",
            "recovery, s (max)": max(times, default="-"),  # type: ignore[type-var]
        }


@contextmanager
def soaking(arguments: argparse.Namespace) -> Iterator[Soak]:
    """Run a soak in a scratch folder and stop it at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        soak = Soak(Path(scratch), arguments)
        try:
            yield soak
        finally:
            soak.close()


def main() -> None:
    """Soak, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40, help="of each job")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with soaking(arguments) as soak:
        expected, runs, seconds = run(soak, arguments.minutes * 60)
        load = psutil.getloadavg()[2]
        facts = {
            **machine(),
            "minutes": f"{seconds / 60:.0f}",
            "seed": str(arguments.seed),
            "runs": str(runs),
            "rounds": str(runs * arguments.rounds),
            "updates": str(runs * len(expected.counted)),
            "adapter": expected.adapter[:16],
            "ended by themselves": str(soak.ended_alone),
            "load": f"{load:.1f}",
        }
        rows = list(rows_of(soak))
    Table(f"Soak: {arguments.clients} null clients, one part killed every few seconds", rows, facts).show(arguments.out)


if __name__ == "__main__":
    main()
