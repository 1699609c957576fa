"""What a job's steps leave in the store, in simulated time."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
from server_rig import Rig

from lorabbit.broker import topology
from lorabbit.broker.memory import MemoryBroker
from lorabbit.job.spec import JobSpec
from lorabbit.protocol.messages import CancelTask, Task
from lorabbit.runtime import failpoints
from lorabbit.runtime.failpoints import Failpoint
from lorabbit_server.job.unit_of_work import PendingMessage, Step

SPEC = JobSpec(name="job", clients=2, rounds=1)
TASKS = {Task.type_name(), CancelTask.type_name()}


class SlowConfirmations(MemoryBroker):
    """Delivers messages to clients at once, and confirms them when a test says so."""

    def __init__(self, **options):
        super().__init__(**options)
        self.held = []

    def send(self, message, on_done=None):
        if message.exchange == topology.CONTROL and message.type in TASKS:
            self.held.append(lambda: on_done(None))
            super().send(message)
        else:
            super().send(message, on_done)


def started(rig):
    """Submit a job whose first task is sent to a client that does nothing about it."""
    for client in rig.clients:
        client.work = lambda _client, _task: True
    rig.serve()
    rig.start_clients()
    rig.service.submit(SPEC)
    rig.idle()
    return rig


@pytest.fixture
def rig(tmp_path):
    return started(Rig(tmp_path))


def test_messages_are_deleted_two_seconds_after_the_broker_has_confirmed_them(rig):
    assert [len(client.tasks) for client in rig.clients] == [1, 0]

    rig.pass_seconds(1.5)
    kept = rig.store.outbox("job")
    rig.pass_seconds(0.5)

    assert len(kept) == 1
    assert rig.store.outbox("job") == []


def test_confirmed_messages_of_a_closed_job_stay_in_the_store(rig):
    before = rig.store.load_job("job")

    rig.service._run._unit_of_work.close()
    rig.pass_seconds(3.0)

    assert rig.store.load_job("job") == before
    assert len(rig.store.outbox("job")) == 1


def test_delivery_is_reported_once_the_last_of_several_steps_is_confirmed(tmp_path):
    rig, done = started(Rig(tmp_path, broker=SlowConfirmations)), []
    work, (waiting,) = rig.service._run._unit_of_work, rig.broker.held
    message = CancelTask(job="job", task="t", client="client-1")
    work.add(Step(work.state, messages=[PendingMessage("host-1", message, "id")]))
    rig.idle()
    work.when_delivered(lambda: done.append(True))

    waiting()
    rig.idle()
    assert done == []

    rig.broker.held[1]()
    rig.idle()
    assert done == [True]


def test_a_step_that_changes_nothing_is_not_committed(rig):
    rig.pass_seconds(3.0)  # until the confirmed messages are deleted
    work, before = rig.service._run._unit_of_work, rig.store.load_job("job")

    work.add(Step(work.state))
    rig.idle()

    assert rig.store.load_job("job") == before


def test_a_step_that_is_pending_when_the_job_is_closed_is_not_committed(rig):
    work, before = rig.service._run._unit_of_work, rig.store.load_job("job")

    work.add(Step(replace(work.state, since_ms=work.state.since_ms + 1)))
    work.close()
    rig.idle()

    assert rig.store.load_job("job") == before


def test_deliveries_of_a_committed_step_do_not_come_again_when_the_server_dies(rig):
    client, again = rig.clients[0], []
    client.do(client.tasks[0])
    rig.idle()
    assert client.verdicts

    rig.kill()
    rig.broker.subscribe(topology.SERVER_QUEUE.name, again.append)
    rig.idle()

    assert again == []


def test_an_upload_that_was_checked_is_closed_before_its_result_counts(rig, monkeypatch):
    client, still_open = rig.clients[0], []

    def hit(point):
        if point is Failpoint.UPLOAD_CHECKED:
            still_open.append(dict(rig.service._run.uploads._open))

    monkeypatch.setattr(failpoints, "hit", hit)
    client.do(client.tasks[0])
    rig.idle()

    assert still_open == [{}]


def test_crash_points_of_results_and_messages_are_passed_by_the_steps_that_have_some(rig, monkeypatch):
    passed = []
    monkeypatch.setattr(failpoints, "hit", passed.append)
    work, client = rig.service._run._unit_of_work, rig.clients[0]

    work.add(Step(replace(work.state, since_ms=work.state.since_ms + 1)))
    rig.idle()
    assert passed == []

    client.do(client.tasks[0])
    rig.idle()
    assert passed.count(Failpoint.RESULT_COUNTED) == 1
    assert Failpoint.STEP_COMMITTED in passed


def test_a_message_that_waits_for_its_commit_cannot_be_changed():
    pending = PendingMessage("host-1", CancelTask(job="job", task="t", client="client-1"), "id")

    with pytest.raises(FrozenInstanceError):
        pending.address = "host-2"
