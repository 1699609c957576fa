"""A TCP proxy that does to its connections what networks do: it delays, throttles, loses, freezes and resets them.

Bytes pass in order or not at all, as TCP has it; what is lost is a connection, noticed (`cut`) or not (`half_open`).
Only `flip_a_bit` changes one, as bad memory on the way does behind TCP's checksum.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
import time
from urllib.parse import urlsplit

READ_BYTES = 8192
"""Small, so that a slow link is slow for every part of a message."""
NOT_OF_A_CHUNK = (b"lorabbit", b"\xce\x03\x00")
"""Names in AMQP's frames around a chunk, and where one frame of a chunk ends and another one begins."""


class Proxy:
    """Forwards a free port of the loopback to a server's port.

    `latency_seconds` delays every byte by so much, each way; `bytes_per_second` is the most that passes, each way
    and connection. Both may be changed at any time.
    """

    def __init__(self, url: str) -> None:
        """Listen on behalf of the server at `url`; `self.url` is the way through the proxy."""
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[_Pair] = []
        self._lock = threading.Lock()
        self._flows = threading.Event()
        self._flows.set()
        self._closed = False
        port = self._listener.getsockname()[1]
        self.url = url.replace(f":{parts.port}/", f":{port}/")
        self.latency_seconds = 0.0
        self.bytes_per_second: float | None = None
        self.accepts = True
        """Whether new connections are let through; they are closed at once otherwise."""
        self.connections = 0
        self.passed = 0
        """Bytes from clients to the server so far."""
        self.returned = 0
        """Bytes from the server to clients so far."""
        self._limit: int | None = None
        self._flips: bool | None = None
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Reset every connection; new ones go through."""
        for pair in self._take_pairs():
            pair.reset()

    def half_open(self) -> None:
        """Let every connection there is fall silent for good, without a word to either end; new ones go through."""
        with self._lock:
            for pair in self._pairs:
                pair.silence()

    def stall(self) -> None:
        """Let nothing pass, on old connections and new ones, until `flow`."""
        self._flows.clear()

    def flow(self) -> None:
        """Let pass again what a stall held up."""
        self._flows.set()

    def cut_after(self, count: int) -> None:
        """Reset every connection once clients have sent so many more bytes."""
        self._limit = self.passed + count

    @property
    def has_cut(self) -> bool:
        """Whether the limit of `cut_after` was reached."""
        return self._limit is None

    def flip_a_bit(self, *, upwards: bool) -> None:
        """Flip one bit of the next block that is a part of a chunk and nothing else, to the server or from it."""
        self._flips = upwards

    @property
    def has_flipped(self) -> bool:
        """Whether the bit of `flip_a_bit` was flipped."""
        return self._flips is None

    def spoil(self, data: bytes, *, upwards: bool) -> bytes:
        """Return a block as it goes on."""
        if self._flips is not upwards or len(data) < READ_BYTES or any(word in data for word in NOT_OF_A_CHUNK):
            return data
        self._flips = None
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]

    def close(self) -> None:
        """Stop listening and cut everything."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._flows.set()
        self.cut()
        self._thread.join(5)

    def let_pass(self, size: int, *, upwards: bool) -> None:
        """Wait until so many bytes may go on, and count them; cuts where a limit is reached."""
        self._flows.wait()
        if self.bytes_per_second is not None:
            time.sleep(size / self.bytes_per_second)
        if not upwards:
            self.returned += size
            return
        self.passed += size
        if self._limit is not None and self.passed >= self._limit:
            self._limit = None
            self.cut()

    def _take_pairs(self) -> list[_Pair]:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        return pairs

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target) if self.accepts and not self._closed else None
            except OSError:
                far = None
            if far is None:
                near.close()
                continue
            self.connections += 1
            pair = _Pair(self, near, far)
            with self._lock:
                self._pairs.append(pair)
            pair.start()


class _Pair:
    """One connection through the proxy: a socket at either end, two threads each way."""

    def __init__(self, proxy: Proxy, near: socket.socket, far: socket.socket) -> None:
        self._proxy, self._sockets = proxy, (near, far)
        self._silent = False

    def start(self) -> None:
        near, far = self._sockets
        for source, sink, upwards in ((near, far, True), (far, near, False)):
            pipe: queue.Queue[tuple[float, bytes]] = queue.Queue(maxsize=64)
            threading.Thread(target=self._read, args=(source, pipe), daemon=True).start()
            threading.Thread(target=self._write, args=(sink, pipe, upwards), daemon=True).start()

    def reset(self) -> None:
        for side in self._sockets:
            # Lingering for no time turns a close into a reset: what is under way is lost.
            with contextlib.suppress(OSError):
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                side.shutdown(socket.SHUT_RDWR)
            side.close()

    def silence(self) -> None:
        self._silent = True

    def _read(self, source: socket.socket, pipe: queue.Queue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(READ_BYTES)
            except OSError:
                data = b""
            pipe.put((time.monotonic() + self._proxy.latency_seconds, data))

    def _write(self, sink: socket.socket, pipe: queue.Queue[tuple[float, bytes]], upwards: bool) -> None:  # noqa: FBT001
        with contextlib.suppress(OSError):
            while True:
                due, data = pipe.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    break
                if self._silent:
                    continue
                self._proxy.let_pass(len(data), upwards=upwards)
                if not self._silent:
                    sink.sendall(self._proxy.spoil(data, upwards=upwards))
        if not self._silent:
            for side in self._sockets:
                with contextlib.suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)
                side.close()
