"""Rounds of the engine: begin, close, score, end.

The evaluation of a version overlaps the next round's training. What a schedule adds is one question,
`round_is_complete`; today there is `sync`, which waits for everybody asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from lorabbit import events as ev
from lorabbit.types import EVALUATE, TRAIN
from lorabbit_server import cohort
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


def method_started(state: JobState, event: MethodStarted) -> Decision:
    """Take the first server state and begin round 1."""
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
    state, commands = _begin_round(state, 1, event.at_ms)
    return state, (told, *commands)


def _begin_round(state: JobState, number: int, at_ms: int) -> Decision:
    """Ask the round's cohort."""
    spec = state.spec
    asked = cohort.sample(spec.seed, number, population_size=len(state.clients), size=spec.cohort_size)
    names = tuple(state.clients[index] for index in asked)
    state = replace(state, stage="training", round=number, round_started_ms=at_ms, since_ms=at_ms)
    state, commands = ask(state, TRAIN, asked, round_number=number, at_ms=at_ms)
    return state, (Record(ev.RoundStarted(at_ms=at_ms, round=number, cohort=names)), *commands)


def round_is_complete(state: JobState) -> bool:
    """Tell whether the round may close: under `sync`, once everybody asked has answered."""
    return all(t.status == "accepted" for t in state.tasks.values() if t.phase == TRAIN)


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
        )
    )
    scoring = {id_: task for id_, task in state.tasks.items() if task.phase != TRAIN}
    state = replace(state, stage="scoring", since_ms=event.at_ms, head=event.version, tasks=scoring)
    training: tuple[Command, ...] = ()
    if event.round < state.spec.rounds:
        state, training = _begin_round(state, event.round + 1, event.at_ms)
    state, evaluating = _begin_scoring(state, event.round, event.version, at_ms=event.at_ms)
    return state, (closed, *training, *evaluating)


def _begin_scoring(state: JobState, number: int, version: Version, *, at_ms: int) -> Decision:
    """Ask clients to score the version of a round that the job wants scored."""
    if not state.spec.evaluates(number):
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
    ids = {t.id for t in tasks}
    state = replace(
        state,
        tasks={id_: task for id_, task in state.tasks.items() if id_ not in ids},
        scored={other: version for other, version in state.scored.items() if other != number},
    )
    told = Record(ev.RoundEvaluated(at_ms=at_ms, round=number, metrics=metrics))
    if state.stage != "scoring" or state.scored:
        return state, (told,)
    state, commands = end(state, "done", at_ms)
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
    if "perplexity" in pooled and "loss" in pooled:
        pooled["perplexity"] = math.exp(min(pooled["loss"], 700.0))
    return pooled


def end(state: JobState, outcome: Ending, at_ms: int, *, reason: str = "", exit_code: int = 0) -> Decision:
    """End the job and call off what is still under way."""
    off = tuple(CancelTask(task.id, task.client) for task in in_order(state.tasks) if task.status != "accepted")
    told = Record(ev.JobEnded(at_ms=at_ms, status=outcome, reason=reason, exit_code=exit_code))
    state = replace(state, stage="ended", outcome=outcome, reason=reason, exit_code=exit_code, since_ms=at_ms)
    return replace(state, head=None, scored={}, tasks={}), (*off, told, EndJob())
