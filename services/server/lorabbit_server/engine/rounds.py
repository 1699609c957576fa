"""Rounds of the engine: start, close, evaluation, end, and clients that are excluded.

The evaluation of a version overlaps with the training of the next round. `scheduling` answers the questions in which
the schedules differ.

A client is excluded when it brought no usable update in several attempts, when it reports bad input, when its update
cannot be aggregated, or when an operator revoked it. The job continues with the others as long as `min_clients` are
left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lorabbit.events import job_events as ev
from lorabbit.job.schedules import Buffered, Quorum, takes_late
from lorabbit.methods.registry import build
from lorabbit.types import EVALUATE, INITIALIZE, TRAIN, ClientId
from lorabbit_server.engine import scheduling
from lorabbit_server.engine.state import Ending, JobState, ModelVersion, TaskState
from lorabbit_server.engine.tasks import dispatch_tasks, sorted_tasks
from lorabbit_server.engine.transitions import (
    Aggregate,
    AppendEvent,
    Command,
    DeadlinePassed,
    Decision,
    EndJob,
    MethodStarted,
    RoundAggregated,
    SendCancelTask,
    SetDeadline,
)


def on_method_started(state: JobState, event: MethodStarted) -> Decision:
    """Set the first server state and begin round 1, or the preparation before it."""
    if state.stage != "starting":
        return state, ()
    task = next(iter(state.tasks.values()))
    base = task.offered.base_sha256 if task.offered else None
    job_event = AppendEvent(
        ev.AdapterInitialized(
            at_ms=event.at_ms,
            client=task.client,
            sha256=event.version.adapter.sha256,
            size_bytes=event.version.adapter.size_bytes,
            parameters=event.parameters,
            base_sha256=base,
            facts=dict(event.facts),
        )
    )
    state = replace(state, head=event.version, base_sha256=base, tasks={})
    state, commands = _begin_round(state, scheduling.PREPARATION if build(state.spec).prepares else 1, event.at_ms)
    return state, (job_event, *commands)


def _begin_round(state: JobState, number: int, at_ms: int) -> Decision:
    """Send tasks to the round's cohort, or to all clients in the preparation. Clients still training belong to it."""
    state = replace(state, stage="training", round=number, round_started_ms=at_ms, since_ms=at_ms)
    state, commands = dispatch_tasks(
        state,
        TRAIN,
        scheduling.filter_by_budget(state, scheduling.select_clients(state)),
        round_number=number,
        at_ms=at_ms,
    )
    training = {task.index for task in state.tasks.values() if task.phase == TRAIN}
    names = tuple(state.clients[index] for index in sorted(training))
    state, deadline = _set_deadline(state, scheduling.deadline_ms(state, at_ms))
    return state, (AppendEvent(ev.RoundStarted(at_ms=at_ms, round=number, cohort=names)), *commands, *deadline)


def _set_deadline(state: JobState, deadline_ms: int | None) -> Decision:
    """Set the deadline of the current round, if it has one."""
    state = replace(state, deadline_ms=deadline_ms)
    return state, () if deadline_ms is None else (SetDeadline(state.round, deadline_ms),)


def dispatch_more(state: JobState, at_ms: int) -> Decision:
    """With a buffered schedule, send idle clients their next task."""
    if not isinstance(state.spec.schedule, Buffered) or state.stage != "training":
        return state, ()
    return dispatch_tasks(state, TRAIN, scheduling.select_clients(state), round_number=state.round, at_ms=at_ms)


def on_deadline_passed(state: JobState, event: DeadlinePassed) -> Decision:
    """Close the round with the accepted updates; without any, send tasks to idle clients too."""
    if state.stage != "training" or event.round != state.round or state.deadline_ms is None:
        return state, ()
    if event.at_ms < state.deadline_ms:
        return state, (SetDeadline(state.round, state.deadline_ms),)
    if scheduling.accepted_updates(state):
        return close(state, event.at_ms)
    length = state.deadline_ms - state.since_ms
    state, commands = dispatch_tasks(
        state, TRAIN, scheduling.select_clients(state), round_number=state.round, at_ms=event.at_ms
    )
    state = replace(state, since_ms=event.at_ms)
    state, deadline = _set_deadline(state, event.at_ms + length)
    return state, (*commands, *deadline)


