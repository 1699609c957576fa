"""Chunks: a payload's file as messages, a few of them on their way at one time."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from uuid import uuid4

from lorabbit.broker.base import Broker, Cancellable, Delivery, OnDone, Outgoing
from lorabbit.errors import BrokerBusy, CorruptPayload, LoRAbbitError
from lorabbit.protocol.messages import PayloadRef
from lorabbit.runtime.backoff import Backoff

CHUNK = "lorabbit.chunk.v1"
"""AMQP `type` of a chunk; its body is the bytes, its headers ``sha256`` and ``size``, ``index``, ``crc32``."""
CHECKSUM = "crc32"
"""Header of a chunk's checksum."""
WINDOW = 4
"""Chunks on their way to the broker at one time."""


def checksum(body: bytes, index: int) -> int:
    """CRC-32 of a chunk, begun with its index, so that one under another index does not pass either."""
    return zlib.crc32(body, index)


def index_of(delivery: Delivery) -> int:
    """Tell which chunk of its payload a delivery is; raises CorruptPayload where its header does not say."""
    index = delivery.headers.get("index")
    if not isinstance(index, int) or isinstance(index, bool):
        raise CorruptPayload("the index of a chunk is a whole number")
    return index


def is_damaged(delivery: Delivery) -> bool:
    """Tell whether a chunk is not as it was sent; one without a checksum is left to the hash of the whole."""
    sent = delivery.headers.get(CHECKSUM)
    return sent is not None and sent != checksum(delivery.body, index_of(delivery))


class ChunkedPayload:
    """A payload's file, cut into messages to one place."""

    def __init__(self, ref: PayloadRef, path: Path, place: tuple[str, str], about: Mapping[str, str]) -> None:
        """Cut the file at `path` for `place` (exchange, routing key); `about` goes into each chunk's headers."""
        self.ref = ref
        self.read_bytes = 0
        """Payload bytes made into messages so far, repetitions included."""
        self._path = path
        self._exchange, self._routing_key = place
        self._sending = uuid4().hex
        self._headers: dict[str, str | int] = {**about, "sha256": ref.sha256, "size": ref.size_bytes}

    def message(self, index: int) -> Outgoing:
        """Read one chunk from the disk; raises LoRAbbitError when it cannot be read."""
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(index * self.ref.chunk_bytes)
                body = file.read(min(self.ref.chunk_bytes, self.ref.size_bytes - index * self.ref.chunk_bytes))
        except OSError as error:
            raise LoRAbbitError(f"payload {self.ref.sha256[:12]} cannot be read: {error}") from error
        self.read_bytes += len(body)
        return Outgoing(
            self._exchange,
            self._routing_key,
            CHUNK,
            body,
            {**self._headers, "index": index, CHECKSUM: checksum(body, index)},
            message_id=f"{self._sending}-{index}",
        )


class ChunkOutbox(Cancellable):
    """Sends chunks with a window; a chunk that finds its queue full is sent again later."""

    def __init__(
        self,
        broker: Broker,
        chunks: ChunkedPayload,
        indices: Iterable[int],
        on_done: OnDone,
        *,
        on_chunk: Callable[[], None] = lambda: None,
    ) -> None:
        """Start sending the chunks of these indices soon; `on_chunk` is called with each one that the broker has."""
        self._broker, self._chunks = broker, chunks
        self._todo = deque(indices)
        self._on_done: OnDone | None = on_done
        self._on_chunk = on_chunk
        self._outstanding = 0
        self._pause: Cancellable | None = None
        self._backoff = Backoff(0.05, 5.0)
        broker.post(self._advance)

    def cancel(self) -> None:
        """Send nothing more."""
        self._on_done = None
        self._todo.clear()

    def _advance(self) -> None:
        while self._todo and self._outstanding < WINDOW and self._pause is None:
            index = self._todo.popleft()
            try:
                message = self._chunks.message(index)
            except LoRAbbitError as error:
                self._end(error)
                return
            self._outstanding += 1
            self._broker.send(message, lambda error, index=index: self._answered(index, error))  # type: ignore[misc]
        if not self._todo and not self._outstanding:
            self._end(None)

    def _answered(self, index: int, error: LoRAbbitError | None) -> None:
        self._outstanding -= 1
        if self._on_done is None:
            return
        if isinstance(error, BrokerBusy):
            self._todo.appendleft(index)
            if self._pause is None:
                self._pause = self._broker.after(self._backoff.next_seconds(), self._resume)
            return
        if error is not None:
            self._end(error)
            return
        self._backoff.reset()
        self._on_chunk()
        self._advance()

    def _resume(self) -> None:
        self._pause = None
        self._advance()

    def _end(self, error: LoRAbbitError | None) -> None:
        on_done, self._on_done = self._on_done, None
        self._todo.clear()
        if on_done is not None:
            on_done(error)
