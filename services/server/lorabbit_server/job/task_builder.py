"""Building of task messages, and of what validation and aggregation need to know about a task.

The content of a task follows from the server state that it starts from (`method.plan`). Only the id of a task is
stored: a restarted server builds the same message again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from lorabbit.aggregation import partial_work
from lorabbit.aggregation.staleness import StalenessCorrection, staleness_weight
from lorabbit.compression import compressed_file
from lorabbit.errors import RunFailed
from lorabbit.job.spec import CompressionSpec
from lorabbit.methods.api.method import Method
from lorabbit.protocol.messages import EncodedDownload, PayloadRef, Task
from lorabbit.runtime.seeds import derive_seed
from lorabbit.types import ADAPTER, DEFAULT_CAPABILITIES, EVALUATE, INITIALIZE, TRAIN, ClientProfile, Facts, Tensors
from lorabbit_server.aggregation.aggregator import UpdateContext
from lorabbit_server.aggregation.model_versions import ModelVersionStore
from lorabbit_server.aggregation.update_validation import ExpectedUpdate, UpdateTemplate, check_offer
from lorabbit_server.clients.registry import ClientRegistry
from lorabbit_server.engine import scheduling
from lorabbit_server.engine.state import JobState, ModelVersion, TaskState

log = structlog.get_logger()
MAX_TEMPLATES = 64
"""Size of the cache of upload templates, for methods whose uploads differ between clients."""


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """Phase, payloads and settings of a task."""

    phase: str
    payloads: dict[str, PayloadRef]
    settings: Facts


class TaskBuilder:
    """Builds the task messages of one job, and what validation and aggregation need to know about its tasks."""

    def __init__(self, method: Method, versions: ModelVersionStore, registry: ClientRegistry, *, epoch: int) -> None:
        """Use this method; `epoch` is the server's fencing epoch."""
        self._method, self._versions, self._registry, self._epoch = method, versions, registry, epoch
        self._templates: dict[int, tuple[Tensors, UpdateTemplate]] = {}
        self._template_version: ModelVersion | None = None

    def message(self, state: JobState, task: TaskState) -> Task:
        """Build the message for a task; writes payloads that are not files yet."""
        request = self._request(state, task)
        codings = self._encodings(task)
        uploads = state.spec.transport.uploads
        unknown = (uploads.needs | state.spec.transport.downloads.needs) - codings
        if unknown and task.phase == TRAIN:
            log.warning("client-lacks-encoding", client=task.client, task=task.id, unknown=sorted(unknown))
        return Task(
            job=state.job,
            task=task.id,
            client=task.client,
            index=task.index,
            population=len(state.clients),
            round=task.round,
            attempt=task.tries + task.attempt - 1,
            epoch=self._epoch,
            phase=request.phase,
            seed=derive_seed(state.spec.seed, task.phase, task.round, task.index, *([task.turn] if task.turn else [])),
            share=task.share,
            payloads=request.payloads,
            ways=self._encoded_downloads(state, task, request.payloads)
            if state.spec.transport.downloads.needs <= codings
            else {},
            coding=uploads if task.phase == TRAIN and uploads.needs <= codings else CompressionSpec(),
            settings=dict(request.settings),
            spec=state.spec,
        )

    def template(self, state: JobState, task: TaskState) -> UpdateTemplate | None:
        """Shapes and types of a task's update; None for the first adapter, which may have any finite tensors."""
        start = state.version_for(task)
        if task.phase != TRAIN or start is None:
            return None
        if self._template_version != start:
            self._template_version = start
            self._templates.clear()
        tensors = self._method.uploads(self._versions.load(start), self._profile(task))
        known = self._templates.get(id(tensors))
        if known is None:
            if len(self._templates) >= MAX_TEMPLATES:
                self._templates.clear()
            known = self._templates[id(tensors)] = (tensors, UpdateTemplate.of(tensors))
        return known[1]

    def expected(self, state: JobState, task: TaskState) -> ExpectedUpdate:
        """What validation expects of a task's update."""
        template = self.template(state, task)
        if template is None:
            return ExpectedUpdate(may_be_empty=task.phase == INITIALIZE and self._method.personal)
        origin = self._request(state, task).payloads.get(ADAPTER)
        base = None if origin is None else (origin.sha256, self._versions.payloads.path(origin.sha256))
        return ExpectedUpdate(template, state.spec.transport.uploads, base)

    def check_offer(
        self, state: JobState, task: TaskState, payload: PayloadRef | None, *, max_bytes: int
    ) -> bool | None:
        """Whether a task's update must have tensors, None if it is optional; raises Refused for a payload too large."""
        template = self.template(state, task)
        if payload is not None:
            check_offer(payload, template, max_bytes=max_bytes)
        if task.phase == INITIALIZE and self._method.personal:
            return None
        return template is None or not template.is_empty

    def update_context(self, state: JobState, tasks: Sequence[TaskState]) -> UpdateContext:
        """Bases of updates that are differences, and corrections of updates that are late."""
        origins: dict[str, compressed_file.DeltaBase] = {}
        if state.spec.transport.uploads.delta:
            known: dict[str, compressed_file.DeltaBase] = {}
            for task in tasks:
                ref = self._request(state, task).payloads.get(ADAPTER)
                if ref is not None:
                    path = self._versions.payloads.path(ref.sha256)
                    known.setdefault(ref.sha256, compressed_file.DeltaBase.of(ref.sha256, path))
                    origins[task.id] = known[ref.sha256]
        return UpdateContext(self._corrections(state, tasks), origins)

    def _corrections(self, state: JobState, tasks: Sequence[TaskState]) -> dict[str, StalenessCorrection]:
        """Corrections by task, for updates from older versions or with different shares of work."""
        examples = [0 if task.offered is None else task.offered.metrics.num_examples for task in tasks]
        scales = partial_work.factors(state.spec, examples, [task.share for task in tasks])
        corrections: dict[str, StalenessCorrection] = {}
        for task, scale in zip(tasks, scales, strict=True):
            start, head, staleness = state.version_for(task), state.head, scheduling.staleness(state, task)
            if (staleness > 0 or scale != 1.0) and start is not None and head is not None:
                profile = self._profile(task)
                old = self._method.uploads(self._versions.load(start), profile)
                new = self._method.uploads(self._versions.load(head), profile)
                corrections[task.id] = StalenessCorrection(
                    old, new, scale * staleness_weight(state.spec.schedule, staleness)
                )
        return corrections

    def _request(self, state: JobState, task: TaskState) -> TaskRequest:
        if task.phase == EVALUATE:
            scored = self._versions.load(state.scored[task.round])
            plan = self._method.scoring(scored, self._profile(task))
            settings = {**plan.settings, "on": state.spec.evaluation.on}
            return TaskRequest(EVALUATE, self._versions.payload_refs(plan.payloads), settings)
        if task.phase != TRAIN:
            return TaskRequest(task.phase, {}, {})
        start = state.version_for(task)
        if start is None:
            raise RunFailed(f"job {state.job} trains without a server state")
        plan = self._method.plan(self._versions.load(start), self._profile(task))
        return TaskRequest(plan.phase, self._versions.payload_refs(plan.payloads), plan.settings)

    def _encoded_downloads(
        self, state: JobState, task: TaskState, payloads: Mapping[str, PayloadRef]
    ) -> dict[str, EncodedDownload]:
        """The compressed download of a task's adapter, by the sha256 of the adapter."""
        whole = payloads.get(ADAPTER)
        if state.spec.transport.downloads.is_plain or whole is None:
            return {}
        origin = None
        if state.previous is not None and state.head is not None:
            plan = self._method.plan(self._versions.load(state.previous), self._profile(task))
            origin = self._versions.payload_refs(plan.payloads).get(ADAPTER)
            self._versions.load(state.head)
        return {whole.sha256: self._versions.encoded_download(whole, origin)}

    def _encodings(self, task: TaskState) -> frozenset[str]:
        """Encodings that a task's client can write and read."""
        return frozenset(self._profile(task).capabilities.codings)

    def _profile(self, task: TaskState) -> ClientProfile:
        entry = self._registry.get(task.client)
        return ClientProfile(task.client, task.index, entry.capabilities if entry else DEFAULT_CAPABILITIES)
