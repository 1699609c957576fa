"""Scheduling: the decisions in which the schedules differ, computed from the state alone.

Which clients to select, how many updates close a round, how stale an update is, and when a round's deadline is. The
number of a round is that of the version that it makes: training tasks of round r start from version r - 1.

The privacy budget is checked here too: which clients are no longer selected, and when no client is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pydantic import JsonValue

from lorabbit.aggregation import partial_work
from lorabbit.job.schedules import ROUNDING, Buffered, Quorum
from lorabbit.methods.registry import build
from lorabbit.types import TRAIN, ClientId
from lorabbit_server.engine import client_selection
from lorabbit_server.engine.state import JobState, TaskState

PREPARATION = 0
"""Number of the round before the first, in which a method can prepare with all clients."""
DEADLINE_FACTOR = 2.0
"""A derived deadline, as a multiple of the time in which the quorum answered last."""
MIN_DEADLINE_MS = 1_000
"""No derived deadline is shorter."""


def select_clients(state: JobState) -> Sequence[int]:
    """Indices of the clients to send tasks to, at the start of a round or next with a buffered schedule."""
    spec, schedule = state.spec, state.spec.schedule
    if state.round == PREPARATION:
        return range(len(state.clients))
    if isinstance(schedule, str):
        return _sample(state, _candidates(state), spec.cohort_of(len(state.clients)), number=state.round)
    busy = {t.index for t in _trainings(state) if t.status != "accepted"}
    idle = [index for index, name in enumerate(state.clients) if index not in busy and name not in state.aside]
    here = [index for index in idle if state.clients[index] not in state.lost]
    if isinstance(schedule, Buffered):
        training = sum(1 for index in busy if state.clients[index] not in state.lost)
        wanted = (schedule.concurrency or len(state.clients)) - training
        return _sample(state, here, wanted, number=state.turns)
    enough = len(here) + len(_trainings(state)) >= required_updates(state)
    return _sample(state, here if enough else idle, spec.asked_of(len(state.clients)), number=state.round)


def _candidates(state: JobState) -> Sequence[int]:
    """All clients; without lost ones if the selection is not random and enough others are left."""
    everybody = range(len(state.clients))
    if state.spec.selection is None or state.spec.selection.order == "random":
        return everybody
    here = [index for index in everybody if state.clients[index] not in state.lost]
    return here if len(here) >= state.spec.cohort_of(len(state.clients)) else everybody


def _sample(state: JobState, candidates: Sequence[int], size: int, *, number: int) -> tuple[int, ...]:
    """Choose among the candidates without replacement, ascending."""
    order = "random" if state.spec.selection is None else state.spec.selection.order
    return client_selection.ClientSampler(state.spec.seed, number, order, state.asked, state.speeds).choose(
        candidates, size
    )


def share_of(state: JobState, index: int, at_ms: int) -> float:
    """Share of the local steps that a client can do in the time that the job allows."""
    if state.spec.work is None:
        return 1.0
    within = state.spec.work.within_seconds
    if isinstance(within, float | int):
        return partial_work.share(state.spec, state.speeds.get(index), 1000.0 * within)
    ends_ms = _deadline_of(state, at_ms)
    return partial_work.share(state.spec, state.speeds.get(index), None if ends_ms is None else float(ends_ms - at_ms))


def required_updates(state: JobState) -> int:
    """Number of updates that close the current round.

    The preparation may close once the method's `quorum` of the population has answered.
    """
    schedule = state.spec.schedule
    if state.round == PREPARATION:
        return math.ceil(getattr(build(state.spec), "quorum", 1.0) * len(_trainings(state)) - ROUNDING)
    if isinstance(schedule, Buffered):
        return schedule.buffer
    if isinstance(schedule, Quorum):
        wanted = max(1, math.ceil(schedule.quorum * state.spec.cohort_of(len(state.clients)) - ROUNDING))
        return min(wanted, len(state.clients) - len(state.aside))
    return len(_trainings(state))


def accepted_updates(state: JobState) -> list[TaskState]:
    """Training tasks whose updates are accepted and not aggregated yet."""
    return [t for t in _trainings(state) if t.status == "accepted" and t.id not in state.batch]


def staleness(state: JobState, task: TaskState) -> int:
    """Versions made between the one that a training started from and the next that can fold it.

    While a round is being folded that is the round after it, except for what is being folded.
    """
    behind = state.stage == "aggregating" and task.id not in state.batch
    return state.round + behind - task.round


def is_behind(state: JobState, task: TaskState) -> bool:
    """Tell whether a training started from an older version than the newest."""
    return task.phase == TRAIN and task.round < state.round


def is_too_stale(state: JobState, task: TaskState) -> bool:
    """Tell whether a training started from a version that is older than the schedule allows."""
    schedule = state.spec.schedule
    return task.phase == TRAIN and isinstance(schedule, Buffered) and staleness(state, task) > schedule.max_staleness


def deadline_ms(state: JobState, at_ms: int) -> int | None:
    """The deadline of a round that starts now; None while no client was measured."""
    return _deadline_of(state, at_ms, [t.index for t in _trainings(state)])


def _deadline_of(state: JobState, at_ms: int, asked: Sequence[int] | None = None) -> int | None:
    """The deadline of a round that asks these clients, or of one that might ask any."""
    schedule = state.spec.schedule
    if not isinstance(schedule, Quorum) or state.round == PREPARATION:
        return None
    if schedule.deadline_seconds is not None:
        return at_ms + round(schedule.deadline_seconds * 1000)
    asked = range(len(state.clients)) if asked is None else asked
    took = sorted(state.took_ms[index] for index in asked if index in state.took_ms)
    if not took:
        return None
    share = math.ceil(schedule.quorum * len(took) - ROUNDING)
    return at_ms + max(MIN_DEADLINE_MS, round(DEADLINE_FACTOR * took[max(0, share - 1)]))


def _trainings(state: JobState) -> list[TaskState]:
    return [task for task in state.tasks.values() if task.phase == TRAIN]


def retire(state: JobState, report: Mapping[str, JsonValue]) -> JobState:
    """Add the clients whose privacy budget is spent according to a round's report."""
    job_event = report.get("privacy")
    spent = job_event.get("spent") if isinstance(job_event, dict) else None
    more = {ClientId(str(client)) for client in spent} if isinstance(spent, list) else set()
    retired = more | set(state.retired)
    return replace(state, retired=tuple(client for client in state.clients if client in retired))


def filter_by_budget(state: JobState, asked: Sequence[int]) -> tuple[int, ...]:
    """The clients with privacy budget left; other clients with budget if none of these has any."""
    gone = {*state.retired, *state.aside}
    able = tuple(index for index in asked if state.clients[index] not in gone)
    return able or tuple(index for index, name in enumerate(state.clients) if name not in gone)[: len(asked)]


def is_spent(state: JobState) -> bool:
    """Whether the privacy budget of every client is spent."""
    return bool(state.retired) and {*state.retired, *state.aside} == set(state.clients)


def budget_reason(state: JobState) -> str:
    """Why a job ended before its last round; empty where it did not."""
    if not is_spent(state) or state.round >= state.spec.rounds or state.spec.privacy is None:
        return ""
    return (
        f"privacy.epsilon: after round {state.round} of {state.spec.rounds} no client may spend more of its budget of "
        f"{state.spec.privacy.epsilon}"
    )
