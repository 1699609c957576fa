"""Updates in the engine: offered, received, rejected or failed; each is accepted at most once."""

from __future__ import annotations

from dataclasses import replace

from lorabbit.aggregation.partial_work import ClientSpeed
from lorabbit.events import job_events as ev
from lorabbit.job.schedules import Quorum
from lorabbit.types import EVALUATE, INITIALIZE, TRAIN
from lorabbit_server.engine import scheduling
from lorabbit_server.engine.rounds import (
    continue_aggregation,
    dispatch_more,
    exclude_client,
    finish_evaluation,
    on_update_accepted,
)
from lorabbit_server.engine.state import JobState, TaskState, UploadOffer
from lorabbit_server.engine.tasks import describe_task, send_commands, sorted_tasks, with_id
from lorabbit_server.engine.transitions import (
    AppendEvent,
    Command,
    Decision,
    DenyUpload,
    GrantUpload,
    MarkAccepted,
    OfferReceived,
    SendVerdict,
    StartMethod,
    TaskFailureReceived,
    UpdateFailedValidation,
    UpdateReceived,
    UpdatesUnusable,
)

TOO_STALE = "too-stale"
"""Reason to reject an update that started from a version older than the schedule allows."""
MAX_TRIES = 3
"""Attempts of one client at one task before the client is excluded."""


def on_offer_received(state: JobState, event: OfferReceived) -> Decision:
    """Grant the upload of an expected update; answer every other offer at once."""
    task = state.tasks.get(event.task)
    if task is None or task.client != event.client:
        return state, (_answer_unwanted(event, task),)
    if task.status == "accepted":
        return state, (SendVerdict(task.id, task.client, accepted=True),)
    invalid = _validate_offer(state, task, event)
    if invalid is not None:
        return on_update_failed_validation(state, invalid)
    if scheduling.is_too_stale(state, task):
        return _too_stale(state, task, DenyUpload(task.id, task.client, TOO_STALE), event.at_ms)
    task = replace(task, status="offered", offered=event.offered)
    state = replace(state, tasks={**state.tasks, task.id: task})
    if event.offered.payload is None:
        return on_update_received(state, UpdateReceived(task.id, event.traffic, event.at_ms))
    return state, (GrantUpload(task),)


def _validate_offer(state: JobState, task: TaskState, event: OfferReceived) -> UpdateFailedValidation | None:
    """Return why an offer is invalid: missing or unexpected tensors, or another base model."""
    wanted = False if task.phase == EVALUATE else event.wants_tensors
    if wanted is not None and wanted != (event.offered.payload is not None):
        detail = f"a result of phase {task.phase} {'needs a' if wanted else 'brings no'} payload here"
        return UpdateFailedValidation(task.id, "payload", detail, before_upload=True, at_ms=event.at_ms)
    if state.base_sha256 and event.offered.base_sha256 not in {None, state.base_sha256}:
        detail = "its base model is not the one that the first adapter was made on"
        return UpdateFailedValidation(task.id, "base-model", detail, before_upload=True, at_ms=event.at_ms)
    return None


def _answer_unwanted(event: OfferReceived, task: TaskState | None) -> Command:
    """Answer an offer for a task that is not, or no longer, this client's."""
    if task is not None:
        return DenyUpload(event.task, event.client, "not-yours")
    if event.was_accepted:
        return SendVerdict(event.task, event.client, accepted=True)
    return DenyUpload(event.task, event.client, "stale")


def on_update_received(state: JobState, event: UpdateReceived) -> Decision:
    """Accept an update once; continue the job if it was the last one required."""
    task = state.tasks.get(event.task)
    if task is None or task.offered is None or task.status == "accepted":
        return state, ()
    if scheduling.is_too_stale(state, task):
        verdict = SendVerdict(task.id, task.client, accepted=False, reason=TOO_STALE)
        return _too_stale(state, task, verdict, event.at_ms)
    done = _accept(state, task, task.offered, event)
    task = replace(task, status="accepted")
    state = replace(state, tasks={**state.tasks, task.id: task})
    if task.phase == INITIALIZE:
        state = replace(state, stage="starting", since_ms=event.at_ms)
        return state, (*done, StartMethod(task))
    if task.phase == EVALUATE:
        state, more = finish_evaluation(state, task.round, event.at_ms)
    else:
        state, more = on_update_accepted(_with_measurement(state, task, event.at_ms), event.at_ms)
    return state, (*done, *more)


def _with_measurement(state: JobState, task: TaskState, at_ms: int) -> JobState:
    """Record how long a training took, where deadlines, work shares or client selection depend on it."""
    took_ms = max(0, at_ms - task.since_ms)
    if isinstance(state.spec.schedule, Quorum):
        state = replace(state, took_ms={**state.took_ms, task.index: took_ms})
    selects = state.spec.selection is not None and state.spec.selection.order == "fast"
    if (state.spec.work is None and not selects) or task.offered is None:
        return state
    metrics = task.offered.metrics
    speed = ClientSpeed.measured(
        took_ms=took_ms, training_seconds=metrics.seconds, steps=metrics.steps, share=task.share
    )
    return state if speed is None else replace(state, speeds={**state.speeds, task.index: speed})


