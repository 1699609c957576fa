"""What the round engine knows of a job, as one frozen value, and its way to the store and back.

The store keeps the header and each task as JSON of their own, so that a step writes what it changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import TypeAdapter

from lorabbit.jobspec import JobSpec
from lorabbit.messages import Metrics, PayloadRef
from lorabbit.types import ClientId

Stage = Literal["gathering", "initialising", "starting", "training", "aggregating", "scoring", "ended"]
Ending = Literal["done", "failed", "cancelled"]
TaskStatus = Literal["open", "offered", "accepted"]


@dataclass(frozen=True, slots=True)
class Offered:
    """A result as its client announced it."""

    metrics: Metrics
    payload: PayloadRef | None = None
    base_sha256: str | None = None
    bytes_down: int = 0


@dataclass(frozen=True, slots=True)
class TaskState:
    """One piece of work of one client."""

    id: str
    phase: str
    """INITIALISE, TRAIN (the method's plan may call it otherwise) or EVALUATE."""
    round: int
    client: ClientId
    index: int
    tries: int = 1
    """Results asked for: one more after each refusal or failure, with a new id."""
    attempt: int = 1
    """Times it was sent: the same id, the same work."""
    status: TaskStatus = "open"
    offered: Offered | None = None
    since_ms: int = 0


@dataclass(frozen=True, slots=True)
class Version:
    """One version of the server state, on disk."""

    state: PayloadRef
    """Tensors and facts, as the method made them."""
    adapter: PayloadRef
    """What clients score and what is exported."""


@dataclass(frozen=True, slots=True)
class JobState:
    """Everything the engine knows of a job between two events."""

    job: str
    spec: JobSpec
    stage: Stage = "gathering"
    outcome: Ending | Literal["running"] = "running"
    reason: str = ""
    exit_code: int = 0
    since_ms: int = 0
    """When this stage began."""
    present: int = 0
    """Clients there while the population gathers."""
    clients: tuple[ClientId, ...] = ()
    """The population, in partition order."""
    lost: tuple[ClientId, ...] = ()
    round: int = 0
    round_started_ms: int = 0
    head: Version | None = None
    """The server state that the round under way starts from."""
    scored: Mapping[int, Version] = field(default_factory=dict)
    """Versions under evaluation, by round."""
    base_sha256: str | None = None
    tasks: Mapping[str, TaskState] = field(default_factory=dict)
    """The tasks of the round under way and of open evaluations, by id."""

    @property
    def payloads(self) -> frozenset[str]:
        """The sha256 of every file this state needs."""
        refs = [ref for v in (self.head, *self.scored.values()) if v is not None for ref in (v.state, v.adapter)]
        refs += [t.offered.payload for t in self.tasks.values() if t.offered is not None and t.offered.payload]
        return frozenset(ref.sha256 for ref in refs)


_STATE = TypeAdapter(JobState)
_TASK = TypeAdapter(TaskState)


def dump_header(state: JobState) -> str:
    """The state without its spec and tasks, as JSON."""
    return _STATE.dump_json(state, exclude={"spec", "tasks"}, exclude_defaults=True).decode()


def dump_task(task: TaskState) -> str:
    """A task as JSON."""
    return _TASK.dump_json(task, exclude_defaults=True).decode()


def load_state(header: str, spec: JobSpec, tasks: Mapping[str, str]) -> JobState:
    """Put a state together from what the store kept."""
    bare = _STATE.validate_python({**json.loads(header), "spec": spec})
    return replace(bare, tasks={task: _TASK.validate_json(text) for task, text in tasks.items()})
