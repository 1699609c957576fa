"""Meter: bytes on the wire per task, payload and overhead apart.

Payload is the bytes of tensors in chunks. Overhead is everything else that our messages hold:
bodies of control messages, and the routing keys, types and headers of all of them. What AMQP and
TCP add below is not counted.

Counts are kept in a file, written before a delivery is acknowledged, so the next server goes on
with them. A message is known by its id, which is another one each time it is sent: what the broker
delivers twice counts once, what a client sends twice counts twice.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import astuple, dataclass, field
from pathlib import Path

import structlog

from lorabbit.broker.base import Delivery
from lorabbit_server.steps import Traffic

log = structlog.get_logger()
MAX_TASKS = 65_536
"""Tasks that are counted at once; names that clients make up must not fill the memory."""
MAX_NAME = 128
STALE_LINES = 10_000
"""The file is written anew when so many of its lines may speak of tasks that are over."""


@dataclass(slots=True)
class _Counts:
    bytes_up: int = 0
    overhead_up: int = 0
    overhead_down: int = 0
    seen: set[str] = field(default_factory=set)
    """Ids of the messages that are counted."""


class Meter:
    """Counts until a task's result is accepted; for the loop thread."""

    def __init__(self, path: Path | None = None) -> None:
        """Go on with what a file holds, and keep it there; in memory alone where there is no path."""
        self._path = path
        self._tasks: dict[str, _Counts] = {}
        self._lines = 0
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._load(path)

    def up(self, task: str, *, payload: int = 0, overhead: int = 0, message: str = "") -> None:
        """Count bytes from a client; `message` is the id under which they were sent, empty for none."""
        counts = self._tasks.get(task)
        if counts is None and (len(self._tasks) >= MAX_TASKS or len(task) > MAX_NAME):
            return
        if counts is None or not message or message not in counts.seen:
            self._count(task, payload, overhead, 0, message)

    def down(self, task: str, overhead: int) -> None:
        """Count bytes to a client."""
        self._count(task, 0, 0, overhead, "")

    def read(self, task: str) -> Traffic:
        """The bytes of a task so far."""
        counts = self._tasks.get(task, _Counts())
        return Traffic(counts.bytes_up, counts.overhead_up, counts.overhead_down)

    def keep(self, tasks: Collection[str]) -> None:
        """Forget every task but these."""
        self._tasks = {task: counts for task, counts in self._tasks.items() if task in tasks}
        if self._path is not None and (self._lines > STALE_LINES or not self._tasks):
            self._write_anew(self._path)

    def _count(self, task: str, up: int, overhead_up: int, overhead_down: int, *seen: str) -> None:
        """Write a line, then add it."""
        ids = tuple(filter(None, seen))
        if self._path is not None:
            with self._path.open("ab", buffering=0) as file:
                line = [task, up, overhead_up, overhead_down, *ids]
                file.write(json.dumps(line).encode() + b"\n")
            self._lines += 1
        self._add(task, up, overhead_up, overhead_down, *ids)

    def _add(self, task: str, up: int, overhead_up: int, overhead_down: int, *seen: str) -> None:
        counts = self._tasks.setdefault(task, _Counts())
        counts.bytes_up += up
        counts.overhead_up += overhead_up
        counts.overhead_down += overhead_down
        counts.seen.update(seen)

    def _load(self, path: Path) -> None:
        if not path.exists():
            return
        for line in path.read_bytes().splitlines():
            try:
                self._add(*json.loads(line))
                self._lines += 1
            except (ValueError, TypeError):
                log.warning("traffic-line-damaged", path=str(path))

    def _write_anew(self, path: Path) -> None:
        """One line per task; no file without any."""
        if not self._tasks:
            path.unlink(missing_ok=True)
            self._lines = 0
            return
        beside = path.with_name(path.name + ".part")
        totals = [[task, *astuple(counts)[:3], *sorted(counts.seen)] for task, counts in self._tasks.items()]
        beside.write_text("".join(json.dumps(line) + "\n" for line in totals), encoding="utf-8")
        beside.replace(path)
        self._lines = len(totals)


def header_bytes(delivery: Delivery) -> int:
    """Bytes of a message beside its body."""
    headers = sum(len(name) + len(str(value)) for name, value in delivery.headers.items())
    return len(delivery.routing_key) + len(delivery.type) + headers
