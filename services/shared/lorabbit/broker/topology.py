"""Names of exchanges, queues and streams, in one place.

The server declares everything; a client only publishes to `UP` under its own address and reads its
own inbox and the adapters, which is all that its permissions need to allow.
"""

from __future__ import annotations

from dataclasses import replace

from lorabbit.broker.base import Queue

CONTROL = "lorabbit.control"
"""Server -> client messages; routing key ``c.<address>``."""
UP = "lorabbit.up"
"""Client -> server; routing keys ``c.<address>.ctl`` and ``c.<address>.data``; an address may have dots."""
DEAD = "lorabbit.dead"
"""Dead letters of every queue below."""

ADAPTERS = "lorabbit.adapter"
"""Beginning of the names of the streams that hold payloads for clients."""

MIB = 2**20
DELIVERIES = 100
"""So often may a control message come back to the server, which it does each time the server dies or steps down."""
SERVER_QUEUE = Queue(
    "lorabbit.server", "quorum", ((UP, "c.#.ctl"),), dead_letter_exchange=DEAD, delivery_limit=DELIVERIES
)
DATA_QUEUE = Queue("lorabbit.data", "classic", ((UP, "c.#.data"),), max_bytes=1024 * MIB)
DEAD_QUEUE = Queue("lorabbit.dead", "classic", ((DEAD, "#"),), max_bytes=64 * MIB)
EXCHANGES = (CONTROL, UP, DEAD)
QUEUES = (SERVER_QUEUE, DATA_QUEUE, DEAD_QUEUE)


def inbox(address: str) -> Queue:
    """The durable queue of one client; it goes a week after its client was last seen."""
    name = f"lorabbit.client.{address}"
    return Queue(name, "classic", ((CONTROL, f"c.{address}"),), dead_letter_exchange=DEAD, expires_ms=7 * 86400 * 1000)


def replicated(queue: Queue) -> Queue:
    """Return a queue as it is where a majority of a cluster's nodes keeps it; streams are kept by all of them."""
    return replace(queue, kind="quorum", delivery_limit=DELIVERIES) if queue.kind == "classic" else queue


def control_key(address: str) -> str:
    """Routing key of a message to one client."""
    return f"c.{address}"


def up_key(address: str) -> str:
    """Routing key of a control message from one client."""
    return f"c.{address}.ctl"


def data_key(address: str) -> str:
    """Routing key of a chunk from one client."""
    return f"c.{address}.data"


def address_of(routing_key: str) -> str:
    """The client's address in an `UP` routing key; empty where there is none."""
    return routing_key.partition(".")[2].rsplit(".", 1)[0]


def adapter_stream(sha256: str, number: int = 0) -> Queue:
    """The stream that holds one payload's chunks for the whole cohort; a numbered one in the place of a lost one."""
    return Queue(f"{ADAPTERS}.{sha256[:32]}" + (f".{number}" if number else ""), "stream")
