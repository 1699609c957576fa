"""Uploads: from an accepted offer to a validated payload.

A payload is known by its content, so two tasks that bring the same bytes share one upload, and
bytes that are here already move no second time. Chunks are acknowledged once written; one that is
damaged is dropped, and asked for again as soon as its client has sent the others. The whole is checked
beside the loop before anybody believes it; one that has another hash than was announced is asked for
once more. An upload on which nothing arrives for a while is granted again: the broker, or an earlier
disk of this server, may have lost a chunk, and a grant itself needs no outbox for the same reason.
Nothing can arrive while the broker is away; a second grant that it did not get by then is out of date.
While other chunks arrive its own may be behind them in the queue, so it is given longer. A server that
takes over first takes what the broker holds for its predecessor, and then asks for the rest. Of many
uploads a window of them is granted at a time. A task has one: what it offered before, or was too late with, is awaited
no longer.

`ChunkRetransmits`: chunks of an upload that were refused, asked for again as soon as their client has sent the others.

A client at work takes no second grant, so the asking waits for its commit; chunks and commits come through
two queues, either first. A commit is answered once, and one chunk is asked for a few times this way: whoever
sends damaged chunks for ever gets no more answers than that, and is asked again when the upload has stalled.

`UploadWindow`: how many payloads may be uploaded at one time.

Without it a thousand clients would send at once, and what the server has not read yet would fill the
broker's memory until it blocks everybody. Payloads enter in the order of their offers. One that is
slow no longer counts after a while, so that clients behind thin lines do not wait for each other.
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
"""So often is one chunk asked for at once."""


class ChunkRetransmits:
    """See the module's docstring; of one upload, by the tasks that bring it."""

    def __init__(self) -> None:
        """Know of no refusal."""
        self._refused: dict[str, set[int]] = {}
        self._sent: set[str] = set()
        """Tasks whose clients have sent everything that they were asked for."""
        self._attempts: Counter[int] = Counter()

    def refused(self, task: str, index: int) -> None:
        """Note a chunk that arrived for a task and was none."""
        self._refused.setdefault(task, set()).add(index)

    def sent(self, task: str) -> None:
        """Note that a task's client has sent everything that it was asked for."""
        self._sent.add(task)

    def granted(self, task: str) -> None:
        """Note that a client was asked for everything that is missing; one that was still sending does not hear it."""
        if task in self._sent:
            self._sent.discard(task)
            self._refused.pop(task, None)

    def take(self, task: str, missing: Collection[int]) -> list[int]:
        """Return which refused chunks to ask a task's client for now, in order; none while it may still be sending."""
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
"""So many payloads are let in, however large."""
SLOW_MS = 5_000


class UploadWindow:
    """See the module's docstring; payloads by name, sizes in bytes."""

    def __init__(self) -> None:
        """Start empty."""
        self._active: dict[str, tuple[int, int]] = {}
        """Size, and when it came in."""
        self._bytes = 0
        self._queued: dict[str, int] = {}

    def enter(self, name: str, size: int, now_ms: int) -> bool:
        """Let a payload in, or have it wait behind those that wait; one that is inside stays there."""
        if name in self._active:
            return True
        if self._queued or not self._has_room(size):
            self._queued.setdefault(name, size)
            return False
        self._admit(name, size, now_ms)
        return True

    def leave(self, name: str) -> None:
        """Forget a payload that is here, or that nobody wants any more."""
        self._queued.pop(name, None)
        active = self._active.pop(name, None)
        if active is not None:
            self._bytes -= active[0]

    def advance(self, now_ms: int) -> list[str]:
        """Take out what is slow, and let in what there is room for then; returns the names of the latter."""
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
"""An upload on which nothing moved for so long is granted again."""
STALLED_BEHIND_OTHERS_MS = 30_000
"""So long where chunks of other uploads arrived meanwhile."""
INHERITED_MS = 1_000
"""So long must nothing have moved on an upload that an earlier server granted."""
OnChecked = Callable[[TaskState, CompressionSpec | Exception], None]


@dataclass(slots=True)
class Upload:
    """One payload on its way, or being validated once no chunk is missing."""

    ref: PayloadRef
    missing: set[int]
    progress_ms: int
    granted: bool = False
    is_in_flight: bool = False
    """Whether chunks may come that were asked for some time ago."""
    waiting: dict[str, tuple[TaskState, ExpectedUpdate]] = field(default_factory=dict)
    retransmits: ChunkRetransmits = field(default_factory=ChunkRetransmits)

    def is_offered_by(self, task: TaskState | None) -> bool:
        """Tell whether a task still offers it, or was sent again and may do so once more."""
        if task is None or task.offered is None:
            return task is not None
        return task.offered.payload is not None and task.offered.payload.sha256 == self.ref.sha256

    def is_awaited_from(self, client: ClientId | None, task: str) -> bool:
        """Tell whether a client is to bring it for a task."""
        return task in self.waiting and self.waiting[task][0].client == client