def on_update_accepted(state: JobState, at_ms: int) -> Decision:
    """Close the round, or send a task to the next client."""
    if state.stage != "training":
        return state, ()
    if len(scheduling.accepted_updates(state)) >= scheduling.required_updates(state):
        return close(state, at_ms)
    return dispatch_more(state, at_ms)


def close(state: JobState, at_ms: int) -> Decision:
    """Aggregate the accepted updates; cancel open tasks unless the schedule accepts late updates."""
    late = [t for t in sorted_tasks(state.tasks) if t.phase == TRAIN and t.status != "accepted"]
    schedule = state.spec.schedule
    accepts_late = takes_late(schedule) and state.round < state.spec.rounds
    off = () if accepts_late else late
    gone = {task.id for task in off}
    tasks = {id_: task for id_, task in state.tasks.items() if id_ not in gone}
    counted = {task.id for task in scheduling.accepted_updates(state)}
    batch = () if isinstance(schedule, str) else tuple(t.id for t in sorted_tasks(tasks) if t.id in counted)
    missed = len(late) if isinstance(schedule, Quorum) else 0
    state = replace(
        state, stage="aggregating", since_ms=at_ms, tasks=tasks, batch=batch, deadline_ms=None, missed=missed
    )
    return state, (*(SendCancelTask(task.id, task.client) for task in off), aggregation(state))


def aggregation(state: JobState) -> Aggregate:
    """The command that aggregates the round's updates in ascending client index."""
    trained = (t for t in sorted_tasks(state.tasks) if t.phase == TRAIN and t.status == "accepted")
    return Aggregate(state.round, tuple(t for t in trained if not state.batch or t.id in state.batch))


def continue_aggregation(state: JobState, at_ms: int) -> Decision:
    """Aggregate the remaining updates of a round, or those accepted meanwhile; without any, train again."""
    if state.batch:
        return state, (aggregation(state),)
    if scheduling.accepted_updates(state):
        return close(state, at_ms)
    state = replace(state, stage="training", since_ms=at_ms)
    asked = scheduling.filter_by_budget(state, scheduling.select_clients(state))
    state, commands = dispatch_tasks(state, TRAIN, asked, round_number=state.round, at_ms=at_ms)
    state, deadline = _set_deadline(state, scheduling.deadline_ms(state, at_ms))
    return state, (*commands, *deadline)


def on_round_aggregated(state: JobState, event: RoundAggregated) -> Decision:
    """Close the round; begin the next one and the evaluation of this version at the same time."""
    if state.stage != "aggregating" or event.round != state.round:
        return state, ()
    closed = AppendEvent(_round_closed(state, event))
    folded = {task.id for task in aggregation(state).tasks}
    left = {id_: task for id_, task in state.tasks.items() if id_ not in folded}
    state = replace(
        state,
        stage="scoring",
        since_ms=event.at_ms,
        head=event.version,
        previous=state.head if state.spec.transport.downloads.delta else None,
        tasks=left,
        bases=_older_versions(state, left),
        batch=(),
        missed=0,
        turned_away=0,
    )
    state = scheduling.retire(state, event.version.report)
    state, commands = _train_and_evaluate(state, event)
    state, more = on_update_accepted(state, event.at_ms) if scheduling.accepted_updates(state) else (state, ())
    return state, (closed, *commands, *more)


def _round_closed(state: JobState, event: RoundAggregated) -> ev.RoundClosed:
    """The job event of a closed round."""
    tasks, version = aggregation(state).tasks, event.version
    return ev.RoundClosed(
        at_ms=event.at_ms,
        round=event.round,
        accepted=len(tasks),
        sha256=version.adapter.sha256,
        seconds=max(0, event.at_ms - state.round_started_ms) / 1000,
        aggregate_seconds=event.aggregate_seconds,
        config=dict(version.config),
        base_payload=version.base.sha256 if version.base else None,
        facts=dict(version.report),
        pace={} if isinstance(state.spec.schedule, str) else _staleness_facts(state, tasks),
    )


def _staleness_facts(state: JobState, tasks: Sequence[TaskState]) -> dict[str, int | float]:
    """Numbers of late clients and refused updates, and the staleness of the aggregated updates."""
    ages = [scheduling.staleness(state, task) for task in tasks]
    mean = sum(ages) / len(ages) if ages else 0.0
    late, refused = state.missed, state.turned_away
    return {"late": late, "too_stale": refused, "staleness_mean": mean, "staleness_max": max(ages, default=0)}


