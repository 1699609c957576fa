"""Transfer: payloads as chunks, down over a stream per payload and up through the data queue.

Down, the server publishes a payload once and every client of the cohort reads it from the start,
whenever it comes. Up, a client sends the chunks that it was granted. Both send a few chunks ahead
of the broker's confirmations and never more, so memory is a few chunks whatever the payload; a full
queue makes the sender wait, with full jitter. Whoever receives checks the whole against its hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from lorabbit import crash
from lorabbit.backoff import Backoff
from lorabbit.broker import topology
from lorabbit.broker.base import Broker, Cancellable, Delivery, OnDone
from lorabbit.chunks import WINDOW, Chunks, Outbound
from lorabbit.errors import BrokerRefused, BrokerUnavailable, CorruptPayload, LoRAbbitError
from lorabbit.messages import PayloadRef
from lorabbit.payloads import PayloadStore

PATIENCE_SECONDS = 300.0


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
        self._chunks = Chunks(ref, path, (topology.UP, topology.data_key(address)), about or {})
        on_chunk = partial(crash.reached, crash.Point.UPLOAD_CHUNK_CONFIRMED)
        self._outbound = Outbound(broker, self._chunks, missing, on_done, on_chunk=on_chunk)

    @property
    def sent_bytes(self) -> int:
        """Payload bytes handed to the broker so far, repetitions included."""
        return self._chunks.read_bytes

    def cancel(self) -> None:
        """Send no further chunk; `on_done` is not called."""
        self._outbound.cancel()


class AdapterPublisher:
    """Publishes payloads for whole cohorts, each as a stream of its own, once."""

    def __init__(self, broker: Broker, store: PayloadStore) -> None:
        """Publish from this store."""
        self._broker, self._store = broker, store
        self._streams: dict[str, _Stream] = {}
        self._withdrawals: list[_Retried] = []

    def publish(self, ref: PayloadRef, on_done: OnDone | None = None) -> None:
        """Make a stored payload readable by every client; one that is published already costs nothing.

        `on_done(None)` is called when the broker has confirmed the whole; clients may be told before.
        """
        stream = self._streams.get(ref.sha256)
        if stream is None:
            place = ("", topology.adapter_stream(ref.sha256).name)
            chunks = Chunks(ref, self._store.path(ref.sha256), place, {})
            stream = self._streams[ref.sha256] = _Stream(self._broker, chunks, lambda: self._forget(ref.sha256))
        if on_done is not None:
            stream.when_done(on_done)

    def when_readable(self, sha256: str, callback: Callable[[], None]) -> bool:
        """Tell whether a reader would come too early; then `callback` is called once it would not.

        It would while a stream is published here and the broker has confirmed none of its chunks.
        """
        stream = self._streams.get(sha256)
        return stream is not None and stream.when_begun(callback)

    def withdraw(self, sha256: str) -> None:
        """Delete a payload's stream; one that is not there is fine."""
        stream = self._streams.pop(sha256, None)
        if stream is not None:
            stream.cancel()
        name = topology.adapter_stream(sha256).name
        self._withdrawals.append(_until_available(self._broker, lambda: self._broker.delete_queue(name)))
        self._withdrawals = [each for each in self._withdrawals if each.is_open]

    def close(self) -> None:
        """Publish and withdraw nothing more; streams stay for the next server."""
        for each in (*self._streams.values(), *self._withdrawals):
            each.cancel()

    def _forget(self, sha256: str) -> None:
        self._streams.pop(sha256, None)


