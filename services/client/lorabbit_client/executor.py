"""Executor: one task in, one result out, with the job's workspace kept between tasks.

It reads the payloads lazily, lets the method do its client half through a session, writes the
result's tensors and the client's private state, and turns every failure into a `TaskResult`. torch is
imported by the first task that needs it, never by the null model. Not thread-safe: one executor
per training thread or process.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lorabbit.compression import compressed_file, compressor
from lorabbit.errors import Refused
from lorabbit.job.spec import JobSpec
from lorabbit.methods import registry
from lorabbit.methods.personal_model import requirements
from lorabbit.protocol.messages import Metrics
from lorabbit.tensors import serialization
from lorabbit.types import ADAPTER, EVALUATE, INITIALIZE, ClientUpdate, Json, Plan, Tensors
from lorabbit_client.capabilities import UNLIMITED, TrainingLimits
from lorabbit_client.execution.failures import failed
from lorabbit_client.execution.interface import Cancelled, OnProgress, TaskInput, TaskResult, TaskSession, Workspace
from lorabbit_client.execution.null_workspace import NullWorkspace, is_null
from lorabbit_client.execution.privacy_ledger import PrivacyLedger
from lorabbit_client.execution.private_state import PrivateState, read_private, write_private

UNSENT = "unsent"
"""Group of a client's private tensors: what the coding of its updates has left out so far."""


class Executor:
    """Executes tasks; keeps the workspace (base model, data) of the last job."""

    def __init__(
        self, *, threads: int = 1, data_root: Path = Path(), device: str = "auto", limits: TrainingLimits = UNLIMITED
    ) -> None:
        """Say how many torch threads to use, where relative data paths start, on which device, and what it holds."""
        self._limits = limits
        self._threads = threads
        self._data_root = data_root
        self._device = device
        self._spec: JobSpec | None = None
        self._job = ""
        self._workspace: Workspace | None = None

    def warm(self, spec: JobSpec, population: int, indices: Iterable[int]) -> None:
        """Load the model and these clients' data now, so that a fork shares them; raises LoRAbbitError."""
        self._open(spec, "").warm(population, indices)

    def execute(self, work: TaskInput, on_progress: OnProgress) -> TaskResult:
        """Do one task; every failure but `Cancelled` becomes an outcome with an error."""
        start = time.perf_counter()
        try:
            workspace = self._open(work.task.spec, work.task.job)
            metrics, has_tensors = self._do(workspace, work, on_progress)
        except Cancelled:
            raise
        except Exception as error:  # noqa: BLE001 - a defect must fail the task, not the client
            return failed(work, error)
        seconds = time.perf_counter() - start
        return TaskResult(metrics.model_copy(update={"seconds": seconds}), has_tensors, workspace.base_sha256)

    def _do(self, workspace: Workspace, work: TaskInput, on_progress: OnProgress) -> tuple[Metrics, bool]:
        """Open the client's session, and dispatch on the phase; returns the metrics and whether tensors were written.

        Private state is committed after a result's tensors are written; a score leaves it as it was.
        """
        task = work.task
        for recipe in work.recipes:
            compressor.restore(recipe)
        method = registry.build(task.spec)
        private = read_private(work.private, task.task)
        private.ledger = PrivacyLedger.read(work.ledger)
        session = workspace.session(task, private, on_progress)
        if task.phase == INITIALIZE:
            initial = workspace.initialize(task, method.initialize(session))
            requirements.check_outgoing(initial.tensors)
            serialization.write_tensors(work.output, initial.tensors)
            write_private(work.private, task.task, private)
            first = Metrics(num_examples=initial.num_examples, facts=dict(initial.facts))
            return _without_examples(first, task.spec, private.ledger), True
        plan = Plan(task.phase, _payloads(work), task.settings)
        if task.phase == EVALUATE and not self._limits.tells_scores:
            return Metrics(num_examples=0), False
        if task.phase == EVALUATE:
            method.restore(plan, session)
            return workspace.evaluate(task, session, on_progress), False
        with workspace.counting() as counted:
            update = method.local_update(plan, session)
        requirements.check_outgoing(update.tensors)
        private.ledger.write()
        sent = 0
        if update.tensors:
            sent = _write_update(work, update.tensors, private)
        write_private(work.private, task.task, private)
        metrics = _metrics(update, session).model_copy(update={"flops": float(counted.flops), "parameters": sent})
        return _without_examples(metrics, task.spec, private.ledger), bool(update.tensors)

    def _open(self, spec: JobSpec, job: str) -> Workspace:
        """Return the workspace of a job, made anew when the job or its data differ from the last one's."""
        has_changed = job != self._job and not is_null(spec.model.name) and _has_changed()
        self._job = job
        if self._workspace is not None and self._spec == spec and not has_changed:
            return self._workspace
        self._workspace = self._spec = None
        if is_null(spec.model.name):
            workspace: Workspace = NullWorkspace(spec)
        else:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            self._limits.check_job(spec)
            opens = _personal() if registry.build(spec).personal else _shared()
            workspace = opens(
                spec,
                threads=self._threads,
                data_root=self._data_root,
                device=self._device,
                limits=self._limits,
            )
        self._spec, self._workspace = spec, workspace
        return workspace


