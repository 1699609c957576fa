"""Executor: runs one task at a time, and keeps the job's workspace between tasks.

It reads payloads lazily, runs the method's client half through a session, writes the result's tensors and the client's
private state, and turns every failure into a `TaskResult`. The first task that needs torch imports it; the null model
never does. Not thread-safe: use one executor per thread or process.
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
from lorabbit_client.execution.failures import failed_result
from lorabbit_client.execution.interface import Cancelled, OnProgress, TaskInput, TaskResult, TaskSession, Workspace
from lorabbit_client.execution.null_workspace import NullWorkspace, is_null
from lorabbit_client.execution.privacy_ledger import PrivacyLedger
from lorabbit_client.execution.private_state import PrivateState, read_private, write_private

RESIDUAL = "unsent"
"""Group of a client's private tensors: residual of lossy compression (error feedback)."""


class Executor:
    """Executes tasks; keeps the workspace (base model, data) of the last job."""

    def __init__(
        self, *, threads: int = 1, data_root: Path = Path(), device: str = "auto", limits: TrainingLimits = UNLIMITED
    ) -> None:
        """Set torch threads, the root of relative data paths, the device, and the client's limits."""
        self._limits = limits
        self._threads = threads
        self._data_root = data_root
        self._device = device
        self._spec: JobSpec | None = None
        self._job = ""
        self._workspace: Workspace | None = None

    def preload(self, spec: JobSpec, population: int, indices: Iterable[int]) -> None:
        """Load the model and these clients' data now, so that a fork shares them; raises LoRAbbitError."""
        self._open(spec, "").preload(population, indices)

    def execute(self, work: TaskInput, on_progress: OnProgress) -> TaskResult:
        """Do one task; every failure but `Cancelled` becomes an outcome with an error."""
        start = time.perf_counter()
        try:
            workspace = self._open(work.task.spec, work.task.job)
            metrics, has_tensors = self._run_phase(workspace, work, on_progress)
        except Cancelled:
            raise
        except Exception as error:  # noqa: BLE001 - a defect must fail the task, not the client
            return failed_result(work, error)
        seconds = time.perf_counter() - start
        return TaskResult(metrics.model_copy(update={"seconds": seconds}), has_tensors, workspace.base_sha256)

    def _run_phase(self, workspace: Workspace, work: TaskInput, on_progress: OnProgress) -> tuple[Metrics, bool]:
        """Open the client's session, and dispatch on the phase; returns the metrics and whether tensors were written.

        Private state is committed after a result's tensors are written; a score leaves it as it was.
        """
        task = work.task
        for decode_step in work.decode_steps:
            compressor.restore(decode_step)
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
        with workspace.count_flops() as flop_count:
            update = method.local_update(plan, session)
        requirements.check_outgoing(update.tensors)
        private.ledger.write()
        sent = 0
        if update.tensors:
            sent = _write_update(work, update.tensors, private)
        write_private(work.private, task.task, private)
        metrics = _metrics(update, session).model_copy(update={"flops": float(flop_count.flops), "parameters": sent})
        return _without_examples(metrics, task.spec, private.ledger), bool(update.tensors)

    def _open(self, spec: JobSpec, job: str) -> Workspace:
        """Return the workspace of a job; a new one if the job or its data changed."""
        has_changed = job != self._job and not is_null(spec.model.name) and _drop_stale_data()
        self._job = job
        if self._workspace is not None and self._spec == spec and not has_changed:
            return self._workspace
        self._workspace = self._spec = None
        if is_null(spec.model.name):
            workspace: Workspace = NullWorkspace(spec)
        else:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            self._limits.check_job(spec)
            open_ = _import_personal() if registry.build(spec).personal else _import_shared()
            workspace = open_(
                spec,
                threads=self._threads,
                data_root=self._data_root,
                device=self._device,
                limits=self._limits,
            )
        self._spec, self._workspace = spec, workspace
        return workspace


def _drop_stale_data() -> bool:
    """Drop cached data whose files changed."""
    from lorabbit_client.dataset import drop_stale_data  # noqa: PLC0415 - heavy, and not for the null model

    return drop_stale_data()


def _import_shared() -> Callable[..., Workspace]:
    """Import torch and the workspace of methods with one base model."""
    from lorabbit_client.training.workspace import open_workspace  # noqa: PLC0415 - torch only where it is used

    return open_workspace


def _import_personal() -> Callable[..., Workspace]:
    """Import torch and the workspace of methods with personal models."""
    from lorabbit_client.personal.workspace import open_personal_workspace  # noqa: PLC0415

    return open_personal_workspace


def _write_update(work: TaskInput, tensors: Tensors, private: PrivateState) -> int:
    """Write a result with the task's compression; returns its number of scalars.

    The residual of lossy compression is kept in the client's private state.
    """
    spec_of_result = work.task.coding
    if spec_of_result.is_plain:
        serialization.write_tensors(work.output, tensors)
        return serialization.read_tensors(work.output).scalars
    held = work.task.payloads.get(ADAPTER)
    origin = None if held is None else compressed_file.DeltaBase.of(held.sha256, work.inputs[ADAPTER])
    previous = private.tensors[RESIDUAL] if spec_of_result.feedback and RESIDUAL in private.tensors else None
    residual = compressor.write_compressed(work.output, tensors, spec_of_result, origin=origin, residual=previous)
    if spec_of_result.feedback:
        private.tensors[RESIDUAL] = residual
    return compressed_file.open_tensors(work.output, origin).scalars


class _Payloads(dict[str, Tensors]):
    """A task's tensors by role; raises Refused for a role that the task lacks."""

    def __missing__(self, role: str) -> Tensors:
        raise Refused("malformed", f"the task came without the payload {role!r} that its method needs")


def _payloads(work: TaskInput) -> _Payloads:
    return _Payloads({role: serialization.read_tensors(path) for role, path in work.inputs.items()})


def _metrics(update: ClientUpdate, session: TaskSession) -> Metrics:
    """Return the metrics of a local update."""
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
    """Remove the loss and the label counts if examples are private: they carry no noise."""
    if spec.privacy is None or spec.privacy.level != "example":
        return metrics
    facts = {name: fact for name, fact in metrics.facts.items() if name != "label_counts"}
    spent: dict[str, Json] = {"privacy": ledger.summary} if ledger.summary else {}
    return metrics.model_copy(update={"loss": None, "facts": {**facts, **spent}})
