"""Status: a job as an operator sees it, from the store while it answers and from memory while it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from pydantic import BaseModel, ConfigDict

from lorabbit.errors import StoreUnavailable
from lorabbit.events.job_events import EVENTS, TaskProgressed
from lorabbit.job.spec import JobSpec
from lorabbit.state.base import JobEntry, JobStatus, StateStore
from lorabbit_server.engine.state import JobState, load_state
from lorabbit_server.engine.wait_reasons import BY_ITSELF, ClientObservations, WaitReason, wait_reasons
from lorabbit_server.health.dependencies import LEASE, STORE, DependencyHealth, HealthSnapshot
from lorabbit_server.server import Server

PROGRESS_READ = 2000
"""Newest progress messages that are looked through for the tasks under way."""
OVER = frozenset({"done", "failed", "cancelled"})


class JobSummary(BaseModel):
    """A job as an operator sees it."""

    model_config = ConfigDict(frozen=True)

    job: str
    status: JobStatus
    stage: str = "queued"
    round: int = 0
    rounds: int
    clients: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    waits: tuple[WaitReason, ...] = ()
    """Whom the job waits for; never empty before it is over."""
    reason: str = ""
    exit_code: int = 0
    submitted_ms: int = 0
    cancel_requested: bool = False
    server: str = ""
    """What the server that answers is: it leads, or stands by for another."""
    now_ms: int = 0
    """The server's clock, against which every other time is meant."""


class StatusService:
    """What one server can say of itself and of jobs. Safe to call from any thread."""

    def __init__(self, service: Server, dependencies: DependencyHealth, reader: StateStore) -> None:
        """Read jobs over `reader`, which must not try again for long."""
        self._service, self._dependencies, self._reader = service, dependencies, reader

    def status(self, job: str | None = None) -> JobSummary | None:
        """Say where a job stands, the newest when None; None when there is no such job.

        Raises StoreUnavailable where the store is away and this server knows nothing of the job.
        """
        found = self._dependencies.check()
        status = None
        if found.of(STORE) is None:
            with suppress(StoreUnavailable):
                name = job or newest(self._reader)
                status = None if name is None else status_of(self._reader, name, self._sight(name))
                return None if status is None else self._completed(status, found)
            found = self._dependencies.check()
        return self._completed(self._remembered(job, found), found)

    def _remembered(self, job: str | None, found: HealthSnapshot) -> JobSummary:
        """What this server knew last, while the store is away."""
        state, trouble = self._service.last_state, found.of(STORE)
        if state is None or (job is not None and job != state.job):
            raise StoreUnavailable(trouble.reason if trouble is not None else "the store was away for a moment")
        registry = self._service.registry
        return _running(state, ClientObservations(registry.heard_ms, self._lease_ms, silent_ms=registry.silent_ms))

    def _completed(self, status: JobSummary, found: HealthSnapshot) -> JobSummary:
        """Add what this server is, and the troubles that keep a job from going on."""
        leads = self._service.is_leading
        server = "this server leads" if leads else _stands_by(found)
        shown: dict[str, object] = {"server": server, "now_ms": self._service.now_ms()}
        if status.status not in OVER:
            own = self._service.faults.current(self._service.now_ms())
            troubles = [wait for wait in found.troubles if not ((leads or own) and wait.owner == LEASE)]
            shown["waits"] = (*([own] if own else []), *troubles, *status.waits)
        return status.model_copy(update=shown)

    def _sight(self, job: str) -> ClientObservations:
        """What is known of the clients: by this server itself where it leads, else by the store."""
        registry = self._service.registry
        heard, silent = registry.heard_ms, registry.silent_ms
        if not self._service.is_leading:
            entries = self._reader.clients().values()
            heard = silent = {e.client: e.expires_ms - self._lease_ms for e in entries if e.expires_ms}
        return ClientObservations(
            heard, self._lease_ms, progress_of(self._reader.newest_progress(job, PROGRESS_READ)), silent
        )

    @property
    def _lease_ms(self) -> int:
        return round(self._service.settings.client_lease_seconds * 1000)


