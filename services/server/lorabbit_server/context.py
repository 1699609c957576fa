"""The services that a server passes to its jobs in one epoch."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from lorabbit import __version__
from lorabbit.broker.base import Broker
from lorabbit.config.settings import ServerSettings
from lorabbit.errors import Fenced
from lorabbit.state.base import StateStore
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.transfer.stream_publisher import StreamPublisher
from lorabbit_server.clients.enrollment import ClientAccess
from lorabbit_server.clients.registry import ClientRegistry
from lorabbit_server.event_loop import EventLoop

VERSIONS = {"lorabbit": __version__, "python": platform.python_version(), "numpy": np.__version__}


def wall_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class ServerOverrides:
    """What a test replaces: the clock, and the executor of heavy work."""

    now_ms: Callable[[], int] = wall_ms
    worker: Executor | None = None


@dataclass(frozen=True, slots=True)
class ServerContext:
    """Valid as long as the server holds the lease under `epoch`."""

    loop: EventLoop
    broker: Broker
    store: StateStore
    payloads: PayloadStore
    publisher: StreamPublisher
    registry: ClientRegistry
    access: ClientAccess
    settings: ServerSettings
    now_ms: Callable[[], int]
    epoch: int
    versions: Mapping[str, str]
    """Versions of the server and its packages, for the report."""
    refused: Counter[str] = field(default_factory=Counter)
    """Numbers of refused messages, chunks and offers, by reason."""

    def fence(self) -> None:
        """Raise Fenced if another server leads, which then owns the files on a shared volume. For any thread."""
        if not self.store.is_newest(self.epoch):
            raise Fenced(f"another server leads, in an epoch after {self.epoch}")

    def traffic_of(self, job: str) -> Path | None:
        """The file in which the traffic of a job is counted; None if files need not be durable."""
        return self.settings.folder / "traffic" / f"{job}.jsonl" if self.settings.durable else None

    def with_versions(self, facts: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        """A client's facts, with the server's versions added."""
        known = facts.get("versions")
        return {**facts, "versions": {**(known if isinstance(known, dict) else {}), **self.versions}}
