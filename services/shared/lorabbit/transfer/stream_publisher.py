"""Publishing: a payload as a stream of its own, once, for every client that wants it.

A stream is begun empty: what an earlier server left there may be only a part. RabbitMQ 3.10 loses a stream for good
when it is killed while it makes it, and no request repairs or deletes it: then the payload gets another stream, and
whoever is told of it is told its number. So it does where a client finds that the stream holds something else, or
lacks a part. A stream keeps its name when another server takes over, because tasks under way name it: a server that
was replaced must therefore delete and make none any more.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import structlog

from lorabbit.broker import topology
from lorabbit.broker.base import Broker, Cancellable, OnDone, Queue
from lorabbit.errors import BrokerFault, BrokerRefused, LoRAbbitError, Retryable
from lorabbit.protocol.messages import PayloadRef
from lorabbit.runtime import failpoints
from lorabbit.runtime.backoff import Backoff
from lorabbit.transfer.chunking import ChunkedPayload, ChunkOutbox
from lorabbit.transfer.payload_store import PayloadStore

MAX_STREAMS = 9
FAULTS_PER_STREAM = 4
"""So often is a stream tried that RabbitMQ cannot use: a broker that has just started needs a moment."""

log = structlog.get_logger()


class StreamPublisher:
    """Publishes payloads for whole cohorts, each as a stream of its own, once."""

    def __init__(self, broker: Broker, store: PayloadStore, *, leads: Callable[[], bool] = lambda: True) -> None:
        """Publish from this store; `leads` is asked before a stream is touched, and may raise a `Retryable`.

        Where it says no, nothing more is published or withdrawn: the streams are another server's.
        """
        self._broker, self._store, self._leads = broker, store, leads
        self._streams: dict[str, _Stream] = {}
        self._withdrawals: list[_RetriedCall] = []

    def publish(self, ref: PayloadRef, on_done: OnDone | None = None) -> None:
        """Make a stored payload readable by every client; one that is published already costs nothing.

        `on_done(None)` is called when the broker has confirmed the whole; clients may be told before.
        """
        stream = self._streams.get(ref.sha256) or self._begin(ref)
        if on_done is not None:
            stream.when_done(on_done)

    def when_readable(self, sha256: str, callback: Callable[[], None]) -> bool:
        """Tell whether a reader would come too early; then `callback` is called once it would not.

        It would while a stream is published here and the broker has confirmed none of its chunks.
        """
        stream = self._streams.get(sha256)
        return stream is not None and stream.when_begun(callback)

    def number(self, sha256: str) -> int:
        """Which stream of a payload holds it, where it is published here; see `PayloadRef.stream`."""
        stream = self._streams.get(sha256)
        return 0 if stream is None else stream.names.number

    def republish(self, ref: PayloadRef) -> None:
        """Publish a payload again, in another stream, because the one that `ref` names is damaged or incomplete.

        Does nothing when another stream was published already, or after `MAX_STREAMS` of them.
        """
        stream = self._streams.get(ref.sha256)
        if stream is None or not stream.is_done or stream.names.number != ref.stream or ref.stream >= MAX_STREAMS:
            return
        log.warning("stream-damaged", payload=ref.sha256[:12], stream=ref.stream)
        self._begin(stream.ref, ref.stream + 1)

    def withdraw(self, sha256: str) -> None:
        """Delete a payload's stream; one that is not there is fine."""
        stream = self._streams.pop(sha256, None)
        if stream is not None:
            stream.cancel()
        for number in range(1 if stream is None else stream.names.number + 1):
            self._withdraw(_StreamNames(sha256, number))
        self._withdrawals = [each for each in self._withdrawals if each.is_open]

    def close(self) -> None:
        """Publish and withdraw nothing more; streams stay for the next server."""
        for each in (*self._streams.values(), *self._withdrawals):
            each.cancel()

    def _withdraw(self, names: _StreamNames) -> None:
        def attempt() -> None:
            if self._leads():
                with suppress(BrokerRefused):
                    names.attempt(lambda stream: self._broker.delete_queue(stream.name))

        self._withdrawals.append(_until_available(self._broker, attempt))

    def _begin(self, ref: PayloadRef, number: int = 0) -> _Stream:
        path = self._store.path(ref.sha256)
        stream = _Stream(self._broker, ref, path, number, leads=self._leads, on_failed=lambda: self._forget(ref.sha256))
        self._streams[ref.sha256] = stream
        return stream

    def _forget(self, sha256: str) -> None:
        self._streams.pop(sha256, None)


class _Stream(Cancellable):
    """One payload on its way into its stream, then there."""

    def __init__(  # noqa: PLR0913 - what, from where and into which stream, and whom to ask and tell
        self,
        broker: Broker,
        ref: PayloadRef,
        path: Path,
        number: int,
        *,
        leads: Callable[[], bool],
        on_failed: Callable[[], None],
    ) -> None:
        self._broker, self.ref, self._path = broker, ref, path
        self._leads, self._on_failed = leads, on_failed
        self.names = _StreamNames(ref.sha256, number)
        self._waiting: list[OnDone] | None = []
        self._readers: list[Callable[[], None]] | None = []
        self._outbound: ChunkOutbox | None = None
        self._opening = _until_available(broker, self._open)

    @property
    def is_done(self) -> bool:
        """Whether the broker holds the whole, or never will."""
        return self._waiting is None

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
        if not self._leads():
            return
        try:
            name = self.names.attempt(self._make)
        except BrokerRefused as error:
            self._broker.post(partial(self._done, error))
            return
        chunks = ChunkedPayload(self.ref, self._path, ("", name), {})
        self._outbound = ChunkOutbox(self._broker, chunks, range(self.ref.chunks), self._done, on_chunk=self._begun)

    def _make(self, stream: Queue) -> None:
        self._broker.delete_queue(stream.name)
        self._broker.declare_queue(stream)

    def _begun(self) -> None:
        """Let readers come."""
        failpoints.hit(failpoints.Failpoint.STREAM_CHUNK_CONFIRMED)
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


class _StreamNames:
    """The names of a payload's streams: the next one after each that the broker cannot use for several tries."""

    def __init__(self, sha256: str, number: int = 0) -> None:
        self._sha256 = sha256
        self._faults = 0
        self.number = number

    def attempt(self, function: Callable[[Queue], None]) -> str:
        """Call a function with the stream; returns its name. Raises BrokerRefused when no name will do."""
        stream = topology.adapter_stream(self._sha256, self.number)
        try:
            function(stream)
        except BrokerFault as error:
            self._faults += 1
            if self._faults == FAULTS_PER_STREAM:
                log.warning("stream-lost", stream=stream.name, why=str(error))
                self._faults = 0
                self.number += 1
            if self.number > MAX_STREAMS:
                raise BrokerRefused(f"no stream can be made: {error}") from error
            raise
        return stream.name


class _RetriedCall(Cancellable):
    """A function that is tried until the services that it needs can be reached."""

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
        except Retryable:
            self._timer = self._broker.after(self._backoff.next_seconds(), self.attempt)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _until_available(broker: Broker, function: Callable[[], None]) -> _RetriedCall:
    """Call a function now, and again later as long as it raises a `Retryable`."""
    return _RetriedCall(broker, function)
