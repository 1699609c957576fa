"""Dry run: what a job would run and transfer, computed before anything starts.

The model is built and the first adapter made exactly as a run's first client would, the data is
split exactly as clients would split it, and the method itself says which payloads travel, in the
first round and, from an update in which everything has changed, in later ones. A client reads no
payload that it holds already.

Wire: how many bytes tensors are as they travel, found out without sending them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, JsonValue

from lorabbit.compression import compressed_file, compressor
from lorabbit.errors import BadInput, RunFailed
from lorabbit.job.spec import PLAIN, JobSpec, TransportSpec
from lorabbit.methods.api.method import Method
from lorabbit.methods.registry import build
from lorabbit.protocol.messages import Task
from lorabbit.tensors import serialization
from lorabbit.tensors.arithmetic import count, is_floating
from lorabbit.types import ADAPTER, INITIALIZE, Array, ClientId, ClientProfile, ClientUpdate, Plan, Tensors
from lorabbit_cli.formatting import bytes_text, count_text
from lorabbit_cli.local.embedded_run import ComputeOptions
from lorabbit_client.execution.interface import TaskInput, TaskResult
from lorabbit_client.execution.null_workspace import is_null
from lorabbit_client.executor import Executor


@dataclass(frozen=True, slots=True)
class WireSizes:
    """Sizes of tensors as they travel; with zstd, more than which they never have."""

    transport: TransportSpec
    scratch: Path
    keeps_up: bool
    """Whether every client holds what a difference is to."""

    def up(self, template: Tensors, plan: Plan) -> int:
        """Bytes of an update of a plan."""
        if self.transport.uploads.is_plain:
            return self._file(template)[1]
        return compressor.most_bytes(self.transport.uploads, template, origin=_origin(plan.payloads.get(ADAPTER)))

    def down(self, plan: Plan, *, held: Container[str] = (), origin: Tensors | None = None) -> dict[str, int]:
        """Hash and size of every payload of a plan that a client does not hold."""
        found = {}
        for role, tensors in plan.payloads.items():
            sha256, size = self._file(tensors)
            if role == ADAPTER and not self.transport.downloads.is_plain:
                whole = 0 if origin is None or self.keeps_up else size
                size = max(whole, compressor.most_bytes(self.transport.downloads, tensors, origin=_origin(origin)))
            if sha256 not in held:
                found[sha256] = size
        return found

    def _file(self, tensors: Tensors) -> tuple[str, int]:
        """Hash and size of the file that tensors travel as."""
        path = self.scratch / "payload.safetensors"
        sha256 = serialization.write_tensors(path, tensors)
        return sha256, path.stat().st_size


def _origin(tensors: Tensors | None) -> compressed_file.DeltaBase | None:
    """What a difference is to; only the length of its name matters."""
    return None if tensors is None else compressed_file.DeltaBase("0" * 64, tensors)


CENTRAL = "central"
FEW = 12
"""Clients whose examples are listed one by one."""


class PayloadSize(BaseModel):
    """Payload bytes of one client in one round."""

    model_config = ConfigDict(frozen=True)

    up: int
    down_first: int
    """For training, when the client holds nothing."""
    down: int
    """For training, in later rounds."""
    down_evaluation: int
    """For scoring the adapter of a round."""
    shared: int
    """Of `down`, what the client holds when it has scored the round before."""


class ClientExamples(BaseModel):
    """Examples of one client."""

    model_config = ConfigDict(frozen=True)

    train: int
    test: int


class DryRun(BaseModel):
    """What a job would do; None is unknown."""

    model_config = ConfigDict(frozen=True)

    job: str
    method: str
    model: str
    task: str
    rounds: int
    clients: int
    cohort: int
    evaluated_rounds: int
    evaluating_clients: int
    base_parameters: int | None
    """Of the one model that all clients share."""
    own_parameters: dict[str, int]
    """Of each client's own model, by its name, for methods with models of their own."""
    trainable_parameters: int
    tensors: int
    labels: tuple[str, ...]
    shares: tuple[ClientExamples, ...] | None
    up: str
    down: str
    """Codings of updates and of the adapter; with zstd, no size is larger than told."""
    payload: PayloadSize
    round_bytes_up: int
    round_bytes_down: int
    """Of a round that follows another one and is scored."""
    total_bytes: int


