"""A witness of what clients upload: a queue of its own beside the server's, bound to the same messages."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import pika

from lorabbit.broker import topology
from lorabbit.config.network import urls_of_hosts

QUEUE = "witness"


class Witness:
    """Counts the bytes of every chunk that the broker took from a client, by task; `close` it at the end.

    It outlives a broker's death. What the broker delivers to it twice it counts once, by the sender's message id.
    """

    def __init__(self, url: str) -> None:
        """Declare the queue, and the exchange as the server would."""
        self._seen: set[str] = set()
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._hosts = [pika.URLParameters(each) for each in urls_of_hosts(url)]
        with pika.BlockingConnection(self._hosts) as connection:
            channel = connection.channel()
            channel.exchange_declare(topology.UP, exchange_type="topic", durable=True)
            kind = "quorum" if len(self._hosts) > 1 else "classic"
            channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": kind})
            channel.queue_bind(QUEUE, topology.UP, "c.*.data")
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def bytes_of(self, job: str) -> int:
        """Bytes of chunks for the tasks of a job so far, everything that was sent twice twice."""
        with self._lock:
            return sum(count for (task, _), count in self._bytes.items() if task.startswith(f"{job}."))

    def bytes_from(self, client: str) -> int:
        """Bytes of chunks from one client so far."""
        with self._lock:
            return sum(count for (_, sender), count in self._bytes.items() if sender == client)

    def settle(self, is_settled: Callable[[], bool], seconds: float = 20.0) -> bool:
        """Wait until something holds of the counts, or that time is over; tell which."""
        for _ in range(round(seconds / 0.1)):
            if is_settled():
                return True
            self._ends.wait(0.1)
        return is_settled()

    def close(self) -> None:
        """Stop watching."""
        self._ends.set()
        self._thread.join(10)

    def _watch(self) -> None:
        while not self._ends.is_set():
            try:
                self._consume()
            except (pika.exceptions.AMQPError, OSError):
                self._ends.wait(0.2)

    def _consume(self) -> None:
        with pika.BlockingConnection(self._hosts) as connection:
            channel = connection.channel()
            channel.basic_qos(prefetch_count=64)
            for method, properties, body in channel.consume(QUEUE, inactivity_timeout=0.2):
                if self._ends.is_set():
                    return
                if method is None:
                    continue
                with self._lock:
                    if properties.message_id not in self._seen:
                        self._seen.add(properties.message_id)
                        self._bytes[properties.headers["task"], properties.headers["client"]] += len(body)
                channel.basic_ack(method.delivery_tag)
