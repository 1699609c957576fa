"""The path of an update through the server, from the arrival of a chunk to the aggregation of its round.

A visit is a call from a function of one server module into a function of another. The update that is followed is the
last one of its round, so the path ends in the aggregation. Not counted are

* `LOOKUPS`: functions that return a value and change nothing but a cache;
* calls of the event loop, and the callbacks of `CALLBACKS`: a module that waited for the worker thread or the commit
  continues there, as after an `await`;
* calls by the outbox, which concern the message that it sends;
* `artifacts/fenced_files`, which writes one file a call, as the payload store of the library does;
* `RELEASES`: where a round closes without a client, its runner frees what was held for the canceled task. This is not
  part of the update's path; a test names the one schedule in which it happens.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import scripted_client
from scripted_client import ScriptedClient
from server_rig import Rig
from tree import ROOT

import lorabbit_server
from lorabbit.broker.base import Delivery
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import Grant, Task
from lorabbit.types import TRAIN
from lorabbit_server.aggregation import aggregator
from lorabbit_server.job.message_router import MessageRouter

SERVER = Path(lorabbit_server.__file__).parent
EVENT_LOOP = "event_loop"
OUTBOX = "job/outbox"
FILES = "artifacts/fenced_files"
COMPREHENSIONS = {"<dictcomp>", "<genexpr>", "<listcomp>", "<setcomp>"}
"""Python 3.11 gives them frames of their own; they belong to the function around them."""
LOOKUPS = {
    ("server", "<lambda>"),  # the running job
    ("clients/registry", "at"),
    ("clients/registry", "get"),
    ("job/unit_of_work", "state"),
    ("transfer/traffic_meter", "read"),
    ("engine/scheduling", "is_too_stale"),
    ("engine/scheduling", "staleness"),
    ("engine/scheduling", "accepted_updates"),
    ("engine/scheduling", "required_updates"),
    ("engine/tasks", "sorted_tasks"),
    ("engine/state", "dump_header"),
    ("engine/state", "dump_task"),
    ("engine/state", "hashes"),
    ("engine/state", "payloads"),
    ("engine/state", "version_for"),
    ("engine/state", "versions"),
    ("aggregation/model_versions", "load"),
}
CALLBACKS = {
    ("job/unit_of_work", "job/job_runner", "_on_committed"),
    ("job/unit_of_work", "job/job_runner", "<lambda>"),
    ("job/job_runner", "server", "_on_events"),
    ("artifacts/run_directory", "artifacts/update_archive", "work"),
}
"""Registered by the module that is called: the continuation of its own visit."""
CONTINUATIONS = {
    (EVENT_LOOP, "_run"),
    (EVENT_LOOP, "done"),
    (EVENT_LOOP, "work"),
    (EVENT_LOOP, "take"),
    ("", "guarded"),
}
"""Calls of the event loop: commit of the pending step, end of a validation, writing of files, and the next message."""
RELEASES = {
    ("job/job_runner", "transfer/uploads", "retain"),
    ("job/job_runner", "transfer/traffic_meter", "retain"),
    ("job/job_runner", "aggregation/model_versions", "retain"),
}
CHUNK = ["job/message_router", "clients/enrollment", "transfer/uploads", "transfer/traffic_meter"]
"""Modules that a chunk visits after which others are still missing."""
QUORUM = {"kind": "quorum", "quorum": 0.6, "over_select": 1.0}
JOBS: Mapping[str, Mapping[str, object]] = {
    "one client": {"clients": 1},
    "sync": {"clients": 2},
    "quorum, late updates refused": {"clients": 3, "schedule": {**QUORUM, "late": "refuse"}},
    "quorum, late updates kept": {"clients": 3, "schedule": {**QUORUM, "late": "keep"}},
    "buffered": {"clients": 3, "schedule": {"kind": "buffered", "buffer": 2}},
    "updates archived": {"clients": 2, "output": {"keep_updates": True}},
}
Call = tuple[str, str, str]


def module_of(frame: FrameType | None) -> str:
    """Return the module of the server that a frame, or the nearest one above it, belongs to."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(SERVER):
            return path.relative_to(SERVER).with_suffix("").as_posix()
        frame = frame.f_back
    return ""


def is_visit(call: Call) -> bool:
    caller, callee, name = call
    return (
        callee not in {EVENT_LOOP, FILES}
        and caller not in {OUTBOX, FILES}
        and (callee, name) not in LOOKUPS
        and (caller, name) not in CONTINUATIONS
        and call not in CALLBACKS | RELEASES
    )


