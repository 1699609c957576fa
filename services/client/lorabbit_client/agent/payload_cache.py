"""Payloads on a client's disk: the cache, and the accounting of downloaded bytes.

`PayloadCache` downloads a payload once, however many tasks wait for it, and keeps it for later tasks. A service client
evicts payloads that no later task can name. In an embedded run all clients share one cache, which keeps the most
recently used payloads.

`PayloadAccounting` plans the downloads of a task: whole payloads, or compressed files that decode to them. Each client
counts its own bytes, also in a shared cache. The list of held payloads and the counted bytes are written in one step,
so a client that is killed during a task counts its downloads once.
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
from lorabbit_client.agent.journal import CARRIED_OVER, Journal

OnAvailable: TypeAlias = Callable[[LoRAbbitError | None], None]


@dataclass(frozen=True, slots=True)
class _Download:
    """A download that has not finished."""

    reader: StreamReader
    callbacks: list[OnAvailable]


class PayloadCache:
    """See the module's docstring; for the loop thread."""

    def __init__(self, broker: Broker, store: PayloadStore, *, keep: int | None = None) -> None:
        """Share the cache and `keep` this many unused payloads; with None, clients call `evict`."""
        self._broker = broker
        self._store = store
        self._keep = keep
        self._downloads: dict[str, _Download] = {}
        self._reference_counts: Counter[str] = Counter()
        self._pending_evictions: set[str] = set()
        self._unused: OrderedDict[str, None] = OrderedDict()

    @property
    def is_shared(self) -> bool:
        """Whether several clients use it."""
        return self._keep is not None

    def has(self, sha256: str) -> bool:
        """Tell whether a payload is on the disk or being downloaded."""
        return sha256 in self._downloads or self._store.has(sha256)

    def is_complete(self, sha256: str) -> bool:
        """Tell whether a payload is completely on the disk."""
        return self._store.has(sha256)

    def path(self, sha256: str) -> Path:
        """Path of a payload's file."""
        return self._store.path(sha256)

    def acquire(self, ref: PayloadRef, on_available: OnAvailable) -> None:
        """Download a payload if it is missing, and keep it until `release`; `on_available` may be called at once."""
        sha256 = ref.sha256
        self._reference_counts[sha256] += 1
        self._pending_evictions.discard(sha256)
        download = self._downloads.get(sha256)
        if download is not None:
            download.callbacks.append(on_available)
        elif self._store.has(sha256):
            on_available(None)
        else:
            reader = StreamReader(self._broker, self._store, ref, partial(self._on_downloaded, sha256))
            self._downloads[sha256] = _Download(reader, [on_available])

    def redirect(self, ref: PayloadRef) -> None:
        """Continue an unfinished download from the stream that `ref` names, if it is another one."""
        download = self._downloads.get(ref.sha256)
        if download is not None and download.reader.stream != ref.stream:
            download.reader.cancel()
            reader = StreamReader(self._broker, self._store, ref, partial(self._on_downloaded, ref.sha256))
            self._downloads[ref.sha256] = _Download(reader, download.callbacks)

    def retain(self, sha256: str) -> None:
        """Keep a payload until `release` that is on the disk, or that a task will decode."""
        self._reference_counts[sha256] += 1
        self._pending_evictions.discard(sha256)

    def release(self, sha256: str) -> None:
        """Give up one task's reference to a payload; without references it can be evicted."""
        self._reference_counts[sha256] -= 1
        if self._reference_counts[sha256] > 0:
            return
        del self._reference_counts[sha256]
        unfinished = self._downloads.pop(sha256, None)
        if unfinished is not None:
            unfinished.reader.cancel()
        if sha256 in self._pending_evictions:
            self.evict(sha256)
        elif self._keep is not None:
            self._unused[sha256] = None
            self._unused.move_to_end(sha256)
            self._evict_unused(self._keep)

    def evict(self, sha256: str) -> None:
        """Delete a payload as soon as no task refers to it; no effect on a shared cache."""
        if self.is_shared:
            return
        if self._reference_counts[sha256] > 0:
            self._pending_evictions.add(sha256)
            return
        self._pending_evictions.discard(sha256)
        self._store.delete(sha256)

    def delete_leftovers(self, wanted: Iterable[str]) -> None:
        """Delete payloads of an earlier process that are not wanted; a shared cache starts empty."""
        if not self.is_shared:
            for sha256 in set(self._store.stored()) - set(wanted):
                self._store.delete(sha256)

    def _evict_unused(self, keep: int) -> None:
        """Delete the least recently used payloads."""
        for sha256 in list(self._unused):
            if len(self._unused) <= keep:
                return
            del self._unused[sha256]
            if self._reference_counts[sha256] == 0:
                self._store.delete(sha256)

    def _on_downloaded(self, sha256: str, error: LoRAbbitError | None) -> None:
        """Call back every task that waits for the payload."""
        for on_available in self._downloads.pop(sha256).callbacks:
            on_available(error)


