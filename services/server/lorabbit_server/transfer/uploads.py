"""Uploads: from an accepted offer to a validated payload.

Payloads are identified by their sha256. Two tasks with the same bytes share one upload, and bytes that are already on
the disk are not sent again. Chunks are acknowledged after they are written. A complete payload is validated on the
worker thread; one with another hash than announced is requested once more.

An upload without progress is granted again, because the broker or the disk of an earlier server may have lost a
chunk. Grants need no outbox for the same reason. Stall timers are reset while the broker is unavailable, and are
longer while chunks of other uploads arrive, since those may be ahead in the queue. A new leader first waits for the
chunks that its predecessor requested. A task has one upload: a new offer replaces the previous one.

`ChunkRetransmits`: a damaged chunk is requested again when its client has sent all others, since a client ignores a
grant while it sends. Chunks and commits arrive through two queues in any order. Each chunk is requested at most
`MAX_RETRANSMITS` times this way; after that only when the upload has stalled.

`UploadWindow`: limits concurrent uploads. Otherwise a thousand clients would send at once and fill the broker's
memory until it blocks all publishers. Payloads are admitted in the order of their offers. A slow one stops counting
after `SLOW_MS`, so that clients with slow connections do not block others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import structlog

from lorabbit.broker import topology
from lorabbit.broker.base import Delivery, Outgoing
from lorabbit.errors import BrokerUnavailable, CorruptPayload, LoRAbbitError, Refused
from lorabbit.job.spec import CompressionSpec
from lorabbit.protocol import codec
from lorabbit.protocol.messages import Grant, PayloadRef
from lorabbit.runtime import failpoints
from lorabbit.transfer.chunking import index_of, is_damaged
from lorabbit.types import ClientId
from lorabbit_server.aggregation.update_validation import ExpectedUpdate, check_payload
from lorabbit_server.context import ServerContext
from lorabbit_server.engine.state import TaskState
from lorabbit_server.transfer.traffic_meter import TrafficMeter

MAX_RETRANSMITS = 3
"""How often one chunk is requested again without waiting for a stall."""


class ChunkRetransmits:
    """Rejected chunks of one upload, by task; see the module's docstring."""

    def __init__(self) -> None:
        """Start empty."""
        self._refused: dict[str, set[int]] = {}
        self._sent: set[str] = set()
        """Tasks whose clients have sent all requested chunks."""
        self._attempts: Counter[int] = Counter()

    def refused(self, task: str, index: int) -> None:
        """Record a rejected chunk of a task."""
        self._refused.setdefault(task, set()).add(index)

    def sent(self, task: str) -> None:
        """Record that a task's client has sent all requested chunks."""
        self._sent.add(task)

    def granted(self, task: str) -> None:
        """Record a grant of all missing chunks; a client that is still sending ignores it."""
        if task in self._sent:
            self._sent.discard(task)
            self._refused.pop(task, None)

    def take(self, task: str, missing: Collection[int]) -> list[int]:
        """Return the rejected chunks to request now, in order; none while the client may still be sending."""
        if task not in self._sent:
            return []
        refused = self._refused.pop(task, set())
        wanted = [index for index in sorted(refused.intersection(missing)) if self._attempts[index] < MAX_RETRANSMITS]
        if wanted:
            self._sent.discard(task)
            self._attempts.update(wanted)
        return wanted


WINDOW_BYTES = 64 * 2**20
MIN_UPLOADS = 8
"""This many payloads are admitted, whatever their size."""
SLOW_MS = 5_000


