"""Inboxes: the queues in which the broker keeps what each client is sent, declared by the server that leads."""

from __future__ import annotations

from lorabbit.broker import topology
from lorabbit.broker.base import Broker


class Inboxes:
    """Knows which inboxes are there, so that each is declared once; for the loop thread."""

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
