"""What a job waits for right now: every wait with its owner, since when, and why."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from lorabbit.errors import StoreUnavailable
from lorabbit.jobspec import JobSpec
from lorabbit.state.base import JobEntry, JobStatus, StateStore
from lorabbit.types import EVALUATE, INITIALISE
from lorabbit_server.jobstate import JobState, TaskState, load_state


class Wait(BaseModel):
    """Somebody a job waits for."""

    model_config = ConfigDict(frozen=True)

    owner: str
    """A client, the server, or the operator."""
    reason: str
    since_ms: int = 0
    deadline_ms: int | None = None
    """When the wait ends by itself; None where nothing but its owner ends it."""


class Status(BaseModel):
    """A job as an operator sees it."""

    model_config = ConfigDict(frozen=True)

    job: str
    status: JobStatus
    stage: str = "queued"
    round: int = 0
    rounds: int
    clients: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    waits: tuple[Wait, ...] = ()
    reason: str = ""
    exit_code: int = 0
    submitted_ms: int = 0
    cancel_requested: bool = False


def clients_wanted(store: StateStore) -> int | None:
    """Return how many clients the job under way asks for, or else the next; None while the store is away."""
    try:
        jobs = [entry for entry in store.jobs().values() if entry.status in {"running", "queued"}]
    except StoreUnavailable:
        return None
    jobs.sort(key=lambda entry: entry.status != "running")
    return JobSpec.model_validate_json(jobs[0].spec).clients if jobs else 0


def status_of(store: StateStore, job: str) -> Status | None:
    """Return a job's status from the store, which any server may read; None when there is no such job."""
    entries = store.jobs()
    entry = entries.get(job)
    if entry is None:
        return None
    spec = JobSpec.model_validate_json(entry.spec)
    record = store.load_job(job)
    common = {"job": job, "status": entry.status, "rounds": spec.rounds, "reason": entry.reason}
    common |= {"exit_code": entry.exit_code, "submitted_ms": entry.submitted_ms}
    common |= {"cancel_requested": entry.cancel_requested}
    if record.header is None:
        return Status.model_validate({**common, "waits": _queued(entry, list(entries.values()))})
    state = load_state(record.header, spec, record.tasks)
    waits = () if entry.status in {"done", "failed", "cancelled"} else waits_of(state)
    shown = {"stage": state.stage, "round": state.round, "clients": state.clients, "lost": state.lost}
    return Status.model_validate({**common, **shown, "waits": waits})


def waits_of(state: JobState) -> tuple[Wait, ...]:
    """Say whom a job waits for."""
    match state.stage:
        case "gathering":
            lacking = state.spec.clients - state.present
            reason = (
                f"{state.present} of {state.spec.clients} clients are here; start {lacking} more with `lorabbit client`"
            )
            return (Wait(owner="operator", reason=reason, since_ms=state.since_ms),)
        case "starting" | "aggregating":
            what = "makes the first adapter" if state.stage == "starting" else f"aggregates round {state.round}"
            server: tuple[Wait, ...] = (Wait(owner="server", reason=f"the server {what}", since_ms=state.since_ms),)
        case "ended":
            server = (Wait(owner="server", reason="the server writes the run folder", since_ms=state.since_ms),)
        case _:
            server = ()
    tasks = [task for task in state.tasks.values() if task.status != "accepted"]
    tasks.sort(key=lambda task: (task.phase == EVALUATE, task.round, task.index))
    return server + tuple(
        Wait(
            owner=task.client,
            reason=_why(task, lost=task.client in state.lost),
            since_ms=task.since_ms,
            deadline_ms=None if task.phase == EVALUATE else state.deadline_ms,
        )
        for task in tasks
    )


def _why(task: TaskState, *, lost: bool) -> str:
    """Say what a client is expected to do."""
    what = {INITIALISE: "builds the model", EVALUATE: f"scores the adapter of round {task.round}"}
    doing = what.get(task.phase, f"trains in round {task.round}" if task.round else "prepares the job")
    if task.status == "offered":
        doing = f"uploads its result of round {task.round}"
    tries = f" (try {task.tries})" if task.tries > 1 else ""
    gone = ", but has not been heard of; start it again, or another client in its place" if lost else ""
    return f"{task.client} {doing}{tries}{gone}"


def _queued(entry: JobEntry, entries: Sequence[JobEntry]) -> tuple[Wait, ...]:
    """Name the job that a queued one waits for."""
    if entry.status == "running":
        return (Wait(owner="server", reason="the server is about to begin", since_ms=entry.submitted_ms),)
    if entry.status != "queued":
        return ()
    ahead = [e.job for e in entries[: entries.index(entry)] if e.status in {"queued", "running"}]
    owner = f"job {ahead[-1]}" if ahead else "server"
    reason = f"jobs run one after the other; {len(ahead)} are ahead" if ahead else "no server holds the lease yet"
    return (Wait(owner=owner, reason=reason, since_ms=entry.submitted_ms),)