class Recorder:
    """Records calls from one module into another, for each chunk since its arrival, until the round is aggregated."""

    def __init__(self) -> None:
        self.chunks: list[list[Call]] = []
        self.is_armed = self.is_on = False

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if not self.is_on or event != "call" or not Path(frame.f_code.co_filename).is_relative_to(SERVER):
            return
        caller, callee, name = module_of(frame.f_back), module_of(frame), frame.f_code.co_name
        if caller != callee and name not in COMPREHENSIONS:
            self.chunks[-1].append((caller, callee, name))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Record from each chunk on, without control messages that come in between."""
        on_data, on_control = MessageRouter.on_data, MessageRouter.on_control
        aggregate_round = aggregator.aggregate_round

        def begin(router: MessageRouter, delivery: Delivery) -> None:
            if self.is_armed:
                self.chunks.append([])
                self.is_on = True
            on_data(router, delivery)

        def other_message(router: MessageRouter, delivery: Delivery) -> None:
            was_on, self.is_on = self.is_on, False
            on_control(router, delivery)
            self.is_on = was_on

        def end(*args: Any, **kwargs: Any) -> Any:
            if self.is_on:
                self.chunks[-1].append(("job/job_runner", "aggregation/aggregator", "aggregate_round"))
            self.is_on = self.is_armed = False
            return aggregate_round(*args, **kwargs)

        monkeypatch.setattr(MessageRouter, "on_data", begin)
        monkeypatch.setattr(MessageRouter, "on_control", other_message)
        monkeypatch.setattr(aggregator, "aggregate_round", end)

    def visits(self, chunk: int = -1) -> list[str]:
        return [callee for caller, callee, name in self.chunks[chunk] if is_visit((caller, callee, name))]

    @property
    def releases(self) -> set[Call]:
        return {call for calls in self.chunks for call in calls} & RELEASES


class Clients:
    """How the clients of a rig behave: the update of one of them is the last that the first round waits for.

    The second client holds it back until `send_last`; a third one never sends any. With one client it is the only one.
    Where clients do not wait for each other, the first one trains once.
    """

    def __init__(self, rig: Rig) -> None:
        self._last = rig.clients[min(1, len(rig.clients) - 1)]
        self._held: list[Grant] = []
        self._trained = 0
        rig.clients[0].work = self._train_once
        for client in rig.clients[rig.clients.index(self._last) :]:
            client.on_grant = self._hold

    def _train_once(self, _client: ScriptedClient, task: Task) -> bool:
        self._trained += is_training(task.task)
        return self._trained > 1

    def _hold(self, _client: ScriptedClient, grant: Grant) -> bool:
        if is_training(grant.task):
            self._held.append(grant)
        return is_training(grant.task)

    def send_last(self) -> int:
        """Send the chunks of the last update; returns their number."""
        (grant,) = (grant for grant in self._held if grant.client == self._last.client)
        self._last.upload(grant)
        return len(grant.missing)


def is_training(task: str) -> bool:
    return f".{TRAIN}." in task


def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Mapping[str, object]) -> Recorder:
    """Run the first round of a job; record the last update that it waits for."""
    recorder = Recorder()
    recorder.install(monkeypatch)
    monkeypatch.setattr(scripted_client, "SHAPES", {"a": (40, 30), "b": (3,)})
    rig = Rig(tmp_path, clients=int(str(job["clients"])))
    clients = Clients(rig)
    service = rig.serve()
    rig.start_clients()
    service.submit(JobSpec.model_validate({"name": "one", "rounds": 2, "model": {"name": "null:1KB"}, **job}))
    rig.idle()
    recorder.is_armed = True
    sys.setprofile(recorder)
    try:
        sent = clients.send_last()
        rig.idle()
    finally:
        sys.setprofile(None)
    assert len(recorder.chunks) == sent
    return recorder


def documented() -> list[str]:
    """Return the modules in the table of docs/explanation/architecture.md, in its order."""
    text = (ROOT / "docs/explanation/architecture.md").read_text(encoding="utf-8")
    section = text.partition("## Path of an update")[2].partition("\n## ")[0]
    return re.findall(r"^\| \d+ \| `([\w/]+)\.py`", section, re.MULTILINE)


@pytest.mark.parametrize("name", JOBS)
def test_an_update_visits_each_module_at_most_once_in_the_documented_order(tmp_path, monkeypatch, name) -> None:
    recorder = record(tmp_path, monkeypatch, JOBS[name])

    visits = recorder.visits()
    assert len(visits) == len(set(visits)), visits
    assert visits == documented()
    assert len(recorder.chunks) > 1
    assert all(recorder.visits(chunk) == CHUNK for chunk in range(len(recorder.chunks) - 1))


@pytest.mark.parametrize("name", JOBS)
def test_only_a_round_that_closes_without_a_client_releases_what_was_held_for_it(tmp_path, monkeypatch, name) -> None:
    released = record(tmp_path, monkeypatch, JOBS[name]).releases

    assert released == (RELEASES if name == "quorum, late updates refused" else set())


@pytest.mark.parametrize(
    ("call", "module"),
    [
        (("aggregation/aggregator", "transfer/uploads", "on_chunk"), "transfer/uploads"),
        (("engine/rounds", "engine/results", "<lambda>"), "engine/results"),
        (("transfer/uploads", "job/message_router", "on_control"), "job/message_router"),
    ],
)
def test_a_second_visit_would_be_noticed(tmp_path, monkeypatch, call, module) -> None:
    recorder = record(tmp_path, monkeypatch, JOBS["sync"])

    recorder.chunks[-1].append(call)

    assert recorder.visits().count(module) == 2
