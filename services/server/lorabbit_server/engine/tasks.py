"""Tasks of the round engine: their ids, their order, and the commands that send them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lorabbit.events import job_events as ev
from lorabbit.job.schedules import Buffered
from lorabbit.types import TRAIN
from lorabbit_server.engine import scheduling
from lorabbit_server.engine.state import JobState, TaskState
from lorabbit_server.engine.transitions import AppendEvent, Command, Decision, SendTask


def dispatch_tasks(state: JobState, phase: str, indices: Iterable[int], *, round_number: int, at_ms: int) -> Decision:
    """Create and send one task for each of these clients that is not excluded."""
    opened: list[TaskState] = []
    counts = phase == TRAIN and isinstance(state.spec.schedule, Buffered)
    for index in (index for index in indices if state.clients[index] not in state.aside):
        state = replace(state, turns=state.turns + counts)
        turn = state.turns if counts else 0
        share = (
            scheduling.share_of(state, index, at_ms)
            if phase == TRAIN and round_number != scheduling.PREPARATION
            else 1.0
        )
        task = TaskState("", phase, round_number, state.clients[index], index, turn=turn, since_ms=at_ms, share=share)
        opened.append(with_id(state.job, task))
    if phase == TRAIN and state.spec.selection is not None and state.spec.selection.order == "fair":
        state = replace(state, asked=_with_requests(state.asked, opened))
    state = replace(state, tasks={**state.tasks, **{task.id: task for task in opened}})
    return state, tuple(command for task in opened for command in send_commands(task, at_ms))


def _with_requests(asked: Mapping[int, int], opened: Iterable[TaskState]) -> Mapping[int, int]:
    """Add these tasks to the number of tasks by client."""
    more = Counter(asked)
    more.update(task.index for task in opened)
    return dict(more)


def with_id(job: str, task: TaskState) -> TaskState:
    """Derive a task's id from its content, so that every server gives the same work the same id."""
    again = (f".n{task.turn}" if task.turn else "") + (f".try{task.tries}" if task.tries > 1 else "")
    return replace(task, id=f"{job}.r{task.round}.{task.phase}.k{task.index}{again}")


def send_commands(task: TaskState, at_ms: int) -> tuple[Command, ...]:
    """The commands that send a task and log it."""
    job_event = ev.TaskSent(
        at_ms=at_ms, round=task.round, client=task.client, phase=task.phase, attempt=task.tries + task.attempt - 1
    )
    return SendTask(task), AppendEvent(job_event)


def describe_task(task: TaskState) -> str:
    """Describe a task in a message."""
    return f"the {task.phase} task of round {task.round}"


def sorted_tasks(tasks: Mapping[str, TaskState]) -> list[TaskState]:
    """Tasks by round, phase, client index and turn: an order that does not depend on arrival."""
    return sorted(tasks.values(), key=lambda t: (t.round, t.phase != TRAIN, t.index, t.turn))
