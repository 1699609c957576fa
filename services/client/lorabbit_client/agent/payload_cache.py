"""Payloads on a client's disk: which ones it holds, and which ones a task makes it download.

A client holds what its last tasks named. It reads a payload whole, or by the shorter way that the task names where
it holds what that tells the difference to. Clients that share a cache each keep their own list, so the bytes counted
are those of separate machines. What is held and what was counted is written in one step, so a client that is killed
within a task counts what it read before, once.

`PayloadCache` keeps payloads on this machine's disk and reads them from their streams when a task needs them.

A payload is read once, however many tasks wait for it, and stays for the next task that names it.
A service client puts away what no task will name again. In an embedded run hundreds of clients
share one cache, which keeps the most recently used; each client still counts its own bytes, as if
it had a disk of its own.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from lorabbit.broker.base import Broker
from lorabbit.compression.compressor import DecodeStep
from lorabbit.errors import LoRAbbitError
from lorabbit.protocol.messages import EncodedDownload, PayloadRef, Task
from lorabbit.transfer.chunked_transfer import StreamReader
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit_client.agent.journal import OWED, Journal

OnTaken: TypeAlias = Callable[[LoRAbbitError | None], None]


@dataclass(frozen=True, slots=True)
class _Download:
    """A payload on its way."""

    reader: StreamReader
    waiting: list[OnTaken]


class PayloadCache:
    """See the module's docstring; for the loop thread."""

    def __init__(self, broker: Broker, store: PayloadStore, *, keep: int | None = None) -> None:
        """Share the cache and `keep` so many unused payloads; with None, clients say what to put away."""
        self._broker = broker
        self._store = store
        self._keep = keep
        self._reading: dict[str, _Download] = {}
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
            reader = StreamReader(self._broker, self._store, ref, partial(self._read, sha256))
            self._reading[sha256] = _Download(reader, [on_taken])

    def redirect(self, ref: PayloadRef) -> None:
        """Read a payload that is on its way from the stream that `ref` names, if it is another one."""
        reading = self._reading.get(ref.sha256)
        if reading is not None and reading.reader.stream != ref.stream:
            reading.reader.cancel()
            reader = StreamReader(self._broker, self._store, ref, partial(self._read, ref.sha256))
            self._reading[ref.sha256] = _Download(reader, reading.waiting)

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
            self.evict(sha256)
        elif self._keep is not None:
            self._recent[sha256] = None
            self._recent.move_to_end(sha256)
            self._evict_unused(self._keep)

    def evict(self, sha256: str) -> None:
        """Delete a payload as soon as no task uses it; a shared cache decides that itself."""
        if self.is_shared:
            return
        if self._users[sha256] > 0:
            self._unwanted.add(sha256)
            return
        self._unwanted.discard(sha256)
        self._store.delete(sha256)

    def tidy(self, wanted: Iterable[str]) -> None:
        """Delete what an earlier process left here and nobody wants; a shared cache starts empty."""
        if not self.is_shared:
            for sha256 in set(self._store.stored()) - set(wanted):
                self._store.delete(sha256)

    def _evict_unused(self, keep: int) -> None:
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


CODED, ORIGIN = "coded", "origin"
"""In the place of a phase: a file that an adapter is made of, and one that it is told as a difference to."""


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """What one task reads."""

    counted: Mapping[str, int]
    """Bytes that are not here yet, by role."""
    files: tuple[PayloadRef, ...]
    """To be taken from the cache, whole or coded."""
    kept: tuple[str, ...]
    """To be given back to the cache as well: what the task makes, and what it makes that of."""
    recipes: tuple[DecodeStep, ...]
    """How the task makes the payloads that are coded."""