def dry_run(spec: JobSpec, compute: ComputeOptions) -> DryRun:
    """Build the model and split the data once; raises BadInput where a run would."""
    method = build(spec)
    labels, shares = _shares(spec, compute)
    with tempfile.TemporaryDirectory() as scratch:
        outcome, path = _initialize(spec, compute, Path(scratch))
        adapter = serialization.read_tensors(path)
        payload = _payload(method, adapter, Path(scratch), spec)
        up, down, total = _totals(spec, payload, path.stat().st_size)
        return DryRun(
            job=spec.name,
            method=spec.method.name,
            model=spec.model.name,
            task=spec.model.task,
            rounds=spec.rounds,
            clients=spec.clients,
            cohort=spec.asked_in_a_round,
            evaluated_rounds=sum(spec.evaluates(number) for number in range(1, spec.rounds + 1)),
            evaluating_clients=_evaluating(spec),
            base_parameters=None if method.personal else _number(outcome.metrics.facts, "base_parameters"),
            own_parameters=_own_models(spec, compute, Path(scratch)) if method.personal else {},
            trainable_parameters=count(adapter),
            tensors=len(adapter),
            labels=labels,
            shares=shares,
            up=spec.transport.uploads.word,
            down=spec.transport.downloads.word,
            payload=payload,
            round_bytes_up=up,
            round_bytes_down=down,
            total_bytes=total,
        )


def lines(found: DryRun) -> Iterator[tuple[str, str]]:
    """Say it for people: a name and a text per line."""
    yield "job", f"{count_text(found.rounds, 'round')}, {found.cohort} of {count_text(found.clients, 'client')} in each"
    yield "method", found.method
    yield "model", f"{_models(found)}, task {found.task}"
    travels = "shared" if found.own_parameters else "trained"
    yield travels, f"{found.trainable_parameters:,} parameters in {count_text(found.tensors, 'tensor')}"
    if found.shares is not None:
        yield "data", _data(found.shares, found.labels)
    if {found.up, found.down} != {PLAIN}:
        most = "; what is compressed is smaller than told below" if "zstd" in found.up + found.down else ""
        yield "wire", f"updates in {found.up}, the adapter in {found.down}{most}"
    payload = found.payload
    first = f" ({bytes_text(payload.down_first)} the first time)" if payload.down_first != payload.down else ""
    yield "a client", f"{bytes_text(payload.up)} up, {bytes_text(payload.down)} down{first} to train in a round"
    who = f"{count_text(found.evaluated_rounds, 'round')} scored by {count_text(found.evaluating_clients, 'client')}"
    yield "evaluation", f"{who}, {bytes_text(payload.down_evaluation)} down each"
    yield (
        "a round",
        f"{bytes_text(found.round_bytes_up)} up, {bytes_text(found.round_bytes_down)} down, evaluation included",
    )
    yield "the job", f"{bytes_text(found.total_bytes)} of payload at most, both ways together"


def _models(found: DryRun) -> str:
    """Name the shared model, or each client's own ones."""
    if found.own_parameters:
        own = ", ".join(f"{name} ({size:,} parameters)" for name, size in found.own_parameters.items())
        return f"{own}, each client's own and trained whole"
    known = "unknown" if found.base_parameters is None else f"{found.base_parameters:,}"
    return f"{found.model} ({known} parameters)"


def _data(shares: tuple[ClientExamples, ...], labels: tuple[str, ...]) -> str:
    """Sum up who has how much."""
    train, test = [share.train for share in shares], [share.test for share in shares]
    each = ", ".join(str(n) for n in train) if len(train) <= FEW else f"{min(train):,} to {max(train):,}"
    classes = f", {count_text(len(labels), 'label')}" if labels else ""
    return f"{sum(train):,} training and {sum(test):,} test examples{classes}; training examples of a client: {each}"


def _shares(spec: JobSpec, compute: ComputeOptions) -> tuple[tuple[str, ...], tuple[ClientExamples, ...] | None]:
    """Split the data as the clients would; the null model has none."""
    if is_null(spec.model.name):
        return (), None
    from lorabbit_client.dataset import describe  # noqa: PLC0415 - what null jobs do not need

    outline = describe(spec, spec.clients, compute.data_root)
    return outline.labels, tuple(ClientExamples(train=c.train, test=c.test) for c in outline.clients)


