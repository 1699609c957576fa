"""Addresses of clients: detects two processes that use one address, and which of them came second.

A restarted client draws a new name, and its former process is never heard of again. So whoever speaks after a younger
process did is alive beside it: both read one inbox, and each gets half of what is meant for the other. The younger one
has to go; a supervisor that starts it again only makes it the younger one again.

`ClientQueues` declares the queue in which the broker keeps the messages for each client.
"""

from __future__ import annotations

from lorabbit.broker import topology
from lorabbit.broker.base import Broker

MAX_PROCESSES = 4
"""Processes remembered for each address, the youngest ones."""


class DuplicateClientDetector:
    """What one server heard while it led; what the broker delivers a second time is old, and not to be told here."""

    def __init__(self) -> None:
        """Know nobody."""
        self._processes: dict[str, list[str]] = {}
        self._duplicates: dict[str, set[str]] = {}

    def observe(self, address: str, process: str) -> bool:
        """Note who speaks; tell whether it has to leave, since an older process is alive at its address."""
        processes = self._processes.setdefault(address, [])
        if process not in processes:
            processes.append(process)
            del processes[:-MAX_PROCESSES]
        newer = processes[processes.index(process) + 1 :]
        if newer:
            self._duplicates[address] = (self._duplicates.get(address, set()) | set(newer)) & set(processes)
        return process in self._duplicates.get(address, ())

    def remove_process(self, address: str, process: str) -> bool:
        """Forget a process that ends; tell whether another one stays at its address.

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
        """Forget an address that nobody has any more."""
        self._processes.pop(address, None)
        self._duplicates.pop(address, None)


class ClientQueues:
    """Knows which queues exist, so that each is declared once; for the loop thread."""

    def __init__(self, broker: Broker) -> None:
        """Know of none yet: the broker may have lost what an earlier server declared."""
        self._broker = broker
        self._declared: set[str] = set()

    def declare(self, address: str, *, may_be_gone: bool = False) -> None:
        """Have an inbox, also where it may be gone since: the broker drops that of a client that is away for long."""
        if may_be_gone or address not in self._declared:
            self._broker.declare_queue(topology.inbox(address))
            self._declared.add(address)

    def delete(self, address: str) -> None:
        """Delete an inbox with what is in it."""
        self._broker.delete_queue(topology.inbox(address).name)
        self._declared.discard(address)
