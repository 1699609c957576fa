"""Clients that a job can do without: set aside for good, and the round goes on with the others.

A client is set aside when nothing that it brought in several tries could be used, when it says that the job itself
is wrong, when what it brought cannot be folded, or when an operator revoked it. One client alone therefore ends no
job in which enough others could go on; `min_clients` says how many that is.
"""

from __future__ import annotations

from dataclasses import replace

from lorabbit import events as ev
from lorabbit.schedules import Buffered
from lorabbit.types import EVALUATE, INITIALISE, TRAIN, ClientId
from lorabbit_server import budget, pace
from lorabbit_server.asking import ask, in_order
from lorabbit_server.jobstate import JobState
from lorabbit_server.rounds import close, end, evaluators, on_counted, scored
from lorabbit_server.steps import CancelTask, Command, Decision, Record

FAILED = 1


def set_aside(state: JobState, client: ClientId, reason: str, at_ms: int, *, exit_code: int = FAILED) -> Decision:
    """Ask a client no more and go on without it; end the job, with this reason and code, where too few are left."""
    if client in state.aside or client not in state.clients:
        return state, ()
    state = replace(state, aside=(*state.aside, client))
    told = Record(ev.ClientSetAside(at_ms=at_ms, client=client, reason=reason))
    left, wanted = len(state.clients) - len(state.aside), state.spec.fewest_clients
    if left < wanted:
        if exit_code == FAILED:
            reason = f"{reason}; {left} of {len(state.clients)} clients are left, and min_clients is {wanted}"
        state, commands = end(state, "failed", at_ms, reason=reason, exit_code=exit_code)
        return state, (told, *commands)
    off = [task for task in in_order(state.tasks) if task.client == client and task.status != "accepted"]
    gone = {task.id for task in off}
    state = replace(state, tasks={id_: task for id_, task in state.tasks.items() if id_ not in gone})
    state, commands = _go_on(state, {task.round for task in off if task.phase == EVALUATE}, at_ms)
    return state, (told, *(CancelTask(task.id, client) for task in off), *commands)


def scores_without_lost(state: JobState, at_ms: int) -> Decision:
    """Where no round waits for everybody, let those who are here score what lost clients were to score."""
    here = any(state.clients[index] not in state.lost for index in evaluators(state))
    if isinstance(state.spec.schedule, str) or not here:
        return state, ()
    theirs = [task for task in in_order(state.tasks) if task.client in state.lost and task.phase == EVALUATE]
    off = {task.id: task for task in theirs if task.status != "accepted"}
    commands: tuple[Command, ...] = tuple(CancelTask(task.id, task.client) for task in off.values())
    state = replace(state, tasks={id_: task for id_, task in state.tasks.items() if id_ not in off})
    for number in sorted({task.round for task in off.values()}):
        state, more = _score_on(state, number, at_ms)
        commands += more
    return state, commands


def _go_on(state: JobState, scores: set[int], at_ms: int) -> Decision:
    """Do what the client that is gone kept from happening; `scores` are the versions that it was scoring."""
    if state.stage == "initialising":
        return ask(state, INITIALISE, _first(state), round_number=0, at_ms=at_ms)
    commands: tuple[Command, ...] = ()
    for number in sorted(scores):
        state, more = _score_on(state, number, at_ms)
        commands += more
    if state.stage == "training":
        state, more = _train_on(state, at_ms)
        commands += more
    return state, commands


def _first(state: JobState) -> tuple[int, ...]:
    """The first client that was not set aside."""
    return tuple(index for index, name in enumerate(state.clients) if name not in state.aside)[:1]


def _score_on(state: JobState, number: int, at_ms: int) -> Decision:
    """Close the scores of a version without the client that is gone, or ask somebody else for them."""
    if any(task.phase == EVALUATE and task.round == number for task in state.tasks.values()):
        return scored(state, number, at_ms)
    return ask(state, EVALUATE, evaluators(state), round_number=number, at_ms=at_ms)


def _train_on(state: JobState, at_ms: int) -> Decision:
    """Close the round where nobody else is awaited; where nobody has trained at all, ask others."""
    counted = pace.counted(state)
    if counted and len(counted) >= pace.needed(state):
        return close(state, at_ms)
    if isinstance(state.spec.schedule, Buffered):
        return on_counted(state, at_ms)
    if any(task.phase == TRAIN for task in state.tasks.values()):
        return state, ()
    return ask(state, TRAIN, budget.within(state, pace.to_ask(state)), round_number=state.round, at_ms=at_ms)
