"""The event log: what happened to a job, in order, as past participles.

Every transition of a job appends to its log in the same atomic step that makes it so. The live
view, the report and `status` are folds of this log; nothing else tells a story of its own.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

from lorabbit.job.spec import PLAIN
from lorabbit.protocol.messages import Metrics


class Event(BaseModel):
    """Base of every event; `at_ms` is the server's clock, milliseconds since 1970."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    at_ms: int = 0


class JobSubmitted(Event):
    """A job was queued."""

    kind: Literal["job-submitted"] = "job-submitted"


class JobStarted(Event):
    """The population is complete; `clients` in partition order."""

    kind: Literal["job-started"] = "job-started"
    clients: tuple[str, ...]


class AdapterInitialized(Event):
    """One client built the model; facts about base and adapter are known from here on."""

    kind: Literal["adapter-initialised"] = "adapter-initialised"
    client: str
    sha256: str
    size_bytes: int
    parameters: int
    base_sha256: str | None
    facts: dict[str, JsonValue]


class RoundStarted(Event):
    """A cohort was asked; in round 0, which prepares the job, every client of the population.

    Clients that go on training for an earlier round belong to the cohort, where the schedule keeps late updates.
    """

    kind: Literal["round-started"] = "round-started"
    round: int
    cohort: tuple[str, ...]


class TaskSent(Event):
    """A task went out (again, when `attempt` > 1)."""

    kind: Literal["task-sent"] = "task-sent"
    round: int
    client: str
    phase: str
    attempt: int


class PayloadPublished(Event):
    """A payload goes into a stream, for whoever was asked to read it."""

    kind: Literal["payload-published"] = "payload-published"
    round: int
    role: str
    sha256: str
    size_bytes: int
    chunk_bytes: int


class TaskProgressed(Event):
    """A client reported progress."""

    kind: Literal["task-progressed"] = "task-progressed"
    round: int
    client: str
    phase: str
    fraction: float
    loss: float | None = None


class UpdateAccepted(Event):
    """A result counts. `bytes_*` are payload bytes; `overhead_*` control messages and chunk headers."""

    kind: Literal["update-accepted"] = "update-accepted"
    round: int
    client: str
    phase: str
    metrics: Metrics
    sha256: str | None
    bytes_up: int
    bytes_down: int
    overhead_up: int
    overhead_down: int
    bytes_by_role: dict[str, int] = Field(default_factory=dict)
    """`bytes_down` by the role under which the task named a payload."""
    started: int = 0
    """Version that a training started from."""
    staleness: int = 0
    """Versions made since then, once it is folded."""
    turn: int = 0
    """Number of the training in a job whose clients never wait."""
    share: float = 1.0
    """Of the job's local steps, that the client was asked for."""
    coding: str = PLAIN
    """How its tensors were written for the wire."""


class UpdateRejected(Event):
    """A result was refused; the client will be asked again or the job fails. `too-stale` fails nothing."""

    kind: Literal["update-rejected"] = "update-rejected"
    round: int
    client: str
    reason: str
    detail: str
    started: int | None = None
    """Version that it started from, where it had counted before it was found that it cannot be folded."""
    turn: int = 0
    """Number of the training then, in a job whose clients never wait."""


class RoundClosed(Event):
    """The updates were folded into a new version of the server state."""

    kind: Literal["round-closed"] = "round-closed"
    round: int
    accepted: int
    sha256: str
    """Of the adapter as exported."""
    seconds: float
    """From RoundStarted to here."""
    aggregate_seconds: float
    config: dict[str, JsonValue] = Field(default_factory=dict)
    """Keys of adapter_config.json that this version overrides."""
    base_payload: str | None = None
    """sha256 of the model that the adapter stands on, where the job made one."""
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    """What the method tells of this round."""
    pace: dict[str, int | float] = Field(default_factory=dict)
    """Where rounds do not wait for everybody: `late` clients that had not answered, results refused as `too_stale`
    since the last version, and `staleness_mean` and `staleness_max` of the updates folded, in versions."""


class RoundEvaluated(Event):
    """Every asked client scored the adapter of a round; `metrics` pooled by number of examples."""

    kind: Literal["round-evaluated"] = "round-evaluated"
    round: int
    metrics: dict[str, float]


class ClientJoined(Event):
    """A client came (back)."""

    kind: Literal["client-joined"] = "client-joined"
    client: str
    device: str
    index: int | None = None
    """Its place in the population, where it joins a job that runs."""


class ClientLost(Event):
    """A client's lease ended."""

    kind: Literal["client-lost"] = "client-lost"
    client: str


class ClientSetAside(Event):
    """A client is asked no more in this job: nothing that it brought could be used, or it was sent away."""

    kind: Literal["client-set-aside"] = "client-set-aside"
    client: str
    reason: str


class JobEnded(Event):
    """The job is over."""

    kind: Literal["job-ended"] = "job-ended"
    status: Literal["done", "failed", "cancelled"]
    reason: str = ""
    exit_code: int = 0


AnyEvent = Annotated[
    JobSubmitted
    | JobStarted
    | AdapterInitialized
    | RoundStarted
    | TaskSent
    | PayloadPublished
    | TaskProgressed
    | UpdateAccepted
    | UpdateRejected
    | RoundClosed
    | RoundEvaluated
    | ClientJoined
    | ClientLost
    | ClientSetAside
    | JobEnded,
    Field(discriminator="kind"),
]
EVENTS: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent)
