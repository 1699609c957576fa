"""Meter: bytes on the wire per task, payload and overhead apart.

Payload is the bytes of tensors in chunks. Overhead is everything else that our messages hold:
bodies of control messages, and the routing keys, types and headers of all of them. What AMQP and
TCP add below is not counted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from lorabbit.broker.base import Delivery
from lorabbit_server.steps import Traffic

MAX_TASKS = 65_536
"""Tasks that are counted at once; names that clients make up must not fill the memory."""
MAX_NAME = 128


@dataclass(slots=True)
class _Counts:
    bytes_up: int = 0
    overhead_up: int = 0
    overhead_down: int = 0


@dataclass(slots=True)
class Meter:
    """Counts until a task's result is accepted; a restarted server counts anew."""

    _tasks: dict[str, _Counts] = field(default_factory=dict)

    def up(self, task: str, *, payload: int = 0, overhead: int = 0) -> None:
        """Count bytes from a client."""
        if task not in self._tasks and (len(self._tasks) >= MAX_TASKS or len(task) > MAX_NAME):
            return
        counts = self._tasks.setdefault(task, _Counts())
        counts.bytes_up += payload
        counts.overhead_up += overhead

    def down(self, task: str, overhead: int) -> None:
        """Count bytes to a client."""
        self._tasks.setdefault(task, _Counts()).overhead_down += overhead

    def read(self, task: str) -> Traffic:
        """The bytes of a task so far."""
        counts = self._tasks.get(task, _Counts())
        return Traffic(counts.bytes_up, counts.overhead_up, counts.overhead_down)

    def keep(self, tasks: Collection[str]) -> None:
        """Forget every task but these."""
        self._tasks = {task: counts for task, counts in self._tasks.items() if task in tasks}


def header_bytes(delivery: Delivery) -> int:
    """Bytes of a message beside its body."""
    headers = sum(len(name) + len(str(value)) for name, value in delivery.headers.items())
    return len(delivery.routing_key) + len(delivery.type) + headers