class PayloadAccounting:
    """See the module's docstring; for the loop thread."""

    def __init__(self, journal: Journal, cache: PayloadCache) -> None:
        """Go on from what the journal remembers."""
        self._journal, self._cache = journal, cache
        self._held = journal.held()
        self._counted = journal.read_by_task()
        self._coming: dict[str, EncodedDownload] = {}
        """Payloads that a task is to make, by sha256."""

    def tidy(self) -> None:
        """Delete what an earlier process left on the cache and nobody holds."""
        self._cache.tidy(self._held.values())

    def read(self, task: Task) -> DownloadPlan:
        """Decide what a task reads, count what is not here, hold it, and put away what it replaces.

        A task that was counted before, and not forgotten, costs what it cost then.
        """
        known = set(self._held.values())
        self._coming = {sha256: way for sha256, way in self._coming.items() if not self._cache.is_here(sha256)}
        ways = {
            ref.sha256: task.ways[ref.sha256]
            for ref in task.payloads.values()
            if ref.sha256 in task.ways and not self._cache.has(ref.sha256) and self._is_open(task.ways[ref.sha256])
        }
        before = self._counted.get(task.task)
        counted = self._lacked(task, known, ways) if before is None else before
        owed = self._counted.pop(OWED + task.job, {})
        counted = {role: counted.get(role, 0) + owed.get(role, 0) for role in (*counted, *owed)}
        self._coming |= ways
        reads = self._reads(task, counted, ways)
        self._hold(task, counted, is_new=before is None or bool(owed))
        return reads

    def forget(self, task: str) -> None:
        """Count a task anew if it comes again; the next write takes it along."""
        self._counted = {id_: counted for id_, counted in self._counted.items() if id_ != task}

    def carry_over(self, task: Task) -> None:
        """Count what a task read that failed with the next one of its job."""
        counted = self._counted.get(task.task, {})
        if counted:
            self.forget(task.task)
            unpaid = {id_: read for id_, read in self._counted.items() if not id_.startswith(OWED)}
            self._counted = {**unpaid, OWED + task.job: counted}
            self._journal.remember_held(self._held, self._counted)

    def take(self, reads: DownloadPlan, on_taken: OnTaken) -> None:
        """Bring a task's files here; `on_taken` is called for each, perhaps at once."""
        for sha256 in reads.kept:
            self._cache.expect(sha256)
        for ref in reads.files:
            self._cache.take(ref, on_taken)

    def give(self, reads: DownloadPlan) -> None:
        """Say that a task needs its files no longer."""
        for sha256 in (*reads.kept, *(ref.sha256 for ref in reads.files)):
            self._cache.give(sha256)

    def _lacked(self, task: Task, known: Collection[str], ways: Collection[str]) -> dict[str, int]:
        """Bytes of a task's payloads, each once, that this client neither has nor is about to make."""
        counted: dict[str, int] = {}
        seen = set[str]()
        for role, ref in task.payloads.items():
            way = task.ways.get(ref.sha256)
            is_coming = ref.sha256 in self._coming and ref.sha256 in ways
            is_here = self._cache.is_shared or self._cache.has(ref.sha256) or is_coming
            if not (ref.sha256 in known and is_here) and ref.sha256 not in seen:
                is_short = way is not None and self._is_short(way, known)
                counted[role] = way.coded.size_bytes if way is not None and is_short else ref.size_bytes
            seen.add(ref.sha256)
        return counted

    def _is_open(self, way: EncodedDownload) -> bool:
        """Tell whether a payload can be made in this way here."""
        return way.origin is None or self._cache.is_here(way.origin)

    def _is_short(self, way: EncodedDownload, known: Collection[str]) -> bool:
        """Tell whether this client reads the coded file, or would where the cache is shared."""
        return way.origin is None or (way.origin in known and (self._cache.is_shared or self._is_open(way)))

    def _reads(self, task: Task, counted: Mapping[str, int], ways: Mapping[str, EncodedDownload]) -> DownloadPlan:
        """Name the files of a task, each once."""
        refs = {ref.sha256: ref for ref in task.payloads.values()}
        files = {ref.sha256: ref for ref in refs.values() if ref.sha256 not in ways}
        files |= {way.coded.sha256: way.coded for way in ways.values()}
        origins = {way.origin for way in ways.values() if way.origin is not None}
        recipes = tuple(
            DecodeStep(
                coded=self._cache.path(way.coded.sha256),
                origin=None if way.origin is None else self._cache.path(way.origin),
                target=self._cache.path(sha256),
                origin_sha256=way.origin,
                sha256=sha256,
                size_bytes=refs[sha256].size_bytes,
            )
            for sha256, way in ways.items()
        )
        return DownloadPlan(counted, tuple(files.values()), tuple({*ways, *origins}), recipes)

    def _hold(self, task: Task, counted: Mapping[str, int], *, is_new: bool) -> None:
        """Hold payloads under what they are for, and what they are made of; those of earlier jobs go."""
        before = self._held
        taken = {f"{task.job} {task.phase} {role}": ref.sha256 for role, ref in task.payloads.items()}
        for role, ref in task.payloads.items():
            way = task.ways.get(ref.sha256)
            if way is not None:
                taken[f"{task.job} {CODED} {role}"] = way.coded.sha256
            if way is not None and way.origin is not None and way.origin in before.values():
                taken[f"{task.job} {ORIGIN} {role}"] = way.origin
        self._held = {key: sha256 for key, sha256 in before.items() if key.startswith(f"{task.job} ")} | taken
        if self._held != before or (counted and is_new):
            self._counted = {**self._counted, task.task: dict(counted)} if counted else self._counted
            self._journal.remember_held(self._held, self._counted)
        for sha256 in set(before.values()) - set(self._held.values()):
            self._cache.evict(sha256)