class Uploads:
    """See the module's docstring; for the loop thread."""

    def __init__(self, context: ServerContext, job: str, meter: TrafficMeter, on_checked: OnChecked) -> None:
        """Report how each task's payload is coded, or why it is refused, to `on_checked`."""
        self._context, self._job, self._meter, self._on_checked = context, job, meter, on_checked
        self._open: dict[str, Upload] = {}
        self._window = UploadWindow()
        self._inherited_until_ms = 0
        self._last_chunk_ms = 0
        """When the last chunk came, of whatever upload."""
        self._repeated: set[str] = set()
        """Tasks whose payload was asked for a second time."""

    def inherit(self) -> None:
        """Expect that chunks are on their way which an earlier server asked for."""
        self._inherited_until_ms = self._context.now_ms() + INHERITED_MS

    def expect(self, task: TaskState, expected: ExpectedUpdate) -> None:
        """Await the payload that a task's client offered, and grant what is missing of it, now or in its turn."""
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
        """Tell whether a payload that has another hash than was announced may come once more, and count it."""
        if not isinstance(error, CorruptPayload) or task.id in self._repeated:
            return False
        log.warning("payload-rejected", task=task.id, why=str(error))
        self._context.refused["corrupt"] += 1
        self._repeated.add(task.id)
        return True

    def retain(self, tasks: Mapping[str, TaskState]) -> frozenset[str]:
        """Await nothing any more that no task offers as it stands; returns the hashes that nobody is to bring now."""
        dropped = []
        for sha256, upload in list(self._open.items()):
            upload.waiting = {id_: who for id_, who in upload.waiting.items() if upload.is_offered_by(tasks.get(id_))}
            if not upload.waiting:
                self._close(upload)
                dropped.append(sha256)
        return frozenset(dropped)

    def _close(self, upload: Upload) -> None:
        """Forget an upload that is complete, or that nobody is to bring."""
        del self._open[upload.ref.sha256]
        self._window.leave(upload.ref.sha256)

    def regrant_stalled(self, absent: frozenset[str]) -> None:
        """Grant what has its turn, and again what has stalled, to the clients that are not absent."""
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
        """Take no upload for stalled for a while."""
        for upload in self._open.values():
            upload.progress_ms = self._context.now_ms()

    def _received_within(self, within_ms: int) -> bool:
        """Tell whether a chunk arrived a moment ago."""
        return self._context.now_ms() - self._last_chunk_ms < within_ms

    def _advance(self) -> None:
        """Grant the uploads that the window has room for by now."""
        for sha256 in self._window.advance(self._context.now_ms()):
            self._grant_to_all(self._open[sha256], frozenset())

    def _grant_to_all(self, upload: Upload, absent: frozenset[str]) -> None:
        upload.progress_ms, upload.is_in_flight = self._context.now_ms(), False
        for task, _ in upload.waiting.values():
            if task.client not in absent:
                self._grant(task, upload)

    def on_chunk(self, delivery: Delivery) -> None:
        """Write a chunk; one that is here already, or that nobody asked for, is dropped."""
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
        """Hear that a client has sent every chunk that it was asked for."""
        upload = self._open.get(sha256)
        if upload is not None and upload.is_awaited_from(client, task):
            upload.retransmits.sent(task)
            self._request_retransmits(upload, task)

    def _refuse(self, upload: Upload, sender: ClientId | None, delivery: Delivery, why: CorruptPayload) -> None:
        """Drop a chunk that is none, and ask its client for it again."""
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
        """Ask for the chunks of a task that were refused, once its client has sent everything else."""
        wanted = upload.retransmits.take(task, upload.missing)
        if wanted:
            upload.progress_ms = self._context.now_ms()
            self._send_grant(upload.waiting[task][0], upload, wanted)

    def _write(self, upload: Upload, delivery: Delivery) -> int:
        """Write a chunk if it is missing; returns its index. Raises CorruptPayload for one that is none."""
        index = index_of(delivery)
        if is_damaged(delivery):
            raise CorruptPayload(f"chunk {index} of payload {upload.ref.sha256[:12]} arrived damaged")
        if index in upload.missing:
            self._context.payloads.write_chunk(upload.ref, index, delivery.body)
        return index

    def _grant(self, task: TaskState, upload: Upload) -> None:
        """Ask a client for all chunks that are missing; some may be on their way where it was asked before."""
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
        """Hear whether the broker took a grant."""
        if isinstance(error, BrokerUnavailable):
            self._reset_timers()
        elif error is not None:
            log.warning("grant-not-sent", why=str(error))

    def _check(self, upload: Upload, task: TaskState, expected: ExpectedUpdate) -> None:
        """Validate a complete payload on the worker thread, for one task that offers it."""

        def done(found: CompressionSpec | Exception) -> None:
            if self._open.get(upload.ref.sha256) is upload:
                self._close(upload)  # who offers it now finds it on the disk, or brings it once more
            failpoints.hit(failpoints.Failpoint.UPLOAD_CHECKED)
            self._on_checked(task, found)

        work = partial(check_payload, self._context.payloads, upload.ref, expected)
        self._context.loop.work(work, done, done)


def refusal(error: Exception) -> Refused | None:
    """The refusal that a failed check means; None when it was this server's own failure."""
    if isinstance(error, Refused):
        return error
    return Refused("corrupt", str(error)) if isinstance(error, LoRAbbitError) else None
