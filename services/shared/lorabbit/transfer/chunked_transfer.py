"""Transfer: payloads as chunks, down over a stream per payload and up through the data queue.

Down, the server publishes a payload once and every client of the cohort reads it from the start,
whenever it comes. Up, a client sends the chunks that it was granted. Both send a few chunks ahead
of the broker's confirmations and never more, so memory is a few chunks whatever the payload; a full
queue makes the sender wait, with full jitter. Whoever receives checks each chunk against its checksum
and the whole against its hash. A link that breaks, or a damaged chunk, makes a reader go on from the
first chunk that is not here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import structlog

from lorabbit.broker import topology
from lorabbit.broker.base import Broker, Cancellable, Delivery, OnDone
from lorabbit.errors import BrokerUnavailable, CorruptPayload, LoRAbbitError
from lorabbit.protocol.messages import PayloadRef
from lorabbit.runtime import failpoints
from lorabbit.transfer.chunking import WINDOW, ChunkedPayload, ChunkOutbox, index_of, is_damaged
from lorabbit.transfer.payload_store import PayloadStore

PATIENCE_SECONDS = 300.0
MAX_DAMAGES = 3
"""So often may one chunk arrive damaged; then it is damaged in its stream."""

log = structlog.get_logger()


class DamagedStream(CorruptPayload):
    """A payload's stream holds something else than was announced, or less."""

    def __init__(self, ref: PayloadRef, why: str) -> None:
        """Name the payload, and the stream with it."""
        super().__init__(why)
        self.ref = ref