def _own_models(spec: JobSpec, compute: ComputeOptions, scratch: Path) -> dict[str, int]:
    """Build each architecture as a client that has it would, and count its parameters."""
    names = (spec.model.variants or (spec.model.name,))[: spec.clients]
    sizes = (
        _number(_initialize(spec, compute, scratch, index=k)[0].metrics.facts, "own_parameters")
        for k in range(len(names))
    )
    return {name: size for name, size in zip(names, sizes, strict=True) if size is not None}


def _initialize(spec: JobSpec, compute: ComputeOptions, scratch: Path, *, index: int = 0) -> tuple[TaskResult, Path]:
    """Make the first adapter as the first client of a run would, or another one in its place."""
    task = Task(
        job=spec.name,
        task="forecast",
        client=f"client-{index + 1}",
        index=index,
        population=spec.clients,
        round=0,
        attempt=1,
        epoch=0,
        phase=INITIALIZE,
        seed=spec.seed,
        payloads={},
        settings={},
        spec=spec,
    )
    path = scratch / "first.safetensors"
    executor = Executor(threads=compute.threads, data_root=compute.data_root, device=compute.device)
    outcome = executor.execute(TaskInput(task, {}, path, scratch, scratch / "privacy.json"), lambda *_: None)
    if outcome.error is not None:
        raise BadInput(outcome.error) if outcome.bad_input else RunFailed(outcome.error)
    return outcome, path


def _payload(method: Method, adapter: Tensors, scratch: Path, spec: JobSpec) -> PayloadSize:
    """Ask the method what travels in the first round, and after an update in which everything has changed."""
    client = ClientProfile(ClientId("client-1"), 0)
    wire = WireSizes(spec.transport, scratch, keeps_up=spec.cohort_size == spec.clients)
    first = method.start(adapter)
    if method.prepares:  # as if nobody had found anything out: what is chosen is alike in size, whichever it is
        told = dict(method.plan(first, client).settings)
        first = method.aggregate(first, [ClientUpdate(client.client, client.index, {}, 1, math.nan, told)])
    template = method.uploads(first, client)
    plan = method.plan(first, client)
    up = wire.up(template, plan) if template else 0
    before = wire.down(plan)
    if method.personal:  # what later rounds send hangs on what clients answer, and is no more than at first
        size, scored = sum(before.values()), wire.down(method.scoring(first, client))
        again = sum(size for sha256, size in scored.items() if sha256 in before)
        return PayloadSize(up=up, down_first=size, down=size, down_evaluation=sum(scored.values()), shared=again)
    moved = {name: _perturbed(value) for name, value in template.items()}
    told = dict(plan.settings)  # answers name what they were trained from
    answering = range(min(2, spec.clients, spec.asked_in_a_round))
    updates = [ClientUpdate(ClientId(f"client-{k + 1}"), k, moved, 1, 0.0, told) for k in answering]
    later = method.aggregate(first, updates)
    fresh = wire.down(method.plan(later, client), held=before, origin=plan.payloads.get(ADAPTER))
    scored = wire.down(method.scoring(later, client), held=before, origin=plan.payloads.get(ADAPTER))
    return PayloadSize(
        up=up,
        down_first=sum(before.values()),
        down=sum(fresh.values()),
        down_evaluation=sum(scored.values()),
        shared=sum(size for sha256, size in scored.items() if sha256 in fresh),
    )


def _perturbed(value: Array) -> Array:
    """Another tensor of the same kind."""
    return np.add(value, value.dtype.type(1)) if is_floating(value) else value


def _evaluating(spec: JobSpec) -> int:
    return 1 if spec.evaluation.on == CENTRAL else spec.clients


def _totals(spec: JobSpec, payload: PayloadSize, first_adapter: int) -> tuple[int, int, int]:
    """Bytes up and down of a scored round, and both of the whole job."""
    cohort, evaluating = spec.asked_in_a_round, _evaluating(spec)
    shared = 0 if spec.evaluation.on == CENTRAL else payload.shared
    up = cohort * payload.up
    scoring = evaluating * payload.down_evaluation
    down = scoring + cohort * (payload.down - (shared if spec.evaluation.every == 1 else 0))
    total = first_adapter + spec.rounds * up + cohort * payload.down_first
    for number in range(2, spec.rounds + 1):
        total += cohort * (payload.down - (shared if spec.evaluates(number - 1) else 0))
    total += scoring * sum(spec.evaluates(number) for number in range(1, spec.rounds + 1))
    return up, down, total


def _number(facts: Mapping[str, JsonValue], name: str) -> int | None:
    value = facts.get(name)
    return value if isinstance(value, int) else None
