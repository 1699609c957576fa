"""From a task of the engine to the message that a client can work from alone.

What a task asks follows from the server state it starts from (`method.plan`), so nothing but its
name needs to be stored: a restarted server makes the same message again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorabbit import work
from lorabbit.errors import RunFailed
from lorabbit.messages import PayloadRef, Task
from lorabbit.methods import Method
from lorabbit.schedules import worth
from lorabbit.seeds import derive_seed
from lorabbit.types import EVALUATE, INITIALISE, TRAIN, ClientProfile, Facts, Tensors
from lorabbit_server import pace
from lorabbit_server.admission import Template, check_offer
from lorabbit_server.aggregator import Carry
from lorabbit_server.jobstate import JobState, TaskState, Version
from lorabbit_server.registry import Registry
from lorabbit_server.versions import Versions

KEPT_TEMPLATES = 64
"""Descriptions of uploads that are kept, for methods that want another one of every client."""


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
        self._templates: dict[int, tuple[Tensors, Template]] = {}
        self._described: Version | None = None

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
            seed=derive_seed(state.spec.seed, task.phase, task.round, task.index, *([task.turn] if task.turn else [])),
            share=task.share,
            payloads=asked.payloads,
            settings=dict(asked.settings),
            spec=state.spec,
        )

    def template(self, state: JobState, task: TaskState) -> Template | None:
        """What a task's result must look like; None for the first adapter, which may be anything finite."""
        start = state.version_for(task)
        if task.phase != TRAIN or start is None:
            return None
        if self._described != start:
            self._described = start
            self._templates.clear()
        tensors = self._method.uploads(self._versions.load(start), self._profile(task))
        known = self._templates.get(id(tensors))
        if known is None:
            if len(self._templates) >= KEPT_TEMPLATES:
                self._templates.clear()
            known = self._templates[id(tensors)] = (tensors, Template.of(tensors))
        return known[1]

    def weigh(self, state: JobState, task: TaskState, payload: PayloadRef | None, *, max_bytes: int) -> bool | None:
        """Tell whether a task's result must have tensors, None where it may; raises Refused for a size too large."""
        template = self.template(state, task)
        if payload is not None:
            check_offer(payload, template, max_bytes=max_bytes)
        if task.phase == INITIALISE and self._method.personal:
            return None
        return template is None or not template.is_empty

    def carries(self, state: JobState, tasks: Iterable[TaskState]) -> dict[str, Carry]:
        """How updates from older versions, or of unlike shares of work, come to the newest version, by task."""
        listed = list(tasks)
        examples = [0 if task.offered is None else task.offered.metrics.num_examples for task in listed]
        scales = work.factors(state.spec, examples, [task.share for task in listed])
        carries: dict[str, Carry] = {}
        for task, scale in zip(listed, scales, strict=True):
            start, head, staleness = state.version_for(task), state.head, pace.staleness(state, task)
            if (staleness > 0 or scale != 1.0) and start is not None and head is not None:
                profile = self._profile(task)
                old = self._method.uploads(self._versions.load(start), profile)
                new = self._method.uploads(self._versions.load(head), profile)
                carries[task.id] = Carry(old, new, scale * worth(state.spec.schedule, staleness))
        return carries

    def _asked(self, state: JobState, task: TaskState) -> Asked:
        if task.phase == EVALUATE:
            scored = self._versions.load(state.scored[task.round])
            plan = self._method.scoring(scored, self._profile(task))
            settings = {**plan.settings, "on": state.spec.evaluation.on}
            return Asked(EVALUATE, self._versions.refs(plan.payloads), settings)
        if task.phase != TRAIN:
            return Asked(task.phase, {}, {})
        start = state.version_for(task)
        if start is None:
            raise RunFailed(f"job {state.job} trains without a server state")
        plan = self._method.plan(self._versions.load(start), self._profile(task))
        return Asked(plan.phase, self._versions.refs(plan.payloads), plan.settings)

    def _profile(self, task: TaskState) -> ClientProfile:
        """What the client declared about itself."""
        entry = self._registry.get(task.client)
        if entry is None:
            return ClientProfile(task.client, task.index)
        return ClientProfile(
            task.client,
            task.index,
            entry.device,
            entry.memory_bytes,
            entry.tags,
            pool=entry.pool,
            max_rank=entry.max_rank,
        )
