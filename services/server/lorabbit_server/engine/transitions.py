"""The steps of the round engine: events that move a job, and the commands they cause.

Events are past participles and carry the time they happened (`at_ms`), because the engine has no
clock. Commands are imperatives for the shell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from pydantic import JsonValue

from lorabbit.events.job_events import AnyEvent
from lorabbit.job.spec import PLAIN
from lorabbit.types import ClientCapabilities, ClientId
from lorabbit_server.engine.state import JobState, ModelVersion, TaskState, UploadOffer


@dataclass(frozen=True, slots=True)
class PayloadTraffic:
    """Bytes that a task's result cost on the wire."""

    bytes_up: int = 0
    overhead_up: int = 0
    overhead_down: int = 0


# ---- events ----


@dataclass(frozen=True, slots=True)
class JobOpened:
    """The job came to the head of the queue."""

    present: tuple[ClientId, ...]
    at_ms: int = 0
    declared: Mapping[ClientId, ClientCapabilities] = field(default_factory=dict)
    """What those who are here say of themselves; nothing is known of others."""


@dataclass(frozen=True, slots=True)
class HelloReceived:
    """A client said hello, for the first time or again; `outbox` lists tasks whose result it still holds."""

    client: ClientId
    present: tuple[ClientId, ...]
    device: str = "cpu"
    outbox: frozenset[str] = frozenset()
    is_new: bool = True
    """Whether it was not connected before."""
    at_ms: int = 0
    declared: ClientCapabilities = field(default_factory=ClientCapabilities)


@dataclass(frozen=True, slots=True)
class ClientDisconnected:
    """A client said goodbye or its lease expired."""

    client: ClientId
    present: tuple[ClientId, ...]
    at_ms: int = 0


@dataclass(frozen=True, slots=True)
class ClientExcluded:
    """A client was revoked by an operator, or lost for longer than `patience_seconds`."""

    client: ClientId
    present: tuple[ClientId, ...]
    reason: str
    at_ms: int = 0


@dataclass(frozen=True, slots=True)
class OfferReceived:
    """A client offered an update; `was_accepted` tells that its task was accepted before and has left the state."""

    task: str
    client: ClientId
    offered: UploadOffer
    was_accepted: bool = False
    wants_tensors: bool | None = True
    """Whether the method requires tensors in this client's update; None: optional."""
    traffic: PayloadTraffic = PayloadTraffic()
    at_ms: int = 0


@dataclass(frozen=True, slots=True)
class UpdateReceived:
    """The tensors of an offered update are uploaded and valid."""

    task: str
    traffic: PayloadTraffic = PayloadTraffic()
    at_ms: int = 0
    coding: str = PLAIN
    """Compression of its tensors."""


@dataclass(frozen=True, slots=True)
class UpdateFailedValidation:
    """An offer or an update failed validation."""

    task: str
    reason: str
    detail: str
    before_upload: bool = False
    at_ms: int = 0


@dataclass(frozen=True, slots=True)
class TaskFailureReceived:
    """A client could not do a task."""

    task: str
    client: ClientId
    reason: str
    bad_input: bool = False
    at_ms: int = 0


@dataclass(frozen=True, slots=True)
class MethodStarted:
    """The first server state is on disk."""

    version: ModelVersion
    parameters: int
    facts: Mapping[str, JsonValue] = field(default_factory=dict)
    at_ms: int = 0


@dataclass(frozen=True, slots=True)
class RoundAggregated:
    """The next server state is on disk."""

    round: int
    version: ModelVersion
    aggregate_seconds: float = 0.0
    at_ms: int = 0


@dataclass(frozen=True, slots=True)
class UpdatesUnusable:
    """Accepted updates cannot be aggregated, even alone."""

    round: int
    reasons: Mapping[str, str]
    """Why, by task."""
    at_ms: int = 0


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The deadline of a round passed."""

    round: int
    at_ms: int = 0


@dataclass(frozen=True, slots=True)
class ServerWorkFailed:
    """The server's own work for this job failed; a retry would not help."""

    reason: str
    exit_code: int = 1
    at_ms: int = 0


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """An operator canceled the job."""

    at_ms: int = 0


Event: TypeAlias = (
    JobOpened
    | HelloReceived
    | ClientDisconnected
    | ClientExcluded
    | OfferReceived
    | UpdateReceived
    | UpdateFailedValidation
    | TaskFailureReceived
    | MethodStarted
    | RoundAggregated
    | UpdatesUnusable
    | DeadlinePassed
    | ServerWorkFailed
    | CancelRequested
)


# ---- commands ----


@dataclass(frozen=True, slots=True)
class AppendEvent:
    """Append to the job's event log."""

    event: AnyEvent


@dataclass(frozen=True, slots=True)
class SendTask:
    """Send a task to its client."""

    task: TaskState


@dataclass(frozen=True, slots=True)
class SendCancelTask:
    """Tell a client to stop a task."""

    task: str
    client: ClientId


@dataclass(frozen=True, slots=True)
class GrantUpload:
    """Open an upload and grant the missing chunks."""

    task: TaskState


@dataclass(frozen=True, slots=True)
class DenyUpload:
    """Refuse an update before its chunks are sent."""

    task: str
    client: ClientId
    reason: str


@dataclass(frozen=True, slots=True)
class SendVerdict:
    """Tell a client that its update is accepted or rejected, so that it can delete it."""

    task: str
    client: ClientId
    accepted: bool
    reason: str = "accepted"


@dataclass(frozen=True, slots=True)
class MarkAccepted:
    """Record that a task's update is accepted; the store refuses a second record."""

    task: str
    sha256: str


@dataclass(frozen=True, slots=True)
class StartMethod:
    """Make the first server state from the initial adapter."""

    task: TaskState


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Aggregate these accepted updates, in this order, into the next server state."""

    round: int
    tasks: tuple[TaskState, ...]


@dataclass(frozen=True, slots=True)
class SetDeadline:
    """Send `DeadlinePassed` at this time, unless the deadline is replaced before."""

    round: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class EndJob:
    """The job is over; take the next one."""


Command: TypeAlias = (
    AppendEvent
    | SendTask
    | SendCancelTask
    | GrantUpload
    | DenyUpload
    | SendVerdict
    | MarkAccepted
    | StartMethod
    | Aggregate
    | SetDeadline
    | EndJob
)
DeferredCommand: TypeAlias = GrantUpload | StartMethod | Aggregate | SetDeadline | EndJob
"""Commands that are performed after the commit."""
Decision: TypeAlias = tuple[JobState, tuple[Command, ...]]