def _older_versions(state: JobState, left: Mapping[str, TaskState]) -> dict[int, ModelVersion]:
    """The older versions that open trainings started from."""
    rounds = {task.round for task in left.values() if task.phase == TRAIN}
    known = dict(state.bases) if state.head is None else {**state.bases, state.round: state.head}
    return {number: version for number, version in known.items() if number in rounds}


def _train_and_evaluate(state: JobState, event: RoundAggregated) -> Decision:
    """Begin the next round and the evaluation, in the order in which clients are to do them."""
    method = build(state.spec)

    def train(state: JobState) -> Decision:
        if event.round >= state.spec.rounds or scheduling.is_spent(state):
            return state, ()
        return _begin_round(state, event.round + 1, event.at_ms)

    def score(state: JobState) -> Decision:
        return _begin_evaluation(state, event.round, event.version, at_ms=event.at_ms)

    commands: list[Command] = []
    for step in (score, train) if method.personal or method.scores_first else (train, score):
        state, more = step(state)
        commands += more
    return state, tuple(commands)


def _begin_evaluation(state: JobState, number: int, version: ModelVersion, *, at_ms: int) -> Decision:
    """Send evaluation tasks for a version, if the job evaluates this round."""
    if number == scheduling.PREPARATION or not (state.spec.evaluates(number) or scheduling.is_spent(state)):
        return state, ()
    state = replace(state, scored={**state.scored, number: version})
    return dispatch_tasks(state, EVALUATE, evaluators(state), round_number=number, at_ms=at_ms)


def evaluators(state: JobState) -> tuple[int, ...]:
    """Indices of the clients that evaluate a version; with sync, lost clients too."""
    able = tuple(index for index, name in enumerate(state.clients) if name not in state.aside)
    if not isinstance(state.spec.schedule, str):
        able = tuple(index for index in able if state.clients[index] not in state.lost) or able
    return able if state.spec.evaluation.on == "clients" else able[:1]


def finish_evaluation(state: JobState, number: int, at_ms: int) -> Decision:
    """Pool the metrics of a version once all its evaluations are accepted; end the job after the last one."""
    tasks = [t for t in sorted_tasks(state.tasks) if t.phase == EVALUATE and t.round == number]
    if any(t.status != "accepted" for t in tasks):
        return state, ()
    metrics = pool_metrics(tasks)
    if build(state.spec).personal:
        metrics |= mean_over_clients(tasks)
    ids = {t.id for t in tasks}
    state = replace(
        state,
        tasks={id_: task for id_, task in state.tasks.items() if id_ not in ids},
        scored={other: version for other, version in state.scored.items() if other != number},
    )
    job_event = AppendEvent(ev.RoundEvaluated(at_ms=at_ms, round=number, metrics=metrics))
    if state.stage != "scoring" or state.scored:
        return state, (job_event,)
    state, commands = end(state, "done", at_ms, reason=scheduling.budget_reason(state))
    return state, (job_event, *commands)


def pool_metrics(tasks: Iterable[TaskState]) -> dict[str, float]:
    """Average clients' scores, weighted by their numbers of examples; perplexity is exp of the pooled loss."""
    sums: dict[str, float] = {}
    weights: dict[str, int] = {}
    for task in tasks:
        if task.offered is None:
            continue
        metrics = task.offered.metrics
        values = dict(metrics.values)
        if metrics.loss is not None:
            values["loss"] = metrics.loss
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + metrics.num_examples * value
            weights[name] = weights.get(name, 0) + metrics.num_examples
    pooled = {name: sums[name] / weights[name] for name in sums if weights[name]}
    pooled = {name: value for name, value in pooled.items() if math.isfinite(value)}
    if "perplexity" in pooled and "loss" in pooled:
        pooled["perplexity"] = math.exp(min(pooled["loss"], 700.0))
    return pooled


def mean_over_clients(tasks: Iterable[TaskState]) -> dict[str, float]:
    """Average clients' metrics, each client counting once: what personalized methods report."""
    values: dict[str, list[float]] = {}
    for task in tasks:
        if task.offered is not None and task.offered.metrics.num_examples:
            for name, value in task.offered.metrics.values.items():
                values.setdefault(f"mean_{name}_of_clients", []).append(value)
    return {name: math.fsum(scores) / len(scores) for name, scores in values.items()}