class UploadWindow:
    """Limits concurrent uploads; payloads by name, sizes in bytes. See the module's docstring."""

    def __init__(self) -> None:
        """Start empty."""
        self._active: dict[str, tuple[int, int]] = {}
        """Size, and time of admission."""
        self._bytes = 0
        self._queued: dict[str, int] = {}

    def enter(self, name: str, size: int, now_ms: int) -> bool:
        """Admit a payload or queue it; an active one stays active."""
        if name in self._active:
            return True
        if self._queued or not self._has_room(size):
            self._queued.setdefault(name, size)
            return False
        self._admit(name, size, now_ms)
        return True

    def leave(self, name: str) -> None:
        """Remove a payload that is complete or no longer wanted."""
        self._queued.pop(name, None)
        active = self._active.pop(name, None)
        if active is not None:
            self._bytes -= active[0]

    def advance(self, now_ms: int) -> list[str]:
        """Remove slow payloads and admit queued ones; returns the names of the admitted."""
        for name, (_, since_ms) in list(self._active.items()):
            if now_ms - since_ms < SLOW_MS:
                break
            self.leave(name)
        entered = []
        for name, size in list(self._queued.items()):
            if not self._has_room(size):
                break
            del self._queued[name]
            self._admit(name, size, now_ms)
            entered.append(name)
        return entered

    def _has_room(self, size: int) -> bool:
        return len(self._active) < MIN_UPLOADS or self._bytes + size <= WINDOW_BYTES

    def _admit(self, name: str, size: int, now_ms: int) -> None:
        self._active[name] = (size, now_ms)
        self._bytes += size


log = structlog.get_logger()
STALLED_MS = 5_000
"""An upload without progress for this long is granted again."""
STALLED_BEHIND_OTHERS_MS = 30_000
"""The same while chunks of other uploads arrive."""
INHERITED_MS = 1_000
"""The same for an upload that an earlier server granted."""
OnChecked = Callable[[TaskState, CompressionSpec | Exception], None]


@dataclass(slots=True)
class Upload:
    """One payload on its way, or being validated once no chunk is missing."""

    ref: PayloadRef
    missing: set[int]
    progress_ms: int
    granted: bool = False
    is_in_flight: bool = False
    """Whether chunks of an earlier grant may still arrive."""
    waiting: dict[str, tuple[TaskState, ExpectedUpdate]] = field(default_factory=dict)
    retransmits: ChunkRetransmits = field(default_factory=ChunkRetransmits)

    def is_offered_by(self, task: TaskState | None) -> bool:
        """Whether a task offers it, or was sent again and may offer it."""
        if task is None or task.offered is None:
            return task is not None
        return task.offered.payload is not None and task.offered.payload.sha256 == self.ref.sha256

    def is_awaited_from(self, client: ClientId | None, task: str) -> bool:
        """Whether it is expected from a client for a task."""
        return task in self.waiting and self.waiting[task][0].client == client