def _stands_by(found: HealthSnapshot) -> str:
    if found.leader is None:
        return "this server stands by, and knows of no server that leads"
    return f"this server stands by: the lease is held by {found.leader}"


def progress_of(newest_first: Sequence[str]) -> Mapping[tuple[str, str, int], tuple[int, float]]:
    """The newest progress by client, phase and round."""
    told: dict[tuple[str, str, int], tuple[int, float]] = {}
    for text in newest_first:
        event = EVENTS.validate_json(text)
        if isinstance(event, TaskProgressed):
            told.setdefault((event.client, event.phase, event.round), (event.at_ms, event.fraction))
    return told


def newest(store: StateStore) -> str | None:
    """Name the job that was submitted last."""
    entries = store.jobs().values()
    return max(entries, key=lambda entry: entry.submitted_ms).job if entries else None


def clients_wanted(store: StateStore) -> int | None:
    """Return how many clients the job under way asks for, or else the next; None while the store is away."""
    try:
        jobs = [entry for entry in store.jobs().values() if entry.status in {"running", "queued"}]
    except StoreUnavailable:
        return None
    jobs.sort(key=lambda entry: entry.status != "running")
    return JobSpec.model_validate_json(jobs[0].spec).clients if jobs else 0


def status_of(store: StateStore, job: str, observations: ClientObservations | None = None) -> JobSummary | None:
    """Return a job's status from the store, which any server may read; None when there is no such job."""
    entries = store.jobs()
    entry = entries.get(job)
    if entry is None:
        return None
    spec = JobSpec.model_validate_json(entry.spec)
    record = store.load_job(job)
    about = {
        "status": entry.status,
        "reason": entry.reason,
        "exit_code": entry.exit_code,
        "submitted_ms": entry.submitted_ms,
        "cancel_requested": entry.cancel_requested,
    }
    if record.header is None:
        waits = () if entry.status in OVER else _cancelled(entry) or _queued(entry, list(entries.values()))
        return JobSummary.model_validate({"job": job, "rounds": spec.rounds, **about, "waits": waits})
    state = load_state(record.header, spec, record.tasks)
    status = _running(state, observations).model_copy(update=about)
    waits = () if entry.status in OVER else (*_cancelled(entry), *status.waits)
    return status.model_copy(update={"waits": waits})


def _running(state: JobState, observations: ClientObservations | None) -> JobSummary:
    """A job that has begun, from its state alone."""
    return JobSummary(
        job=state.job,
        status="running",
        stage=state.stage,
        round=state.round,
        rounds=state.spec.rounds,
        clients=state.clients,
        lost=state.lost,
        waits=wait_reasons(state, observations),
    )


def _cancelled(entry: JobEntry) -> tuple[WaitReason, ...]:
    """A job that an operator wants to end, until the server has ended it."""
    if not entry.cancel_requested:
        return ()
    reason = f"job {entry.job} is to be cancelled, and waits for the server that leads to end it"
    return (WaitReason(owner="server", reason=reason, ends=BY_ITSELF),)


def _queued(entry: JobEntry, entries: Sequence[JobEntry]) -> tuple[WaitReason, ...]:
    """Name the job that a queued one waits for."""
    if entry.status == "running":
        reason = f"job {entry.job} waits for the server: it is about to begin"
        return (WaitReason(owner="server", reason=reason, since_ms=entry.submitted_ms, ends=BY_ITSELF),)
    ahead = [e.job for e in entries if e.status == "running" and e.job != entry.job]
    ahead += [e.job for e in entries[: entries.index(entry)] if e.status == "queued"]
    if not ahead:
        reason = f"job {entry.job} is the next one, and waits for a server that leads"
        return (WaitReason(owner="server", reason=reason, since_ms=entry.submitted_ms, ends=BY_ITSELF),)
    others = "" if len(ahead) == 1 else f", and {len(ahead) - 1} more after it"
    return (
        WaitReason(
            owner=f"job {ahead[0]}",
            reason=f"job {entry.job} waits for job {ahead[0]}{others}: jobs run one after the other",
            since_ms=entry.submitted_ms,
            ends=f"once it is over; what that one waits for: lorabbit why {ahead[0]}",
        ),
    )
