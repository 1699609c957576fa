"""Replay: make every version of a run again, from its log and the updates it kept, and compare the sha256.

Nothing is trained and no service runs: the same pure steps that the server took are taken again, so an
asynchronous run, whose order of arrival no second run repeats, can be checked to the bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabbit import job_loader
from lorabbit.aggregation import partial_work
from lorabbit.aggregation.staleness import StalenessCorrection, staleness_weight
from lorabbit.compression import compressed_file, compressor
from lorabbit.errors import BadInput
from lorabbit.events import job_events as ev
from lorabbit.job.spec import CompressionSpec, JobSpec
from lorabbit.methods.api.method import Method
from lorabbit.methods.registry import build
from lorabbit.protocol.messages import PayloadRef
from lorabbit.tensors import serialization
from lorabbit.transfer.payload_store import CHUNK_BYTES, PayloadStore
from lorabbit.types import ADAPTER, TRAIN, ClientId, ClientProfile, ServerState, Tensors
from lorabbit_server.aggregation.aggregator import UpdateContext, aggregate
from lorabbit_server.artifacts.update_archive import FOLDER, LOG
from lorabbit_server.engine.state import TaskState, UploadOffer


@dataclass(frozen=True, slots=True)
class ReplayedVersion:
    """One version, made again."""

    round: int
    updates: int
    sha256: str
    """Of the adapter made again."""
    expected: str
    """Of the adapter that the run made."""

    @property
    def is_same(self) -> bool:
        """Whether they are equal to the bit."""
        return self.sha256 == self.expected


def replay(folder: Path) -> Iterator[ReplayedVersion]:
    """Make the versions of a run's folder again, first to last; raises BadInput where the folder lacks something."""
    log = _log(folder)
    spec = job_loader.load(folder / "job.yaml")
    return _versions(spec, log, PayloadStore(folder / FOLDER, durable=False))


def _log(folder: Path) -> list[ev.AnyEvent]:
    path = folder / FOLDER / LOG
    if not folder.is_dir():
        raise BadInput(f"there is no run folder {folder}; name one that a run left, such as runs/quickstart")
    if not path.is_file():
        raise BadInput(f"{folder} kept no updates; run the job with --set output.keep_updates=true")
    return [ev.EVENTS.validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _versions(spec: JobSpec, log: list[ev.AnyEvent], payloads: PayloadStore) -> Iterator[ReplayedVersion]:
    """Go through the log as the server did; `waiting` are the results that count and are in no version yet."""
    method = build(spec)
    clients = _population(log)
    accepted = [event for event in log if isinstance(event, ev.UpdateAccepted)]
    states: dict[int, ServerState] = {}
    waiting: list[ev.UpdateAccepted] = []
    newest = 0
    for event in log:
        if isinstance(event, ev.UpdateAccepted):
            waiting.append(event)
        elif isinstance(event, ev.UpdateRejected):
            waiting = _without(waiting, event)
        elif isinstance(event, ev.AdapterInitialized):
            first = waiting.pop().sha256
            states[0] = method.start({} if first is None else serialization.read_tensors(_path(payloads, first)))
        elif isinstance(event, ev.RoundClosed):
            made_of = [each for each in waiting if _version_of(each) == event.round]
            tasks = [_task(each, clients.index(each.client), payloads) for each in made_of]
            background = _background(method, states, list(zip(made_of, tasks, strict=True)), newest=newest)
            states[event.round] = aggregate(method, states[newest], tasks, payloads=payloads, background=background)
            newest = event.round
            waiting = [each for each in waiting if _version_of(each) > newest]
            needed = {newest, *(each.started for each in accepted if _version_of(each) > newest)}
            states = {number: state for number, state in states.items() if number in needed}
            sha256 = serialization.tensors_sha256(method.export(states[newest]).tensors)
            yield ReplayedVersion(event.round, len(tasks), sha256, event.sha256)


def _version_of(update: ev.UpdateAccepted) -> int:
    """The version that an update becomes a part of."""
    return update.started + 1 + update.staleness


def _without(waiting: Sequence[ev.UpdateAccepted], useless: ev.UpdateRejected) -> list[ev.UpdateAccepted]:
    """Leave out a result that could not be folded; where it was the last of its version, those that wait are folded."""
    which = (useless.client, useless.started, useless.turn)
    left = [each for each in waiting if (each.client, each.started, each.turn) != which]
    if any(_version_of(each) == useless.round for each in left):
        return left
    return [each.model_copy(update={"staleness": useless.round - 1 - each.started}) for each in left]


def _population(log: list[ev.AnyEvent]) -> tuple[str, ...]:
    """The clients by index, those that joined later included."""
    started = next((event.clients for event in log if isinstance(event, ev.JobStarted)), ())
    return (*started, *(e.client for e in log if isinstance(e, ev.ClientJoined) and e.index is not None))


def _background(
    method: Method,
    states: Mapping[int, ServerState],
    made_of: Sequence[tuple[ev.UpdateAccepted, TaskState]],
    *,
    newest: int,
) -> UpdateContext:
    """What the updates of a version are differences to, and how late ones came to it."""
    job = method.job
    accepted = [event for event, _ in made_of]
    scales = partial_work.factors(job, [e.metrics.num_examples for e in accepted], [e.share for e in accepted])
    corrections, origins = {}, {}
    for (event, task), scale in zip(made_of, scales, strict=True):
        profile = ClientProfile(task.client, task.index)
        adapter = method.plan(states[event.started], profile).payloads.get(ADAPTER)
        if adapter is not None and job.transport.uploads.delta:
            origins[task.id] = _origin(adapter, job.transport.downloads)
        if event.staleness or scale != 1.0:
            old, new = method.uploads(states[event.started], profile), method.uploads(states[newest], profile)
            corrections[task.id] = StalenessCorrection(
                old, new, scale * staleness_weight(job.schedule, event.staleness)
            )
    return UpdateContext(corrections, origins)


def _origin(adapter: Tensors, downloads: CompressionSpec) -> compressed_file.DeltaBase:
    """An adapter as its clients had it."""
    if downloads.is_lossy:
        with tempfile.TemporaryDirectory() as scratch:
            compressor.write_compressed(Path(scratch) / "adapter", adapter, downloads)
            adapter = compressed_file.open_tensors(Path(scratch) / "adapter")
    return compressed_file.DeltaBase(serialization.tensors_sha256(adapter), adapter)


def _task(event: ev.UpdateAccepted, index: int, payloads: PayloadStore) -> TaskState:
    """The task behind an update, as the server had it."""
    ref = None
    if event.sha256 is not None:
        size = _path(payloads, event.sha256).stat().st_size
        ref = PayloadRef(sha256=event.sha256, size_bytes=size, chunk_bytes=CHUNK_BYTES)
    name = f"r{event.started + 1}.k{index}.n{event.turn}"
    offered = UploadOffer(event.metrics, ref)
    return TaskState(name, TRAIN, event.started + 1, ClientId(event.client), index, turn=event.turn, offered=offered)


def _path(payloads: PayloadStore, sha256: str) -> Path:
    path = payloads.path(sha256)
    if not path.is_file():
        raise BadInput(f"{path} is missing; a replay needs every update of the run")
    return path
