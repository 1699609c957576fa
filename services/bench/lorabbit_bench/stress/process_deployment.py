"""A private RabbitMQ and a private Redis for one measurement, as processes on ports of their own.

They are set as the shipped configuration sets them, listen on this machine alone, and take their data
along when they end. Nothing that runs on the machine already is touched.

A federation of processes on this machine: broker, store, server, and a host of light clients.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from lorabbit.broker import topology
from lorabbit.broker.rabbitmq.broker import RabbitBroker
from lorabbit.config.settings import ServerSettings, child_environment
from lorabbit.errors import BrokerUnavailable, LoRAbbitError, RunFailed, ServerUnavailable
from lorabbit_bench.stress.client_host import ClientHostConfig, address_of
from lorabbit_bench.stress.plan import StressPlan
from lorabbit_bench.stress.resource_usage import UsageSample, read_processes
from lorabbit_cli.api_client import ApiClient
from lorabbit_cli.options import read_settings

START_SECONDS = 120.0
STOP_SECONDS = 10.0
DEBIAN_RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
"""The script behind Debian's own, which insists on root or the user rabbitmq."""
RABBITMQ_SETTINGS = """\
max_message_size = 16777216
consumer_timeout = 600000
heartbeat = 20
tcp_listen_options.sndbuf = 196608
tcp_listen_options.recbuf = 196608
vm_memory_high_watermark.absolute = 1GiB
disk_free_limit.absolute = 1GB
"""
"""What services/rabbitmq/rabbitmq.conf sets."""
REDIS_SETTINGS = ("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction", "--save", "")


class ChildProcess:
    """One process in a session of its own, with its log in a file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        *,
        keeps_settings: bool = False,
    ) -> None:
        """Start it at once; standard input stays open for as long as this object's owner lives."""
        self.name, self.log = name, log
        with log.open("ab") as output:
            self.process = subprocess.Popen(  # noqa: S603 - our own commands
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment(environment, keeps_settings=keeps_settings),
                start_new_session=True,
            )

    @property
    def is_alive(self) -> bool:
        """Tell whether it still runs."""
        return self.process.poll() is None

    def tail(self, lines: int = 5) -> str:
        """The end of its log."""
        return " / ".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """Ask it to end, then make it, and everything that it started."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        if self.is_alive:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def missing_programs() -> str | None:
    """Say which program is not on this machine; None when both are."""
    if _rabbitmq() is None:
        return "no rabbitmq-server"
    return None if _redis() is not None else "no redis-server"


def start_rabbitmq(folder: Path, started: list[ChildProcess]) -> str:
    """Start a RabbitMQ, adding each process to `started` at once; returns its URL. Raises BrokerUnavailable."""
    folder.mkdir(parents=True)
    port, epmd_port = free_port(), str(free_port())
    (folder / "rabbitmq.conf").write_text(
        f"listeners.tcp.1 = 127.0.0.1:{port}\nlog.console = true\nlog.console.level = warning\n" + RABBITMQ_SETTINGS,
        encoding="utf-8",
    )
    (folder / "enabled_plugins").write_text("[].\n", encoding="utf-8")
    environment = {
        "HOME": str(folder),
        "RABBITMQ_NODENAME": f"stress{port}@localhost",
        "RABBITMQ_DIST_PORT": str(free_port()),
        "ERL_EPMD_PORT": epmd_port,
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        # The start script then becomes the server instead of watching over it.
        "RUNNING_UNDER_SYSTEMD": "true",
    }
    # The node would start a name server that outlives it; this one ends with it.
    names = [shutil.which("epmd") or "epmd", "-port", epmd_port]
    started.append(ChildProcess("epmd", names, folder / "epmd.log", environment))
    broker = ChildProcess("RabbitMQ", [_rabbitmq() or "rabbitmq-server"], folder / "broker.log", environment)
    started.append(broker)
    _await(broker, port, b"AMQP\x00\x00\x09\x01", b"\x01")
    return f"amqp://guest:guest@127.0.0.1:{port}/"


def start_redis(folder: Path, started: list[ChildProcess]) -> str:
    """Start a Redis that fsyncs every write, adding it to `started`; returns its URL. Raises BrokerUnavailable."""
    folder.mkdir(parents=True)
    port = free_port()
    here = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    store = ChildProcess("Redis", [_redis() or "redis-server", *here, *REDIS_SETTINGS], folder / "store.log", {})
    started.append(store)
    _await(store, port, b"PING\r\n", b"+PONG")
    return f"redis://127.0.0.1:{port}/0"


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rabbitmq() -> str | None:
    return str(DEBIAN_RABBITMQ) if DEBIAN_RABBITMQ.exists() else shutil.which("rabbitmq-server")


def _redis() -> str | None:
    return shutil.which("redis-server") or shutil.which("valkey-server")


def _await(child: ChildProcess, port: int, question: bytes, answer: bytes) -> None:
    """Wait until a process answers; raises BrokerUnavailable."""
    deadline = time.monotonic() + START_SECONDS
    while not _answers(port, question, answer):
        if not child.is_alive or time.monotonic() > deadline:
            raise BrokerUnavailable(f"a private {child.name} did not start: {child.tail()}")
        time.sleep(0.1)


def _answers(port: int, question: bytes, answer: bytes) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.settimeout(2.0)
            connection.sendall(question)
            return connection.recv(16).startswith(answer)
    except OSError:
        return False


READY_SECONDS = 60.0


class ProcessDeployment:
    """See the module's docstring; `Deployment` says what each method does."""

    def __init__(self, plan: StressPlan, clients: int, *, configured: bool) -> None:
        """Prepare for so many clients; with `configured`, over the broker and store that the environment names."""
        self._plan, self._clients, self._configured = plan, clients, configured
        self._folder = Path(tempfile.mkdtemp(prefix="lorabbit-stress-"))
        self._tiers: dict[str, list[ChildProcess]] = {}
        self._broker_url = self._redis_url = ""
        self.server_settings: dict[str, str] = {}
        """LORABBIT_* variables of the server in place of their defaults."""
        self._port = free_port()
        per_process = plan.clients_per_process(clients)
        processes = -(-clients // per_process)
        each = "one client in each" if per_process == 1 else f"up to {per_process} clients in each"
        self.description = f"{processes} client processes, {each}"
        self._per_process = per_process

    def connect(self) -> ApiClient:
        """Open the server's HTTP interface."""
        return ApiClient(f"http://127.0.0.1:{self._port}")

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
        host = self._child("clients", "lorabbit_bench.stress.client_host", {})
        self._tiers["clients"] = [host]
        hosting = ClientHostConfig(
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

    def meter(self) -> Mapping[str, UsageSample]:
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
            self._delete_queues()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _child(self, name: str, module: str, environment: Mapping[str, str]) -> ChildProcess:
        log = self._folder / f"{name}.log"
        return ChildProcess(name, [sys.executable, "-m", module], log, environment, keeps_settings=self._configured)

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

    def _delete_queues(self) -> None:
        """Delete the clients' queues from a broker that stays."""
        broker = RabbitBroker(self._broker_url, name="lorabbit stress")
        with contextlib.suppress(LoRAbbitError):
            for client in range(self._clients):
                broker.delete_queue(topology.inbox(address_of(client)).name)
        broker.close()