CODED, ORIGIN = "coded", "origin"
"""Keys in place of a phase: a compressed file, and the payload that a delta refers to."""


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """Files that one task downloads, and how it decodes them."""

    bytes_by_role: Mapping[str, int]
    """Bytes to download, by role."""
    files: tuple[PayloadRef, ...]
    """Files to acquire from the cache, whole or compressed."""
    retained: tuple[str, ...]
    """Further payloads to release later: decoded ones, and those that deltas refer to."""
    decode_steps: tuple[DecodeStep, ...]
    """How the task decodes compressed payloads."""


class PayloadAccounting:
    """See the module's docstring; for the loop thread."""

    def __init__(self, journal: Journal, cache: PayloadCache) -> None:
        """Continue with the state in the journal."""
        self._journal, self._cache = journal, cache
        self._held = journal.held()
        self._bytes_by_task = journal.downloaded_by_task()
        self._being_decoded: dict[str, EncodedDownload] = {}
        """Payloads that a task will decode, by sha256."""

    def delete_leftovers(self) -> None:
        """Delete cached payloads of an earlier process that are not held."""
        self._cache.delete_leftovers(self._held.values())

    def plan_download(self, task: Task) -> DownloadPlan:
        """Plan a task's downloads, count missing bytes, and evict payloads that the task replaces.

        A task that was counted before keeps its number of bytes, unless `forget` was called.
        """
        known = set(self._held.values())
        self._being_decoded = {
            sha256: source for sha256, source in self._being_decoded.items() if not self._cache.is_complete(sha256)
        }
        encoded = {
            ref.sha256: task.ways[ref.sha256]
            for ref in task.payloads.values()
            if ref.sha256 in task.ways and not self._cache.has(ref.sha256) and self._can_decode(task.ways[ref.sha256])
        }
        before = self._bytes_by_task.get(task.task)
        bytes_by_role = self._missing_bytes(task, known, encoded) if before is None else before
        carried_over = self._bytes_by_task.pop(CARRIED_OVER + task.job, {})
        bytes_by_role = {
            role: bytes_by_role.get(role, 0) + carried_over.get(role, 0) for role in (*bytes_by_role, *carried_over)
        }
        self._being_decoded |= encoded
        plan = self._plan(task, bytes_by_role, encoded)
        self._record_held(task, bytes_by_role, is_new=before is None or bool(carried_over))
        return plan

    def forget(self, task: str) -> None:
        """Count a task again if it is redelivered; the next write stores that."""
        self._bytes_by_task = {id_: bytes_by_role for id_, bytes_by_role in self._bytes_by_task.items() if id_ != task}

    def carry_over(self, task: Task) -> None:
        """Add the bytes of a failed task to the next task of its job."""
        bytes_by_role = self._bytes_by_task.get(task.task, {})
        if bytes_by_role:
            self.forget(task.task)
            others = {id_: read for id_, read in self._bytes_by_task.items() if not id_.startswith(CARRIED_OVER)}
            self._bytes_by_task = {**others, CARRIED_OVER + task.job: bytes_by_role}
            self._journal.save_held(self._held, self._bytes_by_task)

    def acquire(self, plan: DownloadPlan, on_available: OnAvailable) -> None:
        """Acquire a task's files; `on_available` is called for each of them, possibly at once."""
        for sha256 in plan.retained:
            self._cache.retain(sha256)
        for ref in plan.files:
            self._cache.acquire(ref, on_available)

    def release(self, plan: DownloadPlan) -> None:
        """Release a task's files."""
        for sha256 in (*plan.retained, *(ref.sha256 for ref in plan.files)):
            self._cache.release(sha256)

    def _missing_bytes(self, task: Task, known: Collection[str], encoded: Collection[str]) -> dict[str, int]:
        """Bytes of a task's payloads, each once, that this client neither holds nor is decoding."""
        bytes_by_role: dict[str, int] = {}
        seen = set[str]()
        for role, ref in task.payloads.items():
            source = task.ways.get(ref.sha256)
            is_being_decoded = ref.sha256 in self._being_decoded and ref.sha256 in encoded
            is_available = self._cache.is_shared or self._cache.has(ref.sha256) or is_being_decoded
            if not (ref.sha256 in known and is_available) and ref.sha256 not in seen:
                is_encoded = source is not None and self._downloads_encoded(source, known)
                bytes_by_role[role] = source.coded.size_bytes if source is not None and is_encoded else ref.size_bytes
            seen.add(ref.sha256)
        return bytes_by_role

    def _can_decode(self, source: EncodedDownload) -> bool:
        """Tell whether this client can decode the file."""
        return source.origin is None or self._cache.is_complete(source.origin)

    def _downloads_encoded(self, source: EncodedDownload, known: Collection[str]) -> bool:
        """Tell whether this client downloads the compressed file, or would with a cache of its own."""
        return source.origin is None or (source.origin in known and (self._cache.is_shared or self._can_decode(source)))

    def _plan(
        self, task: Task, bytes_by_role: Mapping[str, int], encoded: Mapping[str, EncodedDownload]
    ) -> DownloadPlan:
        """List the files of a task, each once."""
        refs = {ref.sha256: ref for ref in task.payloads.values()}
        files = {ref.sha256: ref for ref in refs.values() if ref.sha256 not in encoded}
        files |= {source.coded.sha256: source.coded for source in encoded.values()}
        origins = {source.origin for source in encoded.values() if source.origin is not None}
        decode_steps = tuple(
            DecodeStep(
                coded=self._cache.path(source.coded.sha256),
                origin=None if source.origin is None else self._cache.path(source.origin),
                target=self._cache.path(sha256),
                origin_sha256=source.origin,
                sha256=sha256,
                size_bytes=refs[sha256].size_bytes,
            )
            for sha256, source in encoded.items()
        )
        return DownloadPlan(bytes_by_role, tuple(files.values()), tuple({*encoded, *origins}), decode_steps)

    def _record_held(self, task: Task, bytes_by_role: Mapping[str, int], *, is_new: bool) -> None:
        """Record the payloads that this task holds, and evict those of earlier jobs."""
        before = self._held
        taken = {f"{task.job} {task.phase} {role}": ref.sha256 for role, ref in task.payloads.items()}
        for role, ref in task.payloads.items():
            source = task.ways.get(ref.sha256)
            if source is not None:
                taken[f"{task.job} {CODED} {role}"] = source.coded.sha256
            if source is not None and source.origin is not None and source.origin in before.values():
                taken[f"{task.job} {ORIGIN} {role}"] = source.origin
        self._held = {key: sha256 for key, sha256 in before.items() if key.startswith(f"{task.job} ")} | taken
        if self._held != before or (bytes_by_role and is_new):
            self._bytes_by_task = (
                {**self._bytes_by_task, task.task: dict(bytes_by_role)} if bytes_by_role else self._bytes_by_task
            )
            self._journal.save_held(self._held, self._bytes_by_task)
        for sha256 in set(before.values()) - set(self._held.values()):
            self._cache.evict(sha256)
