"""Addresses of clients: detects two processes that use the same address, and declares the clients' queues.

A process draws a random name when it starts. When a client restarts, its former process sends nothing any more. So if
an older process sends a message after a newer one, both are running: they consume from one queue, and each receives
half of the messages. The newer one is told to stop.

`ClientQueues` declares the queue in which the broker stores the messages for each client.
"""

from __future__ import annotations

from lorabbit.broker import topology
from lorabbit.broker.base import Broker

MAX_PROCESSES = 4
"""Most recent processes that are remembered for each address."""


class DuplicateClientDetector:
    """Processes by address, as seen by the leading server; do not pass redelivered messages, which are stale."""

    def __init__(self) -> None:
        """Start empty."""
        self._processes: dict[str, list[str]] = {}
        self._duplicates: dict[str, set[str]] = {}

    def observe(self, address: str, process: str) -> bool:
        """Record a message of a process; returns whether it is a duplicate, because an older one uses the address."""
        processes = self._processes.setdefault(address, [])
        if process not in processes:
            processes.append(process)
            del processes[:-MAX_PROCESSES]
        newer = processes[processes.index(process) + 1 :]
        if newer:
            self._duplicates[address] = (self._duplicates.get(address, set()) | set(newer)) & set(processes)
        return process in self._duplicates.get(address, ())

    def remove_process(self, address: str, process: str) -> bool:
        """Remove a process that ends; returns whether another one still uses the address.

        The goodbye of a former process may come late, when a frozen server had it: one that is unknown here is such.
        """
        processes = self._processes.get(address, [])
        stays = process in self._duplicates.get(address, ()) or bool(process and processes and processes[-1] != process)
        if not stays:
            self.remove_address(address)
            return False
        if process in processes:
            processes.remove(process)
        self._duplicates[address] = set(processes[1:]) & self._duplicates.get(address, set())
        return True

    def remove_address(self, address: str) -> None:
        """Remove an address."""
        self._processes.pop(address, None)
        self._duplicates.pop(address, None)


class ClientQueues:
    """Knows which queues exist, so that each is declared once; for the loop thread."""

    def __init__(self, broker: Broker) -> None:
        """Start empty: the broker may have lost queues that an earlier server declared."""
        self._broker = broker
        self._declared: set[str] = set()

    def declare(self, address: str, *, may_be_gone: bool = False) -> None:
        """Declare a queue once; again if it `may_be_gone`, since the broker deletes queues of long absent clients."""
        if may_be_gone or address not in self._declared:
            self._broker.declare_queue(topology.inbox(address))
            self._declared.add(address)

    def delete(self, address: str) -> None:
        """Delete a queue with its messages."""
        self._broker.delete_queue(topology.inbox(address).name)
        self._declared.discard(address)