class ChunkSender(Cancellable):
    """Sends chunks of a payload to the server, in order, a few ahead of their confirmations.

    `about` names job, task and client in each chunk's headers. `on_done(None)` is called once, when the broker has
    confirmed every chunk; `on_done(error)` when the file cannot be read or nobody takes chunks.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - who, what, from where, which, then what
        self,
        broker: Broker,
        address: str,
        ref: PayloadRef,
        path: Path,
        missing: Iterable[int],
        on_done: OnDone,
        *,
        about: Mapping[str, str] | None = None,
    ) -> None:
        """Start sending at once."""
        self._chunks = ChunkedPayload(ref, path, (topology.UP, topology.data_key(address)), about or {})
        on_chunk = partial(failpoints.hit, failpoints.Failpoint.UPLOAD_CHUNK_CONFIRMED)
        self._outbound = ChunkOutbox(broker, self._chunks, missing, on_done, on_chunk=on_chunk)

    @property
    def sent_bytes(self) -> int:
        """Payload bytes handed to the broker so far, repetitions included."""
        return self._chunks.read_bytes

    def cancel(self) -> None:
        """Send no further chunk; `on_done` is not called."""
        self._outbound.cancel()


class StreamReader(Cancellable):
    """Reads one published payload into a store.

    `on_done(None)` is called once, when the payload is in the store, checked. `on_done(DamagedStream)` when what
    arrived is not what was announced, or one chunk arrived damaged `MAX_DAMAGES` times: the stream holds something
    else; and when no missing chunk arrives for `patience_seconds`: it is gone or was cut, or its server is away.
    `on_done(BrokerUnavailable)` when none arrives for so long and the broker cannot be reached.
    """

    def __init__(
        self,
        broker: Broker,
        store: PayloadStore,
        ref: PayloadRef,
        on_done: OnDone,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """Start reading; a payload that the store holds already is done without reading."""
        self.received_bytes = 0
        """Payload bytes that came over the wire, repetitions included."""
        self._broker, self._store, self._ref = broker, store, ref
        self.stream = ref.stream
        self._on_done: OnDone | None = on_done
        self._patience_seconds = patience_seconds
        self._moved = False
        """Whether a chunk came since the last look that was missing; those that are here already bring nothing."""
        self._missing = set(store.missing(ref))
        self._lowest = 0
        """The first chunk that is missing; for any thread."""
        self._in_order = True
        """Whether chunk n may be looked for from the stream's message n on; for any thread."""
        self._damages: Counter[int] = Counter()
        self._reading: Cancellable | None = None
        self._watch: Cancellable | None = None
        if not self._missing:
            broker.post(self._finish)
            return
        self._note_lowest()
        self._read()
        self._watch = broker.after(patience_seconds, self._check_progress)

    def cancel(self) -> None:
        """Stop reading; what arrived stays in the store, and `on_done` is not called."""
        self._end()

    def _read(self) -> None:
        """Read from the first chunk that is missing on, instead of what is being read."""
        if self._reading is not None:
            self._reading.cancel()
        stream = topology.adapter_stream(self._ref.sha256, self._ref.stream).name
        self._reading = self._broker.read_stream(stream, self._receive, prefetch=WINDOW, first=self._first)

    def _first(self) -> int:
        """Where to begin: a stream is begun empty and filled in order, so no chunk stands before its index."""
        return self._lowest if self._in_order else 0

    def _read_everything(self) -> None:
        """Read from the stream's beginning: what is missing stands somewhere else than it should."""
        self._in_order = False
        self._read()

    def _note_lowest(self) -> None:
        while self._lowest < self._ref.chunks and self._lowest not in self._missing:
            self._lowest += 1

    def _receive(self, delivery: Delivery) -> None:
        if self._on_done is None:
            return
        self._broker.ack(delivery)
        self.received_bytes += len(delivery.body)
        try:
            index = index_of(delivery)
            if is_damaged(delivery):
                self._refuse(index)
                return
            self._store.write_chunk(self._ref, index, delivery.body)
            failpoints.hit(failpoints.Failpoint.PAYLOAD_CHUNK_READ)
        except CorruptPayload as error:
            self._end(DamagedStream(self._ref, str(error)))
            return
        self._moved = self._moved or index in self._missing
        self._missing.discard(index)
        is_early = index > self._lowest
        self._note_lowest()
        if not self._missing:
            self._finish()
        elif is_early and self._in_order:
            self._read_everything()

    def _refuse(self, index: int) -> None:
        """Read a chunk again that is not as it was sent, a bounded number of times; one that is here is dropped."""
        if index not in self._missing:
            return
        self._damages[index] += 1
        times = self._damages[index]
        why = f"chunk {index} of payload {self._ref.sha256[:12]} arrived damaged"
        log.warning("chunk-rejected", why=why, times=times)
        if times == MAX_DAMAGES:
            self._end(DamagedStream(self._ref, f"{why} {times} times"))
        else:
            self._read()

    def _finish(self) -> None:
        if self._on_done is None:
            return
        try:
            self._store.finish(self._ref)
        except CorruptPayload as error:
            self._end(DamagedStream(self._ref, str(error)))
        else:
            self._end(None)

    def _check_progress(self) -> None:
        """End a read on which nothing arrives; no wait is without an end."""
        trouble = self._broker.health()
        is_elsewhere = not self._moved and trouble is None and self._first() > 0
        if is_elsewhere:
            self._read_everything()
        if self._moved or is_elsewhere:
            self._moved = False
            self._watch = self._broker.after(self._patience_seconds, self._check_progress)
            return
        waited = f"no chunk of payload {self._ref.sha256[:12]} arrived for {self._patience_seconds:.0f} s"
        if trouble is not None:
            self._end(BrokerUnavailable(f"{waited}: {trouble}"))
            return
        lacking = f"{len(self._missing)} chunks that the server announced are not there"
        self._end(DamagedStream(self._ref, f"{waited}: {lacking}"))

    def _end(self, *result: LoRAbbitError | None) -> None:
        """Stop reading and tell the result, if there is one to tell."""
        on_done, self._on_done = self._on_done, None
        for open_end in (self._reading, self._watch):
            if open_end is not None:
                open_end.cancel()
        if on_done is not None and result:
            on_done(result[0])
