"""Replay: make every version of a run again, from its log and the updates it kept, and compare the sha256.

Nothing is trained and no service runs: the same pure steps that the server took are taken again, so an
asynchronous run, whose order of arrival no second run repeats, can be checked to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorabbit import codec, jobfile, work
from lorabbit import events as ev
from lorabbit.errors import BadInput
from lorabbit.jobspec import JobSpec
from lorabbit.messages import PayloadRef
from lorabbit.methods import build
from lorabbit.payloads import CHUNK_BYTES, PayloadStore
from lorabbit.schedules import worth
from lorabbit.types import INITIALISE, TRAIN, ClientId, ClientProfile, ServerState, Tensors
from lorabbit_server.aggregator import Carry, aggregate
from lorabbit_server.evidence import FOLDER, LOG
from lorabbit_server.jobstate import Offered, TaskState


@dataclass(frozen=True, slots=True)
class Replayed:
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


def replay(folder: Path) -> Iterator[Replayed]:
    """Make the versions of a run's folder again, first to last; raises BadInput where the folder lacks something."""
    log = _log(folder)
    spec = jobfile.load(folder / "job.yaml")
    return _versions(spec, log, PayloadStore(folder / FOLDER, durable=False))


def _log(folder: Path) -> list[ev.AnyEvent]:
    path = folder / FOLDER / LOG
    if not folder.is_dir():
        raise BadInput(f"there is no run folder {folder}; name one that a run left, such as runs/quickstart")
    if not path.is_file():
        raise BadInput(f"{folder} kept no updates; run the job with --set output.keep_updates=true")
    return [ev.EVENTS.validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _versions(spec: JobSpec, log: list[ev.AnyEvent], payloads: PayloadStore) -> Iterator[Replayed]:
    method = build(spec)
    clients = _population(log)
    accepted = [event for event in log if isinstance(event, ev.UpdateAccepted)]
    states: dict[int, ServerState] = {}
    for event in accepted:
        if event.phase == INITIALISE:
            adapter: Tensors = {} if event.sha256 is None else codec.read_tensors(_path(payloads, event.sha256))
            states[0] = method.start(adapter)
    newest = 0
    for closed in (event for event in log if isinstance(event, ev.RoundClosed)):
        made_of = [
            each for each in accepted if each.phase == TRAIN and each.started + 1 + each.staleness == closed.round
        ]
        tasks = [_task(each, clients.index(each.client), payloads) for each in made_of]
        scales = work.factors(spec, [e.metrics.num_examples for e in made_of], [e.share for e in made_of])
        carries = {}
        for each, task, scale in zip(made_of, tasks, scales, strict=True):
            if each.staleness or scale != 1.0:
                profile = ClientProfile(task.client, task.index)
                old, new = method.uploads(states[each.started], profile), method.uploads(states[newest], profile)
                carries[task.id] = Carry(old, new, scale * worth(spec.schedule, each.staleness))
        states[closed.round] = aggregate(method, states[newest], tasks, payloads=payloads, carries=carries)
        newest = closed.round
        needed = {each.started for each in accepted if each.started + 1 + each.staleness > newest}
        states = {number: state for number, state in states.items() if number in needed or number == newest}
        sha256 = codec.tensors_sha256(method.export(states[newest]).tensors)
        yield Replayed(closed.round, len(tasks), sha256, closed.sha256)


def _population(log: list[ev.AnyEvent]) -> tuple[str, ...]:
    """The clients by index, those that joined later included."""
    started = next((event.clients for event in log if isinstance(event, ev.JobStarted)), ())
    return (*started, *(e.client for e in log if isinstance(e, ev.ClientJoined) and e.index is not None))


def _task(event: ev.UpdateAccepted, index: int, payloads: PayloadStore) -> TaskState:
    """The task behind an update, as the server had it."""
    ref = None
    if event.sha256 is not None:
        size = _path(payloads, event.sha256).stat().st_size
        ref = PayloadRef(sha256=event.sha256, size_bytes=size, chunk_bytes=CHUNK_BYTES)
    name = f"r{event.started + 1}.k{index}.n{event.turn}"
    offered = Offered(event.metrics, ref)
    return TaskState(name, TRAIN, event.started + 1, ClientId(event.client), index, turn=event.turn, offered=offered)


def _path(payloads: PayloadStore, sha256: str) -> Path:
    path = payloads.path(sha256)
    if not path.is_file():
        raise BadInput(f"{path} is missing; a replay needs every update of the run")
    return path
