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
from lorabbit_server.engine.rounds import exclude_client, scores_without_lost
from lorabbit_server.engine.state import JobState
from lorabbit_server.engine.tasks import dispatch_tasks, in_order, send
from lorabbit_server.engine.transitions import (
    AppendEvent,
    CancelRequested,
    ClientDismissed,
    ClientLeft,
    Command,
    DeadlinePassed,
    Decision,
    DenyUpload,
    Event,
    GrantUpload,
    Heavy,
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

_STEPS: Mapping[type[Event], Callable[[JobState, Any], Decision]] = {
    OfferReceived: results.on_offer,
    UpdateReceived: results.on_update,
    UpdateFailedValidation: results.on_invalid_update,
    TaskFailureReceived: results.on_task_failed,
    MethodStarted: rounds.method_started,
    RoundAggregated: rounds.round_aggregated,
    UpdatesUnusable: results.on_unusable_updates,
    DeadlinePassed: rounds.deadline_passed,
}


def decide(state: JobState, event: Event) -> Decision:
    """Return the state after an event, and what to do about it."""
    if state.stage == "ended":
        return _after_the_end(state, event)
    match event:
        case JobOpened() | HelloReceived() | ClientLeft():
            return _on_presence(state, event)
        case ClientDismissed():
            return _on_client_dismissed(state, event)
        case ServerWorkFailed():
            return rounds.end(state, "failed", event.at_ms, reason=event.reason, exit_code=event.exit_code)
        case CancelRequested():
            return rounds.end(state, "cancelled", event.at_ms, reason="cancelled by an operator", exit_code=130)
        case _:
            return _STEPS[type(event)](state, event)


def resume(state: JobState) -> tuple[Heavy, ...]:
    """Return the commands that a restarted server must give again, because nothing on the wire holds them."""
    if state.stage == "starting":
        return tuple(StartMethod(task) for task in state.tasks.values())
    folding = (rounds.aggregation(state),) if state.stage == "aggregating" else ()
    granted = tuple(GrantUpload(task) for task in in_order(state.tasks) if task.status == "offered")
    deadline = () if state.deadline_ms is None else (SetDeadline(state.round, state.deadline_ms),)
    return (*folding, *granted, *deadline)


def _on_presence(state: JobState, event: JobOpened | HelloReceived | ClientLeft) -> Decision:
    """Start once the population is complete; afterwards keep count of who is lost."""
    if state.stage == "gathering":
        return _gather(state, event)
    match event:
        case HelloReceived() if event.client in state.clients:
            state, commands = _on_return(state, event)
        case HelloReceived() if _joins(state, event):
            state, commands = _join(state, event)
        case ClientLeft() if event.client in state.clients and event.client not in state.lost:
            state, commands = _on_client_lost(state, event)
        case _:
            return state, ()
    state, scores = scores_without_lost(state, event.at_ms)
    state, trainings = rounds.dispatch_more(state, event.at_ms)
    return state, (*commands, *scores, *trainings)


def _on_client_lost(state: JobState, event: ClientLeft) -> Decision:
    """Count a client among those who are lost."""
    lost = [*state.lost]
    insort(lost, event.client, key=client_selection.natural)
    told = AppendEvent(ev.ClientLost(at_ms=event.at_ms, client=event.client))
    return replace(state, lost=tuple(lost)), (told,)


def _on_client_dismissed(state: JobState, event: ClientDismissed) -> Decision:
    """Do without a client; it is not awaited."""
    left = ClientLeft(event.client, event.present, event.at_ms)
    state, commands = _on_presence(state, left)
    if state.stage in {"gathering", "ended"}:
        return state, commands
    state, more = exclude_client(state, event.client, event.reason, event.at_ms)
    return state, (*commands, *more)


def _gather(state: JobState, event: JobOpened | HelloReceived | ClientLeft) -> Decision:
    """Wait for the population; when it is there, let its first client build the model."""
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


def _matching(state: JobState, event: JobOpened | HelloReceived | ClientLeft) -> tuple[JobState, Sequence[ClientId]]:
    """Those of the clients who are here that the job takes in; what they declared is kept while it gathers."""
    selection, needed = state.spec.selection, client_selection.requirements_of(state.spec)
    if selection is None and needed == client_selection.NOTHING:
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


def _join(state: JobState, event: HelloReceived) -> Decision:
    """Give a client that comes later the next index of a job whose clients hold data of their own."""
    index = len(state.clients)
    told = AppendEvent(ev.ClientJoined(at_ms=event.at_ms, client=event.client, device=event.device, index=index))
    return replace(state, clients=(*state.clients, event.client)), (told,)


def _joins(state: JobState, event: HelloReceived) -> bool:
    """Tell whether a client that is not of the population becomes so."""
    spec = state.spec
    prepares = METHODS[spec.method.name].prepares
    suits = client_selection.matches(spec.selection, event.declared, client_selection.requirements_of(spec))
    return suits and compatibility.takes_in(spec, prepares=prepares)


def _on_return(state: JobState, event: HelloReceived) -> Decision:
    """Send a returned client its open tasks again: the same ids and seeds, so the same results."""
    commands: list[Command] = []
    if event.client in state.lost:
        commands.append(AppendEvent(ev.ClientJoined(at_ms=event.at_ms, client=event.client, device=event.device)))
    tasks = dict(state.tasks)
    for task in in_order(state.tasks):
        if task.client != event.client or task.status == "accepted" or task.id in event.outbox:
            continue
        if scheduling.is_too_stale(state, task) or (event.client in state.lost and scheduling.is_behind(state, task)):
            del tasks[task.id]
            commands.append(SendCancelTask(task.id, task.client))
            continue
        again = replace(task, attempt=task.attempt + 1, status="open", offered=None)
        tasks[task.id] = again
        commands += send(again, event.at_ms)
    lost = tuple(client for client in state.lost if client != event.client)
    return replace(state, lost=lost, tasks=tasks), tuple(commands)


def _after_the_end(state: JobState, event: Event) -> Decision:
    """Answer those who still offer results, so that they can forget them."""
    if not isinstance(event, OfferReceived):
        return state, ()
    if event.counted:
        return state, (SendVerdict(event.task, event.client, accepted=True),)
    return state, (DenyUpload(event.task, event.client, "job-ended"),)