def _has_changed() -> bool:
    """Forget data that is no longer as it was read."""
    from lorabbit_client.dataset import drop_stale_data  # noqa: PLC0415 - heavy, and not for the null model

    return drop_stale_data()


def _shared() -> Callable[..., Workspace]:
    """Import torch, and what opens a workspace around one base model."""
    from lorabbit_client.training.workspace import open_workspace  # noqa: PLC0415 - torch only where it is used

    return open_workspace


def _personal() -> Callable[..., Workspace]:
    """Import torch, and what opens a workspace of each client's own models."""
    from lorabbit_client.personal.workspace import open_personal_workspace  # noqa: PLC0415

    return open_personal_workspace


def _write_update(work: TaskInput, tensors: Tensors, private: PrivateState) -> int:
    """Write a result as the task asks for it; returns how many numbers it has.

    What stays unsent is kept with the client's private state.
    """
    wanted = work.task.coding
    if wanted.is_plain:
        serialization.write_tensors(work.output, tensors)
        return serialization.read_tensors(work.output).scalars
    held = work.task.payloads.get(ADAPTER)
    origin = None if held is None else compressed_file.DeltaBase.of(held.sha256, work.inputs[ADAPTER])
    before = private.tensors[UNSENT] if wanted.feedback and UNSENT in private.tensors else None
    residual = compressor.write_compressed(work.output, tensors, wanted, origin=origin, residual=before)
    if wanted.feedback:
        private.tensors[UNSENT] = residual
    return compressed_file.open_tensors(work.output, origin).scalars


class _Payloads(dict[str, Tensors]):
    """A task's tensors by role; one that a method asks for and the task lacks is a bad task."""

    def __missing__(self, role: str) -> Tensors:
        raise Refused("malformed", f"the task came without the payload {role!r} that its method needs")


def _payloads(work: TaskInput) -> _Payloads:
    return _Payloads({role: serialization.read_tensors(path) for role, path in work.inputs.items()})


def _metrics(update: ClientUpdate, session: TaskSession) -> Metrics:
    """Say what a local update came to."""
    facts: dict[str, Json] = dict(update.facts)
    if session.label_counts:
        facts["label_counts"] = dict(session.label_counts)
    return Metrics(
        num_examples=update.num_examples,
        loss=update.loss if math.isfinite(update.loss) else None,
        steps=session.steps,
        facts=facts,
    )


def _without_examples(metrics: Metrics, spec: JobSpec, ledger: PrivacyLedger) -> Metrics:
    """Where examples are private, keep what tells of them without noise: the loss, and the counts of labels."""
    if spec.privacy is None or spec.privacy.level != "example":
        return metrics
    facts = {name: fact for name, fact in metrics.facts.items() if name != "label_counts"}
    spent: dict[str, Json] = {"privacy": ledger.told} if ledger.told else {}
    return metrics.model_copy(update={"loss": None, "facts": {**facts, **spent}})
