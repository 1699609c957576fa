"""Tasks of the round engine: named after what they are, asked for, put in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from lorabbit import events as ev
from lorabbit.types import TRAIN
from lorabbit_server.jobstate import JobState, TaskState
from lorabbit_server.steps import Command, Decision, Record, SendTask


def ask(state: JobState, phase: str, indices: Iterable[int], *, round_number: int, at_ms: int) -> Decision:
    """Open one task for each of these clients and send it."""
    opened = [replace(new_task(state, phase, i, round_number=round_number), since_ms=at_ms) for i in indices]
    state = replace(state, tasks={**state.tasks, **{task.id: task for task in opened}})
    return state, tuple(command for task in opened for command in send(task, at_ms))


def new_task(state: JobState, phase: str, index: int, *, round_number: int, tries: int = 1) -> TaskState:
    """Name a task after what it is, so that the same work has the same id on every server."""
    again = f".try{tries}" if tries > 1 else ""
    name = f"{state.job}.r{round_number}.{phase}.k{index}{again}"
    return TaskState(name, phase, round_number, state.clients[index], index, tries=tries)


def send(task: TaskState, at_ms: int) -> tuple[Command, ...]:
    """Send a task and tell the log."""
    told = ev.TaskSent(
        at_ms=at_ms, round=task.round, client=task.client, phase=task.phase, attempt=task.tries + task.attempt - 1
    )
    return SendTask(task), Record(told)


def name_of(task: TaskState) -> str:
    """Say which task it is, for people."""
    return f"the {task.phase} task of round {task.round}"


def in_order(tasks: Mapping[str, TaskState]) -> list[TaskState]:
    """Tasks by round, phase and client index: an order that arrival does not touch."""
    return sorted(tasks.values(), key=lambda t: (t.round, t.phase != TRAIN, t.index))