class AdapterReader(Cancellable):
    """Reads one published payload into a store.

    `on_done(None)` is called once, when the payload is in the store, checked; `on_done(error)` when what arrived is
    not what was announced, or when no chunk arrives for `patience_seconds`.
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
        self._on_done: OnDone | None = on_done
        self._patience_seconds = patience_seconds
        self._moved = False
        self._missing = set(store.missing(ref))
        self._reading: Cancellable | None = None
        self._watch: Cancellable | None = None
        if not self._missing:
            broker.post(self._finish)
            return
        stream = topology.adapter_stream(ref.sha256).name
        self._reading = broker.read_stream(stream, self._receive, prefetch=WINDOW)
        self._watch = broker.after(patience_seconds, self._check_progress)

    def cancel(self) -> None:
        """Stop reading; what arrived stays in the store, and `on_done` is not called."""
        self._end()

    def _receive(self, delivery: Delivery) -> None:
        if self._on_done is None:
            return
        self._broker.ack(delivery)
        self.received_bytes += len(delivery.body)
        self._moved = True
        try:
            index = int(delivery.headers["index"])
            self._store.write_chunk(self._ref, index, delivery.body)
            crash.reached(crash.Point.PAYLOAD_CHUNK_READ)
        except (KeyError, ValueError):
            self._end(CorruptPayload(f"a chunk of payload {self._ref.sha256[:12]} has no index"))
            return
        except CorruptPayload as error:
            self._end(error)
            return
        self._missing.discard(index)
        if not self._missing:
            self._finish()

    def _finish(self) -> None:
        if self._on_done is None:
            return
        try:
            self._store.finish(self._ref)
        except CorruptPayload as error:
            self._end(error)
        else:
            self._end(None)

    def _check_progress(self) -> None:
        """End a read on which nothing arrives; no wait is without an end."""
        if self._moved:
            self._moved = False
            self._watch = self._broker.after(self._patience_seconds, self._check_progress)
            return
        why = self._broker.trouble() or f"{len(self._missing)} chunks that the server announced are not there"
        waited = f"no chunk of payload {self._ref.sha256[:12]} arrived for {self._patience_seconds:.0f} s"
        self._end(BrokerUnavailable(f"{waited}: {why}"))

    def _end(self, *result: LoRAbbitError | None) -> None:
        """Stop reading and tell the result, if there is one to tell."""
        on_done, self._on_done = self._on_done, None
        for open_end in (self._reading, self._watch):
            if open_end is not None:
                open_end.cancel()
        if on_done is not None and result:
            on_done(result[0])


class _Stream(Cancellable):
    """One payload on its way into its stream, then there."""

    def __init__(self, broker: Broker, chunks: Chunks, on_failed: Callable[[], None]) -> None:
        self._broker, self._chunks, self._on_failed = broker, chunks, on_failed
        self._waiting: list[OnDone] | None = []
        self._readers: list[Callable[[], None]] | None = []
        self._outbound: Outbound | None = None
        self._opening = _until_available(broker, self._open)

    def when_done(self, on_done: OnDone) -> None:
        """Call back when the broker holds the whole, or cannot."""
        if self._waiting is None:
            self._broker.post(lambda: on_done(None))
        else:
            self._waiting.append(on_done)

    def when_begun(self, callback: Callable[[], None]) -> bool:
        """Call back when there is something to read, or never will be; False when that is so already."""
        if self._readers is None:
            return False
        self._readers.append(callback)
        return True

    def cancel(self) -> None:
        """Publish no further chunk."""
        self._opening.cancel()
        if self._outbound is not None:
            self._outbound.cancel()
        self._begun()

    def _open(self) -> None:
        """Begin an empty stream: what an earlier server left there may be only a part."""
        stream = topology.adapter_stream(self._chunks.ref.sha256)
        try:
            self._broker.delete_queue(stream.name)
            self._broker.declare_queue(stream)
        except BrokerRefused as error:
            self._broker.post(partial(self._done, error))
            return
        indices = range(self._chunks.ref.chunks)
        self._outbound = Outbound(self._broker, self._chunks, indices, self._done, on_chunk=self._begun)

    def _begun(self) -> None:
        """Let readers come."""
        crash.reached(crash.Point.STREAM_CHUNK_CONFIRMED)
        readers, self._readers = self._readers or [], None
        for callback in readers:
            callback()

    def _done(self, error: LoRAbbitError | None) -> None:
        waiting, self._waiting = self._waiting or [], None
        if error is not None:
            self._on_failed()
        self._begun()
        for on_done in waiting:
            on_done(error)


class _Retried(Cancellable):
    """A function that is tried until the broker can be reached."""

    def __init__(self, broker: Broker, function: Callable[[], None]) -> None:
        self._broker, self._function = broker, function
        self._backoff = Backoff(0.2, 10.0)
        self._timer: Cancellable | None = None
        self.is_open = True
        self.attempt()

    def attempt(self) -> None:
        try:
            self._function()
            self.is_open = False
        except BrokerUnavailable:
            self._timer = self._broker.after(self._backoff.next_seconds(), self.attempt)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _until_available(broker: Broker, function: Callable[[], None]) -> _Retried:
    """Call a function now, and again later as long as it raises BrokerUnavailable."""
    return _Retried(broker, function)
