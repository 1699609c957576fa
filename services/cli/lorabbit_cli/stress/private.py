"""A private RabbitMQ and a private Redis for one measurement, as processes on ports of their own.

They are set as the shipped configuration sets them, listen on this machine alone, and take their data
along when they end. Nothing that runs on the machine already is touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorabbit.errors import BrokerUnavailable
from lorabbit.settings import child_environment

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


class Child:
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


def missing() -> str | None:
    """Say which program is not on this machine; None when both are."""
    if _rabbitmq() is None:
        return "no rabbitmq-server"
    return None if _redis() is not None else "no redis-server"


def start_rabbitmq(folder: Path, started: list[Child]) -> str:
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
    started.append(Child("epmd", names, folder / "epmd.log", environment))
    broker = Child("RabbitMQ", [_rabbitmq() or "rabbitmq-server"], folder / "broker.log", environment)
    started.append(broker)
    _await(broker, port, b"AMQP\x00\x00\x09\x01", b"\x01")
    return f"amqp://guest:guest@127.0.0.1:{port}/"


def start_redis(folder: Path, started: list[Child]) -> str:
    """Start a Redis that fsyncs every write, adding it to `started`; returns its URL. Raises BrokerUnavailable."""
    folder.mkdir(parents=True)
    port = free_port()
    here = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    store = Child("Redis", [_redis() or "redis-server", *here, *REDIS_SETTINGS], folder / "store.log", {})
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


def _await(child: Child, port: int, question: bytes, answer: bytes) -> None:
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
