"""Aggregation of a round's updates into the next server state, from disk, one tensor at a time.

Updates are read lazily in ascending client index, so the sum is the same to the bit whatever the
order of arrival. A plain mean holds one accumulator and one tensor whatever the number of clients;
rules for LoRA factors hold one module of all clients (`lorabbit.aggregation`), robust ones their
Gram matrices besides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorabbit.aggregation.staleness import StalenessCorrection
from lorabbit.compression import compressed_file
from lorabbit.errors import LoRAbbitError, Refused
from lorabbit.methods.api.method import Method
from lorabbit.privacy import gaussian_mechanism
from lorabbit.robust import defense
from lorabbit.runtime import failpoints
from lorabbit.tensors import serialization
from lorabbit.transfer.payload_store import PayloadStore
from lorabbit.types import ClientUpdate, Json, ServerState, Tensors
from lorabbit_server.aggregation.model_versions import ModelVersionStore
from lorabbit_server.aggregation.update_validation import UpdateTemplate
from lorabbit_server.engine.state import ModelVersion, TaskState, UploadOffer
from lorabbit_server.engine.transitions import Aggregate, MethodStarted, RoundAggregated, UpdatesUnusable


@dataclass(frozen=True, slots=True)
class UpdateContext:
    """What is needed to interpret updates, by task."""

    corrections: Mapping[str, StalenessCorrection] = field(default_factory=dict)
    """Corrections of updates that started from an older version."""
    origins: Mapping[str, compressed_file.DeltaBase] = field(default_factory=dict)
    """Bases of updates that are differences."""


@dataclass(frozen=True, slots=True)
class AcceptedUpdates(Iterable[ClientUpdate]):
    """The updates of accepted tasks; can be iterated several times."""

    method: Method
    tasks: Sequence[TaskState]
    payloads: PayloadStore
    background: UpdateContext = UpdateContext()

    def __iter__(self) -> Iterator[ClientUpdate]:
        """Yield the updates with lazily read tensors."""
        for task in self.tasks:
            if task.offered is None:
                continue
            metrics, payload = task.offered.metrics, task.offered.payload
            tensors: Tensors = {}
            if payload is not None:
                path = self.payloads.path(payload.sha256)
                tensors = compressed_file.open_tensors(path, self.background.origins.get(task.id))
            if task.id in self.background.corrections:
                tensors = self.method.corrected(tensors, self.background.corrections[task.id])
            yield ClientUpdate(
                task.client,
                task.index,
                tensors,
                metrics.num_examples,
                math.nan if metrics.loss is None else metrics.loss,
                metrics.facts,
            )


def aggregate(
    method: Method,
    state: ServerState,
    tasks: Sequence[TaskState],
    *,
    payloads: PayloadStore,
    background: UpdateContext | None = None,
) -> ServerState:
    """Aggregate the round's updates with the method, after the job's robust defense.

    They come in ascending client index, then in the order they were asked for.
    """
    ordered = sorted(tasks, key=lambda task: (task.index, task.round, task.turn))
    received = AcceptedUpdates(method, ordered, payloads, background or UpdateContext())
    job = method.job
    guarded, defended = defense.defend(job, state, received)
    folded = method.aggregate(state, gaussian_mechanism.protect(job, state, guarded))
    facts, spent = gaussian_mechanism.spending(job, state, received)
    told: dict[str, Json] = {name: dict(part) for name, part in (("robust", defended), ("privacy", spent)) if part}
    if not told:
        return folded
    return replace(folded, facts={**folded.facts, **facts, "report": {**folded.report, **told}})


def first_version(versions: ModelVersionStore, offered: UploadOffer) -> tuple[ModelVersion, int]:
    """Save the state made from the first adapter; returns it and the number of exported parameters."""
    store, payload = versions.payloads, offered.payload
    adapter: Tensors = {} if payload is None else serialization.read_tensors(store.path(payload.sha256))
    version = versions.save(versions.method.start(adapter))
    return version, UpdateTemplate.of(serialization.read_tensors(store.path(version.adapter.sha256))).parameters


def next_version(
    versions: ModelVersionStore, state: ServerState, tasks: Sequence[TaskState], *, background: UpdateContext
) -> tuple[ModelVersion, float]:
    """Aggregate a round and save the new state; returns it and the seconds that it took."""
    failpoints.hit(failpoints.Failpoint.AGGREGATING)
    began = time.monotonic()
    folded = aggregate(versions.method, state, tasks, payloads=versions.payloads, background=background)
    version = versions.save(folded)
    failpoints.hit(failpoints.Failpoint.VERSION_WRITTEN)
    return version, time.monotonic() - began


def start_method(
    versions: ModelVersionStore, task: TaskState, facts: Mapping[str, Json]
) -> MethodStarted | UpdatesUnusable:
    """Make the first server state from the initial adapter, or report why it is unusable."""
    assert task.offered is not None  # noqa: S101 - an accepted task was offered
    try:
        version, parameters = first_version(versions, task.offered)
    except (LoRAbbitError, KeyError, IndexError, TypeError, ValueError) as error:
        return UpdatesUnusable(task.round, {task.id: f"first-adapter: {error or type(error).__name__}"})
    return MethodStarted(version, parameters, facts)


def aggregate_round(
    versions: ModelVersionStore, state: ServerState, folded: Aggregate, *, background: UpdateContext
) -> RoundAggregated | UpdatesUnusable:
    """Aggregate a round, or report the updates that cannot be aggregated even alone."""
    try:
        version, seconds = next_version(versions, state, folded.tasks, background=background)
    except Refused:
        reasons = {}
        for task in folded.tasks:
            try:
                aggregate(versions.method, state, [task], payloads=versions.payloads, background=background)
            except Refused as why:
                reasons[task.id] = str(why)
        if not reasons:
            raise
        return UpdatesUnusable(folded.round, reasons)
    return RoundAggregated(folded.round, version, seconds)
