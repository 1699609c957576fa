"""From a task of the engine to the message that a client can work from alone.

What a task asks follows from the server state it starts from (`method.plan`), so nothing but its
name needs to be stored: a restarted server makes the same message again.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorabbit.errors import RunFailed
from lorabbit.messages import PayloadRef, Task
from lorabbit.methods import Method
from lorabbit.seeds import derive_seed
from lorabbit.types import ADAPTER, EVALUATE, TRAIN, ClientProfile, Facts
from lorabbit_server.admission import Template
from lorabbit_server.jobstate import JobState, TaskState
from lorabbit_server.registry import Registry
from lorabbit_server.versions import Versions


@dataclass(frozen=True, slots=True)
class Asked:
    """What a task asks for, beside its name."""

    phase: str
    payloads: dict[str, PayloadRef]
    settings: Facts


class Planner:
    """Plans the tasks of one job."""

    def __init__(self, method: Method, versions: Versions, registry: Registry, *, epoch: int) -> None:
        """Plan with this method, in this epoch."""
        self._method, self._versions, self._registry, self._epoch = method, versions, registry, epoch
        self._template: tuple[str, Template] | None = None

    def message(self, state: JobState, task: TaskState) -> Task:
        """Make the message for a task; writes payloads that are not files yet."""
        asked = self._asked(state, task)
        return Task(
            job=state.job,
            task=task.id,
            client=task.client,
            index=task.index,
            population=len(state.clients),
            round=task.round,
            attempt=task.tries + task.attempt - 1,
            epoch=self._epoch,
            phase=asked.phase,
            seed=derive_seed(state.spec.seed, task.phase, task.round, task.index),
            payloads=asked.payloads,
            settings=dict(asked.settings),
            spec=state.spec,
        )

    def template(self, state: JobState) -> Template | None:
        """What every update of the round under way must look like; None before there is an adapter."""
        if state.head is None:
            return None
        if self._template is None or self._template[0] != state.head.state.sha256:
            tensors = self._method.uploads(self._versions.load(state.head))
            self._template = (state.head.state.sha256, Template.of(tensors))
        return self._template[1]

    def _asked(self, state: JobState, task: TaskState) -> Asked:
        if task.phase == EVALUATE:
            scored = state.scored[task.round].adapter
            return Asked(EVALUATE, {ADAPTER: scored}, {"on": state.spec.evaluation.on})
        if task.phase != TRAIN:
            return Asked(task.phase, {}, {})
        if state.head is None:
            raise RunFailed(f"job {state.job} trains without a server state")
        plan = self._method.plan(self._versions.load(state.head), self._profile(task))
        return Asked(plan.phase, self._versions.refs(plan.payloads), plan.settings)

    def _profile(self, task: TaskState) -> ClientProfile:
        """What the client declared about itself."""
        entry = self._registry.get(task.client)
        if entry is None:
            return ClientProfile(task.client, task.index)
        return ClientProfile(task.client, task.index, entry.device, entry.memory_bytes, entry.tags)
