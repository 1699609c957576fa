"""The traffic meter: bytes on the wire per task, payload and overhead separately.

Payload is the bytes of tensors in chunks. Overhead is everything else in our messages: bodies of control messages,
and routing keys, types and headers of all messages. The overhead of AMQP and TCP is not counted.

Counts are appended to a file before a delivery is acknowledged, so the next server continues them. Messages are
identified by their message id, which is new for each publication: a redelivery is counted once, a message sent twice
is counted twice. Only unacknowledged messages are redelivered, so the ids of the most recent messages are sufficient.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path

import structlog

from lorabbit.broker.base import Delivery
from lorabbit_server.artifacts.fenced_files import FencedFileWriter
from lorabbit_server.engine.transitions import PayloadTraffic

log = structlog.get_logger()
MAX_TASKS = 65_536
"""Limit of counted tasks, so that invented task names cannot fill the memory."""
MAX_NAME = 128
MAX_IDS = 16_384
"""Limit of remembered message ids; far more than there are unacknowledged deliveries."""
COMPACT_LINES = 10_000
"""The file is compacted after this many new lines."""


@dataclass(slots=True)
class _Counts:
    bytes_up: int = 0
    overhead_up: int = 0
    overhead_down: int = 0


class TrafficMeter:
    """Counts the bytes of each task until its update is accepted; for the loop thread."""

    def __init__(self, path: Path | None = None, files: FencedFileWriter | None = None) -> None:
        """Continue the counts in a file, which `files` writes; without a path they are kept in memory."""
        self._path, self._files = path, files or FencedFileWriter(durable=False)
        self._tasks: dict[str, _Counts] = {}
        self._seen: dict[tuple[str, str], None] = {}
        """Tasks and ids of the most recent messages, oldest first."""
        self._lines = 0
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files.inherit(path.parent)
            self._load(path)

    def received(self, task: str, delivery: Delivery, *, is_chunk: bool = False) -> None:
        """Count a message from a client: the body of a chunk is payload, everything else is overhead."""
        body = len(delivery.body)
        overhead = header_bytes(delivery) + (0 if is_chunk else body)
        self.up(task, payload=body if is_chunk else 0, overhead=overhead, message=delivery.message_id)

    def up(self, task: str, *, payload: int = 0, overhead: int = 0, message: str = "") -> None:
        """Count bytes from a client; `message` is the message id, or empty."""
        is_known = task in self._tasks or (len(self._tasks) < MAX_TASKS and len(task) <= MAX_NAME)
        if is_known and (task, message) not in self._seen:
            self._count(task, payload, overhead, 0, message)

    def down(self, task: str, overhead: int) -> None:
        """Count bytes to a client."""
        self._count(task, 0, 0, overhead, "")

    def read(self, task: str) -> PayloadTraffic:
        """The bytes of a task so far."""
        counts = self._tasks.get(task, _Counts())
        return PayloadTraffic(counts.bytes_up, counts.overhead_up, counts.overhead_down)

    def retain(self, tasks: Collection[str]) -> None:
        """Delete the counts of all other tasks; raises Fenced when another server leads."""
        self._tasks = {task: counts for task, counts in self._tasks.items() if task in tasks}
        self._seen = {seen: None for seen in self._seen if seen[0] in self._tasks}
        if not self._tasks:
            self._compact()

    def _count(self, task: str, up: int, overhead_up: int, overhead_down: int, *seen: str) -> None:
        """Append a line to the file, then add it to the counts."""
        ids = tuple(filter(None, seen))
        if self._path is not None:
            with self._path.open("ab", buffering=0) as file:
                line = [task, up, overhead_up, overhead_down, *ids]
                file.write(json.dumps(line).encode() + b"\n")
            self._lines += 1
        self._add(task, up, overhead_up, overhead_down, *ids)
        if self._lines > COMPACT_LINES:
            self._compact()

    def _add(self, task: str, up: int, overhead_up: int, overhead_down: int, *ids: str) -> None:
        """Add a line to the counts, unless its message was counted before, perhaps by another server."""
        new = [(task, id_) for id_ in ids if (task, id_) not in self._seen]
        if ids and not new:
            return
        counts = self._tasks.setdefault(task, _Counts())
        counts.bytes_up += up
        counts.overhead_up += overhead_up
        counts.overhead_down += overhead_down
        self._seen.update(dict.fromkeys(new))
        for oldest in list(islice(self._seen, max(0, len(self._seen) - MAX_IDS))):
            del self._seen[oldest]

    def _load(self, path: Path) -> None:
        if not path.exists():
            return
        for line in path.read_bytes().splitlines():
            try:
                self._add(*json.loads(line))
                self._lines += 1
            except (ValueError, TypeError):
                log.warning("traffic-record-damaged", path=str(path))

    def _compact(self) -> None:
        """Rewrite the file with one line per task; delete it when there are no tasks."""
        self._lines = 0
        if self._path is None:
            return
        if not self._tasks:
            self._files.fence()
            self._path.unlink(missing_ok=True)
            return
        ids: dict[str, list[str]] = {task: [] for task in self._tasks}
        for task, id_ in self._seen:
            ids[task].append(id_)
        totals = [[task, *astuple(counts), *ids[task]] for task, counts in self._tasks.items()]
        self._files.write(self._path, "".join(json.dumps(line) + "\n" for line in totals))


def header_bytes(delivery: Delivery) -> int:
    """Bytes of a message without its body."""
    headers = sum(len(name) + len(str(value)) for name, value in delivery.headers.items())
    return len(delivery.routing_key) + len(delivery.type) + headers
