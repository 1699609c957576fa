"""The traffic meter: bytes on the wire per task, payload and overhead separately.

Payload is the bytes of tensors in chunks. Overhead is everything else that our messages hold:
bodies of control messages, and the routing keys, types and headers of all of them. What AMQP and
TCP add below is not counted.

Counts are kept in a file, written before a delivery is acknowledged, so the next server goes on
with them. A message is known by its id, which is another one each time it is sent: what the broker
delivers twice counts once, what a client sends twice counts twice. Only what was not acknowledged is
delivered twice, so the ids of the newest messages are enough.
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
"""Tasks that are counted at once; names that clients make up must not fill the memory."""
MAX_NAME = 128
MAX_IDS = 16_384
"""Messages that are known by their id; far more than servers have in their hands, unacknowledged."""
COMPACT_LINES = 10_000
"""The file is written anew when it has so many more lines than the last time."""


@dataclass(slots=True)
class _Counts:
    bytes_up: int = 0
    overhead_up: int = 0
    overhead_down: int = 0


class TrafficMeter:
    """Counts until a task's result is accepted; for the loop thread."""

    def __init__(self, path: Path | None = None, files: FencedFileWriter | None = None) -> None:
        """Go on with what a file holds, and keep it there, written by `files`; in memory alone without a path."""
        self._path, self._files = path, files or FencedFileWriter(durable=False)
        self._tasks: dict[str, _Counts] = {}
        self._seen: dict[tuple[str, str], None] = {}
        """Tasks and ids of the newest messages that are counted, oldest first."""
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
        """Count bytes from a client; `message` is the id under which they were sent, empty for none."""
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
        """Forget every task but these; raises Fenced where another server keeps the file."""
        self._tasks = {task: counts for task, counts in self._tasks.items() if task in tasks}
        self._seen = {seen: None for seen in self._seen if seen[0] in self._tasks}
        if not self._tasks:
            self._compact()

    def _count(self, task: str, up: int, overhead_up: int, overhead_down: int, *seen: str) -> None:
        """Write a line, then add it; raises Fenced where another server keeps the file."""
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
        """Add a line, unless it is of a message that counts already, as one may that two servers had in their hands."""
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
        """One line per task; no file without any."""
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
    """Bytes of a message beside its body."""
    headers = sum(len(name) + len(str(value)) for name, value in delivery.headers.items())
    return len(delivery.routing_key) + len(delivery.type) + headers
