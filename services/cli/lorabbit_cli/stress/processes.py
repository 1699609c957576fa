"""A federation of processes on this machine: broker, store, server, and a host of light clients."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from lorabbit.broker import topology
from lorabbit.broker.rabbit import RabbitBroker
from lorabbit.errors import LoRAbbitError, RunFailed, ServerUnavailable
from lorabbit.settings import ServerSettings
from lorabbit_cli.options import read_settings
from lorabbit_cli.remote import Server
from lorabbit_cli.stress.host import Hosting, address_of
from lorabbit_cli.stress.plan import Plan
from lorabbit_cli.stress.private import Child, free_port, start_rabbitmq, start_redis
from lorabbit_cli.stress.usage import Reading, read_processes

READY_SECONDS = 60.0


class ProcessFederation:
    """See the module's docstring; `Federation` says what each method does."""

    def __init__(self, plan: Plan, clients: int, *, configured: bool) -> None:
        """Prepare for so many clients; with `configured`, over the broker and store that the environment names."""
        self._plan, self._clients, self._configured = plan, clients, configured
        self._folder = Path(tempfile.mkdtemp(prefix="lorabbit-stress-"))
        self._tiers: dict[str, list[Child]] = {}
        self._broker_url = self._redis_url = ""
        self.server_settings: dict[str, str] = {}
        """LORABBIT_* variables of the server in place of their defaults."""
        self._port = free_port()
        per_process = plan.clients_per_process(clients)
        processes = -(-clients // per_process)
        each = "one client in each" if per_process == 1 else f"up to {per_process} clients in each"
        self.description = f"{processes} client processes, {each}"
        self._per_process = per_process

    def connect(self) -> Server:
        """Open the server's HTTP interface."""
        return Server(f"http://127.0.0.1:{self._port}")

    def start(self) -> None:
        """Start the services, the server, and the clients' host."""
        if self._configured:
            settings = read_settings(ServerSettings)
            self._broker_url, self._redis_url = settings.broker_url, settings.redis_url
        else:
            self._broker_url = start_rabbitmq(self._folder / "broker", self._tiers.setdefault("broker", []))
            self._redis_url = start_redis(self._folder / "store", self._tiers.setdefault("store", []))
        environment = {
            "LORABBIT_BROKER_URL": self._broker_url,
            "LORABBIT_REDIS_URL": self._redis_url,
            "LORABBIT_FOLDER": str(self._folder / "server"),
            "LORABBIT_HTTP_HOST": "127.0.0.1",
            "LORABBIT_HTTP_PORT": str(self._port),
            "LORABBIT_LOG_LEVEL": "WARNING",
            "LORABBIT_LOG_FORMAT": "json",
            **self.server_settings,
        }
        self._tiers["server"] = [self._child("server", "lorabbit_server", environment)]
        self._await_server()
        host = self._child("clients", "lorabbit_cli.stress.host", {})
        self._tiers["clients"] = [host]
        hosting = Hosting(
            clients=self._clients,
            per_process=self._per_process,
            folder=str(self._folder / "clients"),
            broker_url=self._broker_url,
            train=self._plan.train,
            seed=self._plan.seed,
            churn=self._plan.churn,
            slow=str(self._plan.slow),
        )
        assert host.process.stdin is not None  # noqa: S101 - a pipe, as Child makes it
        host.process.stdin.write(json.dumps(asdict(hosting)).encode() + b"\n")
        host.process.stdin.flush()

    def meter(self) -> Mapping[str, Reading]:
        """Read the process trees of each tier."""
        return read_processes(
            {tier: [child.process.pid for child in children] for tier, children in self._tiers.items()}
        )

    def check(self) -> None:
        """Raise RunFailed when a process has ended."""
        for children in self._tiers.values():
            for child in children:
                if not child.is_alive:
                    raise RunFailed(f"{child.name} ended by itself: {child.tail()}")

    def close(self) -> None:
        """Stop the clients first, then what they speak to."""
        for tier in ("clients", "server", "store", "broker"):
            for child in self._tiers.pop(tier, []):
                child.stop()
        if self._configured and self._broker_url:
            self._forget_inboxes()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _child(self, name: str, module: str, environment: Mapping[str, str]) -> Child:
        log = self._folder / f"{name}.log"
        return Child(name, [sys.executable, "-m", module], log, environment, keeps_settings=self._configured)

    def _await_server(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        with self.connect() as server:
            while True:
                self.check()
                try:
                    why = server.ready()
                except ServerUnavailable as error:
                    why = str(error)
                if why is None:
                    return
                if time.monotonic() > deadline:
                    raise ServerUnavailable(f"the server did not become ready in {READY_SECONDS:.0f} s: {why}")
                time.sleep(0.1)

    def _forget_inboxes(self) -> None:
        """Delete the clients' queues from a broker that stays."""
        broker = RabbitBroker(self._broker_url, name="lorabbit stress")
        with contextlib.suppress(LoRAbbitError):
            for client in range(self._clients):
                broker.delete_queue(topology.inbox(address_of(client)).name)
        broker.close()
