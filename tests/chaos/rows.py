"""The rows of the failure matrix: a name, where it strikes, and what happens to the scene."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chaos import faults, nodes, scarcity, standby
from chaos.scene import Act, Scene
from lorabbit.runtime.failpoints import Failpoint

CLIENTS = 2
JOB: dict[str, Any] = {
    "name": "chaos",
    "model": {"name": "null:100KB"},
    "rounds": 3,
    "clients": CLIENTS,
    "seed": 7,
    "output": {"keep_checkpoints": 0, "keep_updates": True},
}
OWN: dict[str, Any] = {
    "name": "own",
    "model": {"variants": ["cnn:5", "cnn:4"], "name": "cnn:5", "task": "image-classification", "trainable": "full"},
    "method": {"name": "pfedlora", "mu": 0.3, "align": "linear"},
    "data": {"source": "digits", "limit": 120},
    "local": {"steps": 2, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.05},
    "rounds": 2,
    "clients": CLIENTS,
    "seed": 7,
}
"""A job whose clients keep state of their own."""
LARGE: dict[str, Any] = {**JOB, "name": "large", "model": {"name": "null:8MB"}}
"""A job whose tensors are too large for what a process has left over."""


@dataclass(frozen=True)
class Row:
    """One row."""

    name: str
    strikes: str
    """The crash point, or the moment."""
    act: Act
    job: str = "chaos"
    remembers: bool = True
    """Whether everything that was acknowledged is remembered; else the bytes that were counted meanwhile are not."""
    clustered: bool = False
    """Whether it is played on a cluster of RabbitMQ."""
    kills_broker: bool = False
    """A broker that dies may have kept for the witness what it had not yet kept for the server, nor confirmed."""

    def __str__(self) -> str:
        """The name, for test ids."""
        return self.name


PASSAGES = {
    Failpoint.TASK_DECIDED: 4,
    Failpoint.STEP_COMMITTED: 4,
    Failpoint.MESSAGE_SENT: 5,
    Failpoint.MESSAGES_CONFIRMED: 3,
    Failpoint.STREAM_CHUNK_CONFIRMED: 10,
    Failpoint.VERSION_COMMITTED: 2,
    Failpoint.OFFER_RECEIVED: 4,
    Failpoint.CHUNK_WRITTEN: 10,
    Failpoint.UPLOAD_CHECKED: 3,
    Failpoint.RESULT_COUNTED: 3,
    Failpoint.AGGREGATING: 2,
    Failpoint.VERSION_WRITTEN: 2,
    Failpoint.RUN_WRITTEN: 1,
    Failpoint.PAYLOAD_CHUNK_READ: 10,
    Failpoint.UPLOAD_CHUNK_CONFIRMED: 3,
    Failpoint.PRIVATE_WRITTEN: 1,
    Failpoint.PRIVATE_COMMITTED: 1,
}
"""Where a point is passed often: which passage is the last. Enough to be in the second round, or in the middle."""
PRIVATE = {Failpoint.PRIVATE_WRITTEN, Failpoint.PRIVATE_COMMITTED}


def crash_rows() -> list[Row]:
    """One row per crash point."""
    rows = []
    for point in Failpoint:
        at = f"{point.title}:{PASSAGES.get(point, 2)}"
        act = faults.server_dies_at(at) if point.side == "server" else faults.client_dies_at(at)
        rows.append(Row(point.title, f"{point.side}: {point.place}", act, "own" if point in PRIVATE else "chaos"))
    return rows


def fault_rows() -> list[Row]:
    """One row per fault of what is around the processes."""
    told: list[tuple[str, str, Callable[[Scene], None]]] = [
        ("broker-killed", "half-way through an upload", faults.broker_dies),
        ("store-killed", "half-way through an upload", faults.store_dies),
        ("broker-and-store-killed", "half-way through an upload", faults.both_die),
        ("inbox-lost", "the client is dead, its inbox is emptied", faults.inbox_is_lost),
        ("spool-lost", "half-way through an upload, which is lost with the server", faults.spool_is_lost),
        ("link-cut", "half-way through an upload", faults.link_is_cut),
        ("link-cut-down", "half-way through a download", faults.link_is_cut_down),
        ("bit-flipped", "half-way through an upload", faults.link_flips_a_bit),
        ("bit-flipped-down", "half-way through a download", faults.link_flips_a_bit_down),
        ("bit-flipped-published", "between the server and the broker", faults.server_link_flips_a_bit),
        ("link-half-open", "half-way through an upload", faults.link_is_half_open),
        ("link-stalled", "half-way through an upload, for 3 s", faults.link_stalls),
        ("link-slow", "40 ms and 100 KB/s, all the time", faults.link_is_slow),
        ("server-link-half-open", "half-way through an upload", faults.server_link_is_half_open),
        ("store-full", "Redis at its maxmemory, half-way through an upload", scarcity.store_is_full),
        ("disk-full", "the server's, half-way through an upload", scarcity.disk_is_full),
        ("memory-alarm", "the broker's, half-way through an upload", scarcity.memory_alarm),
        ("leader-killed", "half-way, a standby takes over", standby.leader_dies),
        (
            "leader-frozen",
            "half-way, a standby takes over, the old leader wakes",
            standby.leader_freezes,
        ),
        ("leader-drained", "SIGTERM half-way, a standby takes over at once", standby.leader_drains),
        ("poison", "half-way through an upload", faults.poison_is_sent),
        ("server-drained", "SIGTERM half-way through an upload", faults.server_drains),
        ("client-drained", "SIGTERM half-way through an upload", faults.client_drains),
    ]
    rows = [Row(*each, kills_broker=each[0].startswith("broker-")) for each in told]
    rows.append(Row("store-restored", "from a backup older than a result", faults.store_is_restored, remembers=False))
    rows.append(Row("client-memory", "the client's, from round 2 on", scarcity.client_without_memory, "large"))
    rows.append(Row("client-moved", "killed, its folder is moved to another host", faults.client_moves, "own"))
    return rows


def node_rows() -> list[Row]:
    """One row per loss of a cluster's nodes."""
    told: list[tuple[str, str, Act]] = [
        ("broker-node-killed", "one of three, to which all are connected, half-way through an upload", nodes.node_dies),
        (
            "broker-leader-killed",
            "one of three, which leads every queue, half-way through an upload",
            nodes.leader_dies,
        ),
        ("broker-majority-killed", "two of three, half-way through an upload", nodes.majority_dies),
    ]
    return [Row(*each, clustered=True, kills_broker=True) for each in told]


ROWS = [*crash_rows(), *fault_rows(), *node_rows()]
ALWAYS = {
    *(Failpoint.RESULT_COUNTED.title, Failpoint.TRAINING.title),
    *("broker-killed", "link-cut", "client-drained", "leader-killed"),
}
"""Rows that `.ci/run` plays; `make test-all` and `make chaos` play all."""
JOBS = {"chaos": JOB, "own": OWN, "large": LARGE}
