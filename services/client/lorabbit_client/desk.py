"""Desk: what the assignments of one client share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorabbit.broker.base import Broker, OnDone
from lorabbit.messages import Message
from lorabbit_client.execution import Runner
from lorabbit_client.holdings import Holdings
from lorabbit_client.journal import Journal
from lorabbit_client.shelf import Shelf


@dataclass(frozen=True, slots=True)
class Desk:
    """One client's ways to the server, the disk and the training."""

    broker: Broker
    runner: Runner
    journal: Journal
    shelf: Shelf
    holdings: Holdings
    address: str
    send: Callable[[Message, OnDone | None], None]
    done: Callable[[str], None]
    """The task is over: forget the assignment."""
    advance: Callable[[], None]
    """An assignment is ready, or no longer at work: `run` those whose turn it is."""
