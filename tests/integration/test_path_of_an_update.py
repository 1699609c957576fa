"""The path of an update through the server, from the arrival of its last chunk to the aggregation of its round.

The test records every call from one module of the server into another. Callbacks that a module has registered itself
return control to it and belong to the same visit, and so do calls by the event loop. Lookups, which return a value and
change nothing, are not visits; `LOOKUPS` names them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType

from server_rig import Rig
from tree import ROOT

import lorabbit_server
from lorabbit.job.spec import JobSpec
from lorabbit_server.aggregation import aggregator
from lorabbit_server.job.message_router import MessageRouter

SERVER = Path(lorabbit_server.__file__).parent
EVENT_LOOP = "event_loop"
OUTBOX = "job/outbox"
"""What it calls concerns the message that it sends, not the update."""
LOOKUPS = {
    ("clients/registry", "at"),
    ("clients/registry", "get"),
    ("job/unit_of_work", "state"),
    ("job/unit_of_work", "post"),
    ("transfer/traffic_meter", "read"),
    ("engine/scheduling", "is_too_stale"),
    ("engine/scheduling", "staleness"),
    ("engine/scheduling", "accepted_updates"),
    ("engine/scheduling", "required_updates"),
    ("engine/tasks", "in_order"),
    ("engine/state", "dump_header"),
    ("engine/state", "dump_task"),
    ("engine/state", "version_for"),
    ("aggregation/model_versions", "load"),
}
CALLBACKS = {
    ("job/unit_of_work", "job/job_runner", "_on_committed"),
    ("job/unit_of_work", "job/job_runner", "<lambda>"),
    ("job/job_runner", "server", "_on_events"),
}
"""Registered by the module that is called: the continuation of its own visit."""
CONTINUATIONS = {(EVENT_LOOP, "_run"), (EVENT_LOOP, "done"), (EVENT_LOOP, "take"), ("", "guarded")}
"""Calls of the event loop: the commit of the pending step, the end of a validation, and the next message."""


def module_of(frame: FrameType | None) -> str:
    """Return the module of the server that a frame, or the nearest one above it, belongs to."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(SERVER):
            return path.relative_to(SERVER).with_suffix("").as_posix()
        frame = frame.f_back
    return ""


class Recorder:
    """Records calls from one module into another while it is on."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str]] = []
        self.is_on = False

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if not self.is_on or event != "call" or not Path(frame.f_code.co_filename).is_relative_to(SERVER):
            return
        caller, callee, name = module_of(frame.f_back), module_of(frame), frame.f_code.co_name
        if caller != callee and not name.startswith("<"):
            self.calls.append((caller, callee, name))

    @property
    def visits(self) -> list[str]:
        return [
            callee
            for caller, callee, name in self.calls
            if (callee, name) not in LOOKUPS
            and (caller, callee, name) not in CALLBACKS
            and callee != EVENT_LOOP
            and (caller, name) not in CONTINUATIONS
            and caller != OUTBOX
        ]


def recorded(tmp_path: Path, monkeypatch) -> Recorder:
    """Run one round of one client; record from the last chunk of its update to the aggregation."""
    recorder, on_data, on_control = Recorder(), MessageRouter.on_data, MessageRouter.on_control
    aggregate_round = aggregator.aggregate_round

    def begin(self, delivery):
        recorder.calls, recorder.is_on = [], True
        on_data(self, delivery)

    def other_message(self, delivery):
        was_on, recorder.is_on = recorder.is_on, False
        on_control(self, delivery)
        recorder.is_on = was_on

    def end(*args, **kwargs):
        recorder.is_on = False
        recorder.calls.append(("job/job_runner", "aggregation/aggregator", "aggregate_round"))
        return aggregate_round(*args, **kwargs)

    rig = Rig(tmp_path, clients=1)
    monkeypatch.setattr(MessageRouter, "on_data", begin)
    monkeypatch.setattr(MessageRouter, "on_control", other_message)
    monkeypatch.setattr(aggregator, "aggregate_round", end)
    service = rig.serve()
    rig.start_clients()
    service.submit(JobSpec.model_validate({"name": "one", "clients": 1, "rounds": 1, "model": {"name": "null:1KB"}}))
    sys.setprofile(recorder)
    try:
        rig.idle()
    finally:
        sys.setprofile(None)
    assert rig.ended == ["one"]
    return recorder


def documented() -> list[str]:
    """Return the modules in the table of docs/explanation/architecture.md, in its order."""
    text = (ROOT / "docs/explanation/architecture.md").read_text(encoding="utf-8")
    section = text.partition("## Path of an update")[2].partition("\n## ")[0]
    return re.findall(r"^\| \d+ \| `([\w/]+)\.py`", section, re.MULTILINE)


def test_an_update_visits_each_module_at_most_once_in_the_documented_order(tmp_path, monkeypatch) -> None:
    visits = recorded(tmp_path, monkeypatch).visits

    assert len(visits) == len(set(visits)), visits
    assert visits == documented()


def test_a_second_visit_would_be_noticed(tmp_path, monkeypatch) -> None:
    recorder = recorded(tmp_path, monkeypatch)

    recorder.calls.append(("aggregation/aggregator", "transfer/uploads", "on_chunk"))

    assert recorder.visits.count("transfer/uploads") == 2
