"""Rounds of the engine: begin, close, score, end.

The evaluation of a version overlaps the next round's training. What a schedule adds is one question,
`round_is_complete`; today there is `sync`, which waits for everybody asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lorabbit import events as ev
from lorabbit.methods import build
from lorabbit.types import EVALUATE, TRAIN
from lorabbit_server import budget, cohort
from lorabbit_server.asking import ask, in_order
from lorabbit_server.jobstate import Ending, JobState, TaskState, Version
from lorabbit_server.steps import (
    Aggregate,
    CancelTask,
    Command,
    Decision,
    EndJob,
    MethodStarted,
    Record,
    RoundAggregated,
)

PREPARATION = 0
"""Number of the round before the first, in which methods that ask for it hear every client."""

ROUNDING = 1e-9
"""A share times a number of clients may lie this much above a whole number."""


def method_started(state: JobState, event: MethodStarted) -> Decision:
    """Take the first server state and begin round 1, or the preparation before it."""
    if state.stage != "starting":
        return state, ()
    task = next(iter(state.tasks.values()))
    base = task.offered.base_sha256 if task.offered else None
    told = Record(
        ev.AdapterInitialised(
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
    state, commands = _begin_round(state, PREPARATION if build(state.spec).prepares else 1, event.at_ms)
    return state, (told, *commands)


def _begin_round(state: JobState, number: int, at_ms: int) -> Decision:
    """Ask the round's cohort; in the preparation, everybody."""
    spec = state.spec
    asked: Sequence[int] = range(len(state.clients))
    if number != PREPARATION:
        asked = cohort.sample(spec.seed, number, population_size=len(state.clients), size=spec.cohort_size)
    asked = budget.within(state, asked)
    names = tuple(state.clients[index] for index in asked)
    state = replace(state, stage="training", round=number, round_started_ms=at_ms, since_ms=at_ms)
    state, commands = ask(state, TRAIN, asked, round_number=number, at_ms=at_ms)
    return state, (Record(ev.RoundStarted(at_ms=at_ms, round=number, cohort=names)), *commands)


def round_is_complete(state: JobState) -> bool:
    """Tell whether the round may close: under `sync`, once everybody asked has answered.

    The preparation may close earlier, once the method's `quorum` of the population has.
    """
    trained = [t for t in state.tasks.values() if t.phase == TRAIN]
    needed = len(trained)
    if state.round == PREPARATION:
        needed = math.ceil(getattr(build(state.spec), "quorum", 1.0) * needed - ROUNDING)
    return sum(t.status == "accepted" for t in trained) >= needed


def close(state: JobState, at_ms: int) -> Decision:
    """Fold what has arrived, and call off what has not."""
    late = [t for t in in_order(state.tasks) if t.phase == TRAIN and t.status != "accepted"]
    off = {task.id for task in late}
    tasks = {id_: task for id_, task in state.tasks.items() if id_ not in off}
    state = replace(state, stage="aggregating", since_ms=at_ms, tasks=tasks)
    return state, (*(CancelTask(task.id, task.client) for task in late), aggregation(state))


def aggregation(state: JobState) -> Aggregate:
    """Fold the round's results in ascending client index."""
    trained = (t for t in in_order(state.tasks) if t.phase == TRAIN and t.status == "accepted")
    return Aggregate(state.round, tuple(trained))


def round_aggregated(state: JobState, event: RoundAggregated) -> Decision:
    """Close the round; begin the next and score this one's version at the same time."""
    if state.stage != "aggregating" or event.round != state.round:
        return state, ()
    closed = Record(
        ev.RoundClosed(
            at_ms=event.at_ms,
            round=event.round,
            accepted=len(aggregation(state).tasks),
            sha256=event.version.adapter.sha256,
            seconds=max(0, event.at_ms - state.round_started_ms) / 1000,
            aggregate_seconds=event.aggregate_seconds,
            config=dict(event.version.config),
            base_payload=event.version.base.sha256 if event.version.base else None,
            facts=dict(event.version.report),
        )
    )
    state = budget.retire(state, event.version.report)
    scoring = {id_: task for id_, task in state.tasks.items() if task.phase != TRAIN}
    state = replace(state, stage="scoring", since_ms=event.at_ms, head=event.version, tasks=scoring)
    state, commands = _go_on(state, event)
    return state, (closed, *commands)


def _go_on(state: JobState, event: RoundAggregated) -> Decision:
    """Train on the new version and score it, in the order in which clients are to do it."""
    method = build(state.spec)

    def train(state: JobState) -> Decision:
        if event.round >= state.spec.rounds or budget.is_spent(state):
            return state, ()
        return _begin_round(state, event.round + 1, event.at_ms)

    def score(state: JobState) -> Decision:
        return _begin_scoring(state, event.round, event.version, at_ms=event.at_ms)

    commands: list[Command] = []
    for step in (score, train) if method.personal or method.scores_first else (train, score):
        state, more = step(state)
        commands += more
    return state, tuple(commands)


def _begin_scoring(state: JobState, number: int, version: Version, *, at_ms: int) -> Decision:
    """Ask clients to score the version of a round that the job wants scored."""
    if number == PREPARATION or not (state.spec.evaluates(number) or budget.is_spent(state)):
        return state, ()
    state = replace(state, scored={**state.scored, number: version})
    asked = range(len(state.clients)) if state.spec.evaluation.on == "clients" else [0]
    return ask(state, EVALUATE, asked, round_number=number, at_ms=at_ms)


def scored(state: JobState, number: int, at_ms: int) -> Decision:
    """Pool the scores of a version once everybody asked has scored it; end after the last one."""
    tasks = [t for t in in_order(state.tasks) if t.phase == EVALUATE and t.round == number]
    if any(t.status != "accepted" for t in tasks):
        return state, ()
    metrics = pool(tasks)
    if build(state.spec).personal:
        metrics |= over_clients(tasks)
    ids = {t.id for t in tasks}
    state = replace(
        state,
        tasks={id_: task for id_, task in state.tasks.items() if id_ not in ids},
        scored={other: version for other, version in state.scored.items() if other != number},
    )
    told = Record(ev.RoundEvaluated(at_ms=at_ms, round=number, metrics=metrics))
    if state.stage != "scoring" or state.scored:
        return state, (told,)
    state, commands = end(state, "done", at_ms, reason=budget.sentence(state))
    return state, (told, *commands)


def pool(tasks: Iterable[TaskState]) -> dict[str, float]:
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


def over_clients(tasks: Iterable[TaskState]) -> dict[str, float]:
    """Average clients' metrics, each client counting once: what personalised methods report."""
    values: dict[str, list[float]] = {}
    for task in tasks:
        if task.offered is not None and task.offered.metrics.num_examples:
            for name, value in task.offered.metrics.values.items():
                values.setdefault(f"mean_{name}_of_clients", []).append(value)
    return {name: math.fsum(scores) / len(scores) for name, scores in values.items()}


def end(state: JobState, outcome: Ending, at_ms: int, *, reason: str = "", exit_code: int = 0) -> Decision:
    """End the job and call off what is still under way."""
    off = tuple(CancelTask(task.id, task.client) for task in in_order(state.tasks) if task.status != "accepted")
    told = Record(ev.JobEnded(at_ms=at_ms, status=outcome, reason=reason, exit_code=exit_code))
    state = replace(state, stage="ended", outcome=outcome, reason=reason, exit_code=exit_code, since_ms=at_ms)
    return replace(state, head=None, scored={}, tasks={}), (*off, told, EndJob())
