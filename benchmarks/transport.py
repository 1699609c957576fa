"""Real RabbitMQ, Redis, server and client processes with null training, at several payload sizes.

    python benchmarks/transport.py [--clients 8] [--payloads 0.3,4,16,64,200] [--cluster] [--out FILE]

Starts a private broker, or a cluster of three nodes on this machine, and a store on free ports, one
server and the clients as processes of their own, and submits one null job per payload size. A round is:
plan, adapter down to every client, update up from every client, admission, aggregation, checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from measure import Sampler, Table, machine, tree, yaml_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from cluster import Cluster
from services import RabbitMQ, Redis, free_port

LORABBIT = [sys.executable, "-m", "lorabbit_cli"]


class Federation:
    """One server and its clients as processes, over a private broker and store."""

    def __init__(self, scratch: Path, clients: int, *, clustered: bool) -> None:
        """Start everything; `close` stops it."""
        self.broker, self.store = Cluster() if clustered else RabbitMQ(), Redis()
        self.services: dict[str, list[psutil.Process]] = {}
        for tier, service in (("broker", self.broker), ("store", self.store)):
            service.start()
            self.services[tier] = [psutil.Process(pid) for pid in service.pids()]
        port = free_port()
        self.environment = {
            **os.environ,
            "LORABBIT_BROKER_URL": self.broker.url,
            "LORABBIT_REDIS_URL": self.store.url,
            "LORABBIT_SERVER_URL": f"http://127.0.0.1:{port}",
            "LORABBIT_HTTP_PORT": str(port),
            "LORABBIT_LOG_LEVEL": "WARNING",
        }
        self.folder = scratch / "server"
        self.server = self._start("server", LORABBIT_FOLDER=str(self.folder))
        self.clients = [
            self._start("client", LORABBIT_FOLDER=str(scratch / f"client-{n}"), LORABBIT_ADDRESS=f"bench-{n}")
            for n in range(clients)
        ]

    def _start(self, role: str, **environment: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*LORABBIT, role], env={**self.environment, **environment})  # noqa: S603

    def versions(self) -> dict[str, str]:
        """Versions of the broker and the store."""
        return {"rabbitmq": self.broker.version(), "redis": self.store.version()}

    def tiers(self) -> dict[str, list[psutil.Process]]:
        """The processes of each tier."""
        return {
            **self.services,
            "server": [psutil.Process(self.server.pid)],
            "client": [psutil.Process(p.pid) for p in self.clients],
        }

    def command(self, *arguments: str) -> str:
        """Run a `lorabbit` command against this federation and return what it prints."""
        done = subprocess.run(  # noqa: S603
            [*LORABBIT, *arguments], env=self.environment, check=True, capture_output=True, text=True
        )
        return done.stdout

    def wait_ready(self) -> None:
        """Return once the server answers."""
        for _ in range(300):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.command("jobs", "--format", "json")
                return
            time.sleep(0.2)
        raise SystemExit("the server did not become ready within a minute")

    def close(self) -> None:
        """Stop every process."""
        for process in [*self.clients, self.server]:
            process.terminate()
        for process in [*self.clients, self.server]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
        self.broker.close()
        self.store.close()


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """User and system seconds of process trees so far."""
    times = [p.cpu_times() for root in processes for p in tree(root)]
    return sum(t.user + t.system for t in times)


def measure(federation: Federation, megabytes: float, arguments: argparse.Namespace) -> dict[str, object]:
    """Run one job at one payload size."""
    name = f"transport-{str(megabytes).replace('.', '-')}mb"
    rounds = arguments.rounds if megabytes < 100 else max(2, arguments.rounds // 4)  # noqa: PLR2004
    job = {
        "name": name,
        "model": {"name": f"null:{megabytes}MB"},
        "rounds": rounds,
        "clients": arguments.clients,
        "evaluation": {"every": rounds},
        "output": {"keep_checkpoints": 0},
    }
    file = yaml_file(federation.folder.parent / f"{name}.yaml", job)
    tiers = federation.tiers()
    before = {tier: cpu_seconds(processes) for tier, processes in tiers.items()}
    with Sampler(tiers) as sampler:
        federation.command("submit", str(file))
        federation.command("watch", name)
    cpu = {tier: cpu_seconds(processes) - before[tier] for tier, processes in tiers.items()}
    report = json.loads((federation.folder / "runs" / name / "report.json").read_text())
    seconds = sorted(r["seconds"] for r in report["rounds"])
    median = statistics.median(seconds)
    moved = sum(r["bytes_up"] + r["bytes_down"] for r in report["rounds"]) / 1e6
    return {
        "payload": megabytes,
        "rounds": rounds,
        "round, s (median)": median,
        "round, s (p95)": seconds[min(len(seconds) - 1, round(0.95 * (len(seconds) - 1)))],
        "MB/s up and down": moved / sum(seconds),
        "CPU s per update, all tiers": sum(cpu.values()) / (rounds * arguments.clients),
        "server, MB": sampler.peaks_mb["server"],
        "a client, MB": sampler.largest_mb["client"],
        "broker, MB": sampler.peaks_mb["broker"],
        "store, MB": sampler.peaks_mb["store"],
    }


@contextlib.contextmanager
def federation(clients: int, *, clustered: bool) -> Iterator[Federation]:
    """Run a federation in a scratch folder and stop it at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        running = Federation(Path(scratch), clients, clustered=clustered)
        try:
            running.wait_ready()
            yield running
        finally:
            running.close()


def main() -> None:
    """Measure every payload size in one federation and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--payloads", default="0.3,4,16,64,200")
    parser.add_argument("--cluster", action="store_true", help="three nodes of RabbitMQ, every queue on each of them")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with federation(arguments.clients, clustered=arguments.cluster) as running:
        rows = [measure(running, float(size), arguments) for size in arguments.payloads.split(",")]
        facts = {**machine(), **running.versions()}
    broker = "RabbitMQ of three nodes" if arguments.cluster else "RabbitMQ"
    title = f"{broker} and Redis, {arguments.clients} client processes, null training"
    Table(title, rows, facts).show(arguments.out)


if __name__ == "__main__":
    main()
