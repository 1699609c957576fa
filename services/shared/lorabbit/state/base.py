"""StateStore: what the server must remember, and the only steps in which it may change.

A job changes in one step alone, `commit`: one atomic write of the round, its tasks, the events
that tell of it and the messages it causes, so that a crash leaves either all of it or nothing.
Every step names the epoch of the server's lease (an old server is `Fenced`), an operation (the
same one again returns its first answer) and the version it starts from. Only metadata lives
here; tensors are files. Each call may raise StoreUnavailable, after patient tries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lorabbit.errors import LoRAbbitError
from lorabbit.state.enrollment import EnrollmentStore

JobStatus = Literal["queued", "running", "done", "failed", "cancelled"]
START = "0"
"""The cursor before a job's first event."""


class Conflict(LoRAbbitError):
    """A step started from a version that is gone, or would count a result twice."""


@dataclass(frozen=True, slots=True)
class JobEntry:
    """A job in the queue or past it."""

    job: str
    spec: str
    """The JobSpec as JSON."""
    status: JobStatus = "queued"
    submitted_ms: int = 0
    reason: str = ""
    exit_code: int = 0
    cancel_requested: bool = False


@dataclass(frozen=True, slots=True)
class ClientEntry:
    """A client in the registry: an identity, leased or owned, and the inbox it is reached at."""

    client: str
    address: str
    record: str = "{}"
    """What it declared about itself, as JSON."""
    expires_ms: int = 0
    """When its lease ends unrenewed."""


@dataclass(frozen=True, slots=True)
class StateChange:
    """One atomic step of one job; a field left empty is left alone."""

    operation: str
    """Unique per step: a repeated one returns the first answer."""
    epoch: int
    version: int
    """The version this step starts from; the step makes it one more."""
    header: str | None = None
    tasks: Mapping[str, str | None] = field(default_factory=dict)
    """Changed tasks as JSON; None deletes."""
    effects: Mapping[str, str] = field(default_factory=dict)
    """Results that count from here on: task -> sha256; each at most once for ever."""
    events: Sequence[str] = ()
    outbox: Sequence[str] = ()
    relayed: Sequence[str] = ()
    """Ids of outbox entries that the broker has confirmed, to forget."""


@dataclass(frozen=True, slots=True)
class CommitResult:
    """The answer to a step."""

    version: int
    event_ids: tuple[str, ...]
    outbox_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JobRecord:
    """All that is kept of a job but its events."""

    version: int
    header: str | None
    tasks: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """An event as JSON with the cursor that stands right behind it."""

    cursor: str
    event: str


class StateStore(ABC):
    """See the module's docstring. Safe to call from any thread."""

    @property
    @abstractmethod
    def enrollment(self) -> EnrollmentStore:
        """Who may join, who has joined and who was sent away."""

    # ---- the server's lease ----
    @abstractmethod
    def acquire_lease(self, owner: str, seconds: float) -> int | None:
        """Take the lease if it is free or already this owner's: a new, higher epoch; None if another holds it."""

    @abstractmethod
    def renew_lease(self, owner: str, epoch: int, seconds: float) -> None:
        """Hold the lease for longer; raises Fenced when it is another's."""

    @abstractmethod
    def release_lease(self, owner: str, epoch: int) -> None:
        """Give the lease up, if it is still ours."""

    @abstractmethod
    def newest_epoch(self) -> int:
        """Return the epoch given last; 0 when none ever was. Who works in an older one has been replaced."""

    def is_newest(self, epoch: int) -> bool:
        """Tell whether nobody took the lease after the server of this epoch: it has not been replaced."""
        return self.newest_epoch() == epoch

    @abstractmethod
    def lease_holder(self) -> str | None:
        """Who holds the lease now."""

    # ---- clients ----
    @abstractmethod
    def lease_identity(self, wanted: ClientEntry, *, now_ms: int, epoch: int) -> str:
        """Give the client at an address its identity and remember what it declared. Raises Fenced.

        The client that is `wanted` is its own. Without a name it gets the identity its address held before,
        or else the lowest ``client-<n>`` that nobody alive holds.
        """

    @abstractmethod
    def touch_clients(self, expires_ms: Mapping[str, int]) -> None:
        """Move the end of leases."""

    @abstractmethod
    def free_identity(self, client: str, address: str, *, epoch: int) -> None:
        """End a client's lease now, if it is still at that address. Raises Fenced."""

    @abstractmethod
    def clients(self) -> dict[str, ClientEntry]:
        """Every identity ever given, by name."""

    # ---- the queue of jobs ----
    @abstractmethod
    def enqueue(self, name: str, spec: str, *, taken: Sequence[str] = (), now_ms: int = 0, operation: str = "") -> str:
        """Queue a job and return its id: `name`, or ``name-2`` ... when that is used or in `taken`."""

    @abstractmethod
    def jobs(self) -> dict[str, JobEntry]:
        """Every job, in the order of submission."""

    @abstractmethod
    def mark_job(self, job: str, status: JobStatus, *, epoch: int, reason: str = "", exit_code: int = 0) -> None:
        """Set a job's status in the queue; an ended one leaves the queue. Raises Fenced."""

    @abstractmethod
    def request_cancel(self, job: str) -> bool:
        """Note that an operator wants a job to end; False when there is no such job or it has ended."""

    # ---- one job ----
    @abstractmethod
    def claim_job(self, job: str, epoch: int) -> JobRecord:
        """Fence off every older server from this job, then return what is kept of it. Raises Fenced."""

    @abstractmethod
    def load_job(self, job: str) -> JobRecord:
        """Return what is kept of a job, for reading."""

    @abstractmethod
    def commit(self, job: str, change: StateChange) -> CommitResult:
        """Make one step; raises Fenced (older epoch) or Conflict (version, or an effect counted before)."""

    @abstractmethod
    def effect(self, job: str, task: str) -> str | None:
        """The sha256 with which a task's result was counted; None if it was not."""

    @abstractmethod
    def outbox(self, job: str) -> list[tuple[str, str]]:
        """(id, message) of everything not yet known to be confirmed, oldest first."""

    @abstractmethod
    def log_progress(self, job: str, events: Sequence[str]) -> None:
        """Append passing news: shown to watchers, kept for a while, no part of the record."""

    @abstractmethod
    def newest_progress(self, job: str, count: int) -> list[str]:
        """Return the passing news told last, newest first."""

    @abstractmethod
    def events(
        self, job: str, after: str = START, *, progress: bool = True, wait_seconds: float = 0.0
    ) -> list[LoggedEvent]:
        """Events behind a cursor, oldest first; waits so long for the first one if there is none yet."""

    # ---- the store itself ----
    @abstractmethod
    def ping(self) -> None:
        """Raise StoreUnavailable unless the store answers."""

    @abstractmethod
    def close(self) -> None:
        """Close connections."""
