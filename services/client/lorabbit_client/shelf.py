"""Shelf: payloads on this machine's disk, read from their streams when a task needs them.

A payload is read once, however many tasks wait for it, and stays for the next task that names it.
A service client puts away what no task will name again. In an embedded run hundreds of clients
share one shelf, which keeps the most recently used; each client still counts its own bytes, as if
it had a disk of its own.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from lorabbit.broker.base import Broker
from lorabbit.errors import LoRAbbitError
from lorabbit.messages import PayloadRef
from lorabbit.payloads import PayloadStore
from lorabbit.transfer import AdapterReader

OnTaken: TypeAlias = Callable[[LoRAbbitError | None], None]


@dataclass(frozen=True, slots=True)
class _Reading:
    """A payload on its way."""

    reader: AdapterReader
    waiting: list[OnTaken]


class Shelf:
    """See the module's docstring; for the loop thread."""

    def __init__(self, broker: Broker, store: PayloadStore, *, keep: int | None = None) -> None:
        """Share the shelf and `keep` so many unused payloads; with None, clients say what to put away."""
        self._broker = broker
        self._store = store
        self._keep = keep
        self._reading: dict[str, _Reading] = {}
        self._users: Counter[str] = Counter()
        self._unwanted: set[str] = set()
        self._recent: OrderedDict[str, None] = OrderedDict()

    @property
    def is_shared(self) -> bool:
        """Tell whether several clients use it."""
        return self._keep is not None

    def has(self, sha256: str) -> bool:
        """Tell whether a payload is here, or on its way."""
        return sha256 in self._reading or self._store.has(sha256)

    def is_here(self, sha256: str) -> bool:
        """Tell whether a payload is here, whole."""
        return self._store.has(sha256)

    def path(self, sha256: str) -> Path:
        """Where a payload lies."""
        return self._store.path(sha256)

    def take(self, ref: PayloadRef, on_taken: OnTaken) -> None:
        """Bring a payload here and keep it until `give`; `on_taken` may be called at once."""
        sha256 = ref.sha256
        self._users[sha256] += 1
        self._unwanted.discard(sha256)
        reading = self._reading.get(sha256)
        if reading is not None:
            reading.waiting.append(on_taken)
        elif self._store.has(sha256):
            on_taken(None)
        else:
            reader = AdapterReader(self._broker, self._store, ref, partial(self._read, sha256))
            self._reading[sha256] = _Reading(reader, [on_taken])

    def redirect(self, ref: PayloadRef) -> None:
        """Read a payload that is on its way from the stream that `ref` names, if it is another one."""
        reading = self._reading.get(ref.sha256)
        if reading is not None and reading.reader.stream != ref.stream:
            reading.reader.cancel()
            reader = AdapterReader(self._broker, self._store, ref, partial(self._read, ref.sha256))
            self._reading[ref.sha256] = _Reading(reader, reading.waiting)

    def expect(self, sha256: str) -> None:
        """Keep a payload until `give` that is here, or that a task is going to make here."""
        self._users[sha256] += 1
        self._unwanted.discard(sha256)

    def give(self, sha256: str) -> None:
        """Say that one task no longer needs a payload."""
        self._users[sha256] -= 1
        if self._users[sha256] > 0:
            return
        del self._users[sha256]
        unfinished = self._reading.pop(sha256, None)
        if unfinished is not None:
            unfinished.reader.cancel()
        if sha256 in self._unwanted:
            self.put_away(sha256)
        elif self._keep is not None:
            self._recent[sha256] = None
            self._recent.move_to_end(sha256)
            self._make_room(self._keep)

    def put_away(self, sha256: str) -> None:
        """Delete a payload as soon as no task uses it; a shared shelf decides that itself."""
        if self.is_shared:
            return
        if self._users[sha256] > 0:
            self._unwanted.add(sha256)
            return
        self._unwanted.discard(sha256)
        self._store.delete(sha256)

    def tidy(self, wanted: Iterable[str]) -> None:
        """Delete what an earlier process left here and nobody wants; a shared shelf starts empty."""
        if not self.is_shared:
            for sha256 in set(self._store.stored()) - set(wanted):
                self._store.delete(sha256)

    def _make_room(self, keep: int) -> None:
        """Delete the payloads that were used longest ago."""
        for sha256 in list(self._recent):
            if len(self._recent) <= keep:
                return
            del self._recent[sha256]
            if self._users[sha256] == 0:
                self._store.delete(sha256)

    def _read(self, sha256: str, error: LoRAbbitError | None) -> None:
        """Tell everybody who waits."""
        for on_taken in self._reading.pop(sha256).waiting:
            on_taken(error)
