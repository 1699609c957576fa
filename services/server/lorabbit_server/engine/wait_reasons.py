"""Wait reasons: whom a job waits for at this moment, since when, until when, and what ends the wait.

Pure: it reads the engine's state and what a server has seen of the clients. A job that has not ended always
waits for somebody, so the answer is never empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from lorabbit.job.schedules import Buffered, Quorum
from lorabbit.types import EVALUATE, INITIALIZE, TRAIN
from lorabbit_server.engine import client_selection
from lorabbit_server.engine.results import MAX_TRIES
from lorabbit_server.engine.state import JobState, TaskState

BY_ITSELF = "it ends by itself"


class WaitReason(BaseModel):
    """Somebody or something a job waits for."""

    model_config = ConfigDict(frozen=True)

    owner: str
    """A client, a job, the server, the broker, the store, or the operator."""
    reason: str
    """Who waits for whom, and what is being done."""
    since_ms: int = 0
    deadline_ms: int | None = None
    """When something happens by itself: see `ends`. None where nothing but the owner ends the wait."""
    ends: str = ""
    """What happens at the deadline, or what ends a wait that has none."""
    fraction: float | None = None
    """How much of its task a client has done, in [0, 1], where it told."""
    moved_ms: int | None = None
    """When it told of progress last."""
    seen_ms: int | None = None
    """When the client was heard of last."""


@dataclass(frozen=True, slots=True)
class ClientObservations:
    """What a server has seen of clients, beside the states of jobs."""

    heard_ms: Mapping[str, int] = field(default_factory=dict)
    """When each client was heard of last."""
    lease_ms: int = 0
    """Silence after which a client counts as lost."""
    progress: Mapping[tuple[str, str, int], tuple[int, float]] = field(default_factory=dict)
    """Newest progress by client, phase and round: when it was told, and the fraction done."""
    silent_ms: Mapping[str, int] = field(default_factory=dict)
    """Since when each client counts as silent where the job's patience with it ends."""

    def fraction(self, task: TaskState) -> float | None:
        """How far a task is, None where nothing was told of this try of it."""
        return None if self.moved_ms(task) is None else self.progress[task.client, task.phase, task.round][1]

    def moved_ms(self, task: TaskState) -> int | None:
        """When progress was told last of this try of a task."""
        job_event = self.progress.get((task.client, task.phase, task.round))
        return None if job_event is None or job_event[0] < task.since_ms else job_event[0]

    def seen_ms(self, task: TaskState) -> int | None:
        """When a task's client was heard of last."""
        job_event = self.progress.get((task.client, task.phase, task.round), (0, 0.0))
        seen = max(job_event[0], self.heard_ms.get(task.client, 0))
        return seen or None


def wait_reasons(state: JobState, observations: ClientObservations | None = None) -> tuple[WaitReason, ...]:
    """Say whom a job waits for, whatever it is at; what the next step hangs on comes first."""
    observations = observations or ClientObservations()
    if state.stage == "gathering":
        return (_population(state),)
    open_ones = [task for task in state.tasks.values() if task.status != "accepted"]
    open_ones.sort(key=lambda task: (task.phase == EVALUATE, task.round, task.index, task.turn))
    found = (*_server(state), *_clients(state, open_ones, observations))
    return found or (_nobody(state),)


def _population(state: JobState) -> WaitReason:
    """The clients that a job lacks to begin."""
    wanted, here = state.spec.clients, state.present
    lacking = max(0, wanted - here)
    more = "client" if lacking == 1 else "clients"
    unmet = client_selection.requirements_of(state.spec).unmet_by_any(state.declared.values())
    asked = client_selection.describe(state.spec.selection, unmet)
    which = f" with {asked}" if asked else ""
    others = f"; {state.unsuited} others are here, but not such" if state.unsuited else ""
    return WaitReason(
        owner="operator",
        reason=f"job {state.job} waits for {lacking} more {more}{which}: {here} of {wanted} needed are connected"
        + others,
        since_ms=state.since_ms,
        ends="no deadline; start clients with `lorabbit client`, or cancel the job",
    )


def _server(state: JobState) -> Iterator[WaitReason]:
    """What the server itself is at."""
    doing = {
        "starting": f"job {state.job} waits for the server: it makes the first adapter",
        "aggregating": f"round {state.round} waits for the server: it aggregates {_results(state)}",
        "ended": f"job {state.job} waits for the server: it writes the run folder",
    }.get(state.stage)
    if doing is not None:
        yield WaitReason(owner="server", reason=doing, since_ms=state.since_ms, ends=BY_ITSELF)