def _too_stale(state: JobState, task: TaskState, answer: Command, at_ms: int) -> Decision:
    """Reject an update from a version that is too old; its client starts again from the newest."""
    age, most = scheduling.staleness(state, task), getattr(state.spec.schedule, "max_staleness", 0)
    detail = f"it would be {age} versions old when it is folded; schedule.max_staleness is {most}"
    job_event = ev.UpdateRejected(at_ms=at_ms, round=state.round, client=task.client, reason=TOO_STALE, detail=detail)
    tasks = {id_: other for id_, other in state.tasks.items() if id_ != task.id}
    state, commands = dispatch_more(replace(state, tasks=tasks, turned_away=state.turned_away + 1), at_ms)
    return state, (answer, AppendEvent(job_event), *commands)


def _accept(state: JobState, task: TaskState, offered: UploadOffer, event: UpdateReceived) -> tuple[Command, ...]:
    """Mark an update as accepted, log it, and send the verdict."""
    trains = task.phase == TRAIN
    sha256 = offered.payload.sha256 if offered.payload else None
    job_event = ev.UpdateAccepted(
        at_ms=event.at_ms,
        round=state.round if trains else task.round,
        client=task.client,
        phase=task.phase,
        metrics=offered.metrics,
        sha256=sha256,
        bytes_up=event.traffic.bytes_up,
        bytes_down=offered.bytes_down,
        overhead_up=event.traffic.overhead_up,
        overhead_down=event.traffic.overhead_down,
        bytes_by_role=dict(offered.bytes_by_role),
        started=task.round - 1 if trains else 0,
        staleness=scheduling.staleness(state, task) if trains else 0,
        turn=task.turn,
        share=task.share,
        coding=event.coding,
    )
    verdict = SendVerdict(task.id, task.client, accepted=True)
    return MarkAccepted(task.id, sha256 or "-"), AppendEvent(job_event), verdict


def on_update_failed_validation(state: JobState, event: UpdateFailedValidation) -> Decision:
    """Reject an update and retry its task, at most `MAX_TRIES` times."""
    task = state.tasks.get(event.task)
    if task is None or task.status == "accepted":
        return state, ()
    answer: Command = (
        DenyUpload(task.id, task.client, event.reason)
        if event.before_upload
        else SendVerdict(task.id, task.client, accepted=False, reason=event.reason)
    )
    state, commands = _retry(state, task, event)
    return state, (answer, *commands)


def on_task_failure_received(state: JobState, event: TaskFailureReceived) -> Decision:
    """Exclude a client that reports bad input in the job; otherwise retry the task."""
    task = state.tasks.get(event.task)
    if task is None or task.client != event.client or task.status == "accepted":
        return state, ()
    if event.bad_input:
        return exclude_client(state, task.client, event.reason, event.at_ms, exit_code=2)
    return _retry(state, task, UpdateFailedValidation(task.id, "task-failed", event.reason, at_ms=event.at_ms))


def on_updates_unusable(state: JobState, event: UpdatesUnusable) -> Decision:
    """Drop updates that cannot be aggregated, exclude their clients, and continue with the others."""
    if state.stage not in {"starting", "aggregating"} or event.round != state.round:
        return state, ()
    commands: tuple[Command, ...] = ()
    found = [task for task in sorted_tasks(state.tasks) if task.id in event.reasons]
    if state.stage == "starting":
        state = replace(state, stage="initialising")
    tasks = {id_: task for id_, task in state.tasks.items() if id_ not in event.reasons}
    state = replace(state, tasks=tasks, batch=tuple(id_ for id_ in state.batch if id_ in tasks))
    for task in found:
        why = event.reasons[task.id]
        reason = why.partition(":")[0]
        job_event = ev.UpdateRejected(
            at_ms=event.at_ms,
            round=state.round,
            client=task.client,
            reason=reason,
            detail=why,
            started=task.round - 1 if task.phase == TRAIN else 0,
            turn=task.turn,
        )
        what = f"the {task.phase} result of {task.client} cannot be used: {why}"
        state, more = exclude_client(state, task.client, what, event.at_ms)
        commands += (AppendEvent(job_event), *more)
        if state.stage == "ended":
            return state, commands
    state, more = continue_aggregation(state, event.at_ms) if state.stage == "aggregating" else (state, ())
    return state, (*commands, *more)


def _retry(state: JobState, task: TaskState, event: UpdateFailedValidation) -> Decision:
    """Replace a failed task by one with a new id, or exclude its client after `MAX_TRIES`."""
    job_event = AppendEvent(
        ev.UpdateRejected(
            at_ms=event.at_ms,
            round=state.round if task.phase == TRAIN else task.round,
            client=task.client,
            reason=event.reason,
            detail=event.detail,
        )
    )
    if task.tries >= MAX_TRIES:
        what = f"{task.client} brought no usable result for {describe_task(task)} in {MAX_TRIES} tries"
        reason = f"{what}; the last one: {event.reason}: {event.detail}"
        state, commands = exclude_client(state, task.client, reason, event.at_ms)
        return state, (job_event, *commands)
    number = state.round if task.phase == TRAIN else task.round
    fresh = TaskState(
        "", task.phase, number, task.client, task.index, tries=task.tries + 1, turn=task.turn, since_ms=event.at_ms,
        share=task.share,
    )  # fmt: skip
    fresh = with_id(state.job, fresh)
    tasks = {id_: other for id_, other in state.tasks.items() if id_ != task.id}
    return replace(state, tasks={**tasks, fresh.id: fresh}), (job_event, *send_commands(fresh, event.at_ms))
