"""What the round engine knows of a job, as one frozen value, and its way to the store and back.

The store keeps the header and each task as JSON of their own, so that a step writes what it changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import JsonValue, TypeAdapter
from pydantic.main import IncEx

from lorabbit.aggregation.partial_work import ClientSpeed
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Metrics, Offer, PayloadRef
from lorabbit.types import ClientCapabilities, ClientId

Stage = Literal["gathering", "initialising", "starting", "training", "aggregating", "scoring", "ended"]
Ending = Literal["done", "failed", "cancelled"]
TaskStatus = Literal["open", "offered", "accepted"]


@dataclass(frozen=True, slots=True)
class UploadOffer:
    """A result as its client announced it."""

    metrics: Metrics
    payload: PayloadRef | None = None
    base_sha256: str | None = None
    bytes_down: int = 0
    bytes_by_role: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, offer: Offer) -> UploadOffer:
        """Take over what the engine needs of an offer."""
        return cls(offer.metrics, offer.payload, offer.base_sha256, offer.bytes_down, offer.bytes_by_role)


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
    turn: int = 0
    """Number of the task in a job whose clients never wait, where one may train twice from the same version."""
    status: TaskStatus = "open"
    offered: UploadOffer | None = None
    since_ms: int = 0
    share: float = 1.0
    """Of the job's local steps, that it asks for."""


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version of the server state, on disk."""

    state: PayloadRef
    """Tensors and facts, as the method made them."""
    adapter: PayloadRef
    """What a user gets: the tensors of `Method.export`."""
    shared: Mapping[str, PayloadRef] = field(default_factory=dict)
    """The state's groups of tensors that seldom change, by role."""
    base: PayloadRef | None = None
    """The model that the exported adapter stands on, where the job made one."""
    config: Mapping[str, JsonValue] = field(default_factory=dict)
    """Keys of adapter_config.json that this version overrides."""
    report: Mapping[str, JsonValue] = field(default_factory=dict)
    """What the method tells of the round that made it."""
    direct: bool = False
    """The adapter holds the state's own tensors, and nothing else."""

    @property
    def hashes(self) -> frozenset[str]:
        """The sha256 of every file of it."""
        refs = (self.state, self.adapter, self.base, *self.shared.values())
        return frozenset(ref.sha256 for ref in refs if ref is not None)


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
    """Clients there that suit the job, while the population gathers."""
    unsuited: int = 0
    """Clients there that the job's selection leaves out, while the population gathers."""
    declared: Mapping[ClientId, ClientCapabilities] = field(default_factory=dict)
    """What clients declared, where the job selects by it and still gathers."""
    clients: tuple[ClientId, ...] = ()
    """The population, in partition order."""
    lost: tuple[ClientId, ...] = ()
    aside: tuple[ClientId, ...] = ()
    """Clients that are asked no more: what they brought could not be used, or they were sent away."""
    retired: tuple[ClientId, ...] = ()
    """Clients whose privacy budget bears no further round."""
    round: int = 0
    round_started_ms: int = 0
    head: ModelVersion | None = None
    """The server state that the round under way starts from."""
    previous: ModelVersion | None = None
    """The one before, where adapters are told as differences to it."""
    scored: Mapping[int, ModelVersion] = field(default_factory=dict)
    """Versions under evaluation, by round."""
    base_sha256: str | None = None
    tasks: Mapping[str, TaskState] = field(default_factory=dict)
    """The tasks of the round under way and of open evaluations, by id; late ones where the schedule keeps them."""
    bases: Mapping[int, ModelVersion] = field(default_factory=dict)
    """Older versions that tasks under way started from, by the tasks' round."""
    batch: tuple[str, ...] = ()
    """Tasks whose results are being folded, where others may arrive meanwhile."""
    deadline_ms: int | None = None
    """When the round closes with what there is."""
    took_ms: Mapping[int, int] = field(default_factory=dict)
    """Milliseconds from asking to counting, of the last training of each client index."""
    speeds: Mapping[int, ClientSpeed] = field(default_factory=dict)
    """How fast each client index was in its last training, where the job's work or selection hangs on it."""
    asked: Mapping[int, int] = field(default_factory=dict)
    """How often each client index was asked to train, where the job's selection is fair."""
    turns: int = 0
    """Trainings asked for so far, in a job whose clients never wait."""
    missed: int = 0
    """Clients that had not answered when the round closed."""
    turned_away: int = 0
    """Results refused as too stale since the last version."""

    def version_for(self, task: TaskState) -> ModelVersion | None:
        """The server state that a training task starts from."""
        return self.bases.get(task.round, self.head)

    @property
    def payloads(self) -> frozenset[str]:
        """The sha256 of every file this state needs."""
        offered = (t.offered.payload for t in self.tasks.values() if t.offered is not None)
        return frozenset().union(
            *(version.hashes for version in self.versions),
            (payload.sha256 for payload in offered if payload is not None),
        )

    @property
    def versions(self) -> tuple[ModelVersion, ...]:
        """The versions in use: the head, those under evaluation, and those that late tasks started from."""
        used = (self.head, self.previous, *self.scored.values(), *self.bases.values())
        return tuple(version for version in used if version is not None)


_STATE = TypeAdapter(JobState)
_TASK = TypeAdapter(TaskState)


def dump_header(state: JobState) -> str:
    """The state without its spec and tasks, as JSON."""
    unused: IncEx = {"max_batch", "dtype", "version", "codings"}  # no job selects clients by them
    exclude: dict[str, IncEx | bool] = {"spec": True, "tasks": True, "declared": {"__all__": unused}}
    return _STATE.dump_json(state, exclude=exclude, exclude_defaults=True).decode()


def dump_task(task: TaskState) -> str:
    """A task as JSON."""
    return _TASK.dump_json(task, exclude_defaults=True).decode()


def load_state(header: str, spec: JobSpec, tasks: Mapping[str, str]) -> JobState:
    """Put a state together from what the store kept."""
    bare = _STATE.validate_python({**json.loads(header), "spec": spec})
    return replace(bare, tasks={task: _TASK.validate_json(text) for task, text in tasks.items()})
