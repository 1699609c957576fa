"""Results in the engine: offered, arrived, refused, failed; each counts at most once."""

from __future__ import annotations

from dataclasses import replace

from lorabbit import events as ev
from lorabbit.types import EVALUATE, INITIALISE
from lorabbit_server.asking import name_of, new_task, send
from lorabbit_server.jobstate import JobState, Offered, TaskState
from lorabbit_server.rounds import close, end, round_is_complete, scored
from lorabbit_server.steps import (
    Command,
    CountResult,
    Decision,
    DenyUpload,
    GrantUpload,
    Record,
    ResultArrived,
    ResultOffered,
    ResultRefused,
    SendVerdict,
    StartMethod,
    TaskFailed,
)

MAX_TRIES = 3
"""Results asked of one client for one task before the job gives up."""


def offered(state: JobState, event: ResultOffered) -> Decision:
    """Grant the upload of a result that is wanted; answer every other offer at once."""
    task = state.tasks.get(event.task)
    if task is None or task.client != event.client:
        return state, (_unwanted(event, task),)
    if task.status == "accepted":
        return state, (SendVerdict(task.id, task.client, accepted=True),)
    wanted = False if task.phase == EVALUATE else event.wants_tensors
    if wanted is not None and wanted != (event.offered.payload is not None):
        detail = f"a result of phase {task.phase} {'needs a' if wanted else 'brings no'} payload here"
        return refused(state, ResultRefused(task.id, "payload", detail, before_upload=True, at_ms=event.at_ms))
    if state.base_sha256 and event.offered.base_sha256 not in {None, state.base_sha256}:
        detail = "its base model is not the one that the first adapter was made on"
        return refused(state, ResultRefused(task.id, "base-model", detail, before_upload=True, at_ms=event.at_ms))
    task = replace(task, status="offered", offered=event.offered)
    state = replace(state, tasks={**state.tasks, task.id: task})
    if event.offered.payload is None:
        return arrived(state, ResultArrived(task.id, event.traffic, event.at_ms))
    return state, (GrantUpload(task),)


def _unwanted(event: ResultOffered, task: TaskState | None) -> Command:
    """Answer an offer for a task that is no longer, or never was, this client's."""
    if task is not None:
        return DenyUpload(event.task, event.client, "not-yours")
    if event.counted:
        return SendVerdict(event.task, event.client, accepted=True)
    return DenyUpload(event.task, event.client, "stale")


def arrived(state: JobState, event: ResultArrived) -> Decision:
    """Count a result, once, and go on when it was the last one awaited."""
    task = state.tasks.get(event.task)
    if task is None or task.offered is None or task.status == "accepted":
        return state, ()
    done = _accepted(task, task.offered, event)
    task = replace(task, status="accepted")
    state = replace(state, tasks={**state.tasks, task.id: task})
    if task.phase == INITIALISE:
        state = replace(state, stage="starting", since_ms=event.at_ms)
        return state, (*done, StartMethod(task))
    if task.phase == EVALUATE:
        state, more = scored(state, task.round, event.at_ms)
    elif round_is_complete(state):
        state, more = close(state, event.at_ms)
    else:
        more = ()
    return state, (*done, *more)


def _accepted(task: TaskState, offered: Offered, event: ResultArrived) -> tuple[Command, ...]:
    """Count a result, tell the log and let the client forget it."""
    sha256 = offered.payload.sha256 if offered.payload else None
    told = ev.UpdateAccepted(
        at_ms=event.at_ms,
        round=task.round,
        client=task.client,
        phase=task.phase,
        metrics=offered.metrics,
        sha256=sha256,
        bytes_up=event.traffic.bytes_up,
        bytes_down=offered.bytes_down,
        overhead_up=event.traffic.overhead_up,
        overhead_down=event.traffic.overhead_down,
        bytes_by_role=dict(offered.bytes_by_role),
    )
    verdict = SendVerdict(task.id, task.client, accepted=True)
    return CountResult(task.id, sha256 or "-"), Record(told), verdict


def refused(state: JobState, event: ResultRefused) -> Decision:
    """Count a refusal under its name and ask the client again, a bounded number of times."""
    task = state.tasks.get(event.task)
    if task is None or task.status == "accepted":
        return state, ()
    answer: Command = (
        DenyUpload(task.id, task.client, event.reason)
        if event.before_upload
        else SendVerdict(task.id, task.client, accepted=False, reason=event.reason)
    )
    state, commands = _again(state, task, event)
    return state, (answer, *commands)


def task_failed(state: JobState, event: TaskFailed) -> Decision:
    """End the job on bad input, which no client can mend; otherwise ask again."""
    task = state.tasks.get(event.task)
    if task is None or task.client != event.client or task.status == "accepted":
        return state, ()
    if event.bad_input:
        return end(state, "failed", event.at_ms, reason=event.reason, exit_code=2)
    return _again(state, task, ResultRefused(task.id, "task-failed", event.reason, at_ms=event.at_ms))


def _again(state: JobState, task: TaskState, event: ResultRefused) -> Decision:
    """Put a task with a new id in the place of one that brought nothing, or give up."""
    told = Record(
        ev.UpdateRejected(
            at_ms=event.at_ms, round=task.round, client=task.client, reason=event.reason, detail=event.detail
        )
    )
    if task.tries >= MAX_TRIES:
        what = f"{task.client} brought no usable result for {name_of(task)} in {MAX_TRIES} tries"
        reason = f"{what}; the last one: {event.reason}: {event.detail}"
        state, commands = end(state, "failed", event.at_ms, reason=reason, exit_code=1)
        return state, (told, *commands)
    fresh = new_task(state, task.phase, task.index, round_number=task.round, tries=task.tries + 1)
    fresh = replace(fresh, since_ms=event.at_ms)
    tasks = {id_: other for id_, other in state.tasks.items() if id_ != task.id}
    return replace(state, tasks={**tasks, fresh.id: fresh}), (told, *send(fresh, event.at_ms))