class Uploads:
    """See the module's docstring; for the loop thread."""

    def __init__(self, context: ServerContext, job: str, meter: TrafficMeter, on_checked: OnChecked) -> None:
        """Report the compression of each valid payload, or the error, to `on_checked`."""
        self._context, self._job, self._meter, self._on_checked = context, job, meter, on_checked
        self._open: dict[str, Upload] = {}
        self._window = UploadWindow()
        self._inherited_until_ms = 0
        self._last_chunk_ms = 0
        """When the last chunk of any upload arrived."""
        self._repeated: set[str] = set()
        """Tasks whose payload was requested a second time."""

    def inherit(self) -> None:
        """Wait for chunks that an earlier server requested before requesting them again."""
        self._inherited_until_ms = self._context.now_ms() + INHERITED_MS

    def expect(self, task: TaskState, expected: ExpectedUpdate) -> None:
        """Open the upload of an offered payload; grant the missing chunks when the window admits it."""
        if task.offered is None or task.offered.payload is None:
            return
        ref = task.offered.payload
        upload = self._open.get(ref.sha256)
        if upload is None:
            missing = set(self._context.payloads.missing(ref))
            upload = self._open[ref.sha256] = Upload(ref, missing, self._context.now_ms())
        upload.waiting[task.id] = (task, expected)
        upload.progress_ms = self._context.now_ms()
        if not upload.missing:
            self._check(upload, task, expected)
        elif upload.progress_ms < self._inherited_until_ms or (upload.granted and self._received_within(INHERITED_MS)):
            upload.is_in_flight = True
        elif self._window.enter(ref.sha256, ref.size_bytes, upload.progress_ms):
            self._grant(task, upload)

    def allows_repeat(self, task: TaskState, error: Exception) -> bool:
        """Whether a payload with a wrong hash may be uploaded once more; counts the rejection."""
        if not isinstance(error, CorruptPayload) or task.id in self._repeated:
            return False
        log.warning("payload-rejected", task=task.id, why=str(error))
        self._context.refused["corrupt"] += 1
        self._repeated.add(task.id)
        return True

    def retain(self, tasks: Mapping[str, TaskState]) -> frozenset[str]:
        """Close the uploads that no task offers any more; returns their hashes."""
        dropped = []
        for sha256, upload in list(self._open.items()):
            upload.waiting = {id_: who for id_, who in upload.waiting.items() if upload.is_offered_by(tasks.get(id_))}
            if not upload.waiting:
                self._close(upload)
                dropped.append(sha256)
        return frozenset(dropped)

    def _close(self, upload: Upload) -> None:
        """Remove an upload that is complete or no longer expected."""
        del self._open[upload.ref.sha256]
        self._window.leave(upload.ref.sha256)

    def regrant_stalled(self, absent: frozenset[str]) -> None:
        """Grant queued uploads that the window admits, and stalled ones again, except to absent clients."""
        if self._context.broker.health() is not None:
            self._reset_timers()
            return
        self._advance()
        now = self._context.now_ms()
        for upload in self._open.values():
            own_ms = INHERITED_MS if upload.is_in_flight else STALLED_MS
            patience_ms = STALLED_BEHIND_OTHERS_MS if self._received_within(own_ms) else own_ms
            stalled = upload.missing and now - upload.progress_ms >= patience_ms
            if stalled and (upload.granted or self._window.enter(upload.ref.sha256, upload.ref.size_bytes, now)):
                self._grant_to_all(upload, absent)

    def _reset_timers(self) -> None:
        """Restart the stall timers of all uploads."""
        for upload in self._open.values():
            upload.progress_ms = self._context.now_ms()

    def _received_within(self, within_ms: int) -> bool:
        """Whether any chunk arrived within this time."""
        return self._context.now_ms() - self._last_chunk_ms < within_ms

    def _advance(self) -> None:
        """Grant queued uploads that the window admits."""
        for sha256 in self._window.advance(self._context.now_ms()):
            self._grant_to_all(self._open[sha256], frozenset())

    def _grant_to_all(self, upload: Upload, absent: frozenset[str]) -> None:
        upload.progress_ms, upload.is_in_flight = self._context.now_ms(), False
        for task, _ in upload.waiting.values():
            if task.client not in absent:
                self._grant(task, upload)

    def on_chunk(self, delivery: Delivery) -> None:
        """Write a chunk; duplicates and chunks that were not requested are dropped."""
        headers = delivery.headers
        self._last_chunk_ms = self._context.now_ms()
        task = str(headers.get("task", ""))
        self._meter.received(task, delivery, is_chunk=True)
        upload = self._open.get(str(headers.get("sha256", "")))
        sender = self._context.registry.at(topology.address_of(delivery.routing_key))
        if upload is not None and any(each.client == sender for each, _ in upload.waiting.values()):
            try:
                index = self._write(upload, delivery)
            except CorruptPayload as error:
                self._refuse(upload, sender, delivery, error)
                return
            upload.progress_ms = self._context.now_ms()
            failpoints.hit(failpoints.Failpoint.CHUNK_WRITTEN)
            last = upload.missing == {index}
            upload.missing.discard(index)
            if last:
                for each, expected in list(upload.waiting.values()):
                    self._check(upload, each, expected)
                self._window.leave(upload.ref.sha256)
                self._advance()
        self._context.broker.ack(delivery)

    def on_commit(self, task: str, client: ClientId, sha256: str) -> None:
        """Request rejected chunks again, now that the client has sent all others."""
        upload = self._open.get(sha256)
        if upload is not None and upload.is_awaited_from(client, task):
            upload.retransmits.sent(task)
            self._request_retransmits(upload, task)

    def _refuse(self, upload: Upload, sender: ClientId | None, delivery: Delivery, why: CorruptPayload) -> None:
        """Reject a damaged chunk and request it again."""
        task = str(delivery.headers.get("task", ""))
        log.warning("chunk-rejected", task=task, why=str(why))
        self._context.refused["chunk"] += 1
        self._context.broker.reject(delivery)
        if not upload.is_awaited_from(sender, task):
            return
        with suppress(CorruptPayload):
            index = index_of(delivery)
            if index in upload.missing:
                upload.retransmits.refused(task, index)
                self._request_retransmits(upload, task)

    def _request_retransmits(self, upload: Upload, task: str) -> None:
        """Request the rejected chunks of a task, once its client has sent all others."""
        wanted = upload.retransmits.take(task, upload.missing)
        if wanted:
            upload.progress_ms = self._context.now_ms()
            self._send_grant(upload.waiting[task][0], upload, wanted)

    def _write(self, upload: Upload, delivery: Delivery) -> int:
        """Write a chunk if it is missing; returns its index. Raises CorruptPayload for a damaged one."""
        index = index_of(delivery)
        if is_damaged(delivery):
            raise CorruptPayload(f"chunk {index} of payload {upload.ref.sha256[:12]} arrived damaged")
        if index in upload.missing:
            self._context.payloads.write_chunk(upload.ref, index, delivery.body)
        return index

    def _grant(self, task: TaskState, upload: Upload) -> None:
        """Grant all missing chunks; after an earlier grant some of them may be in flight."""
        again, upload.granted = upload.granted, True
        upload.retransmits.granted(task.id)
        self._send_grant(task, upload, sorted(upload.missing), drop_on_reconnect=again)

    def _send_grant(
        self, task: TaskState, upload: Upload, missing: Sequence[int], *, drop_on_reconnect: bool = False
    ) -> None:
        entry = self._context.registry.get(task.client)
        if entry is None:
            return
        sha256, chunks = upload.ref.sha256, tuple(missing)
        grant = Grant(job=self._job, task=task.id, client=task.client, sha256=sha256, missing=chunks)
        body = codec.encode(grant)
        self._meter.down(task.id, len(body))
        message = Outgoing(
            topology.CONTROL,
            topology.control_key(entry.address),
            grant.type_name(),
            body,
            {"epoch": self._context.epoch},
            f"{task.id}.grant",
            drop_on_reconnect=drop_on_reconnect,
        )
        self._context.broker.send_with_retry(message, self._on_grant_sent)

    def _on_grant_sent(self, error: LoRAbbitError | None) -> None:
        """Handle the broker's confirmation of a grant."""
        if isinstance(error, BrokerUnavailable):
            self._reset_timers()
        elif error is not None:
            log.warning("grant-not-sent", why=str(error))

    def _check(self, upload: Upload, task: TaskState, expected: ExpectedUpdate) -> None:
        """Validate a complete payload on the worker thread, for one task that offers it."""

        def done(found: CompressionSpec | Exception) -> None:
            if self._open.get(upload.ref.sha256) is upload:
                self._close(upload)  # a later offer finds the file on the disk, or uploads it again
            failpoints.hit(failpoints.Failpoint.UPLOAD_CHECKED)
            self._on_checked(task, found)

        work = partial(check_payload, self._context.payloads, upload.ref, expected)
        self._context.loop.work(work, done, done)


def refusal(error: Exception) -> Refused | None:
    """The reason to refuse a payload after a failed validation; None for an error of this server."""
    if isinstance(error, Refused):
        return error
    return Refused("corrupt", str(error)) if isinstance(error, LoRAbbitError) else None
