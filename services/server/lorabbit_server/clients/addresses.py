"""Addresses of clients: detects two processes that use one address, and which of them came second.

A restarted client draws a new name, and its former process is never heard of again. So whoever speaks after a younger
process did is alive beside it: both read one inbox, and each gets half of what is meant for the other. The younger one
has to go; a supervisor that starts it again only makes it the younger one again.

`ClientQueues` declares the queue in which the broker keeps the messages for each client.
"""

from __future__ import annotations

from lorabbit.broker import topology
from lorabbit.broker.base import Broker

KEPT = 4
"""Processes remembered for each address, the youngest ones."""


class DuplicateClientDetector:
    """What one server heard while it led; what the broker delivers a second time is old, and not to be told here."""

    def __init__(self) -> None:
        """Know nobody."""
        self._heard: dict[str, list[str]] = {}
        self._surplus: dict[str, set[str]] = {}

    def observe(self, address: str, process: str) -> bool:
        """Note who speaks; tell whether it has to leave, since an older process is alive at its address."""
        heard = self._heard.setdefault(address, [])
        if process not in heard:
            heard.append(process)
            del heard[:-KEPT]
        younger = heard[heard.index(process) + 1 :]
        if younger:
            self._surplus[address] = (self._surplus.get(address, set()) | set(younger)) & set(heard)
        return process in self._surplus.get(address, ())

    def leave(self, address: str, process: str) -> bool:
        """Forget a process that ends; tell whether another one stays at its address.

        The goodbye of a former process may come late, when a frozen server had it: one that is unknown here is such.
        """
        heard = self._heard.get(address, [])
        stays = process in self._surplus.get(address, ()) or bool(process and heard and heard[-1] != process)
        if not stays:
            self.forget(address)
            return False
        if process in heard:
            heard.remove(process)
        self._surplus[address] = set(heard[1:]) & self._surplus.get(address, set())
        return True

    def forget(self, address: str) -> None:
        """Forget an address that nobody has any more."""
        self._heard.pop(address, None)
        self._surplus.pop(address, None)


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