def _results(state: JobState) -> str:
    accepted = [t for t in state.tasks.values() if t.phase == TRAIN and t.status == "accepted"]
    number = len(state.batch) or len(accepted)
    return f"{number} update{'' if number == 1 else 's'}"


def _clients(state: JobState, tasks: Iterable[TaskState], observations: ClientObservations) -> Iterator[WaitReason]:
    """What clients are at, task by task."""
    for task in tasks:
        lost = task.client in state.lost
        deadline_ms, ends = _end_of(state, task, observations)
        yield WaitReason(
            owner=task.client,
            reason=f"{_waiting(state, task)} {_doing(task, observations, lost=lost)}",
            since_ms=task.since_ms,
            deadline_ms=deadline_ms,
            ends=ends,
            fraction=None if lost or task.status == "offered" else observations.fraction(task),
            moved_ms=None if lost or task.status == "offered" else observations.moved_ms(task),
            seen_ms=observations.seen_ms(task),
        )


def _waiting(state: JobState, task: TaskState) -> str:
    """Who waits for a client."""
    if task.phase == INITIALIZE:
        return f"job {state.job} waits for {task.client}:"
    if task.phase == EVALUATE:
        return f"the score of round {task.round} waits for {task.client}:"
    if task.round == 0:
        return f"the preparation waits for {task.client}:"
    if task.round < state.round:
        return f"an update that started from version {task.round - 1} is awaited from {task.client}:"
    return f"round {task.round} waits for {task.client}:"


def _doing(task: TaskState, observations: ClientObservations, *, lost: bool) -> str:
    """What a client is doing."""
    tries = f" (try {task.tries} of {MAX_TRIES})" if task.tries > 1 else ""
    if lost:
        return f"lost; start it again, or another client in its place{tries}"
    if task.status == "offered":
        return f"uploading its result{tries}"
    if observations.fraction(task) is None and task.phase != INITIALIZE:
        return f"asked, but it has told of no progress yet{tries}"
    names = {INITIALIZE: "building the model and the first adapter", EVALUATE: "scoring"}
    return names.get(task.phase, "training" if task.round else "preparing") + tries


def _end_of(state: JobState, task: TaskState, observations: ClientObservations) -> tuple[int | None, str]:
    """When and how a client's task ends without it."""
    trains = task.phase not in {INITIALIZE, EVALUATE}
    if trains and state.deadline_ms is not None:
        return state.deadline_ms, "then the round closes with what there is"
    if task.client in state.lost:
        if trains and isinstance(state.spec.schedule, Buffered):
            return None, "no deadline, and none is needed: the others go on without it"
        return _patience(state, observations.silent_ms.get(task.client))
    heard, then = observations.heard_ms.get(task.client), f"it counts as lost{_without(state, trains=trains)}"
    if heard is None or not observations.lease_ms:
        return None, f"once it stays silent for the length of its lease {then}"
    return heard + observations.lease_ms, f"if it stays silent until then {then}"


def _without(state: JobState, *, trains: bool) -> str:
    """Say why a round has no deadline of its own."""
    if not trains or isinstance(state.spec.schedule, Buffered):
        return ""
    why = "nobody was measured yet" if isinstance(state.spec.schedule, Quorum) else "schedule sync waits for everybody"
    return f"; the round itself has no deadline: {why}"


def _patience(state: JobState, silent_ms: int | None) -> tuple[int | None, str]:
    """When a job gives up a client that is lost."""
    patience = state.spec.patience_seconds
    if patience is None:
        return None, "no deadline (patience_seconds: null); only its return, or cancelling the job, ends this wait"
    left = len(state.clients) - len(state.aside) - 1
    then = "goes on with the others" if left >= state.spec.fewest_clients else "ends, for too few clients are left"
    if silent_ms is None:
        return None, f"once it is lost for {patience:.0f} s (patience_seconds) the job {then}"
    return silent_ms + round(1000 * patience), f"then it is set aside (patience_seconds), and the job {then}"


def _nobody(state: JobState) -> WaitReason:
    """A stage in which nobody has anything to do, which only an operator can end."""
    return WaitReason(
        owner="operator",
        reason=f"round {state.round} waits for clients that may be asked: every one is busy, lost or not suited",
        since_ms=state.since_ms,
        deadline_ms=state.deadline_ms,
        ends="then they are asked again" if state.deadline_ms else "no deadline; start clients, or cancel the job",
    )
