"""Host: a process that makes all light clients of a stress test, forked so that they share their memory.

Everything is imported once, before the first fork. The host ends, and every client with it, when its
standard input does: whoever started it may be killed and leaves no client behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lorabbit.settings import ClientSettings
from lorabbit.telemetry import configure
from lorabbit_cli.stress.light import LightClient
from lorabbit_cli.stress.traces import Trace, read_slowness
from lorabbit_client.executor import Executor
from lorabbit_client.runners import ThreadRunner

STOP_SECONDS = 10.0
CLIENTS_PER_SECOND = 50
"""So many begin to connect: a fleet that is scaled up, not one that was cut off."""


@dataclass(frozen=True, slots=True)
class Hosting:
    """What a host is told: which clients, how many to a process, and their traces."""

    clients: int
    per_process: int
    folder: str
    broker_url: str
    train: str
    seed: int
    churn: float
    slow: str

    @classmethod
    def read(cls, text: str) -> Self:
        """Read it from one line of JSON."""
        return cls(**json.loads(text))


def address_of(client: int) -> str:
    """Name a client, counted from 0, so that names sort as numbers do."""
    return f"stress-{client:05d}"


def main() -> int:
    """Fork the clients that standard input asks for, and end with it."""
    hosting = Hosting.read(sys.stdin.readline())
    configure("ERROR", "json")
    if hosting.train == "real":
        import lorabbit_client.learning  # noqa: F401, PLC0415 - torch, once for all forks
    with contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, _interrupt)
        readable, writable = os.pipe()
        for first in range(0, hosting.clients, hosting.per_process):
            if os.fork() == 0:
                os.close(writable)
                _be_clients(hosting, first, readable)
        sys.stdin.read()
    return 0


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _be_clients(hosting: Hosting, first: int, lifeline: int) -> None:
    """Hold some clients until the host's end of the pipe is closed; never returns."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trace = Trace(hosting.seed, hosting.churn, read_slowness(hosting.slow))
    runner = ThreadRunner(Executor(device="cpu"), durable=False)
    clients = []
    for number in range(first, min(first + hosting.per_process, hosting.clients)):
        address = address_of(number)
        settings = ClientSettings(
            broker_url=hosting.broker_url, address=address, folder=Path(hosting.folder) / address, durable=False
        )
        clients.append(LightClient(number, settings, runner, trace))
    for number, client in enumerate(clients, start=first):
        client.start(number / CLIENTS_PER_SECOND)
    waits = threading.Thread(target=os.read, args=(lifeline, 1), daemon=True)
    waits.start()
    waits.join()
    for client in clients:
        client.stop()
    for client in clients:
        client.join(STOP_SECONDS / len(clients))
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