def end(state: JobState, outcome: Ending, at_ms: int, *, reason: str = "", exit_code: int = 0) -> Decision:
    """End the job and cancel open tasks."""
    off = tuple(SendCancelTask(task.id, task.client) for task in sorted_tasks(state.tasks) if task.status != "accepted")
    job_event = AppendEvent(ev.JobEnded(at_ms=at_ms, status=outcome, reason=reason, exit_code=exit_code))
    state = replace(state, stage="ended", outcome=outcome, reason=reason, exit_code=exit_code, since_ms=at_ms)
    state = replace(state, head=None, previous=None, scored={}, tasks={}, bases={}, batch=(), deadline_ms=None)
    return state, (*off, job_event, EndJob())


FAILED = 1


def exclude_client(state: JobState, client: ClientId, reason: str, at_ms: int, *, exit_code: int = FAILED) -> Decision:
    """Continue without a client; end the job with this reason and exit code if too few are left."""
    if client in state.aside or client not in state.clients:
        return state, ()
    state = replace(state, aside=(*state.aside, client))
    job_event = AppendEvent(ev.ClientSetAside(at_ms=at_ms, client=client, reason=reason))
    left, wanted = len(state.clients) - len(state.aside), state.spec.fewest_clients
    if left < wanted:
        if exit_code == FAILED:
            reason = f"{reason}; {left} of {len(state.clients)} clients are left, and min_clients is {wanted}"
        state, commands = end(state, "failed", at_ms, reason=reason, exit_code=exit_code)
        return state, (job_event, *commands)
    off = [task for task in sorted_tasks(state.tasks) if task.client == client and task.status != "accepted"]
    gone = {task.id for task in off}
    state = replace(state, tasks={id_: task for id_, task in state.tasks.items() if id_ not in gone})
    state, commands = _reassign_tasks(state, {task.round for task in off if task.phase == EVALUATE}, at_ms)
    return state, (job_event, *(SendCancelTask(task.id, client) for task in off), *commands)


def reassign_lost_evaluations(state: JobState, at_ms: int) -> Decision:
    """Unless the schedule is sync, let connected clients take over the evaluations of lost ones."""
    here = any(state.clients[index] not in state.lost for index in evaluators(state))
    if isinstance(state.spec.schedule, str) or not here:
        return state, ()
    theirs = [task for task in sorted_tasks(state.tasks) if task.client in state.lost and task.phase == EVALUATE]
    off = {task.id: task for task in theirs if task.status != "accepted"}
    commands: tuple[Command, ...] = tuple(SendCancelTask(task.id, task.client) for task in off.values())
    state = replace(state, tasks={id_: task for id_, task in state.tasks.items() if id_ not in off})
    for number in sorted({task.round for task in off.values()}):
        state, more = _continue_evaluation(state, number, at_ms)
        commands += more
    return state, commands


def _reassign_tasks(state: JobState, scores: set[int], at_ms: int) -> Decision:
    """Continue after a client was excluded; `scores` are the versions that it was evaluating."""
    if state.stage == "initialising":
        return dispatch_tasks(state, INITIALIZE, _first_client(state), round_number=0, at_ms=at_ms)
    commands: tuple[Command, ...] = ()
    for number in sorted(scores):
        state, more = _continue_evaluation(state, number, at_ms)
        commands += more
    if state.stage == "training":
        state, more = _continue_training(state, at_ms)
        commands += more
    return state, commands


def _first_client(state: JobState) -> tuple[int, ...]:
    """The first client that is not excluded."""
    return tuple(index for index, name in enumerate(state.clients) if name not in state.aside)[:1]


def _continue_evaluation(state: JobState, number: int, at_ms: int) -> Decision:
    """Finish the evaluation of a version without the excluded client, or send it to others."""
    if any(task.phase == EVALUATE and task.round == number for task in state.tasks.values()):
        return finish_evaluation(state, number, at_ms)
    return dispatch_tasks(state, EVALUATE, evaluators(state), round_number=number, at_ms=at_ms)


def _continue_training(state: JobState, at_ms: int) -> Decision:
    """Close the round if it has enough updates; if nobody is training, select other clients."""
    counted = scheduling.accepted_updates(state)
    if counted and len(counted) >= scheduling.required_updates(state):
        return close(state, at_ms)
    if isinstance(state.spec.schedule, Buffered):
        return on_update_accepted(state, at_ms)
    if any(task.phase == TRAIN for task in state.tasks.values()):
        return state, ()
    return dispatch_tasks(
        state,
        TRAIN,
        scheduling.filter_by_budget(state, scheduling.select_clients(state)),
        round_number=state.round,
        at_ms=at_ms,
    )
