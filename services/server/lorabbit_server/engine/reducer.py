"""The round engine: `decide(state, event) -> (state, commands)`, pure.

A job gathers its population, lets one client build the model (`INITIALIZE`), then runs rounds: ask
a cohort, wait for its results, aggregate, score. Whatever the order of arrival, the same results
lead to the same state. An event that comes twice, late or from the wrong client changes nothing
but a refusal count.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorabbit.events import job_events as ev
from lorabbit.methods import compatibility
from lorabbit.methods.registry import METHODS
from lorabbit.types import DEFAULT_CAPABILITIES, INITIALIZE, ClientId
from lorabbit_server.engine import client_selection, results, rounds, scheduling
from lorabbit_server.engine.rounds import exclude_client, reassign_lost_evaluations
from lorabbit_server.engine.state import JobState
from lorabbit_server.engine.tasks import dispatch_tasks, send_commands, sorted_tasks
from lorabbit_server.engine.transitions import (
    AppendEvent,
    CancelRequested,
    ClientDisconnected,
    ClientExcluded,
    Command,
    DeadlinePassed,
    Decision,
    DeferredCommand,
    DenyUpload,
    Event,
    GrantUpload,
    HelloReceived,
    JobOpened,
    MethodStarted,
    OfferReceived,
    RoundAggregated,
    SendCancelTask,
    SendVerdict,
    ServerWorkFailed,
    SetDeadline,
    StartMethod,
    TaskFailureReceived,
    UpdateFailedValidation,
    UpdateReceived,
    UpdatesUnusable,
)

_HANDLERS: Mapping[type[Event], Callable[[JobState, Any], Decision]] = {
    OfferReceived: results.on_offer_received,
    UpdateReceived: results.on_update_received,
    UpdateFailedValidation: results.on_update_failed_validation,
    TaskFailureReceived: results.on_task_failure_received,
    MethodStarted: rounds.on_method_started,
    RoundAggregated: rounds.on_round_aggregated,
    UpdatesUnusable: results.on_updates_unusable,
    DeadlinePassed: rounds.on_deadline_passed,
}


def decide(state: JobState, event: Event) -> Decision:
    """Return the state after an event, and the commands to perform."""
    if state.stage == "ended":
        return _after_end(state, event)
    match event:
        case JobOpened() | HelloReceived() | ClientDisconnected():
            return _on_presence(state, event)
        case ClientExcluded():
            return _on_client_excluded(state, event)
        case ServerWorkFailed():
            return rounds.end(state, "failed", event.at_ms, reason=event.reason, exit_code=event.exit_code)
        case CancelRequested():
            return rounds.end(state, "cancelled", event.at_ms, reason="cancelled by an operator", exit_code=130)
        case _:
            return _HANDLERS[type(event)](state, event)


def resume(state: JobState) -> tuple[DeferredCommand, ...]:
    """Return the commands that a restarted server must repeat, because no message or record holds them."""
    if state.stage == "starting":
        return tuple(StartMethod(task) for task in state.tasks.values())
    folding = (rounds.aggregation(state),) if state.stage == "aggregating" else ()
    granted = tuple(GrantUpload(task) for task in sorted_tasks(state.tasks) if task.status == "offered")
    deadline = () if state.deadline_ms is None else (SetDeadline(state.round, state.deadline_ms),)
    return (*folding, *granted, *deadline)


def _on_presence(state: JobState, event: JobOpened | HelloReceived | ClientDisconnected) -> Decision:
    """Start the job once the population is complete; afterwards track lost clients."""
    if state.stage == "gathering":
        return _gather_population(state, event)
    match event:
        case HelloReceived() if event.client in state.clients:
            state, commands = _on_client_returned(state, event)
        case HelloReceived() if _may_join(state, event):
            state, commands = _on_client_joined(state, event)
        case ClientDisconnected() if event.client in state.clients and event.client not in state.lost:
            state, commands = _on_client_disconnected(state, event)
        case _:
            return state, ()
    state, scores = reassign_lost_evaluations(state, event.at_ms)
    state, trainings = rounds.dispatch_more(state, event.at_ms)
    return state, (*commands, *scores, *trainings)


def _on_client_disconnected(state: JobState, event: ClientDisconnected) -> Decision:
    """Mark a client as lost."""
    lost = [*state.lost]
    insort(lost, event.client, key=client_selection.natural)
    job_event = AppendEvent(ev.ClientLost(at_ms=event.at_ms, client=event.client))
    return replace(state, lost=tuple(lost)), (job_event,)


def _on_client_excluded(state: JobState, event: ClientExcluded) -> Decision:
    """Continue without a client."""
    left = ClientDisconnected(event.client, event.present, event.at_ms)
    state, commands = _on_presence(state, left)
    if state.stage in {"gathering", "ended"}:
        return state, commands
    state, more = exclude_client(state, event.client, event.reason, event.at_ms)
    return state, (*commands, *more)


def _gather_population(state: JobState, event: JobOpened | HelloReceived | ClientDisconnected) -> Decision:
    """Wait for the population; once it is complete, let its first client build the model."""
    state, suited = _matching(state, event)
    state = replace(state, present=len(suited), since_ms=state.since_ms or event.at_ms)
    joined: tuple[Command, ...] = ()
    if isinstance(event, HelloReceived) and event.is_new:
        joined = (AppendEvent(ev.ClientJoined(at_ms=event.at_ms, client=event.client, device=event.device)),)
    if len(suited) < state.spec.clients:
        return state, joined
    clients = client_selection.population(suited, state.spec.clients)
    state = replace(
        state, stage="initialising", clients=clients, since_ms=event.at_ms, declared={}, present=0, unsuited=0
    )
    started = AppendEvent(ev.JobStarted(at_ms=event.at_ms, clients=clients))
    state, commands = dispatch_tasks(state, INITIALIZE, [0], round_number=0, at_ms=event.at_ms)
    return state, (*joined, started, *commands)


def _matching(
    state: JobState, event: JobOpened | HelloReceived | ClientDisconnected
) -> tuple[JobState, Sequence[ClientId]]:
    """The connected clients that the job accepts; their capabilities are kept until it starts."""
    selection, needed = state.spec.selection, client_selection.requirements_of(state.spec)
    if selection is None and needed == client_selection.NO_REQUIREMENTS:
        return state, event.present
    declared = dict(state.declared)
    if isinstance(event, JobOpened):
        declared.update(event.declared)
    elif isinstance(event, HelloReceived):
        declared[event.client] = event.declared
    suited = [
        c for c in event.present if client_selection.matches(selection, declared.get(c, DEFAULT_CAPABILITIES), needed)
    ]
    return replace(state, declared=declared, unsuited=len(event.present) - len(suited)), suited


def _on_client_joined(state: JobState, event: HelloReceived) -> Decision:
    """Add a late client to the population of a job whose clients have their own data."""
    index = len(state.clients)
    job_event = AppendEvent(ev.ClientJoined(at_ms=event.at_ms, client=event.client, device=event.device, index=index))
    return replace(state, clients=(*state.clients, event.client)), (job_event,)


def _may_join(state: JobState, event: HelloReceived) -> bool:
    """Whether a client can join the running job."""
    spec = state.spec
    prepares = METHODS[spec.method.name].prepares
    suits = client_selection.matches(spec.selection, event.declared, client_selection.requirements_of(spec))
    return suits and compatibility.takes_in(spec, prepares=prepares)


def _on_client_returned(state: JobState, event: HelloReceived) -> Decision:
    """Send a returned client its open tasks again, with the same ids and seeds."""
    commands: list[Command] = []
    if event.client in state.lost:
        commands.append(AppendEvent(ev.ClientJoined(at_ms=event.at_ms, client=event.client, device=event.device)))
    tasks = dict(state.tasks)
    for task in sorted_tasks(state.tasks):
        if task.client != event.client or task.status == "accepted" or task.id in event.outbox:
            continue
        if scheduling.is_too_stale(state, task) or (event.client in state.lost and scheduling.is_behind(state, task)):
            del tasks[task.id]
            commands.append(SendCancelTask(task.id, task.client))
            continue
        again = replace(task, attempt=task.attempt + 1, status="open", offered=None)
        tasks[task.id] = again
        commands += send_commands(again, event.at_ms)
    lost = tuple(client for client in state.lost if client != event.client)
    return replace(state, lost=lost, tasks=tasks), tuple(commands)


def _after_end(state: JobState, event: Event) -> Decision:
    """Answer late offers, so that clients can delete their updates."""
    if not isinstance(event, OfferReceived):
        return state, ()
    if event.was_accepted:
        return state, (SendVerdict(event.task, event.client, accepted=True),)
    return state, (DenyUpload(event.task, event.client, "job-ended"),)
